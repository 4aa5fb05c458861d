"""How the frames of one view become bytes: two codecs behind one small interface.

A codec turns a clip into one or more parts, and each part gets its own checksum in the payload.
`jpeg` makes one part a frame, so any 8 of 64 frames are decoded alone: what training wants.
`h264` makes one part a clip, about a fifteenth of the bytes: what archives and the bundled corpus want.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.video import decode_clip, encode_video

Bytes = NDArray[np.uint8]


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
        self, part: Callable[[int], Bytes], indices: NDArray[np.int64], height: int, width: int
    ) -> NDArray[np.uint8]:
        """Frames `indices` (rising, no repeats), uint8 (len(indices), H, W, 3). `part(i)` gives checked bytes.

        Raises:
            BrokenPart: the bytes do not hold such frames.
        """
        ...


@dataclass(frozen=True)
class JpegCodec:
    """One JPEG a frame. Colour is kept at full resolution: in small frames a gripper is few pixels wide."""

    quality: int = 90
    name: str = "jpeg"

    def n_parts(self, n_frames: int) -> int:
        return n_frames

    def encode(self, frames: NDArray[np.uint8], fps: float) -> list[bytes]:
        return [
            simplejpeg.encode_jpeg(frame, quality=self.quality, colorspace="RGB", colorsubsampling="444", fastdct=False)
            for frame in np.ascontiguousarray(frames)
        ]

    def decode(
        self, part: Callable[[int], Bytes], indices: NDArray[np.int64], height: int, width: int
    ) -> NDArray[np.uint8]:
        out = np.empty((len(indices), height, width, 3), np.uint8)
        for row, index in enumerate(indices.tolist()):
            data = part(index)
            try:
                frame = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
            except ValueError as error:
                raise BrokenPart(index, f"no JPEG: {error}") from error
            if frame.shape != out.shape[1:]:
                raise BrokenPart(index, f"is {frame.shape[0]}x{frame.shape[1]}, the header says {height}x{width}")
            out[row] = frame
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
        self, part: Callable[[int], Bytes], indices: NDArray[np.int64], height: int, width: int
    ) -> NDArray[np.uint8]:
        data = part(0).tobytes()
        try:
            frames = decode_clip(data, indices, size=(height, width))
        except UserError as error:
            raise BrokenPart(0, str(error)) from error
        if frames.shape != (len(indices), height, width, 3):
            raise BrokenPart(0, f"decodes to {frames.shape}, the header says {height}x{width}")
        return frames


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
