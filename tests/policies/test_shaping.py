"""Rewards from scores, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from policies.shaping import FORMS, Shaping
from rbm.errors import UserError

VALUES = np.array([0.1, 0.5, 0.4, 0.8], np.float32)
OWN = np.array([1.0, 0.0, -2.0], np.float32)
DONE = np.array([False, True, True])


@pytest.mark.parametrize(
    ("shaping", "terminated", "expected"),
    [
        (Shaping("progress"), True, [0.5, 0.4, 0.8]),
        (Shaping("progress", scale=10), True, [5, 4, 8]),
        (Shaping("difference"), True, [0.4, -0.1, 0.4]),
        (Shaping("difference", scale=2, success_bonus=5), False, [0.8, 4.8, 0.8]),
        (Shaping("minus_one"), True, [-0.5, -0.6, -0.2]),
        # 1 + .9·.5 − .1; .9·.4 − .5; −2 + .9·.8 − .4, and without .9·.8 where the last step terminated
        (Shaping("potential", gamma=0.9), False, [1.35, -0.14, -1.68]),
        (Shaping("potential", gamma=0.9), True, [1.35, -0.14, -2.4]),
        # the scale leaves the environment's reward and the bonus as they are
        (Shaping("potential", gamma=0.9, scale=10, success_bonus=3), True, [4.5, 1.6, -6]),
    ],
    ids=["progress", "progress-scaled", "difference", "bonus", "minus-one", "truncated", "terminated", "scaled"],
)
def test_rewards_of_an_episode(shaping, terminated, expected):
    rewards = shaping.rewards(VALUES, terminated=terminated, done=DONE, env_rewards=OWN)
    assert rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, expected, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("terminated", [True, False])
def test_an_episode_equals_its_steps(form, terminated):
    rng = np.random.default_rng(1)
    values, own = rng.random(9, np.float32), rng.normal(size=8).astype(np.float32)
    done = np.arange(8) >= 5
    shaping = Shaping(form, gamma=0.97, scale=1.5, success_bonus=2.0)
    steps = [
        shaping.reward(
            float(values[t]),
            float(values[t + 1]),
            terminated=terminated and t == 7,
            newly_done=t == 5,
            env_reward=float(own[t]),
        )
        for t in range(8)
    ]
    np.testing.assert_array_equal(
        shaping.rewards(values, terminated=terminated, done=done, env_rewards=own), np.float32(steps)
    )


def test_potentials_of_an_episode_cancel():
    """Discounted, they add up to −Φ(s₀), or γᵀΦ(s_T) − Φ(s₀) where it was only truncated: no policy gains by them."""
    shaping, discounts = Shaping("potential", gamma=0.9), 0.9 ** np.arange(3)
    assert (shaping.rewards(VALUES, terminated=True) * discounts).sum() == pytest.approx(-0.1, abs=1e-6)
    assert (shaping.rewards(VALUES, terminated=False) * discounts).sum() == pytest.approx(0.9**3 * 0.8 - 0.1, abs=1e-6)


def test_pessimism_takes_the_spread_away_down_to_nothing():
    shaping = Shaping(pessimism=2.0)
    assert shaping.value(0.7, 0.1) == pytest.approx(0.5)
    assert shaping.value(0.1, 0.1) == 0.0
    values = shaping.value(np.float32([0.7, 0.1]), np.float32([0.1, 0.1]))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, [0.5, 0.0], atol=1e-6)
    assert Shaping().value(0.7, 0.3) == pytest.approx(0.7)


def test_an_episode_without_a_step_has_no_rewards():
    assert Shaping().rewards(VALUES[:1], terminated=True).shape == (0,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "dense"}, "give one of progress, difference, potential, minus_one"),
        ({"gamma": 1.2}, "gamma=1.2 of a reward must be from 0 to 1"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"pessimism": -1}, "pessimism=-1 must be 0 or more"),
        ({"scale": float("inf")}, "scale=inf of a reward must be a finite number"),
        ({"success_bonus": float("nan")}, "success_bonus=nan"),
    ],
    ids=["form", "gamma", "nan", "pessimism", "scale", "bonus"],
)
def test_refuses_numbers_that_make_no_sense(options, said):
    with pytest.raises(UserError, match=said):
        Shaping(**options)


def test_refuses_arrays_that_do_not_fit():
    with pytest.raises(UserError, match=r"done of an episode of 3 steps has shape \(3,\), not \(4,\)"):
        Shaping().rewards(VALUES, terminated=True, done=np.zeros(4, bool))
    with pytest.raises(UserError, match="env_rewards of an episode of 3 steps"):
        Shaping().rewards(VALUES, terminated=True, env_rewards=np.zeros(2, np.float32))
    with pytest.raises(UserError, match="value 1 of the episode is not a finite number"):
        Shaping().rewards(np.float32([0, np.nan]), terminated=True)
    with pytest.raises(UserError, match=r"shape \(T \+ 1,\)"):
        Shaping().rewards(np.zeros((2, 2), np.float32), terminated=True)
