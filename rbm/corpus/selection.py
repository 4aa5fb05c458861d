"""Some trajectories of one snapshot, kept as a file: what a model was trained on, what a result was measured on.

The file is JSON (gzip where its name ends in `.gz`) and pins the snapshot and the ids, so it means the same
trajectories for ever, whatever is added to the corpus or removed from it later:

    {"format": "rbm-selection", "version": 1, "corpus": "corpus", "snapshot": "…", "filters": {…}, "ids": ["…", …]}

A relative `corpus` is meant from the file's own folder; a corpus below that folder is written so, and the folder
with both can be moved.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbm.corpus import store
from rbm.corpus.location import Location
from rbm.corpus.reader import Corpus
from rbm.errors import UserError
from rbm.output import whole_file

FORMAT = "rbm-selection"
VERSION = 1

_GZIP_LEVEL = 3
"""A million ids of 37 MB become 5 MB in 0.4 s."""


@dataclass(frozen=True)
class Selection:
    """Trajectories of one snapshot of a corpus.

    Attributes:
        corpus: absolute path, or URL.
        snapshot: its id.
        ids: unique, in the order of the corpus.
        filters: how they were chosen, JSON values; for the reader of the file, nothing depends on it.
        file: that it was loaded from, for messages.
    """

    corpus: str
    snapshot: str
    ids: tuple[str, ...]
    filters: dict[str, Any] = field(default_factory=dict)
    file: str = field(default="", compare=False)

    @classmethod
    def of(cls, corpus: Corpus, rows: Iterable[int] | NDArray[np.integer], filters: dict[str, Any]) -> Selection:
        """The trajectories of these numbers."""
        chosen = np.unique(np.fromiter(rows, np.int64))
        ids = corpus.ids if len(chosen) == len(corpus) else (corpus.ids[row] for row in chosen.tolist())
        return cls(str(corpus.location), corpus.snapshot, tuple(ids), filters)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Selection:
        """Read a saved selection.

        Raises:
            UserError: no such file; damaged, of another format, or of a newer version.
        """
        path = Path(file)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UserError(f"selection {path}: can not be read: {error.strerror or error}") from error
        try:
            facts = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"selection {path}: damaged, or no selection: make it again with `rbm corpus select`"
            ) from error
        if not isinstance(facts, dict) or facts.get("format") != FORMAT or not isinstance(facts.get("version"), int):
            raise UserError(f"selection {path}: some other file: a selection comes from `rbm corpus select`")
        if facts["version"] > VERSION:
            raise UserError(
                f"selection {path}: has version {facts['version']}, this rbm reads up to {VERSION}: upgrade robot-rbm"
            )
        corpus, snapshot, ids, filters = (facts.get(name) for name in ("corpus", "snapshot", "ids", "filters"))
        if not (
            isinstance(corpus, str)
            and isinstance(snapshot, str)
            and isinstance(filters, dict)
            and isinstance(ids, list)
            and all(isinstance(id, str) for id in ids)
        ):
            raise UserError(
                f"selection {path}: damaged, it lacks its corpus, snapshot, ids or filters: make it again with "
                "`rbm corpus select`"
            )
        place = corpus if "://" in corpus else os.path.normpath(path.absolute().parent / corpus)
        return cls(place, snapshot, tuple(ids), filters, str(path))

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write it: the file is there whole, or not at all.

        Raises:
            UserError: it can not be written.
        """
        path = Path(file)
        facts = {"format": FORMAT, "version": VERSION, "corpus": self._corpus_seen_from(path)}
        facts |= {"snapshot": self.snapshot, "filters": self.filters, "ids": self.ids}
        raw = json.dumps(facts, ensure_ascii=False).encode("utf-8")
        with whole_file(path) as temporary:
            temporary.write_bytes(gzip.compress(raw, _GZIP_LEVEL, mtime=0) if path.suffix == ".gz" else raw)

    def open(self) -> tuple[Corpus, NDArray[np.int64]]:
        """The corpus at its snapshot, and the numbers of the trajectories, int64, rising.

        Raises:
            UserError: the corpus or the snapshot is gone, or it has no trajectory of one of the ids.
        """
        name = f"selection {self.file}" if self.file else "the selection"
        try:
            corpus = Corpus.open(self.corpus, self.snapshot)
        except store.NoSuchSnapshot as error:
            raise UserError(
                f"{name}: its snapshot {self.snapshot} of corpus {self.corpus} is gone (`rbm corpus compact "
                "--drop-history` drops those without a tag): make it again with `rbm corpus select`"
            ) from error
        rows = corpus.ids.find_many(self.ids)
        unknown = np.flatnonzero(rows < 0)
        if len(unknown):
            raise UserError(
                f"{name} does not fit corpus {self.corpus}: its snapshot {self.snapshot} has no trajectory "
                f"{self.ids[unknown[0]]!r} (unknown ids: {len(unknown)})"
            )
        chosen = np.unique(rows)
        if len(chosen) < len(rows):
            raise UserError(
                f"{name} of corpus {self.corpus} names trajectories twice (repeats: {len(rows) - len(chosen)})"
            )
        return corpus, chosen

    def _corpus_seen_from(self, file: Path) -> str:
        """Its path from the file's folder where it lies below that, so that both can be moved."""
        place = Location.parse(self.corpus).local
        folder = file.absolute().parent
        if place is None or not place.is_relative_to(folder):
            return self.corpus
        return place.relative_to(folder).as_posix()
