"""`rbm bench train` and `rbm bench memory`: what they report is counted right; how fast it is, no test asks."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from rbm.bench import dims, flops, memory, training
from rbm.bench.cli import bench
from rbm.bench.device import random_model
from rbm.bench.plain_qwen import PlainQwen
from rbm.errors import UserError
from rbm.model import LossWeights, RewardModel, reward_losses
from rbm.model.backbones import PairMode
from rbm.model.batch import ClipBatch
from rbm.training.tuning import Tuning

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> tuple[RewardModel, PlainQwen, training.Sample]:
    """A tiny model, the plain way on its weights, and a batch of three pairs."""
    torch.manual_seed(0)
    model = random_model("tiny", CPU, torch.float32)
    plain = PlainQwen(model)
    plain.share_markers()
    (batch,) = training._batches(model, (96, 96), 3, 1)
    return model, plain, training._sample(model, plain, batch, CPU)


def test_the_command_measures_and_compares(tmp_path):
    out = tmp_path / "train.json"
    command = [str(Path(sys.executable).with_name("rbm")), "bench", "train", "--dims", "tiny", "--pairs", "2"]
    command += ["--steps", "1", "--batches", "1", "--threads", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    facts = json.loads(out.read_text())
    assert facts == json.loads(done.stdout)
    assert list(facts["results"]) == ["plain", "packed", "shared", "cached"]
    for result in facts["results"].values():
        assert len(result["seconds"]) == len(result["core_seconds"]) == 1
        assert result["pairs_a_second"] > 0
        assert result["model_flop_utilisation"] > 0
    assert facts["results"]["plain"]["times_plain"] == 1
    for way in ("packed", "shared", "cached"):
        assert max(facts["outputs"][way].values()) < 1e-4
    assert facts["outputs"]["neighbours_pixels"]["others_progress"] == 0
    assert facts["outputs"]["neighbours_pixels"]["others_utility"] == 0
    assert facts["outputs"]["neighbours_pixels"]["own_progress"] > 1e-3
    assert 0 <= facts["batches"]["duplicate_share"] < 1
    assert facts["threads"] == 1
    assert facts["versions"]["torch"] == torch.__version__


def test_the_plain_way_trains_the_same_weights_to_the_same_gradients(tiny):
    model, plain, sample = tiny
    model.eval()  # no dropout anywhere
    found = []
    for way in ("plain", "shared"):
        model.zero_grad()
        output = training._forward(model, plain, sample, way)
        reward_losses(output, sample.pairs.targets, sample.pairs.counts, LossWeights()).total.backward()
        layer = model.backbone.language.layers[0].self_attn
        found.append([layer.q_proj.weight.grad.clone(), layer.k_norm.weight.grad.clone()])
        assert all(x.grad is None for x in model.backbone.tower.parameters())
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_places_are_counted_as_they_are_laid_out(tiny):
    model, _, sample = tiny
    lengths = training.Lengths.of(model, sample)
    tokens = 9  # 96 × 96
    assert lengths.rows(tokens).tolist() == sample.plain.attention_mask.sum(1).tolist()
    assert lengths.padded(tokens)[0] == sample.plain.input_ids.numel()
    pack = model.backbone.pack(sample.clips["shared"], PairMode.READOUT)
    places, seen = lengths.packed(tokens)
    assert places == len(pack.ids)
    # of every place, how many it sees: itself, what is before it in its branch, and its question
    before = torch.cat([torch.arange(1, n + 1).repeat(count) for count, n in pack.streams.sizes])
    assert seen == int(before[pack.streams.scatter].sum())
    assert len(sample.clips["packed"].frames[0]) == len(sample.clips["packed"].frame_ids)
    assert lengths.distinct == sum(map(len, sample.clips["shared"].frames))


def test_flops_are_those_that_pytorch_counts(tiny):
    """Products of matrices, forward and backward; it does not count attention here."""
    model, _, sample = tiny
    text, vision = dims.DIMS["tiny"]
    tokens = 9
    places, seen = training.Lengths.of(model, sample).packed(tokens)
    work = flops.step(text, vision, places, seen, 1, tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.backbone.encode(sample.clips["packed"].frames[0][:1])
    attention = vision["depth"] * 4 * (tokens * 4) ** 2 * vision["hidden_size"]
    # the count has the published patch embedding, which reads a still picture twice
    halved = 2 * tokens * 4 * 3 * 16 * 16 * vision["hidden_size"]
    assert counted(counter) == pytest.approx(work.tower - attention - halved)
    with FlopCounterMode(display=False) as counter:
        states = model.backbone(sample.clips["cached"], PairMode.READOUT)
        (states.frames.sum() + states.readouts.sum()).backward()
    assert counted(counter) == pytest.approx(work.language, rel=0.01)


def counted(counter: FlopCounterMode) -> int:
    found = counter.get_flop_counts()["Global"]
    return sum(value for name, value in found.items() if name in (torch.ops.aten.mm, torch.ops.aten.addmm))


def test_proportions_of_the_small_model_are_those_of_the_real_one():
    small, real = training.proportions("small"), training.proportions("4b")
    assert small["tower_over_language_forward"] == pytest.approx(real["tower_over_language_forward"], rel=0.5)
    assert small["tower_over_language_step"] == pytest.approx(real["tower_over_language_step"], rel=0.5)


def test_the_real_dimensions_need_an_accelerator():
    with pytest.raises(UserError, match="4b dimensions need an accelerator"):
        training.run("4b", device="cpu")
    with pytest.raises(UserError, match="device 'nonsense' is not there"):
        training.run("tiny", device="nonsense")
    assert CliRunner().invoke(bench, ["train", "--ways", "plain,slow"]).exit_code == 2


TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"language": "full"},
    "full, checkpointing": {"language": "full", "gradient_checkpointing": True},
    "lora": {"language": "lora", "lora": {"r": 8, "alpha": 16, "dropout": 0.05}},
    "lora, checkpointing": {
        "language": "lora",
        "lora": {"r": 8, "alpha": 16, "dropout": 0.05},
        "frozen_dtype": "bfloat16",
        "gradient_checkpointing": True,
    },
    "lora, frozen in bfloat16": {"language": "lora", "lora": {"r": 8, "alpha": 16}, "frozen_dtype": "bfloat16"},
    "heads alone": {"language": "none"},
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", list(TUNINGS))
def test_activations_are_those_that_pytorch_keeps(name, precision):
    tuning = Tuning(**TUNINGS[name])
    torch.manual_seed(0)
    model = random_model("small", CPU, torch.float32)
    tuning.apply(model)
    model.train()
    frames = torch.randn(8, 2, 4, 4, model.backbone.hidden)
    batch = ClipBatch.from_clips([(frames, "open the drawer"), (frames[:5], "close it")])
    places = len(model.backbone.pack(batch, PairMode.READOUT).ids)
    text = dims.DIMS["small"][0]
    kept = memory.kept_by(model, tuning, precision)
    lines = memory.activations(text, replace(kept, mask=4), places, tuning.gradient_checkpointing)
    expected = lines[0].bytes + lines[1].bytes
    found = kept_by_pytorch(model, batch, precision)
    print(f"{name}, {precision}: kept {found:,}, by the formula {expected:,.0f}: {found / expected:.3f}")
    assert found == pytest.approx(expected, rel=0.05)


def kept_by_pytorch(model: RewardModel, batch: ClipBatch, precision: str) -> int:
    """Bytes of all that the language model's forward keeps for the way back, weights and their copies left out."""
    weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
    shapes = {tuple(x.shape) for x in model.parameters()} | {
        tuple(x.T.shape) for x in model.parameters() if x.ndim == 2
    }
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights and tuple(x.shape) not in shapes:
            kept[storage.data_ptr()] = storage  # held, so that its place is not given to another
        return x

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
        states = model.backbone(batch, PairMode.READOUT)
    assert states.frames.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_lora_finetuning_fits_a_card_of_24_gigabytes_and_says_why(tmp_path):
    out = tmp_path / "memory.json"
    done = CliRunner().invoke(bench, ["memory", "experiment=lora_finetune", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "fits into 24 GB" in done.output
    assert "LoRA, trained" in done.output
    facts = json.loads(out.read_text())
    always = {line["name"]: line["bytes"] for line in facts["always"]}
    # 36 blocks of q, k, v, o, gate, up, down, r 32
    shapes = ((2560, 4096), (2560, 1024), (2560, 1024), (4096, 2560), (2560, 9728), (2560, 9728), (9728, 2560))
    assert always["LoRA, trained"] == 36 * sum(32 * (a + b) for a, b in shapes) * 4
    assert always["language model, frozen"] == 2 * (36 * (100_925_440 + 5376) + 151936 * 2560 + 2560)
    assert facts["peak_bytes"] == pytest.approx(
        sum(always.values()) + max(sum(x["bytes"] for x in phase) for phase in facts["one_phase_at_a_time"].values())
    )
    without = memory.run(["experiment=lora_finetune", "optimization.tuning.gradient_checkpointing=false"])
    assert not without["fits"]


def test_the_published_recipe_needs_its_shares():
    shared = memory.run(["experiment=rbm_1m"], limit=80)
    assert shared["fits"]
    assert shared["processes"] == 8
    whole = ["experiment=rbm_1m", "trainer.strategy=auto", "trainer.devices=1", "data.pairs_per_step=16"]
    alone = memory.run(whole, limit=80)
    assert not alone["fits"]
    assert alone["trained_parameters"] == shared["trained_parameters"] > 4e9


def test_what_the_arithmetic_cannot_say_is_one_sentence():
    for overrides, says in (
        (["model=nano", "data=corpus", "data.corpus=x"], "is for Qwen3-VL"),
        (["experiment=rbm_1m", "data.pairs_per_step=100"], "is no multiple of 8"),
        (["experiment=rbm_1m", "trainer.devices=auto"], "give --gpus"),
    ):
        with pytest.raises(UserError, match=says):
            memory.run(overrides)
