"""What can be scored in bulk: the trajectories of a corpus, the episodes of a LeRobot data set.

Both are asked for attempts by number, say which frames of one are looked at, and give them in blocks of at most 64. An
attempt that cannot be read is given as `Unreadable`, with the reason, and the next ones follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rbm.corpus import Corpus, CorruptPayload
from rbm.corpus.ahead import in_order, threads_for
from rbm.errors import UserError
from rbm.evaluation.lerobot import LeRobotDataset
from rbm.frames import pick_frames, session_strides
from rbm.scoring.scorer import Shown
from rbm.scoring.scores import ClipScores, Scores
from rbm.trajectory import MAX_STORED_FRAMES
from rbm.video import Frames

BLOCK_FRAMES = 64
"""Frames of a long attempt that are held at a time."""


@dataclass(frozen=True)
class Looks:
    """Which frames a model looks at.

    Attributes:
        context_frames: how many it reads at once.
        every: score every so-many-th frame as a live session would; none: `context_frames`, even, in one forward.
        views: names of the views that it reads; empty: one, whichever it is given.
    """

    context_frames: int
    every: int | None
    views: tuple[str, ...]

    def at(self, n: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Positions of the frames (of n) that are looked at, rising, and which of them get a score."""
        if self.every is None:
            stored = pick_frames(n, MAX_STORED_FRAMES)
            looked_at = stored[pick_frames(len(stored), self.context_frames)]
            return looked_at, np.ones(len(looked_at), bool)
        everywhere = np.arange(n)
        asked = (everywhere % self.every == 0) | (everywhere == n - 1)
        looked_at = np.flatnonzero(asked | (everywhere % session_strides(n, self.context_frames) == 0))
        return looked_at, asked[looked_at]


@dataclass(frozen=True)
class Attempt:
    """One trajectory or episode of T frames.

    Attributes:
        number: its place among what is scored.
        name: its id.
        row: its number in the corpus, or `episode_index`.
        start: number of its first frame in a LeRobot data set.
        task: the instruction that it is scored under. n_tasks: how many it has.
        frame_index: int64 (T,), of each frame in the original video. timestamp: float64 (T,), seconds.
        fps: of the original video.
        looked_at: int64 (n,), positions among the T frames. asked: bool (n,), which of them get a score.
    """

    number: int
    name: str
    row: int
    start: int
    task: str
    n_tasks: int
    frame_index: NDArray[np.int64]
    timestamp: NDArray[np.float64]
    fps: float
    looked_at: NDArray[np.int64]
    asked: NDArray[np.bool_]

    @property
    def scored(self) -> NDArray[np.int64]:
        """Positions of the frames that get a score."""
        return self.looked_at[self.asked]


@dataclass(frozen=True)
class Block:
    """The next frames of an attempt that are looked at, uint8 (n, H, W, 3), of each view; `start` were before them."""

    attempt: Attempt
    start: int
    frames: Shown

    def __len__(self) -> int:
        return len(next(iter(self._views)))

    @property
    def bytes(self) -> int:
        return sum(view.nbytes for view in self._views)

    @property
    def last(self) -> bool:
        return self.start + len(self) == len(self.attempt.looked_at)

    def each(self) -> Iterator[Shown]:
        """Its frames one by one."""
        if not isinstance(self.frames, Mapping):
            return iter(self.frames)
        names = list(self.frames)
        return (dict(zip(names, shown, strict=True)) for shown in zip(*self.frames.values(), strict=True))

    @property
    def _views(self) -> Sequence[Frames]:
        return list(self.frames.values()) if isinstance(self.frames, Mapping) else [self.frames]


@dataclass(frozen=True)
class Unreadable:
    number: int
    name: str
    why: str


Scored = tuple[Attempt, ClipScores]


class Source(Protocol):
    """Attempts that are scored, by number; pickled to every process."""

    @property
    def joined(self) -> str | None:
        """Name of the file into which all parts go at the end."""

    def __len__(self) -> int: ...

    def facts(self) -> dict[str, Any]:
        """What says that two runs score the same: JSON values."""

    def read(self, numbers: range, looks: Looks) -> Iterator[Block | Unreadable]: ...

    def table(self, scored: Sequence[Scored], remaining: bool) -> pa.Table: ...


@dataclass(frozen=True)
class CorpusSource:
    """Trajectories of a corpus.

    Attributes:
        rows: their numbers, int64, rising; none: all.
        view: the camera that is shown; none: those that the model reads, or of a model with one view the first.
    """

    corpus: Corpus
    rows: NDArray[np.int64] | None = None
    view: str | None = None

    @property
    def joined(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.corpus) if self.rows is None else len(self.rows)

    def facts(self) -> dict[str, Any]:
        rows = "all" if self.rows is None else _hash(self.rows)
        return {"kind": "corpus", "snapshot": self.corpus.snapshot, "selection": rows, "view": self.view}

    def read(self, numbers: range, looks: Looks) -> Iterator[Block | Unreadable]:
        def block(number: int) -> Block | Unreadable:
            return self._block(number, looks)

        return in_order(block, numbers, threads_for(self.corpus.location))

    def _block(self, number: int, looks: Looks) -> Block | Unreadable:
        row = number if self.rows is None else int(self.rows[number])
        try:
            record = self.corpus[row]
            looked_at, asked = looks.at(record.n_frames)
            attempt = Attempt(
                number=number,
                name=record.id,
                row=row,
                start=0,
                task=record.task,
                n_tasks=1,
                frame_index=record.frame_index.astype(np.int64),
                timestamp=record.timestamp.astype(np.float64),
                fps=record.fps,
                looked_at=looked_at,
                asked=asked,
            )
            views = shown_views(looks.views, self.view, record.views)
            frames = {name: np.ascontiguousarray(record.frames(looked_at, view)) for name, view in views.items()}
            return Block(attempt, 0, frames if looks.views else frames[""])
        except CorruptPayload as error:
            return Unreadable(number, error.trajectory, error.what)
        except UserError as error:
            return Unreadable(number, self.corpus.ids[row], str(error))

    def table(self, scored: Sequence[Scored], remaining: bool) -> pa.Table:
        """A row for each frame that was scored."""
        counts = [len(attempt.scored) for attempt, _ in scored]

        def each(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
            return pa.array([value for value, n in zip(values, counts, strict=True) for _ in range(n)], kind)

        columns = {
            "trajectory": each([attempt.name for attempt, _ in scored], pa.string()),
            "row": each([attempt.row for attempt, _ in scored], pa.int64()),
            "task": each([attempt.task for attempt, _ in scored], pa.string()),
            "frame_index": _joined([a.frame_index[a.scored] for a, _ in scored], np.int64),
            "timestamp": _joined([a.timestamp[a.scored] for a, _ in scored], np.float32),
            "progress": _joined([said.progress for _, said in scored], np.float32),
            "progress_std": _joined([said.progress_std for _, said in scored], np.float32),
            "success": _joined([said.success for _, said in scored], np.float32),
        }
        if remaining:
            columns["remaining"] = _joined([said.remaining for _, said in scored], np.float32)
        return pa.table(columns)


@dataclass(frozen=True)
class LeRobotSource:
    """Episodes of a LeRobot data set.

    Attributes:
        view: the camera that is shown, by its name in the data set (its last part is enough); none: those that the
            model reads, where there are such, else the first.
    """

    dataset: LeRobotDataset
    view: str | None = None

    @property
    def joined(self) -> str:
        return "robometer_progress.parquet"

    def __len__(self) -> int:
        return len(self.dataset)

    def facts(self) -> dict[str, Any]:
        camera = None if self.view is None else self.dataset.camera(self.view)
        return {"kind": "lerobot", "version": self.dataset.version, "content": self.dataset.fingerprint, "view": camera}

    def cameras(self, views: tuple[str, ...]) -> dict[str, str]:
        """The camera that is shown as each of the model's views."""
        if self.view is not None or not views:
            camera = self.dataset.camera(self.view)
            name = camera.rpartition(".")[2]
            return {next((view for view in views if view in (camera, name)), (*views, "")[0]): camera}
        ends = {name.rpartition(".")[2]: name for name in reversed(self.dataset.cameras)}
        known = ends | {name: name for name in self.dataset.cameras}
        return {view: known[view] for view in views if view in known} or {views[0]: self.dataset.cameras[0]}

    def read(self, numbers: range, looks: Looks) -> Iterator[Block | Unreadable]:
        cameras = self.cameras(looks.views)
        for number in numbers:
            try:
                yield from self._blocks(number, looks, cameras)
            except UserError as error:
                yield Unreadable(number, self.dataset.name(number), str(error))

    def _blocks(self, number: int, looks: Looks, cameras: Mapping[str, str]) -> Iterator[Block]:
        episode = self.dataset.episode(number)
        looked_at, asked = looks.at(len(episode))
        attempt = Attempt(
            number=number,
            name=self.dataset.name(number),
            row=episode.index,
            start=episode.start,
            task=episode.task,
            n_tasks=episode.n_tasks,
            frame_index=episode.frame_index,
            timestamp=episode.timestamp,
            fps=self.dataset.fps,
            looked_at=looked_at,
            asked=asked,
        )
        streams = {view: self.dataset.frames(episode, camera, looked_at) for view, camera in cameras.items()}
        for start in range(0, len(looked_at), BLOCK_FRAMES):
            frames = {view: np.stack(list(islice(stream, BLOCK_FRAMES))) for view, stream in streams.items()}
            yield Block(attempt, start, frames if looks.views else frames[""])

    def table(self, scored: Sequence[Scored], remaining: bool) -> pa.Table:
        """A row for each frame; what was not scored stands on the line between the scores before and after it.

        The columns that reward-weighted cloning may be told to read, `progress_sparse` and `progress_dense`, are the
        same: it gives frames without a number the full weight, so both have one for every frame. `scored` tells which
        were looked at themselves.
        """
        dense = [_dense(attempt, said) for attempt, said in scored]
        progress = _joined([scores.progress for scores in dense], np.float32)
        columns = {
            "index": _joined([a.start + np.arange(len(a.frame_index)) for a, _ in scored], np.int64),
            "episode_index": _joined([np.full(len(a.frame_index), a.row) for a, _ in scored], np.int64),
            "frame_index": _joined([a.frame_index for a, _ in scored], np.int64),
            "progress_dense": progress,
            "progress_sparse": progress,
            "progress_std": _joined([scores.progress_std for scores in dense], np.float32),
            "success": _joined([scores.success for scores in dense], np.float32),
            "scored": _joined([np.isin(np.arange(len(a.frame_index)), a.scored) for a, _ in scored], np.bool_),
        }
        if remaining:
            columns["remaining"] = _joined([scores.remaining for scores in dense], np.float32)
        return pa.table(columns)


def shown_views(model: tuple[str, ...], view: str | None, there: Sequence[str]) -> dict[str, str]:
    """The view of a trajectory that is shown as each of the model's views ("" where it has none).

    Raises:
        UserError: none of them is there.
    """
    if view is not None:
        if view not in there:
            raise UserError(f"it has no view {view!r}, only {', '.join(there)}")
        return {view if view in model else (*model, "")[0]: view}
    if not model:
        return {"": there[0]}
    found = {name: name for name in model if name in there}
    if not found:
        raise UserError(
            f"it has none of the views that the model reads ({', '.join(model)}), only {', '.join(there)}; choose one "
            "with --view"
        )
    return found


def _dense(attempt: Attempt, said: ClipScores) -> Scores:
    """Scores of every frame."""
    at = attempt.scored
    scores = Scores(
        said.progress,
        said.progress_std,
        said.success,
        at.astype(np.int32),
        attempt.timestamp[at].astype(np.float32),
        attempt.task,
        attempt.fps,
        len(attempt.frame_index),
        said.remaining,
    )
    return scores.dense()


def _joined(parts: Sequence[Any], kind: Any) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, kind), *parts]).astype(kind)


def _hash(rows: NDArray[np.int64]) -> str:
    return sha256(np.ascontiguousarray(rows, "<i8").tobytes()).hexdigest()
