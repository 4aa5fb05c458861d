"""Strategies: how a pair with a better and a worse clip is made.

    rewind      chosen s..m of a clean success, rejected s..m..r: r before completion, a tenth of the video lost
    reverse     chosen s..m of a clean success, rejected m..s
    outcome     a better and a worse attempt at one task, both at full length
    wrong_task  a success, and another task's video under the same instruction
    grade       two attempts whose graded outcomes lie at least 0.2 apart, both at full length

A strategy has two halves. The one that plans is made for a table and says, for a whole block of samples at once,
which trajectories it pairs (`partners`). The other needs no table and says for one sample which frames are shown
(`clips`); that half works in the loader processes. A new strategy is one class here and one line in `STRATEGIES`.
"""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from rbm.sampling.balance import Balance, Lottery
from rbm.sampling.clips import ClipOptions, forward_path, places, reverse_path, rewind_path, rewind_places
from rbm.sampling.draws import Draw
from rbm.sampling.table import Columns, Table
from rbm.trajectory import Quality

Places = NDArray[np.integer]
"""Places in a table."""

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

    def __init__(self, table: Table, balance: Balance | None) -> None: ...

    def available(self) -> bool:
        """Whether the table holds what this strategy needs."""
        ...

    def partners(self, uniforms: Uniforms) -> tuple[Places, Places]:
        """Places in the table of the chosen and the rejected one, for uniform numbers (n, 3)."""
        ...

    @staticmethod
    def clips(columns: Columns, chosen: int, rejected: int, options: ClipOptions, draw: Draw) -> tuple[Frames, Frames]:
        """The frames that the chosen and the rejected clip show, of these rows of the corpus."""
        ...


class _Candidates:
    """Places of a table of which a strategy draws the first trajectory of its pairs, by weight where there are any."""

    def __init__(self, table: Table, balance: Balance | None, places: Places) -> None:
        self.places = places.astype(np.int32)
        self._lottery = Lottery(len(places), None if balance is None else balance.weights(table, self.places))

    def __len__(self) -> int:
        return len(self._lottery)

    def draw(self, uniform: Uniforms) -> tuple[Places, Places]:
        """Which candidate, and its place, for each number."""
        which = self._lottery.draw(uniform)
        return which, self.places[which]


def _between(low: Places, high: Places, uniform: Uniforms) -> Places:
    """A whole number in low..high-1 each."""
    return low + (uniform * (high - low)).astype(np.int64)


def lost_frames(n_frames: int) -> int:
    """How many frames a rewind or reverse takes back at least: ceil(0.1 T), one at the least."""
    return max(1, math.ceil(MIN_LOSS * n_frames - 1e-9))


class _Undo:
    """What rewind and reverse share: one clean success, and a stretch s..m of it in which progress is made."""

    wrong_instruction: ClassVar[bool] = False

    def __init__(self, table: Table, balance: Balance | None) -> None:
        # clean successes in which something can be undone: a completion after frame 0, and room to lose
        columns, row = table.corpus.columns, table.row
        n_frames = columns.n_frames[row]
        loss = np.maximum(1, np.ceil(MIN_LOSS * n_frames - 1e-9))
        clean = _success(table) & ~columns.messy[row]
        undoable = clean & (columns.done[row] >= 1) & (n_frames - 1 >= loss)
        self.candidates = _Candidates(table, balance, np.flatnonzero(undoable))

    def available(self) -> bool:
        return len(self.candidates) > 0

    def partners(self, uniforms: Uniforms) -> tuple[Places, Places]:
        _, chosen = self.candidates.draw(uniforms[:, 0])
        return chosen, chosen


def _success(table: Table) -> NDArray[np.bool_]:
    """Successes that no grade calls partial: bool (N,)."""
    columns, row = table.corpus.columns, table.row
    return (columns.quality[row] == Quality.SUCCESSFUL.rank) & ~(columns.partial_success[row] < 1)


def _stretch(columns: Columns, row: int, draw: Draw) -> tuple[int, int, int]:
    """s, m and the least loss: s < e, s + loss <= m."""
    n_frames, done = columns.n_frames.item(row), columns.done.item(row)
    loss = lost_frames(n_frames)
    from_start = draw.chance(0.5)
    start = draw.integer(0, min(done - 1, n_frames - 1 - loss))
    if from_start:
        start = 0
    return start, draw.integer(start + loss, n_frames - 1), loss


class Rewind(_Undo):
    name: ClassVar[str] = "rewind"

    @staticmethod
    def clips(columns: Columns, chosen: int, rejected: int, options: ClipOptions, draw: Draw) -> tuple[Frames, Frames]:
        start, turn, loss = _stretch(columns, chosen, draw)
        back = draw.integer(start, min(columns.done.item(chosen) - 1, turn - loss))
        forward = forward_path(start, turn)
        rewound = rewind_path(start, turn, back)
        shown = rewind_places(turn - start, turn - back, options, draw)
        return forward[places(len(forward), options, draw)], rewound[shown]


class Reverse(_Undo):
    name: ClassVar[str] = "reverse"

    @staticmethod
    def clips(columns: Columns, chosen: int, rejected: int, options: ClipOptions, draw: Draw) -> tuple[Frames, Frames]:
        start, end, _ = _stretch(columns, chosen, draw)
        forward, backward = forward_path(start, end), reverse_path(start, end)
        return forward[places(len(forward), options, draw)], backward[places(len(backward), options, draw)]


class _FullLength:
    """What outcome and grade share: both attempts are shown from their first frame to their last."""

    wrong_instruction: ClassVar[bool] = False

    @staticmethod
    def clips(columns: Columns, chosen: int, rejected: int, options: ClipOptions, draw: Draw) -> tuple[Frames, Frames]:
        frames = columns.n_frames
        return places(frames.item(chosen), options, draw), places(frames.item(rejected), options, draw)


class Outcome(_FullLength):
    """Drawn by the worse attempt; the better one is any of its task's better ones, messy or clean."""

    name: ClassVar[str] = "outcome"

    def __init__(self, table: Table, balance: Balance | None) -> None:
        self.table = table
        first, end = self._better(np.arange(len(table)))
        self.candidates = _Candidates(table, balance, np.flatnonzero(end > first))

    def available(self) -> bool:
        return len(self.candidates) > 0

    def partners(self, uniforms: Uniforms) -> tuple[Places, Places]:
        _, worse = self.candidates.draw(uniforms[:, 0])
        return _between(*self._better(worse), uniforms[:, 1]), worse

    def _better(self, worse: Places) -> tuple[Places, Places]:
        """First place and end of the better attempts at the same task."""
        columns, row, start = self.table.corpus.columns, self.table.row[worse], self.table.start
        task = columns.task[row]
        return start[task, 0], start[task, columns.quality[row]]


class WrongTask:
    """A success under its instruction, and any other task's video under the same; 4 in 10 of its scene, if it can."""

    name: ClassVar[str] = "wrong_task"
    wrong_instruction: ClassVar[bool] = True
    same_scene = 0.4

    def __init__(self, table: Table, balance: Balance | None) -> None:
        self.table = table
        scene = table.corpus.task_scene
        first, size = table.start[:, 0], table.start[:, 3] - table.start[:, 0]
        others = len(table) - size[table.corpus.columns.task[table.row]]
        self.candidates = _Candidates(table, balance, np.flatnonzero(_success(table) & (others > 0)))
        # all places by (scene, task): the other tasks of a scene are then one range, less the task's own part of it
        tasks = np.argsort(scene, kind="stable")
        tasks = tasks[scene[tasks] >= 0]
        end = np.cumsum(size[tasks])
        begin = end - size[tasks]
        self.by_scene = (np.arange(size[tasks].sum()) + np.repeat(first[tasks] - begin, size[tasks])).astype(np.int32)
        lead = np.searchsorted(scene[tasks], scene[tasks])  # of each task: the first and the last of its scene
        last = np.searchsorted(scene[tasks], scene[tasks], side="right") - 1
        self.scene_begin, self.own_begin, self.n_siblings = (np.zeros(len(scene), np.int32) for _ in range(3))
        self.scene_begin[tasks], self.own_begin[tasks] = begin[lead], begin
        self.n_siblings[tasks] = end[last] - begin[lead] - size[tasks]

    def available(self) -> bool:
        return len(self.candidates) > 0

    def partners(self, uniforms: Uniforms) -> tuple[Places, Places]:
        table = self.table
        _, chosen = self.candidates.draw(uniforms[:, 0])
        task = table.corpus.columns.task[table.row[chosen]]
        begin, end = table.start[task, 0], table.start[task, 3]
        # any place outside begin..end: draw among the others, then step over the task's own
        other = _between(np.zeros_like(begin), len(table) - (end - begin), uniforms[:, 1])
        other = np.where(other >= begin, other + (end - begin), other)
        near = (uniforms[:, 2] < self.same_scene) & (self.n_siblings[task] > 0)
        if near.any():
            kin, own = task[near], (end - begin)[near]
            place = _between(self.scene_begin[kin], self.scene_begin[kin] + self.n_siblings[kin], uniforms[near, 1])
            other[near] = self.by_scene[np.where(place >= self.own_begin[kin], place + own, place)]
        return chosen, other

    @staticmethod
    def clips(columns: Columns, chosen: int, rejected: int, options: ClipOptions, draw: Draw) -> tuple[Frames, Frames]:
        n_frames, done = columns.n_frames.item(chosen), columns.done.item(chosen)
        whole = draw.chance(0.5)
        # at least half of the way, so that the right video has clearly done more of the task than the wrong one
        end = draw.integer((done + 1) // 2, n_frames - 1)
        right = forward_path(0, n_frames - 1 if whole or columns.messy.item(chosen) else end)
        other = columns.n_frames.item(rejected)
        start = draw.integer(0, other // 2)
        wrong = forward_path(0 if draw.chance(0.5) else start, other - 1)
        return right[places(len(right), options, draw)], wrong[places(len(wrong), options, draw)]


class Grade(_FullLength):
    """Two graded attempts at one task, at least 0.2 apart; the graded ones of a task are kept sorted by grade."""

    name: ClassVar[str] = "grade"

    def __init__(self, table: Table, balance: Balance | None) -> None:
        columns = table.corpus.columns
        grade = columns.partial_success[table.row]
        graded = np.flatnonzero(~np.isnan(grade))
        # one sorted key for task and grade: tasks are 2 apart, grades lie within 0..1
        task = 2.0 * columns.task[table.row[graded]]
        key = task + grade[graded].astype(np.float64)
        order = np.argsort(key, kind="stable")
        self.graded, task, key = graded[order].astype(np.int32), task[order], key[order]
        first = np.searchsorted(key, task - 0.5)
        end = np.searchsorted(key, key - MIN_GRADE_GAP + 1e-6, side="right")
        usable = np.flatnonzero(end > first)
        self.candidates = _Candidates(table, balance, self.graded[usable])
        self.first_worse, self.end_worse = first[usable].astype(np.int32), end[usable].astype(np.int32)

    def available(self) -> bool:
        return len(self.candidates) > 0

    def partners(self, uniforms: Uniforms) -> tuple[Places, Places]:
        which, better = self.candidates.draw(uniforms[:, 0])
        worse = _between(self.first_worse[which], self.end_worse[which], uniforms[:, 1])
        return better, self.graded[worse]


STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (Rewind, Reverse, Outcome, WrongTask, Grade)
}
