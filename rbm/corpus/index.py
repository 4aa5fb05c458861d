"""What is known of all trajectories at once, without touching a frame: numeric columns.

Sampling, selecting and statistics read nothing else. Rows are trajectory numbers, 0 to N-1, in the
order in which they were written; code numbers (`task`, `source`, `embodiment`) point into small tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import overload

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
        content: uint64, hash of the stored frames (`Head.content`): equal for copies; 0 = unknown.
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
    content: NDArray[np.uint64]
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


@dataclass(frozen=True)
class Names:
    """Where strings stand by their hash: 64-bit hashes, rising, and the row of each. `build` hashes them all."""

    hashes: NDArray[np.uint64]
    rows: NDArray[np.int32]

    @classmethod
    def build(cls, heap: NDArray[np.uint8], end: NDArray[np.int64]) -> Names:
        """Of the strings heap[end[i-1]:end[i]]."""
        data = np.ascontiguousarray(heap).data
        ends = end.tolist()
        pieces = (data[start:stop] for start, stop in zip([0, *ends], ends, strict=False))
        hashes = np.fromiter((_hash(piece) for piece in pieces), np.uint64, len(ends))
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], order.astype(np.int32))

    def candidates(self, raw: bytes) -> Iterator[int]:
        """Rows whose string may be `raw`: nearly always one or none."""
        wanted = _hash(raw)
        place = int(np.searchsorted(self.hashes, np.uint64(wanted)))
        while place < len(self.hashes) and int(self.hashes[place]) == wanted:
            yield int(self.rows[place])
            place += 1


class Ids(Sequence[str]):
    """The ids of all trajectories, as one UTF-8 heap: a string is made only when it is asked for."""

    def __init__(self, heap: NDArray[np.uint8], end: NDArray[np.int64], names: Names) -> None:
        self._heap, self._end, self._names = heap, end, names

    def __len__(self) -> int:
        return len(self._end)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(f"trajectory number {row} of {len(self)}")
        return string_at(self._heap, self._end, row).decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _STRINGS_AT_ONCE):
            yield from strings(self._heap, self._end, first, min(first + _STRINGS_AT_ONCE, len(self)))

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self.find(id) is not None

    def find(self, id: str) -> int | None:
        """Trajectory number of an id, or None."""
        raw = id.encode("utf-8", "surrogatepass")
        for row in self._names.candidates(raw):
            if string_at(self._heap, self._end, row) == raw:
                return row
        return None

    def find_many(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Trajectory number of each id, -1 where there is none: int64 (n,)."""
        found = np.full(len(ids), -1, np.int64)
        for first in range(0, len(ids) if len(self) else 0, _STRINGS_AT_ONCE):
            raw = [id.encode("utf-8", "surrogatepass") for id in ids[first : first + _STRINGS_AT_ONCE]]
            hashes = np.fromiter((_hash(item) for item in raw), np.uint64, len(raw))
            place = np.minimum(np.searchsorted(self._names.hashes, hashes), len(self) - 1)
            rows = self._names.rows[place].astype(np.int64)
            rows[self._names.hashes[place] != hashes] = -1
            for number in np.flatnonzero((rows >= 0) & ~self._equal(rows, raw)).tolist():
                rows[number] = -1 if (row := self.find(ids[first + number])) is None else row  # two of one hash
            found[first : first + len(raw)] = rows
        return found

    def _equal(self, rows: NDArray[np.int64], raw: list[bytes]) -> NDArray[np.bool_]:
        """Whether the string of each row (-1: of none) is this one."""
        start = np.where(rows > 0, self._end[np.maximum(rows - 1, 0)], 0)
        sizes = np.fromiter(map(len, raw), np.int64, len(raw))
        equal = (rows >= 0) & (self._end[rows] - start == sizes)
        sizes = np.where(equal, sizes, 0)
        text = np.frombuffer(b"".join(item for item, kept in zip(raw, equal.tolist(), strict=True) if kept), np.uint8)
        owner = np.repeat(np.arange(len(raw)), sizes)
        at = np.arange(len(text)) + (start - (np.cumsum(sizes) - sizes))[owner]
        equal[owner[self._heap[at] != text]] = False
        return equal


_STRINGS_AT_ONCE = 1 << 14


def string_at(heap: NDArray[np.uint8], end: NDArray[np.int64], row: int) -> bytes:
    """String `row` of a heap, as UTF-8."""
    start = int(end[row - 1]) if row else 0
    return heap[start : int(end[row])].tobytes()


def strings(heap: NDArray[np.uint8], end: NDArray[np.int64], first: int, stop: int) -> Iterator[str]:
    """Strings `first` to `stop` - 1 of a heap."""
    origin = int(end[first - 1]) if first else 0
    ends = (end[first:stop] - origin).tolist()
    data = heap[origin : origin + (ends[-1] if ends else 0)].tobytes()
    for start, last in zip([0, *ends], ends, strict=False):
        yield data[start:last].decode("utf-8")


def _hash(raw: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
