"""Making a corpus whole again after damage: `rbm corpus check --repair`.

All of it under the writer's lock. Nothing that could still be read is deleted: damaged trajectories go in a new
snapshot, older ones keep them; a snapshot whose index is lost is left, the branch just points to an earlier one.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import icechunk
from rich.progress import Progress

from rbm.corpus import cache, layout, store
from rbm.corpus.check import Report, check_corpus
from rbm.corpus.copy import as_packed
from rbm.corpus.location import Location
from rbm.corpus.lock import WriterLock
from rbm.corpus.reader import Corpus, DamagedIndex, cache_key, read_index
from rbm.corpus.retry import retrying, timeout
from rbm.corpus.writer import CorpusWriter
from rbm.errors import UserError


@dataclass(frozen=True)
class Repair:
    """What was found and done.

    Attributes:
        report: of the check, of the snapshot that was the newest readable one.
        snapshot: the newest now.
        lost_snapshot: the one whose index can not be read, from which the branch was set back; empty if none was.
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
        UserError: another writer is at work; no snapshot can be read; every trajectory is damaged (a disk that is
            not there looks like that): then nothing is changed.
    """
    location = Location.parse(place)
    if location.local is None or not store.is_repository(location.local):
        store.open_repository(location)  # says what is there instead
    with WriterLock(location):
        reference_made = _mend_reference(location)
        lost_snapshot, lost_ids = _set_back(location, reference_made)
    with CorpusWriter(location, segment_bytes=256 << 20, commit_every=None) as writer:
        collected = 0 if lost_snapshot or reference_made else _collect_garbage(location)
        report = check_corpus(location, writer.snapshot, decode, progress)
        if report.bad and len(report.bad) == report.trajectories:
            raise UserError(
                f"corpus {location}: every trajectory is damaged ({report.bad[0].what}), so nothing was changed: "
                "see that its disk is there and whole"
            )
        if report.cache_damaged:
            _make_cache(location, report.snapshot)
        corpus = Corpus.open(location, report.snapshot)
        sound = sorted({row for shard in report.shards for row in shard.rows})
        for row in sound:
            writer.move(row, as_packed(corpus.payload(row)))
        damaged = {bad.id for bad in report.bad}
        writer.remove(damaged & writer.ids)
        if sound:
            writer.drop_unused_segments()
        writer.commit()
        snapshot = writer.snapshot or ""
    return Repair(
        report=report,
        snapshot=snapshot,
        lost_snapshot=lost_snapshot,
        lost_ids=lost_ids,
        reference_made=reference_made,
        removed=len(damaged),
        moved=len(sound),
        cache_made=report.cache_damaged,
        collected=collected,
    )


def _set_back(location: Location, anywhere: bool) -> tuple[str, tuple[str, ...] | None]:
    """Where the newest snapshot has no readable index (or the branch points `anywhere`): point the branch to the newest
    that has one. Returns the snapshot that was lost, and the ids that only it had."""
    repository = store.open_repository(location)
    newest = store.resolve(repository, location, None)
    if not anywhere and _index(repository, location, newest) is not None:
        return "", None
    for snapshot in _by_time(repository, location) if anywhere else _earlier(repository, location):
        index = _index(repository, location, snapshot)
        if index is not None:
            retrying(partial(repository.reset_branch, layout.BRANCH, snapshot), "setting it back", location)
            return ("", None) if anywhere else (newest, _only_in(newest, index, location))
    raise UserError(f"corpus {location}: none of its snapshots can be read: build it again")


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


def _mend_reference(location: Location) -> bool:
    """Whether the file that names the newest snapshot had to be made: a power failure may leave it empty. Any snapshot
    will do for now."""
    if location.local is None or not store.is_repository(location.local):
        return False
    file = location.local / "refs" / f"branch.{layout.BRANCH}" / "ref.json"
    try:
        json.loads(file.read_text(encoding="utf-8"))["snapshot"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        names = _snapshot_names(location)
        if names:
            _write_whole(file, json.dumps({"snapshot": names[0]}))
        return bool(names)
    return False


def _only_in(snapshot: str, index: cache.Index, location: Location) -> tuple[str, ...] | None:
    """Ids that a snapshot has beyond an index, told from its local copy."""
    known = cache.load(cache_key(location, snapshot))
    if known is None:
        return None
    kept = Corpus(location, snapshot, index).ids
    return tuple(id for id in Corpus(location, snapshot, known).ids if kept.find(id) is None)


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


def _write_whole(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
