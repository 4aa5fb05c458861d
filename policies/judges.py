"""Where the scores of live attempts come from: a model in this process, or a server.

    judge = make_judge(None)                       # the shipped weights; a Scorer, a checkpoint, "http://…", a Client
    watch = judge.open("open the drawer")          # one attempt
    score = judge.push([(watch, frame)])[0]        # of as many attempts as there are, in one call
    watch.reset()                                  # the next attempt

Both kinds give the same numbers. A server may go away in the middle: what an attempt needs to go on (a snapshot from
the server, and the frames since) is kept here, at most `REMEMBERED` frames an attempt.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.scoring.client import (
    Client,
    ClientError,
    RemoteSession,
    RequestRefused,
    ServerTimeout,
    ServerUnavailable,
    SessionLost,
)
from rbm.scoring.scorer import Scorer, check_task
from rbm.scoring.scores import FrameScore
from rbm.scoring.sessions import SessionPool

Picture = NDArray[np.uint8]
Frame = Picture | Mapping[str, Picture]
"""uint8 (H, W, 3), RGB; or one of each of several views, by name."""

PATIENCE_S = 300.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
REMEMBERED = 64
"""Frames of an attempt that are kept for a server that may be lost, between two snapshots."""
AGAIN = 16
"""Frames that are pushed again in one message, so that a slow model answers it in time."""
AT_ONCE = 32
"""Attempts that are pushed to a server at once."""


class JudgeError(UserError):
    """What was given to `push`, or what came of it, cannot be used.

    Attributes:
        reason: the sentence, without the place.
        request: position in what was given to `push`.
    """

    def __init__(self, reason: str, request: int, where: str = "") -> None:
        super().__init__(f"{where or f'attempt {request}'}: {reason}")
        self.reason, self.request = reason, request

    def at(self, where: str) -> JudgeError:
        """The same, with a place that the reader knows."""
        return type(self)(self.reason, self.request, where)


class BadFrame(JudgeError):
    """A frame is no uint8 picture, or of another size than those before it. Nothing was pushed."""


class BadScore(JudgeError):
    """The model's score is not a finite number."""


class JudgeGone(UserError):
    """The scoring server stayed away for longer than it was waited for. Attempts may differ now in the frames that they
    have taken: reset them before they are used again."""


class Watch(Protocol):
    """One attempt that is being watched."""

    task: str

    def reset(self, task: str | None = None) -> None:
        """Forget all frames: a new attempt, at another task if one is given."""

    def close(self) -> None:
        """Give back what is held."""


class Judge(Protocol):
    """Scores live attempts."""

    def open(self, task: str) -> Any:
        """A new attempt (`Watch`).

        Raises:
            UserError: the instruction is empty, or the model cannot read it.
        """

    def push(self, requests: Sequence[tuple[Any, Frame]]) -> list[FrameScore]:
        """Score the next frame of each of these attempts together; one may stand here several times.

        Raises:
            BadFrame, BadScore, JudgeGone: as they say.
        """

    def close(self) -> None:
        """Give back everything; attempts cannot be used afterwards."""


class _Counted:
    """What every watch knows: its task, how many frames it has taken, and their sizes."""

    def __init__(self, task: str) -> None:
        check_task(task)
        self.task = task
        self._begin(None)

    def _begin(self, task: str | None) -> None:
        if task is not None:
            check_task(task)
            self.task = task
        self.count = 0
        self.sizes: dict[str, tuple[int, ...]] = {}


class LocalWatch(_Counted):
    """An attempt that a `LocalJudge` watches."""

    def __init__(self, pool: SessionPool, task: str) -> None:
        super().__init__(task)
        self.session = pool.open(task)

    def reset(self, task: str | None = None) -> None:
        self.session.reset(task)
        self._begin(task)

    def close(self) -> None:
        self.session.close()


class LocalJudge:
    """A model in this process; all frames of a push share forwards.

    Args:
        scorer: the model.
        budget_bytes: memory for all attempts between two pushes (`rbm.scoring.SessionPool`); none for no bound.
    """

    def __init__(self, scorer: Scorer, budget_bytes: int | None = None) -> None:
        self._pool = SessionPool(scorer, budget_bytes)

    @property
    def scorer(self) -> Scorer:
        return self._pool.scorer

    def open(self, task: str) -> LocalWatch:
        return LocalWatch(self._pool, task)

    def push(self, requests: Sequence[tuple[LocalWatch, Frame]]) -> list[FrameScore]:
        _check_frames(requests)
        return _checked(requests, self._pool.push([(watch.session, frame) for watch, frame in requests]))

    def close(self) -> None:
        pass


class RemoteWatch(_Counted):
    """An attempt that a `RemoteJudge` has watched: a session on the server, and what it takes to open it again."""

    def __init__(self, client: Client, task: str) -> None:
        super().__init__(task)
        self._client = client
        self._session: RemoteSession | None = None
        self._lost: RemoteSession | None = None
        self._snapshot: bytes | None = None
        self._since: list[Picture] = []
        self._stale = False
        """The session still has the frames of an attempt before this one."""

    def reset(self, task: str | None = None) -> None:
        self._begin(task)
        self._snapshot, self._since, self._stale = None, [], True

    def close(self) -> None:
        for session in (self._session, self._lost):
            if session is not None:
                with contextlib.suppress(ClientError):
                    session.close()
        self._session = self._lost = None

    def score(self, frame: Picture) -> FrameScore:
        """Push the next frame, on a session that is opened again where it was lost.

        Raises:
            ServerUnavailable, ServerTimeout, SessionLost: the frame was not taken; the same again may succeed.
            ClientError: it will not.
        """
        try:
            if self._session is None:
                self._session = self._opened_again()
            elif self._stale:
                self._session.reset(self.task)
            self._stale = False
            if len(self._since) >= REMEMBERED:
                self._snapshot, self._since = self._session.snapshot(), []
            score = self._session.push(frame)
        except (SessionLost, ServerTimeout):  # nobody knows which frames it has
            self._lost, self._session = self._session or self._lost, None
            raise
        self._since.append(frame.copy())
        return score

    def _opened_again(self) -> RemoteSession:
        session = self._client.stream(self.task) if self._snapshot is None else self._client.restore(self._snapshot)
        try:
            for first in range(0, len(self._since), AGAIN):
                session.push_many(np.stack(self._since[first : first + AGAIN]))
        except BaseException:
            with contextlib.suppress(ClientError):
                session.close()
            raise
        if self._lost is not None:
            with contextlib.suppress(ClientError):
                self._lost.close()
            self._lost = None
        return session


_T = TypeVar("_T")


class RemoteJudge:
    """A scoring server (`rbm serve`): waits for it when it is away, and goes on where it was.

    Args:
        client: the way to the server.
        patience_seconds: how long an absence is waited for.
        owned: whether `close` closes the client.
    """

    def __init__(self, client: Client, patience_seconds: float = PATIENCE_S, owned: bool = False) -> None:
        if not patience_seconds >= 0:
            raise UserError(f"patience_seconds={patience_seconds} must be 0 or more")
        self.client, self.patience_seconds = client, patience_seconds
        self._owned = owned
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="rbm judge")

    def open(self, task: str) -> RemoteWatch:
        return RemoteWatch(self.client, task)

    def push(self, requests: Sequence[tuple[RemoteWatch, Frame]]) -> list[FrameScore]:
        for i, (_, frame) in enumerate(requests):
            if isinstance(frame, Mapping):
                raise BadFrame("a session on a server takes one view: give one picture, not several by name", i)
        _check_frames(requests)
        of_watch: dict[int, list[int]] = {}
        for i, (watch, _) in enumerate(requests):
            of_watch.setdefault(id(watch), []).append(i)
        given_up = threading.Event()

        def work(numbers: list[int]) -> list[FrameScore]:
            pushes = [(requests[i][0], cast(Picture, requests[i][1])) for i in numbers]
            return [self._patiently(partial(watch.score, frame), given_up) for watch, frame in pushes]

        groups = list(of_watch.values())
        if len(groups) == 1:
            return _checked(requests, work(groups[0]))
        jobs = [self._threads.submit(work, numbers) for numbers in groups]
        scores: dict[int, FrameScore] = {}
        try:
            for numbers, job in zip(groups, jobs, strict=True):
                scores.update(zip(numbers, job.result(), strict=True))
        except BaseException:
            given_up.set()  # the others wait no longer
            raise
        return _checked(requests, [scores[i] for i in range(len(requests))])

    def close(self) -> None:
        self._threads.shutdown()
        if self._owned:
            self.client.close()

    def _patiently(self, attempt: Callable[[], _T], given_up: threading.Event) -> _T:
        pause, away_since = FIRST_PAUSE_S, None
        while True:
            try:
                return attempt()
            except (ServerUnavailable, ServerTimeout, SessionLost) as error:
                now = time.monotonic()
                away_since = now if away_since is None else away_since
                left = away_since + self.patience_seconds - now
                if left <= 0 or given_up.wait(min(pause, left)):
                    raise JudgeGone(
                        f"the scoring server at {self.client.url} has been away for {self.patience_seconds:g} s "
                        f"({error}); start it again (`rbm serve`) and go on from what was saved last"
                    ) from error
                pause = min(2 * pause, LONGEST_PAUSE_S)
            except RequestRefused as error:
                raise UserError(f"the scoring server at {self.client.url} refuses: {error}") from error
            except ClientError as error:
                raise UserError(f"the scoring server at {self.client.url} gives no scores: {error}") from error


def make_judge(
    source: Scorer | Client | Judge | str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    budget_bytes: int | None = None,
    patience_seconds: float = PATIENCE_S,
    token: str | None = None,
) -> Judge:
    """Where scores shall come from.

    Args:
        source: a `Scorer`; a checkpoint (folder, file, id on the hub); a server's address, "http://…" or "https://…"; a
            `Client` of one; a judge, which is given back as it is; none for the shipped weights.
        device, budget_bytes: of a model in this process.
        patience_seconds, token: of a server; the token is taken from RBM_TOKEN where none is given.

    Raises:
        UserError: there is no such model, or this is none of these.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        client = Client(source, token=token or os.environ.get("RBM_TOKEN") or None, retries=0)
        return RemoteJudge(client, patience_seconds, owned=True)
    if isinstance(source, Client):
        return RemoteJudge(source, patience_seconds)
    if source is None or isinstance(source, str | os.PathLike):
        return LocalJudge(Scorer.from_pretrained(source, device), budget_bytes)
    if isinstance(source, Scorer):
        return LocalJudge(source, budget_bytes)
    if all(callable(getattr(source, name, None)) for name in ("open", "push", "close")):
        return source
    raise UserError(
        f"scores cannot come from {type(source).__name__}: give a Scorer, a Client, a checkpoint or http://…"
    )


def local_scorer(checkpoint: str | None) -> Scorer:
    """The model of a folder, a file, an id on the hub, or the shipped weights, in this process.

    Raises:
        UserError: it is a server's address, or cannot be loaded.
    """
    if checkpoint is not None and checkpoint.startswith(("http://", "https://")):
        raise UserError(f"{checkpoint} is a server, but this needs the model itself: give its folder")
    return Scorer.from_pretrained(checkpoint)


def _by_view(frame: Frame) -> Mapping[str, Picture]:
    return frame if isinstance(frame, Mapping) else {"": frame}


def _check_frames(requests: Sequence[tuple[Any, Frame]]) -> None:
    """Raises BadFrame for the first frame that is none, or of another size than those before it in its attempt."""
    sizes: dict[int, dict[str, tuple[int, ...]]] = {}
    for i, (watch, frame) in enumerate(requests):
        known = sizes.setdefault(id(watch), dict(watch.sizes))
        for name, picture in _by_view(frame).items():
            wrong = wrong_picture(picture)
            if wrong:
                raise BadFrame(wrong, i)
            size = known.setdefault(name, picture.shape)
            if size != picture.shape:
                raise BadFrame(
                    f"the frame is {_size(picture.shape)} and those before it in the episode were {_size(size)}; "
                    "give frames of one size",
                    i,
                )


def _checked(requests: Sequence[tuple[Any, Frame]], scores: list[FrameScore]) -> list[FrameScore]:
    """Count what was pushed, and check what came of it."""
    for watch, frame in requests:
        watch.count += 1
        watch.sizes.update({name: picture.shape for name, picture in _by_view(frame).items()})
    for i, score in enumerate(scores):
        if not all(math.isfinite(x) for x in (score.progress, score.progress_std, score.success)):
            raise BadScore(
                f"the score is not a finite number (progress {score.progress}, spread {score.progress_std}, "
                f"success {score.success}); check the model's weights with `rbm score`",
                i,
            )
    return scores


def wrong_picture(picture: Any) -> str | None:
    """Why this is no uint8 picture (H, W, 3), as a sentence; none where it is one."""
    if picture is None:
        return "there is no frame; make the environment with render_mode='rgb_array'"
    if not isinstance(picture, np.ndarray):
        return f"the frame is a {type(picture).__name__}, not an array; give uint8 (H, W, 3)"
    if np.issubdtype(picture.dtype, np.floating) and not np.isfinite(picture).all():
        return f"the frame is {picture.dtype} and holds NaN or infinite values; give uint8 (H, W, 3), 0 to 255"
    if picture.dtype != np.uint8:
        return f"the frame is {picture.dtype}; give uint8 (H, W, 3), 0 to 255"
    if picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        return f"the frame has shape {picture.shape}; give (H, W, 3), RGB"
    return None


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[0]}"
