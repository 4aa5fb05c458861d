"""What a user may give as a video, and how it travels."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError

Frames = NDArray[np.uint8]
Video = str | os.PathLike[str] | Frames
"""A video file (or .npy) on this computer, whose bytes are sent, or uint8 (T, H, W, 3), RGB."""


def check_frames(frames: Any) -> Frames:
    """The same frames.

    Raises:
        UserError: they are not uint8 (T, H, W, 3) with T, H, W of at least 1.
    """
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise UserError(f"frames must be a uint8 array of shape (T, H, W, 3), got {_kind(frames)}")
    if not frames.size:
        raise UserError(f"frames must hold at least one pixel, got shape {frames.shape}")
    return frames


def check_frame(frame: Any) -> None:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise UserError(f"a frame must be a uint8 array of shape (H, W, 3), got {_kind(frame)}")
    check_frames(frame[None])


def _kind(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


async def form(videos: Sequence[tuple[str, Video]], **values: str) -> dict[str, Any]:
    """A multipart form, as httpx takes it.

    Raises:
        UserError: a file cannot be read, or frames are none.
    """
    return {"files": [(name, await _file(video)) for name, video in videos], "data": values}


async def _file(video: Video) -> tuple[str, bytes]:
    """A name that says nothing of this computer, and the bytes."""
    if isinstance(video, np.ndarray):
        held = BytesIO()
        np.save(held, check_frames(video), allow_pickle=False)
        return "video.npy", held.getvalue()
    path = Path(video)
    try:
        return f"video{path.suffix}", await asyncio.to_thread(path.read_bytes)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
