"""What a backbone is: it turns instructions and frames into hidden states; all above it is shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from rbm.model.batch import ClipBatch

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
    hidden: int
    """d, the width of the hidden states."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able: `BACKBONES[name](**config)` is the same architecture."""

    @property
    @abstractmethod
    def preprocessor(self) -> Preprocessor:
        """How frames are brought to the model's size: one way, in training and in scoring."""

    @abstractmethod
    def forward(self, batch: ClipBatch, mode: PairMode, pairs: Tensor | None = None) -> States:
        """Hidden states of a batch; `pairs` int64 (P, 2) are the clips that share a sequence.

        Raises:
            ValueError: a pair mode whose pairs do not use every clip exactly once.
        """
