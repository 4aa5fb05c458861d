"""How the frames of one view become bytes: two codecs behind one small interface.

A codec turns a clip into one or more parts, and each part gets its own checksum in the payload.
`jpeg` makes one part a frame, so any 8 of 64 frames are decoded alone: what training wants.
`h264` makes one part a clip, about a tenth of the bytes: what archives and the bundled corpus want.
Sizes, speeds and what the defaults were chosen by: docs/corpus.md.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.video import decode_clip, encode_video

Bytes = NDArray[np.uint8]
Subsampling = Literal["444", "422", "420"]

_SMALL = 128
"""Frames with a shorter side are kept better: a gripper in them is a few pixels wide, and they cost little anyway."""

_SHRINKS = (8, 4, 2)
"""Factors by which a JPEG decodes faster than in full; those between (5/8, 6/8, ...) are slower than no factor."""


class BrokenPart(Exception):
    """A part whose checksum holds and which still does not decode to what the header says."""

    def __init__(self, part: int, reason: str) -> None:
        super().__init__(reason)
        self.part = part
        self.reason = reason


class ClipCodec(Protocol):
    """One way to store a clip.

    To add one, imitate `JpegCodec` and enter it in `CODECS`; its name is stored in every payload.
    """

    @property
    def name(self) -> str: ...

    def n_parts(self, n_frames: int) -> int:
        """How many parts a clip of `n_frames` has."""
        ...

    def encode(self, frames: NDArray[np.uint8], fps: float) -> list[bytes]:
        """uint8 (T, H, W, 3), RGB -> the parts."""
        ...

    def decode(
        self,
        part: Callable[[int], Bytes],
        indices: NDArray[np.int64],
        height: int,
        width: int,
        min_side: int | None = None,
    ) -> NDArray[np.uint8]:
        """Frames `indices` (rising, no repeats), uint8 (len(indices), h, w, 3), RGB.

        `part(i)` gives the checked bytes of part i; `height` and `width` are the stored size, which is also h and w.
        With `min_side` a codec may decode to a smaller size, where that is faster: the same for every frame of a
        clip, and min(h, w) >= min_side unless the stored frames are smaller themselves.

        Raises:
            BrokenPart: the bytes do not hold such frames.
        """
        ...


@dataclass(frozen=True)
class JpegCodec:
    """One JPEG a frame. By default quality 80 and "420"; 90 and "444" where the shorter side is below 128 pixels.

    Args:
        quality: 1 to 100; None: by the size of the frames.
        subsampling: "444" keeps colour at full resolution, "422" halves it across, "420" both ways; None: by the size.

    Raises:
        UserError: no such quality or subsampling.
    """

    quality: int | None = None
    subsampling: Subsampling | None = None
    name: str = "jpeg"

    def __post_init__(self) -> None:
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"JPEG quality is {self.quality}: choose 1 to 100")
        if self.subsampling is not None and self.subsampling not in get_args(Subsampling):
            raise UserError(f"JPEG subsampling is {self.subsampling!r}: choose {', '.join(get_args(Subsampling))}")

    def n_parts(self, n_frames: int) -> int:
        return n_frames

    def encode(self, frames: NDArray[np.uint8], fps: float) -> list[bytes]:
        small = min(frames.shape[1:3]) < _SMALL
        quality = self.quality or (90 if small else 80)
        colour = self.subsampling or ("444" if small else "420")
        return [
            simplejpeg.encode_jpeg(frame, quality, "RGB", colour, fastdct=False)
            for frame in np.ascontiguousarray(frames)
        ]

    def decode(
        self,
        part: Callable[[int], Bytes],
        indices: NDArray[np.int64],
        height: int,
        width: int,
        min_side: int | None = None,
    ) -> NDArray[np.uint8]:
        """See `ClipCodec.decode`. The size is (ceil(height / k), ceil(width / k)) with the largest k of 8, 4, 2 that
        leaves the shorter side at least `min_side`; k = 1, the stored size, if none does or `min_side` is None.

        Halved colour is spread by repeating pixels, not by interpolation: 8 % faster, and scaled to what a model
        sees it is as good. With k > 1, and for "444", nothing is spread.
        """
        k = _shrink(min(height, width), min_side)
        size = -(-height // k), -(-width // k)
        least = size if k > 1 else (0, 0)  # (0, 0): no scaling, not even of frames so small that 7/8 is as large
        out = np.empty((len(indices), *size, 3), np.uint8)
        for frame, index in zip(out, indices.tolist(), strict=True):
            data = part(index)
            try:
                stored = simplejpeg.decode_jpeg_header(data)[:2]
                if stored != (height, width):
                    raise BrokenPart(index, f"is {stored[0]}x{stored[1]}, the header says {height}x{width}")
                simplejpeg.decode_jpeg(
                    data,
                    "RGB",
                    fastdct=False,
                    fastupsample=True,
                    min_height=least[0],
                    min_width=least[1],
                    min_factor=k,
                    buffer=frame,
                )
            except ValueError as error:
                raise BrokenPart(index, f"no JPEG: {error}") from error
        return out


@dataclass(frozen=True)
class H264Codec:
    """One clip with a key frame every `gop` frames and no B frames: a short way to any frame."""

    gop: int = 10
    crf: int = 23
    name: str = "h264"

    def n_parts(self, n_frames: int) -> int:
        return 1

    def encode(self, frames: NDArray[np.uint8], fps: float) -> list[bytes]:
        out = io.BytesIO()
        rate = min(max(fps, 1.0), 240.0)  # only a player shows it; timestamps stand in the payload's head
        encode_video(out, frames, rate, gop=self.gop, crf=self.crf)
        return [out.getvalue()]

    def decode(
        self,
        part: Callable[[int], Bytes],
        indices: NDArray[np.int64],
        height: int,
        width: int,
        min_side: int | None = None,
    ) -> NDArray[np.uint8]:
        """See `ClipCodec.decode`. Frames come at their stored size whatever `min_side` is."""
        try:
            frames = decode_clip(part(0).tobytes(), indices)
        except UserError as error:
            raise BrokenPart(0, str(error)) from error
        if frames.shape[1:3] != (height + height % 2, width + width % 2):  # odd sides were padded by one
            raise BrokenPart(0, f"decodes to {frames.shape}, the header says {height}x{width}")
        return frames[:, :height, :width]


def _shrink(short_side: int, min_side: int | None) -> int:
    """By how much a JPEG is shrunk as it is decoded."""
    if min_side is None:
        return 1
    return next((k for k in _SHRINKS if -(-short_side // k) >= min_side), 1)


CODECS: dict[str, type[JpegCodec] | type[H264Codec]] = {"jpeg": JpegCodec, "h264": H264Codec}


def make_codec(codec: str | ClipCodec) -> ClipCodec:
    """A codec by name with its default settings, or the one given.

    Raises:
        UserError: no codec has this name.
    """
    if not isinstance(codec, str):
        return codec
    if codec not in CODECS:
        raise UserError(f"unknown clip codec {codec!r}: choose {' or '.join(CODECS)}")
    return CODECS[codec]()
