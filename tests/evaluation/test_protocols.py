from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rbm.evaluation.protocols import instructions, same_scene, showing
from rbm.trajectory import Task

TASKS = (
    Task("open the drawer", "drawer"),
    Task("open the door", "door"),
    Task("close the drawer", "drawer"),
    Task("press", ""),
    Task("wave", ""),
)


def test_a_success_has_an_order_up_to_its_completion_only() -> None:
    shown = showing("a", n_frames=10, quality=0, done=6, done_known=True, context_frames=10, seed=0)
    assert shown.ordered == 7
    assert shown.done.tolist() == [0] * 6 + [1] * 4
    assert sorted(shown.permutation) == list(range(7))


def test_an_unknown_completion_leaves_the_second_half_open() -> None:
    shown = showing("a", n_frames=9, quality=0, done=8, done_known=False, context_frames=9, seed=0)
    assert np.isnan(shown.done).tolist() == [False] * 4 + [True] * 4 + [False]
    assert shown.done[-1] == 1


def test_attempts_without_success_are_shown_whole() -> None:
    shown = showing("a", n_frames=10, quality=2, done=-1, done_known=False, context_frames=10, seed=0)
    assert shown.ordered == 10
    assert not shown.done.any()


@given(st.integers(1, 64), st.integers(2, 32), st.data())
def test_showings_keep_both_ends_and_are_always_the_same(n: int, context: int, data: st.DataObject) -> None:
    done = data.draw(st.integers(0, n - 1))
    shown = showing("x", n, 0, done, True, context, seed=5)
    assert shown.frames[0] == 0
    assert shown.frames[-1] == n - 1
    assert len(shown.frames) <= context
    assert (shown.frames[: shown.ordered] <= done).all()
    assert (shown.frames[shown.ordered :] > done).all()
    again = showing("x", n, 0, done, True, context, seed=5)
    assert (again.permutation == shown.permutation).all()


def test_other_instructions_start_with_the_same_scene() -> None:
    assert instructions(0, TASKS, range(5), most=1, seed=0).tolist() == [0, 2]
    assert instructions(0, TASKS, range(5), most=9, seed=0).tolist() == [0, 1, 2, 3, 4]
    assert instructions(0, TASKS, [1, 3], most=9, seed=0).tolist() == [0, 1, 3]


def test_a_scene_without_a_name_is_like_no_other() -> None:
    assert same_scene("drawer", "drawer")
    assert not same_scene("drawer", "door")
    assert not same_scene("", "")
