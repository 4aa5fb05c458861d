"""The index of a snapshot as files that every process maps.

Icechunk has no way to map a column. So the first open of a snapshot reads the index once and writes each array as
`.npy` to a local cache; later ones, and all worker processes whatever way they were started, map those files: an
open takes milliseconds, and a million trajectories cost a process nothing that it does not touch.

    ~/.cache/rbm/corpus/            or $RBM_CACHE/corpus, $XDG_CACHE_HOME/rbm/corpus
      <key>.lock                    held while one process writes
      <key>.<version>/              key: the snapshot, with -remote for a corpus in an object store
        facts.json                  sizes of the files, and what is no array
        <name>.npy …

A snapshot never changes, so neither does its folder: it is written beside its place and renamed. One that is
damaged (a file of another size) is written again; one that nobody has opened for a month goes when another comes.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

VERSION = 1
"""Rises when the arrays change: older folders are then left aside."""

KEEP_SECONDS = 30 * 24 * 3600.0


@dataclass(frozen=True)
class Index:
    """All that is known of a snapshot without a payload: arrays, mapped where the cache can be written; JSON facts."""

    arrays: Mapping[str, NDArray]
    facts: Mapping[str, Any]


def folder() -> Path:
    """Where indexes are kept."""
    base = os.environ.get("RBM_CACHE")
    if base:
        return Path(base).expanduser() / "corpus"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rbm" / "corpus"


def load(key: str) -> Index | None:
    """An index, mapped, if it is in the cache and whole."""
    place = _place(key)
    try:
        known = json.loads((place / "facts.json").read_text(encoding="utf-8"))
        arrays = {}
        for name, size in known["files"].items():
            file = place / f"{name}.npy"
            if file.stat().st_size != size:
                return None
            arrays[name] = np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray)  # a plain one is faster
    except (OSError, ValueError, KeyError):
        return None
    with suppress(OSError):  # another user's cache, which this one may only read
        os.utime(place)
    return Index(arrays, known["facts"])


def load_or_make(key: str, make: Callable[[], Index]) -> Index:
    """An index from the cache; made, and kept there, by the first process that asks."""
    found = load(key)
    if found is not None:
        return found
    made: Index | None = None
    try:
        with _lock(key):
            found = load(key)  # another process may have been faster
            if found is None:
                made = make()
                _write(_place(key), made)
                _forget_old()
                found = load(key)
    except OSError as error:
        log.warning(
            "%s: the index cannot be kept there (%s), so every process holds its own copy: "
            "set RBM_CACHE to a folder with room",
            folder(),
            error.strerror or error,
        )
    return found or made or make()


def replace(key: str, index: Index) -> None:
    """Put an index into the cache in place of the one that is there, which is damaged.

    Raises:
        OSError: the cache can not be written.
    """
    with _lock(key):
        _write(_place(key), index)


def _place(key: str) -> Path:
    return folder() / f"{key}.{VERSION}"


@contextmanager
def _lock(key: str) -> Iterator[None]:
    folder().mkdir(parents=True, exist_ok=True)
    with open(folder() / f"{key}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(place: Path, index: Index) -> None:
    """Under the lock, so whatever stands at the temporary name is a dead process's."""
    part = place.with_name(place.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        for name, array in index.arrays.items():
            np.save(part / f"{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
        files = {name: (part / f"{name}.npy").stat().st_size for name in index.arrays}
        (part / "facts.json").write_text(json.dumps({"files": files, "facts": index.facts}), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)  # damaged: a whole one is never written again
        part.rename(place)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _forget_old() -> None:
    for place in folder().iterdir():
        if time.time() - place.stat().st_mtime > KEEP_SECONDS:
            if place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            else:
                place.unlink(missing_ok=True)
