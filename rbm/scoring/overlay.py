"""The video with its scores drawn in: a panel below each frame, whose curves grow with time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from rbm.frames import pick_frames
from rbm.scoring.scores import Scores
from rbm.video import Frames, VideoFile, encode_video, resize_frames

MAX_FRAMES = 1800
"""Longer videos (a minute at 30 fps) become a time lapse of that many frames: decoding hours would take hours."""

_WIDTH = 480, 1280  # the output is as wide as the input, within these
_MAX_PICTURE = 1600  # height in pixels of the picture of a narrow, tall video
_BACK, _GRID, _INK = (17, 24, 39), (55, 65, 81), (229, 231, 235)
_PROGRESS, _SPREAD, _SUCCESS = (96, 165, 250), (30, 58, 110), (52, 211, 153)


def write_overlay(target: Path, video: VideoFile, scores: Scores, advance: Callable[[], None] | None = None) -> int:
    """Writes the video with its scores as mp4, at its own frame rate, a frame at a time in memory.

    A frame shows the scores of the last scored frame at or before it: what was known then. `advance` is called
    for every frame.

    Returns:
        How many frames were written: `video.n_frames`, at most 1800.

    Raises:
        UserError: the video is damaged, or the file cannot be written.
    """
    shown = pick_frames(video.n_frames, MAX_FRAMES)
    frames = overlay_frames(video.stream(shown), video.timestamps[shown], scores)

    def counted() -> Iterator[Frames]:
        for frame in frames:
            yield frame
            if advance is not None:
                advance()

    encode_video(target, counted(), video.fps, gop=48, threads=0)
    return len(shown)


def overlay_frames(frames: Iterable[Frames], times: np.ndarray, scores: Scores) -> Iterator[Frames]:
    """Frames (H, W, 3), whose times in seconds are given, each with a panel of the scores up to then below it.

    All frames come out in one size, that of the first: scaled to a readable width, its sides even.
    """
    end = max(float(times[-1]), 1e-6)
    panel: _Panel | None = None
    picture_size = (0, 0)
    for frame, time in zip(frames, times.tolist(), strict=True):
        if panel is None:
            picture_size = _picture_size(*frame.shape[:2])
            panel = _Panel(scores, end, picture_size[1])
        # Times of a clip are float32, those of a file float64.
        now = max(0, int(np.searchsorted(scores.timestamp, time + 1e-3, side="right")) - 1)
        yield np.concatenate([resize_frames(frame[None], *picture_size)[0], panel.at(now, time)])


def _picture_size(height: int, width: int) -> tuple[int, int]:
    wide = min(max(width, _WIDTH[0]), _WIDTH[1])
    tall = height * wide / width
    if tall > _MAX_PICTURE:
        tall, wide = _MAX_PICTURE, round(wide * _MAX_PICTURE / tall)
    wide = max(wide, _WIDTH[0] // 2)
    return max(2, 2 * round(tall / 2)), 2 * round(wide / 2)


@dataclass(frozen=True)
class _Box:
    left: int
    top: int
    right: int
    bottom: int

    def x(self, share: float) -> int:
        return self.left + round(share * (self.right - self.left))

    def y(self, value: float) -> int:
        return self.bottom - round(value * (self.bottom - self.top))


class _Panel:
    """The strip below the picture: instruction, time and numbers on top, curves under them."""

    def __init__(self, scores: Scores, end: float, width: int) -> None:
        self.scores, self.end, self.width = scores, end, width
        self.unit = max(14, round(width / 32))  # pixels of a line of text
        self.height = 2 * round(4.5 * self.unit)
        pad = self.unit // 2
        self.box = _Box(pad, round(4.8 * self.unit), width - pad, self.height - pad)
        font = _font(self.unit)
        self.title = _cut(scores.task, font, width - 2 * pad - font.getlength("0000.0 / 0000.0 s  "))
        self.drawn = -1, Image.new("RGB", (0, 0))  # the numbers that were drawn last
        self.ahead = self._curves(faint=True)
        self.behind = self._curves(faint=False)

    def at(self, now: int, time: float) -> Frames:
        """The panel at `time`, with the numbers of scored frame `now`: uint8 (h, W, 3)."""
        panel = self.ahead.copy()
        cursor = self.box.x(min(1.0, time / self.end))
        panel.paste(self.behind.crop((0, 0, cursor + 1, self.height)), (0, 0))
        if self.drawn[0] != now:
            self.drawn = now, self._numbers(now)
        panel.paste(self.drawn[1], (0, 0))
        draw = ImageDraw.Draw(panel)
        draw.line([(cursor, self.box.top), (cursor, self.box.bottom)], fill=_INK, width=max(1, self.unit // 12))
        clock = f"{time:.1f} / {self.end:.1f} s"
        draw.text((self.box.right, self.unit * 0.5), clock, fill=_INK, font=_font(self.unit), anchor="ra")
        return np.asarray(panel, np.uint8)

    def _numbers(self, now: int) -> Image.Image:
        image = Image.new("RGB", (self.width, self.box.top - self.unit // 4), _BACK)
        draw, font, line = ImageDraw.Draw(image), _font(self.unit), self.unit * 1.6
        draw.text((self.box.left, self.unit * 0.5), self.title, fill=_INK, font=font)
        progress, spread = self.scores.progress[now], self.scores.progress_std[now]
        half = (self.box.left + self.box.right) // 2
        y = self.unit * 0.5 + line
        draw.text((self.box.left, y), f"progress {progress:.2f} ± {spread:.2f}", fill=_PROGRESS, font=font)
        draw.text((half, y), f"success {self.scores.success[now]:.2f}", fill=_SUCCESS, font=font)
        top, bottom = round(y + self.unit * 1.4), round(y + self.unit * 1.8)
        for value, colour, start, stop in (
            (float(progress), _PROGRESS, self.box.left, half - self.unit),
            (float(self.scores.success[now]), _SUCCESS, half, self.box.right),
        ):
            draw.rectangle([start, top, stop, bottom], fill=_GRID)
            draw.rectangle([start, top, start + round(value * (stop - start)), bottom], fill=colour)
        return image

    def _curves(self, faint: bool) -> Image.Image:
        """The grid, and unless `faint` all curves from start to end: what is not known yet stays hidden."""
        fine = 3  # drawn larger and scaled down, since Pillow's lines have hard edges
        box = _Box(*(fine * side for side in (self.box.left, self.box.top, self.box.right, self.box.bottom)))
        image = Image.new("RGB", (fine * self.width, fine * self.height), _BACK)
        draw = ImageDraw.Draw(image)
        for value in (0.0, 0.5, 1.0):
            draw.line([(box.left, box.y(value)), (box.right, box.y(value))], fill=_GRID, width=fine)
        if not faint:
            x = [box.x(min(1.0, t / self.end)) for t in self.scores.timestamp.tolist()]
            low, high = np.clip(self.scores.progress + np.outer([-1, 1], self.scores.progress_std), 0, 1).tolist()
            if len(x) > 1:
                upper, lower = zip(x, map(box.y, high), strict=True), zip(x[::-1], map(box.y, low[::-1]), strict=True)
                draw.polygon([*upper, *lower], fill=_SPREAD)
            thick = fine * max(2, self.unit // 6)
            for values, colour in ((self.scores.success, _SUCCESS), (self.scores.progress, _PROGRESS)):
                points = list(zip(x, map(box.y, values.tolist()), strict=True))
                draw.line(points, fill=colour, width=thick, joint="curve")
                draw.circle(points[0], thick / 2 if len(points) > 1 else thick, fill=colour)
        return image.resize((self.width, self.height), Image.Resampling.BOX)


@lru_cache(maxsize=8)
def _font(size: int) -> FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, FreeTypeFont), "Pillow is built with FreeType"
    return font


def _cut(text: str, font: FreeTypeFont, room: float) -> str:
    """The text, or as much of it as fits."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    fits = bisect_right(range(len(text)), room, key=lambda length: font.getlength(text[:length] + "…"))
    return text[: max(0, fits - 1)] + "…"
