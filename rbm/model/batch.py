"""What a reward model reads and what it says.

Letters in shapes:
    N  clips in a batch
    F  steps of all clips together, F = sum(lengths); clip n owns a run of `lengths[n]` of them
    V  views: how many pictures a step shows (nearly always one)
    U  distinct frames among these: a frame that several clips show is stored, and encoded, once
    P  preference pairs
    K  progress bins
All per-step tensors are flat (F, ...), in the order of the clips: no padding above the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T", bound="_Tensors")


@dataclass(frozen=True)
class _Tensors:
    """A dataclass whose tensors travel together."""

    def to(self: _T, device: torch.device | str, non_blocking: bool = False) -> _T:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: _T) -> _T:
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self: _T, move) -> _T:  # type: ignore[no-untyped-def]
        def moved(value):  # type: ignore[no-untyped-def]
            if isinstance(value, Tensor):
                return move(value)
            if isinstance(value, tuple):
                return tuple(moved(item) for item in value)
            return value._each(move) if isinstance(value, _Tensors) else value

        return type(self)(**{field.name: moved(getattr(self, field.name)) for field in fields(self)})


Clip = Tensor | Sequence[Tensor | None]
"""Frames of one view, or of each of V views (none: this clip lacks the view)."""


@dataclass(frozen=True)
class ClipBatch(_Tensors):
    """N clips, each with its instruction.

    Attributes:
        frames: the U frames in groups of one size. A group is uint8 (U_g, h, w, 3), RGB, already through
            `Backbone.preprocessor`; or floating (U_g, levels, rows, columns, d), what `Backbone.encode` made of them.
        frame_ids: int64 (F, V), which frames each step shows, counted through all groups; -1 for a view that is not
            there. Every step shows at least one.
        lengths: int64 (N,), steps of each clip.
        tasks: N instructions.
    """

    frames: tuple[Tensor, ...]
    frame_ids: Tensor
    lengths: Tensor
    tasks: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.tasks) != len(self.lengths):
            raise ValueError(f"{len(self.tasks)} instructions for {len(self.lengths)} clips")
        if self.frame_ids.ndim != 2:
            raise ValueError(f"frame_ids must have the shape (steps, views), not {tuple(self.frame_ids.shape)}")

    @classmethod
    def from_clips(cls, clips: Sequence[tuple[Clip, str]]) -> ClipBatch:
        """One batch of clips (frames as in `ClipBatch.frames`, instruction); a tensor given twice is stored once.

        Raises:
            ValueError: there are no clips, one has no view, or its views differ in length.
        """
        if not clips:
            raise ValueError("a batch needs at least one clip")
        views = [(frames,) if isinstance(frames, Tensor) else tuple(frames) for frames, _ in clips]
        pool = FramePool()
        ids = []
        for clip in views:
            lengths = {len(frames) for frames in clip if frames is not None}
            if not lengths:
                raise ValueError("a clip needs at least one view")
            if len(lengths) > 1:
                raise ValueError(f"the views of a clip must have the same number of frames, got {sorted(lengths)}")
            column = torch.full((lengths.pop(), max(map(len, views))), -1)
            for view, frames in enumerate(clip):
                if frames is not None:
                    column[:, view] = torch.arange(len(frames)) + pool.add(id(frames), frames)
            ids.append(column)
        groups, renumber = pool.groups()
        return cls(
            frames=groups,
            frame_ids=renumber(torch.cat(ids)),
            lengths=torch.tensor([len(column) for column in ids]),
            tasks=tuple(task for _, task in clips),
        )


class FramePool:
    """Collects the frames of a batch: what is added under one key twice is stored once, sizes may differ."""

    def __init__(self) -> None:
        self._stored: dict[Hashable, tuple[int, Tensor]] = {}
        self._total = 0

    def add(self, key: Hashable, frames: Tensor) -> int:
        """The number of the first of these frames, in the order in which they came."""
        if key not in self._stored:
            self._stored[key] = (self._total, frames)
            self._total += len(frames)
        return self._stored[key][0]

    def groups(self) -> tuple[tuple[Tensor, ...], Callable[[Tensor], Tensor]]:
        """The frames in groups of one size, and what turns numbers that `add` gave into places in these groups."""
        of_size: dict[tuple[object, ...], list[tuple[int, Tensor]]] = {}
        for start, frames in self._stored.values():
            of_size.setdefault((frames.dtype, *frames.shape[1:]), []).append((start, frames))
        order = torch.cat([start + torch.arange(len(x)) for group in of_size.values() for start, x in group])
        place = torch.empty(self._total + 1, dtype=torch.int64)
        place[order] = torch.arange(self._total)
        place[-1] = -1  # -1 stays -1
        return tuple(torch.cat([x for _, x in group]) for group in of_size.values()), lambda ids: place[ids]


@dataclass(frozen=True)
class RewardOutput(_Tensors):
    """What the model says of a batch.

    Attributes:
        progress_logits: float (F, K).
        success_logits: float (F,), before calibration.
        utility: float (N,), the read-out g of each clip; none where preference is `joint`.
        preference_logits: float (P,), positive where the first of the pair is better; none without pairs.
        remaining_logits: float (F, R), of the seconds until the task is done; none where the model has no such head.
    """

    progress_logits: Tensor
    success_logits: Tensor
    utility: Tensor | None
    preference_logits: Tensor | None
    remaining_logits: Tensor | None = None


@dataclass(frozen=True)
class Targets(_Tensors):
    """Supervision of a batch of P pairs. A masked-out value is never read.

    Attributes:
        progress, success: float32 (F,).
        progress_mask, success_mask: bool (F,).
        preference: float32 (P,), 1 where the first clip of the pair is better.
        preference_mask: bool (P,).
        remaining: float32 (F,), seconds; remaining_mask: bool (F,). None for models that do not say it.
    """

    progress: Tensor
    progress_mask: Tensor
    success: Tensor
    success_mask: Tensor
    preference: Tensor
    preference_mask: Tensor
    remaining: Tensor | None = None
    remaining_mask: Tensor | None = None


@dataclass(frozen=True)
class Counts:
    """How much of each kind of supervision the whole optimiser batch holds.

    All micro-batches on all ranks together: the means of the losses run over these, so that neither
    gradient accumulation nor data parallelism changes a gradient.
    """

    progress: int
    success_positive: int
    success_negative: int
    preference: int
    remaining: int = 0

    @classmethod
    def of(cls, targets: Targets) -> Counts:
        positive = targets.success_mask & (targets.success > 0.5)
        return cls(
            progress=int(targets.progress_mask.sum()),
            success_positive=int(positive.sum()),
            success_negative=int(targets.success_mask.sum()) - int(positive.sum()),
            preference=int(targets.preference_mask.sum()),
            remaining=0 if targets.remaining_mask is None else int(targets.remaining_mask.sum()),
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Counts)))


@dataclass(frozen=True)
class PairBatch(_Tensors):
    """A micro-batch of training: 2P clips, clips 2p and 2p+1 are pair p.

    `counts` are those of the whole optimiser batch that it belongs to; `strategies` name how each pair was made.
    """

    clips: ClipBatch
    targets: Targets
    counts: Counts
    strategies: tuple[str, ...]

    @property
    def pairs(self) -> Tensor:
        """int64 (P, 2), rows of `clips`."""
        return torch.arange(len(self.clips.tasks), device=self.clips.lengths.device).reshape(-1, 2)
