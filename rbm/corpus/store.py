"""The Icechunk repository under a corpus: opening it, and turning its errors into sentences.

Icechunk gives atomic commits, snapshots and time travel. Two of its habits are handled here: it
warns in colour at every open of a local directory (two committers are not safe there: the writer's
lock answers that), and its Rust runtime does not survive a fork.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import icechunk
import numpy as np
import zarr
from icechunk import IcechunkError
from numpy.typing import NDArray
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from rbm.corpus.layout import BRANCH, FORMAT, INDEX_GROUP, VERSION
from rbm.errors import UserError

STORE_ERRORS = (IcechunkError, OSError, zarr.errors.BaseZarrError)
"""What reading or writing through zarr and Icechunk raises when the storage fails."""

_CAUSE = re.compile(r"\s*(?:x|\||[`|]->)\s+(?!\d+: |context|at |with )(\S.*)")
"""A line of Icechunk's drawing that holds a cause, and not the place in its code."""

_REPOSITORY_FOLDERS = ("refs", "snapshots")

if "ICECHUNK_LOG" not in os.environ:
    icechunk.set_logs_filter("error")


class _Runtime:
    """Whether this process was forked from one in which Icechunk's threads were already running."""

    started = False
    lost = False

    @classmethod
    def after_fork(cls) -> None:
        cls.lost = cls.started


os.register_at_fork(after_in_child=_Runtime.after_fork)


def absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def is_repository(path: Path) -> bool:
    return all((path / name).is_dir() for name in _REPOSITORY_FOLDERS)


def check_runtime(path: Path) -> None:
    """Raises UserError where the next call into Icechunk would wait for ever."""
    if _Runtime.lost:
        raise UserError(
            f"corpus {path}: this process was forked after a corpus had been opened, and Icechunk does not survive "
            "that: start processes with multiprocessing's 'spawn' (DataLoader: multiprocessing_context='spawn')"
        )
    _Runtime.started = True


def open_repository(path: Path) -> icechunk.Repository:
    """The repository at an existing local directory.

    Raises:
        UserError: nothing is there, or something else.
    """
    if not path.exists():
        raise UserError(f"corpus {path}: no such directory")
    if not path.is_dir():
        raise UserError(f"corpus {path}: is a file, a corpus is a directory")
    if not is_repository(path):
        what = "holds no corpus" if any(path.iterdir()) else "is an empty directory, it holds no corpus"
        raise UserError(f"corpus {path}: {what}; make one with `rbm build corpus={path} ...`")
    check_runtime(path)
    with readable(path):
        return icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))


def create_repository(path: Path) -> icechunk.Repository:
    check_runtime(path)
    return icechunk.Repository.create(icechunk.local_filesystem_storage(str(path)))


def array(root: zarr.Group, name: str) -> zarr.Array:
    """The array at `name`; KeyError where there is none, which a complete corpus never shows."""
    found = root[name]
    if not isinstance(found, zarr.Array):
        raise KeyError(name)
    return found


def read_range(root: zarr.Group, key: str, start: int, stop: int) -> bytes | None:
    """Bytes [start, stop) of one object, or None where it does not exist; a third of the time of a zarr slice."""
    return sync(_get(root.store, key, start, stop))


async def _get(store: Store, key: str, start: int, stop: int) -> bytes | None:
    found = await store.get(key, default_buffer_prototype(), RangeByteRequest(start, stop))
    return None if found is None else found.to_bytes()


def column(root: zarr.Group, name: str) -> NDArray:
    """All of the index array `name`."""
    return np.asarray(array(root, f"{INDEX_GROUP}/{name}")[:])


def head(repository: icechunk.Repository) -> str:
    return repository.lookup_branch(BRANCH)


def open_root(store: icechunk.IcechunkStore, path: Path, mode: str = "r") -> zarr.Group | None:
    """The corpus's root group after a look at its format and version; None where nothing was committed yet.

    Raises:
        UserError: another program's repository, or a newer layout.
    """
    try:
        root = zarr.open_group(store, mode=mode)  # type: ignore[arg-type]
    except FileNotFoundError:
        return None
    version = root.attrs.get("version")
    if root.attrs.get("format") != FORMAT or not isinstance(version, int):
        raise UserError(f"corpus {path}: an Icechunk repository of another program, not a corpus of this one")
    if version > VERSION:
        raise UserError(
            f"corpus {path}: has format version {version}, this rbm reads up to {VERSION}: upgrade robot-rbm"
        )
    return root


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Storage errors while reading become one line that names the corpus."""
    try:
        yield
    except STORE_ERRORS as error:
        raise UserError(f"corpus {path}: can not be read: {first_line(error)}") from error


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Storage errors while writing (a full disk) become one line that says what still stands."""
    try:
        yield
    except STORE_ERRORS as error:
        raise UserError(
            f"corpus {path}: writing failed ({first_line(error)}); the last commit stands: "
            "make room and run the same command again"
        ) from error


def first_line(error: BaseException) -> str:
    """The sentence in an Icechunk error, which is a drawing of several lines: its last cause."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    causes = [found[1] for line in str(error).splitlines() if (found := _CAUSE.match(line))]
    if causes:
        return causes[-1]
    return " ".join(str(error).split()) or type(error).__name__
