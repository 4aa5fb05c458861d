"""Nothing that is trained on is ever tested on, also as the corpus grows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbm.corpus.split import Split, split_rows
from rbm.errors import UserError

SIDES = ("train", "validation", "heldout", "newtask")


def columns(n: int, seed: int = 0, tasks: int = 3) -> tuple[list[str], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return [f"id/{i}" for i in range(n)], rng.integers(0, tasks, n), rng.integers(0, 3, n)


def place(split: Split) -> dict[int, str]:
    return {int(row): side for side in (*SIDES, "dropped") for row in getattr(split, side)}


@given(st.integers(1, 120), st.integers(0, 4), st.integers(0, 3))
def test_every_trajectory_is_on_one_side(n: int, heldout: int, validation: int) -> None:
    ids, task, quality = columns(n)
    split = split_rows(ids, task, quality, [2], heldout, validation)
    assert sum(len(getattr(split, side)) for side in SIDES) == n
    assert len(place(split)) == n
    assert (task[split.newtask] == 2).all()
    for number in (0, 1):
        for rank in range(3):
            members = np.flatnonzero((task == number) & (quality == rank))
            assert np.isin(members, split.heldout).sum() == min(heldout, len(members))
            assert np.isin(members, split.validation).sum() == min(validation, max(0, len(members) - heldout))


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 3), st.sampled_from([0, 1, 2, 0.2]))
def test_growth_only_moves_towards_training(n: int, more: int, heldout: int, validation: float) -> None:
    ids, task, quality = columns(n + more)
    before = place(split_rows(ids[:n], task[:n], quality[:n], [], heldout, validation))
    after = place(split_rows(ids, task, quality, [], heldout, validation))
    for row, side in before.items():
        assert SIDES.index(after[row]) <= SIDES.index(side)


@given(st.integers(1, 60), st.integers(0, 60))
def test_with_fractions_growth_moves_nothing(n: int, more: int) -> None:
    ids, task, quality = columns(n + more)
    before = place(split_rows(ids[:n], task[:n], quality[:n], [], 0.2, 0.1))
    after = place(split_rows(ids, task, quality, [], 0.2, 0.1))
    assert all(after[row] == side for row, side in before.items())


def test_fractions_are_about_kept() -> None:
    split = split_rows(*columns(5000), [], 0.2, 0.1)
    assert len(split.heldout) == pytest.approx(1000, rel=0.1)
    assert len(split.validation) == pytest.approx(500, rel=0.15)


def test_order_of_rows_changes_nothing() -> None:
    ids, task, quality = columns(80)
    back = slice(None, None, -1)
    one = split_rows(ids, task, quality, [1], 2, 1)
    other = split_rows(ids[back], task[back], quality[back], [1], 2, 1)
    for side in SIDES:
        assert {ids[row] for row in getattr(one, side)} == {ids[back][row] for row in getattr(other, side)}


def test_a_seed_draws_another_split() -> None:
    ids, task, quality = columns(200)
    assert place(split_rows(ids, task, quality, seed=0)) != place(split_rows(ids, task, quality, seed=1))


@given(st.integers(0, 2**31))
def test_copies_never_stand_on_two_sides(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids, task, quality = columns(60, seed)
    content = [f"film {number}" if number < 20 else "" for number in rng.integers(0, 40, 60)]
    split = split_rows(ids, task, quality, [2], 2, 1, content=content)
    where = place(split)
    assert len(where) == 60
    for film in set(content) - {""}:
        assert len({where[row] for row in range(60) if content[row] == film} - {"dropped"}) == 1


def test_a_film_filed_under_a_new_task_is_not_trained_on() -> None:
    split = split_rows(["a", "b"], [0, 1], [0, 0], heldout_tasks=[1], heldout_per_quality=0, content=["film", "film"])
    assert split.newtask.tolist() == [1]
    assert split.dropped.tolist() == [0]


def test_copies_within_a_task_count_as_one() -> None:
    ids = ["a", "b", "c", "d"]
    split = split_rows(ids, [0] * 4, [0] * 4, (), 1, 0, content=["same", "same", "same", "other"])
    assert {tuple(split.heldout), tuple(split.train)} == {(0, 1, 2), (3,)}


@pytest.mark.parametrize("sizes", [(-1, 0), (0.6, 0.4)])
def test_impossible_sizes_are_said(sizes: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"negative|nothing for training"):
        split_rows(*columns(10), [], *sizes)


def test_an_empty_corpus_has_empty_sides() -> None:
    split = split_rows([], np.zeros(0, int), np.zeros(0, int))
    assert [len(getattr(split, side)) for side in SIDES] == [0, 0, 0, 0]
