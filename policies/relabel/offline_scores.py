"""Where the scores of recorded episodes come from: a model here, a server, or a file of a run that was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from policies.judges import wrong_picture
from rbm.errors import UserError
from rbm.evaluation.bulk import fingerprint
from rbm.evaluation.bulk_sources import BLOCK_FRAMES, Looks
from rbm.scoring.client import Client, ClientError
from rbm.scoring.scorer import Scorer
from rbm.scoring.scores import FrameScore
from rbm.scoring.sessions import SessionPool
from rbm.video import stored_frames

Floats = NDArray[np.float32]
Picture = NDArray[np.uint8]
Pictures = Callable[[NDArray[np.int64]], Iterator[Picture]]
"""Gives uint8 (H, W, 3) at rising positions of an episode."""

_ARRAYS = ("progress", "progress_std", "success")

WHOLE_BYTES, HEADER_BYTES = 64 * 2**20, 2**16
"""The most bytes of one request where a server does not say, and what of them is not frames."""


class Unusable(UserError):
    """One episode cannot be read or scored; others may."""


@dataclass(frozen=True)
class Found:
    """Scores of n frames of an episode.

    Attributes:
        at: int64 (n,), rising: which of its frames.
        progress, progress_std, success: float32 (n,).
    """

    at: NDArray[np.int64]
    progress: Floats
    progress_std: Floats
    success: Floats

    def check(self, name: str) -> None:
        """Raises UserError where a score is not a finite number: the model is broken, not the episode."""
        for what in _ARRAYS:
            good = np.isfinite(getattr(self, what))
            if not good.all():
                raise UserError(
                    f"{name}: the score of frame {self.at[int(good.argmin())]} is not a finite number ({what}); check "
                    "the model's weights with `rbm score`"
                )


class Scores(Protocol):
    """Scores frames of an episode as a live session would (`rbm.Scorer.score`, every=k).

    Attributes:
        views: names of the views that the model reads; empty: one, whichever it is given.
    """

    @property
    def views(self) -> tuple[str, ...]: ...

    def identity(self) -> str:
        """Another one for another model."""

    def of(self, name: str, pictures: Pictures, count: int, task: str, every: int, camera: str) -> Found:
        """Scores of every so-many-th of `count` frames, and of the last.

        Raises:
            Unusable: a frame cannot be read, is no picture, or is of another size than the first.
        """


class LocalScores:
    """A model in this process; at most 64 frames of an episode are held at a time."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    @property
    def views(self) -> tuple[str, ...]:
        return self.scorer.views

    def identity(self) -> str:
        return fingerprint(self.scorer.model)

    def of(self, name: str, pictures: Pictures, count: int, task: str, every: int, camera: str) -> Found:
        self.scorer.check(task)
        looked_at, asked = Looks(self.scorer.context_frames, every, self.views).at(count)
        shown = zip(looked_at.tolist(), asked.tolist(), _checked(pictures, looked_at), strict=True)
        view = next((one for one in self.views if one in (camera, camera.rpartition(".")[2])), (*self.views, "")[0])
        pool = SessionPool(self.scorer)
        session = pool.open(task)
        said = []
        while block := list(islice(shown, BLOCK_FRAMES)):
            frames = ((at, wanted, {view: frame} if view else frame) for at, wanted, frame in block)
            said += pool.push_at([(session, at, frame, wanted) for at, wanted, frame in frames])
        return Found(looked_at[asked], *(np.array([getattr(s, x) for s in said], np.float32) for x in _ARRAYS))


class RemoteScores:
    """A scoring server (`rbm serve`); frames are sent in the size in which a model looks at them.

    An episode goes whole in one request. One that is too long for that goes through a live session in blocks, which
    scores every frame, whatever `every` is.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._info = self._asked(client.info)

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(self._info.get("views") or ())

    def identity(self) -> str:
        known = ("model", "checkpoint", "weights", "context_frames", "views", "parameters", "dtype")
        return json.dumps({name: self._info.get(name) for name in known}, sort_keys=True)

    def of(self, name: str, pictures: Pictures, count: int, task: str, every: int, camera: str) -> Found:
        shown = _checked(pictures, np.arange(count))
        first = next(shown)
        shown = chain([first], shown)
        limits = self._info.get("limits") or {}
        most = int(limits.get("body_bytes", WHOLE_BYTES)) - HEADER_BYTES
        if count * first.nbytes > most or count > int(limits.get("frames", count)):
            return self._in_blocks(shown, np.unique([*range(0, count, every), count - 1]), task)
        frames = np.stack(list(shown))
        scores = self._asked(lambda: self.client.score(frames, task, every=every))
        return Found(scores.frame_index.astype(np.int64), scores.progress, scores.progress_std, scores.success)

    def _in_blocks(self, shown: Iterator[Picture], wanted: NDArray[np.int64], task: str) -> Found:
        def pushed() -> list[FrameScore]:
            with self.client.stream(task) as session:
                said = []
                while block := list(islice(shown, BLOCK_FRAMES)):
                    said += session.push_many(np.stack(block))
            return said

        said = self._asked(pushed)
        return Found(wanted, *(np.array([getattr(said[at], x) for at in wanted], np.float32) for x in _ARRAYS))

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except ClientError as error:
            raise UserError(
                f"the scoring server at {self.client.url} gives no scores: {error} (what is scored is kept: the same "
                "command goes on)"
            ) from error


def _checked(pictures: Pictures, positions: NDArray[np.int64]) -> Iterator[Picture]:
    """Frames as a model looks at them, each checked.

    Raises:
        Unusable: one is no picture, or of another size than the first.
    """
    size = None
    for position, frame in zip(positions.tolist(), pictures(positions), strict=True):
        if wrong := wrong_picture(frame):
            raise Unusable(f"frame {position}: {wrong}")
        size = size or frame.shape
        if frame.shape != size:
            raise Unusable(
                f"frame {position} is {frame.shape[1]}×{frame.shape[0]}, those before it {size[1]}×{size[0]}: frames "
                "of an episode must be of one size"
            )
        yield stored_frames(frame[None])[0]


class KeptScores:
    """A file with the scores of episodes, a line each, that a run which was stopped goes on from.

    Args:
        path: of the file.
        asked: what the scores depend on; JSON values.

    Raises:
        UserError: it cannot be read or written, or holds scores of something else.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path = path
        self._head = {"scores_of": json.loads(json.dumps(asked))}
        self._kept: dict[int, dict[str, Any]] = {}
        self._end = 0
        self._file: BinaryIO | None = None
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]  # the last one may have been cut off
            self._end = sum(map(len, whole))
            said = [json.loads(line) for line in whole]
            kept = {int(one["number"]): one for one in said[1:]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} holds no scores that can be read: delete it ({error})") from error
        if said and said[0] != self._head:
            raise UserError(
                f"{self.path} holds scores of another data set, model, camera, task or --every: delete it, or give "
                "another --scores"
            )
        self._kept = kept

    def __enter__(self) -> KeptScores:
        try:
            self._file = open(self.path, "r+b" if self.path.exists() else "xb")
            self._file.truncate(self._end)
            self._file.seek(self._end)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        if not self._end:
            self._write(self._head)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, number: int, name: str, count: int) -> Found | None:
        """Scores of an episode of `count` frames, where they are kept."""
        kept = self._kept.get(number)
        if kept is None or (kept.get("name"), kept.get("frames")) != (name, count):
            return None
        try:
            found = Found(np.array(kept["at"], np.int64), *(np.array(kept[x], np.float32) for x in _ARRAYS))
            fits = len({len(getattr(found, x)) for x in ("at", *_ARRAYS)}) == 1 and 0 < len(found.at) <= count
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits or (np.diff(found.at) <= 0).any() or found.at[0] < 0 or found.at[-1] >= count:
            raise UserError(f"{self.path}: its scores of {name} are damaged: delete it")
        return found

    def add(self, number: int, name: str, count: int, found: Found) -> None:
        numbers = {x: getattr(found, x).tolist() for x in ("at", *_ARRAYS)}
        self._write({"number": number, "name": name, "frames": count, **numbers})

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None, "scores are added within the block"
        try:
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
