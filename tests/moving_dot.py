"""A tiny world to test with: a dot moves over a grey plate, and an instruction says where to.

Real frames, real outcomes, no simulator: `move the dot right` is done when the dot has crossed to the right.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rbm.corpus import Corpus, CorpusWriter
from rbm.trajectory import Quality, Task, Trajectory

SIZE = 32
TASKS = (
    Task("move the dot right", scene="horizontal", paraphrases=("push the dot to the right side",)),
    Task("move the dot left", scene="horizontal", paraphrases=("push the dot to the left side",)),
    Task("move the dot up", scene="vertical"),
    Task("move the dot down", scene="vertical"),
)
_DIRECTION = {TASKS[0].text: (0, 1), TASKS[1].text: (0, -1), TASKS[2].text: (-1, 0), TASKS[3].text: (1, 0)}


def draw_frames(task: str, progress: NDArray[np.float64], offset: float = 0.0) -> NDArray[np.uint8]:
    """uint8 (T, SIZE, SIZE, 3): the dot at `progress` of its way, `offset` pixels aside."""
    frames = np.full((len(progress), SIZE, SIZE, 3), 90, np.uint8)
    down, right = _DIRECTION[task]
    for frame, way in zip(frames, progress, strict=True):
        along = (way - 0.5) * (SIZE - 10)
        y = round(SIZE / 2 + down * along + (offset if right else 0))
        x = round(SIZE / 2 + right * along + (offset if down else 0))
        frame[y - 2 : y + 3, x - 2 : x + 3] = (220, 60, 40)
    return frames


def attempt(
    task: str, quality: Quality, number: int, n_frames: int = 20, dense: bool = True
) -> tuple[Trajectory, NDArray[np.uint8]]:
    """One attempt: a success goes all the way by four fifths of the video, the others turn back or stop."""
    rng = np.random.default_rng([TASKS.index(next(t for t in TASKS if t.text == task)), quality.rank, number])
    time = np.linspace(0, 1, n_frames)
    if quality is Quality.SUCCESSFUL:
        progress = np.clip(time / 0.8, 0, 1)
    elif quality is Quality.SUBOPTIMAL:
        progress = np.minimum(time, rng.uniform(0.45, 0.65))
    else:
        peak = rng.uniform(0.1, 0.5)
        progress = np.clip(peak - np.abs(time - 0.5) * 2 * peak, 0, 1)
    done = int(np.searchsorted(progress, 1.0)) if quality is Quality.SUCCESSFUL else None
    record = Trajectory(
        id=f"dot/{task}/{quality}/{number}",
        task=task,
        source="dot",
        quality=quality,
        frame_index=np.arange(n_frames) * 3,
        timestamp=np.arange(n_frames) * 0.1,
        fps=30.0,
        height=SIZE,
        width=SIZE,
        is_robot=False,
        is_sim=True,
        done_index=None if done is None else done * 3,
        progress=progress.astype(np.float32) if dense else None,
    )
    return record, draw_frames(task, progress, rng.uniform(-6, 6))


def write_corpus(path: Path, per_quality: int = 4, codec: str = "jpeg", dense: bool = True) -> Corpus:
    """A corpus of 4 tasks × 3 outcomes × `per_quality` attempts."""
    with CorpusWriter(path, codec=codec) as writer:
        writer.add_source("dot")
        for task in TASKS:
            writer.add_task(task)
        for task in TASKS:
            for quality in Quality:
                for number in range(per_quality):
                    record, frames = attempt(task.text, quality, number, dense=dense)
                    writer.add(record, {"main": frames})
    return Corpus.open(path)
