"""From a source to a corpus: processes walk the source's units and one writer commits.

Workers collect and encode; they send finished payloads through pipes, and the parent writes them in
the order of the units, whichever worker is faster: so the same source gives the same corpus with any
number of workers. Memory is bounded: what is ahead of its turn waits in the parent up to a limit, and
beyond that workers block until it is their turn. A build that was cut off goes on with the next call.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dataset_builder.sources.base import Skipped, Source
from rbm.corpus import ClipCodec, CorpusWriter, Packed, pack
from rbm.errors import UserError
from rbm.trajectory import Quality, Task

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class BuildSummary:
    """What one call of `build` did.

    Attributes:
        corpus: where. snapshot: the one that holds everything (None: nothing was ever committed).
        added: new trajectories by outcome. present: ids that an earlier build had already written.
        skipped: material that gave no trajectory, each with its reason.
    """

    corpus: Path
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
        table.add_row("there before", str(self.present))
        for reason, count in Counter(item.reason for item in self.skipped).most_common():
            table.add_row(f"skipped: {reason}", str(count))
        return table


def build(
    source: Source,
    corpus_path: str | os.PathLike[str],
    codec: str | ClipCodec = "jpeg",
    workers: int = 1,
    commit_every: int = 100,
    buffer_bytes: int = 256 << 20,
    progress: bool = True,
) -> BuildSummary:
    """Collect everything that `source` gives into a corpus; goes on where an earlier call was cut off.

    Args:
        source: pickled to every worker (spawned: call this under `if __name__ == "__main__"`).
        codec: how clips are stored.
        workers: processes that collect and encode.
        commit_every: trajectories between commits; a kill loses no more than these.
        buffer_bytes: how many payload bytes may wait for their turn.
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
    with CorpusWriter(corpus_path, codec, commit_every=commit_every) as writer:
        before = len(writer.ids)
        _enter_facts(writer, source.name, facts, tasks)
        try:
            with _bar(console) as bar, _Crew(source, codec, writer.ids, min(workers, max(1, len(units)))) as crew:
                shown = bar.add_task("units", total=len(units), trajectories=0)
                for item in crew.work(units, buffer_bytes):
                    if isinstance(item, Packed):
                        writer.add_packed(item)
                        tally.added[item.trajectory.quality.value] += 1
                        bar.update(shown, trajectories=sum(tally.added.values()))
                    elif isinstance(item, Skipped):
                        tally.skipped.append(item)
                        logger.warning("skipped %s: %s", item.what, item.reason)
                    else:
                        bar.advance(shown)
        except (KeyboardInterrupt, UserError):
            if writer.usable:
                writer.commit()
            logger.warning(
                "stopped; %d trajectories stand in %s: run the same command again to go on",
                before + sum(tally.added.values()) if writer.usable else before,
                writer.path,
            )
            raise
        snapshot = writer.commit()
    summary = BuildSummary(writer.path, snapshot, dict(tally.added), before, tuple(tally.skipped))
    console.print(summary.table())
    return summary


@dataclass
class _Tally:
    added: Counter[str] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True)
class _UnitDone:
    pass


@dataclass(frozen=True)
class _Refused:
    """A UserError in a worker, on its way to the parent."""

    message: str


_Message = Packed | Skipped | _UnitDone | _Refused


def _enter_facts(writer: CorpusWriter, name: str, facts: dict[str, Any], tasks: list[Task]) -> None:
    more = {key: value for key, value in facts.items() if key not in ("name", "completion")}
    writer.add_source(name, facts.get("completion"), **more)
    for task in tasks:
        writer.add_task(task)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    count = TextColumn("{task.fields[trajectories]} trajectories")
    return Progress(*columns, count, TimeElapsedColumn(), console=console)


def _collect(connection: Connection, source: Source, codec: str | ClipCodec) -> None:
    """A worker: gets the ids to skip, then unit after unit (None: no more), sends what each gives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    try:
        skip: set[str] = connection.recv()
        while (unit := connection.recv()) is not None:
            try:
                for item in source.collect(unit, skip):
                    if isinstance(item, Skipped):
                        connection.send(item)
                    else:
                        connection.send(pack(item.trajectory, item.frames, item.arrays, codec))
                connection.send(_UnitDone())
            except UserError as error:
                connection.send(_Refused(str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone: there is nobody to work for


class _Worker:
    """One process, its pipe, and the unit that it is on."""

    def __init__(self, number: int, source: Source, codec: str | ClipCodec, skip: set[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.number = number
        self.unit: int | None = None
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_collect, args=(theirs, source, codec), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.send(skip)

    def stop(self) -> None:
        self.connection.close()
        self.process.join(_GRACE_SECONDS if self.unit is None else 0)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(_GRACE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class _Crew:
    """The workers of one build; a context manager that leaves none behind."""

    def __init__(self, source: Source, codec: str | ClipCodec, skip: set[str], count: int) -> None:
        self._source, self._codec, self._skip, self._count = source, codec, skip, count
        self._workers: list[_Worker] = []

    def __enter__(self) -> _Crew:
        try:
            for number in range(self._count):
                self._workers.append(_Worker(number, self._source, self._codec, self._skip))
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def work(self, units: list[str], buffer_bytes: int) -> Iterator[Packed | Skipped | _UnitDone]:
        """Everything that the units give, unit after unit, in the order within each; `_UnitDone` ends one.

        Raises:
            UserError: a source's, when its turn comes; or a worker died.
        """
        waiting: dict[int, deque[_Message]] = {}
        held = 0
        next_unit = 0
        for current in range(len(units)):
            done = False
            while not done:
                for worker in self._workers:
                    if worker.unit is None and next_unit < len(units):
                        self._assign(worker, next_unit, units)
                        waiting[next_unit] = deque()
                        next_unit += 1
                queue = waiting[current]
                while queue and not done:
                    message = queue.popleft()
                    if isinstance(message, _Refused):
                        raise UserError(message.message)
                    if isinstance(message, Packed):
                        held -= len(message.payload)
                    done = isinstance(message, _UnitDone)
                    yield message
                if not done:
                    held += self._receive(units, waiting, current if held >= buffer_bytes else None)
            del waiting[current]

    def _assign(self, worker: _Worker, unit: int, units: list[str]) -> None:
        worker.unit = unit
        try:
            worker.connection.send(units[unit])
        except (BrokenPipeError, ConnectionResetError):
            self._raise_death(worker, units)

    def _receive(self, units: list[str], waiting: dict[int, deque[_Message]], only: int | None) -> int:
        """Take one message from each worker that has one (from the one on unit `only`); returns payload bytes taken."""
        busy = {w.connection: w for w in self._workers if w.unit is not None and only in (None, w.unit)}
        taken = 0
        for connection in wait(list(busy)):
            worker = busy[connection]  # type: ignore[index]
            assert worker.unit is not None
            try:
                message: _Message = worker.connection.recv()
            except (EOFError, OSError):
                self._raise_death(worker, units)
            waiting[worker.unit].append(message)
            if isinstance(message, Packed):
                taken += len(message.payload)
            if isinstance(message, _UnitDone | _Refused):
                worker.unit = None
        return taken

    def _raise_death(self, worker: _Worker, units: list[str]) -> NoReturn:
        worker.process.join(_GRACE_SECONDS)
        code = worker.process.exitcode
        how = f"by signal {-code} (out of memory?)" if code is not None and code < 0 else f"with exit code {code}"
        unit = units[worker.unit] if worker.unit is not None else "none"
        raise UserError(
            f"worker {worker.number} died {how} on unit {unit!r}; its own message stands above, if it left one: "
            "run the same command again to go on"
        )

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []
