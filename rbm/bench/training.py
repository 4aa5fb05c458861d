"""Training steps of a Qwen3-VL reward model with random weights, against the straightforward way in the same run.

Four ways to compute the same step (forward, losses, backward, AdamW), in turns on the same batches:

    plain    rows padded together, transformers' own forward, the tower on every frame (`rbm.bench.plain_qwen`)
    packed   sequences packed without padding, pairs share their prompt; the tower still on every frame of every clip
    shared   and frames that clips share are encoded once
    cached   and no tower: features are given in the batch

The batches are a real sampler's, of a corpus made for the run. Outputs of all four are compared first.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rbm.bench import dims as sizes
from rbm.bench import flops
from rbm.bench.device import device_named, now, random_model, versions
from rbm.bench.device import threads as torch_threads
from rbm.bench.measure import machine
from rbm.bench.plain_qwen import PlainBatch, PlainQwen
from rbm.bench.synthetic import record, scene
from rbm.corpus import CorpusWriter
from rbm.model import LossWeights, PairBatch, RewardModel, RewardOutput, reward_losses
from rbm.model.backbones.qwen3_vl import Qwen3VLBackbone
from rbm.model.batch import ClipBatch
from rbm.model.pixels import fitting_size
from rbm.trajectory import Quality, Task

WAYS = ("plain", "packed", "shared", "cached")
CONTEXT = 8
STRATEGIES = {"outcome": 1.0, "wrong_task": 1.0, "rewind": 1.0, "reverse": 1.0}
FRAME = {"4b": (240, 320), "small": (240, 240), "even": (240, 240), "tiny": (240, 240)}
"""Height and width of stored frames: 80 visual tokens, and 64."""


@dataclass(frozen=True)
class Sample:
    """One step's batch, as each of the ways gets it."""

    pairs: PairBatch
    plain: PlainBatch
    clips: dict[str, ClipBatch]


def run(
    dims: str = "small",
    device: str = "auto",
    dtype: str = "auto",
    pairs: int = 16,
    steps: int = 5,
    batches: int = 3,
    checkpointing: bool | None = None,
    ways: tuple[str, ...] = WAYS,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure; fields are described in docs/benchmarks.md.

    Args:
        dims: a key of `rbm.bench.dims.DIMS`.
        device: `auto`, or one of torch's. dtype: `auto` is bfloat16 on an accelerator and float32 on the CPU.
        steps: of each way that are timed, after one that is not.
        batches: different ones; steps go through them in turn.
        checkpointing: gradient checkpointing; none: for 4b only.

    Raises:
        UserError: a device that is not there, or dimensions that are too large for it.
    """
    place = device_named(device, dims)
    kind = torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and place.type != "cpu") else torch.float32
    checkpointing = dims == "4b" if checkpointing is None else checkpointing
    with torch_threads(threads):
        _say(f"building {dims} on {place}")
        torch.manual_seed(0)
        model = random_model(dims, place, kind, CONTEXT)
        backbone = model.backbone
        assert isinstance(backbone, Qwen3VLBackbone)
        plain = PlainQwen(model)
        plain.share_markers()
        if checkpointing:
            backbone.set_gradient_checkpointing(True)
            plain.qwen.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _say("making batches")
        samples = [_sample(model, plain, batch, place) for batch in _batches(model, FRAME[dims], pairs, batches)]
        facts: dict[str, Any] = {
            "dims": dims,
            "device": torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
            "dtype": str(kind).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "gradient_checkpointing": checkpointing,
            "machine": machine(),
            "versions": versions(),
            "model": _described(model),
            "batches": _shapes(model, samples, visual_tokens(dims)),
            "outputs": _compared(model, plain, samples[0]),
        }
        matmul = _matmul_rate(place, kind)
        timed = _timed(model, plain, samples, ways, steps, place)
    seconds = {way: float(np.median(found["seconds"])) for way, found in timed.items()}
    results = {}
    for way, found in timed.items():
        # what must be computed: no padding, no frame twice, whatever the way does
        work = _needed(dims, model, samples, "cached" if way == "cached" else "shared", checkpointing)
        results[way] = {
            "pairs_a_second": pairs / seconds[way],
            "tokens_a_second": facts["batches"]["places_packed"] / seconds[way],
            "median_seconds": seconds[way],
            "seconds": found["seconds"],
            "core_seconds": found["cpu"],
            "model_flops": work.total,
            "model_flop_utilisation": work.total / seconds[way] / matmul,
            "with_recomputation": (work.total + work.again) / seconds[way] / matmul,
        }
        if "plain" in seconds:
            results[way]["times_plain"] = seconds["plain"] / seconds[way]
            if place.type == "cpu":  # what else the machine does changes these less
                core = [float(np.median(timed[name]["cpu"])) for name in ("plain", way)]
                results[way]["times_plain_in_core_seconds"] = core[0] / core[1]
        if place.type == "cuda":
            results[way]["peak_memory_bytes"] = found["peak"]
    by_flops = {
        name: {
            way: _needed(name, model, samples, "plain").total / _needed(name, model, samples, way).total for way in WAYS
        }
        for name in sizes.DIMS
    }
    return facts | {
        "matmul_flops_a_second": matmul,
        "results": results,
        "times_plain_by_flops": by_flops,
        "proportions": {name: proportions(name) for name in sizes.DIMS},
    }


def proportions(dims: str) -> dict[str, float]:
    """How the work of a model is shared out, for a clip of eight frames with a prompt of 40 tokens.

    Fields: FLOPs of the tower over those of the language model, `forward` and in a training `step` with the tower
    frozen; `attention` of the language model over its matrices.
    """
    text, vision = sizes.DIMS[dims]
    tokens = visual_tokens(dims)
    n = 40 + CONTEXT * (tokens + 8)
    work = flops.step(text, vision, n, n * (n + 1) // 2, CONTEXT, tokens)
    language = work.language + work.attention
    return {
        "tower_over_language_forward": work.tower / (language / 3),
        "tower_over_language_step": work.tower / language,
        "attention_over_matrices": work.attention / work.language,
    }


def _batches(model: RewardModel, frame: tuple[int, int], pairs: int, count: int) -> Iterator[PairBatch]:
    """Batches of the training's own data module, over a corpus that is made for it."""
    from rbm.training.data import Order, PairDataModule, Share

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "corpus"
        _corpus(place, *frame)
        data = PairDataModule(
            model,
            str(place),
            heldout_per_quality=0,
            validation_per_quality=0,
            pairs_per_step=pairs,
            weights=STRATEGIES,
            clips={"irregular": 0.35, "session": 0.3, "shorter": 0.5},
            validation_pairs=0,
            workers=0,
        )
        dataset = data.dataset(data.sampler, Share(pairs))
        for step in range(count):
            loaded = dataset[Order(step, 0, data.sampler.planner.plan(step * pairs, pairs))]
            yield loaded.batch  # type: ignore[union-attr]


def _corpus(place: Path, height: int, width: int) -> None:
    """Eight tasks in four scenes, two attempts of each outcome."""
    rng = np.random.default_rng(0)
    tasks = [
        Task(f"{verb} the {thing}", thing)
        for thing in ("drawer", "red cup", "door of the cabinet", "blue block on the table")
        for verb in ("pull", "push")
    ]
    with CorpusWriter(place) as writer:
        for task in tasks:
            writer.add_task(task)
        for task in tasks:
            for quality in Quality:
                for number in range(2):
                    frames = scene(rng, height, width, 3.0)
                    trajectory = record(f"{task.text}/{quality}/{number}", task.text, quality, height, width)
                    writer.add(trajectory, {"main": frames})


def _sample(model: RewardModel, plain: PlainQwen, batch: PairBatch, device: torch.device) -> Sample:
    alone = batch.clips.to(device)
    with torch.no_grad():
        encoded = tuple(model.backbone.encoded(alone))
    return Sample(
        pairs=batch.to(device),
        plain=plain.batch(batch.clips).to(device),
        clips={"packed": unshared(alone), "shared": alone, "cached": replace(alone, frames=encoded)},
    )


def unshared(clips: ClipBatch) -> ClipBatch:
    """The same clips with a frame of its own for every step (frames of one size, one view)."""
    (frames,) = clips.frames
    ids = clips.frame_ids[:, 0]
    return replace(clips, frames=(frames[ids],), frame_ids=torch.arange(len(ids), device=ids.device)[:, None])


def _forward(model: RewardModel, plain: PlainQwen, sample: Sample, way: str) -> RewardOutput:
    pairs = sample.pairs.pairs
    if way == "plain":
        return plain(sample.plain, pairs)
    return model(sample.clips[way], pairs)


@torch.no_grad()
def _compared(model: RewardModel, plain: PlainQwen, sample: Sample) -> dict[str, Any]:
    """Largest differences of the outputs from the plain way's, and what other pixels in one clip change elsewhere."""
    model.eval()
    plain.eval()
    expected = _forward(model, plain, sample, "plain")
    found: dict[str, Any] = {}
    for way in WAYS[1:]:
        output = _forward(model, plain, sample, way)
        found[way] = {
            name: float((getattr(output, name) - getattr(expected, name)).abs().max())
            for name in ("progress_logits", "success_logits", "preference_logits")
        }
    clips = sample.clips["packed"]
    victim = 1
    owner = torch.repeat_interleave(torch.arange(len(clips.lengths), device=clips.lengths.device), clips.lengths)
    (frames,) = clips.frames
    other = torch.where((owner == victim)[:, None, None, None], 255 - frames, frames)
    before, after = model(clips), model(replace(clips, frames=(other,)))
    rest = torch.arange(len(clips.lengths), device=owner.device) != victim
    found["neighbours_pixels"] = {
        "others_progress": float((before.progress_logits - after.progress_logits)[owner != victim].abs().max()),
        "others_utility": float((before.utility - after.utility)[rest].abs().max()),
        "own_progress": float((before.progress_logits - after.progress_logits)[owner == victim].abs().max()),
    }
    model.train()
    plain.train()
    return found


def _timed(
    model: RewardModel, plain: PlainQwen, samples: list[Sample], ways: tuple[str, ...], steps: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Seconds of each way's steps, and peak memory on a card; the ways take turns on the same batches."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=device.type == "cuda")
    found: dict[str, dict[str, Any]] = {way: {"seconds": [], "cpu": [], "peak": 0} for way in ways}
    for number in range(steps + 1):
        sample = samples[number % len(samples)]
        for way in ways:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start, cpu = now(device), time.process_time()
            output = _forward(model, plain, sample, way)
            reward_losses(output, sample.pairs.targets, sample.pairs.counts, LossWeights()).total.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds, cpu = now(device) - start, time.process_time() - cpu
            if number:  # the first warms up
                found[way]["seconds"].append(seconds)
                found[way]["cpu"].append(cpu)
            if device.type == "cuda":
                found[way]["peak"] = max(found[way]["peak"], torch.cuda.max_memory_allocated(device))
            _say(f"step {number} {way}: {seconds:.2f} s, {cpu:.2f} s of them on a core")
    return found


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large product of matrices on this device: the best of several runs."""
    n, runs = (8192, 20) if device.type == "cuda" else (1024, 8)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(runs):
        start = now(device)
        torch.mm(a, b)
        times.append(now(device) - start)
    return 2 * n**3 / min(times)


def _described(model: RewardModel) -> dict[str, Any]:
    backbone = model.backbone
    assert isinstance(backbone, Qwen3VLBackbone)
    return {
        "language_parameters": sum(x.numel() for x in backbone.language.parameters()),
        "tower_parameters": sum(x.numel() for x in backbone.tower.parameters()),
        "trained_parameters": sum(x.numel() for x in model.parameters() if x.requires_grad),
        "architecture": backbone.architecture,
    }


@dataclass(frozen=True)
class Lengths:
    """Of each clip of a batch, int64 (N,): tokens of its question, other words of it, its frames, and a number that
    clips with the same question share."""

    question: Tensor
    words: Tensor
    frames: Tensor
    root: Tensor
    distinct: int
    """Distinct frames of the batch."""

    @classmethod
    def of(cls, model: RewardModel, sample: Sample) -> Lengths:
        backbone, clips = model.backbone, sample.clips["shared"]
        assert isinstance(backbone, Qwen3VLBackbone)
        tasks = sorted(set(clips.tasks))
        question = torch.tensor([len(backbone.words.encode(backbone.prompt.question(task))) for task in clips.tasks])
        pictures = sample.plain.mm_token_type_ids.sum(1).cpu()
        return cls(
            question=question,
            words=sample.plain.attention_mask.sum(1).cpu() - pictures - question,
            frames=clips.lengths.cpu(),
            root=torch.tensor([tasks.index(task) for task in clips.tasks]),
            distinct=sum(len(group) for group in clips.frames),
        )

    def rows(self, tokens: int) -> Tensor:
        """int64 (N,), places of each clip with its question, for frames of so many tokens."""
        return self.question + self.words + tokens * self.frames

    def padded(self, tokens: int) -> tuple[int, int]:
        """Places of the padded rows, and (query, key) pairs in them: all with all."""
        longest = int(self.rows(tokens).max())
        return longest * len(self.frames), longest**2 * len(self.frames)

    def packed(self, tokens: int) -> tuple[int, int]:
        """Places of the pack, and (query, key) pairs that see each other; a shared question counts once."""
        rows = self.rows(tokens)
        first = [self.root.tolist().index(root) for root in self.root.tolist()]
        again = self.question[torch.tensor([place != number for number, place in enumerate(first)])]
        return int(rows.sum() - again.sum()), int((rows * (rows + 1) // 2).sum() - (again * (again + 1) // 2).sum())


def _shapes(model: RewardModel, samples: list[Sample], tokens: int) -> dict[str, Any]:
    """Means over the batches, and shares."""
    lengths = [Lengths.of(model, sample) for sample in samples]
    shown = sum(int(batch.frames.sum()) for batch in lengths)
    distinct = sum(batch.distinct for batch in lengths)
    padded = sum(batch.padded(tokens)[0] for batch in lengths)
    real = sum(int(batch.rows(tokens).sum()) for batch in lengths)
    packed = sum(batch.packed(tokens)[0] for batch in lengths)
    strategies = [name for sample in samples for name in sample.pairs.strategies]
    clips = torch.bincount(torch.cat([batch.frames for batch in lengths]), minlength=CONTEXT + 1)
    return {
        "pairs": len(samples[0].pairs.strategies),
        "tokens_a_frame": tokens,
        "frames_shown": shown / len(samples),
        "frames_distinct": distinct / len(samples),
        "duplicate_share": round(1 - distinct / shown, 4),
        "places_padded": padded / len(samples),
        "places_packed": packed / len(samples),
        "padding_share": round(1 - real / padded, 4),
        "clips_of_length": dict(enumerate(clips.tolist())),
        "strategies": {name: strategies.count(name) for name in STRATEGIES},
    }


def _needed(dims: str, model: RewardModel, samples: list[Sample], way: str, checkpointing: bool = False) -> flops.Work:
    """FLOPs of a step as a way computes it, the mean over the batches."""
    text, vision = sizes.DIMS[dims]
    tokens = visual_tokens(dims)
    works = []
    for sample in samples:
        lengths = Lengths.of(model, sample)
        places, seen = lengths.padded(tokens) if way == "plain" else lengths.packed(tokens)
        shown = {"shared": lengths.distinct, "cached": 0}.get(way, int(lengths.frames.sum()))
        works.append(flops.step(text, vision, places, seen, shown, tokens, checkpointing=checkpointing))
    return flops.Work(*(sum(getattr(work, field.name) for work in works) / len(works) for field in fields(flops.Work)))


def visual_tokens(dims: str) -> int:
    """Of one frame."""
    height, width = fitting_size(*FRAME[dims], unit=32, least=4, most=16384)
    return height * width // 32**2


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
