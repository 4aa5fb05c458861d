"""A snapshot as plain Zarr v3: a folder that any zarr program reads, without Icechunk."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from rich.progress import Progress
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from rbm.corpus import layout, store
from rbm.corpus.ahead import in_order, threads_for
from rbm.corpus.copy import naming
from rbm.corpus.location import Location
from rbm.corpus.payload import Payload
from rbm.corpus.reader import INDEX_ARRAYS, Corpus
from rbm.corpus.retry import read_session, reason
from rbm.errors import UserError


def export_plain(
    source: str | Location | Corpus, destination: str | os.PathLike[str], progress: Progress | None = None
) -> Path:
    """Copy every array and attribute of a snapshot into a new local folder; returns it.

    Objects are copied as they are, nothing is decoded; then every checksum in them is verified. The folder appears
    whole or not at all: it is written beside its place and renamed.

    Raises:
        UserError: the destination exists or can not be written; the corpus can not be read, or its index is damaged.
        CorruptPayload: a trajectory is damaged.
    """
    corpus = source if isinstance(source, Corpus) else Corpus.open(source)
    location = Location.parse(destination)
    place = location.local
    if place is None:
        raise UserError(f"plain zarr is written to a local folder, not to {destination}: copy that where you need it")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place} exists already: give a new folder for the export")
    part = place.with_name(f".{place.name}.partial")
    with store.readable(corpus.location):
        repository = store.open_repository(corpus.location)
        root = store.open_root(read_session(repository, corpus.snapshot, corpus.location), corpus.location)
        assert root is not None
        keys = sorted(sync(_keys(root)))
    bar = None if progress is None else progress.add_task("copying objects", total=len(keys))
    try:
        with store.writable(location):
            shutil.rmtree(part, ignore_errors=True)  # what a killed export left
            part.mkdir(parents=True)
            for key, data in in_order(partial(_fetch, root, corpus.location), keys, threads_for(corpus.location)):
                file = part / key
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
                if progress is not None and bar is not None:
                    progress.advance(bar)
            _verify(part, corpus, progress)
            part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return place


def _verify(part: Path, corpus: Corpus, progress: Progress | None) -> None:
    """Read the copy with zarr alone, which looks at the checksums of chunks, and look at those of the payloads."""
    root = zarr.open_group(part, mode="r")
    columns, segments = corpus.columns, store.segments(root)

    def verify(row: int) -> None:
        first, length = int(columns.offset[row]), int(columns.length[row])
        data = np.asarray(segments[int(columns.segment[row])][first : first + length])
        Payload(data, corpus.ids[row]).verify()

    bar = None if progress is None else progress.add_task("verifying trajectories", total=len(corpus))
    try:
        for name in (*layout.COLUMNS, *INDEX_ARRAYS):
            store.column(root, name)
        with naming(corpus):
            for _ in in_order(verify, range(len(corpus)), threads_for(Location.parse(part))):
                if progress is not None and bar is not None:
                    progress.advance(bar)
    except (ValueError, RuntimeError) as error:  # what zarr's codecs raise
        raise UserError(
            f"corpus {corpus.location}: snapshot {corpus.snapshot} is damaged ({reason(error)}): run "
            f"`rbm corpus check --repair {corpus.location}`"
        ) from error


async def _keys(root: zarr.Group) -> list[str]:
    return [key async for key in root.store.list()]


def _fetch(root: zarr.Group, location: Location, key: str) -> tuple[str, bytes]:
    with store.readable(location):
        found = sync(root.store.get(key, default_buffer_prototype()))
    if found is None:
        raise UserError(f"corpus {location}: {key} is missing: run `rbm corpus check --repair {location}`")
    return key, found.to_bytes()
