"""The table of targets, row by row, with numbers worked out by hand."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rbm.sampling.targets import Outcome, clip_targets, progress_line
from rbm.trajectory import Quality

SUCCESS = Outcome(
    Quality.SUCCESSFUL.rank, n_frames=9, done=4, done_known=True, messy=False, partial_success=float("nan")
)


def outcome(**changes):
    return dataclasses.replace(SUCCESS, **changes)


def frames(*indices):
    return np.array(indices, np.int64)


def test_success_is_a_line_to_completion():
    targets = clip_targets(frames(0, 1, 2, 4, 8), SUCCESS, None, False)
    assert targets.progress.tolist() == [0, 0.25, 0.5, 1, 1]
    assert targets.success.tolist() == [0, 0, 0, 1, 1]
    assert targets.progress_mask.all()
    assert targets.success_mask.all()


def test_relative_targets_start_where_the_clip_starts():
    targets = clip_targets(frames(2, 3, 4), SUCCESS, None, False, relative=True)
    assert targets.progress.tolist() == [0, 0.5, 1]
    after = clip_targets(frames(5, 6), SUCCESS, None, False, relative=True)
    assert after.progress.tolist() == [1, 1]  # s >= e
    absolute = clip_targets(frames(2, 3, 4), SUCCESS, None, False)
    assert absolute.progress.tolist() == [0.5, 0.75, 1]


def test_reversed_frames_have_the_progress_of_their_place():
    targets = clip_targets(frames(4, 2, 0), SUCCESS, None, False)
    assert targets.progress.tolist() == [1, 0.5, 0]
    assert targets.success.tolist() == [1, 0, 0]


def test_dense_labels_are_taken_as_they_are():
    dense = np.array([0, 0.1, 0.3, 0.2, 1, 1, 1, 1, 1], np.float32)
    targets = clip_targets(frames(1, 3, 4), SUCCESS, dense, False)
    np.testing.assert_array_equal(targets.progress, dense[[1, 3, 4]])
    assert targets.success.tolist() == [0, 0, 1]
    failure = clip_targets(frames(0, 3), outcome(quality=Quality.FAILURE.rank, done=-1), dense, False)
    assert failure.progress_mask.all()
    assert failure.success.tolist() == [0, 0]


def test_wrong_instruction_is_zero_everywhere():
    targets = clip_targets(frames(0, 8), SUCCESS, np.ones(9, np.float32), True)
    assert targets.progress.tolist() == [0, 0]
    assert targets.success.tolist() == [0, 0]
    assert targets.progress_mask.all()
    assert targets.success_mask.all()


def test_failures_are_not_told_their_progress():
    for quality in (Quality.SUBOPTIMAL, Quality.FAILURE):
        targets = clip_targets(frames(0, 4, 8), outcome(quality=quality.rank, done=-1, done_known=False), None, False)
        assert not targets.progress_mask.any()
        assert targets.success.tolist() == [0, 0, 0]
        assert targets.success_mask.all()


def test_partial_success_is_supervised_at_its_last_frame_only():
    graded = outcome(quality=Quality.SUBOPTIMAL.rank, done=-1, done_known=False, partial_success=0.6)
    targets = clip_targets(frames(0, 4, 8), graded, None, False)
    assert targets.progress_mask.tolist() == [False, False, True]
    assert targets.progress[2] == np.float32(0.6)
    assert not clip_targets(frames(0, 4, 7), graded, None, False).progress_mask.any()  # last frame not shown
    assert not clip_targets(frames(2, 8), graded, None, False, relative=True).progress_mask.any()  # s > 0
    assert targets.success.tolist() == [0, 0, 0]


def test_a_full_grade_is_a_success():
    targets = clip_targets(frames(0, 2, 4), outcome(partial_success=1.0), None, False)
    assert targets.progress.tolist() == [0, 0.5, 1]


def test_messy_success_without_labels_has_no_progress():
    targets = clip_targets(frames(0, 2, 8), outcome(messy=True), None, False)
    assert not targets.progress_mask.any()
    assert targets.success.tolist() == [0, 0, 1]
    assert targets.success_mask.all()  # its completion is known


def test_success_is_unsure_between_half_way_and_a_guessed_completion():
    guessed = outcome(done=8, done_known=False)
    targets = clip_targets(frames(0, 3, 4, 6, 8), guessed, None, False)
    assert targets.progress.tolist() == [0, 0.375, 0.5, 0.75, 1]
    assert targets.success_mask.tolist() == [True, True, False, False, True]
    messy = clip_targets(frames(0, 3, 4, 6, 8), outcome(done=8, done_known=False, messy=True), None, False)
    assert messy.success_mask.tolist() == [True, True, False, False, True]


def test_the_cut_off_is_applied_once():
    # done at 4 of 9 frames is exactly 1 there, not rescaled and then thresholded again
    assert progress_line(frames(3, 4, 5), 0, 4).tolist() == [0.75, 1, 1]


@given(
    st.sampled_from(list(Quality)),
    st.integers(1, 64),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.one_of(st.just(float("nan")), st.floats(0, 1)),
    st.data(),
)
def test_targets_stay_in_range(quality, n_frames, known, messy, wrong, relative, partial, data):
    done = data.draw(st.integers(0, n_frames - 1)) if quality is Quality.SUCCESSFUL else -1
    shown = frames(*data.draw(st.lists(st.integers(0, n_frames - 1), min_size=1, max_size=16)))
    facts = Outcome(quality.rank, n_frames, done, known, messy, partial)
    targets = clip_targets(shown, facts, None, wrong, relative)
    for values, mask in ((targets.progress, targets.progress_mask), (targets.success, targets.success_mask)):
        assert values.dtype == np.float32
        assert values.shape == mask.shape == shown.shape
        assert ((values >= 0) & (values <= 1)).all()
        assert (values[~mask & (values != targets.success)] == 0).all()
    assert set(np.unique(targets.success)) <= {0.0, 1.0}
    if quality is not Quality.SUCCESSFUL or wrong:
        assert not targets.success.any()
