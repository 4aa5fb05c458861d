"""Samples a second on one core: a pair, 8 of 64 frames of each, against one compressed .npz a trajectory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbm.bench.measure import machine, medians, one_core
from rbm.bench.synthetic import N_FRAMES, load_clips, record, scene
from rbm.corpus import Corpus, CorpusWriter
from rbm.trajectory import Quality

N_READ = 8
NOISE = 3.0
SAMPLES = 8
"""Samples read in a row of each kind but .npz, as a loader does: one of 30 MB of .npz leaves nothing in the caches."""

MODEL_SIDE = 112
"""Pixels that the model of the reduced-size path looks at."""


def run(frames: Path | None = None, trajectories: int = 12, rounds: int = 60) -> dict[str, Any]:
    """Read pairs from corpora of 240 × 320 frames, clean and with camera noise (σ = 3), and from .npz files.

    Args:
        frames: .npy file with uint8 (N, 64, H, W, 3), such as simulator clips; none for generated scenes.
        trajectories: how many are stored; more are made of the clips by shifting them.
        rounds: reads of each kind, in turns; the figures are medians.
    """
    clean = _clips(frames, trajectories)
    rng = np.random.default_rng(0)
    noisy = [np.clip(clip + rng.normal(0, NOISE, clip.shape), 0, 255).astype(np.uint8) for clip in clean]
    results = {}
    with tempfile.TemporaryDirectory() as folder, one_core():
        for name, clips in (("clean", clean), ("noise", noisy)):
            results[name] = _measure(Path(folder) / name, clips, rounds)
    return {
        "sample": f"a pair, {N_READ} of {N_FRAMES} frames each, {clean[0].shape[1]}x{clean[0].shape[2]}",
        "frames": "generated" if frames is None else frames.name,
        "noise_sigma": NOISE,
        "results": results,
        "machine": machine(),
    }


def _clips(file: Path | None, count: int) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    if file is None:
        return [scene(rng, 240, 320, 0.0) for _ in range(count)]
    stored = load_clips(file, N_FRAMES)[:, :N_FRAMES]
    return [np.roll(stored[number % len(stored)], number // len(stored), axis=2) for number in range(count)]


def _measure(folder: Path, clips: list[NDArray[np.uint8]], rounds: int) -> dict[str, Any]:
    folder.mkdir(parents=True)
    corpora = {codec: _write(folder / codec, codec, clips) for codec in ("jpeg", "h264")}
    files = [folder / f"{number}.npz" for number in range(len(clips))]
    for file, clip in zip(files, clips, strict=True):
        np.savez_compressed(file, frames=clip)
    rng = np.random.default_rng(1)
    rows = rng.integers(len(clips), size=(rounds, SAMPLES, 2))
    picks = np.sort(rng.permuted(np.tile(np.arange(N_FRAMES), (*rows.shape, 1)), axis=-1)[..., :N_READ])

    def from_npz(number: int) -> None:
        for row, pick in zip(rows[number, 0], picks[number, 0], strict=True):
            with np.load(files[row]) as stored:
                stored["frames"][pick]

    def from_corpus(codec: str, number: int, min_side: int | None = None) -> None:
        for sample in range(SAMPLES):
            for row, pick in zip(rows[number, sample], picks[number, sample], strict=True):
                corpora[codec].frames(int(row), pick, min_side=min_side)

    seconds = medians(
        {
            "npz": from_npz,
            "jpeg": lambda number: from_corpus("jpeg", number),
            "jpeg_reduced": lambda number: from_corpus("jpeg", number, MODEL_SIDE),
            "h264": lambda number: from_corpus("h264", number),
        },
        rounds,
    )
    seconds = {name: spent if name == "npz" else spent / SAMPLES for name, spent in seconds.items()}
    size = {codec: float(corpus.columns.length.mean()) for codec, corpus in corpora.items()}
    size["npz"] = float(np.mean([file.stat().st_size for file in files]))
    return {
        name: {
            "samples_a_second": round(1 / spent, 1),
            "times_npz": round(seconds["npz"] / spent, 1),
            "bytes_a_trajectory": round(size[name.split("_")[0]]),
            "npz_bytes_over_these": round(size["npz"] / size[name.split("_")[0]], 1),
        }
        for name, spent in seconds.items()
    }


def _write(path: Path, codec: str, clips: list[NDArray[np.uint8]]) -> Corpus:
    height, width = clips[0].shape[1:3]
    with CorpusWriter(path, codec) as writer:
        for number, clip in enumerate(clips):
            writer.add(record(f"clip/{number}", "reach", Quality.SUCCESSFUL, height, width), {"main": clip})
    return Corpus.open(path)
