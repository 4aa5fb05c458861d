"""Scores of a whole corpus or data set, part by part.

1. A part is a run of `size` trajectories. Its file follows from what was asked alone, so it does not matter who makes
   it, how many there are, or in which order.
2. A thread reads and decodes ahead of the model, across parts. Memory is bounded by three batches, whatever the length
   of the episodes.
3. Clips of one part that are scored in one forward stay together; no batch reaches over the end of a part.
4. On a CPU each process computes with one thread: sums are then the same with any number of processes.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
import torch

from rbm.assets import nano_weights
from rbm.errors import UserError
from rbm.evaluation.bulk_folder import Folder, Report
from rbm.evaluation.bulk_sources import BLOCK_FRAMES, Attempt, Block, Looks, Scored, Source, Unreadable
from rbm.model import RewardModel
from rbm.scoring.scorer import BATCH_SIZE, Scorer
from rbm.scoring.scores import ClipScores, FrameScore
from rbm.scoring.sessions import Session, SessionPool

BATCH_BYTES = 128 * 2**20
"""Pixels of the clips that are read before they are scored."""

Tick = Callable[[int, int], None]
"""Told how many more trajectories and frames were scored."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Job:
    """All that a process needs to make any part; pickled to it.

    Attributes:
        source: what is scored. folder: where it goes.
        checkpoint, device, dtype: as `Scorer.from_pretrained` takes them. weights: `fingerprint` of the model.
        every: score every so-many-th frame as a live session would; none: a clip of even frames in one forward.
        size: trajectories in a part.
    """

    source: Source
    folder: Folder
    checkpoint: str | None
    device: str
    dtype: str | None
    weights: str
    every: int | None
    size: int

    @property
    def parts(self) -> int:
        return -(-len(self.source) // self.size)

    def numbers(self, part: int) -> range:
        return range(part * self.size, min(len(self.source), (part + 1) * self.size))


def load_model(checkpoint: str | None, dtype: str | None) -> RewardModel:
    """The model of a checkpoint, or the shipped one, on the CPU."""
    return RewardModel.from_pretrained(checkpoint or str(nano_weights()), dtype)


def fingerprint(model: RewardModel) -> str:
    """Hexadecimal: of a model's configuration and of every number in it, in its precision."""
    found = sha256(json.dumps(model.config(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def load_scorer(job: Job, worker: int) -> Scorer:
    """The model of worker number `worker`: on a GPU of its own, where there are several.

    Raises:
        UserError: it cannot be loaded, or is another one here than where the run was started.
    """
    model = load_model(job.checkpoint, job.dtype)
    if fingerprint(model) != job.weights:
        raise UserError(f"checkpoint {job.checkpoint} holds other weights here than where the run was started")
    device = job.device
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{worker % torch.cuda.device_count()}"
    return Scorer(model, device)


@contextmanager
def steady(scorer: Scorer) -> Iterator[None]:
    """One thread on a CPU, so that sums do not depend on how many there are."""
    before = torch.get_num_threads()
    if scorer.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def score_parts(job: Job, scorer: Scorer, parts: Iterable[int], tick: Tick) -> Iterator[Report]:
    """Score parts one after another and write each; `parts` is asked for the next one ahead of time, in a thread."""
    looks = Looks(scorer.context_frames, job.every, scorer.views)
    with steady(scorer), ahead(_batches(job, looks, parts)) as batches:
        while (first := next(batches, None)) is not None:
            part = _Part(first.part, scorer, tick)
            score = _moments if job.every is not None else _clips
            for attempt, said in score(scorer, part.blocks(first, batches), part.unreadable):
                part.add(attempt, said)
            found = sorted(part.scored, key=lambda scored: scored[0].number)
            table = job.source.table(found, scorer.model.remaining)
            report = part.report(table.num_rows)
            job.folder.write(table, report)
            yield report


@dataclass(frozen=True)
class _Batch:
    """What is read of one part at a time: blocks, and what could not be read."""

    part: int
    blocks: tuple[Block, ...]
    unreadable: tuple[Unreadable, ...]
    last: bool


def _batches(job: Job, looks: Looks, parts: Iterable[int]) -> Generator[_Batch, None, None]:
    for part in parts:
        blocks: list[Block] = []
        unreadable: list[Unreadable] = []
        weight = 0
        for found in job.source.read(job.numbers(part), looks):
            if isinstance(found, Unreadable):
                unreadable.append(found)
                continue
            blocks.append(found)
            weight += found.bytes
            if len(blocks) == BATCH_SIZE or weight >= BATCH_BYTES:
                yield _Batch(part, tuple(blocks), tuple(unreadable), last=False)
                blocks, unreadable, weight = [], [], 0
        yield _Batch(part, tuple(blocks), tuple(unreadable), last=True)


class _Part:
    """A part that is being scored."""

    def __init__(self, number: int, scorer: Scorer, tick: Tick) -> None:
        self.number = number
        self._scorer = scorer
        self.scored: list[Scored] = []
        self.unreadable: dict[int, Unreadable] = {}
        self._tick = tick

    def blocks(self, batch: _Batch, rest: Iterator[_Batch]) -> Iterator[tuple[Block, ...]]:
        """What is read of it, a batch at a time; `unreadable` is filled on the way."""
        while True:
            before = len(self.unreadable)
            self.unreadable |= {found.number: found for found in batch.unreadable}
            blocks = tuple(block for block in batch.blocks if self._takes(block.attempt))
            if more := len(self.unreadable) - before:
                self._tick(more, 0)
            yield blocks
            if batch.last:
                return
            batch = next(rest)

    def _takes(self, attempt: Attempt) -> bool:
        """Whether the model can read the instruction; else the attempt is left out."""
        try:
            self._scorer.check(attempt.task)
        except UserError as error:
            self.unreadable[attempt.number] = Unreadable(attempt.number, attempt.name, str(error))
            return False
        return True

    def add(self, attempt: Attempt, said: ClipScores) -> None:
        self.scored.append((attempt, said))
        self._tick(1, len(said.progress))

    def report(self, rows: int) -> Report:
        left_out = [self.unreadable[number] for number in sorted(self.unreadable)]
        return Report(
            part=self.number,
            trajectories=len(self.scored),
            frames=sum(len(said.progress) for _, said in self.scored),
            rows=rows,
            several_tasks=sum(attempt.n_tasks > 1 for attempt, _ in self.scored),
            unreadable=tuple((found.name, found.why) for found in left_out),
        )


def _clips(scorer: Scorer, batches: Iterable[tuple[Block, ...]], unreadable: dict[int, Unreadable]) -> Iterator[Scored]:
    """Every attempt in one block, a batch of them in shared forwards."""
    for blocks in batches:
        said = scorer.predict([(block.frames, block.attempt.task) for block in blocks])
        yield from zip((block.attempt for block in blocks), said, strict=True)


def _moments(
    scorer: Scorer, batches: Iterable[tuple[Block, ...]], unreadable: dict[int, Unreadable]
) -> Iterator[Scored]:
    """Every frame that is asked for, from what a live session would hold; sessions advance together."""
    pool = SessionPool(scorer)
    sessions: dict[int, Session] = {}
    found: dict[int, list[FrameScore]] = {}
    for blocks in batches:
        for group in _groups(blocks):
            requests = []
            for block in group:
                attempt = block.attempt
                if attempt.number not in sessions:
                    sessions[attempt.number], found[attempt.number] = pool.open(attempt.task), []
                session = sessions[attempt.number]
                for i, shown in enumerate(block.each(), block.start):
                    requests.append((session, int(attempt.looked_at[i]), shown, bool(attempt.asked[i])))
            answers = iter(pool.push_at(requests))
            for block in group:
                number, stop = block.attempt.number, block.start + len(block)
                found[number] += [next(answers) for _ in range(block.attempt.asked[block.start : stop].sum())]
                if block.last:
                    sessions.pop(number).close()
                    yield block.attempt, _gathered(found.pop(number), scorer.model.remaining)
        for number in unreadable.keys() & sessions.keys():  # damaged after its first block
            sessions.pop(number).close()
            del found[number]


def _groups(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Blocks whose frames make one push."""
    group: list[Block] = []
    for block in blocks:
        if group and sum(map(len, group)) + len(block) > BLOCK_FRAMES:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def _gathered(said: list[FrameScore], remaining: bool) -> ClipScores:
    def column(name: str) -> Any:
        return np.array([getattr(score, name) for score in said], np.float32)

    left = column("remaining") if remaining else None
    return ClipScores(column("progress"), column("progress_std"), column("success"), float("nan"), left)


@contextmanager
def ahead(items: Generator[_T, None, None]) -> Iterator[Iterator[_T]]:
    """The same items, drawn in a thread, one ahead of what is asked for; an error comes at its place."""
    found: queue.Queue[tuple[_T | None, BaseException | None]] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(entry: tuple[_T | None, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                return found.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def draw() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))
        finally:
            items.close()

    def given() -> Iterator[_T]:
        while True:
            item, error = found.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    thread = threading.Thread(target=draw, name="rbm-reader", daemon=True)
    thread.start()
    try:
        yield given()
    finally:
        stop.set()
        thread.join(5)


def absolute(checkpoint: str | None) -> str | None:
    """A path as every process finds it; an id on the hub as it is."""
    return os.path.abspath(checkpoint) if checkpoint is not None and os.path.exists(checkpoint) else checkpoint
