"""Bulk scoring on the machines of a Ray cluster: an actor a GPU (or core), a part at a time.

Every machine must have this package installed and see the corpus, the checkpoint and the output folder under the same
paths: a worker writes its parts itself. A part whose worker dies is given to another.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

from rbm.errors import UserError
from rbm.evaluation.bulk import Job, Tick, load_scorer, score_parts
from rbm.evaluation.bulk_folder import Report
from rbm.scoring.scorer import Scorer

log = logging.getLogger(__name__)

_TRIES = 3
"""Workers that may die over one part."""

_PATIENCE_SECONDS = 30.0
"""After so long without a worker it is said what is waited for."""

_SEEN_SECONDS = 15.0
"""A network file system may show a file of another machine so much later."""


class Worker:
    """Runs on some machine of the cluster."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._scorer: Scorer | None = None

    def start(self) -> str | None:
        """Load the model. Returns what is wrong, if anything."""
        try:
            self._scorer = load_scorer(self._job, 0)
        except UserError as error:
            return str(error)
        return None

    def score(self, part: int) -> Report | str:
        """Make one part; a sentence where that is not possible."""
        assert self._scorer is not None, "start() comes first"
        try:
            (report,) = score_parts(self._job, self._scorer, [part], lambda trajectories, frames: None)
        except UserError as error:
            return str(error)
        return report


def score_with_ray(job: Job, address: str, count: int | None, parts: Sequence[int], tick: Tick) -> Iterator[Report]:
    """Make `parts` with `count` workers (none: one a GPU or core) of the cluster at `address`.

    Args:
        address: `auto` (a cluster that this machine belongs to), `local` (started here for this run), or an address.

    Raises:
        UserError: Ray is not installed, there is no cluster, a worker cannot go on, or the parts are not seen here.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("Ray is not installed: pip install 'robot-rbm[ray]'") from error
    _check(address)
    try:
        ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"no Ray cluster at {address!r}: start one with `ray start --head` ({error})") from error
    try:
        yield from _Crew(ray, job, count, parts).work(tick)
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """Refuses an address where nobody listens: Ray would try for a minute, and then end the process.

    Raises:
        UserError: it is no host:port, or nobody answers.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"no Ray cluster at {address!r} ({error}): give host:port, auto or local") from error


class _Crew:
    """The workers of one run, and who has which part."""

    def __init__(self, ray: Any, job: Job, count: int | None, parts: Sequence[int]) -> None:
        self._ray, self._job = ray, job
        self._waiting = deque(parts)
        self._deaths: Counter[int] = Counter()
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0)) if job.device in ("auto", "cuda") else 0
        wanted = count or gpus or int(there.get("CPU", 1))
        actor = ray.remote(Worker).options(num_cpus=1, num_gpus=1 if gpus else 0, scheduling_strategy="SPREAD")
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, int]] = {}
        for _ in range(min(wanted, len(parts))):
            worker = actor.remote(job)
            self._starting[worker.start.remote()] = worker

    def work(self, tick: Tick) -> Iterator[Report]:
        began = time.monotonic()
        while self._waiting or self._busy:
            while self._waiting and self._idle:
                worker, part = self._idle.pop(), self._waiting.popleft()
                self._busy[worker.score.remote(part)] = worker, part
            if not (self._starting or self._busy):
                raise UserError("all workers died: what was finished is kept, and the same command goes on")
            timeout = None if self._busy else _PATIENCE_SECONDS
            done, _ = self._ray.wait([*self._starting, *self._busy], num_returns=1, timeout=timeout)
            if not done:
                log.warning("waiting for room in the Ray cluster, %.0f s so far", time.monotonic() - began)
            for reference in done:
                if reference in self._starting:
                    self._started(reference)
                elif (report := self._finished(reference)) is not None:
                    tick(report.trajectories + len(report.unreadable), report.frames)
                    yield report

    def _started(self, reference: Any) -> None:
        worker = self._starting.pop(reference)
        try:
            wrong = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            log.warning("a worker died while it started: %s", _line(error))
            return
        if wrong is not None:
            raise UserError(wrong)
        self._idle.append(worker)

    def _finished(self, reference: Any) -> Report | None:
        worker, part = self._busy.pop(reference)
        try:
            found = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._deaths[part] += 1
            if self._deaths[part] == _TRIES:
                raise UserError(f"{_TRIES} workers died over part {part}; the last: {_line(error)}") from None
            log.warning("a worker died over part %d, which another makes: %s", part, _line(error))
            self._waiting.appendleft(part)
            return None
        if isinstance(found, str):
            raise UserError(found)
        self._see(part)
        self._idle.append(worker)
        return found

    def _see(self, part: int) -> None:
        """Raises UserError where a part that was written elsewhere is not here."""
        path = self._job.folder.part(part)
        deadline = time.monotonic() + _SEEN_SECONDS
        while not path.is_file():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{path} was written by a worker and is not seen here: give an --out that all machines share"
                )
            time.sleep(0.2)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
