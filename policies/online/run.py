"""One online run: act, learn, evaluate, watch; a folder that a killed run goes on from.

config.json    what was asked
curve.jsonl    a line for each evaluation
attempts.jsonl what was done in each training episode (`dataset_builder.sources.metaworld_attempts`)
monitor.jsonl  a line for each training episode, where a reward model judges (`policies.monitor`)
clips/         episodes that were judged done and were not
state.pt       learner, buffer and counters of the last evaluation, or of where the judge went away; tensors and plain
               values only
result.json    at the end
"""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from policies.folder import claim, keep_lines
from policies.monitor import Film, Monitor
from policies.online.learner import Learner
from policies.online.world import Env, World
from rbm.errors import UserError
from rbm.output import whole_file

TEST_SEED = 7_000_000
"""Scenes of evaluation come from here, those of training from below."""

FLOW = "flow.safetensors"
"""The flow policy that a run stands on, where it does."""

_SOON = 2
"""Actions within which a judgement must come true, for the monitor: it may be an instant early."""

_LAST = 3
"""Evaluations at a run's end whose mean is its result."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Schedule:
    """How long, how often.

    Attributes:
        steps: decisions of training.
        first: of them, made before the learner acts.
        updates: gradient steps for each decision; they are taken at an episode's end.
        evaluate_every: decisions between two evaluations.
        episodes: of an evaluation.
    """

    steps: int = 4000
    first: int = 200
    updates: int = 4
    evaluate_every: int = 400
    episodes: int = 40

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < (0 if name == "first" else 1):
                raise UserError(f"{name}={value} of a schedule is too small")


@dataclass
class Setup:
    """What an algorithm prepares.

    Attributes:
        training, test: environments of one action space. `info["success"]` says whether the task is done now; where a
            reward model judges, the training environment has an `instruction`, and `info` what the wrapper puts there.
            Where it has `done_soon(actions)`, a judgement may come so many actions too early, and where it has
            `attempt()`, episodes are kept in `attempts.jsonl` (`MetaWorld` has both).
        learner: acts in them.
        first: what is done in the first decisions, instead of the learner's own; takes a generator.
        draws: whether the policy that is evaluated draws its actions, as it does in training, or takes their mean.
        base: success rate of the policy that was cloned from the demonstrations, where there is one.
        continues: whether learning begins with that policy, or as nobody.
    """

    training: Env
    test: Env
    learner: Learner
    first: Callable[[np.random.Generator], Floats]
    draws: bool = False
    base: float | None = None
    continues: bool = False


class Algorithm(Protocol):
    """`policies.online.{sac,seeded_sac,dsrl}` each have one."""

    @property
    def schedule(self) -> Schedule: ...

    def setup(self, world: World, seed: int, folder: Path) -> Setup: ...


def scene(seed: int, episode: int) -> int:
    """The seed of a training episode."""
    return int(np.random.default_rng([seed, episode]).integers(TEST_SEED))


def success_rate(env: Env, act: Callable[[Floats], Floats], episodes: int) -> float:
    """Share of test episodes in which the simulator says at any moment that the task is done."""
    won = 0
    for number in range(episodes):
        observation, _ = env.reset(seed=TEST_SEED + number)
        over = success = False
        while not over:
            observation, _, terminated, truncated, info = env.step(act(observation))
            success |= bool(info["success"])
            over = terminated or truncated
        won += success
    return won / episodes


class Run:
    """An online run in a folder; made again over the same folder, it goes on.

    Args:
        start: another run, whose networks this one begins with; not with what it remembers.

    Raises:
        UserError: the folder holds another run.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        algorithm: Algorithm,
        world: World,
        seed: int,
        start: Path | None = None,
    ) -> None:
        claim(folder, config)
        self.folder, self.world, self.schedule, self.seed = folder, world, algorithm.schedule, seed
        self._name = type(algorithm).__module__.rpartition(".")[2]
        if start is not None and (start / FLOW).exists() and not (folder / FLOW).exists():
            with whole_file(folder / FLOW) as target:
                shutil.copy(start / FLOW, target)
        self._start = start
        self.setup = algorithm.setup(world, seed, folder)
        self.rng = np.random.default_rng(seed)
        self.step = self.episode = 0
        self.seconds = 0.0
        self.won: list[bool] = []
        judged = world.reward == "learned"
        self.monitor = Monitor(folder, self.setup.training.get_wrapper_attr("instruction")) if judged else None
        self._film = _find_film(self.setup.training)
        self._continue()

    def train(self, tell: Callable[[dict[str, Any]], None] = lambda line: None) -> dict[str, Any]:
        """Go on until the schedule's end. Returns the result, which is also in the folder. The run is over then.

        Raises:
            UserError: a judge or an environment failed. All attempts so far are in the folder; the same run goes on.
        """
        try:
            result = self.folder / "result.json"
            if result.exists():
                found: dict[str, Any] = json.loads(result.read_text())
                return found
            return self._train(tell)
        finally:
            self.setup.training.close()
            self.setup.test.close()

    def _train(self, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        if not (self.folder / "curve.jsonl").exists():
            self._evaluate(tell)
        began = time.monotonic()
        while self.step < self.schedule.steps:
            due = (self.step // self.schedule.evaluate_every + 1) * self.schedule.evaluate_every
            while self.step < min(due, self.schedule.steps):
                try:
                    decisions = self._attempt()
                except UserError:
                    self._save()
                    raise
                if self.step >= self.schedule.first:
                    self.setup.learner.learn(decisions * self.schedule.updates)
            self.seconds += time.monotonic() - began
            self._evaluate(tell)
            began = time.monotonic()
        return self._finish()

    def _attempt(self) -> int:
        """One training episode; how many decisions it took."""
        env, learner = self.setup.training, self.setup.learner
        observation, info = env.reset(seed=scene(self.seed, self.episode))
        began, success, judged, value, over = self.step, False, False, 0.0, False
        while not over:
            random = self.step < self.schedule.first and self._start is None
            action = self.setup.first(self.rng) if random else learner.act(observation, explore=True)
            after, reward, terminated, truncated, info = env.step(action)
            learner.add(observation, action, float(reward), after, terminated, truncated)
            observation, over = after, terminated or truncated
            success |= bool(info["success"])
            judged |= bool(info.get("done_by_vote", False))
            value = max(value, float(info.get("value", 0.0)))
            self.step += 1
        self.won.append(success)
        if env.has_wrapper_attr("attempt"):
            with (self.folder / "attempts.jsonl").open("a") as file:
                file.write(json.dumps(env.get_wrapper_attr("attempt")()) + "\n")
        if self.monitor is not None:
            frames = [] if self._film is None else self._film.frames
            soon = env.get_wrapper_attr("done_soon") if env.has_wrapper_attr("done_soon") else lambda actions: False
            true = success or (judged and soon(_SOON))
            self.monitor.episode(self.episode, self.step, judged, true, value, frames)
        self.episode += 1
        return self.step - began

    def _evaluate(self, tell: Callable[[dict[str, Any]], None]) -> None:
        learner = self.setup.learner
        if self.step == 0 and self.setup.base is not None and self.setup.continues and self._start is None:
            rate = self.setup.base
        else:
            draws = self.setup.draws
            rate = success_rate(self.setup.test, lambda seen: learner.act(seen, explore=draws), self.schedule.episodes)
        line = {
            "step": self.step,
            "episode": self.episode,
            "seconds": round(self.seconds, 1),
            "success_rate": rate,
            "training_success": float(np.mean(self.won)) if self.won else None,
            "diverged": self.monitor is not None and self.monitor.diverged,
        }
        self.won = []
        with (self.folder / "curve.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._save()
        tell(line)

    def _save(self) -> None:
        counters = {"step": self.step, "episode": self.episode, "seconds": self.seconds}
        state = {
            **counters,
            "learner": self.setup.learner.state(),
            "generator": json.dumps(self.rng.bit_generator.state),
            "monitor": None if self.monitor is None else self.monitor.state(),
        }
        with whole_file(self.folder / "state.pt") as target:
            torch.save(state, target)

    def _continue(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            for name in ("curve.jsonl", "monitor.jsonl", "attempts.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
            if self._start is not None:
                self.setup.learner.take(_read_state(self._start / "state.pt")["learner"])
            return
        state = _read_state(path)
        self.setup.learner.restore(state["learner"])
        self.step, self.episode, self.seconds = state["step"], state["episode"], state["seconds"]
        self.rng.bit_generator.state = json.loads(state["generator"])
        if self.monitor is not None:
            self.monitor.restore(state["monitor"], self.episode)
        attempts = self.folder / "attempts.jsonl"
        if attempts.exists():
            keep_lines(attempts, self.episode)
        curve = read_curve(self.folder)
        with whole_file(self.folder / "curve.jsonl") as target:
            target.write_text("".join(json.dumps(line) + "\n" for line in curve if line["step"] <= self.step))

    def _finish(self) -> dict[str, Any]:
        curve = read_curve(self.folder)
        result = {
            "task": self.world.task,
            "algorithm": self._name,
            "reward": self.world.reward,
            "seed": self.seed,
            "success_rate": float(np.mean([line["success_rate"] for line in curve[-_LAST:]])),
            "best": max(line["success_rate"] for line in curve),
            "base": self.setup.base,
            "steps": self.step,
            "episodes": self.episode,
            "seconds": round(self.seconds, 1),
        }
        with whole_file(self.folder / "result.json") as target:
            target.write_text(json.dumps(result, indent=2))
        return result


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run.

    Raises:
        UserError: there are none, or the file is damaged.
    """
    try:
        return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no curve of a run ({error})") from error


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read: delete the run's folder and run again ({error})") from error
    return state


def _find_film(env: Any) -> Film | None:
    while env is not env.unwrapped:
        if isinstance(env, Film):
            return env
        env = env.env
    return None
