"""Payloads become segments: in the coordinator's own session, or in a worker process with a fork of it.

A segment is written shard by shard, each one object that holds its bytes unbroken with zarr's index of inner chunks
behind them (zarr v3, sharding codec, index at the end), put together here: zarr's own codec is slower
(`rbm bench corpus layouts`).
"""

from __future__ import annotations

import pickle
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import google_crc32c
import icechunk
import numpy as np
import zarr
from numpy.typing import NDArray

from rbm.corpus import layout, store
from rbm.corpus.codecs import ClipCodec
from rbm.corpus.location import Location
from rbm.corpus.payload import Packed, pack
from rbm.trajectory import Trajectory


@dataclass(frozen=True)
class Placed:
    """A trajectory whose payload lies in a segment: its record (without a reader), and where.

    Attributes:
        codec, content: of its clips (`Packed`).
        segment, offset, length: of its payload.
    """

    trajectory: Trajectory
    codec: str
    content: int
    segment: int
    offset: int
    length: int


class SegmentWriter:
    """One segment of a session. Full shards go to the store at once, so memory stays at one shard."""

    def __init__(self, root: zarr.Group, number: int) -> None:
        self.number = number
        self.size = 0
        self._root = root
        self._parts: list[bytes | memoryview] = []
        self._held = 0
        self._shards = 0
        self._array: zarr.Array | None = None

    def append(self, packed: Packed) -> Placed:
        """Raises UserError: the storage fails."""
        offset, rest = self.size, memoryview(packed.payload)
        self.size += len(rest)
        while self._held + len(rest) >= layout.SHARD_BYTES:
            room = layout.SHARD_BYTES - self._held
            self._take(rest[:room])
            self._flush()
            rest = rest[room:]
        if len(rest):
            self._take(rest)
        length = len(packed.payload)
        return Placed(packed.trajectory, packed.codec, packed.content, self.number, offset, length)

    def close(self) -> None:
        """Write the rest. An empty segment leaves nothing."""
        if self._held:
            self._flush()

    def _take(self, piece: memoryview) -> None:
        self._parts.append(piece)
        self._held += len(piece)

    def _flush(self) -> None:
        end = self._shards * layout.SHARD_BYTES + self._held
        if self._array is None:
            self._array = self._root.create_array(
                layout.segment_name(self.number),
                shape=(end,),
                dtype="uint8",
                chunks=(layout.INNER_CHUNK_BYTES,),
                shards=(layout.SHARD_BYTES,),
                compressors=None,
                filters=None,
            )
        else:
            self._array.resize((end,))
        key = layout.shard_key(self.number, self._shards)
        data = shard_object(self._parts, self._held, layout.SHARD_BYTES)
        store.write_object(self._root, key, data)
        self._shards += 1
        self._parts, self._held = [], 0


def shard_object(parts: list[bytes | memoryview], size: int, shard_bytes: int) -> bytes:
    """`size` bytes, given in parts, as a shard: padded to whole inner chunks, then their places, then a CRC-32C."""
    inner = layout.INNER_CHUNK_BYTES
    count = -(-size // inner)
    places = np.full((shard_bytes // inner, 2), 2**64 - 1, "<u8")  # this means: no such chunk
    places[:count, 0] = np.arange(count) * inner
    places[:count, 1] = inner
    index = places.tobytes()
    return b"".join([*parts, bytes(count * inner - size), index, struct.pack("<I", google_crc32c.value(index))])


@dataclass(frozen=True)
class Fork:
    """What a worker process needs to write segments for a coordinator; small, and made to be pickled.

    Attributes:
        snapshot: of the corpus as it was then.
        session: a pickled fork of the coordinator's session, still clean.
        first, step: numbers of this worker's segments: first, first + step, ...
        codec, segment_bytes, commit_every: as of the `CorpusWriter`.
    """

    location: Location
    snapshot: str
    session: bytes
    first: int
    step: int
    codec: str | ClipCodec
    segment_bytes: int | None
    commit_every: int | None


@dataclass(frozen=True)
class Segment:
    """A finished segment on its way to the coordinator: the changes of its session (pickled), its trajectories."""

    session: bytes
    placed: tuple[Placed, ...]


class ForkWriter:
    """Encodes trajectories and writes them as segments, in a worker process.

    A segment ends when it holds `segment_bytes` or `commit_every` trajectories, or is `seconds` old. Each is handed to
    the coordinator (`CorpusWriter.take`, `place`), and is in the corpus when that commits. Where a write fails, the
    segment is given up, with all its trajectories, and `failed` is set.
    """

    def __init__(self, fork: Fork, seconds: float = 30.0) -> None:
        self.failed = False
        self._fork, self._seconds = fork, seconds
        self._next = fork.first
        self._begin()

    @property
    def is_old(self) -> bool:
        """Whether the segment was begun so many `seconds` ago."""
        return self._writer is not None and time.monotonic() - self._since >= self._seconds

    def add(
        self,
        trajectory: Trajectory,
        frames: Mapping[str, NDArray[np.uint8]],
        arrays: Mapping[str, NDArray] | None = None,
    ) -> Segment | None:
        """Write one trajectory (`CorpusWriter.add`); returns the segment if it ended with this one.

        Raises:
            UserError: frames do not fit the record, or the storage fails.
        """
        packed = pack(trajectory, frames, arrays, self._fork.codec)
        with self._writing():
            if self._writer is None:
                self._open()
            assert self._writer is not None
            self._placed.append(self._writer.append(packed))
        full = self._fork.segment_bytes is not None and self._writer.size >= self._fork.segment_bytes
        many = self._fork.commit_every is not None and len(self._placed) >= self._fork.commit_every
        return self.flush() if full or many or self.is_old else None

    def flush(self) -> Segment | None:
        """End the segment now; None where nothing was added since the last.

        Raises:
            UserError: the storage fails.
        """
        if self._writer is None:
            return None
        with self._writing():
            self._writer.close()
            done = Segment(pickle.dumps(self._session), tuple(self._placed))
        self._next += self._fork.step
        self._begin()
        return done

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with store.writable(self._fork.location):
                yield
        except BaseException:
            self.failed = True
            self._next += self._fork.step
            self._begin()
            raise

    def _begin(self) -> None:
        self._session: icechunk.ForkSession | None = None
        self._writer: SegmentWriter | None = None
        self._placed: list[Placed] = []

    def _open(self) -> None:
        """A fresh copy of the fork for each segment: it holds that segment's changes and no others."""
        store.check_runtime(self._fork.location)
        self._session = pickle.loads(self._fork.session)  # made by our own coordinator, a moment ago
        assert self._session is not None
        self._writer = SegmentWriter(store.group(self._session, self._fork.location), self._next)
        self._since = time.monotonic()
