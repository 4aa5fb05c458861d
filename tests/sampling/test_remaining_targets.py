"""How long a task still takes, and where it counts as done: numbers worked out by hand."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
from world import attempts, world

from rbm.errors import UserError
from rbm.sampling import Clip, PairMaker, Sampler, Table, with_completion
from rbm.sampling.strategies import lost_frames
from rbm.sampling.table import outcome
from rbm.sampling.targets import Outcome, clip_targets
from rbm.trajectory import Quality

TIMES = np.array([0, 0.5, 1.5, 2, 4, 7, 7.5, 8, 9], np.float32)
"""Uneven on purpose: frames say nothing of seconds."""

SUCCESS = Outcome(
    Quality.SUCCESSFUL.rank, n_frames=9, done=5, done_known=True, messy=False, partial_success=float("nan")
)


def remaining(facts: Outcome, *frames: int, wrong: bool = False, relative: bool = False):
    targets = clip_targets(np.array(frames, np.int64), facts, None, wrong, relative, TIMES)
    assert targets.remaining is not None
    assert targets.remaining_mask is not None
    assert targets.remaining.dtype == np.float32
    assert targets.remaining_mask.all() or not targets.remaining_mask.any()
    return targets.remaining.tolist() if targets.remaining_mask.any() else None


def test_seconds_to_the_completion_and_nothing_after_it():
    # done at frame 5, at 7 s
    assert remaining(SUCCESS, 0, 1, 2, 3, 4, 5, 6, 8) == [7, 6.5, 5.5, 5, 3, 0, 0, 0]


def test_a_frame_has_its_time_whichever_way_it_is_played():
    assert remaining(SUCCESS, 6, 4, 2, 0) == [0, 3, 5.5, 7]  # reversed
    assert remaining(SUCCESS, 0, 2, 4, 2, 1) == [7, 5.5, 3, 5.5, 6.5]  # rewound
    assert remaining(SUCCESS, 2, 3, relative=True) == [5.5, 5]  # of the frame, not of the clip


def test_a_messy_success_and_one_by_cut_off_say_their_time():
    assert remaining(dataclasses.replace(SUCCESS, messy=True), 0, 4, 5) == [7, 3, 0]
    assert remaining(dataclasses.replace(SUCCESS, done=8, done_known=False), 0, 5, 8) == [9, 2, 0]
    assert remaining(dataclasses.replace(SUCCESS, partial_success=1.0), 0) == [7]


def test_nothing_else_says_its_time():
    assert remaining(SUCCESS, 0, 4, wrong=True) is None
    for quality in (Quality.SUBOPTIMAL, Quality.FAILURE):
        assert remaining(dataclasses.replace(SUCCESS, quality=quality.rank, done=-1), 0, 4) is None
    assert remaining(dataclasses.replace(SUCCESS, partial_success=0.6), 0, 4) is None


def test_without_times_nothing_is_said_and_nothing_else_changes():
    frames = np.array([0, 3, 5], np.int64)
    for wrong in (False, True):
        plain, timed = (clip_targets(frames, SUCCESS, None, wrong, timestamp=times) for times in (None, TIMES))
        assert plain.remaining is None
        assert plain.remaining_mask is None
        for name in ("progress", "progress_mask", "success", "success_mask"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(timed, name))


def test_times_are_read_where_their_values_matter_only():
    corpus = attempts([0, 0], [0, 2])  # a success and a failure
    maker, asked = PairMaker(corpus, 0), []

    def timestamps(row: int) -> np.ndarray:
        asked.append(row)
        return np.arange(20, dtype=np.float32)

    def targets(row: int, wrong: bool = False, masks_only: bool = False):
        return maker.targets(Clip(row, np.array([0, 10]), wrong), lambda _: None, masks_only, timestamps)

    assert targets(0).remaining.tolist() == [18, 8]
    assert asked == [0]
    for row, wrong, masks_only, mask in ((0, False, True, True), (0, True, False, False), (1, False, False, False)):
        assert targets(row, wrong, masks_only).remaining_mask.tolist() == [mask, mask]
    assert asked == [0]


def done_of(corpus, row: int) -> int:
    return outcome(corpus.columns, row).done


def test_a_cut_off_replaces_the_corpuss_own():
    # sources 0, 1, 2 = lab, kitchen, simulator; 20 frames; successes are done at 18
    corpus = attempts([0, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 0, 2])
    corpus = corpus.changed(done_known=np.array([False, True, False, False, False]))
    changed = with_completion(corpus, {"lab": 0.5, "simulator": 1.0})
    assert done_of(changed, 0) == 10  # ⌈0.5 · 19 − 10⁻⁴⌉ = ⌈9.4999⌉
    assert done_of(changed, 1) == 18  # its frame is known exactly
    assert done_of(changed, 2) == 18  # another source
    assert done_of(changed, 3) == -1  # no success
    assert done_of(changed, 4) == 19
    assert corpus.columns.done.tolist() == [18, 18, 18, -1, 18]  # the corpus stays as it is
    assert changed.columns.done.dtype == np.int32


@pytest.mark.parametrize(("cutoff", "n_frames", "done"), [(0.1, 21, 2), (0.95, 64, 60), (0.7, 11, 7), (0.01, 2, 1)])
def test_the_formula_by_hand(cutoff, n_frames, done):
    # ⌈.1·20 − 10⁻⁴⌉ = 2 although .1·20 may round up; ⌈.95·63⌉ = ⌈59.85⌉; ⌈.7·10⌉; ⌈.01 − .0001⌉ = 1
    corpus = attempts([0], [0]).changed(done_known=np.array([False]), n_frames=np.array([n_frames], np.int32))
    assert done_of(with_completion(corpus, {"lab": cutoff}), 0) == done


def test_what_is_wrong_with_cut_offs_is_said():
    corpus = attempts([0], [0])
    with pytest.raises(UserError, match=r"names no source of the corpus: 'labb'; it has 'lab', 'kitchen', 'simulator'"):
        with_completion(corpus, {"labb": 0.9, "lab": 0.9})
    with pytest.raises(UserError, match=r"data.completion is '\{lab 0.9\}': write \{source: fraction\}"):
        with_completion(corpus, "{lab 0.9}")
    for wrong in (0, 1.2, -0.5, "0.9", None, True, math.nan):
        with pytest.raises(UserError, match=r"the cut-off of 'lab' is .*, it must be in \(0, 1\]"):
            with_completion(corpus, {"lab": wrong})


def test_without_cut_offs_nothing_changes():
    corpus = world(40)
    assert with_completion(corpus, {}) is corpus


def test_rewinds_go_back_to_before_the_cut_off_too():
    """Else the rejected clip would end where the task is done by its own targets."""
    corpus = world(60)
    corpus = corpus.changed(done_known=np.zeros(60, bool), messy=np.zeros(60, bool))
    changed = with_completion(corpus, dict.fromkeys(corpus.sources, 0.4))
    rows = np.flatnonzero(corpus.columns.n_frames >= 10)
    sampler = Sampler(changed, 3, rows, weights={"rewind": 1.0})
    lower = 0
    for index in range(200):
        pair = sampler.pair(index)
        chosen, rejected = (pair.first, pair.second) if pair.preference else (pair.second, pair.first)
        n_frames = corpus.columns.n_frames.item(chosen.row)
        done = math.ceil(0.4 * (n_frames - 1) - 1e-4)
        assert rejected.frames[-1] < done
        assert rejected.frames.max() - rejected.frames[-1] >= lost_frames(n_frames)
        targets = sampler.targets(rejected, lambda _: None)
        assert targets.success[-1] == 0
        lower += targets.progress[-1] < 1
        expected = np.clip(chosen.frames / done, 0, 1).astype(np.float32)
        np.testing.assert_array_equal(sampler.targets(chosen, lambda _: None).progress, expected)
    assert lower == 200


def test_a_changed_corpus_travels_without_its_column():
    changed = with_completion(world(2000).changed(done_known=np.zeros(2000, bool)), {"lab": 0.3})
    again = pickle.loads(pickle.dumps(changed))
    np.testing.assert_array_equal(again.columns.done, changed.columns.done)
    assert len(Table.of(again)) == 2000
    assert len(pickle.dumps(changed)) < len(pickle.dumps(changed.corpus)) + 500
