"""Nothing that is trained on is ever tested on, also as the corpus grows."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import attempts
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbm.corpus import Corpus, CorpusWriter
from rbm.corpus.split import Split, split_corpus, split_rows
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


SIZES = st.sampled_from([0, 1, 2, 0.15, 0.3])


@given(st.integers(0, 2**31), SIZES, SIZES, st.booleans())
def test_no_trajectory_and_no_copy_of_it_is_on_two_sides(
    seed: int, heldout: float, validation: float, selected: bool
) -> None:
    rng = np.random.default_rng(seed)
    ids, task, quality = columns(80, seed)
    content = np.where(rng.random(80) < 0.7, rng.integers(1, 30, 80), 0)
    rows = np.flatnonzero(rng.random(80) < 0.6) if selected else np.arange(80)
    split = split_rows(ids, task, quality, [2], heldout, validation, seed, content, rows)
    where = place(split)
    assert sorted(where) == rows.tolist()
    assert sum(len(getattr(split, side)) for side in (*SIDES, "dropped")) == len(rows)
    for film in set(content.tolist()) - {0}:
        sides = {where[row] for row in rows.tolist() if content[row] == film} - {"dropped"}
        assert len(sides) == (film in content[rows])
    for row in split.dropped:
        copies = [where[other] for other in rows.tolist() if content[other] == content[row] != 0]
        assert set(copies) - {"dropped"}


@given(st.integers(0, 2**31), st.sampled_from([0, 2, 0.2]), st.sampled_from([0, 1, 0.2]))
def test_it_is_what_a_loop_over_tasks_and_outcomes_makes(seed: int, heldout: float, validation: float) -> None:
    ids, task, quality = columns(70, seed)
    split = split_rows(ids, task, quality, [1], heldout, validation, seed)

    def hashed(row: int) -> int:
        return int.from_bytes(blake2b(f"{seed}\0{ids[row]}".encode(), digest_size=8).digest(), "little")

    for number in (0, 2):
        for rank in range(3):
            members = sorted(np.flatnonzero((task == number) & (quality == rank)).tolist(), key=hashed)
            held = [r for n, r in enumerate(members) if (hashed(r) / 2**64 < heldout if heldout < 1 else n < heldout)]
            rest = [row for row in members if row not in held]
            far = [row for row in rest if hashed(row) / 2**64 >= 1 - validation]
            checked = rest[:validation] if validation >= 1 else far
            assert sorted(held) == [row for row in split.heldout if row in members]
            assert sorted(checked) == [row for row in split.validation if row in members]


@given(st.integers(0, 2**31), st.integers(0, 40), st.sampled_from([2, 0.2]), st.sampled_from([1, 0.1]))
def test_copies_that_are_added_move_nothing(seed: int, source: int, heldout: float, validation: float) -> None:
    ids, task, quality = columns(41, seed)
    content = np.arange(1, 42)
    before = place(split_rows(ids[:40], task[:40], quality[:40], (), heldout, validation, 0, content[:40]))
    assert before == place(split_rows(ids[:40], task[:40], quality[:40], (), heldout, validation))
    content[40], task[40], quality[40] = content[source % 40], task[source % 40], quality[source % 40]
    after = place(split_rows(ids, task, quality, (), heldout, validation, 0, content))
    assert after == before | {40: before[source % 40]}


def test_a_film_filed_under_a_new_task_is_not_trained_on() -> None:
    split = split_rows(["a", "b"], [0, 1], [0, 0], heldout_tasks=[1], heldout_per_quality=0, content=[7, 7])
    assert split.newtask.tolist() == [1]
    assert split.dropped.tolist() == [0]


def test_copies_within_a_task_count_as_one() -> None:
    ids = ["a", "b", "c", "d"]
    split = split_rows(ids, [0] * 4, [0] * 4, (), 1, 0, content=[7, 7, 7, 8])
    assert {tuple(split.heldout), tuple(split.train)} == {(0, 1, 2), (3,)}


def test_frames_of_which_nothing_is_known_are_no_copies() -> None:
    ids, task, quality = columns(50)
    assert place(split_rows(ids, task, quality, content=np.zeros(50))) == place(split_rows(ids, task, quality))


def test_a_selection_is_split_as_the_whole_corpus_is_where_the_hash_decides() -> None:
    ids, task, quality = columns(200)
    rows = np.arange(199, 0, -3)
    whole = place(split_rows(ids, task, quality, [1], 0.2, 0.1))
    assert place(split_rows(ids, task, quality, [1], 0.2, 0.1, rows=rows)) == {row: whole[row] for row in sorted(rows)}


def test_a_corpus_is_split_by_task_and_by_scene(dot_corpus: Corpus) -> None:
    task = dot_corpus.columns.task
    split = split_corpus(dot_corpus, ["move the dot left"], 0, 0, heldout_scenes=["vertical"])
    assert set(task[split.newtask]) == {1, 2, 3}
    assert set(task[split.train]) == {0}
    rows = dot_corpus.select(quality="failure")
    part = split_corpus(dot_corpus, ["move the dot left"], 0, 0, heldout_scenes=["vertical"], rows=rows)
    for side in SIDES:
        assert set(getattr(part, side)) == set(getattr(split, side)) & set(rows)
    with pytest.raises(UserError, match="no scene 'verticals'; there are 'vertical'"):
        split_corpus(dot_corpus, heldout_scenes=["verticals"])
    with pytest.raises(UserError, match="no task"):
        split_corpus(dot_corpus, ["move the dot away"])


def test_copies_in_a_real_corpus_stay_together(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "corpus") as writer:
        for number in range(30):
            record, frames = attempts.attempt(number)
            writer.add(record, frames)
            if number % 5 == 0:
                writer.add(replace(record, id=f"{record.id}/again", task=attempts.TASKS[number % 2]), frames)
    corpus = Corpus.open(tmp_path / "corpus")
    for seed in range(10):
        where = place(split_corpus(corpus, (), 1, 1, seed))
        for number in range(0, 30, 5):
            id = attempts.attempt(number)[0].id
            pair = {where[corpus.row(id)], where[corpus.row(f"{id}/again")]}
            assert len(pair - {"dropped"}) == 1


@pytest.mark.parametrize("sizes", [(-1, 0), (0.6, 0.4)])
def test_impossible_sizes_are_said(sizes: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"negative|nothing for training"):
        split_rows(*columns(10), [], *sizes)


def test_an_empty_corpus_has_empty_sides() -> None:
    split = split_rows([], np.zeros(0, int), np.zeros(0, int))
    assert [len(getattr(split, side)) for side in SIDES] == [0, 0, 0, 0]
