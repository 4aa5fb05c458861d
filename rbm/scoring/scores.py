"""What scoring answers: numbers for the frames of a video, as arrays, as JSON, as a table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rbm.frames import pick_frames
from rbm.scoring.vote import vote

if TYPE_CHECKING:  # a client of the server has no rich
    from rich.table import Table
    from rich.text import Text

Floats = NDArray[np.float32]

_BAR = 24  # characters of a full bar in the table


@dataclass(frozen=True)
class ClipScores:
    """Scores of one clip that was read as it is.

    Attributes:
        progress, progress_std, success: float32 (n,), one for each frame of the clip.
        utility: the read-out by which clips of one task are ranked; nan where the model compares pairs jointly.
        remaining: float32 (n,), seconds until the task is done; none where the model does not say it.
    """

    progress: Floats
    progress_std: Floats
    success: Floats
    utility: float
    remaining: Floats | None = None


@dataclass(frozen=True)
class FrameScore:
    """What a session says of the frame that it was just given; fields as in `Scores`."""

    progress: float
    progress_std: float
    success: float
    remaining: float | None = None


@dataclass(frozen=True)
class Scores:
    """Scores of one video under one instruction, for n of its frames.

    Attributes:
        progress: float32 (n,), 0 to 1, how far along the task is.
        progress_std: float32 (n,), the spread that the model gives to it.
        success: float32 (n,), calibrated probability that the task is done.
        frame_index: int32 (n,), index of each scored frame in the original video.
        timestamp: float32 (n,), its time in seconds from the first frame.
        task: the instruction.
        fps, n_frames: of the original video.
        remaining: float32 (n,), seconds until the task is done; none where the model does not say it.
    """

    progress: Floats
    progress_std: Floats
    success: Floats
    frame_index: NDArray[np.int32]
    timestamp: Floats
    task: str
    fps: float
    n_frames: int
    remaining: Floats | None = None

    def __len__(self) -> int:
        return len(self.progress)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, keyed as the attributes."""
        arrays = ["frame_index", "timestamp", "progress", "progress_std", "success"]
        if self.remaining is not None:
            arrays.append("remaining")
        numbers = {name: [_short(value) for value in getattr(self, name).tolist()] for name in arrays}
        return {"task": self.task, "fps": _short(self.fps), "n_frames": self.n_frames, **numbers}

    def dense(self) -> Scores:
        """Scores of every frame of the video, those between two scored frames on the line between them."""
        every = np.arange(self.n_frames, dtype=np.int32)

        def between(values: Floats) -> Floats:
            return np.interp(every, self.frame_index, values).astype(np.float32)

        return replace(
            self,
            progress=between(self.progress),
            progress_std=between(self.progress_std),
            success=between(self.success),
            frame_index=every,
            timestamp=between(self.timestamp),
            remaining=None if self.remaining is None else between(self.remaining),
        )

    def done_at(self, k: int = 3, n: int = 5, threshold: float = 0.5) -> int | None:
        """Of the scored frames the first at which the task counts as done (`rbm.scoring.vote`), none if it never does.

        Returns:
            A position in the arrays here; `frame_index` and `timestamp` say where in the video that is.
        """
        held = vote(self.success, k, n, threshold)
        return int(held.argmax()) if held.any() else None

    def table(self, title: str = "", max_rows: int = 20) -> Table:
        """A table for the terminal of at most `max_rows` frames (at least 2), even, first and last kept."""
        from rich.table import Table
        from rich.text import Text

        shown = pick_frames(len(self), max(2, max_rows))
        table = Table(
            title=Text(title) if title else None, title_justify="left", title_style="bold", header_style="dim"
        )
        for name in ("frame", "time s", "progress", "±", "success"):
            table.add_column(name, justify="right")
        if self.remaining is not None:
            table.add_column("remaining s", justify="right")
        table.add_column(Text.assemble(("progress", "cyan"), " / ", ("success", "green")), min_width=_BAR)
        for i in shown:
            table.add_row(
                str(self.frame_index[i]),
                f"{self.timestamp[i]:.2f}",
                f"{self.progress[i]:.3f}",
                f"{self.progress_std[i]:.3f}",
                f"{self.success[i]:.3f}",
                *([] if self.remaining is None else [f"{self.remaining[i]:.1f}"]),
                _bar(float(self.progress[i]), float(self.success[i])),
            )
        if len(shown) < len(self):
            table.caption = f"{len(shown)} of {len(self)} scored frames; --rows {len(self)} shows all, --json keeps all"
            table.caption_justify = "left"
        return table


def _bar(progress: float, success: float) -> Text:
    """A bar as long as the progress, with a tick where the success probability stands."""
    from rich.text import Text

    filled = round(progress * _BAR)
    cells = ["━" if i < filled else " " for i in range(_BAR)]
    bar = Text("".join(cells), style="cyan")
    tick = min(_BAR - 1, round(success * (_BAR - 1)))
    return Text.assemble(bar[:tick], ("●", "green"), bar[tick + 1 :])


def _short(value: float) -> float:
    return value if isinstance(value, int) else round(value, 6)
