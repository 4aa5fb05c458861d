"""Few large segments instead of many small ones, and no room taken by what was removed.

A build that commits often leaves small segments, a removal leaves holes. `compact_corpus` writes the payloads of
such segments again, into full ones, in a new snapshot: rows and ids stay in their order, payloads stay as they are.
Older snapshots still point to the former bytes, so room is only won when they go too (`drop_history`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from rbm.corpus import store
from rbm.corpus.ahead import in_order, threads_for
from rbm.corpus.copy import packed_row
from rbm.corpus.location import Location
from rbm.corpus.reader import Corpus
from rbm.corpus.retry import retrying
from rbm.corpus.writer import CorpusWriter

SEGMENT_BYTES = 256 << 20
"""What a segment is filled to."""

SMALL = 0.25
"""A segment with less in it than this share of a full one is joined with others."""

DEAD = 0.5
"""A segment with a larger share than this of bytes that no trajectory owns is written again."""


@dataclass(frozen=True)
class Compacted:
    """What a compaction did.

    Attributes:
        moved: trajectories that were written again. segments: in use before and after.
        dead: bytes in the segments of the new snapshot that belong to no trajectory.
        dropped: snapshots that are gone. kept: tags of older ones that are not. freed: bytes deleted.
    """

    corpus: str
    snapshot: str
    moved: int
    segments: tuple[int, int]
    dead: int
    dropped: int
    kept: tuple[str, ...]
    freed: int


def compact_corpus(
    place: str | Location,
    drop_history: bool = False,
    segment_bytes: int = SEGMENT_BYTES,
    progress: Progress | None = None,
) -> Compacted:
    """Join small segments and leave out mostly dead ones, in a new snapshot.

    A kill loses at most one segment's work; run again, it goes on. With `drop_history` all snapshots but the newest
    and those with a tag are given up, and what only they had is deleted: whoever reads one of them loses it.

    Raises:
        UserError: another writer is at work; nothing was committed yet; a trajectory is damaged (repair it first).
    """
    location = Location.parse(place)
    Corpus.open(location)  # says what is wrong with the place, before a writer makes anything there
    with CorpusWriter(location, segment_bytes=segment_bytes, commit_every=None) as writer:
        corpus = Corpus.open(location, writer.snapshot)
        sizes = _segment_sizes(corpus)
        rows = rows_to_move(corpus.columns.segment, corpus.columns.length, sizes, segment_bytes)
        bar = None if progress is None else progress.add_task("moving trajectories", total=len(rows))
        fetched = in_order(partial(packed_row, corpus), rows.tolist(), threads_for(location))
        for row, packed in zip(rows.tolist(), fetched, strict=True):
            writer.move(row, packed)
            if progress is not None and bar is not None:
                progress.advance(bar)
        if len(rows) or set(sizes) - set(np.unique(corpus.columns.segment).tolist()):
            writer.drop_unused_segments()
        snapshot = writer.commit() or ""
        dropped, kept, freed = _drop_history(location) if drop_history else (0, (), 0)
    after = Corpus.open(location, snapshot)
    now = _segment_sizes(after)
    return Compacted(
        corpus=str(location),
        snapshot=snapshot,
        moved=len(rows),
        segments=(len(sizes), len(now)),
        dead=sum(now.values()) - int(after.columns.length.sum()),
        dropped=dropped,
        kept=kept,
        freed=freed,
    )


def rows_to_move(
    segment: NDArray[np.int32], length: NDArray[np.int64], sizes: dict[int, int], full: int = SEGMENT_BYTES
) -> NDArray[np.int64]:
    """Which trajectories to write again, int64, rising: those in small or mostly dead segments.

    Args:
        segment, length: of each trajectory's payload. sizes: bytes of each segment. full: bytes of a full segment.
    """
    size = np.zeros(max(sizes, default=0) + 1, np.int64)
    size[list(sizes)] = list(sizes.values())
    live = np.bincount(segment, length, minlength=len(size)).astype(np.int64)
    small = (live > 0) & (live < SMALL * full)
    dead = (live > 0) & (live < (1 - DEAD) * size)
    # One small segment alone, or ones that come out as many as they were, would be written again at every call.
    if small.sum() <= math.ceil(live[small].sum() / full):
        small[:] = False
    return np.flatnonzero((small | dead)[segment])


def _segment_sizes(corpus: Corpus) -> dict[int, int]:
    return store.segment_sizes(store.open_repository(corpus.location), corpus.location, corpus.snapshot)


def _drop_history(location: Location) -> tuple[int, tuple[str, ...], int]:
    """How many snapshots were given up, tags of older ones that were not, and bytes deleted."""
    repository = store.open_repository(location)
    tagged, newest = store.tagged(repository, location), store.resolve(repository, location, None)
    with store.writable(location):
        expire = partial(repository.expire_snapshots, datetime.now(UTC))
        left = retrying(expire, "dropping older snapshots", location, math.inf)  # of the history, tagged or not
        gone = left - {newest, *tagged.values()}
        kept = tuple(name for name, snapshot in tagged.items() if snapshot != newest)
        return len(gone), kept, store.collect_garbage(repository, location)
