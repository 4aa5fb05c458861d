"""Pairs: who is preferred, what each strategy promises, and that draws depend on (seed, index) alone."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbm.errors import UserError
from rbm.sampling import ClipOptions, Sampler, Table
from rbm.sampling.strategies import MIN_GRADE_GAP, lost_frames
from rbm.trajectory import Quality, Task

TASKS = (
    Task("open the drawer", "drawer", ("pull the drawer open",)),
    Task("close the drawer", "drawer"),
    Task("open the door", "door"),
    Task("pick up the cup"),
)


@dataclass(frozen=True)
class Columns:
    task: np.ndarray
    quality: np.ndarray
    n_frames: np.ndarray
    done: np.ndarray
    done_known: np.ndarray
    messy: np.ndarray
    dense: np.ndarray
    partial_success: np.ndarray


def columns(n: int = 60, seed: int = 0, graded: bool = False, dense: bool = False) -> Columns:
    rng = np.random.default_rng(seed)
    quality = rng.integers(0, 3, n).astype(np.int8)
    n_frames = rng.integers(2, 65, n).astype(np.int32)
    success = quality == 0
    return Columns(
        task=rng.integers(0, len(TASKS), n).astype(np.int32),
        quality=quality,
        n_frames=n_frames,
        done=np.where(success, np.maximum(0, n_frames - 1 - rng.integers(0, 6, n)), -1).astype(np.int32),
        done_known=rng.random(n) < 0.7,
        messy=success & (rng.random(n) < 0.4),
        dense=np.full(n, dense),
        partial_success=np.where(success, 1, rng.random(n)).astype(np.float32)
        if graded
        else np.full(n, np.nan, np.float32),
    )


def sampler(seed: int = 3, numbers=None, **options) -> Sampler:
    return Sampler(
        Table.of(columns(graded="weights" in options and "grade" in options["weights"]), TASKS, numbers),
        seed,
        **options,
    )


def test_a_failure_is_never_preferred_to_a_success_of_its_task():
    draws = sampler(weights={"outcome": 1})
    table = draws.table
    for index in range(600):
        pair = draws.pair(index)
        better, worse = (pair.first, pair.second) if pair.preference == 1 else (pair.second, pair.first)
        assert table.task[better.row] == table.task[worse.row]
        assert table.quality[better.row] < table.quality[worse.row]
        for clip in (better, worse):  # both at full length
            assert clip.frames[0] == 0
            assert clip.frames[-1] == table.n_frames[clip.row] - 1
    seen = {(int(table.quality[p.first.row]), int(table.quality[p.second.row])) for p in map(draws.pair, range(600))}
    assert {(0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1)} == seen  # every kind, in both orders


def test_rewind_keeps_start_and_turn_and_loses_a_tenth():
    draws = sampler(weights={"rewind": 1})
    table = draws.table
    for index in range(400):
        pair = draws.pair(index)
        chosen, rewound = (pair.first, pair.second) if pair.preference == 1 else (pair.second, pair.first)
        assert chosen.row == rewound.row
        assert table.quality[chosen.row] == Quality.SUCCESSFUL.rank
        assert not table.messy[chosen.row]
        start, turn, back = chosen.frames[0], chosen.frames[-1], rewound.frames[-1]
        assert rewound.frames[0] == start
        assert rewound.frames.max() == turn
        assert start <= back < table.done[chosen.row]
        assert back <= turn - lost_frames(int(table.n_frames[chosen.row]))


def test_reverse_is_the_same_stretch_backwards():
    draws = sampler(weights={"reverse": 1})
    for index in range(400):
        pair = draws.pair(index)
        chosen, undone = (pair.first, pair.second) if pair.preference == 1 else (pair.second, pair.first)
        assert chosen.frames[0] == undone.frames[-1] < draws.table.done[chosen.row]
        assert chosen.frames[-1] == undone.frames[0]
        assert (np.diff(chosen.frames) > 0).all()
        assert (np.diff(undone.frames) < 0).all()


def test_wrong_task_shows_another_task_and_prefers_its_scene():
    draws = sampler(weights={"wrong_task": 1})
    table = draws.table
    same_scene = 0
    possible = 0
    for index in range(800):
        pair = draws.pair(index)
        right, wrong = (pair.first, pair.second) if pair.preference == 1 else (pair.second, pair.first)
        task, other = table.task[right.row], table.task[wrong.row]
        assert task != other
        assert (right.wrong_instruction, wrong.wrong_instruction) == (False, True)
        assert table.quality[right.row] == Quality.SUCCESSFUL.rank
        assert pair.task in (TASKS[task].text, *TASKS[task].paraphrases)
        if TASKS[task].scene == "drawer":
            possible += 1
            same_scene += TASKS[other].scene == "drawer"
    assert same_scene / possible > 0.5


def test_grades_lie_apart():
    draws = sampler(weights={"grade": 1})
    for index in range(300):
        pair = draws.pair(index)
        better, worse = (pair.first, pair.second) if pair.preference == 1 else (pair.second, pair.first)
        grade = draws.table.partial_success
        assert draws.table.task[better.row] == draws.table.task[worse.row]
        assert grade[better.row] - grade[worse.row] >= MIN_GRADE_GAP - 1e-6


def test_default_mixture_has_its_shares():
    draws = sampler()
    pairs = [draws.pair(index) for index in range(3000)]
    share = {
        name: sum(pair.strategy == name for pair in pairs) / len(pairs) for name in ("outcome", "wrong_task", "rewind")
    }
    assert share["wrong_task"] >= 0.25
    assert share["outcome"] == pytest.approx(4 / 9, abs=0.04)
    assert share["rewind"] == pytest.approx(1 / 9, abs=0.04)
    firsts = sum(pair.preference == 1 for pair in pairs) / len(pairs)
    assert firsts == pytest.approx(0.5, abs=0.04)


def test_a_quarter_of_the_clips_is_what_a_session_holds():
    from rbm.frames import session_context

    draws = sampler()
    context = draws.options.context_frames
    clips = [clip for index in range(2000) for clip in (draws.pair(index).first, draws.pair(index).second)]

    def is_session(clip):
        steps = np.abs(clip.frames - clip.frames[0])
        return np.array_equal(steps, session_context(int(steps[-1]), context))

    assert sum(map(is_session, clips)) / len(clips) >= 0.25


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(0, 10**7))
def test_draws_depend_on_seed_and_index_alone(seed, index):
    here, there = sampler(seed), sampler(seed)
    there.pair(index + 5000)  # another block first: no hidden state
    assert_same(here.pair(index), there.pair(index))


def test_workers_and_resumption_do_not_change_what_is_drawn():
    unbroken = [sampler().pair(index) for index in range(60)]
    workers = [sampler() for _ in range(3)]
    shared = [workers[index % 3].pair(index) for index in range(60)]
    resumed = [sampler().pair(index) for index in range(31, 60)]
    for a, b in zip(unbroken, shared, strict=True):
        assert_same(a, b)
    for a, b in zip(unbroken[31:], resumed, strict=True):
        assert_same(a, b)


def test_every_worker_draws_other_trajectories():
    numbers = [sampler().pair(index).first.number for index in range(400)]
    assert len(set(numbers)) > 40  # of 60: no worker repeats another's draws
    assert len({sampler(seed).pair(0).first.number for seed in range(40)}) > 10


def test_shuffled_pairs_have_no_preference():
    draws = sampler(options=ClipOptions(shuffle=1.0))
    pairs = [draws.pair(index) for index in range(200)]
    assert all(pair.preference is None for pair in pairs)
    assert any((np.diff(pair.first.frames) < 0).any() and (np.diff(pair.first.frames) > 0).any() for pair in pairs)


def test_only_the_given_rows_are_drawn():
    allowed = np.arange(0, 60, 2)
    draws = sampler(numbers=allowed)
    drawn = {clip.number for index in range(500) for clip in (draws.pair(index).first, draws.pair(index).second)}
    assert drawn <= set(allowed.tolist())


def test_what_cannot_be_drawn_is_said():
    table = Table.of(columns(), TASKS)
    with pytest.raises(UserError, match="no such strategy: rewnd; there are: rewind"):
        Sampler(table, 0, weights={"rewnd": 1})
    with pytest.raises(UserError, match="negative"):
        Sampler(table, 0, weights={"rewind": -1})
    only_failures = np.flatnonzero(columns().quality == 2)
    with pytest.raises(UserError, match="can make a pair of these"):
        Sampler(Table.of(columns(), TASKS, only_failures), 0)
    with pytest.raises(UserError, match="clip-relative"):
        Sampler(table, 0, options=ClipOptions(shuffle=0.5), relative=True)


def assert_same(a, b):
    assert (a.index, a.strategy, a.task, a.preference) == (b.index, b.strategy, b.task, b.preference)
    for x, y in ((a.first, b.first), (a.second, b.second)):
        assert (x.number, x.wrong_instruction) == (y.number, y.wrong_instruction)
        np.testing.assert_array_equal(x.frames, y.frames)
