"""Several views a step: told apart, absent ones left out, and nothing else in the batch matters."""

import numpy as np
import pytest
import torch
from tiny_vlm import FIXTURE, qwen3_model

from rbm.errors import UserError
from rbm.model import ClipBatch, RewardModel
from rbm.model.backbones import NanoBackbone
from rbm.model.prompt import ISOLATED, PUBLISHED, Prompt

TASK = "open the drawer"
VIEWS = ("near", "wrist")


def nano(views=VIEWS, **options) -> RewardModel:
    torch.manual_seed(0)
    backbone = NanoBackbone(image_size=32, width=8, hidden=32, layers=2, heads=2, views=views)
    return RewardModel(backbone, context_frames=8, **options).eval()


def text(views=VIEWS, **options) -> RewardModel:
    return qwen3_model(backbone={"views": views}, **options)


def embedding(views=VIEWS, **options) -> RewardModel:
    model = qwen3_model(backbone={"views": views, "view_tags": "embedding"}, **options)
    with torch.no_grad():  # it starts at zero: views are alike then
        model.backbone.view_embedding.weight.normal_(std=0.5)
    return model


MODELS = pytest.mark.parametrize("make", [nano, text, embedding])


def film(model: RewardModel, n: int, seed: int, height: int = 64, width: int = 64) -> torch.Tensor:
    frames = np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    return model.preprocess(frames)


def scores(model: RewardModel, *clips, pairs=None) -> torch.Tensor:
    with torch.inference_mode():
        output = model(ClipBatch.from_clips([(clip, TASK) for clip in clips]), pairs)
    return output.progress_logits


def far(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-3)


@MODELS
def test_both_views_count_and_which_is_which(make):
    model = make()
    a, b, c = (film(model, 4, seed) for seed in range(3))
    both = scores(model, (a, b))
    assert both.shape == (4, 10)
    assert far(both, scores(model, (a, c)))
    assert far(both, scores(model, (c, b)))
    assert far(both, scores(model, (b, a)))
    assert far(both, scores(model, (a, None)))
    assert far(scores(model, (a, None)), scores(model, (None, a)))


@MODELS
def test_one_video_stands_for_the_first_view(make):
    model = make()
    a = film(model, 5, 0)
    torch.testing.assert_close(scores(model, a), scores(model, (a, None)), rtol=0, atol=0)


@MODELS
@pytest.mark.parametrize("preference", ["utility", "joint"])
def test_a_score_does_not_depend_on_what_else_is_in_the_batch(make, preference):
    """Neighbours with both views, with either, of other lengths and sizes; in a pair too."""
    model = make(preference=preference)
    wide = {"height": 32, "width": 96} if make is not nano else {}
    a, b = film(model, 4, 0), film(model, 4, 1, **wide)
    others = [(film(model, 7, 2), film(model, 7, 3)), (None, film(model, 2, 4, **wide)), (film(model, 3, 5), None)]
    for clip in ((a, b), (a, None), (None, b)):
        alone = scores(model, clip)
        together = scores(model, others[0], clip, *others[1:])[7:11]
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
        for pair, place in (((clip, others[1]), slice(0, 4)), ((others[1], clip), slice(2, 6))):
            paired = scores(model, *pair, pairs=torch.tensor([[0, 1]]))[place]
            torch.testing.assert_close(paired, alone, atol=2e-5, rtol=0)


@MODELS
def test_scores_are_causal_over_steps_with_all_their_views(make):
    model = make()
    a, b = film(model, 6, 0), film(model, 6, 1)
    whole, prefix = scores(model, (a, b)), scores(model, (a[:3], b[:3]))
    torch.testing.assert_close(whole[:3], prefix, atol=2e-5, rtol=0)


def test_nano_is_the_mean_over_the_views_that_are_there():
    model = nano()
    a, b = film(model, 1, 0), film(model, 1, 1)
    backbone = model.backbone
    with torch.inference_mode():
        vectors = backbone.view_embedding.weight
        first, second = (
            backbone.frame_encoder(x) * (1 + vector[:32]) + vector[32:]
            for x, vector in zip((a, b), vectors, strict=True)
        )
        for clip, expected in (((a, b), (first + second) / 2), ((None, b), second), ((a, None), first)):
            torch.testing.assert_close(backbone._steps(ClipBatch.from_clips([(clip, TASK)])), expected)


def test_text_names_each_picture_by_its_view():
    model = text()
    a = film(model, 2, 0)
    batch = ClipBatch.from_clips([((a, a), TASK), ((None, a), TASK)])
    tokenizer = model.backbone.words.tokenizer
    read = tokenizer.decode(model.backbone.pack(batch, "clips").ids.tolist(), skip_special_tokens=True)
    assert read.count("Picture 1 (near): ") == 1
    assert read.count("Picture 2 (wrist): ") == 2  # of the first clip's first step, of the second's second
    assert read.count("Picture 3 (near): ") == 1
    assert read.count("Picture 4 (wrist): ") == 1
    assert read.count("Picture 1 (wrist): ") == 1


def test_an_embedding_starts_at_nothing_and_is_trained():
    model = qwen3_model(backbone={"views": VIEWS, "view_tags": "embedding"})
    assert not model.backbone.view_embedding.weight.any()
    a, b = film(model, 3, 0), film(model, 3, 1)
    model.train()
    model(ClipBatch.from_clips([((a, b), TASK)])).progress_logits.square().sum().backward()
    gradient = model.backbone.view_embedding.weight.grad
    assert (gradient.abs().sum(1) > 0).all()


@MODELS
def test_a_training_step_lowers_the_loss(make):
    model = make().train()
    model.requires_grad_(True)
    batch = ClipBatch.from_clips([((film(model, 4, 0), film(model, 4, 1)), TASK), ((film(model, 3, 2), None), TASK)])
    target = torch.linspace(0, 9, 7).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(batch).progress_logits, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@MODELS
def test_views_are_stored_with_the_weights(make, tmp_path):
    model = make()
    model.save_pretrained(str(tmp_path / "model"))
    again = RewardModel.from_pretrained(str(tmp_path / "model"))
    assert again.backbone.views == VIEWS
    clip = film(model, 3, 0), film(model, 3, 1)
    torch.testing.assert_close(scores(again, clip), scores(model, clip), rtol=0, atol=0)


def test_models_of_one_view_are_as_they_were(tmp_path):
    plain = nano(views=())
    assert plain.backbone.views == ()
    assert not [name for name in plain.state_dict() if "view" in name]
    config = plain.config()
    del config["backbone"]["views"], config["remaining"]  # as stored by models made before either
    old = RewardModel.from_config(config)
    old.load_state_dict(plain.state_dict())
    a = film(plain, 4, 0)
    torch.testing.assert_close(scores(old.eval(), a), scores(plain, a), rtol=0, atol=0)
    assert "({view})" not in qwen3_model().backbone.prompt.picture
    assert RewardModel.from_pretrained(str(FIXTURE)).backbone.views == ()


def test_prompts_that_do_not_fit_the_views_are_refused():
    assert text().backbone.prompt.picture == "Picture {k} ({view}): "
    assert embedding().backbone.prompt == ISOLATED
    own = Prompt.of(vars(ISOLATED) | {"picture": "<{view} {k}> "})
    assert qwen3_model(backbone={"views": VIEWS, "prompt": own}).backbone.prompt == own
    with pytest.raises(ValueError, match=r"does not tell the views apart: write \{view\} into it"):
        qwen3_model(backbone={"views": VIEWS, "prompt": PUBLISHED})
    with pytest.raises(ValueError, match="names views: say which in views"):
        qwen3_model(backbone={"prompt": own})


@pytest.mark.parametrize("views", [2, "near", ["near", "near"], ["near", ""], ["near", 3]])
def test_views_are_different_names(views):
    with pytest.raises(ValueError, match="views must be different names"):
        NanoBackbone(views=views)
    stored = nano().config()
    stored["backbone"]["views"] = views
    with pytest.raises(UserError, match="views must be different names"):
        RewardModel.from_config(stored)


@pytest.mark.parametrize("make", [lambda: nano(views=()), lambda: text(views=("near",)), qwen3_model])
def test_more_views_than_the_model_knows_are_refused(make):
    model = make()
    a = film(model, 2, 0)
    with pytest.raises(ValueError, match="a batch with 2 views a step, the model reads"):
        scores(model, (a, a))


def test_a_clip_has_a_view_and_views_of_one_length():
    frames = torch.zeros(3, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="needs at least one view"):
        ClipBatch.from_clips([((None, None), TASK)])
    with pytest.raises(ValueError, match="the same number of frames"):
        ClipBatch.from_clips([((frames, frames[:2]), TASK)])
