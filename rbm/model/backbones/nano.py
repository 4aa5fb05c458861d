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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rbm.model.backbones.base import Backbone, PairMode, States, check_pairs
from rbm.model.batch import ClipBatch
from rbm.model.layout import N_MARKERS, Kind, Row, causal_row, clip_row, joint_row, visible

PADDING = -1
"""In the column `kind` of padded rows."""


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


def rotary(x: Tensor, position: Tensor) -> Tensor:
    """Rotary position encoding (RoFormer, arXiv 2104.09864): x (B, heads, L, D), position (B, L)."""
    half = x.shape[-1] // 2
    frequency = 100.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position[:, None, :, None].float() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block: x (B, L, d), mask bool (B, 1, L, L), position (B, L)."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.norm_mlp = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, position: Tensor) -> Tensor:
        B, L, d = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(B, L, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotary(q, position), rotary(k, position), v, attn_mask=mask)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(B, L, d)))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class NanoBackbone(Backbone):
    """The `nano` backbone.

    Args:
        image_size: frames are resized to this many pixels on both sides (aspect ratio is not kept).
        width: channels of the first convolution; the last has four times as many.
        hidden: d, width of the transformer.
        layers, heads: of the transformer.
        words: rows of the hashed word table.
        max_words: longer instructions are cut here.
        dropout: in the transformer, while training.
        views: how many views a step may show; each has a learned vector, and a step is the mean of those there.
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
        views: int = 1,
    ) -> None:
        super().__init__()
        if hidden % (2 * heads):
            raise ValueError(f"hidden ({hidden}) must be a multiple of twice the heads ({heads})")
        self.image_size, self.width, self.hidden = image_size, width, hidden
        self.layers, self.heads, self.words, self.max_words, self.dropout = layers, heads, words, max_words, dropout
        self.views = views
        self.frame_encoder = FrameEncoder(hidden, width, image_size)
        self.word_embedding = nn.Embedding(words, hidden)
        self.marker_embedding = nn.Embedding(N_MARKERS, hidden)
        nn.init.normal_(self.word_embedding.weight, std=0.5)
        nn.init.normal_(self.marker_embedding.weight, std=0.5)
        if views > 1:
            self.view_embedding = nn.Embedding(views, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def config(self) -> dict[str, Any]:
        names = ("image_size", "width", "hidden", "layers", "heads", "words", "max_words", "dropout", "views")
        return {name: getattr(self, name) for name in names}

    @property
    def preprocessor(self) -> SquareResize:
        return SquareResize(self.image_size)

    @property
    def tower(self) -> nn.Module:
        return self.frame_encoder

    def encode(self, frames: Tensor) -> Tensor:
        return self.frame_encoder(frames)[:, None, None, None]

    def words_of(self, task: str) -> NDArray[np.int64]:
        """Token ids of an instruction: lower-cased words and signs, hashed (CRC-32) into the table."""
        parts = re.findall(r"\w+|[^\w\s]", task.lower())[: self.max_words]
        return np.array([zlib.crc32(part.encode()) % self.words for part in parts], np.int64)

    def forward(self, batch: ClipBatch, mode: PairMode, pairs: Tensor | None = None) -> States:
        rows = self._rows(batch, mode, pairs)
        kind, source, position, mask = _padded(rows, batch.frame_ids.device)
        tokens = self._steps(batch)

        x = self.marker_embedding((kind - Kind.SPLIT).clamp(min=0))
        text, shown = kind == Kind.TEXT, kind == Kind.FRAME
        x = torch.where(text[..., None], self.word_embedding(torch.where(text, source, 0)), x)
        x = torch.where(shown[..., None], tokens[torch.where(shown, source, 0)].to(x.dtype), x)
        for block in self.blocks:
            x = block(x, mask, position)
        x = self.norm(x)

        frames = torch.empty(len(batch.frame_ids), self.hidden, dtype=x.dtype, device=x.device)
        frames = frames.index_copy(0, source[shown], x[shown])
        return States(frames, None if mode is PairMode.CLIPS else x[kind == Kind.PREFERENCE])

    def _steps(self, batch: ClipBatch) -> Tensor:
        """One token a step: float (F, d)."""
        tokens = torch.cat([features.flatten(1) for features in self.encoded(batch)])
        if self.views == 1:
            return tokens[batch.frame_ids[:, 0]]
        there = (batch.frame_ids >= 0)[..., None]
        seen = tokens[batch.frame_ids.clamp(min=0)] + self.view_embedding.weight[: batch.frame_ids.shape[1]]
        return (seen * there).sum(1) / there.sum(1)

    def _rows(self, batch: ClipBatch, mode: PairMode, pairs: Tensor | None) -> list[Row]:
        lengths = batch.lengths.tolist()
        ends = np.cumsum(lengths)
        steps = [np.arange(end - length, end) for length, end in zip(lengths, ends, strict=True)]
        text = [self.words_of(task) for task in batch.tasks]
        if mode in (PairMode.CLIPS, PairMode.READOUT):
            return [clip_row(words, shown, mode is PairMode.READOUT) for words, shown in zip(text, steps, strict=True)]
        used = check_pairs(mode, pairs, len(lengths))
        make = joint_row if mode is PairMode.JOINT else causal_row
        # the instruction of a pair is its first clip's, as in the published layout
        return [make(text[a], steps[a], steps[b]) for a, b in used]


def _padded(rows: list[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows side by side: kind, source, position int64 (R, L) and the mask bool (R, 1, L, L)."""
    longest = max(len(row) for row in rows)
    kind = np.full((len(rows), longest), PADDING, np.int64)
    source = np.zeros_like(kind)
    position = np.zeros_like(kind)
    mask = np.zeros((len(rows), 1, longest, longest), bool)
    for index, row in enumerate(rows):
        length = len(row)
        kind[index, :length] = row.kind
        source[index, :length] = row.source
        position[index, :length] = row.position
        mask[index, 0, :length, :length] = visible(row.segment)
        # padding looks at the first unit: a line of the mask without any True would be NaN
        mask[index, 0, length:, 0] = True
    tensors = [torch.from_numpy(array).to(device) for array in (kind, source, position, mask)]
    return tensors[0], tensors[1], tensors[2], tensors[3]
