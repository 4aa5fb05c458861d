"""Peak memory of a training configuration, from arithmetic that is shown line by line.

The model is built on the meta device with the dimensions of the real one, LoRA and what is trained as the configuration
says: its counts of weights are real, and no memory is taken. Activations follow from what each operation keeps for the
way back, as transformers writes the blocks (`block`); a test holds that against what PyTorch keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from rbm.bench import dims as sizes
from rbm.bench import flops
from rbm.config import compose, instantiate
from rbm.errors import UserError
from rbm.model import RewardModel
from rbm.model.backbones import PairMode
from rbm.model.backbones.qwen3_vl import Qwen3VLBackbone
from rbm.model.batch import ClipBatch
from rbm.model.packing import Pack, Streams

GB = 1e9
TASK = "pick up the red cup and put it on the plate to the left of the sink"
AT_ONCE = 65536
"""Visual tokens that a frozen tower reads at once (`rbm.model.backbones.vlm.ENCODE_TOKENS`)."""


@dataclass(frozen=True)
class Line:
    """One line of the sum: what it is, how it is computed, and bytes."""

    name: str
    formula: str
    bytes: float

    def __str__(self) -> str:
        return f"{self.name:<44}{self.bytes / GB:9.2f} GB   {self.formula}"


@dataclass(frozen=True)
class Kept:
    """In which precision a block computes, and what of it is trained: this decides what is kept for the way back.

    Attributes:
        stream: bytes of an element between blocks (4 where the table of words is float32).
        compute: bytes of an element that a product of matrices reads: 2 under autocast.
        matrices, norms: the block's matrices, its norms are trained.
        norm_bytes: of a norm's weight.
        lora: r, 0 for none. lora_compute: as compute, in LoRA's matrices.
        dropout: LoRA has dropout.
        mask: bytes of an element of a dropout mask: 1 on a GPU; on the CPU those of the input.
    """

    stream: int
    compute: int
    matrices: bool
    norms: bool
    norm_bytes: int
    lora: int = 0
    lora_compute: int = 2
    dropout: bool = False
    mask: int = 1


def block(text: Mapping[str, Any], kept: Kept) -> dict[str, float]:
    """Bytes that one decoder block keeps for each place, by operation.

    d: width, q and k: width of all queries and of all keys, i: the feed-forward's width. `kept.stream` is s,
    `kept.compute` c.
    """
    d, i = text["hidden_size"], text["intermediate_size"]
    q, k = text["num_attention_heads"] * text["head_dim"], text["num_key_value_heads"] * text["head_dim"]
    s, c = kept.stream, kept.compute
    after_norm = max(s, kept.norm_bytes)
    found = {
        # float32 of the stream (the stream itself where s = 4), and the normed one where its weight is trained
        "norms": 2 * d * (4 + (s if kept.norms else 0)),
        # the same of queries and keys
        "norms of queries and keys": (q + k) * (4 + (c if kept.norms else 0)),
        # queries, keys, values, result, and a float32 a head
        "attention": c * (2 * q + 2 * k) + 4 * text["num_attention_heads"],
        # gate, its activation, up
        "feed-forward": 3 * c * i,
    }
    if kept.matrices:
        # inputs of q k v, o, gate up, down; autocast makes a copy for each matrix where the norm's result is float32
        copies = (3, 2) if after_norm > c else (1, 1)
        found["inputs of matrices"] = c * (sum(copies) * d + q + i)
    elif kept.lora:
        inputs = 3 * d + q + 2 * d + i  # q k v, o, gate up, down: each has a dropout of its own
        found["inputs of LoRA"] = (kept.lora_compute + (kept.mask if kept.dropout else 0)) * inputs
        found["inside LoRA"] = kept.lora_compute * 7 * kept.lora
    return found


def activations(text: Mapping[str, Any], kept: Kept, places: int, checkpointing: bool) -> list[Line]:
    """What the language model takes on the way there and back, for `places` in a micro-batch.

    The first two lines are what it has kept when the way back begins.
    """
    parts = block(text, kept)
    one = sum(parts.values())
    layers, d, i = text["num_hidden_layers"], text["hidden_size"], text["intermediate_size"]
    listed = " + ".join(f"{name} {value / 1e3:.1f}" for name, value in parts.items())
    last = Line(
        "the last norm",
        f"{places:,} places × {d} × {4 + kept.stream * kept.norms} B",
        places * d * (4 + kept.stream * kept.norms),
    )
    back = Line(
        "gradients inside a block, on the way back",
        f"{places:,} places × {kept.compute} B × (3 × {i} + 2 × {d})",
        places * kept.compute * (3 * i + 2 * d),
    )
    if checkpointing:
        return [
            Line(
                "inputs of blocks, kept",
                f"{layers} blocks × {places:,} places × {d} × {kept.stream} B",
                layers * places * d * kept.stream,
            ),
            last,
            Line("one block, computed again", f"{places:,} places × {one / 1e3:.1f} kB: {listed}", places * one),
            back,
        ]
    return [
        Line(
            "activations of all blocks",
            f"{layers} blocks × {places:,} places × {one / 1e3:.1f} kB: {listed}",
            layers * places * one,
        ),
        last,
        back,
    ]


def run(
    overrides: Sequence[str] = (), dims: str = "4b", gpus: int | None = None, tokens: int = 80, limit: float = 24.0
) -> dict[str, Any]:
    """Lines and their sums for the configuration that `rbm train` would run with these overrides.

    Every clip is taken to have all `context_frames` frames: the largest batch there can be.

    Args:
        dims: whose dimensions: a key of `rbm.bench.dims.DIMS`.
        gpus: processes; none for what the configuration says.
        tokens: visual tokens of a frame.
        limit: memory of a card, GB: whether it fits.

    Raises:
        UserError: a configuration without a Qwen3-VL, or numbers that do not go together.
    """
    overrides = list(overrides)
    if not any(text.startswith(("model=", "experiment=")) for text in overrides):
        overrides.append("model=qwen3_vl")
    config = compose("train", overrides)
    processes = gpus or _processes(config)
    micro = config.data.micro_batches * processes
    if config.data.pairs_per_step % micro:
        raise UserError(f"data.pairs_per_step={config.data.pairs_per_step} is no multiple of {micro} parts")
    pairs = config.data.pairs_per_step // micro
    precision = "bf16-mixed" if config.trainer.precision == "auto" else str(config.trainer.precision)
    model = _model(config, dims)
    tuning = instantiate(config.optimization.tuning)
    tuning.apply(model)
    if precision == "bf16-true":
        model.to(torch.bfloat16)
    backbone = model.backbone
    assert isinstance(backbone, Qwen3VLBackbone)
    pack = _pack(model, pairs, tokens)
    places, text = len(pack.ids), sizes.DIMS[dims][0]
    fsdp = config.trainer.strategy == "fsdp"
    shares = processes if fsdp else 1
    lines = _weights(model, shares)
    kept = kept_by(model, tuning, precision, fsdp)
    step = activations(text, kept, places, tuning.gradient_checkpointing)
    copies = _autocast_copies(model, precision, fsdp)
    if copies is not None:
        step.append(copies)
    frames = pairs * 2 * model.context_frames
    step.append(_features(backbone, frames, tokens, len(pack.picture), kept))
    tower = [] if config.data.features else [_tower(sizes.DIMS[dims][1], frames * tokens)]
    update = [_update(model, shares)]
    phases = {"forward and backward": step, "tower at work": tower, "optimiser's step": update}
    always = sum(line.bytes for line in lines)
    most = max(sum(line.bytes for line in phase) for phase in phases.values())
    work = _work(dims, pack, 0 if config.data.features else frames, tokens, tuning)
    parts = config.data.micro_batches
    return {
        "overrides": overrides,
        "dims": dims,
        "processes": processes,
        "strategy": str(config.trainer.strategy),
        "precision": precision,
        "pairs_a_micro_batch": pairs,
        "places_a_micro_batch": places,
        "trained_parameters": sum(x.numel() for x in model.parameters() if x.requires_grad),
        "always": [vars(line) for line in lines],
        "one_phase_at_a_time": {name: [vars(line) for line in phase] for name, phase in phases.items()},
        "peak_bytes": always + most,
        "step_flops": {
            name: parts * getattr(work, name) for name in ("total", "language", "attention", "tower", "again")
        },
        "limit_bytes": limit * GB,
        "fits": always + most <= limit * GB,
    }


def table(facts: Mapping[str, Any]) -> str:
    """The sum as text."""
    rows = [
        f"Qwen3-VL {facts['dims']}, {facts['pairs_a_micro_batch']} pairs a micro-batch on each of "
        f"{facts['processes']} GPUs ({facts['strategy']}, {facts['precision']}): {facts['places_a_micro_batch']:,} "
        f"places; {facts['trained_parameters']:,} weights are trained",
        "",
        "always there",
    ]
    rows += [f"  {Line(**line)}" for line in facts["always"]]
    for name, phase in facts["one_phase_at_a_time"].items():
        if phase:
            rows += [f"{name}: {sum(line['bytes'] for line in phase) / GB:.2f} GB"]
            rows += [f"  {Line(**line)}" for line in phase]
    peta = {name: value / 1e15 for name, value in facts["step_flops"].items()}
    done = peta["total"] + peta["again"]
    verdict = "fits" if facts["fits"] else "does not fit"
    rows += [
        "",
        f"peak = always there + the largest phase = {facts['peak_bytes'] / GB:.2f} GB: {verdict} into "
        f"{facts['limit_bytes'] / GB:.0f} GB (add 1 GB for the driver and the allocator's rest)",
        f"work of an optimiser step on each GPU: {peta['total']:.3f} PFLOP (matrices {peta['language']:.3f}, attention "
        f"{peta['attention']:.3f}, tower {peta['tower']:.3f}) and {peta['again']:.3f} computed again: "
        f"{done * 10:.1f} s at 100 TFLOP/s",
    ]
    return "\n".join(rows)


def _processes(config: DictConfig) -> int:
    devices = config.trainer.devices
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"trainer.devices={devices} says no number of GPUs: give --gpus")
    return int(devices) * int(config.trainer.num_nodes)


def _model(config: DictConfig, dims: str) -> RewardModel:
    """The configuration's model with random weights of `dims` on the meta device, bfloat16 as the base is stored."""
    options = {key: value for key, value in config.model.items() if key not in ("_target_", "backbone")}
    mine = {
        key: value for key, value in (config.model.get("backbone") or {}).items() if key not in ("_target_", "base")
    }
    target = str((config.model.get("backbone") or {}).get("_target_", ""))
    if "Qwen3VLBackbone" not in target:
        raise UserError(f"the arithmetic is for Qwen3-VL, not for {target or 'this model'}: add model=qwen3_vl")
    with torch.device("meta"):
        backbone = Qwen3VLBackbone(sizes.architecture(dims), sizes.tokenizer(), **mine)
        model = RewardModel(backbone, **options)
    return model.to(torch.bfloat16)


def _pack(model: RewardModel, pairs: int, tokens: int) -> Pack:
    """The largest micro-batch as the model lays it out."""
    backbone = model.backbone
    assert isinstance(backbone, Qwen3VLBackbone)
    levels = 1 + len(backbone.model.config.vision_config.deepstack_visual_indexes)
    shape = (levels, 1, tokens, backbone.hidden)
    clips = [
        (torch.empty(model.context_frames, *shape, device="meta"), f"{TASK} {pair}")
        for pair in range(pairs)
        for _ in "ab"
    ]
    batch = ClipBatch.from_clips(clips)
    numbers = torch.arange(2 * pairs).reshape(-1, 2)
    mode = PairMode.READOUT
    if model.preference == "joint":
        mode = PairMode.JOINT if model.pair == "isolated" else PairMode.CAUSAL
    return backbone.pack(batch, mode, numbers)


def kept_by(model: RewardModel, tuning: Any, precision: str, fsdp: bool = False) -> Kept:
    """What a tuned model's blocks keep; under FSDP with `bf16-mixed` all weights compute in bfloat16."""
    backbone = model.backbone
    assert isinstance(backbone, Qwen3VLBackbone)
    norm = backbone.language.norm.weight
    lora = tuning.language == "lora"
    brief = fsdp and precision == "bf16-mixed"
    return Kept(
        stream=2 if brief else backbone.embedding.weight.element_size(),
        compute=2 if precision != "32-true" else backbone.embedding.weight.element_size(),
        matrices=tuning.language == "full",
        norms=norm.requires_grad,
        norm_bytes=2 if brief else norm.element_size(),
        lora=tuning.lora.get("r", 32) if lora else 0,
        lora_compute=4 if precision == "32-true" else 2,
        dropout=lora and tuning.lora.get("dropout", 0.05) > 0,
    )


def _work(dims: str, pack: Pack, frames: int, tokens: int, tuning: Any) -> flops.Work:
    """FLOPs of a micro-batch."""
    assert isinstance(pack.streams, Streams)
    before = torch.cat([torch.arange(1, n + 1).repeat(count) for count, n in pack.streams.sizes])
    seen = int(before[pack.streams.scatter].sum())
    return flops.step(
        *sizes.DIMS[dims],
        len(pack.ids),
        seen,
        frames,
        tokens,
        trained=tuning.language == "full",
        checkpointing=tuning.gradient_checkpointing,
    )


def _weights(model: RewardModel, shares: int) -> list[Line]:
    """Weights, gradients and AdamW's states, of each process."""
    counts: dict[tuple[str, bool, int], int] = {}
    backbone: Any = model.backbone
    tower = {id(x) for x in backbone.tower.parameters()}
    for name, x in model.named_parameters():
        if ".lora_" in name:
            part = "LoRA"
        elif id(x) in tower:
            part = "vision tower"
        elif name.startswith("backbone.model."):
            part = "language model"
        else:
            part = "heads and markers"
        key = (part, x.requires_grad, x.element_size())
        counts[key] = counts.get(key, 0) + x.numel()
    over = f" / {shares}" if shares > 1 else ""
    lines = [
        Line(
            f"{part}, {'trained' if trained else 'frozen'}",
            f"{count:,} weights × {size} B{over}",
            count * size / shares,
        )
        for (part, trained, size), count in sorted(counts.items())
    ]
    trained = sum(count for (_, yes, _), count in counts.items() if yes)
    size = max((size for (_, yes, size) in counts if yes), default=4)
    lines.append(Line("gradients", f"{trained:,} trained × {size} B{over}", trained * size / shares))
    lines.append(Line("AdamW's two moments", f"{trained:,} trained × 2 × {size} B{over}", trained * 2 * size / shares))
    if shares > 1:
        largest = sum(x.numel() for x in backbone.language.layers[0].parameters())
        # all that is no block and no head is one unit (`rbm.training.parallel.shard`): words, tower, markers
        apart = {id(x) for part in (backbone.language.layers, *_heads(model)) for x in part.parameters()}
        rest = [x for x in model.parameters() if id(x) not in apart]
        every, learning = sum(x.numel() for x in rest), sum(x.numel() for x in rest if x.requires_grad)
        lines.append(
            Line(
                "weights that are put together",
                f"2 B × (2 blocks × {largest:,} + words and tower {every:,})",
                2 * (2 * largest + every),
            )
        )
        lines.append(
            Line(
                "gradients before they are shared out",
                f"4 B × (2 × {largest:,} + {learning:,})",
                4 * (2 * largest + learning),
            )
        )
    return lines


def _heads(model: RewardModel) -> list[torch.nn.Module]:
    return [module for module in model.children() if module is not model.backbone]


def _autocast_copies(model: RewardModel, precision: str, fsdp: bool) -> Line | None:
    """bfloat16 copies that autocast makes of float32 matrices and holds until the forward's end."""
    if precision != "bf16-mixed" or fsdp:
        return None
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    count = sum(x.numel() for name, x in model.named_parameters() if name in names and x.element_size() == 4)
    return Line("autocast's copies of float32 matrices", f"{count:,} × 2 B", count * 2)


def _features(backbone: Qwen3VLBackbone, frames: int, tokens: int, shown: int, kept: Kept) -> Line:
    """Features of the pictures: as the tower gives them, and once for each place that shows them."""
    levels = 1 + len(backbone.model.config.vision_config.deepstack_visual_indexes)
    made, given = kept.compute, kept.stream
    return Line(
        "features of the pictures",
        f"{levels} levels × {backbone.hidden} × ({frames * tokens:,} tokens × {made} B + {shown:,} places × {given} B)",
        levels * backbone.hidden * (frames * tokens * made + shown * given),
    )


def _tower(vision: Mapping[str, Any], tokens: int) -> Line:
    """A frozen tower keeps nothing; its largest moment is the rotary encoding, which runs in float32.

    Then there are: the stream, its norm, queries, keys and values (5 × 2 B), queries and keys in float32, times cosine,
    rotated, times sine, and summed for the first of them (6 × 4 B), all of a patch's width.
    """
    patches = min(tokens, AT_ONCE) * vision["spatial_merge_size"] ** 2
    width = vision["hidden_size"] * (5 * 2 + 6 * 4)
    return Line("tower, one block, forward only", f"{patches:,} patches × {width / 1e3:.1f} kB", patches * width)


def _update(model: RewardModel, shares: int) -> Line:
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    size = max((x.element_size() for x in model.parameters() if x.requires_grad), default=4)
    over = f" / {shares}" if shares > 1 else ""
    return Line(
        "what AdamW holds between its operations", f"{trained:,} trained × {size} B{over}", trained * size / shares
    )
