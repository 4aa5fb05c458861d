"""Which transitions of a buffer have their reward, and which wait for a score.

A reward is written into the slot of its transition as soon as it is known, and only if the slot still holds that
transition. It is the reward that `policies.wrapper.RewardModelWrapper` with `terminate=False` would have paid: the same
`Episode` makes it from the same scores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from policies.judges import BadFrame, Frame
from policies.relabel.labeller import Labeller
from policies.wrapper import Episode, Rules
from rbm.errors import UserError
from rbm.scoring.scores import FrameScore

EMPTY, WAITING, READY, LOST = range(4)
"""States of a slot; lost: its score can never come."""

Slots = NDArray[np.int64]


class Integers(Protocol):
    """Draws integers from low to high − 1: `numpy.random.randint`, `Generator.integers`."""

    def __call__(self, low: int, high: int, size: int) -> Any: ...


@dataclass(frozen=True)
class _Step:
    slot: int
    generation: int
    due: bool
    env_reward: float
    terminated: bool
    over: bool


class _Attempt:
    """The episode that an environment is in, or was, until all its steps have their reward."""

    def __init__(self, labels: Labels, task: str) -> None:
        self._labels = labels
        self._episode = Episode(labels.rules)
        self._begun = False
        self._scores: deque[FrameScore] = deque()
        self._steps: deque[_Step] = deque()
        self.count = 0
        self.number = labels.labeller.open(task, self._receive)

    def add(self, step: _Step) -> None:
        self._steps.append(step)
        self._settle()

    def _receive(self, score: FrameScore) -> None:
        if self._begun:
            self._scores.append(score)
        else:
            self._begun = True
            self._episode.begin(score)
        self._settle()

    def _settle(self) -> None:
        """Steps whose score has come, and those behind them that wait for none."""
        while self._begun and self._steps and (self._scores or not self._steps[0].due):
            step = self._steps.popleft()
            score = self._scores.popleft() if step.due else None
            reward, _, _ = self._episode.step(score, step.env_reward, step.terminated, step.over)
            self._labels.write(step.slot, step.generation, reward)


class Labels:
    """The rewards of a buffer's slots.

    Args:
        rewards: float32 (slots,), the buffer's own; it is written into. NaN where there is no reward yet.
        labeller: scores frames.
        rules: what becomes of scores.
        envs: environments that fill the buffer.
        ready_share: of the transitions in the buffer; while fewer have their reward, `draw` waits.
        save: saves the buffer as it is; called when the run cannot go on.
        save_to: the file that `save` writes, for the sentence.
    """

    def __init__(
        self,
        rewards: NDArray[np.float32],
        labeller: Labeller,
        rules: Rules,
        envs: int,
        ready_share: float,
        save: Callable[[Path], None],
        save_to: Path | None,
    ) -> None:
        if not 0 <= ready_share <= 1:
            raise UserError(f"ready_share={ready_share} must be from 0 to 1")
        self.rewards, self.labeller, self.rules = rewards, labeller, rules
        self.ready_share = ready_share
        self.state = np.full(len(rewards), EMPTY, np.uint8)
        self.env_rewards = np.zeros(len(rewards), np.float32)
        self._generation = np.zeros(len(rewards), np.int64)
        self._counts = [len(rewards), 0, 0, 0]
        self._running: list[_Attempt | None] = [None] * envs
        self._save, self._save_to = save, save_to
        self._told: UserError | None = None

    @property
    def ready(self) -> int:
        """Transitions that have their reward."""
        return self._counts[READY]

    @property
    def waiting(self) -> int:
        """Transitions that have none yet."""
        return self._counts[WAITING]

    def claim(self, slots: Slots) -> None:
        """These slots hold new transitions; what comes for the old ones is not written any more."""
        for slot in slots.tolist():
            self._generation[slot] += 1
            self.rewards[slot] = np.nan
            self._mark(slot, LOST)

    def add(
        self,
        slot: int,
        env: int,
        *,
        frame: Frame | None,
        first: Frame | None,
        task: str | None,
        env_reward: float,
        terminated: bool,
        truncated: bool,
    ) -> None:
        """The transition in a claimed slot is the next step of an environment.

        Args:
            frame: after the step; looked at where it is due.
            first: after the reset, with the first step of an episode. What episode ran in this environment is over.
            task: the instruction, with `first`.

        Raises:
            UserError: no episode is running, there is no task, the frame is no picture (`BadFrame`), or see `Labeller`.
        """
        with self.saving():
            self.labeller.poll()
            if first is not None:
                self._begin(env, first, task)
            attempt = self._running[env]
            if attempt is None:
                raise UserError(
                    f"environment {env}: the first step of an episode must bring the picture after the reset, as "
                    "'first_frame' (policies.relabel.FramesInInfo gives it); reset the environment to begin one"
                )
            attempt.count += 1
            over = terminated or truncated
            due = over or attempt.count % self.rules.every == 0
            if due:
                self._push(attempt, frame, f"environment {env}, step {attempt.count}")
            self.env_rewards[slot] = env_reward
            self._mark(slot, WAITING)
            attempt.add(_Step(slot, int(self._generation[slot]), due, env_reward, terminated, over))
            if over:
                self._end(env)

    def cut(self) -> None:
        """All running episodes are over, without an end of their own."""
        for env in range(len(self._running)):
            self._end(env)

    def write(self, slot: int, generation: int, reward: float) -> None:
        if self._generation[slot] == generation:
            self.rewards[slot] = reward
            self._mark(slot, READY)

    def poll(self) -> None:
        """Write what has come."""
        with self.saving():
            self.labeller.poll()

    def finish(self) -> None:
        """Wait until every transition has its reward."""
        with self.saving():
            self.labeller.wait(lambda: not self.waiting)

    def draw(self, size: int, count: int, integers: Integers) -> Slots:
        """Slots of transitions that have their reward, each as likely: int64 (count,).

        Args:
            size: slots that are filled, from the first on.
            integers: gives random numbers.

        Raises:
            UserError: there are none, nor any that wait; or see `Labeller`.
        """
        with self.saving():
            self.labeller.poll()
            if not self._enough():
                self.labeller.wait(self._enough)
        if 2 * self.ready < size:
            ready = np.flatnonzero(self.state[:size] == READY)
            return ready[integers(0, len(ready), count)]
        slots = np.asarray(integers(0, size, count), np.int64)
        while (wrong := self.state[slots] != READY).any():
            slots[wrong] = integers(0, size, int(wrong.sum()))
        return slots

    def restore(self, state: NDArray[np.uint8]) -> None:
        """Slots are as they were saved, the rewards with them; episodes that were running are over."""
        self.cut()
        self._generation += 1
        there = (state == EMPTY) | ((state == READY) & np.isfinite(self.rewards))
        self.state[:] = np.where(there, state, LOST)
        self._counts = np.bincount(self.state, minlength=4).tolist()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Where this cannot go on, running episodes are over, and the buffer is saved if a file was named."""
        try:
            yield
        except UserError as error:
            if error is not self._told:
                self._told = error
                self.cut()
                if self._save_to is not None:
                    error.args = (f"{error}. {self._saved(self._save_to)}",)
            raise

    def _saved(self, path: Path) -> str:
        try:
            self._save(path)
        except UserError as error:
            return f"The buffer could not be saved: {error}"
        return f"The buffer was saved to {path}"

    def _enough(self) -> bool:
        if not self.ready + self.waiting:
            raise UserError("nothing can be drawn from the buffer: no transition in it has a score, or waits for one")
        return self.ready > 0 and self.ready >= self.ready_share * (self.ready + self.waiting)

    def _begin(self, env: int, first: Frame, task: str | None) -> None:
        self._end(env)
        if task is None:
            raise UserError(
                f"environment {env} does not say its task: give task='open the drawer', or infos with 'instruction'"
            )
        attempt = self._running[env] = _Attempt(self, task)
        self._push(attempt, first, f"environment {env}, reset")

    def _push(self, attempt: _Attempt, frame: Frame | None, place: str) -> None:
        if frame is None:
            raise BadFrame(
                f"there is no frame; give one after every {self.rules.every} steps and at an episode's end, as "
                "FramesInInfo does with the same every=",
                0,
                place,
            )
        self.labeller.push(attempt.number, frame, place)

    def _end(self, env: int) -> None:
        attempt, self._running[env] = self._running[env], None
        if attempt is not None:
            self.labeller.end(attempt.number)

    def _mark(self, slot: int, state: int) -> None:
        self._counts[self.state[slot]] -= 1
        self._counts[state] += 1
        self.state[slot] = state


def labeller_of(source: Any, options: dict[str, Any]) -> tuple[Labeller, bool]:
    """A labeller over a source, and whether it was made here.

    Raises:
        UserError: options for one that was made elsewhere.
    """
    if not isinstance(source, Labeller):
        return Labeller(source, **options), True
    if options:
        raise UserError(f"a labeller that is given has its own {', '.join(options)}")
    return source, False


def tasks_of(task: str | Sequence[str] | None, envs: int) -> list[str | None]:
    """The instruction of each environment, none where its episodes bring their own.

    Raises:
        UserError: there are not as many as environments.
    """
    if task is None or isinstance(task, str):
        return [task] * envs
    if len(task) != envs:
        raise UserError(f"{len(task)} tasks are given for {envs} environments: give one, or one for each")
    return list(task)
