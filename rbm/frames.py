"""Which frames of a video are looked at: the one frame picker, and what a live session holds.

Every part picks frames here, so that scoring sees what training saw: two tools that round
differently give visibly different scores for the end of a trajectory.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pick_frames(n_frames: int, count: int) -> NDArray[np.int64]:
    """`count` of `n_frames` indices, even, first and last kept: int64 (min(n_frames, count),), strictly rising.

    index(i) = floor(i (n-1) / (count-1) + 1/2), in integers, so that no machine rounds otherwise.

    Raises:
        ValueError: either number is below 1, or count is 1 where there are more frames (which end?).
    """
    if n_frames < 1 or count < 1:
        raise ValueError(f"need at least one frame, got n_frames={n_frames}, count={count}")
    if n_frames <= count:
        return np.arange(n_frames, dtype=np.int64)
    if count == 1:
        raise ValueError("one frame out of several cannot keep both ends: ask for at least 2")
    i = np.arange(count, dtype=np.int64)
    return (2 * i * (n_frames - 1) + (count - 1)) // (2 * (count - 1))


def session_stride(t: int, context_frames: int, least: int = 1) -> int:
    """The stride at which a live session holds frames when it scores frame t: a power of two times `least`.

    The smallest s for which ceil(t / s) + 1 <= context_frames.

    Raises:
        ValueError: t is negative, or there is no room for a first and a current frame.
    """
    if t < 0 or context_frames < 2:
        raise ValueError(f"need t >= 0 and context_frames >= 2, got t={t}, context_frames={context_frames}")
    stride = least
    while -(-t // stride) + 1 > context_frames:
        stride *= 2
    return stride


def session_strides(count: int, context_frames: int) -> NDArray[np.int64]:
    """`session_stride` of frames 0 to count - 1: int64 (count,)."""
    found, stride = np.ones(count, np.int64), 1
    for t in range(count):
        stride = found[t] = session_stride(t, context_frames, stride)
    return found


def session_context(t: int, context_frames: int) -> NDArray[np.int64]:
    """The frames that a live session holds when it scores frame t: [0, s, 2s, ..., t], int64, strictly rising.

    The stride s is the smallest power of two for which they fit (`session_stride`).
    It doubles when the context is full and never shrinks again; the frame t itself is always last.

    Raises:
        ValueError: t is negative, or there is no room for a first and a current frame.
    """
    kept = np.arange(0, t + 1, session_stride(t, context_frames), dtype=np.int64)
    return kept if kept[-1] == t else np.append(kept, t)
