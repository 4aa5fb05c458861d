"""Live sessions: a frame at a time goes in, a score comes out, at the cost of one frame.

1. A session holds frames on a stride (`rbm.frames.session_context`). The score of frame t is that of one forward over
   [held frames, t]: `Session.context` names them.
2. Keys and values of the held frames are kept (`rbm.model.memory`), so that only the new frame is read. A frame off the
   stride is read and then overwritten. When the context is full the stride doubles, and the frames that stay are read
   again, from their features: keys that saw dropped frames would be wrong.
3. A `SessionPool` advances many sessions in one forward. Over a budget of bytes the idlest sessions have their frames
   compressed first (PNG, without loss), then lose their keys and values (*warm*), then their features (*cold*); what
   they say afterwards is the same.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rbm.errors import UserError
from rbm.frames import session_stride
from rbm.model import ClipBatch, FramePool
from rbm.model.memory import Memory
from rbm.scoring.held import Held
from rbm.scoring.scorer import Scorer
from rbm.scoring.scores import FrameScore
from rbm.scoring.snapshot import read_snapshot, write_snapshot
from rbm.scoring.views import check_views
from rbm.video import Frames, stored_frames

Frame = Frames | Mapping[str, Frames]
"""uint8 (H, W, 3), RGB, any size; or one of each of several views, by name."""


class PoolFull(UserError):
    """Another session does not fit into the pool's budget."""


class Session:
    """One attempt that is being watched. Made by `SessionPool.open` or `Scorer.stream`.

    Attributes:
        task: the instruction.
        count: frames that were pushed.
        context: int64 (n,), numbers of the frames that the last score stands on, that frame itself last.
    """

    def __init__(self, pool: SessionPool, task: str) -> None:
        self.pool, self.task = pool, task
        self._open = True
        self._bytes = 0
        self._begin()

    def _begin(self) -> None:
        self.count = 0
        self.context: NDArray[np.int64] = np.zeros(0, np.int64)
        self._stride = 1
        self._held: list[Held] = []
        self._read = 0
        """How many of the held frames the memory holds."""
        self._memory = Memory(self.pool.scorer.context_frames)

    def push(self, frame: Frame) -> FrameScore:
        """Score the next frame.

        Raises:
            UserError: the frame is no uint8 picture, or the session was closed.
        """
        return self.pool.push([(self, frame)])[0]

    def push_many(self, frames: Frames | Sequence[Frame]) -> list[FrameScore]:
        """Score the next frames, uint8 (T, H, W, 3), as `push` does one after another, in as few forwards as it takes.

        Raises:
            UserError: as `push`; nothing was pushed then.
        """
        return self.pool.push([(self, frame) for frame in frames])

    def fork(self) -> Session:
        """Another session that has seen the same and goes its own way, to look ahead from here.

        The pool keeps it, and counts what both hold twice, until it is closed.

        Raises:
            PoolFull: it does not fit.
        """
        return self.pool._fork(self)

    def reset(self, task: str | None = None) -> None:
        """Forget all frames: a new attempt, at another task if one is given."""
        self.pool._reset(self, task)

    def snapshot(self) -> bytes:
        """All that is needed to go on elsewhere (`SessionPool.restore`), with a model that takes the same frames."""
        return self.pool._snapshot(self)

    def close(self) -> None:
        """Give back what is held; a closed session takes no frames."""
        self.pool._close(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # the plan of a push; the pool does the work

    def _plan(self, held: Held, keep: bool) -> tuple[Memory, int, list[Held]]:
        """What the next forward reads of this session: behind which memory, how many of its steps, which frames."""
        stride = session_stride(held.number, self.pool.scorer.context_frames, self._stride)
        if stride != self._stride:
            self._stride = stride
            self._held = [old for old in self._held if old.number % stride == 0]
            self._read = min(self._read, 1)  # the first frame saw nothing that is dropped now
        run = (self._memory, self._read, [*self._held[self._read :], held])
        self.context = np.array([*(old.number for old in self._held), held.number])
        self._read = len(self._held)
        if keep:
            self._held.append(held)
            self._read += 1
        self.count = held.number + 1
        return run

    def _check_open(self) -> None:
        if not self._open:
            raise UserError("this session was closed: open another")

    def _state(self) -> tuple[Any, ...]:
        return self.count, self.context, self._stride, list(self._held)

    def _go_back(self, state: tuple[Any, ...]) -> None:
        self.count, self.context, self._stride, self._held = state
        self._memory.clear()
        self._read = 0

    def _has_features(self) -> bool:
        return bool(self._held) and all(held.features is not None for held in self._held)

    def _weigh(self) -> int:
        return self._memory.bytes + sum(held.bytes for held in self._held)


@dataclass(frozen=True)
class _Run:
    memory: Memory
    kept: int
    steps: list[Held]
    task: str
    answers: bool


class SessionPool:
    """Sessions that advance together and share a budget of memory. Calls from several threads wait for each other.

    Args:
        scorer: the model.
        budget_bytes: what keys, features and frames of all sessions may take between two pushes; none for no bound. A
            forward in flight takes its own on top, and what the last push brought may go beyond it where nothing is
            left to lose; no further frame is taken then until a session is closed or reset.
    """

    def __init__(self, scorer: Scorer, budget_bytes: int | None = None) -> None:
        if budget_bytes is not None and budget_bytes < 1:
            raise UserError(f"a budget of {budget_bytes} bytes holds no session")
        self.scorer, self.budget_bytes = scorer, budget_bytes
        self.bytes = 0
        self.evictions = 0
        self._lock = threading.RLock()
        # the idlest first; `_raw` are those with frames that are not compressed
        self._raw: OrderedDict[int, Session] = OrderedDict()
        self._hot: OrderedDict[int, Session] = OrderedDict()
        self._warm: OrderedDict[int, Session] = OrderedDict()
        self._cold: OrderedDict[int, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hot) + len(self._warm) + len(self._cold)

    def stats(self) -> dict[str, int]:
        """Sessions by what they hold (hot: keys and values; warm: features; cold: frames), bytes, and evictions."""
        with self._lock:
            return {
                "sessions": len(self),
                "hot": len(self._hot),
                "warm": len(self._warm),
                "cold": len(self._cold),
                "bytes": self.bytes,
                "evictions": self.evictions,
            }

    def open(self, task: str) -> Session:
        """A new session.

        Raises:
            UserError: the instruction is empty, or the model cannot read it. PoolFull: all sessions are cold and the
                budget is used up.
        """
        self.scorer.check(task)
        with self._lock:
            self._check_room()
            session = Session(self, task)
            self._cold[id(session)] = session
            return session

    def push(self, requests: Sequence[tuple[Session, Frame]]) -> list[FrameScore]:
        """Score the next frame of each of these sessions, in shared forwards; one may stand here several times.

        Raises:
            UserError: a frame is no uint8 picture, a session was closed or is another pool's. PoolFull: all sessions
                are cold and the budget is used up. Nothing was pushed then.
        """
        with self._lock:
            counts: dict[int, int] = {}
            numbered = []
            for session, frame in requests:
                number = counts.setdefault(id(session), session.count)
                counts[id(session)] += 1
                numbered.append((session, number, frame, True))
            return self.push_at(numbered)

    def push_at(self, requests: Sequence[tuple[Session, int, Frame, bool]]) -> list[FrameScore]:
        """`push` of frames with their numbers, which may leave out frames off the stride; scores of those marked.

        Raises:
            UserError: as `push`. ValueError: numbers do not rise, or a frame on the stride was left out.
        """
        with self._lock:
            for session, *_ in requests:
                if session.pool is not self:
                    raise UserError("this session belongs to another pool")
                session._check_open()
            self._check_room()
            shown = self._preprocessed([frame for _, _, frame, _ in requests])
            sessions = {id(session): session for session, *_ in requests}
            before = {key: session._state() for key, session in sessions.items()}
            try:
                with torch.inference_mode():
                    return self._advance(requests, shown)
            except BaseException:
                for key, session in sessions.items():
                    session._go_back(before[key])
                raise
            finally:
                for session in sessions.values():
                    self._settle(session)
                self._shrink()

    def restore(self, snapshot: bytes) -> Session:
        """A session that goes on from a snapshot.

        Raises:
            UserError: it is no snapshot, or of a model that takes other frames. PoolFull: it does not fit.
        """
        task, count, frames = read_snapshot(snapshot, self.scorer)
        with self._lock:
            session = self.open(task)
            session.count = count
            session._stride = session_stride(max(0, count - 1), self.scorer.context_frames)
            for number, views in frames:
                held = Held(number)
                held.packed = views
                session._held.append(held)
            session.context = np.array(
                [number for number, _ in frames if number < count - 1] + [count - 1] * (count > 0)
            )
            self._settle(session)
            self._shrink()
            return session

    # what a push does

    def _preprocessed(self, frames: Sequence[Frame]) -> list[tuple[Tensor | None, ...]]:
        """For each frame and view uint8 (1, h, w, 3); pictures of one size together."""
        names = self.scorer.views
        views: list[list[Frames | None]] = []
        for frame in frames:
            if isinstance(frame, Mapping):
                check_views(frame, names)
                views.append([frame.get(name) for name in names])
            else:
                views.append([frame])
            for given in frame.values() if isinstance(frame, Mapping) else [frame]:
                _check_picture(given)
        of_shape: dict[tuple[int, ...], list[tuple[int, int, Frames]]] = {}
        for i, shown in enumerate(views):
            for j, picture in enumerate(shown):
                if picture is not None:
                    of_shape.setdefault(picture.shape, []).append((i, j, picture))
        found: list[list[Tensor | None]] = [[None] * len(shown) for shown in views]
        for places in of_shape.values():
            pictures = np.stack([picture for *_, picture in places])
            for (i, j, _), tensor in zip(
                places, self.scorer.model.preprocess(stored_frames(pictures)).split(1), strict=True
            ):
                found[i][j] = tensor
        return [tuple(shown) for shown in found]

    def _advance(
        self, requests: Sequence[tuple[Session, int, Frame, bool]], shown: Sequence[tuple[Tensor | None, ...]]
    ) -> list[FrameScore]:
        scores: list[FrameScore] = []
        runs: list[_Run] = []
        taken = 0
        for (session, number, _, answers), pixels in zip(requests, shown, strict=True):
            if number < session.count:
                raise ValueError(f"frame {number} of a session that has had {session.count}")
            stride = session_stride(number, self.scorer.context_frames, session._stride)
            keep = number % stride == 0
            if -(-session.count // stride) * stride < number:
                raise ValueError(f"a frame before frame {number} is on the stride and was not pushed")
            places = sum(self.scorer.model.backbone.places(*x.shape[1:3]) for x in pixels if x is not None)
            if runs and taken + places > self.scorer.forward_places:
                scores += self._read(runs)  # here, so that features of no more frames are held at once
                runs, taken = [], 0
            runs.append(_Run(*session._plan(Held(number, pixels), keep), session.task, answers))
            taken += places
        return scores + self._read(runs)

    def _encode(self, frames: Sequence[Held]) -> None:
        """Features of frames that have none, in batches of one size."""
        new = list({id(held): held for held in frames if held.features is None}.values())
        pool = FramePool()
        for held in new:
            held.unpack()
            for picture in held.pixels or ():
                if picture is not None:
                    pool.add(id(picture), picture)
        if not new:
            return
        groups, place = pool.groups()
        encoded = [feature for group in groups for feature in self._encoded(group)]
        for held in new:
            assert held.pixels is not None
            numbers = [None if x is None else int(place(torch.tensor(pool.add(id(x), x)))) for x in held.pixels]
            held.features = tuple(None if number is None else encoded[number] for number in numbers)

    def _encoded(self, group: Tensor) -> Iterable[Tensor]:
        return self.scorer.model.backbone.encode(group.to(self.scorer.device)).split(1)

    def _read(self, runs: Sequence[_Run]) -> list[FrameScore]:
        """Work the runs off in their order, as many in a forward as `Scorer.forward_places` allows."""
        self._encode([held for run in runs for held in run.steps])
        scores: list[FrameScore] = []
        waiting: list[_Run] = []
        taken = 0
        for run in runs:
            for part in self._parts(run):
                places = sum(held.places for held in part.steps)
                if waiting and taken + places > self.scorer.forward_places:
                    scores += self._forward(waiting)
                    waiting, taken = [], 0
                waiting.append(part)
                taken += places
        return scores + (self._forward(waiting) if waiting else [])

    def _parts(self, run: _Run) -> Iterable[_Run]:
        """A run that is too long for one forward in several that follow one another."""
        start, taken = 0, 0
        for stop, held in enumerate(run.steps):
            places = held.places
            if stop > start and taken + places > self.scorer.forward_places:
                yield _Run(run.memory, run.kept + start, run.steps[start:stop], run.task, False)
                start, taken = stop, 0
            taken += places
        yield _Run(run.memory, run.kept + start, run.steps[start:], run.task, run.answers)

    def _forward(self, runs: Sequence[_Run]) -> list[FrameScore]:
        pool = FramePool()
        steps = [held for run in runs for held in run.steps]
        views = max(len(held.features or ()) for held in steps)
        columns = [[-1] * views for _ in steps]
        for row, held in enumerate(steps):
            for view, feature in enumerate(held.features or ()):
                if feature is not None:
                    columns[row][view] = pool.add(id(feature), feature)
        groups, renumber = pool.groups()
        batch = ClipBatch(
            groups,
            renumber(torch.tensor(columns)),
            torch.tensor([len(run.steps) for run in runs]),
            tuple(run.task for run in runs),
        ).to(self.scorer.device)
        output = self.scorer.model.advance(batch, [(run.memory, run.kept) for run in runs])
        progress, spread, success, remaining = self.scorer.decode(output)
        ends = np.cumsum([len(run.steps) for run in runs]) - 1
        return [
            FrameScore(
                float(progress[end]),
                float(spread[end]),
                float(success[end]),
                None if remaining is None else float(remaining[end]),
            )
            for run, end in zip(runs, ends.tolist(), strict=True)
            if run.answers
        ]

    # memory

    def _settle(self, session: Session) -> None:
        """After a push: what is new is counted, the session is the one used last."""
        session._memory.crop(session._read)
        for held in session._held:
            if not held.bytes:
                held.own()
                self._raw[id(session)] = session
        weight = session._weigh()
        self.bytes += weight - session._bytes
        session._bytes = weight
        raw = id(session) in self._raw
        self._forget(session)
        if raw:
            self._raw[id(session)] = session
        tier = self._hot if session._read else self._warm if session._has_features() else self._cold
        tier[id(session)] = session

    def _shrink(self) -> None:
        if self.budget_bytes is None:
            return
        for tier, then, lose in (
            (self._raw, None, _lose_pixels),
            (self._hot, self._warm, _lose_keys),
            (self._warm, self._cold, _lose_features),
        ):
            while self.bytes > self.budget_bytes and tier:
                key, session = tier.popitem(last=False)
                lose(session)
                if then is not None:
                    then[key] = session
                    self.evictions += 1
                weight = session._weigh()
                self.bytes += weight - session._bytes
                session._bytes = weight

    def _check_room(self) -> None:
        self._shrink()  # the budget may have become smaller
        if self.budget_bytes is not None and self.bytes > self.budget_bytes:
            raise PoolFull(
                f"{len(self)} sessions take up the {self.budget_bytes} bytes that there are: close some first"
            )

    def _forget(self, session: Session) -> None:
        for tier in (self._raw, self._hot, self._warm, self._cold):
            tier.pop(id(session), None)

    def _close(self, session: Session) -> None:
        with self._lock:
            if session._open:
                session._open = False
                self._forget(session)
                self.bytes -= session._bytes
                session._bytes = 0
                session._held, session._read = [], 0
                session._memory.clear()

    def _reset(self, session: Session, task: str | None) -> None:
        if task is not None:
            self.scorer.check(task)
        with self._lock:
            session._check_open()
            session.task = session.task if task is None else task
            session._begin()
            self._settle(session)

    def _fork(self, session: Session) -> Session:
        with self._lock:
            session._check_open()
            self._check_room()
            copy = Session(self, session.task)
            copy.count, copy.context, copy._stride = session.count, session.context, session._stride
            copy._held, copy._read = [held.copy() for held in session._held], session._read
            copy._memory = session._memory.fork()
            if id(session) in self._raw:
                self._raw[id(copy)] = copy
            self._settle(copy)
            self._shrink()
            return copy

    def _snapshot(self, session: Session) -> bytes:
        with self._lock:
            session._check_open()
            return write_snapshot(session.task, session.count, self.scorer.context_frames, session._held)


def _lose_pixels(session: Session) -> None:
    for held in session._held:
        held.pack()


def _lose_keys(session: Session) -> None:
    session._memory.clear()
    session._read = 0


def _lose_features(session: Session) -> None:
    for held in session._held:
        held.forget()


def _check_picture(picture: Frames) -> None:
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3:
        found = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise UserError(f"a frame is {found}; give uint8 (H, W, 3), 0 to 255")
    if picture.shape[2] not in (1, 3, 4) or 0 in picture.shape:
        raise UserError(f"a frame has shape {picture.shape}; give (H, W, 3)")
