"""What a read costs, by codec and frame size: 8 of 64 frames out of a corpus, and the bytes of a trajectory.

    python tests/benchmarks/bench_corpus_read.py [--trajectories 24] [--reads 200]

Prints JSON. Frames are a textured scene with moving parts and camera noise (σ = 1), made here. `packing_seconds` is
h264 to jpeg by `copy_corpus`, a trajectory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rbm.corpus import Corpus, CorpusWriter, copy_corpus
from rbm.trajectory import Quality, Trajectory

SIZES = ((96, 96), (240, 320))
N_FRAMES = 64
N_READ = 8


def scene(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """uint8 (64, H, W, 3): smooth background, an arm and an object that move."""
    y, x = np.mgrid[:height, :width] / height
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(1, 12, (3, 3))]
    still = 120 + 50 * np.stack(waves, -1)
    frames = np.repeat(still[None], N_FRAMES, axis=0)
    for t, frame in enumerate(frames):
        reach = 0.2 + 0.6 * t / N_FRAMES
        frame[np.abs(x - reach - 0.2 * y) < 0.05] = (60, 60, 70)
        frame[(x - reach) ** 2 + (y - 0.7) ** 2 < 0.01] = (220, 60, 40)
    return np.clip(frames + rng.normal(0, 1, frames.shape), 0, 255).astype(np.uint8)


def write(path: Path, codec: str, size: tuple[int, int], count: int) -> Corpus:
    rng = np.random.default_rng(0)
    with CorpusWriter(path, codec) as writer:
        for number in range(count):
            record = Trajectory(
                id=f"bench/{number}",
                task="reach",
                source="bench",
                quality=Quality.SUCCESSFUL,
                frame_index=np.arange(N_FRAMES),
                timestamp=np.arange(N_FRAMES) / 20,
                fps=20.0,
                height=size[0],
                width=size[1],
            )
            writer.add(record, {"main": scene(rng, *size)})
    return Corpus.open(path)


def read_milliseconds(corpus: Corpus, reads: int) -> dict[str, float]:
    """Median of one call, milliseconds."""
    rng = np.random.default_rng(1)
    spent: dict[str, list[float]] = {"frames": [], "payload": [], "record": []}
    for _ in range(reads):
        row = int(rng.integers(len(corpus)))
        indices = np.sort(rng.choice(N_FRAMES, N_READ, replace=False))
        for name, call in (
            ("frames", lambda row=row, indices=indices: corpus.frames(row, indices)),
            ("payload", lambda row=row: corpus.payload(row)),
            ("record", lambda row=row: corpus[row]),
        ):
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
    return {name: round(1e3 * float(np.median(times)), 2) for name, times in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=int, default=24)
    parser.add_argument("--reads", type=int, default=200)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            name = f"{size[0]}x{size[1]}"
            for codec in ("h264", "jpeg"):
                corpus = write(Path(folder) / f"{codec}-{name}", codec, size, options.trajectories)
                start = time.perf_counter()
                Corpus.open(corpus.path)
                opened = time.perf_counter() - start
                results.append(
                    {
                        "codec": codec,
                        "size": name,
                        "bytes_per_trajectory": int(corpus.columns.length.mean()),
                        "open_ms": round(1e3 * opened, 1),
                        "read_ms": read_milliseconds(corpus, options.reads),
                    }
                )
            start = time.perf_counter()
            copy_corpus(Path(folder) / f"h264-{name}", Path(folder) / f"packed-{name}", codec="jpeg")
            spent = (time.perf_counter() - start) / options.trajectories
            results.append({"size": name, "packing_seconds": round(spent, 4)})
    print(json.dumps({"frames_read": N_READ, "of": N_FRAMES, "results": results}, indent=2))


if __name__ == "__main__":
    main()
