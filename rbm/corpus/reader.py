"""Reading a corpus: columns in memory, frames on demand, one slice of one array a trajectory."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from rbm.corpus import layout, store
from rbm.corpus.codecs import Bytes
from rbm.corpus.index import CSR, Columns, Ids
from rbm.corpus.payload import CorruptPayload, Head, Payload, parse_head
from rbm.corpus.tables import SourceInfo, sources_from_json, unpack_tasks
from rbm.errors import UserError
from rbm.trajectory import Quality, Task, Trajectory

_HEAD_GUESS = 8 << 10
"""Nearly every head fits; a longer one (many views) costs a second read."""


class Corpus:
    """One snapshot of a corpus, read-only. Make it with `Corpus.open`.

    Pickling carries the path and the snapshot: another process opens the corpus for itself (start
    processes with `spawn`: Icechunk does not survive a fork). Nothing per frame is kept in memory.

    Attributes:
        path: absolute. snapshot: the Icechunk snapshot id, to be kept with whatever is made from the corpus.
        columns: numeric facts of all trajectories. ids: their ids, as a sequence.
        tasks, embodiments: tuples that code numbers in `columns` point into.
        sources: by name, in the order of their numbers.
    """

    def __init__(self, path: Path, snapshot: str, root: zarr.Group) -> None:
        self.path = path
        self.snapshot = snapshot
        self._root = root
        self._attributes: dict[str, Any] = dict(root.attrs)
        self.columns = read_columns(root)
        self.ids = read_ids(root)
        self.tasks: tuple[Task, ...] = read_tasks(root)
        self.sources: dict[str, SourceInfo] = sources_from_json(self._attributes["sources"])
        self.embodiments: tuple[str, ...] = tuple(self._attributes["embodiments"])

    @classmethod
    def open(cls, path: str | os.PathLike[str], snapshot: str | None = None) -> Corpus:
        """Open the newest snapshot, or the one given.

        Raises:
            UserError: no corpus there, a newer format, another program's repository, no such snapshot.
        """
        where = store.absolute(path)
        repository = store.open_repository(where)
        with store.readable(where):
            head = store.head(repository)
        try:
            session = repository.readonly_session(snapshot_id=snapshot or head)
        except store.STORE_ERRORS as error:
            reason = store.first_line(error)
            raise UserError(f"corpus {where}: snapshot {snapshot!r} can not be opened: {reason}") from error
        with store.readable(where):
            root = store.open_root(session.store, where)
            if root is None:
                raise UserError(f"corpus {where}: nothing has been committed to it yet: run its build again")
            try:
                return cls(where, session.snapshot_id, root)
            except (ValueError, KeyError) as error:  # ValueError: zarr, a checksum in the index
                raise UserError(
                    f"corpus {where}: the index of snapshot {session.snapshot_id} is damaged ({error}): "
                    "open an earlier snapshot, or build it again"
                ) from error

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return Corpus.open, (str(self.path), self.snapshot)

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, row: int) -> Trajectory:
        """The record of one trajectory; its frames are read when they are asked for.

        Raises:
            IndexError: no such number. CorruptPayload: its header is damaged.
        """
        row = self._number(row)
        return self._head(row).trajectory

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[row] for row in range(len(self)))

    def by_id(self, id: str) -> Trajectory:
        """Raises UserError: no trajectory has this id."""
        return self[self.row(id)]

    def row(self, id: str) -> int:
        """Trajectory number of an id. Raises UserError: no trajectory has it."""
        row = self.ids.find(id)
        if row is None:
            raise UserError(f"corpus {self.path}: no trajectory has the id {id!r}")
        return row

    def task_number(self, text: str) -> int:
        """Row of the task table. Raises UserError: no task has this text (says which are close)."""
        return _lookup(self._task_numbers, text, f"corpus {self.path}: no task")

    @cached_property
    def by_task_quality(self) -> CSR:
        """Trajectory numbers grouped by task and outcome, so that a partner for a pair is found in O(1)."""
        return CSR.build(self.columns.task, self.columns.quality, len(self.tasks))

    def payload(self, row: int) -> Payload:
        """Everything stored of one trajectory in one read: frames, side arrays, record.

        Raises:
            CorruptPayload: its bytes are damaged or missing.
        """
        row = self._number(row)
        data = self._read(row, 0, int(self.columns.length[row]))
        return Payload(data, self.ids[row], _Reader(self, row))

    def frames(
        self, row: int, indices: NDArray[np.integer] | None = None, view: str | None = None
    ) -> NDArray[np.uint8]:
        """Stored frames `indices` (default all) of a view (default the first): uint8 (T, H, W, 3), RGB.

        Raises:
            CorruptPayload: names the trajectory and the frame. IndexError, UserError: no such frame or view.
        """
        return self.payload(row).frames(indices, view)

    def progress(self, row: int) -> NDArray[np.float32] | None:
        """Dense progress labels, float32 (T,), or None; reads the header only."""
        row = self._number(row)
        return self._head(row).trajectory.progress if self.columns.dense[row] else None

    def select(
        self,
        source: str | Iterable[str] | None = None,
        task: str | Iterable[str] | None = None,
        quality: Quality | str | Iterable[Quality | str] | None = None,
        embodiment: str | Iterable[str] | None = None,
        min_frames: int | None = None,
        ids: str | Iterable[str] | None = None,
    ) -> NDArray[np.int64]:
        """Numbers of the trajectories that pass every filter given, rising; a filter is a value or several.

        Raises:
            UserError: a name that the corpus does not have.
        """
        columns = self.columns
        keep = np.ones(len(self), bool)
        if source is not None:
            numbers = {name: number for number, name in enumerate(self.sources)}
            keep &= np.isin(columns.source, [_lookup(numbers, name, "no source") for name in _several(source)])
        if task is not None:
            keep &= np.isin(columns.task, [self.task_number(text) for text in _several(task)])
        if quality is not None:
            ranks = {item.value: item.rank for item in Quality}
            keep &= np.isin(columns.quality, [_lookup(ranks, str(item), "no quality") for item in _several(quality)])
        if embodiment is not None:
            numbers = {name: number for number, name in enumerate(self.embodiments)}
            keep &= np.isin(columns.embodiment, [_lookup(numbers, x, "no embodiment") for x in _several(embodiment)])
        if min_frames is not None:
            keep &= columns.n_frames >= min_frames
        if ids is not None:
            among = np.zeros(len(self), bool)
            among[[self.row(id) for id in _several(ids)]] = True
            keep &= among
        return np.flatnonzero(keep).astype(np.int64)

    def info(self) -> dict[str, Any]:
        """What the corpus holds, as JSON values: counts by source, task, outcome; bytes; codecs; snapshot."""
        columns = self.columns
        qualities = {item.value: int(np.count_nonzero(columns.quality == item.rank)) for item in Quality}
        by_task = {
            task.text: {item.value: len(self.by_task_quality.rows(number, item.rank)) for item in Quality}
            for number, task in enumerate(self.tasks)
        }
        return {
            "path": str(self.path),
            "snapshot": self.snapshot,
            "version": self._attributes["version"],
            "trajectories": len(self),
            "frames": int(columns.n_frames.sum(dtype=np.int64)),
            "bytes": int(columns.length.sum()),
            "codecs": list(self._attributes["codecs"]),
            "segments": int(self._attributes["segments"]),
            "by_quality": qualities,
            "by_source": _counts(columns.source, tuple(self.sources)),
            "by_embodiment": _counts(columns.embodiment, self.embodiments),
            "by_task": by_task,
            "scenes": len({task.scene for task in self.tasks if task.scene}),
            "messy": int(columns.messy.sum()),
            "dense": int(columns.dense.sum()),
            "facts": self._attributes.get("facts", {}),
        }

    @cached_property
    def _task_numbers(self) -> dict[str, int]:
        return {task.text: number for number, task in enumerate(self.tasks)}

    def _number(self, row: int) -> int:
        number = int(row) + len(self) if row < 0 else int(row)
        if not 0 <= number < len(self):
            raise IndexError(f"trajectory number {row}, the corpus {self.path} has {len(self)}")
        return number

    def _head(self, row: int) -> Head:
        length = int(self.columns.length[row])
        data = self._read(row, 0, min(length, _HEAD_GUESS))
        name = self.ids[row]
        try:
            return parse_head(data, name, length, _Reader(self, row))
        except CorruptPayload:
            if len(data) == length:
                raise
        return parse_head(self._read(row, 0, length), name, length, _Reader(self, row))

    def _read(self, row: int, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of one payload."""
        store.check_runtime(self.path)
        segment = int(self.columns.segment[row])
        first = int(self.columns.offset[row]) + start
        last = int(self.columns.offset[row]) + stop
        pieces = []
        while first < last:
            shard, at = divmod(first, layout.SHARD_BYTES)
            size = min(last - first, layout.SHARD_BYTES - at)
            key = layout.shard_key(segment, shard)
            try:
                piece = store.read_range(self._root, key, at, at + size)
            except store.STORE_ERRORS as error:
                reason = store.first_line(error)
                raise CorruptPayload(self.ids[row], f"{key} can not be read: {reason}") from error
            if piece is None or len(piece) != size:
                raise CorruptPayload(self.ids[row], f"{key} is {'missing' if piece is None else 'cut short'}")
            pieces.append(piece)
            first += size
        return np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), np.uint8)


@dataclass(frozen=True)
class _Reader:
    """What a `Trajectory` of a corpus reads its pixels through."""

    corpus: Corpus
    row: int

    def frames(self, indices: NDArray[np.integer] | None, view: str) -> NDArray[np.uint8]:
        return self.corpus.frames(self.row, indices, view)

    def array(self, name: str) -> NDArray:
        return self.corpus.payload(self.row).array(name)

    def array_names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.corpus._head(self.row).arrays)


def read_columns(root: zarr.Group) -> Columns:
    return Columns(**{field.name: store.column(root, field.name) for field in fields(Columns)})


def read_ids(root: zarr.Group) -> Ids:
    return Ids(store.column(root, layout.ID_HEAP), store.column(root, layout.ID_END))


def read_tasks(root: zarr.Group) -> tuple[Task, ...]:
    return unpack_tasks(store.column(root, layout.TASK_HEAP), store.column(root, layout.TASK_END))


def _several(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _lookup(numbers: dict[str, int], name: str, complaint: str) -> int:
    if name in numbers:
        return numbers[name]
    close = difflib.get_close_matches(name, numbers, n=3) or list(numbers)[:5]
    hint = "there are " + ", ".join(repr(item) for item in close) if close else "there are none"
    raise UserError(f"{complaint} {name!r}; {hint}")


def _counts(codes: NDArray[np.integer], names: tuple[str, ...]) -> dict[str, int]:
    counts = np.bincount(codes, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}
