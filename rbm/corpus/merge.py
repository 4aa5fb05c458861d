"""One corpus out of several, payload for payload as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from rbm.corpus import store
from rbm.corpus.ahead import in_order, threads_for
from rbm.corpus.copy import as_packed, naming
from rbm.corpus.location import Location
from rbm.corpus.payload import PREFIX, CorruptPayload, Packed
from rbm.corpus.reader import Corpus
from rbm.corpus.retry import read_session, retrying
from rbm.corpus.tables import SourceInfo, merge_tasks
from rbm.corpus.writer import CorpusWriter
from rbm.errors import UserError
from rbm.trajectory import Task

Conflict = Literal["error", "skip", "replace"]

_SEGMENT_BYTES = 256 << 20
_COMPARED_AT_ONCE = 256
_NAMED = 5
"""Ids that an error lists."""


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        added, replaced: trajectories written.
        present: passed over, since the same payload was there.
        skipped: passed over, since another was there (`conflict="skip"`, or one that a later source replaces).
        damaged: ids of trajectories that were left out, each with what is wrong with it.
    """

    corpus: str
    snapshot: str
    added: int
    replaced: int
    present: int
    skipped: int
    damaged: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"damaged": [{"id": id, "what": what} for id, what in self.damaged]}


def merge_corpora(
    destination: str | Location,
    sources: Sequence[str | Location | Corpus],
    conflict: Conflict = "error",
    skip_damaged: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Add all trajectories of `sources` to a corpus, which is made if it is not there; tasks and sources are joined.

    A trajectory whose id is there with the same payload is passed over, so a merge that was broken off goes on
    when it is run again. One whose id is there with another payload (in the destination, or in an earlier source)
    is a conflict:

    * `error`: nothing is written, the ids are named
    * `skip`: what was there first stays
    * `replace`: what comes last stays; older snapshots keep the former

    Payloads are told apart by their length, the hash of their frames and the checksum of their head. Every checksum
    is verified before a payload is written: a damaged one stops the merge (what was committed until then stays), or
    with `skip_damaged` is left out and named.

    Raises:
        UserError: a conflict; cut-offs of a source or scenes of a task contradict each other. Nothing is written.
        CorruptPayload: a trajectory of a source is damaged.
    """
    place = Location.parse(destination)
    opened = [source if isinstance(source, Corpus) else Corpus.open(source) for source in sources]
    for source in opened:
        if source.location == place:
            raise UserError(f"corpus {place} is the destination: leave it out of the sources")
    old = _existing(place)
    everything = opened if old is None else [old, *opened]
    infos, tasks = _joined_sources(everything), _joined_tasks(everything)
    rows, present, skipped = _divide(old, opened, conflict, place)
    bar = None
    if progress is not None:
        bar = progress.add_task("merging trajectories", total=sum(map(len, rows)))
    added = replaced = 0
    damaged: list[tuple[str, str]] = []
    with CorpusWriter(place, segment_bytes=_SEGMENT_BYTES, commit_every=None) as writer:
        if writer.snapshot != (None if old is None else old.snapshot):
            raise UserError(f"corpus {place}: was written to a moment ago: run the same command again")
        for info in infos.values():
            writer.add_source(info.name, info.completion, **info.facts)
        for task in tasks.values():
            writer.add_task(task)
        for source, wanted in zip(opened, rows, strict=True):
            for packed in in_order(partial(_fetch, source), wanted.tolist(), threads_for(source.location)):
                if isinstance(packed, Packed):
                    id = packed.trajectory.id
                    replaces = id in writer.ids
                    if replaces:
                        writer.remove([id])
                    writer.add_packed(packed)
                    added, replaced = added + (not replaces), replaced + replaces
                elif skip_damaged:
                    damaged.append((packed.trajectory, packed.what))
                else:
                    with naming(source, "leave it out with --skip-damaged"):
                        raise packed
                if progress is not None and bar is not None:
                    progress.advance(bar)
        snapshot = writer.commit()
    return Merged(str(place), snapshot or "", added, replaced, present, skipped, tuple(damaged))


def _fetch(source: Corpus, row: int) -> Packed | CorruptPayload:
    try:
        return as_packed(source.payload(row))
    except CorruptPayload as error:
        return error


def _existing(place: Location) -> Corpus | None:
    """The destination as it is; None where nothing was committed yet."""
    if place.local is not None:
        there = store.is_repository(place.local)
    else:
        there = retrying(place.holds_repository, "looking for it", place)
    if not there:
        return None
    repository = store.open_repository(place)
    with store.readable(place):
        root = store.open_root(read_session(repository, None, place), place)
    return None if root is None else Corpus.open(place)


def _joined_sources(corpora: list[Corpus]) -> dict[str, SourceInfo]:
    """By name; facts add up, and where two say different things the first one's stay."""
    joined: dict[str, SourceInfo] = {}
    for corpus in corpora:
        for name, info in corpus.sources.items():
            known = joined.setdefault(name, info)
            if known.completion != info.completion:
                raise UserError(
                    f"corpus {corpus.location}: source {name!r} has completion cut-off {info.completion}, in another "
                    f"corpus of this merge it is {known.completion}: build one of them again under another source name"
                )
            joined[name] = SourceInfo(name, known.completion, info.facts | known.facts)
    return joined


def _joined_tasks(corpora: list[Corpus]) -> dict[str, Task]:
    joined: dict[str, Task] = {}
    for corpus in corpora:
        for task in corpus.tasks:
            try:
                joined[task.text] = merge_tasks(joined.get(task.text, task), task)
            except UserError as error:
                raise UserError(f"corpus {corpus.location} does not go together with the others: {error}") from error
    return joined


def _divide(
    old: Corpus | None, sources: list[Corpus], conflict: Conflict, place: Location
) -> tuple[list[NDArray[np.int64]], int, int]:
    """The rows that each source gives, so that each id has one holder; how many were passed over: as the same, as
    others."""
    corpora = sources if old is None else [old, *sources]
    ranked = corpora[::-1] if conflict == "replace" else corpora
    held = [np.ones(len(corpus), bool) for corpus in ranked]
    present = skipped = 0
    clashes: list[str] = []
    for number, (corpus, mine) in enumerate(zip(ranked, held, strict=True)):
        ids = list(corpus.ids)
        for better, theirs in zip(ranked[:number], held[:number], strict=True):
            found = better.ids.find_many(ids)
            rows = np.flatnonzero(mine & (found >= 0))
            rows = rows[theirs[found[rows]]]
            mine[rows] = False
            same = _same(corpus, rows, better, found[rows])
            present += int(same.sum())
            if corpus is old:  # the last in rank: what a source would put in its place
                theirs[found[rows[same]]] = False
            else:
                skipped += int((~same).sum())
            if conflict == "error":
                clashes += [ids[row] for row in rows[~same].tolist()]
    if clashes:
        names = ", ".join(map(repr, clashes[:_NAMED])) + (", ..." if len(clashes) > _NAMED else "")
        raise UserError(
            f"corpus {place}: ids that stand for different trajectories: {len(clashes)} ({names}); nothing was "
            "written: say --conflict skip to keep the first of each, or --conflict replace to take the last"
        )
    masks = held[::-1] if conflict == "replace" else held
    return [np.flatnonzero(mine) for mine in masks[-len(sources) :]], present, skipped


def _same(a: Corpus, rows_a: NDArray[np.int64], b: Corpus, rows_b: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the payloads of pairs of rows are the same."""
    same = a.columns.length[rows_a] == b.columns.length[rows_b]
    contents = a.columns.content[rows_a], b.columns.content[rows_b]
    same &= (contents[0] == contents[1]) | (contents[0] == 0) | (contents[1] == 0)
    todo = np.flatnonzero(same)
    blocks = [todo[first : first + _COMPARED_AT_ONCE] for first in range(0, len(todo), _COMPARED_AT_ONCE)]
    threads = max(threads_for(a.location), threads_for(b.location))

    def compare(block: NDArray[np.int64]) -> list[bool]:
        pairs = zip(rows_a[block].tolist(), rows_b[block].tolist(), strict=True)
        return [_prefix(a, left) == _prefix(b, right) for left, right in pairs]

    for block, equal in zip(blocks, in_order(compare, blocks, threads), strict=True):
        same[block] = equal
    return same


def _prefix(corpus: Corpus, row: int) -> bytes:
    """Sizes and checksum of a payload's head, which holds the checksums of all else; empty where it is missing."""
    try:
        return corpus.payload_bytes(row, PREFIX.size).tobytes()
    except CorruptPayload:
        return b""
