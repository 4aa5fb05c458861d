"""A user's own demonstrations: video files, and a table that says what each one shows.

The table is a CSV file with a header, or JSON lines. Columns:

    video            path, relative to the table (needed)
    task             the instruction (needed)
    quality          successful (default), suboptimal or failure
    done_seconds     when the task is first done, in seconds; or
    done_frame       the same as a frame number, from 0 (both: only for successful ones, one of the two)
    messy            true for a success with pauses, detours or retries
    partial_success  a graded outcome in [0, 1]
    embodiment       the robot (or hand) at work
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import logging
import math
import os
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dataset_builder.sources.base import Episode, Skipped
from rbm.errors import UserError
from rbm.trajectory import Quality, Task, Trajectory
from rbm.video import VideoFile, stored_clip

logger = logging.getLogger(__name__)

IMPORTER_VERSION = 1
VIEW = "main"
COLUMNS = ("video", "task", "quality", "done_seconds", "done_frame", "messy", "partial_success", "embodiment")
_NEEDED = ("video", "task")
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0", "")
_HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class Row:
    """One checked row of the table; `line` is its line in the file, from 1."""

    line: int
    id: str
    video: Path
    task: str
    quality: Quality
    done_seconds: float | None
    done_frame: int | None
    messy: bool
    partial_success: float | None
    embodiment: str


class BadRow(UserError):
    """A row that can not be used; the message names the table and the line."""


@dataclass
class VideosSource:
    """Videos listed in a table become trajectories.

    Args:
        manifest: the table, `.csv`, `.jsonl` or `.ndjson`.
        name: source name; ids are `<name>/<path of the video from the table's folder>`.
        on_error: `stop` at the first row or video that can not be used, or `skip` and count it.
        completion: fraction of a successful video at which its task is done, for rows without `done_*`.
        embodiment, is_robot, is_sim: hold for every row that does not say otherwise.
        rows_per_unit: rows that one worker takes at a time.
        facts: whatever else is worth keeping (origin, licence, ...), JSON values.

    Raises:
        UserError: the table is missing or unreadable, a column is missing or misspelt; with
            on_error=stop also for a bad row, naming its line.
    """

    manifest: str
    name: str = "videos"
    on_error: str = "stop"
    completion: float | None = None
    embodiment: str = ""
    is_robot: bool = True
    is_sim: bool = False
    rows_per_unit: int = 16
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.on_error not in ("stop", "skip"):
            raise UserError(f"on_error={self.on_error!r}: choose stop or skip")
        if self.rows_per_unit < 1:
            raise UserError(f"rows_per_unit={self.rows_per_unit}: need at least 1")
        self.manifest = os.path.abspath(os.path.expanduser(self.manifest))

    def source_facts(self) -> dict[str, Any]:
        return {"family": "videos", "completion": self.completion, **self.facts}

    def tasks(self) -> list[Task]:
        return [Task(text) for text in dict.fromkeys(row.task for row in self._rows if isinstance(row, Row))]

    def units(self) -> list[str]:
        """Chunks of rows, as `first-last` row numbers from 0."""
        starts = range(0, len(self._rows), self.rows_per_unit)
        return [f"{start}-{min(start + self.rows_per_unit, len(self._rows)) - 1}" for start in starts]

    def collect(self, unit: str, skip: Container[str]) -> Iterator[Episode | Skipped]:
        first, last = (int(number) for number in unit.split("-"))
        for row in self._rows[first : last + 1]:
            if isinstance(row, Skipped):
                yield row
            elif row.id not in skip:
                try:
                    yield self._episode(row)
                except UserError as error:
                    if self.on_error == "stop":
                        raise
                    yield Skipped(f"{self.manifest} line {row.line}: {row.video}", str(error))

    @cached_property
    def _rows(self) -> list[Row | Skipped]:
        """Every row, checked as far as it goes without opening the video."""
        rows: list[Row | Skipped] = []
        lines: dict[str, int] = {}
        for line, cells in _read_table(Path(self.manifest)):
            try:
                row = self._check(line, cells)
                if row.id in lines:
                    raise BadRow(f"{self._at(line)}: {cells['video']!r} stands on line {lines[row.id]} already")
                lines[row.id] = line
                rows.append(row)
            except BadRow as error:
                if self.on_error == "stop":
                    raise
                rows.append(Skipped(self._at(line), str(error)))
        if not rows:
            raise UserError(f"{self.manifest}: has no rows; give one a video")
        return rows

    def _check(self, line: int, cells: dict[str, Any]) -> Row:
        where = self._at(line)
        given = _text(cells, "video")
        task = _text(cells, "task")
        if not given or not task:
            raise BadRow(f"{where}: the {'task' if given else 'video'} is empty")
        folder = Path(self.manifest).parent
        video = folder / given
        quality = _text(cells, "quality") or Quality.SUCCESSFUL.value
        if quality not in {item.value for item in Quality}:
            raise BadRow(f"{where}: unknown quality {quality!r}: choose successful, suboptimal or failure")
        done_seconds = _number(where, cells, "done_seconds")
        done_frame = _number(where, cells, "done_frame")
        if done_seconds is not None and done_frame is not None:
            raise BadRow(f"{where}: has done_seconds and done_frame: give one of them")
        if (done_seconds is not None or done_frame is not None) and quality != Quality.SUCCESSFUL:
            raise BadRow(f"{where}: says when the task was done, and that it is {quality}: only a success is ever done")
        if done_frame is not None and done_frame != int(done_frame):
            raise BadRow(f"{where}: done_frame {done_frame} is no frame number")
        partial = _number(where, cells, "partial_success")
        if partial is not None and partial > 1:
            raise BadRow(f"{where}: partial_success {partial} must be in [0, 1]")
        return Row(
            line=line,
            id=f"{self.name}/{Path(os.path.relpath(video, folder)).as_posix()}",
            video=video,
            task=task,
            quality=Quality(quality),
            done_seconds=done_seconds,
            done_frame=None if done_frame is None else int(done_frame),
            messy=_truth(where, cells, "messy"),
            partial_success=partial,
            embodiment=_text(cells, "embodiment") or self.embodiment,
        )

    def _episode(self, row: Row) -> Episode:
        try:
            video = VideoFile(row.video)
            clip = stored_clip(video)
            digest = _sha256(row.video)
        except (UserError, OSError) as error:
            raise BadRow(f"{self._at(row.line)}: {error}") from error
        trajectory = Trajectory(
            id=row.id,
            task=row.task,
            source=self.name,
            quality=row.quality,
            frame_index=clip.frame_index,
            timestamp=clip.timestamp,
            fps=clip.fps,
            height=clip.frames.shape[1],
            width=clip.frames.shape[2],
            views=(VIEW,),
            messy=row.messy,
            partial_success=row.partial_success,
            embodiment=row.embodiment,
            is_robot=self.is_robot,
            is_sim=self.is_sim,
            done_index=self._done_index(row, video.timestamps),
            provenance=f"{row.id.removeprefix(self.name + '/')} videos-importer-{IMPORTER_VERSION} sha256:{digest}",
        )
        return Episode(trajectory, {VIEW: clip.frames})

    def _done_index(self, row: Row, timestamps: np.ndarray) -> int | None:
        last = len(timestamps) - 1
        if row.done_frame is not None:
            if row.done_frame > last:
                raise BadRow(f"{self._at(row.line)}: done_frame {row.done_frame}, the last frame is {last}")
            return row.done_frame
        if row.done_seconds is None:
            return None
        frame_time = float(timestamps[-1]) / last if last else 0.0
        if row.done_seconds > timestamps[-1] + frame_time:
            end = f"{timestamps[-1]:.2f}"
            raise BadRow(f"{self._at(row.line)}: done_seconds {row.done_seconds}, the video ends at {end}")
        # The frame on screen at that moment: a time read off a player lies somewhere within it.
        return max(0, int(np.searchsorted(timestamps, row.done_seconds + 1e-6, side="right")) - 1)

    def _at(self, line: int) -> str:
        return f"{self.manifest} line {line}"


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with the line on which each ends; refuses a table whose columns are wrong."""
    if path.suffix.lower() not in (".csv", ".jsonl", ".ndjson"):
        raise UserError(f"{path}: is no table of videos: need .csv with a header, or .jsonl")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                yield from _read_csv(path, file)
            else:
                yield from _read_json_lines(path, file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path}: the table of videos can not be read: {reason}") from error


def _read_csv(path: Path, file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, restkey="", skipinitialspace=True)
    _check_columns(path, [name.strip() for name in reader.fieldnames or []])
    reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
    for cells in reader:
        if "" in cells and any(cells[""]):
            raise UserError(f"{path} line {reader.line_num}: has more cells than the header: quote texts with commas")
        yield reader.line_num, cells


def _read_json_lines(path: Path, file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    seen: set[str] = set()
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            cells = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {line}: no JSON: {error.msg}") from error
        if not isinstance(cells, dict):
            raise UserError(f'{path} line {line}: need a JSON object such as {{"video": ..., "task": ...}}')
        if not set(cells) <= seen or not seen:
            _check_columns(path, list(cells))
            seen |= set(cells)
        yield line, cells


def _check_columns(path: Path, names: list[str]) -> None:
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        there = ", ".join(names) or "none"
        raise UserError(f"{path}: has no column {' and '.join(missing)} (columns: {there})")
    for name in names:
        if name and name not in COLUMNS:
            close = difflib.get_close_matches(name.lower(), COLUMNS, n=1)
            if close:
                raise UserError(f"{path}: column {name!r} is unknown: is it {close[0]!r}?")
            logger.warning("%s: column %r is not used", path, name)


def _text(cells: dict[str, Any], name: str) -> str:
    value = cells.get(name)
    return "" if value is None else str(value).strip()


def _number(where: str, cells: dict[str, Any], name: str) -> float | None:
    text = _text(cells, name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise BadRow(f"{where}: {name} {text!r} is no number of at least 0")
    return value


def _truth(where: str, cells: dict[str, Any], name: str) -> bool:
    text = _text(cells, name).lower()
    if text not in _TRUE + _FALSE:
        raise BadRow(f"{where}: {name} {text!r}: write true or false")
    return text in _TRUE


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
