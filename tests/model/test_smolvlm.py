"""SmolVLM: the numbers of transformers' own forward and processor, a frame as one picture."""

import json
from typing import Any

import backbone_promises as promises
import numpy as np
import pytest
import tiny_vlm
import torch
from tokenizers import Tokenizer
from transformers import SmolVLMConfig, SmolVLMModel

from rbm.errors import UserError
from rbm.model import ClipBatch, RewardModel
from rbm.model.backbones import PairMode
from rbm.model.backbones.smolvlm import HALF, SmolVLMBackbone
from rbm.model.pixels import normalised
from rbm.model.weights import write_folder

TASK = promises.TASK


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return tiny_vlm.smolvlm_model()


def plain(backbone: Any) -> Any:
    """transformers' own model with the backbone's weights, and rows for the markers."""
    found = SmolVLMModel._from_config(SmolVLMConfig(**backbone.architecture), attn_implementation="eager").eval()
    found.load_state_dict(backbone.model.state_dict())
    table = torch.zeros(len(backbone.words), backbone.hidden)
    with torch.no_grad():
        table[: len(backbone.embedding.weight)] = backbone.embedding.weight
        table[backbone.words.markers] = backbone.markers.weight
    found.text_model.set_input_embeddings(torch.nn.Embedding.from_pretrained(table))
    return found


def noise(height: int, width: int, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(240, 320), (37, 51), (64, 64), (20, 400)])
def test_pixels_equal_the_published_processor_without_splitting(model, height, width):
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    processor = SmolVLMImageProcessorPil(
        do_resize=False,
        do_image_splitting=False,
        max_image_size={"longest_edge": 64},
        image_mean=list(HALF),
        image_std=list(HALF),
    )
    frames = noise(height, width)
    theirs = processor(images=[list(frames)], return_tensors="pt")
    ours = normalised(model.preprocess(frames), torch.float32, HALF, HALF)
    torch.testing.assert_close(ours, theirs["pixel_values"][0], atol=1e-6, rtol=0)
    assert theirs["pixel_attention_mask"].all()


@pytest.mark.parametrize(("image_size", "patch", "side"), [(64, 8, 4), (70, 8, 4)])
def test_a_clip_alone_equals_transformers_own_forward(image_size, patch, side):
    """Also where the tower leaves a rim of the picture out, as that of the largest SmolVLM does."""
    model = tiny_vlm.smolvlm_model(sizes=tiny_vlm.smolvlm_architecture(image_size, patch))
    frames = model.preprocess(noise(90, 120))
    batch = ClipBatch.from_clips([(frames, TASK)])
    pack = model.backbone.pack(batch, PairMode.READOUT)
    ids, shown = pack.ids[None], model.backbone.words.id_of("<image>")
    assert int((ids == shown).sum()) == 3 * side * side
    theirs = plain(model.backbone)
    with torch.inference_mode():
        hidden = theirs(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=normalised(frames, torch.float32, HALF, HALF)[None],
        ).last_hidden_state[0]
        found = model.backbone(batch, PairMode.READOUT)
    torch.testing.assert_close(found.frames, hidden[pack.frames], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.readouts, hidden[pack.readouts], atol=1e-5, rtol=0)


def test_the_words_are_a_turn_of_its_chat_template(model):
    """Around a picture stands what transformers' processor writes; all signs are single tokens."""
    from transformers.models.smolvlm.processing_smolvlm import _prompt_single_image

    frames = model.preprocess(noise(64, 64, 1))
    pack = model.backbone.pack(ClipBatch.from_clips([(frames, TASK)]), PairMode.CLIPS)
    words = Tokenizer.from_str(model.backbone.words.to_str())
    text = "".join(words.id_to_token(token) for token in pack.ids.tolist()).replace("Ġ", " ").replace("Ċ", "\n")
    picture = _prompt_single_image(16, "<fake_token_around_image>", "<image>", "<global-img>")
    assert text.startswith("<|im_start|>User: A robot has to do this: open the drawer\n")
    assert text.endswith(f"Picture 1: {picture}<|prog_token|>")
    assert (pack.ids == words.token_to_id("<global-img>")).sum() == 1


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


def test_frames_can_be_resized_on_the_device():
    """By an antialiased bicubic instead of Lanczos: near it on smooth pictures."""
    model = tiny_vlm.smolvlm_model(backbone={"resize": "device"})
    ramp = np.broadcast_to(np.linspace(0, 255, 150).astype(np.uint8)[None, None, :, None], (2, 100, 150, 3)).copy()
    frames = model.preprocess(ramp)
    assert frames.shape == (2, 100, 150, 3)
    here = tiny_vlm.smolvlm_model()
    with torch.inference_mode():
        one, two = model.backbone.encode(frames), here.backbone.encode(here.preprocess(ramp))
        out = model(ClipBatch.from_clips([(frames, TASK)]))
    assert one.shape == two.shape == (2, 1, 4, 4, 64)
    assert (one - two).norm() < 0.05 * two.norm()
    assert torch.isfinite(out.progress_logits).all()


def test_frames_past_the_preprocessor_are_refused(model):
    with pytest.raises(ValueError, match="preprocessor"):
        model(ClipBatch.from_clips([(torch.zeros(2, 96, 96, 3, dtype=torch.uint8), TASK)]))


def test_what_features_are_made_by_is_the_tower(model):
    """A frozen tower leaves nothing of `encode` to be trained, so its features can be kept."""
    model.backbone.tower.requires_grad_(False)
    features = model.backbone._encode(model.preprocess(noise(64, 64, 2)))
    model.backbone.tower.requires_grad_(True)
    assert not features.requires_grad


def test_it_starts_from_a_plain_checkpoint(model, tmp_path):
    state = {f"model.{name}": x for name, x in model.backbone.model.state_dict().items()}
    state["lm_head.weight"] = torch.zeros(10, 64)
    config = model.backbone.architecture | {"model_type": "smolvlm"}
    texts = {"tokenizer.json": tiny_vlm.smolvlm_tokenizer(), "config.json": json.dumps(config)}
    write_folder(tmp_path, state, texts)
    found = SmolVLMBackbone.from_base(str(tmp_path))
    expected = model.backbone.model.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in found.model.state_dict().items())
    assert found.prompt.opening == "<|im_start|>User: "
    write_folder(tmp_path, state, texts | {"tokenizer.json": tiny_vlm.TOKENIZER})
    with pytest.raises(UserError, match=r"lacks .*<image>"):
        SmolVLMBackbone.from_base(str(tmp_path))
