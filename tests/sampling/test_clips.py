"""Invariants of clip paths: both ends kept, order, length, and what a session would hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbm.frames import pick_frames, session_context
from rbm.sampling.clips import ClipOptions, irregular_places, places, reverse_path, rewind_path, rewind_places
from rbm.sampling.draws import NUMBERS, Draw, block_uniforms

lengths = st.integers(1, 64)
contexts = st.integers(2, 32)
seeds = st.integers(0, 2**32)


def draw_of(seed: int) -> Draw:
    return Draw(block_uniforms(seed, 0)[0])


@given(lengths, st.integers(2, 64))
def test_picked_frames_are_even_and_keep_both_ends(n_frames, count):
    picked = pick_frames(n_frames, count)
    assert len(picked) == min(n_frames, count)
    assert picked[0] == 0
    assert picked[-1] == n_frames - 1
    gaps = np.diff(picked)
    if len(gaps):
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1


def test_picked_frames_by_hand():
    assert pick_frames(10, 4).tolist() == [0, 3, 6, 9]
    assert pick_frames(8, 4).tolist() == [0, 2, 5, 7]  # 7/3 = 2.33, 14/3 = 4.67
    assert pick_frames(6, 3).tolist() == [0, 3, 5]  # 2.5 rounds up
    assert pick_frames(1, 8).tolist() == [0]
    with pytest.raises(ValueError, match="both ends"):
        pick_frames(5, 1)
    with pytest.raises(ValueError, match="at least one"):
        pick_frames(0, 4)


@given(st.integers(0, 5000), contexts)
def test_a_session_fits_and_its_stride_only_doubles(t, context):
    held = session_context(t, context)
    assert held[-1] == t
    assert held[0] == 0
    assert len(held) <= context
    assert (np.diff(held) > 0).all()
    if t:
        before = session_context(t - 1, context)
        kept = set(held[:-1].tolist())
        assert kept <= set(before.tolist()) | {t - 1}  # nothing that was dropped comes back


def test_session_by_hand():
    assert session_context(3, 4).tolist() == [0, 1, 2, 3]
    assert session_context(4, 4).tolist() == [0, 2, 4]
    assert session_context(5, 4).tolist() == [0, 2, 4, 5]
    assert session_context(7, 4).tolist() == [0, 4, 7]


@given(lengths, contexts, seeds)
def test_places_keep_both_ends_and_fit(length, context, seed):
    options = ClipOptions(context_frames=context)
    shown = places(length, options, draw_of(seed))
    assert shown[0] == 0
    assert shown[-1] == length - 1
    assert len(shown) <= context
    assert (np.diff(shown) > 0).all()


@given(st.integers(3, 64), st.integers(2, 16), seeds)
def test_irregular_places_keep_both_ends(length, count, seed):
    shown = irregular_places(length, count, draw_of(seed))
    assert len(shown) == min(length, count)
    assert (shown[0], shown[-1]) == (0, length - 1)
    assert (np.diff(shown) > 0).all()


@given(st.integers(1, 63), st.data(), contexts.filter(lambda n: n >= 3), seeds)
def test_a_rewind_rises_to_its_turn_and_then_falls(turn, data, context, seed):
    back = data.draw(st.integers(0, turn - 1))
    path = rewind_path(0, turn, back)
    shown = path[rewind_places(turn, turn - back, ClipOptions(context_frames=context), draw_of(seed))]
    top = int(np.argmax(shown))
    assert shown[0] == 0
    assert shown[-1] == back
    assert shown[top] == turn
    assert (np.diff(shown[: top + 1]) > 0).all()
    assert (np.diff(shown[top:]) < 0).all()
    assert len(shown) <= context


def test_paths_by_hand():
    assert reverse_path(2, 5).tolist() == [5, 4, 3, 2]
    assert rewind_path(1, 4, 2).tolist() == [1, 2, 3, 4, 3, 2]


def test_irregular_gaps_differ_and_even_ones_do_not():
    irregular = ClipOptions(context_frames=8, irregular=1.0, session=0.0, shorter=0.0)
    gaps = np.concatenate([np.diff(places(64, irregular, draw_of(seed))) for seed in range(50)])
    assert gaps.std() > 3
    even = ClipOptions(context_frames=8, irregular=0.0, session=0.0, shorter=0.0)
    assert np.diff(places(64, even, draw_of(0))).tolist() == [9] * 7


def test_options_are_checked():
    with pytest.raises(ValueError, match="probability"):
        ClipOptions(irregular=1.2)
    with pytest.raises(ValueError, match="exceed 1"):
        ClipOptions(irregular=0.8, session=0.4)
    with pytest.raises(ValueError, match="at least 2"):
        ClipOptions(context_frames=1)


def test_a_sample_cannot_use_more_numbers_than_it_has():
    draw = draw_of(0)
    draw.uniforms(NUMBERS)
    with pytest.raises(RuntimeError, match="used up"):
        draw.uniform()
