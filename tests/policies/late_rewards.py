"""Helpers of the tests of asynchronous relabelling: real episodes, and what the synchronous wrapper pays for them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import gymnasium
import numpy as np
from picture_env import TASK, SquareEnv

from policies.relabel import FramesInInfo, Labeller, PlainBuffer
from policies.relabel.async_labels import READY
from policies.wrapper import RewardModelWrapper
from rbm.scoring import Scorer

ACTIONS = np.random.default_rng(5).uniform(-1, 1, (200, 2)).astype(np.float32)


class StateOnly(gymnasium.ObservationWrapper):
    """`SquareEnv` with the square's place alone as its observation."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(0.0, 100.0, (2,), np.float32)

    def observation(self, observation: dict[str, Any]) -> np.ndarray:
        return observation["state"]


def play(
    buffer: PlainBuffer,
    lengths: tuple[int, ...],
    steps: int,
    every: int = 1,
    seed: int = 3,
    env: int = 0,
    resets: tuple[int, ...] = (),
) -> None:
    """Fill a buffer; the action's number is the first number of the observation. `resets`: before which steps."""
    world = FramesInInfo(SquareEnv(lengths), every=every)
    world.reset(seed=seed)
    over = False
    for step in range(steps):
        if over or step in resets:
            world.reset()
        _, reward, terminated, truncated, info = world.step(ACTIONS[step])
        over = terminated or truncated
        buffer.add(
            np.array([step, env], np.float32),
            ACTIONS[step],
            float(reward),
            np.array([step + 1, env], np.float32),
            terminated,
            truncated,
            info.get("frame"),
            info.get("first_frame"),
            env=env,
        )


def paid(
    scorer: Scorer, lengths: tuple[int, ...], steps: int, seed: int = 3, resets: tuple[int, ...] = (), **options: Any
) -> np.ndarray:
    """What `RewardModelWrapper` pays for the same: float32 (steps,)."""
    world = RewardModelWrapper(SquareEnv(lengths), scorer, TASK, terminate=False, **options)
    world.reset(seed=seed)
    over, found = False, []
    for step in range(steps):
        if over or step in resets:
            world.reset()
        _, reward, terminated, truncated, _ = world.step(ACTIONS[step])
        over = terminated or truncated
        found.append(reward)
    return np.array(found, np.float32)


def plain(labeller: Labeller | Any, capacity: int = 100, **options: Any) -> PlainBuffer:
    return PlainBuffer(capacity, (2,), (2,), labeller, **{"task": TASK, **options})


def ready(buffer: PlainBuffer) -> list[int]:
    """Steps that have their reward."""
    return sorted(buffer.observations[buffer.labels.state == READY, 0].astype(int).tolist())


@contextmanager
def stopped(labeller: Labeller) -> Iterator[None]:
    """The scoring process does nothing meanwhile."""
    pid = labeller.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
