"""Qwen2.5-VL: the numbers of transformers' own forward and processor, without its loops over windows."""

import json
from typing import Any

import backbone_promises as promises
import numpy as np
import pytest
import tiny_vlm
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from rbm.errors import UserError
from rbm.model import ClipBatch, RewardModel
from rbm.model.backbones import PairMode
from rbm.model.backbones.qwen2_5_vl import MEAN, STD, Qwen25VLBackbone
from rbm.model.pixels import normalised, patches
from rbm.model.weights import write_folder

TASK = promises.TASK
SIZES = ((140, 196), (56, 56), (84, 112), (224, 120))
"""Of frames: several windows with odd rests, less than a window, one window in one direction, and one to be resized."""


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return tiny_vlm.qwen2_5_model()


def plain(backbone: Any) -> Any:
    """transformers' own model with the backbone's weights."""
    found = Qwen2_5_VLModel._from_config(Qwen2_5_VLConfig(**backbone.architecture), attn_implementation="sdpa").eval()
    found.load_state_dict(backbone.model.state_dict())
    with torch.no_grad():
        found.language_model.embed_tokens.weight[backbone.words.markers] = backbone.markers.weight
    return found


def noise(height: int, width: int, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(240, 320), (37, 51), (480, 300), (20, 400), (140, 196)])
def test_pixels_equal_the_published_processor(model, height, width):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=16384 * 28 * 28)
    frames = noise(height, width)
    theirs = processor(images=list(frames), return_tensors="pt")
    ours = model.preprocess(frames)
    grid = [[1, ours.shape[1] // 14, ours.shape[2] // 14]] * 3
    assert theirs["image_grid_thw"].tolist() == grid
    cut = patches(normalised(ours, torch.float32, MEAN, STD), 14, 2, 2)
    torch.testing.assert_close(cut, theirs["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_clip_alone_equals_transformers_own_forward(model, height, width):
    frames = model.preprocess(noise(height, width))
    batch = ClipBatch.from_clips([(frames, TASK)])
    pack = model.backbone.pack(batch, PairMode.READOUT)
    theirs, ids = plain(model.backbone), pack.ids[None]
    U, h, w = frames.shape[:3]
    said = {"image_grid_thw": torch.tensor([[1, h // 14, w // 14]] * U), "mm_token_type_ids": (ids == 492).int()}
    assert torch.equal(theirs.get_rope_index(ids, **said)[0][:, 0], pack.position)
    with torch.inference_mode():
        hidden = theirs(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=patches(normalised(frames, torch.float32, MEAN, STD), 14, 2, 2),
            **said,
        ).last_hidden_state[0]
        found = model.backbone(batch, PairMode.READOUT)
    torch.testing.assert_close(found.frames, hidden[pack.frames], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.readouts, hidden[pack.readouts], atol=1e-5, rtol=0)


def test_windows_matter(model):
    """Else the tests above would not see them: with the whole picture in view everywhere, features are others."""
    frames = model.preprocess(noise(140, 196))
    with torch.inference_mode():
        windowed = model.backbone.encode(frames)
        blocks = [block.attn for block in model.backbone.tower.blocks]
        was = [attention.windowed for attention in blocks]
        assert was == [True, False, True]
        for attention in blocks:
            attention.windowed = False
        whole = model.backbone.encode(frames)
        for attention, before in zip(blocks, was, strict=True):
            attention.windowed = before
    assert windowed.shape == (3, 1, 5, 7, 64)
    assert (windowed - whole).abs().max() > 1e-3


@pytest.mark.parametrize(
    "promise",
    [
        promises.clips_of_any_length_score_in_a_batch_as_alone,
        promises.a_neighbours_pixels_change_nothing,
        promises.a_clip_reads_the_same_alone_as_first_and_as_second,
        promises.words_matter,
        promises.features_stand_for_frames,
        promises.gradients_are_the_same_when_blocks_are_computed_again,
    ],
)
def test_promises(model, promise):
    promise(model)


def test_a_round_trip_changes_no_number(model, tmp_path):
    promises.a_round_trip_changes_no_number(model, tmp_path / "model")


@pytest.mark.parametrize("older", [False, True])
def test_it_starts_from_a_plain_checkpoint(model, tmp_path, older):
    """With `model.language_model.*` and `model.visual.*`, and with `model.*`, `visual.*` and a flat configuration."""
    state = {f"model.{name}": x for name, x in model.backbone.model.state_dict().items()}
    config = model.backbone.architecture | {"model_type": "qwen2_5_vl"}
    if older:
        state = {
            name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): x
            for name, x in state.items()
        }
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        config |= {k: v for k, v in text.items() if k != "model_type"}
        config |= {
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        }
        config["vision_config"] = config["vision_config"] | {"model_type": "qwen2_5_vl"}
    state["lm_head.weight"] = torch.zeros(499, 64)
    write_folder(tmp_path, state, {"tokenizer.json": tiny_vlm.TOKENIZER, "config.json": json.dumps(config)})
    torch.manual_seed(5)
    found = Qwen25VLBackbone.from_base(str(tmp_path))
    expected = model.backbone.model.state_dict()
    for name, x in found.model.state_dict().items():
        assert torch.equal(x, expected[name]), name
    frames = model.preprocess(noise(84, 112))
    with torch.inference_mode():
        torch.testing.assert_close(found.encode(frames), model.backbone.encode(frames), atol=1e-6, rtol=0)
        found.markers.load_state_dict(model.backbone.markers.state_dict())
        batch = ClipBatch.from_clips([(frames, TASK)])
        hidden = [backbone(batch, PairMode.READOUT).frames for backbone in (found, model.backbone)]
    torch.testing.assert_close(*hidden, atol=1e-6, rtol=0)


def test_what_it_does_not_read_is_refused(tmp_path):
    sliding = tiny_vlm.qwen2_5_architecture(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(UserError, match="sliding window"):
        Qwen25VLBackbone(sliding, tiny_vlm.TOKENIZER)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(UserError, match="'qwen2_vl'"):
        Qwen25VLBackbone.from_base(str(tmp_path))
