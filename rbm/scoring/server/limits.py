"""What one client may ask of the server, so that it cannot take it from the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from rbm.errors import UserError
from rbm.scoring.server.refusal import Refusal

MiB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds of requests; `conf/serve.yaml` says what each is for. Sizes are in bytes or pixels, times in seconds.

    Raises:
        UserError: a value that makes no sense.
    """

    body_bytes: int = 256 * MiB
    pending_bytes: int = 1024 * MiB
    upload_seconds: float = 60.0
    request_seconds: float = 120.0
    stuck_seconds: float = 300.0
    queue: int = 512
    clips: int = 256
    frames: int = 4096
    side: int = 8192
    pixels: int = 4096 * 4096
    video_frames: int = 250_000
    video_pixels: int = 1 << 39
    decode_seconds: float = 60.0
    decoder_bytes: int = 4096 * MiB
    task_chars: int = 2000
    sessions: int = 4096
    session_bytes: int = 2048 * MiB
    session_seconds: float = 600.0
    connections: int = 2048
    ws_message_bytes: int = 16 * MiB
    ws_in_flight: int = 64

    def __post_init__(self) -> None:
        check_numbers(self, {})

    def public(self) -> dict[str, Any]:
        """What a client has to know."""
        names = ("body_bytes", "clips", "frames", "side", "pixels", "task_chars", "sessions", "session_seconds")
        return {name: asdict(self)[name] for name in (*names, "ws_message_bytes", "ws_in_flight")}

    def check_task(self, task: object) -> str:
        """The instruction, if it is one.

        Raises:
            Refusal: it is no text, empty or too long.
        """
        if not isinstance(task, str):
            raise Refusal("the task (instruction) must be text, such as 'open the drawer'")
        if not task.strip():
            raise Refusal("the task (instruction) is empty; say what the robot should do, such as 'open the drawer'")
        if len(task) > self.task_chars:
            raise Refusal(f"the task has {len(task)} characters, this server takes {self.task_chars}; say it shorter")
        try:
            task.encode()
        except UnicodeEncodeError as error:  # JSON can say it
            raise Refusal("the task has half of a surrogate pair; send valid Unicode") from error
        return task

    def check_frames(self, frames: object) -> np.ndarray:
        """The frames of a clip, uint8 (T, H, W, 3), if that is what they are, and not too many or too large.

        Raises:
            Refusal: they are not.
        """
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
            found = frames.dtype if isinstance(frames, np.ndarray) else type(frames).__name__
            raise Refusal(f"frames must be an array of uint8, 0 to 255, not {found}")
        if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise Refusal(f"frames have shape {frames.shape}; send (T, H, W, 3), RGB, with at least one frame")
        self.check_size(*frames.shape[:3])
        return frames

    def check_size(self, count: int, height: int, width: int) -> None:
        """Raises Refusal (413) for more frames or larger pictures than this server takes in one array."""
        if count > self.frames:
            raise Refusal(f"{count} frames in one array, this server takes {self.frames}; send fewer", 413)
        self.check_picture(height, width)

    def check_picture(self, height: int, width: int) -> None:
        """Raises Refusal (413) for larger pictures than this server takes."""
        if max(height, width) > self.side or height * width > self.pixels:
            raise Refusal(
                f"frames of {width} × {height} pixels, this server takes {self.pixels} pixels and sides of "
                f"{self.side}; send smaller ones (a model looks at a few hundred pixels a side)",
                413,
            )


def check_numbers(values: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Numbers of a dataclass are numbers of their kind, at least 1 (whole ones) or above 0, or within their range.

    Raises:
        UserError: one is not; the message names it.
    """
    for item in fields(values):
        value, kind = getattr(values, item.name), str(item.type)
        if not kind.startswith(("int", "float")) or (value is None and kind.endswith("None")):
            continue
        whole = kind.startswith("int")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise UserError(f"{item.name} must be a {'whole ' if whole else ''}number, not {value!r}")
        low, high = ranges.get(item.name, (1 if whole else 1e-3, 1 << 60))
        if not low <= value <= high:
            raise UserError(f"{item.name} is {value}; it must be {low} to {high}")
