"""What sampling needs to know of a corpus: a few numbers a trajectory, and who tried the same task.

The corpus is seen through a small protocol (numpy columns and one method), so sampling can be tested without a disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rbm.sampling.targets import Outcome
from rbm.trajectory import Task

N_QUALITIES = 3


class Columns(Protocol):
    """One number a trajectory in each column, all of length N (a corpus's index has these)."""

    @property
    def task(self) -> NDArray[np.int32]: ...
    @property
    def quality(self) -> NDArray[np.int8]: ...
    @property
    def n_frames(self) -> NDArray[np.int32]: ...
    @property
    def done(self) -> NDArray[np.int32]: ...
    @property
    def done_known(self) -> NDArray[np.bool_]: ...
    @property
    def messy(self) -> NDArray[np.bool_]: ...
    @property
    def dense(self) -> NDArray[np.bool_]: ...
    @property
    def partial_success(self) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Table:
    """The trajectories that may be drawn, sorted by task and quality.

    A row of this table is one trajectory; `number` is its place in the corpus. Rows of one task lie together, best
    outcome first, so "a worse attempt at this task" is a range: row r's better attempts are
    rows[start[task, 0] : start[task, quality]].

    Attributes:
        number: int64 (N,), place in the corpus.
        task, quality, n_frames, done: int64 (N,).
        done_known, messy, dense: bool (N,).
        partial_success: float64 (N,), nan for none.
        start: int64 (tasks, 4), first row of (task, quality); column 3 is the end of the task.
        scene: int64 (tasks,), -1 where a task has no scene.
        tasks: the task table of the corpus.
    """

    number: NDArray[np.int64]
    task: NDArray[np.int64]
    quality: NDArray[np.int64]
    n_frames: NDArray[np.int64]
    done: NDArray[np.int64]
    done_known: NDArray[np.bool_]
    messy: NDArray[np.bool_]
    dense: NDArray[np.bool_]
    partial_success: NDArray[np.float64]
    start: NDArray[np.int64]
    scene: NDArray[np.int64]
    tasks: tuple[Task, ...]

    @classmethod
    def of(cls, columns: Columns, tasks: Sequence[Task], numbers: NDArray[np.integer] | None = None) -> Table:
        """The rows `numbers` (default all) of a corpus."""
        # sorted first, then a stable sort: the same set of trajectories always gives the same table
        chosen = np.arange(len(columns.task)) if numbers is None else np.sort(np.asarray(numbers, np.int64))
        key = columns.task[chosen].astype(np.int64) * N_QUALITIES + columns.quality[chosen]
        order = np.argsort(key, kind="stable")
        number = chosen[order]
        edges = np.searchsorted(key[order], np.arange(len(tasks) * N_QUALITIES + 1))
        start = np.stack(
            [edges[0:-1:N_QUALITIES], edges[1::N_QUALITIES], edges[2::N_QUALITIES], edges[3::N_QUALITIES]], 1
        )
        names = {name: index for index, name in enumerate(sorted({task.scene for task in tasks if task.scene}))}
        return cls(
            number=number,
            task=columns.task[number].astype(np.int64),
            quality=columns.quality[number].astype(np.int64),
            n_frames=columns.n_frames[number].astype(np.int64),
            done=columns.done[number].astype(np.int64),
            done_known=np.asarray(columns.done_known[number], bool),
            messy=np.asarray(columns.messy[number], bool),
            dense=np.asarray(columns.dense[number], bool),
            partial_success=columns.partial_success[number].astype(np.float64),
            start=start,
            scene=np.array([names.get(task.scene, -1) for task in tasks], np.int64),
            tasks=tuple(tasks),
        )

    def __len__(self) -> int:
        return len(self.number)

    def outcome(self, row: int) -> Outcome:
        return Outcome(
            quality=int(self.quality[row]),
            n_frames=int(self.n_frames[row]),
            done=int(self.done[row]),
            done_known=bool(self.done_known[row]),
            messy=bool(self.messy[row]),
            partial_success=float(self.partial_success[row]),
        )
