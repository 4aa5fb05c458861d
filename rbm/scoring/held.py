"""A frame that a live session holds: as pixels, as features, as PNG.

Letters in shapes: h, w pixels as the model takes them.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rbm.errors import UserError
from rbm.video import Frames

MOST_PIXELS = 4096 * 4096
"""Of a frame that is read from a PNG."""


class Held:
    """A frame that was pushed: its pixels as the model takes them, and their features, for each view."""

    __slots__ = ("bytes", "features", "number", "packed", "pixels")

    def __init__(self, number: int, pixels: tuple[Tensor | None, ...] | None = None) -> None:
        self.number = number
        self.bytes = 0  # what `own` or `pack` has counted
        self.pixels = pixels  # uint8 (1, h, w, 3) a view
        self.features: tuple[Tensor | None, ...] | None = None  # (1, levels, rows, columns, d) a view
        self.packed: tuple[bytes | None, ...] | None = None  # PNG a view, so that pixels need not be kept

    def own(self) -> None:
        """Give up the batch that this frame came in, which would stay in memory with it; count what is kept."""
        self.pixels, self.features = _owned(self.pixels), _owned(self.features)
        kept = [x for part in (self.pixels, self.features) if part for x in part if x is not None]
        self.bytes = sum(x.numel() * x.element_size() for x in kept) + sum(len(png or b"") for png in self.packed or ())

    @property
    def places(self) -> int:
        """Places that it takes in a sequence, words around it not counted; it must have features."""
        return sum(x.shape[2] * x.shape[3] for x in self.features or () if x is not None)

    def png(self) -> tuple[bytes | None, ...]:
        if self.packed is not None:
            return self.packed
        assert self.pixels is not None
        return tuple(None if x is None else write_png(x[0].numpy()) for x in self.pixels)

    def pack(self) -> None:
        """Keep PNGs instead of pixels."""
        self.packed, self.pixels = self.png(), None
        self.own()

    def forget(self) -> None:
        """Keep no features."""
        self.features = None
        self.own()

    def copy(self) -> Held:
        """The same tensors, in a frame that may lose them by itself."""
        copy = Held(self.number, self.pixels)
        copy.features, copy.packed, copy.bytes = self.features, self.packed, self.bytes
        return copy

    def unpack(self) -> None:
        if self.pixels is None:
            assert self.packed is not None
            self.pixels = tuple(None if png is None else torch.from_numpy(read_png(png))[None] for png in self.packed)
            self.bytes = 0


def write_png(pixels: Frames) -> bytes:
    """A picture without loss: uint8 (h, w, 3)."""
    written = BytesIO()
    Image.fromarray(pixels).save(written, "PNG", compress_level=1)
    return written.getvalue()


def read_png(png: bytes) -> Frames:
    """What `write_png` wrote.

    Raises:
        UserError: something else, or a picture of more than `MOST_PIXELS`.
    """
    try:
        with Image.open(BytesIO(png), formats=["PNG"]) as picture:
            if picture.mode != "RGB" or picture.width * picture.height > MOST_PIXELS:
                raise UserError("a frame of the snapshot is no picture that a session can hold")
            return np.array(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError("a frame of the snapshot cannot be read: it is damaged") from error


def _owned(tensors: tuple[Tensor | None, ...] | None) -> tuple[Tensor | None, ...] | None:
    if tensors is None:
        return None
    return tuple(
        x if x is None or x.numel() * x.element_size() == x.untyped_storage().nbytes() else x.clone() for x in tensors
    )
