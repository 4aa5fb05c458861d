"""The constant: every frame of every video is half done. What a model scores that has learned nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rbm.scoring import ClipScores

Shown = NDArray[np.uint8] | Mapping[str, NDArray[np.uint8]]


class Constant:
    """progress_i = success_i = ½; both of a pair are equal."""

    def __init__(self, context_frames: int = 16) -> None:
        self.context_frames = context_frames

    def predict(self, clips: Sequence[tuple[Shown, str]], batch_size: int = 64) -> list[ClipScores]:
        return [self._score(len(frames)) for frames, _ in clips]

    def prefer(self, pairs: Sequence[tuple[Shown, Shown, str]]) -> NDArray[np.float32]:
        return np.full(len(pairs), 0.5, np.float32)

    def _score(self, n: int) -> ClipScores:
        half = np.full(n, 0.5, np.float32)
        return ClipScores(progress=half, progress_std=np.zeros_like(half), success=half.copy(), utility=0.0)
