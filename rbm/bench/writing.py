"""Writing against encoding alone: what the corpus costs on top of its codec, on the same cores."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from rbm.bench.measure import machine
from rbm.bench.synthetic import record, scene
from rbm.corpus import Corpus, CorpusWriter, Fork, ForkWriter
from rbm.corpus.codecs import make_codec
from rbm.trajectory import Quality

CLIPS = 4


def run(workers: int = 2, trajectories: int = 800, rounds: int = 3, noise: float = 3.0) -> dict[str, Any]:
    """Trajectories a second of 64 frames, 240 × 320, jpeg: encoded and thrown away, and written to a corpus.

    Args:
        workers: processes that encode; in the second case they write segments too, and the parent commits.
        trajectories: of each worker in each round.
        rounds: of each kind, in turns; the figures are medians.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(workers)]
    processes = [
        context.Process(target=_work, args=(theirs, number, trajectories, noise), daemon=True)
        for number, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    connections = [ours for ours, _ in pipes]
    for connection in connections:
        connection.recv()  # clips made, all imported
    alone, written = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            alone.append(_encode(connections))
            place = Path(folder) / str(number)
            written.append(_write(connections, place, workers))
            assert len(Corpus.open(place)) == workers * trajectories
    for connection in connections:
        connection.send(None)
    total = workers * trajectories
    rate = {"encoder_alone": total / float(np.median(alone)), "written": total / float(np.median(written))}
    return {
        "trajectories_a_second": {name: round(value, 1) for name, value in rate.items()},
        "written_over_encoder": round(float(np.median(np.array(alone) / np.array(written))), 3),
        "rounds": [round(a / w, 3) for a, w in zip(alone, written, strict=True)],
        "workers": workers,
        "machine": machine(),
    }


def _encode(connections: list[Connection]) -> float:
    start = time.perf_counter()
    for connection in connections:
        connection.send("encode")
    for connection in connections:
        connection.recv()
    return time.perf_counter() - start


def _write(connections: list[Connection], place: Path, workers: int) -> float:
    """From the first frame encoded to the commit; making the repository is not counted."""
    with CorpusWriter(place, commit_every=None) as writer:
        forks = writer.fork(workers)
        start = time.perf_counter()
        for connection, fork in zip(connections, forks, strict=True):
            connection.send(fork)
        busy: list[Any] = list(connections)
        while busy:
            for ready in wait(busy):
                segment = busy[busy.index(ready)].recv()
                if segment is None:
                    busy.remove(ready)
                    continue
                writer.take(segment)
                for placed in segment.placed:
                    writer.place(placed)
        writer.commit()
        return time.perf_counter() - start


def _work(connection: Connection, number: int, trajectories: int, noise: float) -> None:
    rng = np.random.default_rng(number)
    clips = [scene(rng, 240, 320, noise) for _ in range(CLIPS)]
    connection.send(None)
    codec = make_codec("jpeg")
    for order in iter(connection.recv, None):
        writer = ForkWriter(order) if isinstance(order, Fork) else None
        for place in range(trajectories):
            clip = clips[place % CLIPS]
            if writer is None:
                codec.encode(clip, 20.0)
                continue
            made = record(f"clip/{number}/{place}", "reach", Quality.SUCCESSFUL, 240, 320)
            segment = writer.add(made, {"main": clip})
            if segment is not None:
                connection.send(segment)
        if writer is not None and (segment := writer.flush()) is not None:
            connection.send(segment)
        connection.send(None)
