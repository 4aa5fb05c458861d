"""The Icechunk repository under a corpus: opening it, and turning its errors into sentences.

Icechunk gives atomic commits, snapshots and time travel. Two of its habits are handled here: it
warns in colour at every open of a local directory (two committers are not safe there: the writer's
lock answers that), and its Rust runtime does not survive a fork.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import zarr
from icechunk import IcechunkError
from numpy.typing import NDArray
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.buffer.cpu import Buffer
from zarr.core.sync import sync

from rbm.corpus.layout import BRANCH, FORMAT, INDEX_GROUP, SEGMENT_GROUP, VERSION
from rbm.corpus.location import Location
from rbm.corpus.retry import connect, create, patient, read_session, reason, retrying
from rbm.errors import UserError

STORE_ERRORS = (IcechunkError, icechunk.ConflictError, OSError, zarr.errors.BaseZarrError)
"""What reading or writing through zarr and Icechunk raises when the storage fails."""

PAYLOAD_FOLDERS = ("chunks",)
COMMIT_FOLDERS = ("manifests", "snapshots", "transactions", f"refs/branch.{BRANCH}")
"""What a commit writes, in a local repository."""

_REPOSITORY_FOLDERS = ("refs", "snapshots")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SNAPSHOT_ID = re.compile(r"[0-9A-Z]{20}")

if "ICECHUNK_LOG" not in os.environ:
    icechunk.set_logs_filter("error,icechunk::repository=off")  # it colours what we say ourselves


class NoSuchSnapshot(UserError):
    """A corpus has no snapshot or tag of this name (any more)."""


class DamagedStore(UserError):
    """A part of the repository is damaged or gone. (One that can not be reached is another error.)"""


class DamagedReference(DamagedStore):
    """The file that names the newest snapshot of a local corpus is damaged: a power failure may leave it empty."""


class _Runtime:
    """Whether this process was forked from one in which Icechunk's threads were already running."""

    started = False
    lost = False

    @classmethod
    def after_fork(cls) -> None:
        cls.lost = cls.started


os.register_at_fork(after_in_child=_Runtime.after_fork)


def is_repository(path: Path) -> bool:
    """Raises UserError: one may not look into the folder."""
    with readable(Location.parse(path)):
        return all((path / name).is_dir() for name in _REPOSITORY_FOLDERS)


def reference_file(path: Path) -> Path:
    """The file that names the newest snapshot of a local repository."""
    return path / "refs" / f"branch.{BRANCH}" / "ref.json"


def reference_is_damaged(path: Path) -> bool:
    """Whether that file names no snapshot, or is not there."""
    try:
        return not _SNAPSHOT_ID.fullmatch(json.loads(reference_file(path).read_bytes())["snapshot"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return True


def check_runtime(location: Location) -> None:
    """Raises UserError where the next call into Icechunk would wait for ever."""
    if _Runtime.lost:
        raise UserError(
            f"corpus {location}: this process was forked after a corpus had been opened, and Icechunk does not survive "
            "that: start processes with multiprocessing's 'spawn' or 'forkserver'"
        )
    _Runtime.started = True


def open_repository(location: Location) -> icechunk.Repository:
    """The repository at a location.

    Raises:
        UserError: nothing is there, or something else. DamagedReference: see there.
    """
    if location.local is not None:
        with readable(location):
            _check_folder(location, location.local)
    check_runtime(location)
    with readable(location):
        try:
            return connect(location)
        except FileNotFoundError as error:
            raise UserError(f"{error}; make one with `rbm build corpus={location} ...`") from error


def _check_folder(location: Location, path: Path) -> None:
    if not path.exists():
        raise UserError(f"corpus {location}: no such directory")
    if not path.is_dir():
        raise UserError(f"corpus {location}: is a file, a corpus is a directory")
    if not is_repository(path):
        names = {item.name for item in path.iterdir()}
        if names & {"refs", "snapshots"} and "chunks" in names:
            missing = "snapshots" if "refs" in names else "refs"
            raise UserError(
                f"corpus {location}: parts of a corpus are there, but {missing}/ is missing: restore it from a backup"
            )
        if {"zarr.json", INDEX_GROUP, SEGMENT_GROUP} <= names:
            raise UserError(f"corpus {location}: is a plain Zarr export of a corpus: open the corpus that it came from")
        what = "holds no corpus" if names else "is an empty directory, it holds no corpus"
        raise UserError(f"corpus {location}: {what}; make one with `rbm build corpus={location} ...`")
    if reference_is_damaged(path):
        raise DamagedReference(
            f"corpus {location}: {reference_file(path).relative_to(path)}, which names its newest snapshot, is "
            f"damaged: run `rbm corpus check --repair {location}`"
        )


def create_repository(location: Location) -> icechunk.Repository:
    check_runtime(location)
    return create(location)


def open_or_create(location: Location) -> icechunk.Repository:
    """For object storage, where an empty place can not be told from a missing one."""
    check_runtime(location)
    try:
        return connect(location)
    except FileNotFoundError:
        return create(location)


def collect_garbage(repository: icechunk.Repository, location: Location) -> int:
    """Delete what no snapshot knows, such as what a dead writer wrote and never committed; only under the writer's
    lock. Returns how many bytes these were."""
    found = retrying(lambda: repository.garbage_collect(datetime.now(UTC)), "collecting garbage", location, math.inf)
    return found.bytes_deleted


def force_to_disk(location: Location, folders: Sequence[str], since: float) -> None:
    """Have the system write the files of a local repository that changed after `since` (seconds) to the disk, with
    their names, so that a machine that loses its power loses nothing before them.

    Other writers may go on meanwhile: a file that they rename under its last name while this looks is not yet named by
    anybody, and is passed over.

    Raises:
        OSError: the disk is full, or fails.
    """
    if location.local is None:
        return
    for folder in filter(Path.is_dir, (location.local / name for name in folders)):
        recent = []
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.is_file() and entry.stat().st_ctime >= since - 2:  # a rename counts too
                        recent.append(entry.path)
        for path in [*recent, str(folder)] if recent else ():
            with suppress(FileNotFoundError):
                file = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)


def group(session: icechunk.Session | icechunk.ForkSession, location: Location) -> zarr.Group:
    """The root of a session that can be written to."""
    return zarr.open_group(patient(session.store, location), mode="r+")


def array(root: zarr.Group, name: str) -> zarr.Array:
    """The array at `name`; KeyError where there is none, which a complete corpus never shows."""
    found = root[name]
    if not isinstance(found, zarr.Array):
        raise KeyError(name)
    return found


def segments(root: zarr.Group) -> dict[int, zarr.Array]:
    """The arrays that hold payloads, by their numbers, rising."""
    group = root[SEGMENT_GROUP]
    assert isinstance(group, zarr.Group)
    return dict(sorted((int(name), array) for name, array in group.arrays()))


def segment_sizes(repository: icechunk.Repository, location: Location, snapshot: str) -> dict[int, int]:
    """Bytes of each segment of a snapshot, in use or not."""
    with readable(location):
        root = open_root(read_session(repository, snapshot, location), location)
        return {} if root is None else {number: array.shape[0] for number, array in segments(root).items()}


def read_range(root: zarr.Group, key: str, start: int, stop: int) -> bytes | None:
    """Bytes [start, stop) of one object, or None where it does not exist; a third of the time of a zarr slice."""
    return sync(_get(root.store, key, start, stop))


async def _get(store: Store, key: str, start: int, stop: int) -> bytes | None:
    found = await store.get(key, default_buffer_prototype(), RangeByteRequest(start, stop))
    return None if found is None else found.to_bytes()


def write_object(root: zarr.Group, key: str, data: bytes) -> None:
    """One whole object, as it is."""
    sync(root.store.set(key, _Whole(data)))


class _Whole(Buffer):
    """Bytes that are handed on as they are; of a shard, a copy costs as much as writing it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(np.frombuffer(data, "B"))
        self._whole = data

    def to_bytes(self) -> bytes:
        return self._whole


def column(root: zarr.Group, name: str) -> NDArray:
    """All of the index array `name`."""
    return np.asarray(array(root, f"{INDEX_GROUP}/{name}")[:])


def head(repository: icechunk.Repository) -> str:
    return repository.lookup_branch(BRANCH)


def has_snapshot(location: Location, snapshot: str) -> bool:
    """Whether a corpus is there that may have this snapshot: told from its files; a remote one is taken at its word."""
    if location.local is None:
        return True
    try:
        return (location.local / "snapshots" / snapshot).is_file()
    except (OSError, ValueError):  # no file can have such a name
        return False


def tagged(repository: icechunk.Repository, location: Location) -> dict[str, str]:
    """The snapshot of each tag, in the order of their names."""
    with readable(location):
        names = sorted(retrying(repository.list_tags, "listing its tags", location))
        look = partial(retrying, what="looking up a tag", location=location)
        return {name: look(partial(repository.lookup_tag, name)) for name in names}


def resolve(repository: icechunk.Repository, location: Location, snapshot: str | None) -> str:
    """The id of the newest snapshot, or of the one with this id or tag.

    Raises:
        NoSuchSnapshot: says which tags there are. UserError: it can not be read.
    """
    with readable(location):
        if snapshot is None:
            return retrying(lambda: head(repository), "looking up its newest snapshot", location)
        tags = retrying(repository.list_tags, "listing its tags", location)
        if snapshot in tags:
            return retrying(lambda: repository.lookup_tag(snapshot), "looking up a tag", location)
    try:
        return retrying(lambda: repository.lookup_snapshot(snapshot).id, "looking up a snapshot", location)
    except STORE_ERRORS as error:
        known = f"its tags are {', '.join(sorted(tags))}" if tags else "it has no tags"
        raise NoSuchSnapshot(
            f"corpus {location}: has no snapshot or tag {snapshot!r} ({known}; `rbm corpus log` lists snapshots)"
        ) from error


def check_version(attributes: Mapping[str, Any], location: Location) -> None:
    """Raises UserError: another program's repository, or a newer layout."""
    version = attributes.get("version")
    if attributes.get("format") != FORMAT or not isinstance(version, int):
        raise UserError(f"corpus {location}: an Icechunk repository of another program, not a corpus of this one")
    if version > VERSION:
        raise UserError(
            f"corpus {location}: has format version {version}, this rbm reads up to {VERSION}: upgrade robot-rbm"
        )


def open_root(session: icechunk.Session, location: Location) -> zarr.Group | None:
    """The corpus's root group after a look at its format and version; None where nothing was committed yet.

    Raises:
        UserError: another program's repository, or a newer layout.
    """
    data = patient(session.store, location)
    try:
        root = zarr.open_group(data, mode="r")
    except FileNotFoundError:
        sync(data.exists("zarr.json"))  # raises where the snapshot is damaged, which looks the same to open_group
        return None
    check_version(dict(root.attrs), location)
    return root


@contextmanager
def readable(location: Location) -> Iterator[None]:
    """Storage errors while reading become one line that names the corpus, and what mends it where it is damaged."""
    try:
        yield
    except STORE_ERRORS as error:
        text = f"corpus {location}: can not be read: {reason(error)}"
        if _error_number(error) not in (0, errno.ENOENT):
            raise UserError(text) from error
        raise DamagedStore(f"{text}: run `rbm corpus check --repair {location}`") from error


@contextmanager
def writable(location: Location) -> Iterator[None]:
    """Storage errors while writing (a full disk) become one line that says what still stands, and what to do."""
    try:
        yield
    except STORE_ERRORS as error:
        exists = location.local is None or is_repository(location.local)
        number = _error_number(error)
        advice = "make room" if number in _FULL else "see that it can be written to"
        advice += " and run the same command again"
        if exists and number in (0, errno.ENOENT) and isinstance(error, IcechunkError):
            advice = f"see what `rbm corpus check {location}` says"
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        stands = "; the last commit stands" if exists else ""
        raise UserError(f"corpus {location}: writing failed ({where}{reason(error)}){stands}: {advice}") from error


def _error_number(error: BaseException) -> int:
    """The system's number of an error, be it Python's or in a text of Icechunk; 0: it is none of the system's."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0
