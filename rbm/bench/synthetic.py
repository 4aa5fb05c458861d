"""Corpora of any length for benchmarks: the index is real, row by row; a few real payloads are shared by all rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rbm.corpus import Corpus, CorpusWriter, layout, store
from rbm.corpus.location import Location
from rbm.corpus.retry import commit
from rbm.corpus.tables import pack_strings
from rbm.errors import UserError
from rbm.trajectory import Quality, Task, Trajectory

N_FRAMES = 64
PAYLOADS = 96


def scene(rng: np.random.Generator, height: int, width: int, noise: float) -> NDArray[np.uint8]:
    """uint8 (64, H, W, 3): smooth background, an arm and an object that move, camera noise of this σ."""
    y, x = np.mgrid[:height, :width] / height
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(1, 12, (3, 3))]
    still = 120 + 50 * np.stack(waves, -1)
    frames = np.repeat(still[None], N_FRAMES, axis=0)
    for t, frame in enumerate(frames):
        reach = 0.2 + 0.6 * t / N_FRAMES
        frame[np.abs(x - reach - 0.2 * y) < 0.05] = (60, 60, 70)
        frame[(x - reach) ** 2 + (y - 0.7) ** 2 < 0.01] = (220, 60, 40)
    return np.clip(frames + rng.normal(0, noise, frames.shape), 0, 255).astype(np.uint8)


def load_clips(path: Path, n_frames: int) -> NDArray[np.uint8]:
    """Clips of a .npy file, uint8 (N, T, H, W, 3) with T of at least `n_frames`.

    Raises:
        UserError: it holds no such array.
    """
    try:
        clips: NDArray[np.uint8] = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read it as a .npy file: {error}") from error
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[4] != 3 or clips.shape[1] < n_frames:
        raise UserError(f"{path}: holds {clips.dtype} {clips.shape}, need uint8 (N, T >= {n_frames}, H, W, 3)")
    return clips


def record(id: str, task: str, quality: Quality, height: int, width: int) -> Trajectory:
    """A record for a clip of `scene`."""
    return Trajectory(
        id=id,
        task=task,
        source="bench",
        quality=quality,
        frame_index=np.arange(N_FRAMES, dtype=np.int32),
        timestamp=(np.arange(N_FRAMES) / 20).astype(np.float32),
        fps=20.0,
        height=height,
        width=width,
    )


def make(path: Path, trajectories: int, tasks: int, height: int = 240, width: int = 320, noise: float = 3.0) -> Corpus:
    """A corpus of so many trajectories of so many tasks, their sizes as uneven as in collections of data sets.

    The number of trajectories a task falls as 1/(rank + 10); two in three succeed; scenes have four tasks each.
    """
    rng = np.random.default_rng(0)
    with CorpusWriter(path) as writer:
        for number in range(tasks):
            writer.add_task(Task(f"do the thing number {number} with the object on the table", f"scene {number // 4}"))
        first = "do the thing number 0 with the object on the table"
        for number in range(min(PAYLOADS, trajectories)):
            frames = scene(rng, height, width, noise)
            writer.add(record(f"payload/{number}", first, Quality.SUCCESSFUL, height, width), {"main": frames})
    small = Corpus.open(path)
    share = 1 / (np.arange(tasks) + 10)
    task = np.sort(rng.choice(tasks, trajectories, p=share / share.sum())).astype(np.int32)
    task[:tasks] = np.arange(min(tasks, trajectories))  # every task has one
    rng.shuffle(task)
    quality = rng.choice(3, trajectories, p=[0.66, 0.17, 0.17]).astype(np.int8)
    payload = rng.integers(len(small), size=trajectories)
    columns = {name: getattr(small.columns, name)[payload] for name in layout.COLUMNS}
    columns |= {"task": task, "quality": quality, "content": np.arange(1, trajectories + 1, dtype=np.uint64)}
    columns["done"] = np.where(quality == 0, N_FRAMES - 1, -1).astype(np.int32)
    heap, end = pack_strings([f"synthetic_source/episode_{number:09d}" for number in range(trajectories)])
    location = Location.parse(path)
    repository = store.open_repository(location)
    session = repository.writable_session(layout.BRANCH)
    root = store.group(session, location)
    for name, values in (columns | {layout.ID_HEAP: heap, layout.ID_END: end}).items():
        array = store.array(root, f"{layout.INDEX_GROUP}/{name}")
        array.resize((len(values),))
        array[:] = values
    commit(repository, session, f"{trajectories} synthetic rows", location)
    return Corpus.open(path)
