"""Each loss against numbers worked out by hand, and sums over micro-batches against the whole."""

import math

import numpy as np
import pytest
import torch

from rbm.model import Counts, LossWeights, RewardOutput, Targets, reward_losses
from rbm.model.heads import progress_moments, two_hot
from rbm.model.losses import preference_loss, progress_loss, success_loss

LN2 = math.log(2)


def test_two_hot_by_hand():
    # 0.25 of 9 steps is 2.25: bin 2 gets .75, bin 3 gets .25
    expected = [0, 0, 0.75, 0.25, 0, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(two_hot(torch.tensor(0.25), 10), expected, atol=1e-6)
    assert two_hot(torch.tensor(0.0), 10).tolist() == [1] + [0] * 9
    assert two_hot(torch.tensor(1.0), 10).tolist() == [0] * 9 + [1]
    many = torch.linspace(0, 1, 101)
    mean, _ = progress_moments(two_hot(many, 10).clamp(min=1e-30).log())
    torch.testing.assert_close(mean, many, atol=1e-5, rtol=0)


def test_moments_by_hand():
    # half on 0, half on 1: mean .5, standard deviation .5
    logits = torch.full((10,), -50.0)
    logits[0] = logits[9] = 0
    mean, spread = progress_moments(logits)
    assert mean.item() == pytest.approx(0.5)
    assert spread.item() == pytest.approx(0.5)


def test_progress_loss_by_hand():
    # bins 0, .5, 1 with probabilities 1/2, 1/4, 1/4; target .25 is half on bin 0 and half on bin 1:
    # -(ln 1/2)/2 - (ln 1/4)/2 = 1.5 ln 2. The second frame is masked out; the count is of the optimiser batch.
    logits = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25)], [9.0, 0.0, 0.0]])
    loss = progress_loss(logits, torch.tensor([0.25, 1.0]), torch.tensor([True, False]), count=3)
    assert loss.item() == pytest.approx(1.5 * LN2 / 3)


def test_success_loss_by_hand():
    # logits ln 3 say 3/4: BCE is ln 4/3 for a success, ln 4 for a failure
    logits = torch.full((5,), math.log(3))
    target = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0])
    mask = torch.tensor([True, True, True, True, False])
    loss = success_loss(logits, target, mask, positives=1, negatives=3)
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    only = success_loss(logits[1:4], target[1:4], mask[1:4], positives=0, negatives=3)
    assert only.item() == pytest.approx(math.log(4) / 2)


def test_preference_loss_by_hand():
    logits = torch.tensor([math.log(3), 0.0, 100.0])
    loss = preference_loss(logits, torch.tensor([1.0, 0.0, 0.0]), torch.tensor([True, True, False]), count=2)
    assert loss.item() == pytest.approx((math.log(4 / 3) + LN2) / 2)


def test_weighted_sum():
    output = RewardOutput(torch.zeros(1, 10), torch.zeros(1), torch.zeros(2), torch.zeros(1))
    yes = torch.tensor([True])
    targets = Targets(torch.zeros(1), yes, torch.ones(1), yes, torch.ones(1), yes)
    losses = reward_losses(output, targets, Counts(1, 1, 0, 1), LossWeights(progress=2, success=3, preference=5))
    assert losses.progress.item() == pytest.approx(math.log(10))
    assert losses.success.item() == pytest.approx(LN2 / 2)
    assert losses.total.item() == pytest.approx(2 * math.log(10) + 3 * LN2 / 2 + 5 * LN2)
    with pytest.raises(ValueError, match="with pairs"):
        reward_losses(
            RewardOutput(torch.zeros(1, 10), torch.zeros(1), None, None), targets, Counts(1, 1, 0, 1), LossWeights()
        )


def test_a_class_without_supervision_gives_zero_and_no_nan():
    nothing = torch.tensor([False])
    assert progress_loss(torch.zeros(1, 10), torch.zeros(1), nothing, 0).item() == 0
    assert success_loss(torch.zeros(1), torch.zeros(1), nothing, 0, 0).item() == 0
    assert preference_loss(torch.zeros(1), torch.zeros(1), nothing, 0).item() == 0
