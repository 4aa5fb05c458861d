"""From frames of any size to what a vision tower reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


def fitting_size(height: int, width: int, unit: int, least: int, most: int) -> tuple[int, int]:
    """Height and width as the nearest multiples of `unit` (an exact half goes to the even multiple).

    A picture of fewer than `least` or more than `most` cells of unit × unit pixels is scaled into these bounds first,
    its shape kept. Source: the published preprocessing of Qwen-VL models.
    """
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns > most:  # these divisions in this order: at exact multiples the rounding of each counts
        shrink = math.sqrt(height * width / (most * unit * unit))
        rows, columns = max(1, math.floor(height / shrink / unit)), max(1, math.floor(width / shrink / unit))
    elif rows * columns < least:
        grow = math.sqrt(least * unit * unit / (height * width))
        rows, columns = math.ceil(height * grow / unit), math.ceil(width * grow / unit)
    return rows * unit, columns * unit


@dataclass(frozen=True)
class PillowResize:
    """uint8 (T, H, W, 3) -> uint8 (T, h, w, 3): one bicubic resize of Pillow's to multiples of `unit` pixels.

    Attributes:
        unit: pixels of a visual token's side.
        least, most: visual tokens of a frame.
    """

    unit: int = 32
    least: int = 4
    most: int = 16384

    def size(self, height: int, width: int) -> tuple[int, int]:
        """What frames of this size become."""
        return fitting_size(height, width, self.unit, self.least, self.most)

    def __call__(self, frames: NDArray[np.uint8]) -> Tensor:
        return _resized(frames, self.size(*frames.shape[1:3]), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class PillowSquare:
    """uint8 (T, H, W, 3) -> uint8 (T, side, side, 3): one resize of Pillow's, aspect ratio not kept.

    Attributes:
        side: pixels.
        filter: a name in Pillow's `Resampling`.
    """

    side: int
    filter: str = "BICUBIC"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """What frames of this size become."""
        return self.side, self.side

    def __call__(self, frames: NDArray[np.uint8]) -> Tensor:
        return _resized(frames, self.size(*frames.shape[1:3]), Image.Resampling[self.filter])


def _resized(frames: NDArray[np.uint8], size: tuple[int, int], filter: Image.Resampling) -> Tensor:
    if frames.shape[1:3] != size:
        height, width = size
        resized = [Image.fromarray(frame).resize((width, height), filter) for frame in frames]
        frames = np.stack([np.asarray(image) for image in resized])
    return torch.from_numpy(np.ascontiguousarray(frames))


@dataclass(frozen=True)
class AsIs:
    """Leaves frames as they are: the model resizes them on its device (`tensor_resize`)."""

    def __call__(self, frames: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(frames))


def tensor_resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (U, H, W, 3) -> uint8 (U, h, w, 3) on its device: antialiased bicubic, rounded.

    Not quite Pillow's result: about one value in a thousand differs by 1, and scores (of a tiny model) by 1e-4.
    """
    if tuple(frames.shape[1:3]) == size:
        return frames
    pixels = frames.permute(0, 3, 1, 2).float()
    for step in ((frames.shape[1], size[1]), size):  # like Pillow's: columns first, then rows, 8 bits in between
        pixels = F.interpolate(pixels, size=step, mode="bicubic", antialias=True).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1)


def normalised(frames: Tensor, dtype: torch.dtype, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (U, h, w, 3) -> (U, 3, h, w): (x / 255 - mean) / std."""
    offset = torch.tensor(mean, device=frames.device) * 255
    scale = 1 / (torch.tensor(std, device=frames.device) * 255)
    return ((frames.float() - offset) * scale).permute(0, 3, 1, 2).to(dtype)


def patches(pixels: Tensor, patch: int, merge: int, temporal: int) -> Tensor:
    """Still pictures cut into patches, those of one merged cell side by side: (U, 3, h, w) -> (U h w / p², 3 t p²).

    A still picture is its frame `temporal` times. Equal to the published processor's output to the last bit.
    """
    U, C, h, w = pixels.shape
    x = pixels.reshape(U, C, h // patch // merge, merge, patch, w // patch // merge, merge, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # U, row, column, merge row, merge column, C, p, p
    x = x.reshape(-1, C, 1, patch, patch).expand(-1, C, temporal, patch, patch)
    return x.reshape(len(x), -1)


def still_patches(frames: Tensor, patch: int, merge: int) -> Tensor:
    """The patches of still pictures once, not `temporal` times, and uint8: (U, h, w, 3) -> (U h w / p², 3 p²).

    `patches` of the same pictures, before they are normalised: a quarter of the bytes to move, and half of the values.
    """
    U, h, w, C = frames.shape
    x = frames.reshape(U, h // patch // merge, merge, patch, w // patch // merge, merge, patch, C)
    return x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, C * patch * patch)
