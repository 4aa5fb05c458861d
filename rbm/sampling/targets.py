"""What a clip should be told: progress and success targets and where they are supervised.

With e the stored frame at which a success is done (`rbm.trajectory.completion_index`), T frames, and s the clip's
smallest index (`clip_relative`, published layouts) or 0 (`absolute`):

    trajectory in the clip              progress                                success
    successful, instruction matches     clip((i-s)/(e-s), 0, 1); 1 where s >= e     1 iff i >= e
    has dense labels, and they are used the label, as it is                     by outcome
    wrong instruction                   0                                       0
    suboptimal, failure                 not supervised                          0
    partial success y < 1               y at frame T-1, if s = 0; else not      0
    messy success without dense labels  not supervised                          1 iff i >= e

Success is supervised everywhere for failures, suboptimal ones, wrong instructions and exactly known
completions; else only where the progress target is below 0.5 or success = 1, since somewhere in
between the task may already be done.

Models that say it are also told how many seconds remain: max(0, t_e - t_i), t the times of the stored frames. Known of
every success under its own instruction, messy ones too; of nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rbm.trajectory import Quality


@dataclass(frozen=True)
class Outcome:
    """What is known of a trajectory, as far as targets depend on it.

    Attributes:
        quality: rank of its `Quality`.
        n_frames: T.
        done: e, for successes.
        done_known: e is the exact completion, not a source's cut-off or the end.
        messy: a success whose progress is no straight line.
        partial_success: graded outcome or nan.
    """

    quality: int
    n_frames: int
    done: int
    done_known: bool
    messy: bool
    partial_success: float


@dataclass(frozen=True)
class ClipTargets:
    """Targets of a clip of n frames: float32 (n,) values and bool (n,) masks; masked-out values are 0.

    `remaining` is in seconds; it and its mask are None where they were not asked for.
    """

    progress: NDArray[np.float32]
    progress_mask: NDArray[np.bool_]
    success: NDArray[np.float32]
    success_mask: NDArray[np.bool_]
    remaining: NDArray[np.float32] | None = None
    remaining_mask: NDArray[np.bool_] | None = None


def progress_line(frames: NDArray[np.int64], start: int, done: int) -> NDArray[np.float32]:
    """clip((i - s) / (e - s), 0, 1), and 1 everywhere if s >= e: float32 (n,)."""
    if start >= done:
        return np.ones(len(frames), np.float32)
    return np.clip((frames - start) / (done - start), 0, 1).astype(np.float32)


def remaining_seconds(frames: NDArray[np.int64], done: int, timestamp: NDArray[np.float32]) -> NDArray[np.float32]:
    """max(0, t_e - t_i), and 0 from e on: float32 (n,) of shown `frames` int64 (n,); `timestamp` float32 (T,)."""
    left = np.maximum(0, timestamp[done] - timestamp[frames])
    return np.where(frames >= done, 0, left).astype(np.float32)


def clip_targets(
    frames: NDArray[np.int64],
    outcome: Outcome,
    dense: NDArray[np.float32] | None,
    wrong_instruction: bool,
    relative: bool = False,
    timestamp: NDArray[np.float32] | None = None,
) -> ClipTargets:
    """Targets of a clip that shows stored `frames` int64 (n,); `dense` float32 (T,) labels or none.

    With `timestamp` float32 (T,), seconds of the stored frames, also of the time that remains.

    Source: the table above; the published recipe has the same rows without dense labels and messy successes.
    """
    n = len(frames)
    nothing, everything, zeros = np.zeros(n, bool), np.ones(n, bool), np.zeros(n, np.float32)
    untimed = (None, None) if timestamp is None else (zeros, nothing)
    if wrong_instruction:
        return ClipTargets(zeros, everything, zeros, everything, *untimed)

    start = int(frames.min()) if relative else 0
    successful = outcome.quality == Quality.SUCCESSFUL.rank
    partial = outcome.partial_success
    graded = not np.isnan(partial) and partial < 1
    success = (frames >= outcome.done).astype(np.float32) if successful and not graded else zeros

    if dense is not None:
        progress, progress_mask = dense[frames].astype(np.float32), everything
    elif graded:
        progress_mask = (frames == outcome.n_frames - 1) & (start == 0)
        progress = np.where(progress_mask, partial, 0).astype(np.float32)
    elif successful and not outcome.messy:
        progress, progress_mask = progress_line(frames, start, outcome.done), everything
    else:
        progress, progress_mask = zeros, nothing

    if not successful or graded or outcome.done_known:
        success_mask = everything
    else:
        line = progress if progress_mask.all() else progress_line(frames, start, outcome.done)
        success_mask = (line < 0.5) | (success == 1)
    if timestamp is None or not successful or graded:
        return ClipTargets(progress, progress_mask, success, success_mask, *untimed)
    remaining = remaining_seconds(frames, outcome.done, timestamp)
    return ClipTargets(progress, progress_mask, success, success_mask, remaining, everything)
