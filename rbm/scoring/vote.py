"""When does a task count as done? One frame may err: k of the last n must say so."""

from __future__ import annotations

import re
from collections import deque

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError


class SuccessVote:
    """Counts the last n success probabilities; done while at least k of them reach the threshold.

    Before n frames have come, k of those that have come must.

    Raises:
        UserError: not 1 <= k <= n, or a threshold outside 0 to 1.
    """

    def __init__(self, k: int = 3, n: int = 5, threshold: float = 0.5) -> None:
        if not 1 <= k <= n:
            raise UserError(f"a vote of {k} of {n} frames cannot be held: 1 <= k <= n")
        if not 0 <= threshold <= 1:
            raise UserError(f"the threshold of a vote is a probability, not {threshold}")
        self.k, self.threshold = k, threshold
        self._last: deque[bool] = deque(maxlen=n)

    def add(self, success: float) -> bool:
        """Whether the task counts as done now."""
        self._last.append(success >= self.threshold)
        return sum(self._last) >= self.k

    def reset(self) -> None:
        self._last.clear()


def parse_vote(given: str) -> tuple[int, int]:
    """k and n of "K/N", as commands take a vote.

    Raises:
        UserError: it is none, or cannot be held.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    if not found:
        raise UserError(f"--vote {given}: write K/N, such as 3/5")
    SuccessVote(int(found[1]), int(found[2]))  # says what is wrong with them
    return int(found[1]), int(found[2])


def vote(success: NDArray[np.floating], k: int = 3, n: int = 5, threshold: float = 0.5) -> NDArray[np.bool_]:
    """For each of the frames in turn whether the task counts as done there: success (T,) -> bool (T,)."""
    held = SuccessVote(k, n, threshold)
    return np.array([held.add(float(value)) for value in success], bool)
