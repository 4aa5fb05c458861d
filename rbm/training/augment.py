"""Augmentation of pixels: another camera pose and light, the same for all frames of a trajectory in a batch.

The same, so that a clip stays a film of one scene, and a rewind stays the film of its original. Keyed by
(seed, step, trajectory): a resumed run augments as the unbroken one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Augmentation:
    """How much is changed.

    Attributes:
        shift: the picture moves by up to this fraction of its height and width; the edge is repeated.
        light: brightness and contrast change by up to this fraction.
    """

    shift: float = 0.05
    light: float = 0.15

    def __post_init__(self) -> None:
        for name in ("shift", "light"):
            if not 0 <= getattr(self, name) < 0.5:
                raise ValueError(f"augmentation {name} must be in [0, 0.5), not {getattr(self, name)}")

    def __call__(self, frames: NDArray[np.uint8], key: tuple[int, ...]) -> NDArray[np.uint8]:
        """uint8 (T, H, W, 3) -> uint8 (T, H, W, 3); equal keys change equally."""
        rng = np.random.default_rng(key)
        down, right, brightness, contrast = rng.uniform(-1, 1, 4)
        height, width = frames.shape[1:3]
        frames = _shifted(frames, round(down * self.shift * height), round(right * self.shift * width))
        if self.light:
            # a table of 256 entries: one look-up a pixel
            level = np.arange(256, dtype=np.float32)
            level = (level - 127.5) * (1 + self.light * contrast) + 127.5 + 127.5 * self.light * brightness
            frames = np.clip(np.rint(level), 0, 255).astype(np.uint8)[frames]
        return frames


def _shifted(frames: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
    """Frames moved by whole pixels, the edge repeated."""
    rows = np.clip(np.arange(frames.shape[1]) - down, 0, frames.shape[1] - 1)
    columns = np.clip(np.arange(frames.shape[2]) - right, 0, frames.shape[2] - 1)
    return np.ascontiguousarray(frames[:, rows][:, :, columns])
