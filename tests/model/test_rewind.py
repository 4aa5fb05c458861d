"""ReWiND: frozen encoders as transformers runs them, and a small transformer that learns on top."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import backbone_promises as promises
import numpy as np
import pytest
import tiny_vlm
import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from rbm.config import compose
from rbm.errors import UserError
from rbm.model import ClipBatch, LossWeights, RewardModel, reward_losses
from rbm.model.backbones.rewind import MEAN, STD, RewindBackbone
from rbm.model.pixels import normalised
from rbm.training.data import Onward, PairDataModule, Share
from rbm.training.run import train
from rbm.training.tuning import Tuning

TASK = promises.TASK


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return tiny_vlm.rewind_model()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a pretrained DINOv2 and of a sentence encoder, as transformers writes them."""
    torch.manual_seed(3)
    image, text = tmp_path_factory.mktemp("dinov2"), tmp_path_factory.mktemp("sentences")
    Dinov2Model(Dinov2Config(**tiny_vlm.REWIND["image_architecture"])).save_pretrained(image)
    BertModel(BertConfig(**tiny_vlm.REWIND["text_architecture"])).save_pretrained(text)
    (text / "tokenizer.json").write_text(tiny_vlm.bert_tokenizer())
    return image, text


def noise(height: int, width: int, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(240, 320), (37, 51), (28, 28)])
def test_pixels_equal_dinov2s_processor_less_its_crop(model, height, width):
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    processor = BitImageProcessorPil(
        size={"height": 28, "width": 28}, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD)
    )
    frames = noise(height, width)
    theirs = processor(images=list(frames), return_tensors="pt")["pixel_values"]
    ours = normalised(model.preprocess(frames), torch.float32, MEAN, STD)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_embeddings_are_those_of_transformers(encoders):
    image, text = encoders
    backbone = RewindBackbone.from_base(str(image), str(text), image_size=28, hidden=32, layers=1, heads=4).eval()
    frames = backbone.preprocessor(noise(40, 60))
    pictures = Dinov2Model.from_pretrained(image, attn_implementation="eager").eval()
    sentences = BertModel.from_pretrained(text, attn_implementation="eager").eval()
    with torch.inference_mode():
        hidden = pictures(normalised(frames, torch.float32, MEAN, STD)).last_hidden_state
        torch.testing.assert_close(backbone.encode(frames)[:, 0, 0, 0], hidden[:, 0], atol=1e-5, rtol=0)
        # padded, with a mask, as sentence-transformers does it
        read = Tokenizer.from_str(tiny_vlm.bert_tokenizer()).encode_batch([TASK, "move the dot"])
        mask = torch.tensor([one.attention_mask for one in read])
        assert 0 < mask.sum() < mask.numel()
        states = sentences(torch.tensor([one.ids for one in read]), attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        expected = mean / mean.norm(dim=1, keepdim=True)
    torch.testing.assert_close(backbone.sentence(TASK), expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(backbone.sentence("move the dot"), expected[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "promise",
    [
        promises.clips_of_any_length_score_in_a_batch_as_alone,
        promises.a_neighbours_pixels_change_nothing,
        promises.a_clip_reads_the_same_alone_as_first_and_as_second,
        promises.words_matter,
        promises.features_stand_for_frames,
    ],
)
def test_promises(model, promise):
    promise(model)


@pytest.mark.parametrize("views", [[], ["near", "wrist"]])
def test_a_round_trip_changes_no_number(tmp_path, views):
    promises.a_round_trip_changes_no_number(tiny_vlm.rewind_model(backbone={"views": views}), tmp_path / "model")


def test_a_step_of_several_views_is_their_mean():
    model = tiny_vlm.rewind_model(backbone={"views": ["near", "wrist"]})
    near, wrist = promises.clip(model, 0, 3), promises.clip(model, 1, 3)
    both = promises.states(model, [((near, wrist), TASK)]).frames
    swapped = promises.states(model, [((wrist, near), TASK)]).frames
    alone = promises.states(model, [((near, None), TASK)]).frames
    assert (both - swapped).abs().max() > 1e-4
    assert (both - alone).abs().max() > 1e-4
    with pytest.raises(ValueError, match="2 views"):
        promises.states(tiny_vlm.rewind_model(), [((near, wrist), TASK)])


def test_encoders_stay_as_they_are_while_the_rest_trains():
    model = tiny_vlm.rewind_model().train()
    backbone = model.backbone
    assert not backbone.text_encoder.training
    assert not backbone.image_encoder.training
    assert all(
        module.p == 0 or not module.training for module in backbone.text_encoder.modules() if hasattr(module, "p")
    )
    with torch.inference_mode():  # scoring first must not spoil training
        model(ClipBatch.from_clips([(promises.clip(model, 0, 3), TASK)]))
    out = model(ClipBatch.from_clips([(promises.clip(model, 0, 3), TASK)]))
    (out.progress_logits.square().sum() + out.utility.sum()).backward()
    for name, weight in model.named_parameters():
        frozen = "_encoder." in name
        assert weight.requires_grad != frozen, name
        if frozen:
            assert weight.grad is None
    for part in (backbone.image_projection, backbone.text_projection, backbone.blocks):
        assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in part.parameters())
    backbone.tower.requires_grad_(True)
    model.train()
    assert backbone.image_encoder.training
    model(ClipBatch.from_clips([(promises.clip(model, 0, 3), TASK)])).progress_logits.square().sum().backward()
    assert all(weight.grad is None for weight in backbone.text_encoder.parameters())
    assert backbone.image_encoder.embeddings.cls_token.grad.abs().max() > 0


def test_what_is_trained_can_be_chosen():
    model = tiny_vlm.rewind_model()

    def trained(**options: Any) -> set[str]:
        Tuning(**options).apply(model)
        return {name.split(".")[1] for name, x in model.named_parameters() if x.requires_grad and "backbone" in name}

    small = {"image_projection", "text_projection", "marker_embedding", "blocks", "norm"}
    assert trained() == small
    assert trained(vision="full") == small | {"image_encoder"}
    assert trained(language="none") == {"marker_embedding"}
    trained(vision="last", vision_blocks=1)
    opened = {name for name, x in model.backbone.tower.named_parameters() if x.requires_grad}
    assert {name.split(".layer.")[1].split(".")[0] for name in opened if ".layer." in name} == {"1"}
    assert not any("embeddings" in name for name in opened)


def test_sentences_are_embedded_once_and_again_when_weights_change(model):
    backbone = tiny_vlm.rewind_model().backbone
    calls = []
    backbone.text_encoder.register_forward_hook(lambda *call: calls.append(1))
    first = backbone.sentence(TASK)
    assert backbone.sentence(TASK) is first
    backbone.text([TASK, promises.OTHER, TASK])
    assert len(calls) == 2
    other = tiny_vlm.rewind_model(seed=1).backbone
    backbone.load_state_dict(other.state_dict())
    torch.testing.assert_close(backbone.sentence(TASK), other.sentence(TASK), atol=1e-6, rtol=0)
    assert (backbone.sentence(TASK) - first).abs().max() > 1e-3
    assert backbone.to(torch.bfloat16).sentence(TASK).dtype == torch.bfloat16


def test_a_long_instruction_is_cut_and_said(model, caplog):
    long = "open the drawer and close it " * 30
    with caplog.at_level(logging.WARNING):
        found = promises.states(model, [(promises.clip(model, 0, 2), long)])
    assert torch.isfinite(found.frames).all()
    assert "cut after 40 tokens: open the drawer" in caplog.text
    promises.states(model, [(promises.clip(model, 0, 2), "öffne die Schublade 🤖 抽屉")])


def test_it_learns_from_embeddings_that_are_computed_once(dot_corpus):
    """On real pairs, with random encoders that never run while it trains."""
    model = tiny_vlm.rewind_model(backbone={"image_size": 42, "hidden": 64}, dropout=0.0).train()
    place = str(dot_corpus.location)
    data = PairDataModule(model, place, heldout_per_quality=1, validation_per_quality=1, workers=0, pairs_per_step=16)
    dataset = data.dataset(data.sampler, Share(16))
    batches = []
    for order in Onward(data.sampler.planner, Share(16), 0, 3):
        batch = dataset[order].batch
        features = tuple(model.backbone.encoded(batch.clips))
        assert all(group.shape[1:] == (1, 1, 1, 32) and not group.requires_grad for group in features)
        batches.append(replace(batch, clips=replace(batch.clips, frames=features)))
    model.backbone.image_encoder.register_forward_hook(lambda *call: pytest.fail("the image encoder ran"))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-3)
    losses = []
    for step in range(150):
        batch = batches[step % len(batches)]
        loss = reward_losses(model(batch.clips, batch.pairs), batch.targets, batch.counts, LossWeights()).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-15:]) / 15 < 0.75 * sum(losses[:3]) / 3, losses


def test_a_run_starts_from_pretrained_encoders_and_leaves_a_model(dot_corpus, encoders, tmp_path):
    image, text = encoders
    config = compose(
        "train",
        ["model=rewind", f"model.backbone.image='{image}'", f"model.backbone.text='{text}'",
         "+model.backbone.image_size=28", "model.backbone.hidden=32", "model.backbone.heads=4",
         "model.backbone.layers=1", f"run_dir='{tmp_path / 'run'}'", f"data.corpus='{dot_corpus.location}'",
         "data.workers=0", "data.validation_pairs=8", "data.pairs_per_step=4", "data.heldout_tasks=[]",
         "data.heldout_per_quality=1", "data.validation_per_quality=1", "trainer.accelerator=cpu",
         "trainer.max_steps=2", "threads=1"],
    )  # fmt: skip
    found = RewardModel.from_pretrained(str(train(config)))
    before = Dinov2Model.from_pretrained(image).state_dict()
    assert all(torch.equal(x, before[name]) for name, x in found.backbone.image_encoder.state_dict().items())
    assert not any(weight.requires_grad for weight in found.backbone.image_encoder.parameters())
    assert promises.states(found, [(promises.clip(found, 0, 2), TASK)]).frames.shape == (2, 32)


def test_what_is_no_such_encoder_is_refused(encoders, tmp_path):
    image, text = encoders

    def refused(message: str, **options: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            RewindBackbone.from_base(**({"image": str(image), "text": str(text)} | options))
        assert "\n" not in str(caught.value)

    refused("'bert', 'dinov2' is needed", image=str(text))
    refused("has no tokenizer.json", text=str(image))
    refused("neither a folder nor an id", image=str(tmp_path / "nowhere"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((image / "config.json").read_text())
    refused("cannot be read", image=str(broken))
    weights = (image / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("cannot be read", image=str(broken))
    (broken / "model.safetensors").write_bytes(weights)
    deeper = json.loads((image / "config.json").read_text()) | {"num_hidden_layers": 3}
    deeper.pop("stage_names", None), deeper.pop("out_features", None), deeper.pop("out_indices", None)
    (broken / "config.json").write_text(json.dumps(deeper))
    refused("lacks weights: encoder.layer.2", image=str(broken))
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read"):
        RewindBackbone(**tiny_vlm.REWIND, tokenizer="{}", image_size=28)
    with pytest.raises(ValueError, match="multiple of the patch"):
        RewindBackbone(**tiny_vlm.REWIND, tokenizer=tiny_vlm.bert_tokenizer(), image_size=30)
