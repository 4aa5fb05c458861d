"""Demonstrations as people have them: few, and by a hand that often misses.

The demonstrator is a task's scripted expert that trembles and believes the object some centimetres beside where it is,
another way in every episode. Some of its attempts succeed, many do not, and nothing says which.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium
import numpy as np
from numpy.typing import NDArray

from policies.metaworld import MetaWorld
from rbm.errors import UserError

_CALM = 0.5  # share of the tremble that is kept from one action to the next

_HOPELESS = 20
"""Attempts for each wanted one, after which it is said which kind does not come."""


@dataclass(frozen=True)
class Demonstration:
    """One attempt of T actions.

    Attributes:
        scene: seed of the reset that it began with.
        observations: float32 (T + 1, D).
        actions: float32 (T, A), in [-1, 1].
        rewards: float32 (T,), of the environment that it was shown in.
        terminated: whether that environment ended it.
        success: whether the simulator said at any moment that the task is done.
    """

    scene: int
    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    terminated: bool
    success: bool

    def __len__(self) -> int:
        return len(self.actions)


def demonstrate(
    world: MetaWorld, count: int, seed: int, aside: float, tremble: float = 0.3, successes: int | None = None
) -> list[Demonstration]:
    """Attempts of the scripted expert at a Meta-World task.

    An attempt ends with its environment, or three actions after its success.

    Args:
        count: how many.
        seed: of scenes and mistakes.
        aside: the object is believed at most so far from where it is (metres).
        tremble: standard deviation of what is added to the hand's velocity.
        successes: so many of them succeed, the first that do, and the others do not; none: as it comes.

    Raises:
        UserError: no attempt was asked for, or hardly any attempt ends as wanted.
    """
    if count < 1:
        raise UserError(f"{count} demonstrations teach nothing: ask for one at least")
    if successes is not None and not 0 <= successes <= count:
        raise UserError(f"{successes} of {count} demonstrations cannot succeed: give 0 to {count}")
    found: list[Demonstration] = []
    number = 0
    while len(found) < count:
        if number == _HOPELESS * count:
            won = sum(demo.success for demo in found)
            raise UserError(
                f"{won} successes and {len(found) - won} failures in {number} attempts at {world.task}: ask for "
                "another share, or change aside="
            )
        shown = _attempt(world, np.random.default_rng([seed, number]), aside, tremble)
        number += 1
        if successes is not None:
            alike = sum(demo.success == shown.success for demo in found)
            if alike == (successes if shown.success else count - successes):
                continue
        found.append(shown)
    return found


def replay(env: gymnasium.Env[NDArray[np.float32], NDArray[np.float32]], shown: Demonstration) -> Demonstration:
    """The same actions in the same scene, with the rewards of `env`, until it ends or they do; `success` is kept."""
    observation, _ = env.reset(seed=shown.scene)
    observations, rewards, terminated = [observation], [], False
    for action in shown.actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        rewards.append(float(reward))
        if terminated or truncated:
            break
    return Demonstration(
        shown.scene,
        np.array(observations, np.float32),
        shown.actions[: len(rewards)],
        np.array(rewards, np.float32),
        terminated,
        shown.success,
    )


def _attempt(world: MetaWorld, rng: np.random.Generator, aside: float, tremble: float) -> Demonstration:
    """One attempt. Each has a generator of its own, so that its length changes no other."""
    scene = int(rng.integers(2**31))
    observation, _ = world.reset(seed=scene)
    expert = world.simulator.expert()
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0, aside)
    mistake = np.array([distance * np.cos(angle), distance * np.sin(angle), rng.uniform(0, aside / 2)])
    shaking = np.zeros(3)
    observations, actions, rewards = [observation], [], []
    terminated = truncated = False
    after = 0
    while not (terminated or truncated or after > 2):
        believed = observation.astype(np.float64)
        believed[4:7] += mistake
        action = np.clip(np.asarray(expert.get_action(believed), np.float64), -1, 1)
        shaking = _CALM * shaking + 0.8 * tremble * rng.standard_normal(3)
        action[:3] = np.clip(action[:3] + shaking, -1, 1)
        observation, reward, terminated, truncated, info = world.step(action.astype(np.float32))
        observations.append(observation)
        actions.append(action)
        rewards.append(float(reward))
        after += bool(after or info["success"])
    return Demonstration(
        scene,
        np.array(observations, np.float32),
        np.array(actions, np.float32),
        np.array(rewards, np.float32),
        terminated,
        after > 0,
    )
