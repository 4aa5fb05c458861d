"""LoRA: what it computes, what of it is on disk, and what is said when it does not fit its base."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlm import TOKENIZER, architecture, qwen3_model
from torch import Tensor

from rbm.errors import UserError
from rbm.model import ClipBatch, RewardModel
from rbm.model.adapter import (
    LORA_CONFIG,
    WEIGHTS,
    add_lora,
    fingerprint,
    has_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    save_trained,
)
from rbm.model.backbones.qwen3_vl import Qwen3VLBackbone


def clips() -> ClipBatch:
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8) for n in (3, 5)]
    return ClipBatch.from_clips(
        [(torch.from_numpy(x), task) for x, task in zip(parts, ("open it", "shut"), strict=True)]
    )


@torch.no_grad()
def scores(model: RewardModel) -> Tensor:
    found = model(clips(), torch.tensor([[0, 1]]))
    return torch.cat([found.progress_logits.flatten(), found.success_logits, found.preference_logits]).float()


def trained(model: RewardModel, seed: int = 1) -> RewardModel:
    """As after training: everything with gradients has moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def with_lora(model: RewardModel, **options: Any) -> RewardModel:
    """LoRA in it, and all moved that is trained then."""
    add_lora(model, **({"r": 4, "alpha": 8, "dropout": 0.1} | options))
    open_ones = {name.split(".")[0] for name, x in model.named_parameters() if x.requires_grad and "lora_" not in name}
    assert open_ones == {"backbone", "progress_head", "success_head", "preference_head"}
    return trained(model)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that fine-tuning starts from."""
    folder = tmp_path_factory.mktemp("base") / "model"
    qwen3_model(seed=3).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision-language model without heads, as transformers writes it."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    model: Any = qwen3_model(seed=4).backbone
    model.model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "model"
    save_adapter(with_lora(RewardModel.from_pretrained(str(base))), folder, str(base), {"corpus": "dots"})
    return folder


def edited(adapter: Path, tmp_path: Path, **entry: Any) -> Path:
    """A copy of an adapter's folder with another entry `adapter`."""
    folder = shutil.copytree(adapter, tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    config["adapter"] |= entry
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("language", "vision", "layers"), [(True, False, 21), (False, True, 12), (True, True, 33)])
def test_lora_starts_as_nothing_and_merges_into_what_it_computed(language, vision, layers):
    model = qwen3_model()
    plain, names = scores(model), list(model.state_dict())
    add_lora(model, 4, 8, 0.5, language=language, vision=vision)
    assert has_lora(model)
    assert sum(".lora_A." in name for name, _ in model.named_parameters()) == layers
    assert torch.equal(scores(model), plain)
    after = scores(trained(model))
    assert (after - plain).abs().max() > 0.1
    merge_lora(model)
    assert not has_lora(model)
    assert list(model.state_dict()) == names
    assert not hasattr(model, "peft_config")
    torch.testing.assert_close(scores(model), after, atol=1e-5, rtol=1e-5)
    merge_lora(model)  # nothing to do


def test_a_merged_matrix_by_hand():
    model = qwen3_model()
    layer = "backbone.model.language_model.layers.1.mlp.down_proj"
    before = model.get_submodule(layer).weight.detach().double()
    add_lora(model, 2, 6)
    trained(model)
    low, high = (getattr(model.get_submodule(layer), side)["default"].weight.double() for side in ("lora_A", "lora_B"))
    merge_lora(model)
    expected = before + 6 / 2 * torch.einsum("or,ri->oi", high, low)
    assert torch.equal(model.get_submodule(layer).weight, expected.float())


def test_lora_is_refused_where_it_has_no_place(tiny_model):
    with pytest.raises(UserError, match="nano is none: train it as a whole"):
        add_lora(copy.deepcopy(tiny_model))
    model = qwen3_model()
    with pytest.raises(ValueError, match="r ≥ 1"):
        add_lora(model, r=0)
    add_lora(model)
    with pytest.raises(UserError, match="LoRA already"):
        add_lora(model)


def test_an_adapter_scores_as_the_trained_model(base, tmp_path):
    model = with_lora(RewardModel.from_pretrained(str(base)), vision=True)
    model.calibrate(1.5, -0.25)
    save_adapter(model, tmp_path / "model", str(base), {"corpus": "dots"})
    found = RewardModel.from_pretrained(str(tmp_path / "model"))
    assert not has_lora(found)
    assert not found.training
    torch.testing.assert_close(scores(found), scores(model), atol=1e-5, rtol=1e-5)
    assert (float(found.success_temperature), float(found.success_bias)) == (1.5, -0.25)
    again = load_adapter(tmp_path / "model")
    assert all(torch.equal(x, y) for x, y in zip(found.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_folder_is_small_and_in_pefts_layout(adapter, base):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    assert {path.name for path in adapter.iterdir()} == {"config.json", LORA_CONFIG, WEIGHTS, "tokenizer.json"}
    state = load_file(adapter / WEIGHTS)
    assert "base_model.model.backbone.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in state
    assert "base_model.model.backbone.markers.weight" in state
    assert "base_model.model.progress_head.4.bias" in state
    assert not any("norm" in name for name in state)
    config = json.loads((adapter / "config.json").read_text())
    assert config["adapter"]["base"] == str(base)
    assert config["facts"] == {"corpus": "dots"}

    model = RewardModel.from_pretrained(str(base))  # peft itself, knowing nothing of this package's reader
    inject_adapter_in_model(LoraConfig.from_pretrained(str(adapter)), model)
    found = set_peft_model_state_dict(model, state)
    assert not found.unexpected_keys
    torch.testing.assert_close(scores(model.eval()), scores(load_adapter(adapter)), atol=1e-5, rtol=1e-5)


def test_a_plain_vision_language_model_is_a_base_too(plain_base, tmp_path):
    torch.manual_seed(0)
    backbone = Qwen3VLBackbone.from_base(str(plain_base), views=["near", "wrist"], view_tags="embedding")
    model = with_lora(RewardModel(backbone, context_frames=6, progress_bins=4).eval())
    save_trained(model, tmp_path / "model", {}, str(plain_base))
    found = RewardModel.from_pretrained(str(tmp_path / "model"))
    assert found.config() == model.config()
    torch.testing.assert_close(scores(found), scores(model), atol=1e-5, rtol=1e-5)


def test_an_adapter_can_stand_on_an_adapter(adapter, tmp_path):
    model = with_lora(RewardModel.from_pretrained(str(adapter)), r=2)
    save_adapter(model, tmp_path / "model", str(adapter))
    torch.testing.assert_close(scores(load_adapter(tmp_path / "model")), scores(model), atol=1e-5, rtol=1e-5)


def test_a_base_held_in_bf16_is_found_again_as_it_was_trained_on(base, tmp_path):
    model = RewardModel.from_pretrained(str(base))
    for name, parameter in model.named_parameters():
        if name.startswith("backbone.model."):
            parameter.data = parameter.data.bfloat16()
    model = with_lora(model)
    save_adapter(model, tmp_path / "model", str(base))
    found = load_adapter(tmp_path / "model")
    merge_lora(model)
    assert {x.dtype for x in found.parameters()} == {torch.float32}
    assert all(torch.equal(x, found.state_dict()[name]) for name, x in model.state_dict().items())


def test_blocks_that_were_trained_as_a_whole_are_in_the_adapter(base, tmp_path):
    model = RewardModel.from_pretrained(str(base))
    add_lora(model, 4, 8)
    block = "backbone.model.visual.blocks.1."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.startswith(block))
    trained(model)
    save_adapter(model, tmp_path / "model", str(base))
    names = [name for name in load_file(tmp_path / "model" / WEIGHTS) if block in name]
    assert len(names) == sum(name.startswith(block) for name, _ in model.named_parameters())
    torch.testing.assert_close(scores(load_adapter(tmp_path / "model")), scores(model), atol=1e-5, rtol=1e-5)


def test_without_lora_or_without_a_base_the_whole_model_is_written(tmp_path, base):
    model = with_lora(qwen3_model())
    expected = scores(model)
    save_trained(model, tmp_path / "merged", {}, None)
    assert "adapter" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    torch.testing.assert_close(
        scores(RewardModel.from_pretrained(str(tmp_path / "merged"))), expected, atol=1e-5, rtol=1e-5
    )
    heads = RewardModel.from_pretrained(str(base))
    heads.backbone.model.to(torch.bfloat16)
    save_trained(heads, tmp_path / "heads", {}, str(base))
    state = load_file(tmp_path / "heads" / "model.safetensors")
    assert {x.dtype for x in state.values()} == {torch.float32}
    assert all(torch.equal(x.float(), state[name]) for name, x in heads.state_dict().items())
    with pytest.raises(UserError, match="no LoRA"):
        save_adapter(heads, tmp_path / "heads", str(base))


def test_a_changed_base_is_noticed_however_it_is_held(base, adapter, tmp_path):
    model = RewardModel.from_pretrained(str(base))
    model.to(torch.bfloat16).save_pretrained(str(tmp_path / "rounded"))
    load_adapter(edited(adapter, tmp_path, base=str(tmp_path / "rounded")))
    shutil.rmtree(tmp_path / "edited")
    with torch.no_grad():
        model.backbone.get_parameter("model.language_model.norm.weight")[:] += 0.05
    model.save_pretrained(str(tmp_path / "changed"))
    folder = edited(adapter, tmp_path, base=str(tmp_path / "changed"))
    with pytest.raises(UserError, match=r"trained on other weights than .*changed holds now"):
        RewardModel.from_pretrained(str(folder))


def test_a_base_that_is_gone_or_of_another_kind_is_told(adapter, tmp_path, tiny_checkpoint, tiny_model):
    for place, words in (
        ("/nowhere/at/all", "neither a folder nor an id"),
        (str(tiny_checkpoint), "over nano, not over qwen3_vl"),
    ):
        with pytest.raises(UserError, match=f"stands on {place}, which cannot be used .*{words}"):
            RewardModel.from_pretrained(str(edited(adapter, tmp_path, base=place)))
        shutil.rmtree(tmp_path / "edited")
    other = tmp_path / "other"
    sizes = architecture(num_hidden_layers=2)
    RewardModel(Qwen3VLBackbone(sizes, TOKENIZER), context_frames=8).save_pretrained(str(other))
    with pytest.raises(UserError, match="other weights"):
        RewardModel.from_pretrained(str(edited(adapter, tmp_path, base=str(other))))


@pytest.mark.parametrize("which", ["lora_B", "success_head.1.bias"])
def test_missing_and_unknown_keys_are_listed(adapter, tmp_path, which):
    folder = edited(adapter, tmp_path)
    state = load_file(folder / WEIGHTS)
    name = next(name for name in state if which in name)
    state["base_model.model.tail.weight"] = state.pop(name)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(UserError) as caught:
        load_adapter(folder)
    short = name.removeprefix("base_model.model.")
    assert f"missing keys [{short}], unknown keys [tail.weight]" in str(caught.value)


def test_damaged_folders_are_one_sentence(adapter, tmp_path):
    def broken(name: str, content: bytes | None) -> str:
        folder = edited(adapter, tmp_path)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            RewardModel.from_pretrained(str(folder))
        shutil.rmtree(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"{WEIGHTS} is missing" in broken(WEIGHTS, None)
    assert "truncated" in broken(WEIGHTS, (adapter / WEIGHTS).read_bytes()[:2000])
    assert f"{LORA_CONFIG} is missing" in broken(LORA_CONFIG, None)
    assert "no configuration of LoRA" in broken(LORA_CONFIG, b'{"r": 4}')
    assert "tokenizer.json is missing" in broken("tokenizer.json", None)
    shape = {name: x[:1] if "lora_A" in name else x for name, x in load_file(adapter / WEIGHTS).items()}
    save_file(shape, tmp_path / "shape")
    assert "belongs to another model" in broken(WEIGHTS, (tmp_path / "shape").read_bytes())
    config = json.loads((adapter / "config.json").read_text())
    config["adapter"] = {"fingerprint": "0"}
    assert "with its 'base' is missing" in broken("config.json", json.dumps(config).encode())


def test_a_fingerprint_sees_names_shapes_and_values_but_no_precision():
    weights = {"a": torch.arange(12.0).reshape(3, 4) / 7, "b": torch.ones(2)}
    first = fingerprint(weights)
    assert first == fingerprint({name: x.bfloat16() for name, x in reversed(weights.items())})
    assert first != fingerprint({"a": weights["a"].reshape(4, 3), "b": weights["b"]})
    assert first != fingerprint({"a": weights["a"], "c": weights["b"]})
    assert first != fingerprint({"a": weights["a"], "b": torch.tensor([1.0, 1.01])})
