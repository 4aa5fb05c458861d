"""The record that every part of the platform passes on: one attempt at one task, seen by a camera.

A trajectory says what was tried (`task`), how it ended (`quality`), and which frames of the original
video are stored (`frame_index`, `timestamp`). Pixels are not part of the record: a trajectory that
comes from a corpus reads them on demand (`frames`), and so a million of them can be listed cheaply.

Letters in shapes: T stored frames of a trajectory (at most 64), H and W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MAX_STORED_FRAMES = 64
"""A stored clip never has more frames than this; first and last frame of the original are kept."""

MAX_SHORT_SIDE = 240
"""Stored frames are scaled down, never up, to at most this many pixels on their short side."""


class Quality(StrEnum):
    """Outcome of an attempt: success; real progress without success; no lasting progress."""

    SUCCESSFUL = "successful"
    SUBOPTIMAL = "suboptimal"
    FAILURE = "failure"

    @property
    def rank(self) -> int:
        """0 for the best outcome, 2 for the worst: the code used in numeric columns."""
        return _RANK[self]

    @classmethod
    def from_rank(cls, rank: int) -> Quality:
        return _QUALITIES[rank]


_QUALITIES = (Quality.SUCCESSFUL, Quality.SUBOPTIMAL, Quality.FAILURE)
_RANK = {quality: rank for rank, quality in enumerate(_QUALITIES)}


class ClipReader(Protocol):
    """Where the pixels and side arrays of one trajectory come from."""

    def frames(self, indices: NDArray[np.integer] | None, view: str) -> NDArray[np.uint8]: ...

    def array(self, name: str) -> NDArray: ...

    def array_names(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Task:
    """One row of a corpus's task table.

    `scene` names what the camera sees before anything happens: tasks that share it (open and close
    the same drawer) can only be told apart by the instruction. `paraphrases` are other wordings of
    `text`; training draws among all of them.
    """

    text: str
    scene: str = ""
    paraphrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trajectory:
    """One attempt at one task.

    Attributes:
        id: unique in its corpus, stable over rebuilds.
        task: the instruction, as given.
        source: name of a `conf/source` entry.
        quality: how the attempt ended.
        frame_index: int32 (T,), strictly rising; index of each stored frame in the original video.
        timestamp: float32 (T,), seconds from the start of the original video.
        fps: frames a second of the original video.
        height, width: pixels of the stored frames.
        views: camera names; one clip a view, the same frame times.
        messy: a success with pauses, detours or retries, whose progress is no straight line in time.
        partial_success: graded outcome in [0, 1], where the source has one.
        done_index: original index of the frame at which the task is first done, where known.
        progress: float32 (T,) dense labels in [0, 1] (simulator, human), where the source has them.
        provenance: source file or URL, importer version, content hash.

    Raises:
        ValueError: naming the trajectory and the field, when a value breaks one of these rules.
    """

    id: str
    task: str
    source: str
    quality: Quality
    frame_index: NDArray[np.int32]
    timestamp: NDArray[np.float32]
    fps: float
    height: int
    width: int
    views: tuple[str, ...] = ("main",)
    messy: bool = False
    partial_success: float | None = None
    embodiment: str = ""
    is_robot: bool = True
    is_sim: bool = False
    done_index: int | None = None
    progress: NDArray[np.float32] | None = None
    provenance: str = ""
    reader: ClipReader | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        def require(good: bool, what: str) -> None:
            if not good:
                raise ValueError(f"trajectory {self.id!r}: {what}")

        object.__setattr__(self, "quality", Quality(self.quality))
        object.__setattr__(self, "frame_index", np.asarray(self.frame_index, np.int32))
        object.__setattr__(self, "timestamp", np.asarray(self.timestamp, np.float32))
        if self.progress is not None:
            object.__setattr__(self, "progress", np.asarray(self.progress, np.float32))
        object.__setattr__(self, "views", tuple(self.views))
        require(bool(self.id), "the id is empty")
        require(bool(self.task.strip()), "the task (instruction) is empty")
        length = len(self.frame_index)
        require(1 <= length <= MAX_STORED_FRAMES, f"has {length} frames, need 1 to {MAX_STORED_FRAMES}")
        require(self.timestamp.shape == (length,), "timestamp and frame_index differ in length")
        require(bool(np.all(np.diff(self.frame_index) > 0)), "frame_index must rise strictly")
        require(int(self.frame_index[0]) >= 0, "frame_index must not be negative")
        require(bool(np.isfinite(self.timestamp).all()), "timestamp has values that are not finite")
        require(self.fps > 0 and math.isfinite(self.fps), f"fps is {self.fps}, must be positive")
        require(len(self.views) > 0, "needs at least one view")
        require(len(set(self.views)) == len(self.views), f"view names repeat: {self.views}")
        require(self.height > 0 and self.width > 0, "height and width must be positive")
        if self.progress is not None:
            require(self.progress.shape == (length,), "progress and frame_index differ in length")
            inside = (self.progress >= 0) & (self.progress <= 1)
            require(bool(inside.all()), "progress has values outside [0, 1]")
        if self.partial_success is not None:
            require(0 <= self.partial_success <= 1, f"partial_success is {self.partial_success}, must be in [0, 1]")
        if self.done_index is not None:
            require(self.done_index >= 0, f"done_index is {self.done_index}, must not be negative")

    @property
    def n_frames(self) -> int:
        """T, the number of stored frames."""
        return len(self.frame_index)

    def frames(self, indices: NDArray[np.integer] | None = None, view: str | None = None) -> NDArray[np.uint8]:
        """Stored frames `indices` (default all) of `view` (default the first): uint8 (T, H, W, 3), RGB.

        Raises:
            ValueError: the record was made in memory and has no pixels behind it.
        """
        return self._reader().frames(indices, view or self.views[0])

    def array(self, name: str) -> NDArray:
        """A side array such as `action`, `state` or `env_reward`; its rows follow the original video."""
        return self._reader().array(name)

    @property
    def array_names(self) -> tuple[str, ...]:
        return self._reader().array_names()

    def _reader(self) -> ClipReader:
        if self.reader is None:
            raise ValueError(f"trajectory {self.id!r} was not read from a corpus: it has no frames behind it")
        return self.reader


def completion_index(trajectory: Trajectory, cutoff: float | None = None) -> int:
    """e: the stored frame at which a successful trajectory counts as done.

    e = first stored i with frame_index[i] >= done_index, where that is known; with only a source's
    cut-off c (the fraction of the demonstration at which its task is done), e = ceil(c (T-1) - 1e-4),
    so that rounding in c (0.1 times 20) never lands a frame late; else e = T-1.

    Raises:
        ValueError: the cut-off is outside (0, 1], or done_index lies after the last stored frame.
    """
    last = trajectory.n_frames - 1
    if trajectory.done_index is not None:
        if trajectory.done_index > int(trajectory.frame_index[last]):
            raise ValueError(
                f"trajectory {trajectory.id!r}: done_index {trajectory.done_index} lies after its last frame"
            )
        return int(np.searchsorted(trajectory.frame_index, trajectory.done_index))
    if cutoff is not None:
        if not 0 < cutoff <= 1:
            raise ValueError(f"source {trajectory.source!r}: completion cut-off {cutoff} must be in (0, 1]")
        return math.ceil(cutoff * last - 1e-4)
    return last
