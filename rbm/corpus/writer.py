"""Writing a corpus: trajectories go in one after another, commits make them visible.

What a commit makes visible, it makes visible at once; what was added after the last commit is lost when
the process dies, and nothing else. A writer adds whole segments and never touches an older one, so
readers of older snapshots go on undisturbed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import icechunk
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from rbm.corpus import layout, store
from rbm.corpus.codecs import ClipCodec, make_codec
from rbm.corpus.lock import WriterLock
from rbm.corpus.payload import Packed, pack
from rbm.corpus.reader import read_ids, read_tasks
from rbm.corpus.tables import SourceInfo, merge_tasks, pack_strings, pack_tasks, sources_from_json, sources_to_json
from rbm.errors import UserError
from rbm.trajectory import Quality, Task, Trajectory, completion_index


class CorpusWriter:
    """Makes a corpus or appends to one; a context manager.

    Args:
        path: a local directory; made, with its parents, where it does not exist.
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
        path: str | os.PathLike[str],
        codec: str | ClipCodec = "jpeg",
        segment_bytes: int | None = 256 << 20,
        commit_every: int | None = 1000,
    ) -> None:
        self.path = store.absolute(path)
        self.ids: set[str] = set()
        self.sources: dict[str, SourceInfo] = {}
        self.snapshot: str | None = None
        self._codec = make_codec(codec)
        self._segment_bytes = segment_bytes
        self._commit_every = commit_every
        self._lock = WriterLock(self.path)
        self._tasks: dict[str, Task] = {}
        self._task_number: dict[str, int] = {}
        self._tasks_changed = False
        self._embodiments: dict[str, int] = {}
        self._attributes: dict[str, Any] = {}
        self._n_rows = 0
        self._pending: list[tuple[str, dict[str, Any]]] = []
        self._tables_changed = False
        self._usable = False

    @property
    def usable(self) -> bool:
        """Inside its `with` block, and no write has failed: what was added can still be committed."""
        return self._usable

    def __enter__(self) -> Self:
        path = self.path
        if path.exists() and not path.is_dir():
            raise UserError(f"corpus {path}: is a file, a corpus is a directory")
        with store.writable(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        try:
            with store.writable(path):
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
                f"corpus {self.path}: source {name!r} has completion cut-off {old.completion}, now {completion}; "
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
        trajectory = packed.trajectory
        self._check_new(trajectory)
        if trajectory.task not in self._tasks:
            self.add_task(Task(trajectory.task))
        if trajectory.source not in self.sources:
            self.add_source(trajectory.source)
        row = self._row(trajectory)
        with self._writing():
            segment, offset = self._segment.append(packed)
        place = {"segment": segment, "offset": offset, "length": len(packed.payload)}
        self._pending.append((trajectory.id, row | place))
        self.ids.add(trajectory.id)
        full = self._segment_bytes is not None and self._segment.size >= self._segment_bytes
        if full or (self._commit_every is not None and len(self._pending) >= self._commit_every):
            self.commit()

    def commit(self) -> str | None:
        """Make everything added so far visible in a new snapshot; returns its id (None: the corpus is empty)."""
        if not self._usable:
            raise UserError(f"corpus {self.path}: this writer is closed, or an earlier write failed")
        if not (self._pending or self._tables_changed):
            return self.snapshot
        with self._writing():
            root = self._root
            codecs = list(dict.fromkeys((*self._attributes.get("codecs", []), *self._segment.codecs)))
            self._segment.close()
            self._write_rows()
            if self._tasks_changed:
                self._write_tasks()
            self._attributes |= {
                "sources": sources_to_json(self.sources),
                "embodiments": list(self._embodiments),
                "segments": self._segment.number + bool(self._segment.size),
                "codecs": codecs,
            }
            root.attrs.put(dict(self._attributes))
            n_new = len(self._pending)
            self.snapshot = self._session.commit(f"{n_new} trajectories added, {self._n_rows + n_new} in all")
        self._n_rows += n_new
        self._pending = []
        self._tasks_changed = self._tables_changed = False
        with self._writing():
            self._begin()
        return self.snapshot

    def annotate(self, **facts: Any) -> None:
        """Keep facts about the corpus as a whole (JSON values) beside its name and version."""
        self._attributes["facts"] = {**self._attributes.get("facts", {}), **facts}
        self._tables_changed = True

    def _open(self) -> None:
        others = [item.name for item in self.path.iterdir()]
        if not others:
            store.create_repository(self.path)
        elif not store.is_repository(self.path):
            raise UserError(f"corpus {self.path}: the directory holds other files ({others[0]}, ...): give a new one")
        self._repository = store.open_repository(self.path)
        session = self._repository.readonly_session(layout.BRANCH)
        root = store.open_root(session.store, self.path)
        if root is not None:
            self.snapshot = session.snapshot_id
            self._attributes = dict(root.attrs)
            self.ids = set(read_ids(root))
            self._n_rows = len(self.ids)
            for task in read_tasks(root):
                self._task_number[task.text] = len(self._tasks)
                self._tasks[task.text] = task
            self.sources = sources_from_json(self._attributes["sources"])
            self._embodiments = {name: number for number, name in enumerate(self._attributes["embodiments"])}
        else:
            self._attributes = {"format": layout.FORMAT, "version": layout.VERSION}
        self._begin()

    def _begin(self) -> None:
        """A session for the next commit. A corpus that has none yet gets its (still invisible) layout."""
        self._session: icechunk.Session = self._repository.writable_session(layout.BRANCH)
        if self.snapshot is None:
            self._root = zarr.create_group(self._session.store, attributes=dict(self._attributes))
            index = self._root.create_group(layout.INDEX_GROUP)
            self._root.create_group(layout.SEGMENT_GROUP)
            types = {**layout.COLUMNS, layout.ID_END: "int64", layout.TASK_END: "int64"}
            for name, dtype in types.items():
                _create(index, name, dtype, layout.INDEX_CHUNK_ROWS)
            for name in (layout.ID_HEAP, layout.TASK_HEAP):
                _create(index, name, "uint8", layout.HEAP_CHUNK_BYTES)
            self._tables_changed = True
        else:
            self._root = zarr.open_group(self._session.store, mode="r+")
        self._segment = _Segment(self._root, self._attributes.get("segments", 0))

    def _check_new(self, trajectory: Trajectory) -> None:
        if not self._usable:
            raise UserError(f"corpus {self.path}: this writer is closed, or an earlier write failed")
        if trajectory.id in self.ids:
            raise UserError(f"trajectory {trajectory.id!r} is already in the corpus {self.path}: ids must be unique")

    def _row(self, trajectory: Trajectory) -> dict[str, Any]:
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
            _append(self._index(name), np.array([row[name] for _, row in self._pending], dtype))
        heap, end = pack_strings([id for id, _ in self._pending])
        _append(self._index(layout.ID_END), end + self._index(layout.ID_HEAP).shape[0])
        _append(self._index(layout.ID_HEAP), heap)

    def _write_tasks(self) -> None:
        """The whole table: it is small, and an older row may have got a paraphrase."""
        heap, end = pack_tasks(list(self._tasks.values()))
        for name, values in ((layout.TASK_HEAP, heap), (layout.TASK_END, end)):
            array = self._index(name)
            array.resize((len(values),))
            array[:] = values

    def _writing(self) -> _Guard:
        return _Guard(self)


class _Guard:
    """Storage errors as one line; after any exception the writer takes no more, so nothing half is committed."""

    def __init__(self, writer: CorpusWriter) -> None:
        self._writer = writer
        self._storage = store.writable(writer.path)

    def __enter__(self) -> None:
        self._storage.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            self._writer._usable = False
        return self._storage.__exit__(kind, error, trace)


class _Segment:
    """The segment being written: full shards go to the store at once, so memory stays at one shard."""

    def __init__(self, root: zarr.Group, number: int) -> None:
        self.number = number
        self.size = 0
        self.codecs: list[str] = []
        self._root = root
        self._array: zarr.Array | None = None
        self._written = 0
        self._buffer = bytearray()

    def append(self, packed: Packed) -> tuple[int, int]:
        """Returns the segment's number and the payload's offset in it."""
        offset = self.size
        self._buffer += packed.payload
        self.size += len(packed.payload)
        if packed.codec not in self.codecs:
            self.codecs.append(packed.codec)
        while len(self._buffer) >= layout.SHARD_BYTES:
            self._flush(layout.SHARD_BYTES)
        return self.number, offset

    def close(self) -> None:
        if self._buffer:
            self._flush(len(self._buffer))

    def _flush(self, size: int) -> None:
        if self._array is None:
            self._array = self._root.create_array(
                layout.segment_name(self.number),
                shape=(0,),
                dtype="uint8",
                chunks=(layout.INNER_CHUNK_BYTES,),
                shards=(layout.SHARD_BYTES,),
                compressors=None,
                filters=None,
                config={"write_empty_chunks": True},  # chunks of zeros too: a shard's bytes stand unbroken
            )
        data = np.frombuffer(bytes(self._buffer[:size]), np.uint8)
        self._array.resize((self._written + size,))
        self._array[self._written :] = data
        self._written += size
        del self._buffer[:size]


def _create(index: zarr.Group, name: str, dtype: str, chunk: int) -> None:
    """An empty index array; its chunks carry a checksum, for a flipped bit in an index would send readers astray."""
    compressors = (ZstdCodec(level=3), Crc32cCodec())
    index.create_array(name, shape=(0,), chunks=(chunk,), dtype=dtype, compressors=compressors)


def _append(array: zarr.Array, values: NDArray) -> None:
    if len(values):
        start = array.shape[0]
        array.resize((start + len(values),))
        array[start:] = values
