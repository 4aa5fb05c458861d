"""What sampling needs to know of a corpus: a few numbers a trajectory, and who tried the same task.

The corpus is seen through a small protocol (numpy columns and the tables that their codes point into), so sampling
can be tested without a disk. Columns are never copied: they are mapped, and shared by all processes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
    def source(self) -> NDArray[np.int16]: ...
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


class Groups(Protocol):
    """Trajectories by task and quality: order[indptr[k] : indptr[k + 1]], k = 3 task + quality, rising in a group."""

    @property
    def indptr(self) -> NDArray[np.int64]: ...
    @property
    def order(self) -> NDArray[np.int32]: ...


class Trajectories(Protocol):
    """A corpus, as far as sampling looks at it.

    `tasks` is the task table, `task_scene` int32 (tasks,) a number for each task's scene, -1 for none; `sources`
    names, in the order of their numbers.
    """

    @property
    def columns(self) -> Columns: ...
    @property
    def tasks(self) -> Sequence[Task]: ...
    @property
    def task_scene(self) -> NDArray[np.int32]: ...
    @property
    def sources(self) -> Collection[str]: ...
    @property
    def by_task_quality(self) -> Groups: ...


@dataclass(frozen=True)
class Table:
    """The trajectories that may be drawn, sorted by task and quality.

    A place in this table is one trajectory, `row` its row in the corpus. Those of one task lie together, best
    outcome first, so "a better attempt at this task" is a range: of place p, start[task, 0] : start[task, quality].

    Attributes:
        corpus: where the columns are.
        row: int32 (N,), rows of the corpus.
        start: int32 (tasks, 4), first place of (task, quality); column 3 is the end of the task.
    """

    corpus: Trajectories
    row: NDArray[np.int32]
    start: NDArray[np.int32]

    @classmethod
    def of(cls, corpus: Trajectories, rows: NDArray[np.integer] | None = None) -> Table:
        """The trajectories `rows` (default all, in any order) of a corpus. O(N): the corpus keeps them sorted."""
        order, edges = corpus.by_task_quality.order, corpus.by_task_quality.indptr
        if rows is not None:
            member = np.zeros(len(order), bool)
            member[rows] = True
            kept = member[order]
            order = order[kept]
            edges = np.concatenate([[0], np.cumsum(kept)])[edges]
        start = np.empty((len(corpus.tasks), N_QUALITIES + 1), np.int32)
        start[:, :N_QUALITIES] = edges[:-1].reshape(-1, N_QUALITIES)
        start[:, N_QUALITIES] = edges[N_QUALITIES::N_QUALITIES]
        return cls(corpus, order, start)

    def __len__(self) -> int:
        return len(self.row)


def outcome(columns: Columns, row: int) -> Outcome:
    """What targets depend on, of one row of a corpus."""
    return Outcome(
        quality=columns.quality.item(row),
        n_frames=columns.n_frames.item(row),
        done=columns.done.item(row),
        done_known=columns.done_known.item(row),
        messy=columns.messy.item(row),
        partial_success=columns.partial_success.item(row),
    )
