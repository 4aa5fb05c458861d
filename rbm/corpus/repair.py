"""Making a corpus whole again after damage: `rbm corpus check --repair`.

All of it under the writer's lock. Nothing that could still be read is deleted: damaged trajectories go in a new
snapshot, older ones keep them; a snapshot whose index is lost is left, the branch just points to an earlier one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import icechunk
from rich.progress import Progress

from rbm.corpus import cache, layout, store
from rbm.corpus.check import Report, check_corpus
from rbm.corpus.copy import packed_row
from rbm.corpus.history import count
from rbm.corpus.location import Location
from rbm.corpus.lock import WriterLock
from rbm.corpus.reader import Corpus, DamagedIndex, cache_key, read_index
from rbm.corpus.retry import reason, retrying, timeout
from rbm.corpus.writer import CorpusWriter
from rbm.errors import UserError

_BACKUP = "restore it from a backup, or make another from one with `rbm corpus merge`, or build it again"


@dataclass(frozen=True)
class Repair:
    """What was found and done.

    Attributes:
        report: of the check, of the snapshot that was the newest readable one.
        snapshot: the newest now.
        lost_snapshot: the one whose index can not be read, from which the branch was set back; empty if none was.
        lost_trajectories: that it had, all in all; None: not known.
        lost_ids: trajectories that only it had, where a local copy of its index tells; None: not known.
        reference_made: the file that names the newest snapshot was damaged.
        removed, moved: damaged trajectories that are gone; whole ones that were taken out of a damaged shard.
        cache_made: the local copy of the index was damaged and is made again.
        collected: bytes deleted that dead writers had left. After a set-back nothing is, since the bytes of what was
            lost may be among them. None: an old snapshot can not be read, so what is garbage is not known.
    """

    report: Report
    snapshot: str
    lost_snapshot: str
    lost_trajectories: int | None
    lost_ids: tuple[str, ...] | None
    reference_made: bool
    removed: int
    moved: int
    cache_made: bool
    collected: int | None

    def to_json(self) -> dict[str, Any]:
        facts = {name: value for name, value in vars(self).items() if name != "report"}
        return facts | {"report": self.report.to_json()}


def repair_corpus(place: str | Location, decode: bool = False, progress: Progress | None = None) -> Repair:
    """Check the newest snapshot and mend what is wrong with it (see `Repair`).

    Raises:
        UserError: another writer is at work; no snapshot with trajectories can be read; every trajectory is damaged
            (a disk that is not there looks like that): then nothing is changed.
    """
    location = Location.parse(place)
    try:
        return _repair(location, decode, progress)
    except (DamagedIndex, store.DamagedStore) as error:
        what = "" if error.__cause__ is None else f" ({reason(error.__cause__)})"
        raise UserError(f"corpus {location}: can not be repaired{what}: {_BACKUP}") from error


def _repair(location: Location, decode: bool, progress: Progress | None) -> Repair:
    if location.local is None or not store.is_repository(location.local):
        store.open_repository(location)  # says what is there instead
    with WriterLock(location), store.writable(location), _mended_reference(location) as reference_made:
        lost = _set_back(location, reference_made)
    with CorpusWriter(location, segment_bytes=256 << 20, commit_every=None) as writer:
        collected = 0 if lost.snapshot or reference_made else _collect_garbage(location)
        report = check_corpus(location, writer.snapshot, decode, progress)
        if report.bad and len(report.bad) == report.trajectories:
            raise UserError(
                f"corpus {location}: every trajectory is damaged ({report.bad[0].what}), so nothing was changed: "
                f"see that its disk is there and whole, or {_BACKUP}"
            )
        if report.cache_damaged:
            _make_cache(location, report.snapshot)
        corpus = Corpus.open(location, report.snapshot)
        sound = sorted({row for shard in report.shards for row in shard.rows})
        for row in sound:
            writer.move(row, packed_row(corpus, row))
        damaged = {bad.id for bad in report.bad}
        writer.remove(damaged & writer.ids)
        if sound:
            writer.drop_unused_segments()
        writer.commit()
        snapshot = writer.snapshot or ""
    return Repair(
        report=report,
        snapshot=snapshot,
        lost_snapshot=lost.snapshot,
        lost_trajectories=lost.trajectories,
        lost_ids=lost.ids,
        reference_made=reference_made,
        removed=len(damaged),
        moved=len(sound),
        cache_made=report.cache_damaged,
        collected=collected,
    )


@dataclass(frozen=True)
class _Lost:
    """The snapshot that can not be read; its trajectories, and the ids that only it had, where these are known."""

    snapshot: str = ""
    trajectories: int | None = None
    ids: tuple[str, ...] | None = None


def _set_back(location: Location, anywhere: bool) -> _Lost:
    """Where the newest snapshot has no readable index (or the branch points `anywhere`): point the branch to the newest
    that has one. Not to one without trajectories, unless nothing else was lost: nobody may take that for a repair."""
    repository = store.open_repository(location)
    newest = store.resolve(repository, location, None)
    if not anywhere and _index(repository, location, newest) is not None:
        return _Lost()
    earlier = _by_time(repository, location) if anywhere else _earlier(repository, location)
    all_readable = anywhere and len(earlier) + 1 == len(_snapshot_names(location))
    for snapshot in earlier:
        index = _index(repository, location, snapshot)
        if index is not None and (all_readable or len(index.arrays[layout.ID_END])):
            retrying(partial(repository.reset_branch, layout.BRANCH, snapshot), "setting it back", location)
            return _Lost() if anywhere else _what_was_lost(repository, newest, index, location)
        all_readable = all_readable and index is not None
    raise UserError(f"corpus {location}: no snapshot with trajectories can be read, so nothing was changed: {_BACKUP}")


def _index(repository: icechunk.Repository, location: Location, snapshot: str) -> cache.Index | None:
    try:
        return read_index(repository, location, snapshot)
    except DamagedIndex:
        return None


def _earlier(repository: icechunk.Repository, location: Location) -> list[str]:
    """The branch's snapshots but for the first, empty one, newest first; all there are, if their chain is broken."""
    try:
        found = retrying(lambda: list(repository.ancestry(branch=layout.BRANCH)), "listing its snapshots", location)
    except store.STORE_ERRORS:
        return _by_time(repository, location)
    return [info.id for info in found if info.parent_id is not None]


def _by_time(repository: icechunk.Repository, location: Location) -> list[str]:
    """All snapshots that can be read but for the first, empty one, newest first."""
    found = []
    for name in _snapshot_names(location):
        with suppress(*store.STORE_ERRORS):
            found.append(retrying(partial(repository.lookup_snapshot, name), "looking at a snapshot", location))
    found.sort(key=lambda info: info.written_at, reverse=True)
    return [info.id for info in found if info.parent_id is not None]


def _snapshot_names(location: Location) -> list[str]:
    if location.local is not None:
        return [file.name for file in (location.local / "snapshots").iterdir()]
    prefix = f"{location.path}/snapshots/"
    listed = retrying(lambda: location.objects(timeout()).list(prefix).collect(), "listing its snapshots", location)
    return [item["path"].rpartition("/")[2] for item in listed]


@contextmanager
def _mended_reference(location: Location) -> Iterator[bool]:
    """Gives whether the file that names the newest snapshot had to be made; it then names any, and is put back as it
    was where the block fails."""
    if location.local is None or not store.reference_is_damaged(location.local):
        yield False
        return
    file, names = store.reference_file(location.local), _snapshot_names(location)
    if not names:
        raise UserError(f"corpus {location}: has no snapshot any more: {_BACKUP}")
    old = file.read_bytes() if file.exists() else None
    _write_whole(file, json.dumps({"snapshot": names[0]}).encode())
    try:
        yield True
    except BaseException:
        if old is None:
            file.unlink()
        else:
            _write_whole(file, old)
        raise


def _what_was_lost(repository: icechunk.Repository, snapshot: str, index: cache.Index, location: Location) -> _Lost:
    """A snapshot's trajectories, and the ids that it has beyond an index, told from its local copy."""
    known = cache.load(cache_key(location, snapshot))
    if known is None:
        return _Lost(snapshot, count(repository, location, snapshot))
    kept, ids = Corpus(location, snapshot, index).ids, Corpus(location, snapshot, known).ids
    return _Lost(snapshot, len(ids), tuple(id for id in ids if kept.find(id) is None))


def _collect_garbage(location: Location) -> int | None:
    try:
        return store.collect_garbage(store.open_repository(location), location)
    except store.STORE_ERRORS:
        return None


def _make_cache(location: Location, snapshot: str) -> None:
    try:
        index = read_index(store.open_repository(location), location, snapshot)
        cache.replace(cache_key(location, snapshot), index)
    except OSError as error:
        raise UserError(f"{cache.folder()}: can not be written: {error.strerror or error}") from error


def _write_whole(file: Path, data: bytes) -> None:
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".new")
    temporary.write_bytes(data)
    os.replace(temporary, file)
