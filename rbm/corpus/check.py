"""Is every byte of a corpus as it was written, and if not, what is lost: `rbm corpus check`.

1. The index is read from the store (its chunks carry checksums), and the local cache of it compared.
2. Numbers in it must point somewhere: into the tables, into segments that are there, no two at the same bytes.
3. Every shard must be there; every payload is read: its head, every checksum, and its record against the columns.

What is wrong is named and gathered, not raised. `repair` then makes a snapshot without the damaged trajectories.
"""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from rbm.corpus import cache, layout, store
from rbm.corpus.ahead import in_order, threads_for
from rbm.corpus.location import Location
from rbm.corpus.payload import CorruptPayload, Head, Payload
from rbm.corpus.reader import Corpus, DamagedIndex, cache_key, read_index
from rbm.corpus.retry import reason
from rbm.errors import UserError
from rbm.trajectory import Quality, completion_index

_ROWS_AT_ONCE = 16
"""What a thread takes: payloads one after another as they lie."""

_CRC = 4


@dataclass(frozen=True)
class BadTrajectory:
    """One that can not be trusted: its number in the snapshot, its id, what is wrong with it."""

    row: int
    id: str
    what: str


@dataclass(frozen=True)
class BadShard:
    """An object of payloads that is missing or damaged.

    Attributes:
        name: its key in the store, `segments/<segment>/c/<shard>`.
        ids: the trajectories in it that are bad.
        rows: the others in it, which can be read.
    """

    name: str
    what: str
    ids: tuple[str, ...]
    rows: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Report:
    """What a check of one snapshot found.

    Attributes:
        snapshot: empty where the file that names the newest is damaged.
        trajectories, bytes: that were read. decoded: whether frames were, too.
        index: what is wrong with the index as a whole; where it can not be read at all, nothing else is known.
        cache_damaged: the local copy of the index differs from the store's.
        shards, bad: missing or damaged objects; trajectories, in the order of the corpus.
    """

    corpus: str
    snapshot: str
    trajectories: int = 0
    bytes: int = 0
    decoded: bool = False
    index: tuple[str, ...] = ()
    cache_damaged: bool = False
    shards: tuple[BadShard, ...] = ()
    bad: tuple[BadTrajectory, ...] = ()

    @property
    def clean(self) -> bool:
        return not (self.index or self.cache_damaged or self.shards or self.bad)

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self) | {"clean": self.clean}
        facts["shards"] = [{"name": shard.name, "what": shard.what, "ids": shard.ids} for shard in self.shards]
        return facts


def check_corpus(
    place: str | Location, snapshot: str | None = None, decode: bool = False, progress: Progress | None = None
) -> Report:
    """Check a snapshot (id or tag; the newest by default), with every frame decoded as well if `decode`.

    Raises:
        UserError: no corpus there, a newer format; it can not be reached.
    """
    location = Location.parse(place)
    try:
        repository = store.open_repository(location)
    except store.DamagedReference as error:
        return Report(str(location), "", index=(str(error),))
    wanted = store.resolve(repository, location, snapshot)
    try:
        index = read_index(repository, location, wanted)
    except DamagedIndex as error:
        return Report(str(location), wanted, index=(str(error),))
    corpus = Corpus(location, wanted, index)
    segments = store.segment_sizes(repository, location, wanted)
    bad = _bad_rows(corpus, segments)
    todo = np.setdiff1d(np.arange(len(corpus)), list(bad))
    columns = corpus.columns
    todo = todo[np.lexsort((columns.offset[todo], columns.segment[todo]))]
    bar = (
        None if progress is None else progress.add_task("checking trajectories", total=len(corpus), completed=len(bad))
    )
    blocks = [todo[first : first + _ROWS_AT_ONCE] for first in range(0, len(todo), _ROWS_AT_ONCE)]
    results = in_order(lambda rows: _check_rows(corpus, rows, decode), blocks, threads_for(location))
    for block, found in zip(blocks, results, strict=True):
        bad |= found
        if progress is not None and bar is not None:
            progress.advance(bar, len(block))
    bad |= _overlapping(corpus, todo[~np.isin(todo, list(bad))])
    return Report(
        corpus=str(location),
        snapshot=wanted,
        trajectories=len(corpus),
        bytes=int(columns.length.sum()),
        decoded=decode,
        index=_repeated_ids(corpus),
        cache_damaged=_cache_differs(location, wanted, index),
        shards=tuple(_bad_shards(corpus, segments, todo, bad)),
        bad=tuple(BadTrajectory(row, corpus.ids[row], bad[row]) for row in sorted(bad)),
    )


def check_payload(corpus: Corpus, row: int, decode: bool = False) -> str:
    """What is wrong with one trajectory; empty if nothing is.

    Raises:
        UserError: its bytes can not be reached, or are of a newer version; so nothing can be said about them.
    """
    name = corpus.ids[row]
    try:
        payload = Payload(corpus.payload_bytes(row), name)
        payload.verify()
        wrong = _against_index(corpus, row, payload.head)
        if decode and not wrong:
            for view in payload.head.views:
                payload.frames(view=view.name)
            for array in payload.head.arrays:
                payload.array(array.name)
    except CorruptPayload as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno != errno.EIO:
            raise UserError(f"corpus {corpus.location}: can not be read: {reason(error.__cause__)}") from error
        return error.what
    except (ValueError, KeyError, TypeError) as error:
        return f"its record breaks the format: {error}"
    return wrong


def _check_rows(corpus: Corpus, rows: NDArray[np.int64], decode: bool) -> dict[int, str]:
    found = {int(row): check_payload(corpus, int(row), decode) for row in rows}
    return {row: what for row, what in found.items() if what}


def _against_index(corpus: Corpus, row: int, head: Head) -> str:
    """The first column that says something else than the record."""
    record, columns = head.trajectory, corpus.columns
    success = record.quality is Quality.SUCCESSFUL
    cutoff = corpus.sources[record.source].completion if record.source in corpus.sources else None
    partial = columns.partial_success[row]
    known = int(columns.content[row])
    pairs = {
        "id": (corpus.ids[row], record.id),
        "task": (corpus.tasks[int(columns.task[row])].text, record.task),
        "source": (list(corpus.sources)[columns.source[row]], record.source),
        "embodiment": (corpus.embodiments[columns.embodiment[row]], record.embodiment),
        "quality": (columns.quality[row], record.quality.rank),
        "n_frames": (columns.n_frames[row], record.n_frames),
        "done": (columns.done[row], completion_index(record, cutoff) if success else -1),
        "done_known": (columns.done_known[row], record.done_index is not None),
        "messy": (columns.messy[row], record.messy),
        "dense": (columns.dense[row], record.progress is not None),
        "is_robot": (columns.is_robot[row], record.is_robot),
        "is_sim": (columns.is_sim[row], record.is_sim),
        "partial_success": (
            None if np.isnan(partial) else partial,
            None if record.partial_success is None else np.float32(record.partial_success),
        ),
        "content": (known, head.content if known else 0),
    }
    for name, (index, stored) in pairs.items():
        if index != stored:
            return f"the index says {name} {index}, its record {stored}"
    return ""


def _bad_rows(corpus: Corpus, segments: dict[int, int]) -> dict[int, str]:
    """Rows whose numbers point nowhere, so that their payloads can not even be looked for."""
    columns = corpus.columns
    limits: dict[str, tuple[NDArray[np.integer], int]] = {
        "task": (columns.task, len(corpus.tasks)),
        "source": (columns.source, len(corpus.sources)),
        "embodiment": (columns.embodiment, len(corpus.embodiments)),
        "quality": (columns.quality, len(Quality)),
    }
    bad = {}
    for name, (codes, count) in limits.items():
        for row in np.flatnonzero((codes < 0) | (codes >= count)).tolist():
            bad[row] = f"the index says {name} number {codes[row]}, there are {count}"
    sizes = np.zeros(max(segments, default=0) + 2, np.int64)  # one more, for what is out of range
    sizes[list(segments)] = list(segments.values())
    size = sizes[np.where((columns.segment >= 0) & (columns.segment < len(sizes)), columns.segment, -1)]
    end = columns.offset + columns.length
    for row in np.flatnonzero((columns.offset < 0) | (columns.length <= 0) | (end > size)).tolist():
        bad[row] = f"the index says bytes {columns.offset[row]} to {end[row]} of segment {columns.segment[row]}, " + (
            f"which has {size[row]}" if size[row] else "which is not there"
        )
    return bad


def _overlapping(corpus: Corpus, rows: NDArray[np.int64]) -> dict[int, str]:
    """Of rows that are good by themselves, in the order in which they lie, those that begin inside another."""
    columns = corpus.columns
    before, after = rows[:-1], rows[1:]
    inside = columns.offset[before] + columns.length[before] > columns.offset[after]
    inside &= columns.segment[before] == columns.segment[after]
    pairs = zip(before[inside].tolist(), after[inside].tolist(), strict=True)
    return {late: f"the index puts it where {corpus.ids[early]!r} lies" for early, late in pairs}


def _repeated_ids(corpus: Corpus) -> tuple[str, ...]:
    counts = Counter(corpus.ids)
    return tuple(f"{count} trajectories have the id {id!r}" for id, count in counts.items() if count > 1)


def _bad_shards(
    corpus: Corpus, segments: dict[int, int], rows: NDArray[np.int64], bad: dict[int, str]
) -> Iterator[BadShard]:
    """Of the shards in which these rows lie (in the order in which they lie): those that are not there as a whole."""
    shard_bytes, columns = layout.SHARD_BYTES, corpus.columns
    first = columns.segment[rows].astype(np.int64) << 32 | columns.offset[rows] // shard_bytes
    last = first + (columns.offset[rows] % shard_bytes + columns.length[rows] - 1) // shard_bytes
    longest = int((last - first).max(initial=0))
    for key in np.unique([np.minimum(first + further, last) for further in range(longest + 1)]).tolist():
        segment, shard = key >> 32, key & 0xFFFFFFFF
        what = _shard_problem(corpus, segment, shard, min(shard_bytes, segments[segment] - shard * shard_bytes))
        if what:
            near = slice(*np.searchsorted(first, [key - longest, key + 1]))
            inside = np.sort(rows[near][last[near] >= key]).tolist()
            ids = tuple(corpus.ids[row] for row in inside if row in bad)
            yield BadShard(layout.shard_key(segment, shard), what, ids, tuple(row for row in inside if row not in bad))


def _shard_problem(corpus: Corpus, segment: int, shard: int, size: int) -> str:
    """Looks at the end of a shard of `size` bytes of payloads: zarr's index of inner chunks, and its checksum."""
    inner = layout.INNER_CHUNK_BYTES
    start = -(-size // inner) * inner
    length = layout.SHARD_BYTES // inner * 16 + _CRC
    try:
        data = corpus.read_shard(segment, shard, start, length)
    except (OSError, *store.STORE_ERRORS) as error:
        return f"can not be read: {reason(error)}"
    if data is None:
        return "missing"
    if len(data) < length:
        return "cut short"
    if google_crc32c.value(data[:-_CRC]) != int.from_bytes(data[-_CRC:], "little"):
        return "the checksum of its chunk index does not match: rbm can read it, plain zarr can not"
    return ""


def _cache_differs(location: Location, snapshot: str, index: cache.Index) -> bool:
    """Whether the local copy is there and not what the store has."""
    kept = cache.load(cache_key(location, snapshot))
    if kept is None:
        return False
    if kept.facts != json.loads(json.dumps(index.facts)) or set(kept.arrays) != set(index.arrays):
        return True
    return any(_bytes_differ(kept.arrays[name], array) for name, array in index.arrays.items())


def _bytes_differ(a: NDArray, b: NDArray) -> bool:
    return a.dtype != b.dtype or a.shape != b.shape or not np.array_equal(a.view(np.uint8), b.view(np.uint8))
