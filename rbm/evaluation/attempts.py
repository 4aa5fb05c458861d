"""Attempts with their scores: what failure detection, retrieval and filtering look at, wherever the scores come from.

Scores of videos come from a live session, scores of a corpus from bulk scoring: from a folder that `rbm score --corpus`
filled, or that is filled here. Both are the same numbers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from rbm.corpus import Corpus
from rbm.errors import UserError
from rbm.evaluation.bulk import Tick
from rbm.evaluation.bulk_folder import FORMAT, MANIFEST, VERSION
from rbm.evaluation.bulk_run import Crew, plan, run
from rbm.evaluation.bulk_sources import Source
from rbm.scoring.scorer import Scorer
from rbm.scoring.scores import Scores
from rbm.trajectory import Quality

LAST = 3
"""Scored frames at the end over which an attempt's worth is the mean."""

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".gif")


@dataclass(frozen=True)
class ScoredAttempt:
    """Scores of n frames of one attempt under one instruction, and where it is known what really came of it.

    Attributes:
        id: of the trajectory, or path of the video.
        task: the instruction.
        time: float64 (n,), rising, seconds.
        progress, success: float32 (n,).
        succeeded: the true outcome, none where it is not known.
        done: seconds at which the task was first done, of a success, where it is known.
        row: number of the trajectory in its corpus, -1 where there is none.

    Raises:
        UserError: no scores, arrays that do not fit each other, a time that does not rise, a score that is not finite.
    """

    id: str
    task: str
    time: NDArray[np.float64]
    progress: NDArray[np.float32]
    success: NDArray[np.float32]
    succeeded: bool | None = None
    done: float | None = None
    row: int = -1

    def __post_init__(self) -> None:
        for name, kind in (("time", np.float64), ("progress", np.float32), ("success", np.float32)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), kind))
        n = len(self.time)
        if not n:
            raise UserError(f"attempt {self.id!r} has no scores: score at least one of its frames")
        if self.progress.shape != (n,) or self.success.shape != (n,):
            raise UserError(f"attempt {self.id!r}: times, progress and success must have one number for each frame")
        check_finite(self.id, self.progress, self.success)
        if not np.isfinite(self.time).all() or (np.diff(self.time) <= 0).any():
            raise UserError(f"attempt {self.id!r}: the times of its scores must rise")

    def __len__(self) -> int:
        return len(self.time)

    @property
    def worth(self) -> float:
        """How well it ended: mean of progress and success probability over the last `LAST` scored frames, 0 to 1."""
        return float((self.progress[-LAST:].mean(dtype=np.float64) + self.success[-LAST:].mean(dtype=np.float64)) / 2)


def check_finite(name: str, progress: ArrayLike, success: ArrayLike) -> None:
    """Raises UserError for a score that is not a number, with the place where it stands."""
    for what, values in (("progress", np.atleast_1d(progress)), ("success", np.atleast_1d(success))):
        if not np.isfinite(values).all():
            at = int(np.argmin(np.isfinite(values)))
            raise UserError(f"attempt {name!r}: its {what} at scored frame {at} is {values[at]}, not a finite number")


def check_known(attempts: Sequence[ScoredAttempt]) -> None:
    """Raises UserError where there are no attempts, or it is not known what came of one."""
    if not attempts:
        raise UserError("no attempts were given: this needs some with known outcomes")
    for attempt in attempts:
        if attempt.succeeded is None:
            raise UserError(f"the outcome of {attempt.id!r} is not known: give a corpus that has it")


def of_scores(name: str, scores: Scores) -> ScoredAttempt:
    """What `Scorer.score` or a session said of one video."""
    return ScoredAttempt(name, scores.task, np.asarray(scores.timestamp, float), scores.progress, scores.success)


def score_videos(scorer: Scorer, videos: Sequence[Path], task: str, every: int | None) -> Iterator[ScoredAttempt]:
    """Each video as a live session scores it: every k-th frame, or 64 even ones.

    Raises:
        UserError: a video cannot be read, or the instruction is empty.
    """
    from rbm.video import VideoFile, stored_clip

    for path in videos:
        video = VideoFile(path)
        yield of_scores(str(path), scorer.score(stored_clip(video) if every is None else video, task, every or 1))


def find_videos(place: Path) -> list[Path]:
    """The video itself, or those of a folder, in the order of their names; none where there is none."""
    if place.is_file():
        return [place]
    return sorted(path for path in place.glob("*") if path.suffix.lower() in VIDEO_SUFFIXES)


def is_scores(place: Path) -> bool:
    """Whether a folder is one that `rbm score --corpus` fills."""
    return (place / MANIFEST).is_file()


@contextmanager
def scored_folder(
    source: Source,
    folder: Path | None,
    tick: Tick,
    checkpoint: str | None = None,
    device: str = "auto",
    every: int | None = None,
    workers: int | None = None,
) -> Iterator[Path]:
    """A folder with the scores of all of `source`: `folder`, of which only what is missing is made, or one for a while.

    Raises:
        UserError: as `rbm.evaluation.bulk_run.plan` and `run`: nothing to score, other scores in the folder, ….
    """
    with tempfile.TemporaryDirectory(prefix="rbm-scores-") as scratch:
        out = Path(scratch, "scores") if folder is None else folder
        job, model = plan(source, out, checkpoint, device, every=every)
        run(job, model, Crew(workers), tick)
        yield out


def read_scores(folder: Path) -> pa.Table:
    """All parts of a folder that bulk scoring of a corpus filled.

    Raises:
        UserError: it is none, it is not complete, or a part is missing or damaged.
    """
    manifest = read_manifest(folder)
    if not manifest.get("complete"):
        raise UserError(
            f"{folder} is not complete: run its `rbm score --corpus` again, it goes on where it was stopped"
        )
    if manifest["asked"].get("kind") != "corpus":
        raise UserError(f"{folder} holds scores of a LeRobot data set: this works on scores of a corpus")
    parts = []
    for number in range(int(manifest["parts"])):
        path = folder / f"part-{number:06d}.parquet"
        try:
            parts.append(pq.read_table(path, page_checksum_verification=True).replace_schema_metadata(None))
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise UserError(f"{path} is missing or damaged: run its `rbm score --corpus` again") from error
    table = pa.concat_tables(parts)
    if not table.num_rows:
        raise UserError(f"{folder} holds no scores: none of its trajectories could be read")
    return table


def read_manifest(folder: Path) -> dict:
    """What `scores.json` says. Raises UserError: there is none, or of another version."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no folder of scores: make one with `rbm score --corpus CORPUS --out FOLDER`"
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("asked"), dict):
        raise UserError(f"{path} is some other file: a folder of scores comes from `rbm score --corpus`")
    if found.get("version") != VERSION:
        raise UserError(f"{path} is of version {found.get('version')}, this rbm reads {VERSION}: score again")
    return found


def read_attempts(folder: Path) -> list[ScoredAttempt]:
    """The attempts in a folder of bulk scores, in the order of the corpus; their outcomes are not in it."""
    table = read_scores(folder)
    rows = table["row"].to_numpy()
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 1))
    columns = {name: table[name].to_numpy() for name in ("timestamp", "progress", "success")}
    ids, tasks = table["trajectory"], table["task"]
    return [
        ScoredAttempt(
            ids[start].as_py(),
            tasks[start].as_py(),
            columns["timestamp"][start:stop],
            columns["progress"][start:stop],
            columns["success"][start:stop],
            row=int(rows[start]),
        )
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True)
    ]


def with_outcomes(attempts: Sequence[ScoredAttempt], corpus: Corpus) -> list[ScoredAttempt]:
    """The same with the outcomes that a corpus knows of them.

    Raises:
        UserError: the corpus has no trajectory of one of the ids.
    """
    found = []
    for attempt in attempts:
        row = corpus.row(attempt.id)
        succeeded = int(corpus.columns.quality[row]) == Quality.SUCCESSFUL.rank
        exact = succeeded and bool(corpus.columns.done_known[row])
        done = float(corpus.timestamps(row)[corpus.columns.done[row]]) if exact else None
        found.append(replace(attempt, succeeded=succeeded, done=done, row=row))
    return found
