"""The bytes of one trajectory: a head that describes it, then parts (frames or clips, side arrays).

Byte table in docs/corpus.md. All numbers little-endian. The head holds the whole record, the
place of every part and its CRC-32C, and has a CRC-32C itself: a flipped byte anywhere is found by
whoever reads it, and a payload can be read without the corpus around it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import google_crc32c
import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from rbm.corpus.codecs import BrokenPart, Bytes, ClipCodec, make_codec
from rbm.errors import UserError
from rbm.trajectory import ClipReader, Quality, Trajectory

MAGIC = b"RBMP"
VERSION = 1
PREFIX = struct.Struct("<4sIII")
"""Magic, bytes of the head after this prefix, bytes of its JSON, CRC-32C of the prefix so far and the head."""

_PLAIN_FIELDS = (
    "id",
    "task",
    "source",
    "fps",
    "height",
    "width",
    "messy",
    "partial_success",
    "embodiment",
    "is_robot",
    "is_sim",
    "done_index",
    "provenance",
)
_ZSTD_LEVEL = 5
_MAX_PART = 2**32 - 1
_HEAD_GUESS = 8 << 10
"""Nearly every head fits; a longer one (many views) costs a second read."""


class Stored(Protocol):
    """The bytes of a payload, wherever they are: a uint8 array, or something that reads what is sliced out of it."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Bytes: ...

    def tobytes(self) -> bytes: ...


class CorruptPayload(UserError):
    """Stored bytes of one trajectory that are damaged; says which trajectory, and which frame.

    Attributes:
        trajectory: its id. what: is wrong. corpus: path or URL, where known. otherwise: what else one can do.
    """

    def __init__(self, trajectory: str, what: str, corpus: str = "", otherwise: str = "") -> None:
        where = f" of corpus {corpus}" if corpus else ""
        super().__init__(
            f"trajectory {trajectory!r}{where} is damaged: {what}; take it out with "
            f"`rbm corpus check --repair {corpus or 'PATH'}`" + (f", or {otherwise}" if otherwise else "")
        )
        self.trajectory = trajectory
        self.what = what
        self.corpus = corpus
        self.otherwise = otherwise

    def __reduce__(self) -> tuple[type[CorruptPayload], tuple[str, str, str, str]]:
        # a worker process sends it to its parent
        return type(self), (self.trajectory, self.what, self.corpus, self.otherwise)


@dataclass(frozen=True)
class Packed:
    """A trajectory ready to be written.

    Attributes:
        trajectory: its record, without a reader.
        payload: its bytes.
        codec: of its clips.
        content: hash of its stored frames (`Head.content`).
    """

    trajectory: Trajectory
    payload: bytes
    codec: str
    content: int


@dataclass(frozen=True)
class ViewEntry:
    """Where the clip of one view stands: parts [first, first + count)."""

    name: str
    codec: str
    height: int
    width: int
    first: int
    count: int


@dataclass(frozen=True)
class ArrayEntry:
    """Where a side array stands: one part, raw or zstd."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    part: int


@dataclass(frozen=True)
class Head:
    """A parsed head: the record, and where each part lies.

    `ends` is int64 (P + 1,), bytes from the start of the payload: part p = [ends[p], ends[p+1]).
    `crcs` is uint32 (P,).
    """

    trajectory: Trajectory
    views: tuple[ViewEntry, ...]
    arrays: tuple[ArrayEntry, ...]
    ends: NDArray[np.int64]
    crcs: NDArray[np.uint32]

    @property
    def content(self) -> int:
        """64-bit hash of the stored frames of all views, by their sizes and checksums: copies of a clip share it."""
        parts = sum(view.count for view in self.views)
        return content_hash(np.diff(self.ends[: parts + 1]).astype(np.uint32), self.crcs[:parts])


def pack(
    trajectory: Trajectory,
    frames: Mapping[str, NDArray[np.uint8]],
    arrays: Mapping[str, NDArray] | None = None,
    codec: str | ClipCodec = "jpeg",
) -> Packed:
    """Encode the clips and lay everything end to end.

    `frames` has one uint8 (T, H, W, 3) RGB clip for each of `trajectory.views`, T = its stored
    frames; the first view has the record's height and width, others may differ. `arrays` are
    numbers of any shape (`action` (N, A), ...).

    Raises:
        UserError: a clip is missing, or has another shape or dtype; an array holds no numbers.
    """
    clip_codec = make_codec(codec)
    _check_frames(trajectory, frames)
    parts: list[bytes] = []
    views: list[dict[str, object]] = []
    for view in trajectory.views:
        clip = frames[view]
        encoded = clip_codec.encode(clip, trajectory.fps)
        size = {"height": clip.shape[1], "width": clip.shape[2]}
        views.append({"name": view, "codec": clip_codec.name, **size, "parts": len(encoded)})
        parts += encoded
    sides: list[dict[str, object]] = []
    for name, array in (arrays or {}).items():
        entry, data = _pack_array(trajectory.id, name, array)
        sides.append(entry)
        parts.append(data)
    payload, content = _assemble(trajectory, views, sides, parts)
    return Packed(replace(trajectory, reader=None), payload, clip_codec.name, content)


def content_hash(sizes: NDArray[np.uint32], crcs: NDArray[np.uint32]) -> int:
    """Hash of clips from the sizes and CRC-32Cs of their parts, uint32 (P,) each; never 0, which means unknown."""
    raw = sizes.astype("<u4").tobytes() + crcs.astype("<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") or 1


def repack(payload: Payload, clips: Mapping[str, NDArray[np.uint8]], codec: str | ClipCodec) -> Packed:
    """The same trajectory with other clips (another codec or size); all else as it is."""
    old = payload.head.trajectory
    first = clips[old.views[0]]
    record = replace(old, reader=None, height=first.shape[1], width=first.shape[2])
    return pack(record, clips, {entry.name: payload.array(entry.name) for entry in payload.head.arrays}, codec)


def read_head(data: Stored, name: str, reader: ClipReader | None = None) -> Head:
    """Read and check the head at the start of a payload, and no more of it; `name` stands in errors.

    Raises:
        CorruptPayload: magic, sizes or checksum do not hold. UserError: written by a newer version.
    """
    first = data[:_HEAD_GUESS]
    if len(first) < PREFIX.size:
        raise CorruptPayload(name, "its header is cut short")
    magic, head_bytes, json_bytes, crc = PREFIX.unpack(first[: PREFIX.size].tobytes())
    if magic != MAGIC:
        raise CorruptPayload(name, "no payload starts where the index says")
    start = PREFIX.size
    if head_bytes + start > len(data) or json_bytes > head_bytes:
        raise CorruptPayload(name, "its header has impossible sizes")
    if head_bytes + start > len(first):
        first = data[: head_bytes + start]
    if _head_crc(first[: start - 4], first[start : start + head_bytes]) != crc:
        raise CorruptPayload(name, "the checksum of its header does not match")
    facts = json.loads(first[start : start + json_bytes].tobytes())
    if facts["version"] > VERSION:
        raise UserError(
            f"trajectory {name!r} was written by a newer rbm (payload version {facts['version']}, "
            f"this one reads up to {VERSION}): upgrade robot-rbm"
        )
    tables = first[start + json_bytes : start + head_bytes]
    head = _parse_tables(facts, tables, start + head_bytes, reader)
    if head.ends[-1] != len(data):
        raise CorruptPayload(name, f"it is {len(data)} bytes long, its header says {head.ends[-1]}")
    return head


class Payload:
    """One payload; decodes what is asked for, and reads and checks the parts that this takes.

    Raises:
        CorruptPayload, UserError: as `read_head`.
    """

    def __init__(self, data: Stored, name: str, reader: ClipReader | None = None) -> None:
        self.name = name
        self.data = data
        self.head = read_head(data, name, reader)

    def frames(
        self, indices: NDArray[np.integer] | None = None, view: str | None = None, min_side: int | None = None
    ) -> NDArray[np.uint8]:
        """Stored frames, uint8 (T, H, W, 3), RGB, in the order asked for; repeats are allowed.

        With `min_side` the frames may come smaller, where the codec decodes such faster, with a short side of at
        least so many pixels.

        Raises:
            CorruptPayload: naming the frame. UserError: no such view. IndexError: no such frame.
        """
        entry = self._view(view)
        codec = make_codec(entry.codec)
        n_frames = self.head.trajectory.n_frames
        asked = np.arange(n_frames) if indices is None else np.asarray(indices, np.int64).reshape(-1)
        if len(asked) and (asked.min() < 0 or asked.max() >= n_frames):
            raise IndexError(f"trajectory {self.name!r} has {n_frames} frames, asked for {asked.tolist()}")
        unique, back = np.unique(asked, return_inverse=True)
        try:
            decoded = codec.decode(
                lambda part: self._part(entry.first + part, _part_name(entry, part)),
                unique,
                entry.height,
                entry.width,
                min_side,
            )
        except BrokenPart as error:
            raise CorruptPayload(self.name, f"{_part_name(entry, error.part)} {error.reason}") from error
        return decoded if np.array_equal(unique, asked) else decoded[back]

    def array(self, name: str) -> NDArray:
        """The side array `name`, as it was given.

        Raises:
            UserError: there is none of this name. CorruptPayload: it is damaged.
        """
        for entry in self.head.arrays:
            if entry.name == name:
                break
        else:
            names = ", ".join(self.array_names()) or "none"
            raise UserError(f"trajectory {self.name!r} has no array {name!r}; it has: {names}")
        data = self._part(entry.part, f"array {name!r}").tobytes()
        if entry.codec == "zstd":
            try:
                data = zstd.decompress(data)
            except RuntimeError as error:
                raise CorruptPayload(self.name, f"array {name!r} does not unpack: {error}") from error
        return np.frombuffer(data, entry.dtype).reshape(entry.shape).copy()

    def array_names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.head.arrays)

    def verify(self) -> None:
        """Check every part's checksum without decoding anything.

        Raises:
            CorruptPayload: naming the first damaged part.
        """
        for entry in self.head.views:
            for part in range(entry.count):
                self._part(entry.first + part, _part_name(entry, part))
        for side in self.head.arrays:
            self._part(side.part, f"array {side.name!r}")

    def _view(self, view: str | None) -> ViewEntry:
        if view is None:
            return self.head.views[0]
        for entry in self.head.views:
            if entry.name == view:
                return entry
        names = ", ".join(entry.name for entry in self.head.views)
        raise UserError(f"trajectory {self.name!r} has no view {view!r}; it has: {names}")

    def _part(self, part: int, what: str) -> Bytes:
        data = self.data[self.head.ends[part] : self.head.ends[part + 1]]
        if google_crc32c.value(data) != self.head.crcs[part]:
            raise CorruptPayload(self.name, f"the checksum of {what} does not match")
        return data


def _part_name(entry: ViewEntry, part: int) -> str:
    where = f"frame {part}" if entry.count > 1 or entry.codec == "jpeg" else "the clip"
    return f"{where} of view {entry.name!r}"


def _check_frames(trajectory: Trajectory, frames: Mapping[str, NDArray[np.uint8]]) -> None:
    def require(good: bool, what: str) -> None:
        if not good:
            raise UserError(f"trajectory {trajectory.id!r}: {what}")

    require(set(frames) == set(trajectory.views), f"has clips {sorted(frames)}, its views are {trajectory.views}")
    for number, view in enumerate(trajectory.views):
        clip = frames[view]
        good = clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[3] == 3 and min(clip.shape) > 0
        require(good, f"frames of view {view!r} are {clip.dtype} {clip.shape}, need uint8 (T, H, W, 3)")
        require(
            len(clip) == trajectory.n_frames,
            f"view {view!r} has {len(clip)} frames, frame_index has {trajectory.n_frames}",
        )
        if number == 0:
            require(
                clip.shape[1:3] == (trajectory.height, trajectory.width),
                f"frames are {clip.shape[1]}x{clip.shape[2]}, the record says {trajectory.height}x{trajectory.width}",
            )


def _pack_array(trajectory: str, name: str, array: NDArray) -> tuple[dict[str, object], bytes]:
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":
        raise UserError(f"trajectory {trajectory!r}: array {name!r} has dtype {array.dtype}, need numbers")
    dtype = array.dtype.newbyteorder("<")
    raw = np.ascontiguousarray(array, dtype).tobytes()
    packed = zstd.compress(raw, _ZSTD_LEVEL) if raw else raw
    small = len(packed) < len(raw)
    entry: dict[str, object] = {"name": name, "dtype": dtype.str}
    entry |= {"shape": list(array.shape), "codec": "zstd" if small else "raw"}
    return entry, packed if small else raw


def _assemble(
    trajectory: Trajectory, views: list[dict[str, object]], arrays: list[dict[str, object]], parts: list[bytes]
) -> tuple[bytes, int]:
    """The payload, and the hash of its clips."""
    if any(len(part) > _MAX_PART for part in parts):
        raise UserError(f"trajectory {trajectory.id!r}: one clip or array is over 4 GiB")
    facts: dict[str, object] = {name: _plain(getattr(trajectory, name)) for name in _PLAIN_FIELDS}
    facts |= {"version": VERSION, "quality": trajectory.quality.value, "n_frames": trajectory.n_frames}
    facts |= {"dense": trajectory.progress is not None, "views": views, "arrays": arrays}
    try:
        text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"trajectory {trajectory.id!r}: a name or text in it is not valid Unicode") from error
    tables = [trajectory.frame_index.astype("<i4").tobytes(), trajectory.timestamp.astype("<f4").tobytes()]
    if trajectory.progress is not None:
        tables.append(trajectory.progress.astype("<f4").tobytes())
    sizes = np.array([len(part) for part in parts], "<u4")
    crcs = np.array([google_crc32c.value(part) for part in parts], "<u4")
    tables += [sizes.tobytes(), crcs.tobytes()]
    clips = len(parts) - len(arrays)
    head = text + b"".join(tables)
    prefix = PREFIX.pack(MAGIC, len(head), len(text), 0)[:-4]
    crc = google_crc32c.extend(google_crc32c.value(prefix), head)
    whole = b"".join([prefix, struct.pack("<I", crc), head, *parts])
    return whole, content_hash(sizes[:clips], crcs[:clips])


def _parse_tables(facts: dict, tables: Bytes, start: int, reader: ClipReader | None) -> Head:
    """`tables` are the head's bytes after its JSON; `start` is where the first part begins."""
    taken = 0

    def take(dtype: str, count: int) -> NDArray:
        nonlocal taken
        taken += 4 * count
        return np.frombuffer(tables[taken - 4 * count : taken].tobytes(), dtype)

    n_frames = facts["n_frames"]
    frame_index = take("<i4", n_frames)
    timestamp = take("<f4", n_frames)
    progress = take("<f4", n_frames) if facts["dense"] else None
    first = 0
    views = []
    for view in facts["views"]:
        views.append(ViewEntry(view["name"], view["codec"], view["height"], view["width"], first, view["parts"]))
        first += view["parts"]
    arrays = []
    for side in facts["arrays"]:
        arrays.append(ArrayEntry(side["name"], side["dtype"], tuple(side["shape"]), side["codec"], first))
        first += 1
    sizes = take("<u4", first)
    crcs = take("<u4", first)
    trajectory = Trajectory(
        **{name: facts[name] for name in _PLAIN_FIELDS},
        quality=Quality(facts["quality"]),
        frame_index=frame_index,
        timestamp=timestamp,
        progress=progress,
        views=tuple(view.name for view in views),
        reader=reader,
    )
    ends = start + np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return Head(trajectory, tuple(views), tuple(arrays), ends, crcs)


def _plain(value: object) -> object:
    """numpy numbers as Python's own, for JSON."""
    return value.item() if isinstance(value, np.generic) else value


def _head_crc(prefix: Bytes, head: Bytes) -> int:
    return google_crc32c.extend(google_crc32c.value(prefix), head)
