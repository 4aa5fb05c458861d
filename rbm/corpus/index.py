"""What is known of all trajectories at once, without touching a frame: numeric columns.

Sampling, selecting and statistics read nothing else. Rows are trajectory numbers, 0 to N-1, in the
order in which they were written; code numbers (`task`, `source`, `embodiment`) point into small tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from rbm.corpus.layout import COLUMNS

N_QUALITIES = 3


@dataclass(frozen=True)
class Columns:
    """Numeric facts of N trajectories; every array has length N and can not be written to.

    Attributes:
        task: int32, row in the task table.
        source: int16, row in the source table.
        quality: int8, `Quality.rank`: 0 successful, 1 suboptimal, 2 failure.
        n_frames: int32, T.
        done: int32, stored frame e at which a success counts as done (`completion_index`); -1 if not successful.
        done_known: bool, the source gave the frame itself (`done_index`), so e is exact.
        messy, dense, is_robot, is_sim: bool; `dense` = has progress labels.
        partial_success: float32, graded outcome; nan = none.
        embodiment: int16, row in the embodiment table.
        segment: int32; offset, length: int64. Where the payload lies.
    """

    task: NDArray[np.int32]
    source: NDArray[np.int16]
    quality: NDArray[np.int8]
    n_frames: NDArray[np.int32]
    done: NDArray[np.int32]
    done_known: NDArray[np.bool_]
    messy: NDArray[np.bool_]
    dense: NDArray[np.bool_]
    partial_success: NDArray[np.float32]
    embodiment: NDArray[np.int16]
    is_robot: NDArray[np.bool_]
    is_sim: NDArray[np.bool_]
    segment: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]

    def __post_init__(self) -> None:
        rows = len(self.task)
        for column in fields(self):
            array = np.ascontiguousarray(getattr(self, column.name), np.dtype(COLUMNS[column.name]))
            if array.shape != (rows,):
                raise ValueError(f"column {column.name!r} has shape {array.shape}, {rows} rows are expected")
            array.flags.writeable = False
            object.__setattr__(self, column.name, array)

    def __len__(self) -> int:
        return len(self.task)


@dataclass(frozen=True)
class CSR:
    """Trajectory numbers grouped by task and quality: `order[indptr[k]:indptr[k+1]]`, k = task * 3 + quality.

    `indptr` is int64 (n_tasks * 3 + 1,), `order` int32 (N,); within a group numbers rise.
    """

    indptr: NDArray[np.int64]
    order: NDArray[np.int32]

    @classmethod
    def build(cls, task: NDArray[np.int32], quality: NDArray[np.int8], n_tasks: int) -> CSR:
        """Group rows; O(N) memory, no Python loop over rows."""
        key = task.astype(np.int64) * N_QUALITIES + quality
        counts = np.bincount(key, minlength=n_tasks * N_QUALITIES)
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(indptr, np.argsort(key, kind="stable").astype(np.int32))

    def rows(self, task: int, quality: int) -> NDArray[np.int32]:
        """Trajectory numbers of one task with one outcome (`Quality.rank`), rising; a view, O(1)."""
        key = task * N_QUALITIES + quality
        return self.order[self.indptr[key] : self.indptr[key + 1]]


class Ids:
    """The ids of all trajectories, as one UTF-8 heap: a string is made only when it is asked for.

    `find` hashes all ids the first time that it is called, 64 bits each.
    """

    def __init__(self, heap: NDArray[np.uint8], end: NDArray[np.int64]) -> None:
        self._heap = heap
        self._end = end
        self._sorted: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self._end)

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(f"trajectory number {row} of {len(self)}")
        return self._bytes(row).decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        for row in range(len(self)):
            yield self._bytes(row).decode("utf-8")

    def find(self, id: str) -> int | None:
        """Trajectory number of an id, or None."""
        if self._sorted is None:
            hashes = np.fromiter((_hash(self._bytes(row)) for row in range(len(self))), np.uint64, len(self))
            order = np.argsort(hashes, kind="stable")
            self._sorted = hashes[order], order
        hashes, order = self._sorted
        raw = id.encode("utf-8", "surrogatepass")
        place = int(np.searchsorted(hashes, np.uint64(_hash(raw))))
        while place < len(hashes) and int(hashes[place]) == _hash(raw):
            if self._bytes(int(order[place])) == raw:
                return int(order[place])
            place += 1
        return None

    def _bytes(self, row: int) -> bytes:
        start = int(self._end[row - 1]) if row else 0
        return self._heap[start : int(self._end[row])].tobytes()


def _hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
