"""The front's view of the workers: clips to score, sessions to advance, and who does it.

Everything here runs in the front's event loop and moves bytes; what is computed, children compute.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from rbm.scoring.scores import Scores
from rbm.scoring.server.children import Child, Done
from rbm.scoring.server.metrics import Metrics
from rbm.scoring.server.pipes import Buffer, Fields, Part
from rbm.scoring.server.refusal import DRAINING, POOL_FULL, SESSION_LOST, Refusal, busy
from rbm.scoring.server.settings import Settings

log = logging.getLogger(__name__)

_T = TypeVar("_T")

STORED_FRAMES, STORED_SIDE = 64, 240
"""Clips of at most that many frames and that short side go to a worker as they are; others are made smaller first."""


@dataclass(frozen=True)
class Upload:
    """Bytes of a video file or of an .npy file, as a client sent them."""

    data: Buffer


Video = np.ndarray | Upload
"""uint8 (T, H, W, 3), RGB, in C order; or a file's bytes."""


@dataclass(frozen=True)
class Clip:
    """Frames on their way to a worker; `decoded` is what else the decoder said of them."""

    shape: Sequence[int]
    frames: Part
    decoded: list[Any] | None = None


@dataclass(slots=True, eq=False)
class LiveSession:
    """A session that a worker holds.

    Attributes:
        number: its name here and in the worker.
        used: time (monotonic) of its last request.
        gone: why it is there no more, a sentence; none while it is.
    """

    number: int
    worker: Child
    generation: int
    used: float
    gone: str | None = None


class Engine:
    """Starts the children, shares out the work, and says no where there is too much of it.

    Args:
        settings: how the server runs.
        failed: called with a sentence when the server cannot go on.

    Attributes:
        info: what the model is, as a worker said it; empty until one was ready.
        waiting: requests that are not answered.
        draining: nothing new is taken.
    """

    def __init__(self, settings: Settings, failed: Callable[[str], None]) -> None:
        self.settings, self.limits = settings, settings.limits
        self.metrics = Metrics()
        self.info: Fields = {}
        self.waiting = 0
        self.draining = False
        self.sessions: dict[int, LiveSession] = {}
        self.ready_once = asyncio.Event()
        self._failed = failed
        self._numbers = itertools.count(1)
        self._decoding = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self.workers = [self._worker(number) for number in range(settings.workers)]
        self.decoder = Child(
            "decoder",
            "rbm.scoring.server.decoder",
            {"limits": asdict(self.limits), "threads": 1},
            lost=lambda: self._lost("decoder"),
            failed=failed,
        )

    def _worker(self, number: int) -> Child:
        name = f"worker {number}"
        settings = {
            "number": number,
            "checkpoint": self.settings.checkpoint,
            "device": self.settings.device,
            "dtype": self.settings.dtype,
            "threads": self.settings.torch_threads,
            "batch": self.settings.batch,
            "wait": self.settings.wait_ms / 1000,
            "session_bytes": max(1, self.limits.session_bytes // self.settings.workers),
        }
        child = Child(
            name,
            "rbm.scoring.server.worker",
            settings,
            ready=self._ready,
            lost=lambda: self._lost(name),
            failed=self._failed,
        )
        child.observed = lambda message: self.metrics.worked(name, message)
        return child

    def start(self) -> None:
        for child in (self.decoder, *self.workers):
            child.start()
        self._watch = asyncio.create_task(self._look_after())

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.gather(*(child.stop() for child in (self.decoder, *self.workers)))

    @property
    def ready_workers(self) -> int:
        return sum(worker.ready for worker in self.workers)

    @property
    def status(self) -> str:
        """`healthy` where requests are taken, else `starting` or `draining`."""
        return "draining" if self.draining else "healthy" if self.ready_workers else "starting"

    # clips

    async def score(
        self, clips: Sequence[tuple[Video, str]], every: int | None = None, dense: bool = False
    ) -> list[Scores]:
        """Scores of clips, each under its instruction, as `Scorer.score` gives them; `dense`: for every frame.

        Raises:
            Refusal: a clip is not what it should be, the server is busy, or a worker died.
        """
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or not 1 <= every <= 1 << 31):
            raise Refusal(f"every is {every!r}; send 1 for every frame, 2 for every second, …")
        self._check_count(len(clips))
        checked = [(self._check(video), self.limits.check_task(task)) for video, task in clips]
        with self._admitted(self.limits.request_seconds) as limit:
            async with limit:
                scored = await all_of([self._look("score", [video], task, every) for video, task in checked])
        found = [_scores(answer["scores"][0]) for answer in scored]
        return [scores.dense() for scores in found] if dense else found

    async def compare(self, a: Video, b: Video, task: str) -> tuple[float, Scores, Scores]:
        """Probability that `a` is the better attempt, and the scores of both.

        Raises:
            Refusal: as `score`.
        """
        self.limits.check_task(task)
        videos = [self._check(video) for video in (a, b)]
        with self._admitted(self.limits.request_seconds) as limit:
            async with limit:
                answer = await self._look("compare", videos, task)
        first, second = (_scores(plain) for plain in answer["scores"])
        return float(answer["p"]), first, second

    async def rank(self, videos: Sequence[Video], task: str) -> tuple[list[int], list[Scores]]:
        """Positions of the videos, best attempt first, and the scores of each, in the order in which they came.

        Raises:
            Refusal: as `score`.
        """
        self.limits.check_task(task)
        self._check_count(len(videos))
        checked = [self._check(video) for video in videos]
        with self._admitted(self.limits.request_seconds) as limit:
            async with limit:
                answer = await self._look("rank", checked, task)
        return list(answer["order"]), [_scores(plain) for plain in answer["scores"]]

    async def _look(self, op: str, videos: Sequence[Video], task: str, every: int | None = None) -> Fields:
        clips = [await self._clip(video, every is not None) for video in videos]
        fields = {
            "op": op,
            "task": task,
            "every": every,
            "clips": [{"shape": list(clip.shape), "decoded": clip.decoded} for clip in clips],
        }
        answer, _ = await self._free_worker().ask(fields, [clip.frames for clip in clips])
        self.metrics.frames.labels("clips").inc(sum(len(plain["progress"]) for plain in answer["scores"]))
        return answer

    async def _clip(self, video: Video, every: bool) -> Clip:
        if isinstance(video, Upload):
            return await self._decoded([video.data], None, every)
        small = min(video.shape[1:3]) <= STORED_SIDE and (every or len(video) <= STORED_FRAMES)
        if small:
            return Clip(video.shape, video)
        return await self._decoded([video], video.shape, every)

    async def _decoded(self, parts: Sequence[Part], shape: Sequence[int] | None, every: bool) -> Clip:
        """One upload at a time: each may take all the memory that the decoder has."""
        async with self._decoding:
            await self.decoder.until_ready(self.limits.request_seconds)
            fields = {"shape": None if shape is None else list(shape), "every": every}
            asked = asyncio.ensure_future(self.decoder.ask(fields, parts))
            try:
                answer, frames = await asyncio.wait_for(asked, self.limits.decode_seconds)
            except TimeoutError:
                self.decoder.kill()
                raise Refusal(
                    f"the upload took longer than {self.limits.decode_seconds:g} s to decode; send a shorter or "
                    "smaller video",
                    413,
                ) from None
            except asyncio.CancelledError:
                self.decoder.kill()  # nobody waits for it any more
                raise
            except Refusal as refusal:
                if refusal.code == SESSION_LOST and (self.decoder.exit_code or 0) in _CRASHES:
                    raise Refusal("the upload brings the decoder down: it is damaged; encode it again") from refusal
                raise
        return Clip(answer["shape"], frames[0], answer["decoded"])

    def _check(self, video: Video) -> Video:
        return video if isinstance(video, Upload) else np.ascontiguousarray(self.limits.check_frames(video))

    def _check_count(self, count: int) -> None:
        if not count:
            raise Refusal("there is no clip; send at least one")
        if count > self.limits.clips:
            raise Refusal(f"{count} clips in one request, this server takes {self.limits.clips}; send fewer", 413)

    # live sessions

    async def open(self, task: str) -> LiveSession:
        """A new session. Raises Refusal: too many, a bad instruction, or no worker."""
        return await self._made(self._place(), {"op": "open", "task": self.limits.check_task(task)})

    async def restore(self, snapshot: bytes) -> LiveSession:
        """A session that goes on from a snapshot. Raises Refusal: as `open`, or it is no snapshot."""
        return await self._made(self._place(), {"op": "restore"}, [snapshot])

    async def fork(self, session: LiveSession) -> LiveSession:
        """Another session that has seen the same. Raises Refusal: as `open`, or the session is gone."""
        self.check(session)
        self._check_room()
        session.used = time.monotonic()
        copy = LiveSession(next(self._numbers), session.worker, session.generation, session.used)
        return await self._made(copy, {"op": "fork", "from": session.number})

    async def reset(self, session: LiveSession, task: str | None) -> None:
        """Forget all frames. Raises Refusal: the session is gone, or a bad instruction."""
        await self._tell(session, {"op": "reset", "task": None if task is None else self.limits.check_task(task)})

    async def snapshot(self, session: LiveSession) -> bytes:
        """What `restore` takes. Raises Refusal: the session is gone."""
        answer = await self._tell(session, {"op": "snapshot"})
        return bytes(answer["snapshot"])

    def push(self, session: LiveSession, frames: np.ndarray, done: Done) -> None:
        """Score the next frames of a session, uint8 (n, H, W, 3); `done` takes the answer of the worker or a refusal.

        Raises:
            Refusal: the session is gone, the frames are none, or the server is busy.
        """
        self.check(session)
        self.limits.check_frames(frames)
        self._admit()

        def answered(answer: Fields, parts: list[bytes]) -> None:
            self.waiting -= 1
            done(answer, parts)

        session.used = time.monotonic()
        fields = {"op": "push", "session": session.number, "shape": frames.shape}
        try:
            session.worker.send(fields, [np.ascontiguousarray(frames)], answered)
        except Refusal:
            self.waiting -= 1
            raise
        self.metrics.frames.labels("sessions").inc(len(frames))

    def close(self, session: LiveSession) -> None:
        """Give back what a session holds; nobody waits for that."""
        self.sessions.pop(session.number, None)
        if session.gone is None and session.worker.ready and session.worker.generation == session.generation:
            session.worker.send({"op": "close", "session": session.number}, [], lambda answer, parts: None)
        session.gone = session.gone or "the session was closed"

    def check(self, session: LiveSession) -> None:
        """Raises Refusal where the session is there no more."""
        if session.gone is not None:
            raise busy(session.gone, SESSION_LOST, 0.0)

    def _place(self) -> LiveSession:
        """A session that no worker knows yet, for the one that has the fewest."""
        self._check_room()
        held = {id(worker): 0 for worker in self.workers}
        for session in self.sessions.values():
            held[id(session.worker)] += 1
        worker = min(self._ready_workers(), key=lambda worker: held[id(worker)])
        return LiveSession(next(self._numbers), worker, worker.generation, time.monotonic())

    def _check_room(self) -> None:
        if len(self.sessions) >= self.limits.sessions:
            raise busy(f"all {self.limits.sessions} sessions of this server are open; close some", POOL_FULL, 5.0)

    async def _made(self, session: LiveSession, fields: Fields, parts: Sequence[Part] = ()) -> LiveSession:
        """The session, once the worker has it; where that fails the worker does not keep it either."""
        self.sessions[session.number] = session
        try:
            await self._tell(session, fields, parts)
            self.check(session)
        except BaseException:
            self.close(session)
            raise
        return session

    async def _tell(self, session: LiveSession, fields: Fields, parts: Sequence[Part] = ()) -> Fields:
        self.check(session)
        session.used = time.monotonic()
        with self._admitted(self.limits.request_seconds) as limit:
            async with limit:
                answer, _ = await session.worker.ask({"session": session.number, **fields}, parts)
        return answer

    # who does it

    def _free_worker(self) -> Child:
        return min(self._ready_workers(), key=lambda worker: worker.in_flight)

    def _ready_workers(self) -> list[Child]:
        ready = [worker for worker in self.workers if worker.ready]
        if not ready:
            raise busy("no worker is ready; try again in a moment", retry_after=2.0)
        return ready

    def _admit(self) -> None:
        if self.draining:
            raise busy("the server is shutting down; try again later", DRAINING, 5.0)
        if self.waiting >= self.limits.queue:
            raise busy(f"{self.waiting} requests wait already; try again in a moment")
        self.waiting += 1

    @contextmanager
    def _admitted(self, seconds: float) -> Iterator[asyncio.Timeout]:
        """A place in the queue, and the time that a request may take."""
        self._admit()
        try:
            yield asyncio.timeout(seconds)
        except TimeoutError:
            raise busy(f"the answer took longer than {seconds:g} s; send less at once, or try again") from None
        finally:
            self.waiting -= 1

    # what goes wrong with time

    def _ready(self, facts: Fields) -> None:
        self.info = facts
        if self.ready_workers == len(self.workers):
            self.ready_once.set()

    def _lost(self, name: str) -> None:
        self.metrics.restarts.labels(name).inc()
        for session in list(self.sessions.values()):
            if session.worker.name == name:
                session.gone = "the worker that held the session died; open a new one, or restore a snapshot"
                del self.sessions[session.number]

    async def _look_after(self) -> None:
        """Closes sessions that nobody uses, and kills a worker that hangs."""
        while True:
            await asyncio.sleep(min(1.0, self.limits.session_seconds / 4, self.limits.stuck_seconds / 4))
            now = time.monotonic()
            for session in list(self.sessions.values()):
                if now - session.used > self.limits.session_seconds:
                    self.close(session)
                    session.gone = f"the session was closed after {self.limits.session_seconds:g} s without a request"
            for worker in self.workers:
                if worker.ready and worker.in_flight and now - worker.answered > self.limits.stuck_seconds:
                    log.error("the %s has answered nothing for %s s; it is killed", worker.name, now - worker.answered)
                    worker.kill()

    async def devices(self) -> list[Fields]:
        """Of each ready worker: its name, sessions, and memory; those that take too long to say it are left out."""
        ready = [worker for worker in self.workers if worker.ready]
        asked = [asyncio.wait_for(worker.ask({"op": "stats"}), 2.0) for worker in ready]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [
            {"worker": worker.name, "pid": worker.pid, "sessions": answer[0]["sessions"], "memory": answer[0]["memory"]}
            for worker, answer in zip(ready, answers, strict=True)
            if not isinstance(answer, BaseException)
        ]

    async def measured(self) -> bytes:
        """The text for Prometheus."""
        for device in await self.devices():
            self.metrics.held(device["worker"], device["sessions"])
        self.metrics.waiting.set(self.waiting)
        self.metrics.ready.set(self.ready_workers)
        return self.metrics.text()


_CRASHES = {-number for number in (4, 6, 7, 8, 11)}
"""Exit codes of SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV: what a decoder does on damaged bytes."""


async def all_of(asked: Sequence[Awaitable[_T]]) -> list[_T]:
    """All answers; the first refusal ends the others."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _scores(plain: Fields) -> Scores:
    """What a worker said (`rbm.scoring.server.worker`)."""
    remaining = plain["remaining"]
    return Scores(
        np.array(plain["progress"], np.float32),
        np.array(plain["progress_std"], np.float32),
        np.array(plain["success"], np.float32),
        np.array(plain["frame_index"], np.int32),
        np.array(plain["timestamp"], np.float32),
        plain["task"],
        plain["fps"],
        plain["n_frames"],
        None if remaining is None else np.array(remaining, np.float32),
    )
