"""Bulk scoring in several processes of this machine, each with a model of its own.

The coordinator gives out part numbers over a pipe to each, two ahead; a worker writes its parts itself and answers with
what came of them. Ctrl-C reaches the coordinator alone. A worker whose coordinator is gone ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from rbm.errors import UserError
from rbm.evaluation.bulk import Job, Tick, load_scorer, score_parts
from rbm.evaluation.bulk_folder import Report

_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class _Ticked:
    trajectories: int
    frames: int


@dataclass(frozen=True)
class _Failed:
    why: str


def score_in_processes(job: Job, count: int, parts: Sequence[int], tick: Tick) -> Iterator[Report]:
    """Make `parts` in `count` processes; what came of each as it is finished.

    Raises:
        UserError: what a worker could not go on with, or one died.
    """
    waiting = deque(parts)
    workers: list[_Worker] = []
    try:
        for number in range(min(count, len(parts))):
            workers.append(_Worker(job, number))
        for worker in [*workers, *workers]:
            worker.give(waiting)
        while busy := {worker.connection: worker for worker in workers if worker.given}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                found = worker.receive()
                if isinstance(found, _Ticked):
                    tick(found.trajectories, found.frames)
                elif isinstance(found, _Failed):
                    raise UserError(found.why)
                else:
                    worker.given -= 1
                    worker.give(waiting)
                    yield found
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process, its pipe, and how many parts it has been given and not finished."""

    def __init__(self, job: Job, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.given = 0
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, job, number), daemon=True)
        resource_tracker.ensure_running()  # started with a process, it would unblock Ctrl-C before that is there
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, until it ignores Ctrl-C by itself
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()

    def give(self, waiting: deque[int]) -> None:
        if waiting:
            self.given += 1
            with suppress(BrokenPipeError, ConnectionResetError):  # that it is dead is told where its answer is missing
                self.connection.send(waiting.popleft())

    def receive(self) -> Report | _Ticked | _Failed:
        try:
            found: Report | _Ticked | _Failed = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(_GRACE_SECONDS)
            code = self.process.exitcode
            how = f"was killed by signal {-code} (out of memory?)" if code and code < 0 else f"ended with code {code}"
            raise UserError(
                f"a worker {how}: what was finished is kept, and the same command goes on; give fewer --workers if "
                "memory is short"
            ) from None
        return found

    def stop(self) -> None:
        self.connection.close()
        if self.given:
            self.process.terminate()
        self.process.join(_GRACE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


def _work(connection: Connection, job: Job, number: int) -> None:
    """A worker: part numbers come in, reports go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)

    def tick(trajectories: int, frames: int) -> None:
        connection.send(_Ticked(trajectories, frames))

    def given() -> Iterator[int]:
        while True:
            yield connection.recv()

    try:
        for report in score_parts(job, load_scorer(job, number), given(), tick):
            connection.send(report)
    except UserError as error:
        connection.send(_Failed(str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the coordinator is gone: there is nobody to work for
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is half written now


def _end(signal_number: int, frame: object) -> None:
    # it may come in the middle of an import or of a finaliser, which would complain; nobody asks any more
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    raise SystemExit(128 + signal_number)  # so that half-written files go
