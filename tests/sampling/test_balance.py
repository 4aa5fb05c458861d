"""Weights and temperatures: each formula by hand, what the draws then are, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from world import TASKS, attempts, world

from rbm.errors import UserError
from rbm.sampling import Balance, Planner, Sampler, Table
from rbm.sampling.balance import Lottery, group_factors

EIGHT_AND_TWO = np.array([0] * 8 + [1] * 2)


@pytest.mark.parametrize(
    ("weight", "temperature", "share"),
    [
        ((1, 1), 1, 8 / 10),  # by size: 8 : 2
        ((1, 1), 2, 2 / 3),  # √8 : √2 = 2 : 1
        ((1, 1), np.inf, 1 / 2),  # all alike
        ((1, 3), 1, 8 / 14),  # 8 : 3 · 2
        ((1, 16), 2, 1 / 3),  # √8 : √32 = 1 : 2
        ((0, 1), 1, 0),
        ((0, 1), np.inf, 0),
    ],
)
def test_a_groups_share_by_hand(weight, temperature, share):
    factor = group_factors(EIGHT_AND_TWO, np.array(weight, float), temperature)
    total = factor.sum()
    assert factor[:8].sum() / total == pytest.approx(share)
    assert (factor[:8] == factor[0]).all()  # rows of a group are alike


def test_factors_by_hand_and_for_any_temperature():
    # (w n)^(1/T) / n, over the largest w n = 8: (8/8)^(1/2) / 8 and (2/8)^(1/2) / 2
    assert group_factors(EIGHT_AND_TWO, np.ones(2), 2)[[0, 9]] == pytest.approx([1 / 8, 1 / 4])
    sharp = group_factors(EIGHT_AND_TWO, np.ones(2), 1e-4)
    assert np.isfinite(sharp).all()
    assert sharp[:8].sum() / sharp.sum() == pytest.approx(1)


def test_source_and_task_factors_multiply_by_hand():
    corpus = attempts(task=[0, 0, 0, 1], quality=[0] * 4, source=[0, 1, 1, 1])
    table = Table.of(corpus)
    balance = Balance(corpus, {"lab": 6}, 1.0, {}, float("inf"))
    # sources at T = 1: the weights 6, 1, 1, 1; tasks all alike: 1/3 for each of three rows, 1 for the fourth
    weights = balance.weights(table, np.arange(4))
    assert (weights / weights[1]).tolist() == pytest.approx([6, 1, 1, 3])
    # of two candidates, one a task: n_g counts candidates, so the tasks' factors are equal
    weights = balance.weights(table, np.array([1, 3]))
    assert weights[0] == pytest.approx(weights[1])


def test_the_first_drawn_follows_the_weights_and_its_partner_does_not():
    corpus = attempts(task=[0] * 8, quality=[0, 0, 0, 0, 2, 2, 2, 2], source=[0, 0, 0, 1, 0, 0, 0, 1])
    balance = Balance(corpus, {"kitchen": 9})
    plan = Planner(corpus, 0, weights={"outcome": 1}, balance=balance).plan(0, 8000)
    # worse ones: 3 of the lab with weight 1, one of the kitchen with 9
    assert (plan.rejected == 7).mean() == pytest.approx(9 / 12, abs=0.02)
    assert (plan.chosen == 3).mean() == pytest.approx(1 / 4, abs=0.02)
    plan = Planner(corpus, 0, weights={"rewind": 1}, balance=balance).plan(0, 8000)
    assert (plan.chosen == 3).mean() == pytest.approx(9 / 12, abs=0.02)


def test_temperature_evens_out_the_tasks_of_each_strategy():
    rng = np.random.default_rng(0)
    corpus = attempts(
        task=rng.choice(4, 3000, p=[0.7, 0.2, 0.08, 0.02]).tolist(), quality=rng.integers(0, 3, 3000).tolist()
    )
    balance = Balance(corpus, task_temperature=float("inf"))
    for strategy in ("outcome", "wrong_task", "reverse"):
        plan = Planner(corpus, 5, weights={strategy: 1}, balance=balance).plan(0, 20_000)
        first = plan.rejected if strategy == "outcome" else plan.chosen
        share = np.bincount(corpus.columns.task[first], minlength=4) / len(first)
        assert share == pytest.approx(np.full(4, 0.25), abs=0.015), strategy


def test_graded_pairs_are_weighted_by_the_better_one():
    corpus = attempts(task=[0, 0, 1, 1], quality=[1, 1, 1, 1])
    corpus = corpus.changed(partial_success=np.array([0.1, 0.9, 0.2, 0.8], np.float32))
    balance = Balance(corpus, task_weights={TASKS[1].text: 4})
    plan = Planner(corpus, 0, weights={"grade": 1}, balance=balance).plan(0, 6000)
    assert set(plan.chosen) == {1, 3}
    assert (plan.chosen == 3).mean() == pytest.approx(0.8, abs=0.02)
    assert (plan.rejected == np.where(plan.chosen == 3, 2, 0)).all()


def test_a_source_of_weight_0_is_not_drawn_first_and_none_is_left_of_it_alone():
    corpus = world(200)
    plan = Planner(corpus, 0, weights={"rewind": 1}, balance=Balance(corpus, {"lab": 0})).plan(0, 5000)
    assert set(corpus.columns.source[plan.chosen]) == {1, 2}
    nothing = Balance(corpus, dict.fromkeys(corpus.sources, 0))
    with pytest.raises(UserError, match="can make a pair of these"):
        Planner(corpus, 0, balance=nothing)


def test_without_weights_nothing_changes():
    corpus = world(200, graded=True)
    plain, neutral = Sampler(corpus, 4), Sampler(corpus, 4, balance=Balance(corpus))
    a, b = plain.planner.plan(0, 1000), neutral.planner.plan(0, 1000)
    for name in ("strategy", "chosen", "rejected"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@given(
    st.lists(st.sampled_from([0.0, 1e-9, 0.5, 1.0, 3.0, 1e6]), min_size=1, max_size=60),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=30),
)
def test_a_lottery_finds_what_a_search_through_all_finds(weights, numbers):
    weight, uniform = np.array(weights), np.array(numbers)
    lottery = Lottery(len(weight), weight)
    if not weight.any():
        assert len(lottery) == 0
        return
    drawn = lottery.draw(uniform)
    total = np.cumsum(weight)
    np.testing.assert_array_equal(drawn, np.searchsorted(total / total[-1], uniform, side="right"))
    assert (weight[drawn] > 0).all()


def test_a_lottery_without_weights_by_hand():
    assert Lottery(4).draw(np.array([0, 0.24, 0.25, 0.99])).tolist() == [0, 0, 1, 3]
    assert Lottery(3, np.array([1.0, 0.0, 3.0])).draw(np.array([0.2, 0.25, 0.99])).tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"source_weights": {"labb": 1}}, "source_weights: no source 'labb'; there are 'lab'"),
        ({"task_weights": {"open the drawers": 1}}, "task_weights: no task 'open the drawers'; there are 'open the d"),
        ({"source_weights": {"lab": -1}}, "weight of 'lab' must be a number from 0 on"),
        ({"task_weights": {"open the door": float("nan")}}, "weight of 'open the door' must be a number from 0 on"),
        ({"source_temperature": 0}, "source_temperature must be above 0"),
        ({"task_temperature": float("nan")}, "task_temperature must be above 0"),
    ],
)
def test_what_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        Balance(world(), **options)
