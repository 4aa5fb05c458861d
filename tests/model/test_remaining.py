"""The remaining-time head: bins, read-out and loss by hand; models without it are as they were."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from tiny_vlm import FIXTURE, qwen3_model

from rbm.errors import UserError
from rbm.model import ClipBatch, Counts, LossWeights, RewardModel, RewardOutput, Targets, reward_losses
from rbm.model.backbones import NanoBackbone
from rbm.model.heads import REMAINING_BINS, Head, remaining_centres, remaining_moments, symlog_share, two_hot
from rbm.model.losses import remaining_loss
from rbm.model.published import save_published
from rbm.scoring import Scorer

TASK = "open the drawer"
LOG = math.log(601)


def nano(seed: int = 0, **options) -> RewardModel:
    torch.manual_seed(seed)
    backbone = NanoBackbone(image_size=32, width=8, hidden=32, layers=1, heads=2)
    return RewardModel(backbone, context_frames=8, **options).eval()


def batch(model: RewardModel) -> ClipBatch:
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 40, 48, 3), dtype=np.uint8)
    return ClipBatch.from_clips([(model.preprocess(clip), TASK) for clip in frames])


def test_bins_are_even_in_the_logarithm_from_nothing_to_ten_minutes():
    centres = remaining_centres(torch.zeros(()))
    assert centres.shape == (REMAINING_BINS,)
    assert centres[0] == 0
    assert centres[-1].item() == pytest.approx(600, rel=1e-5)
    steps = (centres + 1).log().diff()
    torch.testing.assert_close(steps, torch.full((31,), LOG / 31), atol=1e-5, rtol=0)
    assert centres[1].item() == pytest.approx(601 ** (1 / 31) - 1, rel=1e-4)  # 0.23 s


def test_a_time_is_shared_by_two_bins_and_comes_back():
    # log(1 + 9) / log 601 · 31 = 11.156: bin 11 gets .844, bin 12 gets .156
    place = math.log(10) / LOG * 31
    assert place == pytest.approx(11.156, abs=1e-3)
    spread = two_hot(symlog_share(torch.tensor(9.0)), REMAINING_BINS)
    assert spread.nonzero().flatten().tolist() == [11, 12]
    assert spread[11].item() == pytest.approx(12 - place, abs=1e-4)
    assert spread[12].item() == pytest.approx(place - 11, abs=1e-4)
    seconds = torch.tensor([0.0, 0.1, 1.0, 9.0, 59.5, 300.0, 600.0, 5000.0])
    mean, _ = remaining_moments(two_hot(symlog_share(seconds), REMAINING_BINS).clamp(min=1e-30).log())
    torch.testing.assert_close(mean, seconds.clamp(max=600), rtol=1e-3, atol=1e-4)


def test_moments_by_hand():
    # half on 0 s, half on 600 s: exp(log(601) / 2) − 1 = 23.515 s; spread √((23.515² + 576.485²) / 2)
    logits = torch.full((REMAINING_BINS,), -50.0)
    logits[0] = logits[-1] = 0
    mean, spread = remaining_moments(logits)
    assert mean.item() == pytest.approx(math.sqrt(601) - 1, rel=1e-4)
    assert spread.item() == pytest.approx(math.sqrt((23.515**2 + 576.485**2) / 2), rel=1e-3)


def test_loss_by_hand():
    # bin 31 has e³, the others 1 each: log Z = log(31 + e³). At 600 s all of the target is on it: log Z − 3.
    # At 0 s it is on bin 0: log Z. The third is masked out; the optimiser batch holds four.
    logits = torch.zeros(3, REMAINING_BINS)
    logits[:, -1] = 3
    z = math.log(31 + math.exp(3))
    loss = remaining_loss(logits, torch.tensor([600.0, 0.0, 7.0]), torch.tensor([True, True, False]), count=4)
    assert loss.item() == pytest.approx((z - 3 + z) / 4, rel=1e-5)
    nothing = remaining_loss(logits, torch.zeros(3), torch.zeros(3, dtype=torch.bool), 0)
    assert nothing.item() == 0


def supervision(remaining: bool) -> Targets:
    yes, value = torch.tensor([True, True]), torch.zeros(2)
    targets = Targets(value, yes, value, yes, torch.ones(1), yes[:1])
    return (
        dataclasses.replace(targets, remaining=value, remaining_mask=torch.tensor([True, False]))
        if remaining
        else targets
    )


def test_it_is_one_more_part_of_the_sum_and_nothing_without_the_head():
    output = RewardOutput(torch.zeros(2, 10), torch.zeros(2), torch.zeros(2), torch.zeros(1))
    off = reward_losses(output, supervision(False), Counts.of(supervision(False)), LossWeights())
    assert off.remaining is None
    ignored = reward_losses(output, supervision(True), Counts.of(supervision(True)), LossWeights())
    assert ignored.total == off.total  # the data may say it, the model does not
    timed = dataclasses.replace(output, remaining_logits=torch.zeros(2, REMAINING_BINS))
    counts = Counts.of(supervision(True))
    assert counts.remaining == 1
    assert (counts + counts).remaining == 2
    on = reward_losses(timed, supervision(True), counts, LossWeights())
    assert on.remaining.item() == pytest.approx(math.log(32))
    assert (on.total - off.total).item() == pytest.approx(0.5 * math.log(32), rel=1e-5)
    tripled = reward_losses(timed, supervision(True), counts, LossWeights(remaining=1.5))
    assert (tripled.total - off.total).item() == pytest.approx(1.5 * math.log(32), rel=1e-5)
    with pytest.raises(ValueError, match="the targets do not"):
        reward_losses(timed, supervision(False), counts, LossWeights())


def test_micro_batches_add_up_to_the_batch():
    torch.manual_seed(0)
    logits, seconds, mask = torch.randn(12, REMAINING_BINS), torch.rand(12) * 50, torch.rand(12) < 0.6
    count = int(mask.sum())
    whole = remaining_loss(logits, seconds, mask, count)
    parts = [remaining_loss(logits[cut], seconds[cut], mask[cut], count) for cut in (slice(0, 2), slice(2, 12))]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("make", [nano, qwen3_model])
def test_the_other_heads_are_those_of_a_model_without_it(make):
    plain, timed = make(), make(remaining=True)
    assert plain.state_dict().keys() == {key for key in timed.state_dict() if not key.startswith("remaining_head")}
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(timed.state_dict()[name], value, rtol=0, atol=0)
    with torch.inference_mode():
        before, after = plain(batch(plain)), timed(batch(timed))
    torch.testing.assert_close(before.progress_logits, after.progress_logits, rtol=0, atol=0)
    assert before.remaining_logits is None
    assert after.remaining_logits.shape == (8, REMAINING_BINS)
    with pytest.raises(ValueError, match="remaining=False"):
        plain.decode_remaining(before)
    seconds, spread = timed.decode_remaining(after)
    assert seconds.dtype == spread.dtype == torch.float32
    assert seconds.shape == spread.shape == (8,)
    assert ((seconds >= 0) & (seconds <= 600) & (spread >= 0)).all()


def test_the_head_learns_seconds():
    """Cross entropy alone brings the read-out to the targets."""
    torch.manual_seed(0)
    states, seconds = torch.randn(24, 16), torch.rand(24) * 30
    head = Head(16, REMAINING_BINS, 0.0)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    everything = torch.ones(24, dtype=torch.bool)
    for _ in range(600):
        optimizer.zero_grad()
        remaining_loss(head(states), seconds, everything, 24).backward()
        optimizer.step()
    found, _ = remaining_moments(head(states))
    assert (found - seconds).abs().mean() < 0.5


def test_it_is_saved_and_scored(tmp_path):
    model = nano(remaining=True)
    model.save_pretrained(str(tmp_path / "model"))
    scorer = Scorer.from_pretrained(tmp_path / "model", device="cpu")
    video = np.random.default_rng(1).integers(0, 256, (20, 40, 48, 3), dtype=np.uint8)
    scores = scorer.score(video, TASK)
    assert scores.remaining.shape == (8,)
    assert scores.remaining.dtype == np.float32
    assert scores.to_json()["remaining"] == pytest.approx(scores.remaining.tolist(), abs=1e-5)
    assert "remaining s" in [column.header for column in scores.table().columns]
    every = scorer.score(video, TASK, every=1)
    assert every.remaining.shape == (20,)
    np.testing.assert_allclose(every.remaining[0], scores.remaining[0], rtol=1e-4)  # of a session's first frame
    (clip,) = scorer.predict([(video[:5], TASK)])
    np.testing.assert_allclose(clip.remaining, every.remaining[:5], rtol=1e-3)


def test_published_layouts_have_no_place_for_it(tmp_path):
    published = RewardModel.from_pretrained(str(FIXTURE))
    assert published.remaining is False
    with_it = RewardModel(published.backbone, pair="causal", preference="joint", remaining=True)
    with pytest.raises(UserError, match=r"published layouts cannot hold this model: .*it has a head for the time that"):
        save_published(with_it, tmp_path / "out", "robometer")
    assert not (tmp_path / "out").exists()


def test_a_model_without_it_says_nothing_of_it():
    scores = Scorer.from_pretrained(device="cpu").score(np.zeros((3, 64, 64, 3), np.uint8), TASK)
    assert scores.remaining is None
    assert "remaining" not in scores.to_json()
    assert "remaining s" not in [column.header for column in scores.table().columns]
