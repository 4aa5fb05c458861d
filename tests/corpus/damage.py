"""Real damage to a corpus on disk: bytes flipped, files cut and deleted, an index that was written wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import icechunk
import zarr

from rbm.corpus import Corpus


def folder(corpus: Corpus) -> Path:
    place = corpus.location.local
    assert place is not None
    return place


def shard_file(corpus: Corpus, row: int) -> tuple[Path, int]:
    """The file that holds a payload of a small corpus (one shard a segment), and where in it the payload begins."""
    data = corpus.payload_bytes(row).tobytes()
    for file in (folder(corpus) / "chunks").iterdir():
        at = file.read_bytes().find(data)
        if at >= 0:
            return file, at
    raise AssertionError(f"no file holds row {row}")


def flip(corpus: Corpus, row: int, place: int) -> None:
    """Change one bit of byte `place` of a payload."""
    file, start = shard_file(corpus, row)
    data = bytearray(file.read_bytes())
    data[start + place] ^= 4
    file.write_bytes(data)


def rewrite_index(corpus: Corpus, change: Callable[[zarr.Group], Any]) -> str:
    """Commit another index, checksums and all, as a faulty program could; returns the snapshot."""
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(folder(corpus))))
    session = repository.writable_session("main")
    change(zarr.open_group(session.store, mode="r+"))
    return session.commit("a faulty program was here")


def manifest_file(corpus: Corpus, snapshot: str, array: str) -> Path:
    """The file that says where the chunks of an array (`/index/task`) are."""
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(folder(corpus))))
    nodes = json.loads(repository.inspect_snapshot(snapshot))["nodes"]
    (reference,) = next(node for node in nodes if node["path"] == array)["manifest_refs"]
    return folder(corpus) / "manifests" / reference["id"]
