"""Scores frames in a process of its own, while this one goes on: frames go in as they are taken, scores come back.

    labeller = Labeller(None)                              # the shipped weights; a checkpoint, "http://…"
    attempt = labeller.open("open the drawer", print)      # print(score) for each of its frames, in their order
    labeller.push(attempt, frame); labeller.push(attempt, frame)
    labeller.end(attempt)
    labeller.poll()                                        # takes what has come, sends what waits; never waits itself

1. Frames wait until there are `batch` of them, or the first has waited `wait_seconds`; then all that wait, of all
   attempts, are scored in one push. At most two such messages are under way: a slow process gets larger ones.
2. Frames of an attempt are kept until it has ended and all are scored. A process that dies is started again, and they
   are scored again from the attempt's start, so that the numbers are what they would have been.
3. The other process ends with this one, however this one ends.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policies.judges import PATIENCE_S, BadFrame, BadScore, Frame, JudgeGone, wrong_picture
from policies.relabel.async_line import Cut
from policies.relabel.async_process import Process
from rbm.errors import UserError
from rbm.scoring.scorer import check_task
from rbm.scoring.scores import FrameScore

MOST_FRAMES = 256
"""Frames of one message."""
UNDER_WAY = 2
"""Messages that are sent and not answered: one that is worked on, one that is there when it is done."""
MOST_DEATHS = 3
"""Of the scoring process, without a score between them."""
_LOOK_S = 0.25

Receive = Callable[[FrameScore], None]


class LabelsLate(UserError):
    """No score came for too long."""


class LabellerGone(UserError):
    """The scoring process cannot go on."""


@dataclass
class _Attempt:
    task: str
    receive: Receive
    frames: deque[tuple[Frame, str]] = field(default_factory=deque)
    """From frame `first` on, each with its place for a sentence."""
    first: int = 0
    answered: int = 0
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ended: bool = False

    @property
    def count(self) -> int:
        return self.first + len(self.frames)


class Labeller:
    """A process that scores frames of live attempts. It starts at once; loading the model takes some seconds.

    Args:
        source: a checkpoint (folder, file, id on the hub), "http://…" of a server (`rbm serve`); none: the shipped
            weights.
        score_device: of a model that is not on a server.
        batch, wait_seconds: frames are sent when so many wait, or the first has waited so long.
        queue_bytes: frames that wait for their score; `push` waits where there are more.
        history_bytes: frames of running attempts that are kept for a process that may die. Beyond, those of the
            longest attempt are given up, which then cannot be scored again.
        timeout_seconds: without any score, while something waits for one (`LabelsLate`).
        threads, nice: of the process; it shall not disturb this one.
        patience_seconds, token: of a server (`policies.judges.make_judge`).

    Raises:
        UserError: a number out of its range. From all methods, once the process cannot go on: LabellerGone (it died
            again and again, there is no such model, an instruction cannot be read), `policies.judges.JudgeGone` (the
            server stayed away), `policies.judges.BadScore` (a score is not finite), LabelsLate; the same again
            afterwards.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | None = None,
        *,
        score_device: str = "auto",
        batch: int = 32,
        wait_seconds: float = 0.5,
        queue_bytes: int = 256 << 20,
        history_bytes: int = 1 << 30,
        timeout_seconds: float = 600.0,
        threads: int = 1,
        nice: int = 10,
        patience_seconds: float = PATIENCE_S,
        token: str | None = None,
    ) -> None:
        if source is not None and not isinstance(source, str | os.PathLike):
            raise UserError(
                f"a process cannot be given a {type(source).__name__}: give a checkpoint or http://… (none: the "
                "shipped weights)"
            )
        for name, value, least in (
            ("batch", batch, 1),
            ("wait_seconds", wait_seconds, 0),
            ("queue_bytes", queue_bytes, 1),
            ("history_bytes", history_bytes, 0),
            ("timeout_seconds", timeout_seconds, 0),
            ("threads", threads, 1),
            ("nice", nice, 0),
            ("patience_seconds", patience_seconds, 0),
        ):
            if not value >= least:
                raise UserError(f"{name}={value} of a labeller must be at least {least}")
        self._settings = {
            "parent": os.getpid(),
            "source": None if source is None else os.fspath(source),
            "judge": {"device": score_device, "patience_seconds": float(patience_seconds), "token": token},
            "threads": threads,
            "nice": nice,
        }
        self.batch, self.wait_seconds, self.timeout_seconds = batch, wait_seconds, timeout_seconds
        self.queue_bytes, self.history_bytes = queue_bytes, history_bytes
        self.scored = self.deaths = 0
        """Frames that have their score; deaths of the process."""
        self.waiting = self.waiting_bytes = 0
        """Frames that have none yet."""
        self._held_bytes = 0
        self._attempts: dict[int, _Attempt] = {}
        self._numbers = itertools.count()
        self._unsent: deque[tuple[int, int]] = deque()  # attempt, frame
        self._oldest = 0.0
        self._sent: deque[list[tuple[int, int]]] = deque()
        self._ended: list[int] = []
        self._again = False  # a new process is given frames again whose scores have come
        self._deaths_in_a_row = 0
        self._failure: UserError | None = None
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def open(self, task: str, receive: Receive) -> int:
        """A new attempt; `receive` takes the score of each of its frames, inside of other calls of this labeller.

        Raises:
            UserError: the instruction is empty.
        """
        self._check()
        check_task(task)
        number = next(self._numbers)
        self._attempts[number] = _Attempt(task, receive)
        return number

    def push(self, attempt: int, frame: Frame, place: str = "") -> None:
        """The next frame of an attempt; it is copied. Waits where `queue_bytes` wait already.

        Raises:
            BadFrame: it is no uint8 picture, or of another size than those before it; `place` says where.
        """
        self._check()
        own = self._attempts[attempt]
        if isinstance(frame, Mapping):
            kept: Frame = {view: _checked(picture, view, own, place) for view, picture in frame.items()}
        else:
            kept = _checked(frame, "", own, place)
        size = _bytes(kept)
        if not self._unsent:
            self._oldest = time.monotonic()
        self._unsent.append((attempt, own.count))
        own.frames.append((kept, place))
        self.waiting += 1
        self.waiting_bytes += size
        self._held_bytes += size
        if self.waiting > 1 and self.waiting_bytes > self.queue_bytes:
            self.wait(lambda: self.waiting <= 1 or self.waiting_bytes <= self.queue_bytes)

    def end(self, attempt: int) -> None:
        """No more frames will come of this attempt; those that it had are still scored."""
        own = self._attempts[attempt]
        own.ended = True
        self._drop_if_over(attempt, own)

    def poll(self) -> None:
        """Take the scores that have come, send what is due; does not wait."""
        self._check()
        self._pump(self.waiting_bytes > self.queue_bytes // 2)

    def wait(self, until: Callable[[], bool]) -> None:
        """`poll`, and send everything, until something is true that comes with scores.

        Raises:
            LabelsLate: no score came for `timeout_seconds`.
        """
        self._check()
        scored, since = self.scored, time.monotonic()
        while True:
            self._pump(True)
            if until():
                return
            now = time.monotonic()
            if self.scored != scored:
                scored, since = self.scored, now
            elif now - since >= self.timeout_seconds:
                raise self._fail(
                    LabelsLate(
                        f"no score came for {self.timeout_seconds:g} s, and {self.waiting} frames wait for one; the "
                        "model is too slow or hangs: score fewer frames (every=4), or raise timeout_seconds"
                    )
                )
            self._line.wait(_LOOK_S)

    def close(self) -> None:
        """End the process; what waits is not scored any more."""
        self._process.kill()
        self._failure = self._failure or UserError("the labeller was closed; make a new one")

    def __enter__(self) -> Labeller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # the process

    def _start(self) -> None:
        self._process = Process("policies.relabel.async_worker", self._settings)
        self._line = self._process.line

    def _restart(self) -> None:
        """All frames of all attempts are scored again; scores that were told already are not told again."""
        self._process.kill()
        self.deaths += 1
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= MOST_DEATHS:
            raise self._fail(
                LabellerGone(
                    f"the scoring process died {MOST_DEATHS} times in a row (exit code {self._process.exit_code}); "
                    "see what it wrote above"
                )
            )
        if any(own.first for own in self._attempts.values()):
            raise self._fail(
                LabellerGone(
                    f"the scoring process died (exit code {self._process.exit_code}), and the first frames of an "
                    "attempt are no longer there to be scored again; raise history_bytes"
                )
            )
        self._again = True
        self._sent.clear()
        self._ended.clear()
        self._unsent = deque((number, i) for number, own in self._attempts.items() for i in range(own.count))
        self._oldest = 0.0
        self._start()

    def _pump(self, hurry: bool) -> None:
        try:
            for message in self._line.receive():
                self._take(message)
            while self._unsent and len(self._sent) < UNDER_WAY and (hurry or self._due()):
                self._send()
            self._line.flush()
        except Cut:
            self._restart()

    def _due(self) -> bool:
        return len(self._unsent) >= self.batch or time.monotonic() - self._oldest >= self.wait_seconds

    def _send(self) -> None:
        items: list[tuple[int, int]] = []
        frames: list[list[Any]] = []
        while self._unsent and len(items) < MOST_FRAMES:
            number, i = self._unsent.popleft()
            if number in self._attempts:  # else it was to be scored again, and has ended meanwhile
                own = self._attempts[number]
                items.append((number, i))
                frames.append([number, own.task, own.frames[i - own.first][0]])
        self._sent.append(items)
        self._oldest = time.monotonic()
        ended, self._ended = self._ended, []
        self._line.send({"frames": frames, "ended": ended})

    def _take(self, message: dict[str, Any]) -> None:
        if "failed" in message:
            raise self._fail(self._error(message))
        if "scores" not in message:
            return
        self._deaths_in_a_row = 0
        for (number, i), score in zip(self._sent.popleft(), message["scores"].tolist(), strict=True):
            own = self._attempts.get(number)
            if own is None or i < own.answered:  # told before the process died
                continue
            own.answered += 1
            self.scored += 1
            self.waiting -= 1
            self.waiting_bytes -= _bytes(own.frames[i - own.first][0])
            self._drop_if_over(number, own)
            own.receive(FrameScore(*score))
        if self._held_bytes - self.waiting_bytes > self.history_bytes:
            self._give_up_history()

    def _error(self, message: dict[str, Any]) -> UserError:
        said, item = message["failed"], message["item"]
        if item is not None:
            number, i = self._sent[0][item]
            own = self._attempts[number]
            kind = BadScore if message["kind"] == "score" else BadFrame
            return kind(said, item, own.frames[i - own.first][1])
        return JudgeGone(said) if message["kind"] == "gone" else LabellerGone(said)

    def _fail(self, error: UserError) -> UserError:
        self._process.kill()
        self._failure = error
        return error

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    # what is kept

    def _drop_if_over(self, number: int, own: _Attempt) -> None:
        if own.ended and own.answered == own.count:
            del self._attempts[number]
            self._held_bytes -= sum(_bytes(frame) for frame, _ in own.frames)
            self._ended.append(number)

    def _give_up_history(self) -> None:
        """Forget the frames of the longest attempt whose scores have come, but not while some are scored again."""
        if self._again:
            under_way = itertools.chain(self._unsent, *self._sent)
            if any(number in self._attempts and i < self._attempts[number].answered for number, i in under_way):
                return
            self._again = False
        longest = max(self._attempts.values(), key=lambda own: own.answered - own.first)
        while longest.first < longest.answered:
            self._held_bytes -= _bytes(longest.frames.popleft()[0])
            longest.first += 1


def _checked(picture: Any, view: str, own: _Attempt, place: str) -> np.ndarray:
    """A copy of a picture."""
    wrong = wrong_picture(picture)
    if wrong:
        raise BadFrame(wrong, 0, place)
    size = own.sizes.setdefault(view, picture.shape)
    if size != picture.shape:
        raise BadFrame(
            f"the frame is {picture.shape[1]}×{picture.shape[0]} and those before it in the episode were "
            f"{size[1]}×{size[0]}; give frames of one size",
            0,
            place,
        )
    return np.array(picture, order="C")


def _bytes(frame: Frame) -> int:
    return sum(picture.nbytes for picture in frame.values()) if isinstance(frame, Mapping) else frame.nbytes
