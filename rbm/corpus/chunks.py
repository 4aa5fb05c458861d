"""Which file of a local repository holds which shard, so that payloads are read without a storage engine.

Icechunk's own reads cost 0.6 to 1 ms each, 15 to 30 MB of private memory a process, and do not survive a fork; a
`pread` costs a tenth and none of that. A repository's chunk files are the chunks as they are (`chunks/<id>`), and its
manifests say which id a chunk has: a header of 39 bytes, then a Flatbuffers table, zstd-compressed (Icechunk's
specification, version 1, manifest.fbs):

    Manifest       0 id, 1 arrays: [ArrayManifest]
    ArrayManifest  0 node_id: 8 bytes, 1 refs: [ChunkRef]
    ChunkRef       0 index: [uint32], 1 inline, 2 offset: uint64, 3 length: uint64, 4 chunk_id: 12 bytes, 5 location
"""

from __future__ import annotations

import base64
import json
import logging
import os
import struct
from collections.abc import Iterator
from functools import lru_cache
from io import FileIO
from pathlib import Path

import icechunk
import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from rbm.corpus.layout import SEGMENT_GROUP
from rbm.corpus.location import Location

log = logging.getLogger(__name__)

_HEADER = 39
_MAGIC = b"ICE\xf0\x9f\xa7\x8aCHUNK"
_SPEC, _TYPE, _COMPRESSION = 36, 37, 38
SPECIFICATION = 1
_MANIFEST, _ZSTD = 2, 1
_CROCKFORD = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", b"0123456789ABCDEFGHJKMNPQRSTVWXYZ")

CHUNK_FOLDER = "chunks"


_OPEN_FILES = 64


class ShardFiles:
    """The files that hold the shards of a local corpus.

    Args:
        keys: int64 (S,), rising: segment << 32 | shard. names: bytes (S,), the file of each. None for a remote corpus.
    """

    def __init__(self, location: Location, keys: NDArray[np.int64], names: NDArray[np.bytes_]) -> None:
        self.local = location.local is not None and len(keys) > 0
        self._folder = "" if location.local is None else str(location.local / CHUNK_FOLDER)
        self._keys, self._names = keys, names
        self._open = lru_cache(_OPEN_FILES)(_open_file)

    def holds(self, segment: int, shard: int) -> bool:
        return self.local and self._place(segment, shard) is not None

    def read(self, segment: int, shard: int, at: int, size: int) -> bytes | None:
        """Bytes [at, at + size) of a shard, fewer where its file ends before; None where the file is missing."""
        place = self._place(segment, shard)
        if place is None:
            return None
        try:
            file = self._open(f"{self._folder}/{self._names[place].decode('ascii')}")
        except FileNotFoundError:
            return None
        return os.pread(file.fileno(), size, at)

    def _place(self, segment: int, shard: int) -> int | None:
        key = segment << 32 | shard
        place = int(np.searchsorted(self._keys, key))
        return place if place < len(self._keys) and self._keys[place] == key else None


def _open_file(path: str) -> FileIO:
    """Closed when nobody holds it any more: another thread may be reading while it falls out of the table."""
    return open(path, "rb", buffering=0)


def shard_table(
    repository: icechunk.Repository, location: Location, snapshot: str
) -> tuple[NDArray[np.int64], NDArray[np.bytes_]]:
    """Keys and file names for `ShardFiles`; empty for a remote corpus, or one whose manifests are unknown to us."""
    found: dict[tuple[int, int], str] = {}
    if location.local is not None:
        try:
            found = shard_files(repository, snapshot, location.local)
        except (ValueError, FileNotFoundError, struct.error, RuntimeError) as error:
            log.warning("corpus %s: its shards are read through Icechunk, which is slower (%s)", location, error)
    order = sorted(found)
    keys = np.array([segment << 32 | shard for segment, shard in order], np.int64)
    return keys, np.array([found[key].encode("ascii") for key in order], "S20")


def shard_files(repository: icechunk.Repository, snapshot: str, folder: Path) -> dict[tuple[int, int], str]:
    """(segment, shard) -> name of its file in `folder`/chunks, for all shards of a snapshot.

    Raises:
        ValueError, OSError, struct.error: the manifests are not of the version described above, or damaged; the
            shards can then still be read through Icechunk.
    """
    facts = json.loads(repository.inspect_snapshot(snapshot))
    segments: dict[str, int] = {}
    manifests: set[str] = set()
    for node in facts["nodes"]:
        parent, _, name = node["path"].strip("/").rpartition("/")
        if parent == SEGMENT_GROUP:
            segments[node["id"]] = int(name)
            manifests |= {reference["id"] for reference in node["manifest_refs"]}
    found = {}
    for manifest in sorted(manifests):
        for node_id, shard, name in _references((folder / "manifests" / manifest).read_bytes()):
            if node_id in segments:
                found[segments[node_id], shard] = name
    return found


def _references(data: bytes) -> Iterator[tuple[str, int, str]]:
    """(node id, first index, chunk id) of every one-dimensional chunk that has a file of its own."""
    if data[: len(_MAGIC)] != _MAGIC or data[_SPEC] != SPECIFICATION or data[_TYPE] != _MANIFEST:
        raise ValueError("not a manifest of the version of Icechunk's specification that is known here")
    body = data[_HEADER:]
    table = _Table(zstd.decompress(body) if data[_COMPRESSION] == _ZSTD else body)
    root = table.follow(0)
    for array in table.vector(root, 1):
        node = table.inline(array, 0, 8)
        for reference in table.vector(array, 1):
            if table.field(reference, 1) or table.field(reference, 5):
                raise ValueError("a chunk that stands inside the manifest, or elsewhere")
            if table.number(reference, 2):
                raise ValueError("a chunk that does not start its file")
            index = table.vector_start(reference, 0)
            if table.u32(index) != 1:
                raise ValueError("an array of more than one dimension")
            yield _text(node), table.u32(index + 4), _text(table.inline(reference, 4, 12))


class _Table:
    """Just enough of Flatbuffers to walk over tables: positions are bytes from the start of the buffer."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def u32(self, at: int) -> int:
        return int(struct.unpack_from("<I", self.data, at)[0])

    def follow(self, at: int) -> int:
        return at + self.u32(at)

    def field(self, table: int, number: int) -> int:
        """Where field `number` of a table stands; 0 if it is left out."""
        directory = table - struct.unpack_from("<i", self.data, table)[0]
        place = 4 + 2 * number
        if place >= struct.unpack_from("<H", self.data, directory)[0]:
            return 0
        offset = struct.unpack_from("<H", self.data, directory + place)[0]
        return table + offset if offset else 0

    def number(self, table: int, number: int) -> int:
        at = self.field(table, number)
        return int(struct.unpack_from("<Q", self.data, at)[0]) if at else 0

    def inline(self, table: int, number: int, size: int) -> bytes:
        at = self.field(table, number)
        if not at or at + size > len(self.data):
            raise ValueError("a manifest without ids")
        return self.data[at : at + size]

    def vector_start(self, table: int, number: int) -> int:
        at = self.field(table, number)
        if not at:
            raise ValueError("a manifest with a missing list")
        return self.follow(at)

    def vector(self, table: int, number: int) -> Iterator[int]:
        """Positions of the tables in a list."""
        start = self.vector_start(table, number)
        for item in range(self.u32(start)):
            yield self.follow(start + 4 + 4 * item)


def _text(raw: bytes) -> str:
    """An id as Icechunk writes it: Crockford's base 32, no padding."""
    return base64.b32encode(raw).translate(_CROCKFORD).rstrip(b"=").decode("ascii")
