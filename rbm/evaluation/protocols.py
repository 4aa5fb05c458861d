"""What a scorer is shown: which frames, in which order, under which instruction.

All of it follows from the corpus, the trajectory and a seed, never from chance or from what else is
evaluated: two models are shown the very same clips, and one figure can be made again alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rbm.frames import pick_frames
from rbm.trajectory import Quality, Task

Frames = NDArray[np.uint8]
Shown = Frames | Mapping[str, Frames]
"""A clip as a scorer is given it: of one view, or of several by name."""


class Prediction(Protocol):
    """What a scorer says of one clip of n frames: float32 (n,) each; `utility` orders clips of one task."""

    @property
    def progress(self) -> NDArray[np.float32]: ...
    @property
    def progress_std(self) -> NDArray[np.float32]: ...
    @property
    def success(self) -> NDArray[np.float32]: ...


class ClipScorer(Protocol):
    """Anything that can be evaluated: `rbm.Scorer`, the baselines, or a model of your own.

    `predict` is given clips as (uint8 (n, H, W, 3), instruction) with n <= context_frames; the same array
    object may come with several instructions. `prefer` is given (frames_a, frames_b, instruction) and answers
    float (P,) the probability that a is better. A scorer with an attribute `views` (names) is given a mapping of these
    names to frames in place of the frames.
    """

    @property
    def context_frames(self) -> int: ...

    def predict(self, clips: Sequence[tuple[Shown, str]], batch_size: int = 64) -> Sequence[Prediction]: ...

    def prefer(self, pairs: Sequence[tuple[Shown, Shown, str]]) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Showing:
    """How one trajectory is shown.

    Attributes:
        frames: int64 (n,), stored frames of the clip: even, first and last kept.
        ordered: how many of them, from the first, have an order: those up to the completion of a success
            (what comes after it is neither before nor behind), all of any other.
        done: float32 (n,), the success target: 1 from the completion on, else 0; nan where it is not known.
        permutation: int64 (ordered,), how the ordered frames are shuffled.
    """

    frames: NDArray[np.int64]
    ordered: int
    done: NDArray[np.float32]
    permutation: NDArray[np.int64]


def showing(
    trajectory_id: str, n_frames: int, quality: int, done: int, done_known: bool, context_frames: int, seed: int
) -> Showing:
    """The clip of a trajectory, from its row in the corpus's columns.

    A success without a known completion is unsure in its second half: the target there is nan up to the last frame
    (the mask that training uses: known where straight-line progress is < 0.5 or the target is 1).
    """
    frames = pick_frames(n_frames, context_frames)
    target = np.zeros(len(frames), np.float32)
    ordered = len(frames)
    if quality == Quality.SUCCESSFUL.rank:
        end = done if done >= 0 else n_frames - 1
        target[frames >= end] = 1
        ordered = int((frames <= end).sum())
        if not done_known:
            target[(2 * frames >= end) & (frames < end)] = np.nan
    rng = np.random.default_rng([seed, number_of(trajectory_id)])
    return Showing(frames, ordered, target, rng.permutation(ordered))


def instructions(task: int, tasks: Sequence[Task], allowed: Sequence[int], most: int, seed: int) -> NDArray[np.int64]:
    """Task numbers whose instructions the videos of `task` are shown under: itself, then at most `most` wrong ones.

    Tasks of the same scene come first, since nothing but the words tells them apart; the others are drawn by hash.
    """
    scene = tasks[task].scene
    others = sorted(
        (number for number in allowed if number != task),
        key=lambda number: (not same_scene(scene, tasks[number].scene), number_of(f"{seed} {tasks[number].text}")),
    )
    return np.array([task, *sorted(others[:most])], np.int64)


def same_scene(scene: str, other: str) -> bool:
    """Whether two tasks are known to show the same scene; a scene without a name is like no other."""
    return bool(scene) and scene == other


def number_of(text: str) -> int:
    """A 64-bit number that belongs to a text on every machine and in every run."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
