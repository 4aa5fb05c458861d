"""A corpus made from another: packed into one segment, with the same or another codec or frame size."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.progress import Progress

from rbm.corpus import store
from rbm.corpus.codecs import ClipCodec, make_codec
from rbm.corpus.location import Location
from rbm.corpus.lock import WriterLock
from rbm.corpus.payload import CorruptPayload, Packed, Payload, repack
from rbm.corpus.reader import Corpus
from rbm.corpus.writer import CorpusWriter
from rbm.errors import UserError
from rbm.video import resize_frames


def copy_corpus(
    source: str | os.PathLike[str] | Corpus,
    destination: str | os.PathLike[str],
    codec: str | ClipCodec | None = None,
    size: int | None = None,
    rows: Iterable[int] | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Copy `rows` (default all) to a new corpus of one segment; returns it, opened.

    Args:
        codec: None keeps each payload byte for byte; a name or codec packs every clip again (the
            bundled h264 corpus into jpeg for training).
        size: scale frames down to this short side, in pixels; only with a codec.
        progress: a running rich display that gets a bar.

    The destination appears whole or not at all: it is written beside its place and renamed.

    Raises:
        UserError: the destination exists; CorruptPayload: a trajectory of the source is damaged.
    """
    if size is not None and (codec is None or size < 1):
        raise UserError(f"copying with frame size {size} needs a size of at least 1 and a codec (jpeg or h264)")
    old = source if isinstance(source, Corpus) else Corpus.open(source)
    place = Location.parse(destination).local
    if place is None:
        raise UserError(f"a copy is made in a local directory, not at {destination}: use `rbm corpus merge` for a URL")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place} exists already: give a new directory for the copy")
    new_codec = None if codec is None else make_codec(codec)
    numbers = list(range(len(old))) if rows is None else [int(row) for row in rows]
    partial = place.with_name(f".{place.name}.partial")
    with store.writable(Location.parse(place)):
        place.parent.mkdir(parents=True, exist_ok=True)
        with WriterLock(Location.parse(place)):
            try:
                shutil.rmtree(partial, ignore_errors=True)  # what a killed copy left
                _write(old, partial, new_codec, size, numbers, progress)
                partial.rename(place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return Corpus.open(place)


def _write(
    old: Corpus, partial: Path, codec: ClipCodec | None, size: int | None, rows: list[int], progress: Progress | None
) -> None:
    bar = progress.add_task("packing trajectories", total=len(rows)) if progress is not None else None
    with CorpusWriter(partial, codec or "jpeg", segment_bytes=None, commit_every=None) as writer:
        writer.annotate(**(old.info()["facts"] | {"copied_from": old.snapshot}))
        for name, info in old.sources.items():
            writer.add_source(name, info.completion, **info.facts)
        for task in old.tasks:
            writer.add_task(task)
        for row in rows:
            with naming(old):
                payload = old.payload(row)
                packed = as_packed(payload) if codec is None else _transcode(payload, codec, size)
            writer.add_packed(packed)
            if progress is not None and bar is not None:
                progress.advance(bar)


def as_packed(payload: Payload) -> Packed:
    """A payload as it is, for another corpus.

    Raises:
        CorruptPayload: a checksum does not match.
    """
    whole = Payload(np.frombuffer(payload.data.tobytes(), np.uint8), payload.name)
    whole.verify()
    head = whole.head
    return Packed(head.trajectory, whole.data.tobytes(), head.views[0].codec, head.content)


@contextmanager
def naming(corpus: Corpus, otherwise: str = "") -> Iterator[None]:
    """A damaged trajectory is said to be of this corpus, with what `otherwise` can be done besides taking it out."""
    try:
        yield
    except CorruptPayload as error:
        raise CorruptPayload(error.trajectory, error.what, str(corpus.location), otherwise) from error


def packed_row(corpus: Corpus, row: int) -> Packed:
    """A trajectory of a corpus as it is, for another.

    Raises:
        CorruptPayload: it is damaged; names the corpus.
    """
    with naming(corpus):
        return as_packed(corpus.payload(row))


def _transcode(payload: Payload, codec: ClipCodec, size: int | None) -> Packed:
    clips = {}
    for view in payload.head.views:
        clip = payload.frames(view=view.name)
        short = min(view.height, view.width)
        if size is not None and size < short:
            height, width = (max(1, round(side * size / short)) for side in (view.height, view.width))
            clip = resize_frames(clip, height, width)
        clips[view.name] = clip
    return repack(payload, clips, codec)
