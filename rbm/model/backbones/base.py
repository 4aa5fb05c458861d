"""What a backbone is: it turns instructions and frames into hidden states; all above it is shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from rbm.model.batch import ClipBatch
from rbm.model.memory import Memory
from rbm.model.prompt import check_text

Preprocessor = Callable[[NDArray[np.uint8]], Tensor]
"""uint8 (T, H, W, 3) of any size -> uint8 (T, h, w, 3) as the model takes it. Holds no weights and can be pickled,
so that loader processes preprocess without the model."""


class PairMode(StrEnum):
    """How clips become sequences (`rbm.model.layout`)."""

    CLIPS = "clips"
    """Every clip by itself, without a read-out."""
    READOUT = "readout"
    """Every clip by itself, with a preference read-out at its end."""
    JOINT = "joint"
    """Pairs in one sequence, isolated from each other, one read-out that sees both."""
    CAUSAL = "causal"
    """Pairs in one stream, the second clip sees the first, one read-out."""


@dataclass(frozen=True)
class States:
    """Hidden states after the backbone's final norm.

    Attributes:
        frames: float (F, d), one for every frame shown.
        readouts: float (N, d) in READOUT, (P, d) in JOINT and CAUSAL, none in CLIPS.
    """

    frames: Tensor
    readouts: Tensor | None


class Backbone(nn.Module, ABC):
    """Instructions and frames in, hidden states out. Constructor arguments are plain values: they are stored."""

    name: ClassVar[str]
    """Its key in `BACKBONES`, stored with the weights."""
    freezes_tower: ClassVar[bool] = False
    """Whether training leaves the tower as it is, unless it is told otherwise."""
    never_trained: ClassVar[tuple[str, ...]] = ()
    """Names of parts that no training changes, and that not every process runs at every step."""
    hidden: int
    """d, the width of the hidden states."""
    views: tuple[str, ...] = ()
    """Names of the views of a step, in the order of `ClipBatch.frame_ids`; empty: one, whichever comes first."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able: `from_config(config(), files())` is the same architecture."""

    def files(self) -> dict[str, str]:
        """Text files that belong beside the weights (a tokenizer): name -> content."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any], files: Mapping[str, str]) -> Backbone:
        """The architecture that `config()` and `files()` describe, with random weights."""
        return cls(**config)

    @property
    @abstractmethod
    def preprocessor(self) -> Preprocessor:
        """How frames are brought to the model's size: one way, in training and in scoring."""

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """The part that `encode` runs."""

    def places(self, height: int, width: int) -> int:
        """Places of a sequence that a frame of this size takes, before preprocessing."""
        return 1

    def check_task(self, task: str) -> None:
        """Raises UserError for an instruction that the model cannot read."""
        check_text(task)

    @abstractmethod
    def encode(self, frames: Tensor) -> Tensor:
        """Features of preprocessed frames, each by itself: uint8 (U, h, w, 3) -> float (U, levels, rows, columns, d).

        They may stand for the frames in `ClipBatch.frames`: a frozen tower's are computed once and kept.
        """

    @abstractmethod
    def forward(self, batch: ClipBatch, mode: PairMode, pairs: Tensor | None = None) -> States:
        """Hidden states of a batch; `pairs` int64 (P, 2) are the clips that share a sequence.

        Raises:
            ValueError: a pair mode whose pairs do not use every clip exactly once.
        """

    @abstractmethod
    def advance(self, batch: ClipBatch, behind: Sequence[tuple[Memory, int]]) -> Tensor:
        """Hidden states of steps that follow what memories hold; without gradients.

        Args:
            batch: clip n holds the new steps of `behind[n]`; its instruction counts where it is the first.
            behind: a memory and how many of its steps are kept, for each clip. Clips are worked off in their order: the
                same memory may stand there several times, and finds what the clips before it left.

        Returns:
            float (F, d), as `States.frames` of one forward over kept and new steps. The memories hold the new steps.
        """

    def encoded(self, batch: ClipBatch) -> list[Tensor]:
        """Features of each group of the batch's frames; those that are features already stay."""
        return [group if group.is_floating_point() else self.encode(group) for group in batch.frames]


def view_names(views: Sequence[str]) -> tuple[str, ...]:
    """The names of a model's views.

    Raises:
        ValueError: something else than different names.
    """
    named = not isinstance(views, str) and isinstance(views, Sequence) and all(isinstance(v, str) and v for v in views)
    if not named or len(set(views)) < len(views):
        raise ValueError(f"views must be different names, such as [near, wrist], not {views!r}")
    return tuple(views)


def check_views(batch: ClipBatch, views: tuple[str, ...]) -> None:
    """Raises ValueError for a batch with more views a step than the model knows."""
    shown, known = batch.frame_ids.shape[1], max(1, len(views))
    if shown > known:
        raise ValueError(f"a batch with {shown} views a step, the model reads {', '.join(views) or 'one'}")


def check_pairs(mode: PairMode, pairs: Tensor | None, clips: int) -> list[tuple[int, int]]:
    """The pairs of a mode in which clips share a sequence.

    Raises:
        ValueError: a clip is in no pair or in two.
    """
    used = [] if pairs is None else pairs.flatten().tolist()
    if sorted(used) != list(range(clips)):
        raise ValueError(f"pair mode {mode.value!r} needs every clip in exactly one pair")
    return list(zip(used[::2], used[1::2], strict=True))
