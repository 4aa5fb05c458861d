"""Strategies: how a pair with a better and a worse clip is made.

    rewind      chosen s..m of a clean success, rejected s..m..r: r before completion, a tenth of the video lost
    reverse     chosen s..m of a clean success, rejected m..s
    outcome     a better and a worse attempt at one task, both at full length
    wrong_task  a success, and another task's video under the same instruction
    grade       two attempts whose graded outcomes lie at least 0.2 apart, both at full length

A strategy is made for a table and then says, for a whole block of samples at once, which rows it pairs
(`partners`), and for one sample which frames are shown (`clips`). A new strategy is one class here and one line in
`STRATEGIES`.
"""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from rbm.sampling.clips import ClipOptions, forward_path, places, reverse_path, rewind_path, rewind_places
from rbm.sampling.draws import Draw
from rbm.sampling.table import Table
from rbm.trajectory import Quality

Rows = NDArray[np.int64]
Frames = NDArray[np.int64]
Uniforms = NDArray[np.float64]

MIN_GRADE_GAP = 0.2
"""Two graded outcomes closer than this are not ordered (published recipe)."""

MIN_LOSS = 0.1
"""A rewind or reverse takes back at least this fraction of the video."""


class Strategy(Protocol):
    name: ClassVar[str]
    wrong_instruction: ClassVar[bool]
    """The rejected clip shows another task than the instruction's."""

    def __init__(self, table: Table) -> None: ...

    def available(self) -> bool:
        """Whether the table holds what this strategy needs."""
        ...

    def partners(self, uniforms: Uniforms) -> tuple[Rows, Rows]:
        """Chosen and rejected rows for uniform numbers (n, 3)."""
        ...

    def clips(self, chosen: int, rejected: int, options: ClipOptions, draw: Draw) -> tuple[Frames, Frames]:
        """The frames that the chosen and the rejected clip show."""
        ...


def _pick(rows: Rows, uniform: Uniforms) -> Rows:
    return rows[(uniform * len(rows)).astype(np.int64)]


def _between(low: Rows, high: Rows, uniform: Uniforms) -> Rows:
    """A whole number in low..high-1 each."""
    return low + (uniform * (high - low)).astype(np.int64)


def lost_frames(n_frames: int) -> int:
    """How many frames a rewind or reverse takes back at least: ceil(0.1 T), one at the least."""
    return max(1, math.ceil(MIN_LOSS * n_frames - 1e-9))


def _undoable(table: Table) -> Rows:
    """Clean successes in which something can be undone: rows with a completion after frame 0 and room to lose."""
    loss = np.maximum(1, np.ceil(MIN_LOSS * table.n_frames - 1e-9))
    clean = (table.quality == Quality.SUCCESSFUL.rank) & ~table.messy & ~(table.partial_success < 1)
    return np.flatnonzero(clean & (table.done >= 1) & (table.n_frames - 1 >= loss))


class _Undo:
    """What rewind and reverse share: one clean success, and a stretch s..m of it in which progress is made."""

    wrong_instruction: ClassVar[bool] = False

    def __init__(self, table: Table) -> None:
        self.table = table
        self.rows = _undoable(table)

    def available(self) -> bool:
        return len(self.rows) > 0

    def partners(self, uniforms: Uniforms) -> tuple[Rows, Rows]:
        rows = _pick(self.rows, uniforms[:, 0])
        return rows, rows

    def stretch(self, row: int, draw: Draw) -> tuple[int, int, int]:
        """s, m and the least loss: s < e, s + loss <= m."""
        n_frames, done = int(self.table.n_frames[row]), int(self.table.done[row])
        loss = lost_frames(n_frames)
        from_start = draw.chance(0.5)
        start = draw.integer(0, min(done - 1, n_frames - 1 - loss))
        if from_start:
            start = 0
        return start, draw.integer(start + loss, n_frames - 1), loss


class Rewind(_Undo):
    name: ClassVar[str] = "rewind"

    def clips(self, chosen: int, rejected: int, options: ClipOptions, draw: Draw) -> tuple[Frames, Frames]:
        start, turn, loss = self.stretch(chosen, draw)
        back = draw.integer(start, min(int(self.table.done[chosen]) - 1, turn - loss))
        forward = forward_path(start, turn)
        rewound = rewind_path(start, turn, back)
        shown = rewind_places(turn - start, turn - back, options, draw)
        return forward[places(len(forward), options, draw)], rewound[shown]


class Reverse(_Undo):
    name: ClassVar[str] = "reverse"

    def clips(self, chosen: int, rejected: int, options: ClipOptions, draw: Draw) -> tuple[Frames, Frames]:
        start, end, _ = self.stretch(chosen, draw)
        forward, backward = forward_path(start, end), reverse_path(start, end)
        return forward[places(len(forward), options, draw)], backward[places(len(backward), options, draw)]


class _FullLength:
    """What outcome and grade share: both attempts are shown from their first frame to their last."""

    wrong_instruction: ClassVar[bool] = False
    table: Table

    def clips(self, chosen: int, rejected: int, options: ClipOptions, draw: Draw) -> tuple[Frames, Frames]:
        frames = self.table.n_frames
        return places(int(frames[chosen]), options, draw), places(int(frames[rejected]), options, draw)


class Outcome(_FullLength):
    """Drawn by the worse attempt; the better one is any of its task's better ones, messy or clean."""

    name: ClassVar[str] = "outcome"

    def __init__(self, table: Table) -> None:
        self.table = table
        self.first_better = table.start[table.task, 0]
        self.end_better = table.start[table.task, table.quality]
        self.rows = np.flatnonzero(self.end_better > self.first_better)

    def available(self) -> bool:
        return len(self.rows) > 0

    def partners(self, uniforms: Uniforms) -> tuple[Rows, Rows]:
        worse = _pick(self.rows, uniforms[:, 0])
        return _between(self.first_better[worse], self.end_better[worse], uniforms[:, 1]), worse


class WrongTask:
    """A success under its instruction, and any other task's video under the same; 4 in 10 of its scene, if it can."""

    name: ClassVar[str] = "wrong_task"
    wrong_instruction: ClassVar[bool] = True
    same_scene = 0.4

    def __init__(self, table: Table) -> None:
        self.table = table
        tasks = len(table.tasks)
        size = table.start[:, 3] - table.start[:, 0]
        others = len(table) - size[table.task]
        success = (table.quality == Quality.SUCCESSFUL.rank) & ~(table.partial_success < 1)
        self.rows = np.flatnonzero(success & (others > 0))
        # rows of the other tasks of a task's scene, as ranges: for task t, the slice siblings[from[t]:to[t]]
        groups: list[Rows] = []
        self.first_sibling, self.end_sibling = np.zeros(tasks, np.int64), np.zeros(tasks, np.int64)
        total = 0
        for task in range(tasks):
            same = (table.scene == table.scene[task]) & (table.scene[task] >= 0)
            same[task] = False
            group = [np.arange(table.start[other, 0], table.start[other, 3]) for other in np.flatnonzero(same)]
            rows = np.concatenate(group) if group else np.zeros(0, np.int64)
            groups.append(rows)
            self.first_sibling[task], self.end_sibling[task] = total, total + len(rows)
            total += len(rows)
        self.siblings = np.concatenate(groups) if groups else np.zeros(0, np.int64)

    def available(self) -> bool:
        return len(self.rows) > 0

    def partners(self, uniforms: Uniforms) -> tuple[Rows, Rows]:
        table = self.table
        chosen = _pick(self.rows, uniforms[:, 0])
        task = table.task[chosen]
        begin, end = table.start[task, 0], table.start[task, 3]
        # any row outside begin..end: draw among the others, then step over the task's own
        other = _between(np.zeros_like(begin), len(table) - (end - begin), uniforms[:, 1])
        other = np.where(other >= begin, other + (end - begin), other)
        first, last = self.first_sibling[task], self.end_sibling[task]
        near = (uniforms[:, 2] < self.same_scene) & (last > first)
        if near.any():
            other[near] = self.siblings[_between(first, last, uniforms[:, 1])[near]]
        return chosen, other

    def clips(self, chosen: int, rejected: int, options: ClipOptions, draw: Draw) -> tuple[Frames, Frames]:
        n_frames, done = int(self.table.n_frames[chosen]), int(self.table.done[chosen])
        whole = draw.chance(0.5)
        # at least half of the way, so that the right video has clearly done more of the task than the wrong one
        end = draw.integer((done + 1) // 2, n_frames - 1)
        right = forward_path(0, n_frames - 1 if whole or self.table.messy[chosen] else end)
        other = int(self.table.n_frames[rejected])
        start = draw.integer(0, other // 2)
        wrong = forward_path(0 if draw.chance(0.5) else start, other - 1)
        return right[places(len(right), options, draw)], wrong[places(len(wrong), options, draw)]


class Grade(_FullLength):
    """Two graded attempts at one task, at least 0.2 apart; the graded rows of a task are kept sorted by grade."""

    name: ClassVar[str] = "grade"

    def __init__(self, table: Table) -> None:
        self.table = table
        graded = np.flatnonzero(~np.isnan(table.partial_success))
        # one sorted key for task and grade: tasks are 2 apart, grades lie within 0..1
        key = 2.0 * table.task[graded] + table.partial_success[graded]
        order = np.argsort(key, kind="stable")
        self.graded, key = graded[order], key[order]
        self.first = np.searchsorted(key, 2.0 * table.task[self.graded] - 0.5)
        self.end_worse = np.searchsorted(key, key - MIN_GRADE_GAP + 1e-6, side="right")
        self.usable = np.flatnonzero(self.end_worse > self.first)

    def available(self) -> bool:
        return len(self.usable) > 0

    def partners(self, uniforms: Uniforms) -> tuple[Rows, Rows]:
        better = _pick(self.usable, uniforms[:, 0])
        worse = _between(self.first[better], self.end_worse[better], uniforms[:, 1])
        return self.graded[better], self.graded[worse]


STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (Rewind, Reverse, Outcome, WrongTask, Grade)
}
