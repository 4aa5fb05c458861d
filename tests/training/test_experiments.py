"""The two large experiments, scaled down: the whole configuration, a tiny Qwen3-VL to start from, the dot corpus."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_vlm
import torch
from safetensors.torch import load_file

from rbm.config import compose, override
from rbm.corpus import Corpus
from rbm.errors import UserError
from rbm.model import RewardModel
from rbm.model.prompt import PUBLISHED_WITH_PROGRESS
from rbm.training.run import train

SMALL = [
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.strategy=auto",
    "trainer.precision=32-true",
    "trainer.max_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.validate_every=2",
    "data.pairs_per_step=4",
    "data.validation_pairs=2",
    "data.workers=0",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A plain Qwen3-VL as transformers saves it."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("base")
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**tiny_vlm.architecture()))
    model.to(torch.bfloat16).save_pretrained(folder)  # as the real one is stored
    (folder / "tokenizer.json").write_text(tiny_vlm.TOKENIZER)
    return folder


def finished(experiment: str, base: Path, corpus: Corpus, folder: Path, *more: str) -> Path:
    places = [
        override("model.backbone.base", base),
        override("data.corpus", corpus.location.path),
        override("run_dir", folder / "run"),
    ]
    return train(compose("train", [f"experiment={experiment}", *SMALL, *places, *more]))


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_the_published_recipe_runs(base, dot_corpus, tmp_path):
    folder = finished("rbm_1m", base, dot_corpus, tmp_path, "data.completion=null")
    model = RewardModel.from_pretrained(str(folder))
    assert (model.pair, model.preference, model.target, model.context_frames) == (
        "causal",
        "joint",
        "clip_relative",
        8,
    )
    assert model.backbone.prompt == PUBLISHED_WITH_PROGRESS
    assert facts(folder)["facts"]["steps"] == 2
    before, after = load_file(base / "model.safetensors"), model.backbone.model.state_dict()
    name = "language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(after[name].float(), before[f"model.{name}"].float())
    tower = {name: x for name, x in after.items() if name.startswith("visual.")}
    assert tower
    for name, x in tower.items():
        assert torch.equal(x.float(), before[f"model.{name}"].float()), name


def test_cut_offs_of_sources_that_the_corpus_lacks_are_refused(base, dot_corpus, tmp_path):
    with pytest.raises(UserError, match="names no source of the corpus: 'agibotworld'"):
        finished("rbm_1m", base, dot_corpus, tmp_path)


def test_lora_finetuning_runs_in_parts(base, dot_corpus, tmp_path):
    folder = finished("lora_finetune", base, dot_corpus, tmp_path, "data.micro_batches=2")
    assert (folder / "adapter_model.safetensors").exists()
    saved = load_file(folder / "adapter_model.safetensors")
    assert any("lora_A" in name for name in saved)
    assert not any("visual" in name for name in saved)
    assert max(float(x.abs().max()) for name, x in saved.items() if "lora_B" in name) > 0  # it has learned
    model = RewardModel.from_pretrained(str(folder))
    before, after = load_file(base / "model.safetensors"), model.backbone.model.state_dict()
    name = "language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(after[name].float(), before[f"model.{name}"].float())
    assert torch.equal(after["language_model.norm.weight"].float(), before["model.language_model.norm.weight"].float())


def test_lora_goes_on_from_a_model_of_ones_own(base, dot_corpus, tmp_path):
    first = finished("rbm_1m", base, dot_corpus, tmp_path / "first", "data.completion=null", "trainer.max_steps=1")
    second = finished("lora_finetune", base, dot_corpus, tmp_path / "second", override("init", first))
    assert RewardModel.from_pretrained(str(second)).pair == "causal"


def test_the_recipe_is_the_published_one():
    config = compose("train", ["experiment=rbm_1m", "data.corpus=x"])
    assert config.data.pairs_per_step == 16 * config.trainer.devices
    assert (config.optimization.lr, config.optimization.weight_decay) == (2e-5, 0.01)
    assert list(config.optimization.betas) == [0.9, 0.999]
    assert (config.optimization.warmup, config.optimization.final_lr) == (0.1, 0)
    assert config.trainer.gradient_clip_val == 10
    assert 15_000 <= config.trainer.max_steps <= 20_000
    assert set(config.data.weights.values()) == {1}
    assert all(0 < cutoff <= 1 for cutoff in config.data.completion.values())
    assert [config.optimization.loss[name] for name in ("progress", "success", "preference")] == [1, 1, 1]
