"""Writing a corpus: trajectories go in one after another, commits make them visible.

What a commit makes visible, it makes visible at once; what was added after the last commit is lost when
the process dies, and nothing else. A writer adds whole segments and never touches an older one, so
readers of older snapshots go on undisturbed.

One process coordinates: it holds the lock from its start and commits. Others may write segments for it (`fork`,
`ForkWriter`, `take`); what a dead writer left behind is collected by the next one, under the same lock.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import icechunk
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from rbm.corpus import layout, store
from rbm.corpus.codecs import ClipCodec, make_codec
from rbm.corpus.index import strings
from rbm.corpus.location import Location
from rbm.corpus.lock import WriterLock
from rbm.corpus.payload import Packed, pack
from rbm.corpus.retry import commit, patient, read_session, reason, write_session
from rbm.corpus.segment import Fork, Placed, Segment, SegmentWriter
from rbm.corpus.tables import (
    SourceInfo,
    merge_tasks,
    pack_strings,
    pack_tasks,
    read_tasks,
    sources_from_json,
    sources_to_json,
)
from rbm.errors import UserError
from rbm.trajectory import Quality, Task, Trajectory, completion_index

log = logging.getLogger(__name__)


class CorpusWriter:
    """Makes a corpus or appends to one; a context manager.

    Args:
        place: a local directory (made, with its parents, where it does not exist) or a URL (`s3://bucket/prefix`).
        codec: `jpeg`, `h264`, or a codec object; may differ from what the corpus already holds.
        segment_bytes: commit when so many payload bytes are pending; None: only as `commit_every` says.
        commit_every: commit after so many trajectories, so that a killed build loses no more than these.
            None: only as `segment_bytes` says. Each commit makes one segment.

    Leaving the `with` block commits; leaving it by an exception keeps what was committed before and
    drops the rest. `ids` holds the ids that are present, for builds that resume.

    Raises:
        UserError: another writer is at work; the path holds something else, or a newer format; the
            disk is full (the last commit stands).
    """

    def __init__(
        self,
        place: str | os.PathLike[str] | Location,
        codec: str | ClipCodec = "jpeg",
        segment_bytes: int | None = 256 << 20,
        commit_every: int | None = 1000,
    ) -> None:
        self.location = Location.parse(place)
        self.ids: set[str] = set()
        self.sources: dict[str, SourceInfo] = {}
        self.snapshot: str | None = None
        self._codec = make_codec(codec)
        self._segment_bytes = segment_bytes
        self._commit_every = commit_every
        self._lock = WriterLock(self.location)
        self._tasks: dict[str, Task] = {}
        self._task_number: dict[str, int] = {}
        self._tasks_changed = False
        self._embodiments: dict[str, int] = {}
        self._attributes: dict[str, Any] = {}
        self._pending: dict[str, dict[str, Any]] = {}
        self._removed: set[str] = set()
        self._moved: dict[int, Placed] = {}
        self._dropping = False
        self._used_segments = self._next_segment = 0
        self._segment_step = 1
        self._since = 0.0
        self._tables_changed = False
        self._usable = False

    @property
    def usable(self) -> bool:
        """Inside its `with` block, and no write has failed: what was added can still be committed."""
        return self._usable

    def __enter__(self) -> Self:
        path = self.location.local
        if path is not None:
            if path.exists() and not path.is_dir():
                raise UserError(f"corpus {path}: is a file, a corpus is a directory")
            with store.writable(self.location):
                path.mkdir(parents=True, exist_ok=True)
        with store.writable(self.location):
            self._lock.acquire()
        try:
            with store.writable(self.location):
                self._open()
        except BaseException:
            self._lock.release()
            raise
        self._usable = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._usable:
                self.commit()
        finally:
            if kind is not None or not self._usable:
                self._collect_garbage()  # what was written and will never be committed
            self._usable = False
            self._lock.release()

    def add_task(self, task: Task) -> None:
        """Enter a task, or add paraphrases and a scene to one that is there.

        Raises:
            UserError: its scene contradicts the corpus; its text is empty.
        """
        if not task.text.strip():
            raise UserError("a task needs a text (the instruction)")
        old = self._tasks.get(task.text)
        new = task if old is None else merge_tasks(old, task)
        if new != old:
            self._tasks[task.text] = new
            self._task_number.setdefault(task.text, len(self._task_number))
            self._tasks_changed = self._tables_changed = True

    def add_source(self, name: str, completion: float | None = None, **facts: Any) -> None:
        """Enter a source with its completion cut-off and whatever else is known of it (JSON values).

        Raises:
            UserError: the corpus has trajectories of this source with another cut-off.
        """
        new = SourceInfo(name, completion, facts)
        old = self.sources.get(name)
        if old is not None and old.completion != completion:
            raise UserError(
                f"corpus {self.location}: source {name!r} has completion cut-off {old.completion}, now {completion}; "
                "trajectories are labelled with the former: use another source name or build the corpus again"
            )
        if new != old:
            self.sources[name] = new
            self._tables_changed = True

    def add(
        self,
        trajectory: Trajectory,
        frames: Mapping[str, NDArray[np.uint8]],
        arrays: Mapping[str, NDArray] | None = None,
    ) -> None:
        """Write one trajectory: for each view the stored frames, uint8 (T, H, W, 3), RGB, and side arrays.

        A task or source that was not entered before is entered by its bare name.

        Raises:
            UserError: the id is taken, frames do not fit the record, or the storage fails.
        """
        self._check_new(trajectory)
        self.add_packed(pack(trajectory, frames, arrays, self._codec))

    def add_packed(self, packed: Packed) -> None:
        """Write a trajectory that was packed elsewhere (`pack`, in a worker process or copied).

        Raises:
            UserError: as `add`.
        """
        self._check_new(packed.trajectory)
        self._row(packed.trajectory)  # refused before anything is written
        with self._writing():
            placed = self._segment.append(packed)
        self._used_segments = max(self._used_segments, placed.segment + 1)
        self._enter(placed)
        self._commit_when_full()

    def remove(self, ids: Iterable[str]) -> None:
        """Take trajectories out, from the next commit on; `add` with the same id then puts another in their place.

        Older snapshots keep them, and their bytes stay where they are.

        Raises:
            UserError: an id that the corpus does not have; then none is removed.
        """
        self._check_usable()
        gone = set(ids)
        unknown = sorted(gone - self.ids)
        if unknown:
            raise UserError(f"corpus {self.location}: has no trajectory {unknown[0]!r} (unknown ids: {len(unknown)})")
        for id in gone:
            self._pending.pop(id, None)
        self._removed |= gone
        self.ids -= gone

    def move(self, row: int, packed: Packed) -> None:
        """Write the payload of trajectory number `row` of the last snapshot again, where the next commit finds it.

        Raises:
            UserError: the storage fails.
        """
        self._check_usable()
        with self._writing():
            self._moved[row] = self._segment.append(packed)
        self._used_segments = max(self._used_segments, self._segment.number + 1)
        self._commit_when_full()

    def drop_unused_segments(self) -> None:
        """From the next commit on, no segment is there in which no trajectory lies; older snapshots keep theirs."""
        self._dropping = True

    def fork(self, workers: int) -> list[Fork]:
        """For each of so many worker processes what it needs to write segments beside this one (`ForkWriter`).

        Raises:
            UserError: something was added or removed already: fork first.
        """
        self._check_usable()
        if self._pending or self._removed or self._segment_step > 1:
            raise UserError(f"corpus {self.location}: fork once, and before anything is added or removed")
        snapshot = self.commit()  # the fork of a session must be clean
        assert snapshot is not None  # a corpus without trajectories has one too
        session = pickle.dumps(self._session.fork())
        first, self._segment_step = self._next_segment, workers + 1
        self._next_segment += workers
        with self._writing():
            self._begin()  # one of our own: Icechunk warns of a commit of the one that was forked
        size, count = self._segment_bytes, self._commit_every
        return [
            Fork(self.location, snapshot, session, first + number, workers + 1, self._codec, size, count)
            for number in range(workers)
        ]

    def take(self, segment: Segment) -> None:
        """Take over a segment that a worker wrote; `place` then enters its trajectories, in the order wanted.

        Raises:
            UserError: the storage fails.
        """
        self._check_usable()
        with self._writing():
            self._session.merge(pickle.loads(segment.session))  # made by our own worker
        self._used_segments = max([self._used_segments, *(item.segment + 1 for item in segment.placed)])

    def place(self, placed: Placed) -> None:
        """Enter a trajectory whose segment was taken over.

        Raises:
            UserError: as `add`.
        """
        self._check_new(placed.trajectory)
        self._enter(placed)
        if self._commit_every is not None and len(self._pending) >= self._commit_every:
            self.commit()

    def commit(self) -> str | None:
        """Make everything so far visible in a new snapshot; returns its id (None: the corpus is empty)."""
        self._check_usable()
        if not (self._pending or self._removed or self._moved or self._dropping or self._tables_changed):
            return self.snapshot
        message = f"{len(self._pending)} trajectories added"
        with self._writing():
            self._lock.check()
            codecs = dict.fromkeys(
                (*self._attributes.get("codecs", []), *(row["codec"] for row in self._pending.values()))
            )
            self._segment.close()
            if self._segment.size:
                self._next_segment += self._segment_step
            if self._moved:
                message += f", {self._write_moves()} moved"
            if self._removed:
                message += f", {self._write_removal()} removed"
            self._write_rows()
            if self._dropping:
                self._delete_unused_segments()
            if self._tasks_changed:
                self._write_tasks()
            self._attributes |= {
                "sources": sources_to_json(self.sources),
                "embodiments": list(self._embodiments),
                "segments": self._used_segments,
                "codecs": list(codecs),
            }
            self._root.attrs.put(dict(self._attributes))
            message += f", {len(self.ids)} in all"
            # what a commit names is on the disk before it, and the commit itself before anybody is told of it
            began = time.time()
            store.force_to_disk(self.location, store.PAYLOAD_FOLDERS, self._since)
            self.snapshot = commit(self._repository, self._session, message, self.location)
            store.force_to_disk(self.location, store.COMMIT_FOLDERS, self._since)
            self._since = began
        self._pending, self._removed, self._moved = {}, set(), {}
        self._dropping = False
        self._tasks_changed = self._tables_changed = False
        with self._writing():
            self._begin()
        return self.snapshot

    def annotate(self, **facts: Any) -> None:
        """Keep facts about the corpus as a whole (JSON values) beside its name and version."""
        self._attributes["facts"] = {**self._attributes.get("facts", {}), **facts}
        self._tables_changed = True

    def _open(self) -> None:
        self._since = time.time()
        path = self.location.local
        if path is None:
            self._repository = store.open_or_create(self.location)
        else:
            others = [item.name for item in path.iterdir()]
            if others and not store.is_repository(path):
                raise UserError(f"corpus {path}: the directory holds other files ({others[0]}, ...): give a new one")
            if not others:
                self._make(path)
            self._repository = store.open_repository(self.location)
        if self._lock.predecessor_died:
            self._collect_garbage()
        session = read_session(self._repository, None, self.location)
        root = store.open_root(session, self.location)
        if root is not None:
            self.snapshot = session.snapshot_id
            self._attributes = dict(root.attrs)
            heap, end = store.column(root, layout.ID_HEAP), store.column(root, layout.ID_END)
            self.ids = set(strings(heap, end, 0, len(end)))
            for task in read_tasks(store.column(root, layout.TASK_HEAP), store.column(root, layout.TASK_END)):
                self._task_number[task.text] = len(self._tasks)
                self._tasks[task.text] = task
            self.sources = sources_from_json(self._attributes["sources"])
            self._embodiments = {name: number for number, name in enumerate(self._attributes["embodiments"])}
        else:
            self._attributes = {"format": layout.FORMAT, "version": layout.VERSION}
        self._used_segments = self._next_segment = self._attributes.get("segments", 0)
        self._begin()

    def _make(self, path: Path) -> None:
        """An empty repository in an empty directory, whole or not at all."""
        fresh = path.with_name(f".{path.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)  # of a writer that died here
        store.create_repository(Location.parse(fresh))
        fresh.rename(path)

    def _collect_garbage(self) -> None:
        """What a dead writer left, or this one gave up; where that fails it stays: it costs room and nothing else."""
        try:
            collected = store.collect_garbage(self._repository, self.location)
        except (UserError, *store.STORE_ERRORS) as error:
            why = reason(error)
            log.warning(
                "corpus %s: what a writer left uncommitted was not collected (%s): check it", self.location, why
            )
            return
        if collected:
            log.warning(
                "corpus %s: %.1f MB that a writer left uncommitted were collected", self.location, collected / 1e6
            )

    def _begin(self) -> None:
        """A session for the next commit. A corpus that has none yet gets its (still invisible) layout."""
        self._session: icechunk.Session = write_session(self._repository, self.location)
        if self.snapshot is None:
            patiently = patient(self._session.store, self.location)
            self._root = zarr.create_group(patiently, attributes=dict(self._attributes))
            index = self._root.create_group(layout.INDEX_GROUP)
            self._root.create_group(layout.SEGMENT_GROUP)
            types = {**layout.COLUMNS, layout.ID_END: "int64", layout.TASK_END: "int64"}
            for name, dtype in types.items():
                _create(index, name, dtype, layout.INDEX_CHUNK_ROWS)
            for name in (layout.ID_HEAP, layout.TASK_HEAP):
                _create(index, name, "uint8", layout.HEAP_CHUNK_BYTES)
            self._tables_changed = True
        else:
            self._root = store.group(self._session, self.location)
        self._segment = SegmentWriter(self._root, self._next_segment)

    def _check_usable(self) -> None:
        if not self._usable:
            raise UserError(f"corpus {self.location}: this writer is closed, or an earlier write failed")

    def _check_new(self, trajectory: Trajectory) -> None:
        self._check_usable()
        if trajectory.id in self.ids:
            raise UserError(
                f"trajectory {trajectory.id!r} is already in the corpus {self.location}: ids must be unique"
            )

    def _enter(self, placed: Placed) -> None:
        names = ("codec", "content", "segment", "offset", "length")
        row = self._row(placed.trajectory) | {name: getattr(placed, name) for name in names}
        self._pending[placed.trajectory.id] = row
        self.ids.add(placed.trajectory.id)

    def _row(self, trajectory: Trajectory) -> dict[str, Any]:
        """Its columns, less those that say where it lies. A task or source not entered yet is entered by its name."""
        if trajectory.task not in self._tasks:
            self.add_task(Task(trajectory.task))
        if trajectory.source not in self.sources:
            self.add_source(trajectory.source)
        done = -1
        if trajectory.quality is Quality.SUCCESSFUL:
            try:
                done = completion_index(trajectory, self.sources[trajectory.source].completion)
            except ValueError as error:
                raise UserError(str(error)) from error
        partial = trajectory.partial_success
        return {
            "task": self._task_number[trajectory.task],
            "source": list(self.sources).index(trajectory.source),
            "quality": trajectory.quality.rank,
            "n_frames": trajectory.n_frames,
            "done": done,
            "done_known": trajectory.done_index is not None,
            "messy": trajectory.messy,
            "dense": trajectory.progress is not None,
            "partial_success": np.nan if partial is None else partial,
            "embodiment": self._embodiments.setdefault(trajectory.embodiment, len(self._embodiments)),
            "is_robot": trajectory.is_robot,
            "is_sim": trajectory.is_sim,
        }

    def _index(self, name: str) -> zarr.Array:
        return store.array(self._root, f"{layout.INDEX_GROUP}/{name}")

    def _write_rows(self) -> None:
        for name, dtype in layout.COLUMNS.items():
            _append(self._index(name), np.array([row[name] for row in self._pending.values()], dtype))
        heap, end = pack_strings(list(self._pending))
        _append(self._index(layout.ID_END), end + self._index(layout.ID_HEAP).shape[0])
        _append(self._index(layout.ID_HEAP), heap)

    def _write_moves(self) -> int:
        """Write where moved payloads lie now; returns how many these are. Before rows are removed: that renumbers."""
        rows = np.array(list(self._moved), np.int64)
        for name in ("segment", "offset"):
            values = store.column(self._root, name)
            values[rows] = [getattr(placed, name) for placed in self._moved.values()]
            _replace(self._index(name), values)
        return len(rows)

    def _delete_unused_segments(self) -> None:
        used = set(np.unique(store.column(self._root, "segment")).tolist())
        for number in store.segments(self._root):
            if number not in used:
                del self._root[layout.segment_name(number)]

    def _write_removal(self) -> int:
        """Write the index without the removed rows; returns how many these are."""
        heap, end = store.column(self._root, layout.ID_HEAP), store.column(self._root, layout.ID_END)
        ids = list(strings(heap, end, 0, len(end)))
        keep = np.fromiter((id not in self._removed for id in ids), bool, len(ids))
        for name in layout.COLUMNS:
            _replace(self._index(name), store.column(self._root, name)[keep])
        heap, end = pack_strings([id for id, kept in zip(ids, keep.tolist(), strict=True) if kept])
        _replace(self._index(layout.ID_HEAP), heap)
        _replace(self._index(layout.ID_END), end)
        return int((~keep).sum())

    def _commit_when_full(self) -> None:
        full = self._segment_bytes is not None and self._segment.size >= self._segment_bytes
        if full or (self._commit_every is not None and len(self._pending) >= self._commit_every):
            self.commit()

    def _write_tasks(self) -> None:
        """The whole table: it is small, and an older row may have got a paraphrase."""
        heap, end = pack_tasks(list(self._tasks.values()))
        _replace(self._index(layout.TASK_HEAP), heap)
        _replace(self._index(layout.TASK_END), end)

    def _writing(self) -> _Guard:
        return _Guard(self)


class _Guard:
    """Storage errors as one line; after any exception the writer takes no more, so nothing half is committed."""

    def __init__(self, writer: CorpusWriter) -> None:
        self._writer = writer
        self._storage = store.writable(writer.location)

    def __enter__(self) -> None:
        self._storage.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            self._writer._usable = False
        return self._storage.__exit__(kind, error, trace)


def _create(index: zarr.Group, name: str, dtype: str, chunk: int) -> None:
    """An empty index array; its chunks carry a checksum, for a flipped bit in an index would send readers astray."""
    compressors = (ZstdCodec(level=3), Crc32cCodec())
    index.create_array(name, shape=(0,), chunks=(chunk,), dtype=dtype, compressors=compressors)


def _append(array: zarr.Array, values: NDArray) -> None:
    if len(values):
        start = array.shape[0]
        array.resize((start + len(values),))
        array[start:] = values


def _replace(array: zarr.Array, values: NDArray) -> None:
    array.resize((len(values),))
    if len(values):
        array[:] = values
