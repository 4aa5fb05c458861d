"""`nano`: the backbone that two CPU cores train in minutes.

A convolutional encoder turns each frame into one token, independent of the instruction, so a frame that
several clips show is encoded once. Instruction words and frame tokens go through a small causal
transformer with rotary positions. Words are hashed into a fixed table: no vocabulary to ship, any
language gets in, and words never seen in training stay untrained vectors: nano does not
understand language, it recognises instructions. Traded away: pretrained knowledge.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rbm.model.backbones.transformer import RowBackbone
from rbm.model.layout import N_MARKERS

ENCODE_FRAMES_CPU = 16
"""Frames that the encoder gets at once on the CPU while nothing is trained: what these take stays in the cache, a fifth
less time than for 64."""


@dataclass(frozen=True)
class SquareResize:
    """uint8 (T, H, W, 3) -> uint8 (T, size, size, 3): antialiased bilinear, aspect ratio not kept."""

    size: int

    def __call__(self, frames: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bilinear", antialias=True)
        return pixels.permute(0, 2, 3, 1).contiguous()


class FrameEncoder(nn.Module):
    """uint8 (U, s, s, 3) -> float (U, d): strided convolutions, then all places of the last map into one token.

    The places are kept apart (no pooling): where the gripper is matters as much as that it is there.
    """

    def __init__(self, hidden: int, width: int, image_size: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = []
        channels = 3
        for index, out in enumerate(widths):
            size = 5 if index == 0 else 3
            layers += [nn.Conv2d(channels, out, size, stride=2, padding=size // 2), nn.GroupNorm(4, out), nn.ReLU()]
            channels = out
        self.convolutions = nn.Sequential(*layers)
        side = image_size
        for _ in widths:
            side = (side + 1) // 2
        self.project = nn.Linear(channels * side * side, hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames.permute(0, 3, 1, 2).to(self.project.weight.dtype) / 127.5 - 1
        x = self.convolutions(x.contiguous(memory_format=torch.channels_last))
        return self.norm(self.project(x.flatten(1)))


class NanoBackbone(RowBackbone):
    """The `nano` backbone.

    Args:
        image_size: frames are resized to this many pixels on both sides (aspect ratio is not kept).
        width: channels of the first convolution; the last has four times as many.
        hidden: d, width of the transformer.
        layers, heads: of the transformer.
        words: rows of the hashed word table.
        max_words: longer instructions are cut here.
        dropout: in the transformer, while training.
        views: names of the views that a step shows, where they are several: each has a learned gain and shift, and a
            step is the mean of those that are there. Empty: one view, whichever comes first.
    """

    name = "nano"

    def __init__(
        self,
        image_size: int = 64,
        width: int = 24,
        hidden: int = 128,
        layers: int = 3,
        heads: int = 4,
        words: int = 4096,
        max_words: int = 64,
        dropout: float = 0.0,
        views: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.image_size, self.width, self.words, self.max_words = image_size, width, words, max_words
        self.frame_encoder = FrameEncoder(hidden, width, image_size)
        self.word_embedding = nn.Embedding(words, hidden)
        self.marker_embedding = nn.Embedding(N_MARKERS, hidden)
        nn.init.normal_(self.word_embedding.weight, std=0.5)
        nn.init.normal_(self.marker_embedding.weight, std=0.5)
        self.add_transformer(hidden, layers, heads, dropout, views)

    def config(self) -> dict[str, Any]:
        names = ("image_size", "width", "hidden", "layers", "heads", "words", "max_words", "dropout")
        return {name: getattr(self, name) for name in names} | {"views": list(self.views)}

    @property
    def preprocessor(self) -> SquareResize:
        return SquareResize(self.image_size)

    @property
    def tower(self) -> nn.Module:
        return self.frame_encoder

    def encode(self, frames: Tensor) -> Tensor:
        slice_of = len(frames) if torch.is_grad_enabled() or frames.is_cuda else ENCODE_FRAMES_CPU
        parts = [self.frame_encoder(part) for part in frames.split(max(1, slice_of))]
        return torch.cat(parts)[:, None, None, None]

    def words_of(self, task: str) -> NDArray[np.int64]:
        """Token ids of an instruction: lower-cased words and signs, hashed (CRC-32) into the table."""
        parts = re.findall(r"\w+|[^\w\s]", task.lower())[: self.max_words]
        return np.array([zlib.crc32(part.encode()) % self.words for part in parts], np.int64)

    def text(self, tasks: Sequence[str]) -> tuple[list[NDArray[np.int64]], Tensor]:
        return [self.words_of(task) for task in tasks], self.word_embedding.weight
