"""Pairs: who is preferred, what each strategy promises, and that draws depend on (seed, index) alone."""

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import TASKS, attempts, world

from rbm.errors import UserError
from rbm.sampling import ClipOptions, Planner, Sampler, Table
from rbm.sampling.draws import BLOCK
from rbm.sampling.strategies import MIN_GRADE_GAP, WrongTask, lost_frames
from rbm.trajectory import Quality, Task

COLUMNS = world().columns


def sampler(seed: int = 3, **options) -> Sampler:
    return Sampler(world(graded="grade" in options.get("weights", {})), seed, **options)


def test_a_failure_is_never_preferred_to_a_success_of_its_task():
    draws = sampler(weights={"outcome": 1})
    for index in range(600):
        pair = draws.pair(index)
        better, worse = (pair.first, pair.second) if pair.preference == 1 else (pair.second, pair.first)
        assert COLUMNS.task[better.row] == COLUMNS.task[worse.row]
        assert COLUMNS.quality[better.row] < COLUMNS.quality[worse.row]
        for clip in (better, worse):  # both at full length
            assert clip.frames[0] == 0
            assert clip.frames[-1] == COLUMNS.n_frames[clip.row] - 1
    quality = COLUMNS.quality
    seen = {(int(quality[p.first.row]), int(quality[p.second.row])) for p in map(draws.pair, range(600))}
    assert {(0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1)} == seen  # every kind, in both orders


def test_rewind_keeps_start_and_turn_and_loses_a_tenth():
    draws = sampler(weights={"rewind": 1})
    for index in range(400):
        pair = draws.pair(index)
        chosen, rewound = (pair.first, pair.second) if pair.preference == 1 else (pair.second, pair.first)
        assert chosen.row == rewound.row
        assert COLUMNS.quality[chosen.row] == Quality.SUCCESSFUL.rank
        assert not COLUMNS.messy[chosen.row]
        start, turn, back = chosen.frames[0], chosen.frames[-1], rewound.frames[-1]
        assert rewound.frames[0] == start
        assert rewound.frames.max() == turn
        assert start <= back < COLUMNS.done[chosen.row]
        assert back <= turn - lost_frames(int(COLUMNS.n_frames[chosen.row]))


def test_reverse_is_the_same_stretch_backwards():
    draws = sampler(weights={"reverse": 1})
    for index in range(400):
        pair = draws.pair(index)
        chosen, undone = (pair.first, pair.second) if pair.preference == 1 else (pair.second, pair.first)
        assert chosen.frames[0] == undone.frames[-1] < COLUMNS.done[chosen.row]
        assert chosen.frames[-1] == undone.frames[0]
        assert (np.diff(chosen.frames) > 0).all()
        assert (np.diff(undone.frames) < 0).all()


def test_wrong_task_shows_another_task_and_prefers_its_scene():
    draws = sampler(weights={"wrong_task": 1})
    same_scene = 0
    possible = 0
    for index in range(800):
        pair = draws.pair(index)
        right, wrong = (pair.first, pair.second) if pair.preference == 1 else (pair.second, pair.first)
        task, other = COLUMNS.task[right.row], COLUMNS.task[wrong.row]
        assert task != other
        assert (right.wrong_instruction, wrong.wrong_instruction) == (False, True)
        assert COLUMNS.quality[right.row] == Quality.SUCCESSFUL.rank
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
        grade = draws.maker.corpus.columns.partial_success
        assert COLUMNS.task[better.row] == COLUMNS.task[worse.row]
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
    context = draws.maker.options.context_frames
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
    numbers = [sampler().pair(index).first.row for index in range(400)]
    assert len(set(numbers)) > 40  # of 60: no worker repeats another's draws
    assert len({sampler(seed).pair(0).first.row for seed in range(40)}) > 10


def test_shuffled_pairs_have_no_preference():
    draws = sampler(options=ClipOptions(shuffle=1.0))
    pairs = [draws.pair(index) for index in range(200)]
    assert all(pair.preference is None for pair in pairs)
    assert any((np.diff(pair.first.frames) < 0).any() and (np.diff(pair.first.frames) > 0).any() for pair in pairs)


def test_only_the_given_rows_are_drawn():
    allowed = np.arange(0, 60, 2)
    draws = sampler(rows=allowed)
    drawn = {clip.row for index in range(500) for clip in (draws.pair(index).first, draws.pair(index).second)}
    assert drawn <= set(allowed.tolist())


def test_draws_stay_what_they_were():
    """Published figures stand on these: a changed digest means other training data for every seed."""
    draws = Sampler(world(400, graded=True), 3, options=ClipOptions(shuffle=0.1))
    digest = hashlib.blake2b(digest_size=8)
    for index in range(1500):
        pair = draws.pair(index)
        digest.update(f"{pair.strategy} {pair.task} {pair.preference}".encode())
        for clip in (pair.first, pair.second):
            digest.update(np.array([clip.row, *clip.frames], "<i8").tobytes())
    assert digest.hexdigest() == "2ed630f6432e8b44"


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.booleans())
def test_masks_do_not_need_labels_where_the_completion_is_known(seed, graded):
    corpus = world(60, seed, graded=graded, dense=True)
    asked = []

    def labels(row):
        asked.append(row)
        return np.linspace(0, 1, corpus.columns.n_frames[row]).astype(np.float32)

    draws = Sampler(corpus, seed)
    clips = [clip for index in range(60) for clip in (draws.pair(index).first, draws.pair(index).second)]
    full = [draws.targets(clip, labels) for clip in clips]
    asked.clear()
    for clip, whole in zip(clips, full, strict=True):
        counted = draws.maker.targets(clip, labels, masks_only=True)
        np.testing.assert_array_equal(counted.progress_mask, whole.progress_mask)
        np.testing.assert_array_equal(counted.success, whole.success)
        np.testing.assert_array_equal(counted.success_mask, whole.success_mask)
    assert not corpus.columns.done_known[asked].any()
    assert (corpus.columns.quality[asked] == 0).all()


def test_a_plan_runs_over_blocks():
    planner = Planner(world(), 3)
    whole = planner.plan(BLOCK - 3, BLOCK + 5)
    assert len(whole) == BLOCK + 5
    for place in (0, 2, 3, BLOCK + 2, BLOCK + 4):
        one = planner.plan(BLOCK - 3 + place, 1)
        assert (one.strategy[0], one.chosen[0], one.rejected[0]) == (
            whole.strategy[place],
            whole.chosen[place],
            whole.rejected[place],
        )


def test_a_substitute_is_drawn_by_seed_index_and_attempt():
    here, there = sampler(), sampler()
    there.pair(12, 4)
    assert_same(here.pair(12, 1), there.pair(12, 1))
    drawn = {tuple(here.pair(12, attempt).first.frames) for attempt in range(8)}
    assert len(drawn) > 4
    assert here.pair(12, 3).attempt == 3


def test_a_pickled_sampler_leaves_its_table_behind():
    corpus = world(30_000)
    whole = Sampler(corpus, 1, rows=np.arange(0, 30_000, 3))
    size = len(pickle.dumps(whole)) - len(pickle.dumps(corpus))
    assert size < 30_000 / 8 + 1000  # a bit a row
    copied = pickle.loads(pickle.dumps(whole))
    plan = whole.planner.plan(700, 20)
    for one, other in zip(whole.maker.pairs(plan), copied.maker.pairs(plan), strict=True):
        assert_same(one, other)
    assert_same(whole.pair(5, 2), copied.pair(5, 2))  # now it makes the table again


def test_a_table_is_sorted_by_task_and_quality_by_hand():
    #                rows:  0  1  2  3  4  5
    corpus = attempts(task=[2, 0, 0, 2, 0, 1], quality=[0, 2, 0, 0, 2, 1])
    table = Table.of(corpus)
    assert table.row.tolist() == [2, 1, 4, 5, 0, 3]
    assert table.start.tolist() == [[0, 1, 1, 3], [3, 3, 4, 4], [4, 6, 6, 6], [6, 6, 6, 6]]
    part = Table.of(corpus, np.array([4, 3, 2]))
    assert part.row.tolist() == [2, 4, 3]
    assert part.start.tolist() == [[0, 1, 1, 2], [2, 2, 2, 2], [2, 3, 3, 3], [3, 3, 3, 3]]
    assert (table.row.dtype, table.start.dtype) == (np.int32, np.int32)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-1, 3), min_size=2, max_size=12), st.integers(0, 2**31))
def test_a_scenes_other_tasks_are_all_that_is_drawn_of_it(scenes, seed):
    """The range less one's own part, against a search through all tasks; every candidate has its turn, in order."""
    tasks = tuple(Task(f"task {number}", "" if scene < 0 else f"scene {scene}") for number, scene in enumerate(scenes))
    corpus = world(40, seed, tasks=tasks)
    table = Table.of(corpus)
    strategy = WrongTask(table, None)
    steps = np.arange(400) / 400
    for which in range(len(strategy.candidates)):
        first = np.full(400, (which + 0.5) / len(strategy.candidates))
        chosen, rejected = strategy.partners(np.stack([first, steps, np.zeros(400)], 1))
        task = corpus.columns.task[table.row[chosen[0]]]
        kin = [t for t in range(len(tasks)) if t != task and scenes[t] == scenes[task] >= 0]
        expected = [place for t in kin for place in range(table.start[t, 0], table.start[t, 3])]
        others = [place for place in range(len(table)) if corpus.columns.task[table.row[place]] != task]
        assert list(dict.fromkeys(rejected.tolist())) == (expected or others)


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(UserError, match="no such strategy: rewnd; there are: rewind"):
        Sampler(world(), 0, weights={"rewnd": 1})
    with pytest.raises(UserError, match="negative"):
        Sampler(world(), 0, weights={"rewind": -1})
    only_failures = np.flatnonzero(COLUMNS.quality == 2)
    with pytest.raises(UserError, match="can make a pair of these"):
        Sampler(world(), 0, rows=only_failures)
    with pytest.raises(UserError, match="clip-relative"):
        Sampler(world(), 0, options=ClipOptions(shuffle=0.5), relative=True)


def assert_same(a, b):
    assert (a.index, a.strategy, a.task, a.preference) == (b.index, b.strategy, b.task, b.preference)
    for x, y in ((a.first, b.first), (a.second, b.second)):
        assert (x.row, x.wrong_instruction) == (y.row, y.wrong_instruction)
        np.testing.assert_array_equal(x.frames, y.frames)
