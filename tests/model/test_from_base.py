"""Starting from a plain vision-language checkpoint, as transformers writes it."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny_vlm
import torch

from rbm.errors import UserError
from rbm.model import ClipBatch, RewardModel
from rbm.model.backbones.qwen3_vl import Qwen3VLBackbone
from rbm.model.backbones.vlm import VisionLanguageBackbone
from rbm.model.prompt import MARKERS


def tokenizer_without_markers() -> str:
    found = json.loads(tiny_vlm.TOKENIZER)
    found["added_tokens"] = [token for token in found["added_tokens"] if token["content"] not in MARKERS]
    return json.dumps(found)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory) -> Path:
    """A plain Qwen3-VL as transformers saves it, its tokenizer without the markers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(3)
    architecture = tiny_vlm.architecture() | {"tie_word_embeddings": request.param}
    architecture["text_config"] |= {"vocab_size": 520, "tie_word_embeddings": request.param}
    folder = tmp_path_factory.mktemp("base")
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(**architecture)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_without_markers())
    return folder


def test_every_weight_of_the_base_arrives(base):
    from transformers import Qwen3VLForConditionalGeneration

    plain = Qwen3VLForConditionalGeneration.from_pretrained(base).model.state_dict()
    ours = Qwen3VLBackbone.from_base(str(base)).model.state_dict()
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


def test_the_markers_are_added_behind_the_last_token_and_it_is_said(base, caplog):
    with caplog.at_level(logging.WARNING, "rbm.model.backbones.vlm"):
        backbone = Qwen3VLBackbone.from_base(str(base))
    assert "tokenizer and embedding get 5 tokens more: <|split_token|>" in caplog.text
    assert backbone.words.markers == [494, 495, 496, 497, 498]
    table = backbone.embedding.weight
    assert (backbone.markers.weight - table.mean(0)).abs().max() < 6 * table.std()
    assert backbone.markers.weight.isfinite().all()
    assert backbone.frame_pool_attn.weight.isfinite().all()


def test_the_same_seed_gives_the_same_start(base):
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(RewardModel(Qwen3VLBackbone.from_base(str(base))).state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_table_with_fewer_rows_than_tokens_is_made_longer_when_exported(tmp_path):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from rbm.model.published import save_published

    architecture = tiny_vlm.architecture()
    architecture["text_config"] |= {"vocab_size": 494}  # the markers would be rows 494 to 498
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(**architecture)).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text(tokenizer_without_markers())
    backbone = Qwen3VLBackbone.from_base(str(tmp_path / "base"), prompt="published")
    model = RewardModel(backbone, 8, "causal", "joint", "clip_relative").eval()
    save_published(model, tmp_path / "out", "robometer")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["vocab_size"] == 499
    again = RewardModel.from_pretrained(str(tmp_path / "out"))
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    with torch.inference_mode():
        one, two = (m(ClipBatch.from_clips([(m.preprocess(frames), "x")])).progress_logits for m in (model, again))
    assert torch.equal(one, two)


def test_another_kind_of_model_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="neither a folder nor an id"):
        Qwen3VLBackbone.from_base(str(tmp_path / "nowhere"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match="'llava', Qwen3VLBackbone needs 'qwen3_vl'"):
        Qwen3VLBackbone.from_base(str(other))
    (other / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Qwen3VLBackbone.from_base(str(other))
    (other / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="cannot be read"):
        Qwen3VLBackbone.from_base(str(other))


def test_a_base_that_lacks_weights_lists_them(base, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(base / "model.safetensors")
    del state["model.visual.merger.norm.bias"]
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((base / name).read_text())
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"missing keys \[visual\.merger\.norm\.bias\]"):
        Qwen3VLBackbone.from_base(str(tmp_path))


def test_it_saves_and_loads(base, tmp_path):
    torch.manual_seed(0)
    model = RewardModel(Qwen3VLBackbone.from_base(str(base))).eval()
    model.save_pretrained(str(tmp_path))
    again = RewardModel.from_pretrained(str(tmp_path))
    assert isinstance(again.backbone, VisionLanguageBackbone)
    assert again.config() == model.config()
    assert again.backbone.words.to_str() == model.backbone.words.to_str()
    one, two = model.state_dict(), again.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
