"""What a reward model reads and what it says.

Letters in shapes:
    N  clips in a batch
    F  frames shown in all clips together, F = sum(lengths); clip n owns a run of `lengths[n]` of them
    U  distinct frames among these: a frame that several clips show is stored, and encoded, once
    P  preference pairs
    K  progress bins
All per-frame tensors are flat (F, ...), in the order of the clips: no padding above the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
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
            return value._each(move) if isinstance(value, _Tensors) else value

        return type(self)(**{field.name: moved(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class ClipBatch(_Tensors):
    """N clips, each with its instruction.

    Attributes:
        frames: uint8 (U, h, w, 3), RGB, already through `Backbone.preprocess`.
        frame_ids: int64 (F,), which of the U frames each step shows.
        lengths: int64 (N,), steps of each clip.
        tasks: N instructions.
    """

    frames: Tensor
    frame_ids: Tensor
    lengths: Tensor
    tasks: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.tasks) != len(self.lengths):
            raise ValueError(f"{len(self.tasks)} instructions for {len(self.lengths)} clips")

    @classmethod
    def from_clips(cls, clips: Sequence[tuple[Tensor, str]]) -> ClipBatch:
        """One batch of clips (uint8 (n, h, w, 3), instruction); a tensor given twice is stored once.

        Raises:
            ValueError: the clips' frames differ in size (preprocess them first), or there are none.
        """
        if not clips:
            raise ValueError("a batch needs at least one clip")
        stored: dict[int, tuple[int, Tensor]] = {}
        total = 0
        for frames, _ in clips:
            if id(frames) not in stored:
                stored[id(frames)] = (total, frames)
                total += len(frames)
        sizes = {tuple(frames.shape[1:]) for _, frames in stored.values()}
        if len(sizes) > 1:
            raise ValueError(f"frames of one batch must have one size, got {sorted(sizes)}")
        ids = [torch.arange(len(frames)) + stored[id(frames)][0] for frames, _ in clips]
        return cls(
            frames=torch.cat([frames for _, frames in stored.values()]),
            frame_ids=torch.cat(ids),
            lengths=torch.tensor([len(frames) for frames, _ in clips]),
            tasks=tuple(task for _, task in clips),
        )


@dataclass(frozen=True)
class RewardOutput(_Tensors):
    """What the model says of a batch.

    Attributes:
        progress_logits: float (F, K).
        success_logits: float (F,), before calibration.
        utility: float (N,), the read-out g of each clip; none where preference is `joint`.
        preference_logits: float (P,), positive where the first of the pair is better; none without pairs.
    """

    progress_logits: Tensor
    success_logits: Tensor
    utility: Tensor | None
    preference_logits: Tensor | None


@dataclass(frozen=True)
class Targets(_Tensors):
    """Supervision of a batch of P pairs. A masked-out value is never read.

    Attributes:
        progress, success: float32 (F,).
        progress_mask, success_mask: bool (F,).
        preference: float32 (P,), 1 where the first clip of the pair is better.
        preference_mask: bool (P,).
    """

    progress: Tensor
    progress_mask: Tensor
    success: Tensor
    success_mask: Tensor
    preference: Tensor
    preference_mask: Tensor


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

    @classmethod
    def of(cls, targets: Targets) -> Counts:
        positive = targets.success_mask & (targets.success > 0.5)
        return cls(
            progress=int(targets.progress_mask.sum()),
            success_positive=int(positive.sum()),
            success_negative=int(targets.success_mask.sum()) - int(positive.sum()),
            preference=int(targets.preference_mask.sum()),
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
