"""Reading a corpus: columns mapped, frames on demand, and of a trajectory only the bytes that it takes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import icechunk
import numpy as np
import zarr
from numpy.typing import NDArray

from rbm.corpus import cache, layout, store
from rbm.corpus.chunks import ShardFiles, shard_table
from rbm.corpus.codecs import Bytes
from rbm.corpus.index import CSR, Columns, Ids, Names
from rbm.corpus.location import Location
from rbm.corpus.payload import CorruptPayload, Head, Payload, read_head
from rbm.corpus.retry import read_session, reason
from rbm.corpus.tables import SourceInfo, Tasks, scan_tasks, sources_from_json
from rbm.errors import UserError
from rbm.trajectory import Quality, Trajectory

INDEX_ARRAYS = (layout.ID_HEAP, layout.ID_END, layout.TASK_HEAP, layout.TASK_END)
"""What is read of a snapshot besides its columns."""


class DamagedIndex(UserError):
    """The index of a snapshot is damaged, or a part of it gone. (A store that can not be reached is another error.)"""


class Corpus:
    """One snapshot of a corpus, read-only. Make it with `Corpus.open`.

    Everything below is mapped from a local cache (`rbm.corpus.cache`) and shared by all processes. Pickling carries
    the place and the snapshot: another process maps the same files. Payloads of a local corpus are read from its
    files directly; those of a remote one through Icechunk, which does not survive a fork (use `spawn` or `forkserver`).

    Attributes:
        location: a local directory or a URL.
        snapshot: the Icechunk snapshot id, to be kept with whatever is made from the corpus.
        columns: numeric facts of all trajectories. ids: their ids, as a sequence.
        tasks: the task table, a sequence that `columns.task` numbers point into. embodiments: a tuple, likewise.
        scenes: names; task_scene: int32 (tasks,), each task's place among them, -1 = none.
        sources: by name, in the order of their numbers.
        by_task_quality: trajectory numbers grouped by task and outcome, so that a partner for a pair is found in O(1).
    """

    def __init__(self, location: Location, snapshot: str, index: cache.Index) -> None:
        arrays, facts = index.arrays, index.facts
        self.location = location
        self.snapshot = snapshot
        self._attributes: dict[str, Any] = facts["attributes"]
        store.check_version(self._attributes, location)  # a newer rbm may have written the cache
        self.columns = Columns(**{field.name: arrays[field.name] for field in fields(Columns)})
        self.ids = Ids(arrays[layout.ID_HEAP], arrays[layout.ID_END], Names(arrays["id_hash"], arrays["id_row"]))
        self.tasks = Tasks(
            arrays[layout.TASK_HEAP], arrays[layout.TASK_END], Names(arrays["task_hash"], arrays["task_row"])
        )
        self.task_scene: NDArray[np.int32] = arrays["task_scene"]
        self.scenes: tuple[str, ...] = tuple(facts["scenes"])
        self.by_task_quality = CSR(arrays["group_end"], arrays["group_rows"])
        self.sources: dict[str, SourceInfo] = sources_from_json(self._attributes["sources"])
        self.embodiments: tuple[str, ...] = tuple(self._attributes["embodiments"])
        self._files = ShardFiles(location, arrays["shard_key"], arrays["shard_file"])
        self._root: zarr.Group | None = None

    @classmethod
    def open(cls, place: str | os.PathLike[str] | Location, snapshot: str | None = None) -> Corpus:
        """Open the newest snapshot of the corpus at a path or URL, or the one with this id or tag.

        Raises:
            UserError: no corpus there, a newer format, another program's repository, no such snapshot.
        """
        location = Location.parse(place)
        if snapshot is not None and store.has_snapshot(location, snapshot):
            index = cache.load(cache_key(location, snapshot))
            if index is not None:
                return cls(location, snapshot, index)
        repository = store.open_repository(location)
        wanted = store.resolve(repository, location, snapshot)
        key = cache_key(location, wanted)
        return cls(location, wanted, cache.load_or_make(key, lambda: read_index(repository, location, wanted)))

    def __reduce__(self) -> tuple[Any, tuple[Location, str]]:
        return Corpus.open, (self.location, self.snapshot)

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, row: int) -> Trajectory:
        """The record of one trajectory; its frames are read when they are asked for.

        Raises:
            IndexError: no such number. CorruptPayload: its header is damaged.
        """
        return self._head(self._number(row)).trajectory

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[row] for row in range(len(self)))

    def by_id(self, id: str) -> Trajectory:
        """Raises UserError: no trajectory has this id."""
        return self[self.row(id)]

    def row(self, id: str) -> int:
        """Trajectory number of an id. Raises UserError: no trajectory has it."""
        row = self.ids.find(id)
        if row is None:
            raise UserError(f"corpus {self.location}: no trajectory has the id {id!r}")
        return row

    def task_number(self, text: str) -> int:
        """Row of the task table. Raises UserError: no task has this text (says which are close)."""
        number = self.tasks.find(text)
        if number is None:
            names = {task.text: row for row, task in enumerate(self.tasks)}
            return _lookup(names, text, f"corpus {self.location}: no task")
        return number

    def payload(self, row: int) -> Payload:
        """Everything stored of one trajectory: frames, side arrays, record.

        Raises:
            CorruptPayload: its bytes are damaged or missing.
        """
        row = self._number(row)
        data = _Extent(self, row)
        return Payload(data if self._files.local else data[:], self.ids[row], _Reader(self, row))

    def payload_bytes(self, row: int, size: int | None = None) -> Bytes:
        """The bytes of a payload (the first `size` of them), uint8, fetched at once; nothing in them is looked at.

        Raises:
            CorruptPayload: they are missing.
        """
        row = self._number(row)
        return self._read(row, 0, int(self.columns.length[row]) if size is None else size)

    def frames(
        self,
        row: int,
        indices: NDArray[np.integer] | None = None,
        view: str | None = None,
        min_side: int | None = None,
    ) -> NDArray[np.uint8]:
        """Stored frames `indices` (default all) of a view (default the first): uint8 (T, H, W, 3), RGB.

        With `min_side` the frames may come smaller, where that decodes faster, with a short side of at least so
        many pixels (a model that looks at 112 pixels need not decode 240).

        Raises:
            CorruptPayload: names the trajectory and the frame. IndexError, UserError: no such frame or view.
        """
        return self.payload(row).frames(indices, view, min_side)

    def progress(self, row: int) -> NDArray[np.float32] | None:
        """Dense progress labels, float32 (T,), or None; reads the header only."""
        row = self._number(row)
        return self._head(row).trajectory.progress if self.columns.dense[row] else None

    def timestamps(self, row: int) -> NDArray[np.float32]:
        """Seconds of the stored frames, float32 (T,); reads the header only."""
        return self._head(self._number(row)).trajectory.timestamp

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
            wanted = _several(ids)
            rows = self.ids.find_many(wanted)
            if (rows < 0).any():
                self.row(wanted[int(np.argmax(rows < 0))])  # says so
            among = np.zeros(len(self), bool)
            among[rows] = True
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
            "path": str(self.location),
            "snapshot": self.snapshot,
            "version": self._attributes["version"],
            "trajectories": len(self),
            "frames": int(columns.n_frames.sum(dtype=np.int64)),
            "bytes": int(columns.length.sum()),
            "codecs": list(self._attributes["codecs"]),
            "segments": len(np.unique(columns.segment)),
            "by_quality": qualities,
            "by_source": _counts(columns.source, tuple(self.sources)),
            "by_embodiment": _counts(columns.embodiment, self.embodiments),
            "by_task": by_task,
            "scenes": len(self.scenes),
            "messy": int(columns.messy.sum()),
            "dense": int(columns.dense.sum()),
            "facts": self._attributes.get("facts", {}),
        }

    def _number(self, row: int) -> int:
        number = int(row) + len(self) if row < 0 else int(row)
        if not 0 <= number < len(self):
            raise IndexError(f"trajectory number {row}, the corpus {self.location} has {len(self)}")
        return number

    def _head(self, row: int) -> Head:
        return read_head(_Extent(self, row), self.ids[row], _Reader(self, row))

    def _read(self, row: int, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of one payload."""
        segment = int(self.columns.segment[row])
        first = int(self.columns.offset[row]) + start
        last = int(self.columns.offset[row]) + stop
        pieces = []
        while first < last:
            shard, at = divmod(first, layout.SHARD_BYTES)
            size = min(last - first, layout.SHARD_BYTES - at)
            try:
                piece = self.read_shard(segment, shard, at, size)
            except (OSError, *store.STORE_ERRORS) as error:
                where = layout.shard_key(segment, shard)
                raise CorruptPayload(
                    self.ids[row], f"{where} can not be read: {reason(error)}", str(self.location)
                ) from error
            if piece is None or len(piece) != size:
                where = layout.shard_key(segment, shard)
                what = f"{where} is {'missing' if piece is None else 'cut short'}"
                raise CorruptPayload(self.ids[row], what, str(self.location))
            pieces.append(piece)
            first += size
        return np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), np.uint8)

    def read_shard(self, segment: int, shard: int, at: int, size: int) -> bytes | None:
        """Bytes [at, at + size) of one shard, fewer where it ends before; None where there is none."""
        if self._files.holds(segment, shard):
            return self._files.read(segment, shard, at, size)
        store.check_runtime(self.location)
        if self._root is None:
            self._root = _open_root(store.open_repository(self.location), self.location, self.snapshot)
        return store.read_range(self._root, layout.shard_key(segment, shard), at, at + size)


class _Extent:
    """The bytes of one trajectory's payload; what is sliced out of it is read then."""

    def __init__(self, corpus: Corpus, row: int) -> None:
        self._corpus, self._row = corpus, row
        self._length = int(corpus.columns.length[row])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> Bytes:
        start, stop, _ = part.indices(self._length)
        return self._corpus._read(self._row, start, max(start, stop))

    def tobytes(self) -> bytes:
        return self[:].tobytes()


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


def cache_key(location: Location, snapshot: str) -> str:
    """A corpus on this machine and a copy of it in an object store share snapshots, but not where their shards are."""
    return snapshot if location.local is not None else f"{snapshot}-remote"


def _open_root(repository: icechunk.Repository, location: Location, snapshot: str) -> zarr.Group:
    with store.readable(location):
        root = store.open_root(read_session(repository, snapshot, location), location)
    if root is None:
        raise _nothing_committed(location)
    return root


def _nothing_committed(location: Location) -> UserError:
    return UserError(f"corpus {location}: nothing has been committed to it yet: run its build again")


def read_index(repository: icechunk.Repository, location: Location, snapshot: str) -> cache.Index:
    """Everything of a snapshot but its payloads, and what is derived from it to find things fast; not from the cache.

    Raises:
        DamagedIndex: it can not be read. UserError: nothing was committed, or the storage fails.
    """
    try:
        root = store.open_root(read_session(repository, snapshot, location), location)
        if root is None:
            raise _nothing_committed(location)
        arrays = {name: store.column(root, name) for name in (*layout.COLUMNS, *INDEX_ARRAYS)}
        columns = Columns(**{field.name: arrays[field.name] for field in fields(Columns)})
        ids = Names.build(arrays[layout.ID_HEAP], arrays[layout.ID_END])
        texts, scenes, task_scene = scan_tasks(arrays[layout.TASK_HEAP], arrays[layout.TASK_END])
        groups = CSR.build(columns.task, columns.quality, len(task_scene))
    except (ValueError, KeyError, *store.STORE_ERRORS) as error:  # ValueError: zarr, a checksum in the index
        if "Permission denied" in reason(error):
            raise UserError(f"corpus {location}: can not be read: {reason(error)}") from error
        raise DamagedIndex(
            f"corpus {location}: the index of snapshot {snapshot} is damaged ({reason(error)}): run "
            f"`rbm corpus check {location} --repair`, open an earlier snapshot, or build it again"
        ) from error
    try:
        keys, files = shard_table(repository, location, snapshot)
    except OSError as error:
        raise UserError(f"corpus {location}: can not be read: {reason(error)}") from error
    arrays |= {
        "id_hash": ids.hashes, "id_row": ids.rows, "task_hash": texts.hashes, "task_row": texts.rows,
        "task_scene": task_scene, "group_end": groups.indptr, "group_rows": groups.order,
        "shard_key": keys, "shard_file": files,
    }  # fmt: skip
    return cache.Index(arrays, {"attributes": dict(root.attrs), "scenes": list(scenes)})


def _several(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _lookup(numbers: dict[str, int], name: str, complaint: str) -> int:
    if name in numbers:
        return numbers[name]
    close = difflib.get_close_matches(name, numbers, n=3) or [known for known in numbers if known][:5]
    hint = "there are " + ", ".join(repr(item) for item in close) if close else "there are none"
    raise UserError(f"{complaint} {name!r}; {hint}")


def _counts(codes: NDArray[np.integer], names: tuple[str, ...]) -> dict[str, int]:
    counts = np.bincount(codes, minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}
