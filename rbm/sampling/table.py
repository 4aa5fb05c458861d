"""What sampling needs to know of a corpus: a few numbers a trajectory, and who tried the same task.

The corpus is seen through a small protocol (numpy columns and the tables that their codes point into), so sampling
can be tested without a disk. Columns are never copied: they are mapped, and shared by all processes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.sampling.targets import Outcome
from rbm.trajectory import Quality, Task

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


@dataclass(frozen=True)
class _Columns:
    """Columns of a corpus, one of them another than it says."""

    task: NDArray[np.int32]
    source: NDArray[np.int16]
    quality: NDArray[np.int8]
    n_frames: NDArray[np.int32]
    done: NDArray[np.int32]
    done_known: NDArray[np.bool_]
    messy: NDArray[np.bool_]
    dense: NDArray[np.bool_]
    partial_success: NDArray[np.float32]


class _Completed:
    """A corpus in which some sources' successes count as done elsewhere. Pickled, it leaves its column behind."""

    def __init__(self, corpus: Trajectories, completion: Mapping[str, float]) -> None:
        self.corpus, self.completion = corpus, dict(completion)
        columns = corpus.columns
        cutoff = np.array([self.completion.get(name, np.nan) for name in corpus.sources])[columns.source]
        change = (columns.quality == Quality.SUCCESSFUL.rank) & ~columns.done_known & ~np.isnan(cutoff)
        done = columns.done.copy()
        done[change] = np.ceil(cutoff[change] * (columns.n_frames[change] - 1) - 1e-4)
        self.columns: Columns = _Columns(
            columns.task, columns.source, columns.quality, columns.n_frames, done, columns.done_known,
            columns.messy, columns.dense, columns.partial_success,
        )  # fmt: skip

    def __reduce__(self) -> tuple[type[_Completed], tuple[Trajectories, dict[str, float]]]:
        return _Completed, (self.corpus, self.completion)

    @property
    def tasks(self) -> Sequence[Task]:
        return self.corpus.tasks

    @property
    def task_scene(self) -> NDArray[np.int32]:
        return self.corpus.task_scene

    @property
    def sources(self) -> Collection[str]:
        return self.corpus.sources

    @property
    def by_task_quality(self) -> Groups:
        return self.corpus.by_task_quality


def with_completion(corpus: Trajectories, completion: Mapping[str, float]) -> Trajectories:
    """The corpus with other completion cut-offs: e = ceil(c (T-1) - 1e-4) for the successes of the sources named.

    Where the source gave the frame itself it stays. Strategies, targets and calibration all look at this column, so
    that a rewind always goes back to before the completion that its targets have.

    Raises:
        UserError: a source that the corpus does not have, or a cut-off outside (0, 1].
    """
    if not isinstance(completion, Mapping):
        raise UserError(f"data.completion is {completion!r}: write {{source: fraction}}, such as {{lab: 0.95}}")
    unknown = sorted(completion.keys() - set(corpus.sources))
    if unknown:
        there = ", ".join(repr(name) for name in corpus.sources)
        raise UserError(
            f"data.completion names no source of the corpus: {', '.join(map(repr, unknown))}; it has {there}"
        )
    for name, cutoff in completion.items():
        if isinstance(cutoff, bool) or not isinstance(cutoff, int | float) or not 0 < cutoff <= 1:
            raise UserError(f"data.completion: the cut-off of {name!r} is {cutoff!r}, it must be in (0, 1]")
    return _Completed(corpus, completion) if completion else corpus


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
