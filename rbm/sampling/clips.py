"""Clips: which stored frames, in which order.

A path walks over the stored frames of a trajectory one by one: forward s..m, reverse m..s, or rewind
s..m..r. A clip shows a few places of its path; both ends of the path are always among them. How the
places are spaced is the gap rule:

    even       as scoring does it
    irregular  random gaps: a model cannot tell progress from the count of frames
    session    what a live session would hold after the last frame of the path
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rbm.frames import pick_frames, session_context
from rbm.sampling.draws import Draw


@dataclass(frozen=True)
class ClipOptions:
    """How clips are drawn.

    Attributes:
        context_frames: N, the most frames a clip shows.
        irregular: probability of random gaps.
        session: probability of a session's frames (make a quarter of all clips such, to train for live scoring).
        shorter: probability that a clip has a random number 2..N of frames instead of N.
        shuffle: probability that a pair's frames are shown in random order; such a pair has no preference.
    """

    context_frames: int = 16
    irregular: float = 0.35
    session: float = 0.3
    shorter: float = 0.5
    shuffle: float = 0.0

    def __post_init__(self) -> None:
        if self.context_frames < 2:
            raise ValueError(f"context_frames must be at least 2, not {self.context_frames}")
        for name in ("irregular", "session", "shorter", "shuffle"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, not {getattr(self, name)}")
        if self.irregular + self.session > 1:
            raise ValueError("irregular + session must not exceed 1: the rest of the clips is even")


def forward_path(start: int, end: int) -> NDArray[np.int64]:
    """start, start+1, ..., end."""
    return np.arange(start, end + 1, dtype=np.int64)


def reverse_path(start: int, end: int) -> NDArray[np.int64]:
    """end, end-1, ..., start: a success played backwards undoes the task."""
    return forward_path(start, end)[::-1]


def rewind_path(start: int, turn: int, back: int) -> NDArray[np.int64]:
    """start, ..., turn, turn-1, ..., back."""
    return np.concatenate([forward_path(start, turn), reverse_path(back, turn - 1)])


def places(length: int, options: ClipOptions, draw: Draw) -> NDArray[np.int64]:
    """Which places of a path of `length` are shown: int64 (n,), rising, 0 and length-1 among them.

    n = min(length, N), or for a share of the clips random in 2..N; `session` decides its own number.
    """
    kind = draw.uniform()
    count = options.context_frames
    if draw.chance(options.shorter):
        count = draw.integer(2, options.context_frames)
    if kind < options.session:
        return session_context(length - 1, options.context_frames)
    if kind < options.session + options.irregular:
        return irregular_places(length, count, draw)
    return pick_frames(length, count)


def irregular_places(length: int, count: int, draw: Draw) -> NDArray[np.int64]:
    """Both ends and `count` - 2 random places between them."""
    if length <= count:
        return np.arange(length, dtype=np.int64)
    inner = draw.distinct(length - 2, count - 2) + 1
    return np.concatenate([[0], inner, [length - 1]])


def rewind_places(rise: int, fall: int, options: ClipOptions, draw: Draw) -> NDArray[np.int64]:
    """Places of a rewind path that has `rise` steps up and `fall` steps down: both ends and the turn are kept.

    The frames are shared out by the lengths of the two legs. A rewind that does not show its turn would be
    a shorter forward clip, and "worse" would be a lie.
    """
    count = options.context_frames
    if draw.chance(options.shorter):
        count = draw.integer(3, max(3, options.context_frames))
    count = min(count, rise + fall + 1)
    down = min(max(1, round((count - 1) * fall / (rise + fall))), fall, count - 2)
    up = count - down
    leg_up, leg_down = rise + 1, fall + 1
    if draw.chance(options.irregular):
        first = irregular_places(leg_up, up, draw)
        second = irregular_places(leg_down, down + 1, draw)
    else:
        first, second = pick_frames(leg_up, up), pick_frames(leg_down, down + 1)
    return np.concatenate([first, second[1:] + rise])
