"""From a source to a corpus: processes walk the source's units, and one coordinator commits.

Each worker collects, encodes and writes whole segments itself; what goes through its pipe are records. The coordinator
takes finished segments over and enters their trajectories in the order of the units, whichever worker is faster: so
the same source gives the same trajectories in the same order with any number of workers. A build that was cut off
goes on with the next call.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dataset_builder.sources.base import Skipped, Source
from rbm.corpus import ClipCodec, Corpus, CorpusWriter, Fork, ForkWriter, Placed, Segment
from rbm.errors import UserError
from rbm.trajectory import Quality, Task

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 5.0

_LEAD = 4
"""Units a worker that may be given out before the first unfinished one is done: what a kill costs at the most."""

_IDLE_SECONDS = 0.5
_WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class BuildSummary:
    """What one call of `build` did.

    Attributes:
        corpus: where. snapshot: the one that holds everything (None: nothing was ever committed).
        added: new trajectories by outcome. present: ids that an earlier build had already written.
        skipped: material that gave no trajectory, each with its reason.
    """

    corpus: str
    snapshot: str | None
    added: dict[str, int]
    present: int
    skipped: tuple[Skipped, ...]

    def table(self) -> Table:
        """For the terminal: kept by outcome, skipped by reason."""
        table = Table(title=f"corpus {self.corpus}", title_justify="left")
        table.add_column("")
        table.add_column("trajectories", justify="right")
        for quality in Quality:
            table.add_row(f"added, {quality.value}", str(self.added.get(quality.value, 0)))
        table.add_row("there before, kept as they were", str(self.present))
        for reason, count in Counter(item.reason for item in self.skipped).most_common():
            table.add_row(f"skipped: {reason}", str(count))
        return table


def build(
    source: Source,
    corpus: str | os.PathLike[str],
    codec: str | ClipCodec = "jpeg",
    workers: int = 1,
    commit_every: int = 500,
    progress: bool = True,
) -> BuildSummary:
    """Collect everything that `source` gives into a corpus; goes on where an earlier call was cut off.

    Args:
        source: pickled to every worker (spawned: call this under `if __name__ == "__main__"`).
        corpus: path or URL.
        codec: how clips are stored.
        workers: processes that collect, encode and write.
        commit_every: trajectories in a worker's segment, which also ends after half a minute. A kill costs these for
            each worker, and what they finished behind a unit that is not: at most four units a worker.
        progress: show a bar and the summary on stderr.

    Raises:
        UserError: the corpus can not be written, the source refuses its material, or a worker died.
            Whatever came before, in the source's order, is committed; so it is at a KeyboardInterrupt.
    """
    if workers < 1:
        raise UserError(f"workers={workers}: need at least 1")
    units, facts, tasks = source.units(), source.source_facts(), source.tasks()  # refused before anything is written
    console = Console(stderr=True, quiet=not progress)
    tally = _Tally()
    with CorpusWriter(corpus, codec, commit_every=commit_every) as writer:
        before = len(writer.ids)
        _enter_facts(writer, source.name, facts, tasks)
        with (
            _bar(console) as bar,
            _interrupts() as interrupted,
            _Crew(source, writer, units, min(workers, max(1, len(units))), interrupted) as crew,
        ):
            shown = bar.add_task("units", total=len(units), trajectories=0)
            refused = False
            try:
                for item in crew.work():
                    if isinstance(item, Skipped):
                        tally.skipped.append(item)
                        logger.warning("skipped %s: %s", item.what, item.reason)
                    elif isinstance(item, _Ready):
                        refused = True
                        tally.place(writer, item)
                        refused = False
                        bar.update(shown, trajectories=sum(tally.added.values()))
                    else:
                        bar.advance(shown)
            except (KeyboardInterrupt, UserError):
                if not refused:  # else what comes behind a refused trajectory would take its place in the order
                    for item in crew.rest():
                        tally.place(writer, item)
                if writer.usable:
                    writer.commit()
                logger.warning(
                    "stopped; %d trajectories stand in %s: run the same command again to go on",
                    before + sum(tally.added.values()) if writer.usable else before,
                    writer.location,
                )
                raise
        snapshot = writer.commit()
    summary = BuildSummary(str(writer.location), snapshot, dict(tally.added), before, tuple(tally.skipped))
    console.print(summary.table())
    return summary


@dataclass
class _Tally:
    added: Counter[str] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)

    def place(self, writer: CorpusWriter, item: _Ready) -> None:
        """A segment is taken over with the first trajectory of it that is placed: what never is, is garbage."""
        if not item.filled.taken:
            writer.take(item.filled.segment)
            item.filled.taken = True
        writer.place(item.placed)
        self.added[item.placed.trajectory.quality.value] += 1


@dataclass
class _Filled:
    """A segment that a worker wrote, and for each of its trajectories the unit that it comes from."""

    segment: Segment
    units: tuple[int, ...]
    taken: bool = False


@dataclass(frozen=True)
class _Ready:
    """A trajectory whose turn it is, and the segment that it lies in."""

    placed: Placed
    filled: _Filled


@dataclass(frozen=True)
class _UnitDone:
    """`trajectories`: how many the unit gave; some may still lie in an unfinished segment."""

    trajectories: int


@dataclass(frozen=True)
class _Refused:
    """A UserError in a worker, on its way to the coordinator; `trajectories`: what the unit had given before."""

    message: str
    trajectories: int


@dataclass(frozen=True)
class _Failed:
    """A worker could not write, and has given up trajectories that it had announced."""

    message: str


_Message = _Filled | Skipped | _UnitDone | _Refused | _Failed | None
"""What a worker sends; None when it ends."""


def _enter_facts(writer: CorpusWriter, name: str, facts: dict[str, Any], tasks: list[Task]) -> None:
    more = {key: value for key, value in facts.items() if key not in ("name", "completion")}
    writer.add_source(name, facts.get("completion"), **more)
    for task in tasks:
        writer.add_task(task)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    count = TextColumn("{task.fields[trajectories]} trajectories")
    return Progress(*columns, count, TimeElapsedColumn(), console=console)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C is only noted, so that it strikes where it can; the second strikes at once. Says if it was."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    noted: list[bool] = []
    before = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        noted.append(True)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


def _collect(connection: Connection, source: Source) -> None:
    """A worker: gets its fork, then a unit at a time; None (also amid a unit) ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the coordinator ends its workers
    try:
        fork = connection.recv()
        try:
            present = Corpus.open(fork.location, fork.snapshot).ids  # mapped, however many they are
            held = _Held(connection, ForkWriter(fork))
            while (unit := _next_unit(connection, held)) is not None:
                if not _collect_unit(connection, held, source, unit, present):
                    break
            held.flush()
        except UserError as error:
            connection.send(_Failed(str(error)))
        connection.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the coordinator is gone: there is nobody to work for


def _next_unit(connection: Connection, held: _Held) -> tuple[int, str] | None:
    """Whoever has to wait for work hands over what it has: the others may be waiting for it."""
    if not connection.poll(_IDLE_SECONDS):
        held.flush()
    unit: tuple[int, str] | None = connection.recv()
    return unit


def _collect_unit(
    connection: Connection, held: _Held, source: Source, unit: tuple[int, str], present: Container[str]
) -> bool:
    """False: the coordinator asked to end."""
    number, name = unit
    count = 0
    try:
        for item in source.collect(name, present):
            if isinstance(item, Skipped):
                connection.send(item)
            else:
                segment = held.writer.add(item.trajectory, item.frames, item.arrays)
                count += 1
                held.units.append(number)
                held.send(segment)
            if held.writer.is_old:
                held.flush()
            if connection.poll():
                return False
    except UserError as error:
        if held.writer.failed:
            raise
        connection.send(_Refused(str(error), count))
    else:
        connection.send(_UnitDone(count))
    return True


@dataclass
class _Held:
    """A worker's unfinished segment, and the units of the trajectories in it."""

    connection: Connection
    writer: ForkWriter
    units: list[int] = field(default_factory=list)

    def flush(self) -> None:
        self.send(self.writer.flush())

    def send(self, segment: Segment | None) -> None:
        if segment is not None:
            self.connection.send(_Filled(segment, tuple(self.units)))
            self.units = []


class _Worker:
    """One process, its pipe, and the unit that it is on."""

    def __init__(self, number: int, source: Source, fork: Fork) -> None:
        context = multiprocessing.get_context("spawn")
        self.number = number
        self.unit: int | None = None
        self.ending = False
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_collect, args=(theirs, source), daemon=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, until it ignores Ctrl-C by itself
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        with suppress(BrokenPipeError, ConnectionResetError):  # that it is dead is told where its answer is missing
            self.connection.send(fork)

    def end(self) -> None:
        """Ask it to end: it sends its last segment first."""
        if not self.ending:
            self.ending = True
            with suppress(BrokenPipeError, ConnectionResetError):
                self.connection.send(None)

    def stop(self) -> None:
        self.connection.close()
        self.process.join(_GRACE_SECONDS if self.ending else 0)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(_GRACE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@dataclass
class _Unit:
    """What has come of one unit: trajectories and skipped material in order, how many trajectories there will be."""

    arrived: deque[_Ready] = field(default_factory=deque)
    skipped: deque[Skipped] = field(default_factory=deque)
    given: int = 0
    total: int | None = None
    refused: str | None = None


class _Crew:
    """The workers of one build; a context manager that leaves none behind."""

    def __init__(
        self, source: Source, writer: CorpusWriter, units: list[str], count: int, interrupted: Callable[[], bool]
    ) -> None:
        self._source, self._writer, self._count = source, writer, count
        self._interrupted = interrupted
        self._names = units
        self._units: dict[int, _Unit] = defaultdict(_Unit)
        self._current = self._next = 0
        self._last: int | None = None  # a unit that was refused: nothing after it is wanted
        self._workers: list[_Worker] = []

    def __enter__(self) -> _Crew:
        try:
            for number, fork in enumerate(self._writer.fork(self._count)):
                self._workers.append(_Worker(number, self._source, fork))
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def work(self) -> Iterator[_Ready | Skipped | _UnitDone]:
        """Everything that the units give, unit after unit, in the order within each; `_UnitDone` ends one.

        Raises:
            UserError: a source's, when its turn comes; or a worker died. KeyboardInterrupt: Ctrl-C was noted.
        """
        while True:
            for item in self._in_order():
                yield item
                self._check_interrupt()
            if self._current == len(self._names):
                return
            self._assign()
            busy = {worker.connection: worker for worker in self._workers}
            for connection in wait(list(busy), _WAIT_SECONDS):
                self._receive(busy[connection])  # type: ignore[index]
            self._check_interrupt()

    def rest(self) -> Iterator[_Ready]:
        """After an interruption: what the workers had not sent yet, as far as nothing before it is missing."""
        for worker in self._workers:
            worker.end()
        deadline = time.monotonic() + _GRACE_SECONDS
        while self._workers and (left := deadline - time.monotonic()) > 0:
            busy = {worker.connection: worker for worker in self._workers}
            for connection in wait(list(busy), left):
                with suppress(UserError):  # a dead one has nothing left to send
                    self._receive(busy[connection])  # type: ignore[index]
        with suppress(UserError):
            yield from (item for item in self._in_order() if isinstance(item, _Ready) and self._writer.usable)

    def _check_interrupt(self) -> None:
        if self._interrupted():
            raise KeyboardInterrupt

    def _in_order(self) -> Iterator[_Ready | Skipped | _UnitDone]:
        """What can be passed on now."""
        while self._current < len(self._names):
            unit = self._units[self._current]
            while unit.skipped:
                yield unit.skipped.popleft()
            while unit.arrived:
                unit.given += 1
                yield unit.arrived.popleft()
            if unit.total is None or unit.given < unit.total:
                return
            if unit.refused is not None:
                raise UserError(unit.refused)
            del self._units[self._current]
            self._current += 1
            yield _UnitDone(unit.total)

    def _assign(self) -> None:
        for worker in self._workers:
            if worker.unit is None:
                if self._next == len(self._names) or self._last is not None:
                    worker.end()
                elif not worker.ending and self._next < self._current + _LEAD * self._count:
                    worker.unit = self._next
                    try:
                        worker.connection.send((self._next, self._names[self._next]))
                    except (BrokenPipeError, ConnectionResetError):
                        self._raise_death(worker)
                    self._next += 1
            elif self._last is not None and worker.unit > self._last:
                worker.end()

    def _receive(self, worker: _Worker) -> None:
        """Take one message."""
        try:
            message: _Message = worker.connection.recv()
        except (EOFError, OSError):
            self._raise_death(worker)
        if message is None:
            self._workers.remove(worker)
            worker.stop()
        elif isinstance(message, _Failed):
            raise UserError(message.message)
        elif isinstance(message, _Filled):
            for placed, number in zip(message.segment.placed, message.units, strict=True):
                self._units[number].arrived.append(_Ready(placed, message))
        else:
            assert worker.unit is not None
            unit = self._units[worker.unit]
            if isinstance(message, Skipped):
                unit.skipped.append(message)
            elif isinstance(message, _UnitDone):
                unit.total = message.trajectories
                worker.unit = None
            else:
                unit.refused, unit.total = message.message, message.trajectories
                self._last = worker.unit if self._last is None else min(self._last, worker.unit)
                worker.unit = None

    def _raise_death(self, worker: _Worker) -> NoReturn:
        self._workers.remove(worker)
        worker.process.join(_GRACE_SECONDS)
        code = worker.process.exitcode
        how = f"by signal {-code} (out of memory?)" if code is not None and code < 0 else f"with exit code {code}"
        unit = self._names[worker.unit] if worker.unit is not None else "none"
        raise UserError(
            f"worker {worker.number} died {how} on unit {unit!r}; its own message stands above, if it left one: "
            "run the same command again to go on"
        )

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []
