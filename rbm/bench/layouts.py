"""Chunk and shard sizes, and ways to read: what stands behind the numbers in `rbm.corpus.layout`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import zarr

from rbm.bench.measure import machine, medians
from rbm.bench.synthetic import record, scene
from rbm.corpus import Corpus, CorpusWriter, layout, store
from rbm.corpus.segment import shard_object
from rbm.trajectory import Quality

PAYLOAD_BYTES = 600 << 10
"""About one trajectory of 64 jpeg frames, 240 × 320."""

INNER = (16 << 10, 64 << 10, 256 << 10, 1 << 20)
SHARDS = (16 << 20, 64 << 20, 256 << 20)
TOTAL = 256 << 20


def run(rounds: int = 40) -> dict[str, Any]:
    """Write 256 MiB in shards of several sizes, and read payloads of 600 KiB in several ways; medians.

    Fields: `write_MB_a_second` by shard size, through zarr's sharding codec and as whole objects (ours);
    `read_ms` of one payload by inner chunk size, through zarr, through zarr with the `zarrs` pipeline where that is
    installed, as a byte range of the object through Icechunk, and as eight frames of a trajectory from the file (ours).
    """
    with tempfile.TemporaryDirectory() as folder:
        write = {f"{size >> 20} MiB": _write(Path(folder) / f"w{size}", size) for size in SHARDS}
        read = {f"{size >> 10} KiB": _read(Path(folder) / f"r{size}", size, rounds) for size in INNER}
        ours = _ours(Path(folder) / "corpus", rounds)
    return {"write_MB_a_second": write, "read_ms": read, "corpus_read_ms": ours, "machine": machine()}


def _repository(path: Path) -> tuple[icechunk.Repository, icechunk.Session, zarr.Group]:
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(path)))
    session = repository.writable_session("main")
    return repository, session, zarr.create_group(session.store)


def _array(root: zarr.Group, name: str, size: int, inner: int, shard: int) -> zarr.Array:
    return root.create_array(name, shape=(size,), dtype="uint8", chunks=(inner,), shards=(shard,),
                             compressors=None, filters=None, config={"write_empty_chunks": True})  # fmt: skip


def _write(path: Path, shard: int) -> dict[str, float]:
    data = np.random.default_rng(0).integers(0, 256, TOTAL, dtype=np.uint8)
    _, session, root = _repository(path)

    def by_zarr() -> None:
        array = _array(root, "zarr", TOTAL, layout.INNER_CHUNK_BYTES, shard)
        for start in range(0, TOTAL, shard):
            array[start : start + shard] = data[start : start + shard]

    def by_object() -> None:
        _array(root, "object", TOTAL, layout.INNER_CHUNK_BYTES, shard)
        for number, start in enumerate(range(0, TOTAL, shard)):
            piece = memoryview(data[start : start + shard].tobytes())
            store.write_object(root, f"object/c/{number}", shard_object([piece], len(piece), shard))

    figures = {"zarr": _rate(by_zarr), "object": _rate(by_object)}
    session.commit("written")
    return figures


def _rate(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return round(TOTAL / 1e6 / (time.perf_counter() - start), 1)


def _read(path: Path, inner: int, rounds: int) -> dict[str, float]:
    repository, session, root = _repository(path)
    size = layout.SHARD_BYTES
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    _array(root, "data", size, inner, size)[:] = data
    snapshot = session.commit("written")
    starts = np.random.default_rng(1).integers(0, size - PAYLOAD_BYTES, rounds)
    arrays = {"zarr": _opened(repository, snapshot)}
    if find_spec("zarrs") is not None:
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            arrays["zarrs"] = _opened(repository, snapshot)
    plain = zarr.open_group(repository.readonly_session(snapshot_id=snapshot).store, mode="r")
    calls: dict[str, Callable[[int], object]] = {
        name: lambda number, array=array: array[starts[number] : starts[number] + PAYLOAD_BYTES]  # type: ignore[misc]
        for name, array in arrays.items()
    }
    calls["byte range"] = lambda number: store.read_range(
        plain, "data/c/0", int(starts[number]), int(starts[number]) + PAYLOAD_BYTES
    )
    return {name: round(1e3 * seconds, 2) for name, seconds in medians(calls, rounds).items()}


def _opened(repository: icechunk.Repository, snapshot: str) -> zarr.Array:
    root = zarr.open_group(repository.readonly_session(snapshot_id=snapshot).store, mode="r")
    return store.array(root, "data")


def _ours(path: Path, rounds: int) -> dict[str, float]:
    """A trajectory of 64 frames, 240 × 320, jpeg: its bytes, its record, eight frames' bytes without decoding."""
    rng = np.random.default_rng(0)
    with CorpusWriter(path) as writer:
        for number in range(8):
            clip = {"main": scene(rng, 240, 320, 3.0)}
            writer.add(record(f"clip/{number}", "reach", Quality.SUCCESSFUL, 240, 320), clip)
    corpus = Corpus.open(path)

    def eight(number: int) -> None:
        payload = corpus.payload(number % 8)
        for part in range(0, 64, 8):
            payload.data[int(payload.head.ends[part]) : int(payload.head.ends[part + 1])]

    calls: dict[str, Callable[[int], object]] = {
        "whole payload": lambda number: corpus.payload(number % 8).data.tobytes(),
        "eight frames": eight,
        "record": lambda number: corpus[number % 8],
    }
    return {name: round(1e3 * seconds, 3) for name, seconds in medians(calls, rounds).items()}
