"""A mixed data set of Meta-World: mostly failures and detours, a few untidy successes, scored by a reward model.

Attempts follow the collector's plans (`dataset_builder.metaworld.plans`): half-way stops, drops, wrong places, things
done and taken back, half-trained clones, noise. An action is held for `repeat` control steps; all attempts are equally
long, whatever happens in them, so that neither length nor end tells how they went. Successes are kept up to
their number, the rest up to theirs. The picture after every action is scored as a live session would score it
(`Scorer.score`, `every=1`), then forgotten.

The same transitions carry three rewards, all from −1 to 0 a step, so that a learner needs no other settings for any:

| reward | of a step s → s′ |
| --- | --- |
| `learned` | `Shaping.rewards` of the scores: with `minus_one`, the default, progress(s′) − 1 |
| `sparse` | 0 if the simulator says that s′ is a success, else −1 |
| `dense` | the simulator's own reward of s′ ÷ 10, − 1 |
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dataset_builder.metaworld.plans import MESSY, PLANS, Plan, Robot
from dataset_builder.metaworld.rollout import Judge, Study
from dataset_builder.metaworld.simulator import NEAR_VIEW, Snapshot
from dataset_builder.metaworld.tasks import TASKS
from policies.metaworld import DENSE_SCALE
from policies.shaping import Shaping
from policies.transitions import Transitions
from rbm.errors import UserError
from rbm.evaluation.bulk import fingerprint
from rbm.output import whole_file

if TYPE_CHECKING:
    from rbm.scoring import Scorer

Floats = NDArray[np.float32]

Reward = Literal["learned", "sparse", "dense", "none"]
REWARDS: tuple[str, ...] = get_args(Reward)

SIZE = 96
"""Pixels of a side of the pictures."""

_PART = 10
"""Attempts after which the work so far is written."""

_HOPELESS = 20
"""Attempts for each wanted one, after which it is said which kind does not come."""

DEFAULT_PLANS: Mapping[str, float] = {
    **dict.fromkeys(MESSY, 0.5),
    **dict.fromkeys(("stop_part", "leave_part", "near_miss", "drop", "wrong_place", "stutter_part", "late"), 1.2),
    **dict.fromkeys(("undo", "drift", "miss", "push_back", "go_elsewhere"), 0.8),
    **dict.fromkeys(("hover", "freeze", "no_grip", "wrong_object", "random"), 0.5),
    **dict.fromkeys(("clone_early", "clone_middle", "clone_late"), 0.6),
}
"""Odds of the plans; the untidy ones that mean to succeed are there for the successes, and fail often enough."""


@dataclass(frozen=True)
class Recipe:
    """What a data set is made of; the same recipe gives the same again.

    Attributes:
        task: environment name.
        successes, failures: attempts that the simulator calls done at some time, and that it never does.
        steps: actions of each attempt.
        repeat: control steps (of 1/80 s) that an action is held for.
        tremble: the most of an attempt's own tremble, added to hand velocities.
        seed: of scenes and plans.
        plans: their odds.

    Raises:
        UserError: an unknown task or plan, a number below 1.
    """

    task: str
    successes: int = 20
    failures: int = 180
    steps: int = 50
    repeat: int = 4
    tremble: float = 0.3
    seed: int = 2
    plans: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_PLANS))

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"unknown Meta-World task {self.task!r}: see `rbm build source=metaworld --cfg`")
        for name, least in (("successes", 0), ("failures", 0), ("steps", 2), ("repeat", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} of a mixed data set must be at least {least}")
        if not self.successes + self.failures:
            raise UserError("a mixed data set needs at least one attempt: set successes or failures")
        unknown = set(self.plans) - set(PLANS)
        if unknown or not self.plans or min(self.plans.values()) < 0 or sum(self.plans.values()) <= 0:
            raise UserError(f"plans of a mixed data set are odds of {', '.join(PLANS)}; got {dict(self.plans)}")


@dataclass(frozen=True)
class Mixed:
    """E attempts of T steps each.

    Attributes:
        observations: float32 (E, T+1, 39).
        actions: float32 (E, T, 4).
        dense: float32 (E, T), the simulator's own reward after each step, mean over its control steps, 0 to 1.
        success: bool (E, T), whether it said "done" at any control step of this action.
        progress, progress_std, done: float32 (E, T+1), what the reward model said; `done` is its success probability.
        plan: (E,), names of the plans.
    """

    observations: Floats
    actions: Floats
    dense: Floats
    success: NDArray[np.bool_]
    progress: Floats
    progress_std: Floats
    done: Floats
    plan: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.observations)

    def transitions(self, reward: Reward = "learned", shaping: Shaping | None = None) -> Transitions:
        """The data with one of the rewards above; `none` gives 0 everywhere. No step is terminal: time runs out.

        Raises:
            UserError: an unknown reward, or a shaping that is none by itself.
        """
        shaping = shaping or Shaping(form="minus_one")
        values = shaping.value(self.progress, self.progress_std)
        if reward == "learned":
            shaping.check_alone()
            rewards = np.stack([shaping.rewards(v, terminated=False) for v in values])
        elif reward == "sparse":
            rewards = self.success.astype(np.float32) - 1
        elif reward == "dense":
            rewards = self.dense - 1
        elif reward == "none":
            rewards = np.zeros_like(self.dense)
        else:
            raise UserError(f"unknown reward {reward!r} of the mixed data set: give one of {', '.join(REWARDS)}")
        episodes, steps = self.dense.shape
        return Transitions(
            observations=self.observations[:, :-1].reshape(-1, self.observations.shape[-1]),
            actions=self.actions.reshape(-1, self.actions.shape[-1]),
            rewards=rewards.reshape(-1).astype(np.float32),
            env_rewards=self.dense.reshape(-1),
            next_observations=self.observations[:, 1:].reshape(-1, self.observations.shape[-1]),
            terminated=np.zeros(episodes * steps, bool),
            episode=np.repeat(np.arange(episodes, dtype=np.int64), steps),
            step=np.tile(np.arange(steps, dtype=np.int64), episodes),
            values=values[:, 1:].reshape(-1),
            success=np.asarray(self.success.any(1), bool),
        )

    def take(self, successes: int | None) -> Mixed:
        """All failures, and the first `successes` of the successes; none for all.

        Raises:
            UserError: there are not so many.
        """
        if successes is None:
            return self
        won = self.success.any(1)
        if not 0 <= successes <= won.sum():
            raise UserError(f"the mixed data set has {won.sum()} successes, not {successes}")
        rows = np.flatnonzero(~won | (np.cumsum(won) <= successes))
        return Mixed(*(getattr(self, f.name)[rows] for f in fields(self)))

    def save(self, path: Path) -> None:
        with whole_file(path) as temporary:
            np.savez_compressed(temporary, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path) -> Mixed:
        """Raises UserError for a file that is none of ours."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(**{f.name: stored[f.name] for f in fields(cls)})
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} holds no mixed data set that can be read: {error}; delete it") from error


def make_mixed(
    recipe: Recipe, folder: Path, scorer: Scorer | None = None, say: Callable[[str], None] = lambda text: None
) -> Mixed:
    """The data set of a recipe and a reward model: read from `folder`, or made there; a stopped build goes on.

    Args:
        recipe: what it is made of.
        folder: where data sets are kept; made if it is not there.
        scorer: the reward model, frozen; none for the shipped weights.
        say: is told how far it has come.

    Raises:
        UserError: the plans hardly ever end as wanted, the model cannot read the task's instruction.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if scorer is None:
        from rbm.scoring import Scorer

        scorer = Scorer.from_pretrained()
    text = json.dumps({**asdict(recipe), "weights": fingerprint(scorer.model)}, sort_keys=True)
    name = f"{recipe.task}-{zlib.crc32(text.encode()):08x}"
    whole = folder / f"{name}.npz"
    if whole.exists():
        return Mixed.load(whole)
    found = _continue(recipe, folder / f"{name}.parts", scorer, say)
    found.save(whole)
    with whole_file(folder / f"{name}.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    for part in sorted((folder / f"{name}.parts").glob("*.npz")):
        part.unlink()
    with suppress(OSError):  # another process still looks into it
        (folder / f"{name}.parts").rmdir()
    return found


def _continue(recipe: Recipe, parts: Path, scorer: Scorer, say: Callable[[str], None]) -> Mixed:
    parts.mkdir(exist_ok=True)
    done = sorted(parts.glob("*.npz"))
    kept = [Mixed.load(path) for path in done]
    first = int(done[-1].stem.split("-")[1]) if done else 0
    counts = np.bincount([int(any(steps)) for part in kept for steps in part.success], minlength=2)
    wanted = np.array([recipe.failures, recipe.successes])
    study = Study(recipe.task, Judge())
    waiting: list[Mixed] = []
    try:
        for index in count(first):
            if (counts >= wanted).all():
                break
            if index > _HOPELESS * wanted.sum():
                missing = "successes" if counts[1] < wanted[1] else "failures"
                raise UserError(
                    f"{recipe.task}: {counts[0]} failures and {counts[1]} successes in {index} attempts: "
                    f"ask for fewer {missing}"
                )
            moments, actions, dense, success, plan = roll_out(study, recipe, index)
            kind = int(success.any())
            if counts[kind] >= wanted[kind]:
                continue
            counts[kind] += 1
            frames = study.simulator.render([moment.physics for moment in moments], (NEAR_VIEW,), SIZE)[NEAR_VIEW]
            scores = scorer.score(frames, TASKS[recipe.task].text, every=1)
            waiting.append(
                Mixed(
                    np.array([[moment.obs for moment in moments]], np.float32),
                    actions[None],
                    dense[None],
                    success[None],
                    scores.progress[None],
                    scores.progress_std[None],
                    scores.success[None],
                    np.array([plan]),
                )
            )
            if len(waiting) == _PART:
                kept.append(_joined(waiting))
                kept[-1].save(parts / f"{len(kept):05d}-{index + 1:07d}.npz")
                waiting = []
                say(f"{recipe.task}: {counts.sum()} of {wanted.sum()} attempts, {counts[1]} successes")
    finally:
        study.close()
    return _joined([*kept, *waiting])


def _joined(parts: list[Mixed]) -> Mixed:
    return Mixed(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Mixed)))


def roll_out(study: Study, recipe: Recipe, index: int) -> tuple[list[Snapshot], Floats, Floats, NDArray[np.bool_], str]:
    """Attempt number `index`, a function of its arguments alone; its scene is in the simulator afterwards.

    Returns:
        T+1 moments, actions (T, 4), dense rewards (T,), success (T,), the plan's name.
    """
    rng = np.random.default_rng([recipe.seed, zlib.crc32(recipe.task.encode()), index])
    odds = np.array(list(recipe.plans.values()), np.float64)
    plan: Plan = PLANS[str(rng.choice(list(recipe.plans), p=odds / odds.sum()))]
    simulator = study.simulator
    start = now = simulator.reset(int(rng.integers(2**31)))
    usual = max(study.usual // recipe.repeat, 4)
    robot = Robot(simulator.expert(), study.clones, rng, usual, recipe.steps, start.obs, start.obs[4:7].copy())
    robot.gain, robot.tremble = rng.uniform(0.6, 1.0), rng.uniform(0.0, recipe.tremble)
    script, holds = plan.script(robot), bool(rng.random() < 0.7)
    moments, actions, dense = [start], [], []
    success: list[bool] = []
    for _ in range(recipe.steps):
        robot.obs, robot.progress = now.obs, study.label.at(start, now)
        robot.path.append(now.hand.copy())
        still = holds and any(success)  # some experts spoil what they did if they go on
        action = robot.shaken(np.array([0.0, 0.0, 0.0, robot.effort])) if still else next(script)
        robot.efforts.append(float(action[3]))
        actions.append(np.clip(action, -1, 1).astype(np.float32))
        states = []
        for _ in range(recipe.repeat):
            now = simulator.step(actions[-1])
            states.append(now)
        moments.append(now)
        dense.append(np.mean([state.reward for state in states]) / DENSE_SCALE)
        success.append(any(state.success for state in states))
    return moments, np.array(actions), np.array(dense, np.float32), np.array(success), plan.name
