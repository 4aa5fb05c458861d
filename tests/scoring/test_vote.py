"""k of the last n frames must say that the task is done."""

import numpy as np
import pytest

from rbm.errors import UserError
from rbm.scoring.scores import Scores
from rbm.scoring.vote import SuccessVote, vote


def test_two_of_three_by_hand():
    success = np.array([0.9, 0.1, 0.5, 0.8, 0.2, 0.1, 0.0], np.float32)
    # over the threshold: 1 0 1 1 0 0 0; of the last three: 1 1 2 2 2 1 0
    assert vote(success, 2, 3).tolist() == [False, False, True, True, True, False, False]
    assert vote(success, 1, 1).tolist() == [True, False, True, True, False, False, False]
    assert vote(success, 2, 3, threshold=0.85).tolist() == [False] * 7


def test_fewer_frames_than_n_still_need_k():
    assert vote(np.array([1.0, 1.0, 1.0]), 3, 5).tolist() == [False, False, True]


def test_done_at_is_the_first_frame_of_the_vote():
    success = np.array([0.9, 0.1, 0.9, 0.9, 0.1], np.float32)
    scores = Scores(success, success, success, np.arange(5, dtype=np.int32), success, "push", 10.0, 5)
    assert scores.done_at(3, 5) == 3
    assert scores.done_at(1, 1) == 0
    assert scores.done_at(4, 5) is None


def test_reset_forgets():
    held = SuccessVote(2, 2)
    assert [held.add(1.0), held.add(1.0)] == [False, True]
    held.reset()
    assert not held.add(1.0)


@pytest.mark.parametrize(("k", "n", "threshold"), [(0, 3, 0.5), (4, 3, 0.5), (1, 1, 1.5)])
def test_votes_that_cannot_be_held(k, n, threshold):
    with pytest.raises(UserError, match="vote"):
        SuccessVote(k, n, threshold)
