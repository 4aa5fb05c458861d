"""Sequences of a batch end to end, without padding, each attending on its own.

What lies in the pack is cut into branches. A branch reads itself, causally, and the branches it stands behind: the
words that two clips of a pair share are one branch, the clips two, a token that judges both a fourth. From the
branches follow *streams*, plain causal sequences; attention runs on each stream by itself, streams of equal length
together, and every place of the pack takes its result from the one stream in which it sees all it may see.

transformers calls the attention by its name (`PACKED`): it makes no mask then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rbm.model.memory import Recall

PACKED = "rbm_packed"
"""The attention's name in transformers."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Streams:
    """Causal sequences that a pack of L places is read as.

    Attributes:
        gather: int64 (M,), places of the pack, stream after stream, M >= L.
        sizes: (B, n) for each run of B streams of n places.
        scatter: int64 (L,), for each place of the pack where in `gather` its result stands.
    """

    gather: Tensor
    sizes: tuple[tuple[int, int], ...]
    scatter: Tensor

    def to(self, device: torch.device) -> Streams:
        return Streams(self.gather.to(device), self.sizes, self.scatter.to(device))


def streams_of(branches: Sequence[tuple[int, int]], before: Sequence[tuple[int, ...]]) -> Streams:
    """Streams for branches (start, stop) that stand behind the branches `before` (numbers, in reading order).

    A branch that begins a longer stream in the right company needs none of its own.
    """
    covered: dict[int, tuple[int, int]] = {}
    streams: list[tuple[int, ...]] = []
    for branch in reversed(range(len(branches))):
        if branch in covered:
            continue
        stream = (*before[branch], branch)
        for place, member in enumerate(stream):
            if stream[:place] == before[member]:
                covered.setdefault(member, (len(streams), place))
        streams.append(stream)
    spans = [np.arange(start, stop) for start, stop in branches]
    lengths = [sum(len(spans[member]) for member in stream) for stream in streams]
    order = sorted(range(len(streams)), key=lambda i: lengths[i])
    starts = dict(zip(order, np.cumsum([0, *(lengths[i] for i in order)])[:-1].tolist(), strict=True))
    gather = np.concatenate([spans[member] for i in order for member in streams[i]])
    scatter = np.empty(branches[-1][1] if branches else 0, np.int64)
    for member, (which, place) in covered.items():
        begin = starts[which] + sum(len(spans[other]) for other in streams[which][:place])
        scatter[spans[member]] = begin + np.arange(len(spans[member]))
    sizes: list[tuple[int, int]] = []
    for length in (lengths[i] for i in order):
        if sizes and sizes[-1][1] == length:
            sizes[-1] = (sizes[-1][0] + 1, length)
        else:
            sizes.append((1, length))
    return Streams(torch.from_numpy(gather), tuple(sizes), torch.from_numpy(scatter))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    streams: Streams | Recall | None = None,
    pictures: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a pack: query (1, H, L, D), key and value (1, H', L, D) -> (1, L, H, D).

    With `streams` (language) each stream attends causally on its own, or new places attend to what memories hold; with
    `pictures` (vision tower) the pack is so many pictures of equal size, and every one attends to itself.

    Raises:
        RuntimeError: neither is given: everything would see everything.
    """
    if pictures is not None:
        H, L, D = query.shape[1:]
        q, k, v = (x.view(H, pictures, L // pictures, D).transpose(0, 1) for x in (query, key, value))
        seen = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        return seen.transpose(1, 2).reshape(1, L, H, D), None
    if streams is None:
        raise RuntimeError(f"attention {PACKED!r} needs its streams: call the backbone, not the model in it")
    if isinstance(streams, Recall):
        layer: Any = module.layer_idx
        return streams.attend(layer, query[0], key[0], value[0], scaling).transpose(0, 1)[None], None
    q, k, v = (x[0].transpose(0, 1).index_select(0, streams.gather) for x in (query, key, value))  # (M, H, D)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.is_cuda and not _brief(q):  # the kernels that know groups of heads there are for 16 bits
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    found = []
    start = 0
    for B, n in streams.sizes:
        stop = start + B * n
        a, b, c = (x[start:stop].unflatten(0, (B, n)).transpose(1, 2) for x in (q, k, v))  # (B, H, n, D)
        seen = F.scaled_dot_product_attention(
            a, b, c, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=a.shape[1] != b.shape[1]
        )
        found.append(seen.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(found).index_select(0, streams.scatter)[None], None


def _brief(x: Tensor) -> bool:
    """Whether attention computes in 16 bits."""
    kind = x.device.type
    return (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype) != torch.float32


def register() -> None:
    """Make the attention known to transformers under `PACKED`."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


@dataclass(frozen=True)
class Pack:
    """A batch as one sequence of L places.

    Attributes:
        ids: int64 (L,), tokens; a picture's places hold the pad token.
        position: int64 (3, L), time, row and column of the rotary encoding (all equal for text).
        picture: int64 (M,), the places that belong to pictures, in the order of the pack.
        content: int64 (M,), which feature stands there, counted through all groups of the batch's frames.
        view: int64 (M,), of which view it is.
        frames: int64 (F,), the places at which frames are read, in the order of the batch; empty if they are pooled.
        owner: int64 (M,), to which of the batch's F steps a picture's place belongs.
        readouts: int64 (N or P,), the places of preference read-outs.
        streams: who sees whom, in this pack or in what memories hold.
    """

    ids: Tensor
    position: Tensor
    picture: Tensor
    content: Tensor
    view: Tensor
    frames: Tensor
    owner: Tensor
    readouts: Tensor
    streams: Streams | Recall

    def to(self, device: torch.device) -> Pack:
        return Pack(**{name: value.to(device) for name, value in vars(self).items()})


class Place(NamedTuple):
    """A frame's grid of tokens, and where its features begin among all of the batch's."""

    rows: int
    columns: int
    start: int


class Picture(NamedTuple):
    """One picture in the text: its frame, its view, and its step in the batch."""

    frame: Place
    view: int
    step: int


class Packer:
    """Puts tokens and pictures into a pack, branch after branch.

    Args:
        pad: the token that stands for a picture. frame: the one after a step, none if frames are pooled. readout: the
            one at which preference is read.
        grid_positions: pictures have rows and columns in the rotary encoding (Qwen); else they count on (SmolVLM).
    """

    def __init__(self, pad: int, frame: int | None, readout: int, grid_positions: bool = True) -> None:
        self.pad, self.frame, self.readout, self.grid_positions = pad, frame, readout, grid_positions
        self.branches: list[tuple[int, int]] = []
        self.before: list[tuple[int, ...]] = []
        self.next_position: list[int] = []
        self._columns: dict[str, list[Ints]] = {name: [] for name in _COLUMNS}
        self._frames: list[tuple[Ints, Ints]] = []

    def add(
        self,
        ids: Ints,
        pictures: Sequence[Picture] = (),
        steps: Sequence[int] = (),
        before: tuple[int, ...] = (),
        offset: int | None = None,
    ) -> int:
        """One branch behind others; its number.

        Args:
            ids: tokens, one pad for each of `pictures`, in order.
            steps: of the batch's steps, those that are read in this branch, in order.
            before: numbers of earlier branches.
            offset: its first position, where it is not behind branches of this pack.
        """
        start = self.branches[-1][1] if self.branches else 0
        if offset is None:
            offset = max((self.next_position[b] for b in before), default=0)
        shown = ids == self.pad
        frames = [picture.frame for picture in pictures]
        sizes = np.array([frame.rows * frame.columns for frame in frames], np.int64)
        count = np.ones(len(ids), np.int64)
        advance = count.copy()
        count[shown] = sizes
        advance[shown] = [max(frame.rows, frame.columns) for frame in frames] if self.grid_positions else sizes
        at = np.repeat(offset + np.cumsum(advance) - advance, count)
        position = np.stack([at, at, at])
        inside = np.repeat(shown, count)
        if len(pictures):
            within = np.concatenate([np.arange(size) for size in sizes])
            if self.grid_positions:
                columns = np.repeat([frame.columns for frame in frames], sizes)
                position[1, inside] += within // columns
                position[2, inside] += within % columns
            else:
                position[:, inside] += within
            self._columns["content"].append(np.repeat([frame.start for frame in frames], sizes) + within)
            self._columns["view"].append(np.repeat([picture.view for picture in pictures], sizes))
            self._columns["owner"].append(np.repeat([picture.step for picture in pictures], sizes))
        tokens = np.repeat(ids, count)
        self._columns["ids"].append(tokens)
        self._columns["picture"].append(start + np.flatnonzero(inside))
        self._columns["readouts"].append(start + np.flatnonzero(tokens == self.readout))
        self._columns["position"].append(position)
        if self.frame is not None:
            self._frames.append((np.asarray(steps, np.int64), start + np.flatnonzero(tokens == self.frame)))
        self.branches.append((start, start + len(tokens)))
        self.before.append(before)
        self.next_position.append(offset + int(advance.sum()))
        return len(self.branches) - 1

    def pack(self, recall: Recall | None = None) -> Pack:
        """What was added; with `recall` its branches stand behind what memories hold, not behind each other."""
        columns = {
            name: torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts] if name != "position" else parts, -1))
            for name, parts in self._columns.items()
        }
        frames = torch.empty(sum(len(steps) for steps, _ in self._frames), dtype=torch.int64)
        for steps, places in self._frames:
            frames[torch.from_numpy(steps)] = torch.from_numpy(places)
        return Pack(**columns, frames=frames, streams=recall or streams_of(self.branches, self.before))


_COLUMNS = ("ids", "position", "picture", "content", "view", "owner", "readouts")
