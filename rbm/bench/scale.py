"""What a corpus costs as it grows: open time, memory, a draw, a sample, for 1,000 to 1,000,000 trajectories."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from rbm.bench import synthetic
from rbm.bench.measure import machine, private_megabytes, resident_megabytes
from rbm.corpus import Corpus
from rbm.sampling import ClipOptions, Planner
from rbm.sampling.draws import BLOCK
from rbm.sampling.pairs import PairMaker

SIZES = (1_000, 10_000, 100_000, 1_000_000)
TASKS_AT_MOST = 40_000
N_READ = 8
START_METHODS = ("spawn", "forkserver", "fork")


def run(sizes: Sequence[int] = SIZES, keep: Path | None = None, workers: int = 8, blocks: int = 40) -> dict[str, Any]:
    """Make a synthetic corpus of each size (index real, payloads shared) and measure it in processes of its own.

    Args:
        sizes: trajectories; a twenty-fifth as many tasks, 40,000 at most.
        keep: folder in which the corpora are made, or found again; none for one that is deleted at the end.
        workers: processes that share a corpus with their parent, for each start method.
        blocks: blocks of 256 draws that are timed, in turns over the corpora.

    Fields, a list over sizes: `first_open_seconds` (the cache is written) and `open_seconds` (the second);
    `resident_MB` that the open adds to a process beyond its imports; `worker_private_MB` that a worker adds by opening
    and reading eight samples, the median over the workers; `draw_us` a pair (strategy, both trajectories, order);
    `pair_us` with its frames and wording; `sample_ms` a pair of 8 of 64 frames each, read.
    """
    with _folder(keep) as folder:
        places = [folder / f"corpus-{size}" for size in sizes]
        for place, size in zip(places, sizes, strict=True):
            if not place.exists():
                _say(f"making a corpus of {size:,} trajectories")
                synthetic.make(place, size, max(10, min(size // 25, TASKS_AT_MOST)))
        with _own_cache():
            _say("opening them")
            results = [_alone(place) for place in places]
            _say(f"sharing each with {workers} processes, started in {len(START_METHODS)} ways")
            for place, result in zip(places, results, strict=True):
                result["worker_private_MB"] = {method: _shared(place, method, workers) for method in START_METHODS}
            _say("drawing and reading")
            for result, times in zip(results, _draws(places, blocks), strict=True):
                result |= times
    return {"sizes": list(sizes), "results": results, "workers": workers, "machine": machine()}


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@contextmanager
def _own_cache() -> Iterator[None]:
    """An empty cache of indexes, also for the processes that are started."""
    before = os.environ.get("RBM_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RBM_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["RBM_CACHE"]
            else:
                os.environ["RBM_CACHE"] = before


def _alone(place: Path) -> dict[str, Any]:
    """In fresh processes: the first open, which writes the cache, and the next."""
    first, second = (
        json.loads(subprocess.check_output([sys.executable, "-m", "rbm.bench.scale", str(place)])) for _ in range(2)
    )
    return {
        "trajectories": second["trajectories"],
        "tasks": second["tasks"],
        "first_open_seconds": first["open_seconds"],
        "first_open_resident_MB": first["resident_MB"],
        "open_seconds": second["open_seconds"],
        "resident_MB": second["resident_MB"],
    }


def open_once(place: str) -> dict[str, Any]:
    """What one open takes in this process."""
    before = resident_megabytes()
    start = time.perf_counter()
    corpus = Corpus.open(place)
    seconds = time.perf_counter() - start
    return {
        "trajectories": len(corpus),
        "tasks": len(corpus.tasks),
        "open_seconds": round(seconds, 4),
        "resident_MB": round(resident_megabytes() - before, 1),
    }


def _shared(place: Path, method: str, workers: int) -> float:
    """Megabytes that one more process of so many adds."""
    context: Any = multiprocessing.get_context(method)
    corpus = Corpus.open(place)
    pipes = [context.Pipe() for _ in range(workers)]
    processes = [context.Process(target=_worker, args=(theirs, pickle.dumps(corpus))) for _, theirs in pipes]
    for process in processes:
        process.start()
    added = [ours.recv() for ours, _ in pipes]
    for ours, _ in pipes:
        ours.send(None)
    for process in processes:
        process.join()
    return round(float(np.median(added)), 2)


def _worker(connection: Connection, corpus: bytes) -> None:
    before = private_megabytes()
    opened: Corpus = pickle.loads(corpus)  # from our parent, as a DataLoader does it
    rng = np.random.default_rng(os.getpid())
    for row in rng.integers(len(opened), size=16):
        opened.frames(int(row), np.sort(rng.choice(synthetic.N_FRAMES, N_READ, replace=False)))
        str(opened.tasks[int(opened.columns.task[row])])
    connection.send(private_megabytes() - before)
    connection.recv()  # all are there until the last has measured


def _draws(places: Sequence[Path], blocks: int) -> list[dict[str, float]]:
    """Times of draws and samples, the corpora in turns."""
    corpora = [Corpus.open(place) for place in places]
    # a seed each: the random numbers of a block are kept for the next that asks for them
    planners = [Planner(corpus, seed=number) for number, corpus in enumerate(corpora)]
    makers = [PairMaker(corpus, number, ClipOptions(context_frames=16)) for number, corpus in enumerate(corpora)]
    draw: list[list[float]] = [[] for _ in corpora]
    pair: list[list[float]] = [[] for _ in corpora]
    sample: list[list[float]] = [[] for _ in corpora]
    rng = np.random.default_rng(0)
    for block in range(blocks):
        for number, (corpus, planner, maker) in enumerate(zip(corpora, planners, makers, strict=True)):
            start = time.perf_counter()
            plan = planner.plan(block * BLOCK, BLOCK)
            drawn = time.perf_counter()
            maker.pairs(plan)
            made = time.perf_counter()
            for row in (int(plan.chosen[0]), int(plan.rejected[0])):
                corpus.frames(row, np.sort(rng.choice(synthetic.N_FRAMES, N_READ, replace=False)))
            sample[number].append(time.perf_counter() - made)
            draw[number].append((drawn - start) / BLOCK)
            pair[number].append((made - start) / BLOCK)
    return [
        {
            "draw_us": round(1e6 * float(np.median(draw[number])), 2),
            "pair_us": round(1e6 * float(np.median(pair[number])), 1),
            "sample_ms": round(1e3 * float(np.median(sample[number])), 2),
        }
        for number in range(len(corpora))
    ]


if __name__ == "__main__":
    print(json.dumps(open_once(sys.argv[1])))
