"""The small causal transformer of `nano` and `rewind`: a step is one vector, and so is a word or an instruction.

Clips and pairs are rows of units (`rbm.model.layout`), side by side and padded: rows are short.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rbm.model.backbones.base import Backbone, PairMode, States, check_pairs, check_views, view_names
from rbm.model.batch import ClipBatch
from rbm.model.layout import Kind, Row, causal_row, clip_row, joint_row, visible
from rbm.model.memory import Mark, Memory, Recall, Run

PADDING = -1
"""In the column `kind` of padded rows."""

_NO_WORDS = np.zeros(0, np.int64)


def rotary(x: Tensor, position: Tensor) -> Tensor:
    """Rotary position encoding (RoFormer, arXiv 2104.09864): x (B, heads, L, D), position (B, L)."""
    half = x.shape[-1] // 2
    frequency = 100.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position[:, None, :, None].float() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention: query, key, value (B, heads, L, D) -> (B, heads, L, D)."""


class Block(nn.Module):
    """Pre-norm transformer block: x (B, L, d), position (B, L)."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.norm_mlp = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, mix: Mix) -> Tensor:
        B, L, d = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(B, L, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = mix(rotary(q, position), rotary(k, position), v)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(B, L, d)))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class RowBackbone(Backbone):
    """A backbone that reads rows of units; its constructor calls `add_transformer` and makes `marker_embedding`."""

    marker_embedding: nn.Embedding

    def add_transformer(self, hidden: int, layers: int, heads: int, dropout: float, views: Sequence[str]) -> None:
        """Make the blocks, the final norm, and a gain and a shift for each of several views.

        Raises:
            ValueError: sizes that do not fit each other, or views that are no names.
        """
        if hidden % (2 * heads):
            raise ValueError(f"hidden ({hidden}) must be a multiple of twice the heads ({heads})")
        self.hidden, self.layers, self.heads, self.dropout = hidden, layers, heads, dropout
        self.views = view_names(views)
        if len(self.views) > 1:
            # gain - 1, and shift: with a shift alone, views could change places unnoticed
            self.view_embedding = nn.Embedding(len(self.views), 2 * hidden)
            nn.init.normal_(self.view_embedding.weight, std=0.5)
        self.blocks = nn.ModuleList(Block(hidden, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    @abstractmethod
    def text(self, tasks: Sequence[str]) -> tuple[list[NDArray[np.int64]], Tensor]:
        """Instructions as units: for each the rows of a table, int64 (n,), and the table, float (rows, d)."""

    def frame_tokens(self, features: Tensor) -> Tensor:
        """Features of frames as units: (U, width of the features) -> (U, d)."""
        return features

    def forward(self, batch: ClipBatch, mode: PairMode, pairs: Tensor | None = None) -> States:
        text, table = self.text(batch.tasks)
        kind, source, position, mask = padded(self._rows(batch, text, mode, pairs), batch.frame_ids.device)
        tokens = self._steps(batch)

        x = self.marker_embedding((kind - Kind.SPLIT).clamp(min=0))
        said, shown = kind == Kind.TEXT, kind == Kind.FRAME
        x = torch.where(said[..., None], F.embedding(torch.where(said, source, 0), table).to(x.dtype), x)
        x = torch.where(shown[..., None], tokens[torch.where(shown, source, 0)].to(x.dtype), x)
        mix = partial(F.scaled_dot_product_attention, attn_mask=mask)
        for block in self.blocks:
            x = block(x, position, mix)
        x = self.norm(x)

        frames = torch.empty(len(batch.frame_ids), self.hidden, dtype=x.dtype, device=x.device)
        frames = frames.index_copy(0, source[shown], x[shown])
        return States(frames, None if mode is PairMode.CLIPS else x[kind == Kind.PREFERENCE])

    def advance(self, batch: ClipBatch, behind: Sequence[tuple[Memory, int]]) -> Tensor:
        new = list(dict.fromkeys(t for t, (_, kept) in zip(batch.tasks, behind, strict=True) if kept == 0))
        text, table = self.text(new) if new else ([], self.marker_embedding.weight)
        words_of = dict(zip(new, text, strict=True))
        runs, said, positions = [], [], []
        for task, count, (memory, kept) in zip(batch.tasks, batch.lengths.tolist(), behind, strict=True):
            mark = memory.crop(kept)
            words = words_of[task] if kept == 0 else _NO_WORDS
            begin, size = mark.places, len(words) + count
            first = begin + len(words) + 1
            memory.marks += [Mark(place, place, 0) for place in range(first, first + count)]
            memory.reserve(begin + size, 1)
            runs.append(Run(memory, begin, size))
            said += [words, np.full(count, -1, np.int64)]
            positions.append(np.arange(begin, begin + size))
        source = torch.from_numpy(np.concatenate(said)).to(table.device)
        position = torch.from_numpy(np.concatenate(positions)).to(table.device)[None]
        tokens = self._steps(batch)
        x = F.embedding(source.clamp(min=0), table).to(tokens.dtype)
        shown = (source < 0).nonzero().flatten()
        x = x.index_copy(0, shown, tokens)[None]
        recall = Recall(runs)
        for number, block in enumerate(self.blocks):
            x = block(x, position, lambda q, k, v, n=number: recall.attend(n, q[0], k[0], v[0])[None])
        return self.norm(x[0].index_select(0, shown))

    def _steps(self, batch: ClipBatch) -> Tensor:
        """One token a step: float (F, d)."""
        check_views(batch, self.views)
        tokens = self.frame_tokens(torch.cat([features.flatten(1) for features in self.encoded(batch)]))
        if len(self.views) < 2:
            return tokens[batch.frame_ids[:, 0]]
        there = (batch.frame_ids >= 0)[..., None]
        gain, shift = self.view_embedding.weight[: batch.frame_ids.shape[1]].chunk(2, dim=-1)
        seen = tokens[batch.frame_ids.clamp(min=0)] * (1 + gain) + shift
        return (seen * there).sum(1) / there.sum(1)

    def _rows(self, batch: ClipBatch, text: list[NDArray[np.int64]], mode: PairMode, pairs: Tensor | None) -> list[Row]:
        lengths = batch.lengths.tolist()
        ends = np.cumsum(lengths)
        steps = [np.arange(end - length, end) for length, end in zip(lengths, ends, strict=True)]
        if mode in (PairMode.CLIPS, PairMode.READOUT):
            return [clip_row(words, shown, mode is PairMode.READOUT) for words, shown in zip(text, steps, strict=True)]
        used = check_pairs(mode, pairs, len(lengths))
        make = joint_row if mode is PairMode.JOINT else causal_row
        # the instruction of a pair is its first clip's, as in the published layout
        return [make(text[a], steps[a], steps[b]) for a, b in used]


def padded(rows: list[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
