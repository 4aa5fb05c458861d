"""Videos that carry their own progress as a bar, and a scorer that reads the bar.

The reader is a scorer like any other: it sees frames and words and nothing else. Its task is easy, so what the
evaluation must find of it is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rbm.scoring import ClipScores
from rbm.trajectory import Quality, Task

WIDTH = 64

TASKS = (
    Task("open the drawer", "drawer", ("pull the drawer open", "open drawer")),
    Task("close the drawer", "drawer", ("push the drawer shut",)),
    Task("open the door", "door"),
    Task("press the button", "button"),
)
NEW_TASK = TASKS[3].text


def video(progress: NDArray[np.float64], colour: int) -> NDArray[np.uint8]:
    """uint8 (T, 32, 64, 3): a white bar as long as progress over a background that tells the task."""
    frames = np.zeros((len(progress), 32, WIDTH, 3), np.uint8)
    frames[:, 16:] = (40 * (colour % 3), 30 * colour, 60 * (colour // 2))
    for frame, value in zip(frames, progress, strict=True):
        frame[:16, : round(float(value) * WIDTH)] = 255
    return frames


def course(quality: Quality, messy: bool, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """True progress: a straight line to 1, one with a setback, half way, or nowhere."""
    time = np.linspace(0, 1, n)
    if quality == Quality.SUCCESSFUL:
        rise = np.minimum(time / 0.8, 1)
        return np.where((time > 0.3) & (time < 0.5), rise - 0.3 * (time > 0.4), rise) if messy else rise
    if quality == Quality.SUBOPTIMAL:
        return time * rng.uniform(0.4, 0.7)
    return 0.15 * rng.random() * np.sin(np.pi * time)


@dataclass
class BarReader:
    """Progress = length of the bar, if the words fit the background; else 0. Success from 0.95 on."""

    context_frames: int = 8

    def predict(self, clips: Sequence[tuple[NDArray[np.uint8], str]], batch_size: int = 64) -> list[ClipScores]:
        return [self._score(frames, text) for frames, text in clips]

    def prefer(self, pairs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8], str]]) -> NDArray[np.float32]:
        gaps = [self._score(a, text).utility - self._score(b, text).utility for a, b, text in pairs]
        return (1 / (1 + np.exp(-8 * np.array(gaps)))).astype(np.float32)

    def _score(self, frames: NDArray[np.uint8], text: str) -> ClipScores:
        assert len(frames) <= self.context_frames
        length = (frames[:, 4:12].mean((1, 3)) > 128).mean(1)
        colour = frames[:, 20:].mean((0, 1, 2))
        backgrounds = np.array([video(np.zeros(1), number)[0, 20:].mean((0, 1)) for number in range(len(TASKS))])
        task = TASKS[int(np.abs(backgrounds - colour).sum(1).argmin())]
        progress = (length if text in (task.text, *task.paraphrases) else 0 * length).astype(np.float32)
        success = np.where(progress > 0.95, 0.97, 0.02).astype(np.float32)
        return ClipScores(progress, np.full_like(progress, 0.05), success, float(progress[-1]))
