"""A Meta-World task as a gymnasium environment: state observations, a picture on request.

It is the simulator that the corpus is collected with (`dataset_builder.metaworld`): `render()` shows what the shipped
weights were trained on, at a hundred frames a second on one core.
"""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.utils.seeding import np_random
from numpy.typing import NDArray

from dataset_builder.metaworld.simulator import FPS, NEAR_VIEW, Simulator, Snapshot
from dataset_builder.metaworld.tasks import TASKS
from rbm.errors import UserError

Reward = Literal["none", "sparse", "dense"]

DENSE_SCALE = 10.0
"""Meta-World's dense reward is 10 where the task is done."""


def drawn_scene(seed: int) -> int:
    """The simulator's scene after `MetaWorld.reset(seed=seed)`."""
    return _draw(np_random(seed)[0])


def _draw(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


class MetaWorld(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One task; every episode is a scene of its own, drawn from the seed given to `reset`.

    Observation float32 (39,): hand, gripper, object poses, the same a step before, goal (metres). Action float32 (4,),
    −1 to 1: hand velocity and gripper effort, held for `action_repeat` control steps of 1/80 s. `info["success"]` is
    the simulator's own signal: whether the task is done now, or was at any control step of this action.

    Args:
        task: environment name without its version, such as `drawer-open`.
        reward: `sparse` −1, and 0 once the task is done; `dense` the simulator's own, 0 to 1, mean over the control
            steps of the action; `none` 0.
        max_steps: actions after which an episode is truncated.
        action_repeat: control steps for each action.
        size: pixels of a side of the picture.
        camera: `near`, or one of Meta-World's.
        terminate_on_success: whether the simulator's success ends an episode.

    Raises:
        UserError: no such task, no simulator, a number below 1.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (as gymnasium has it)
        "render_modes": ["rgb_array"],
        "render_fps": FPS,
    }

    def __init__(
        self,
        task: str = "drawer-open",
        reward: Reward = "none",
        max_steps: int = 200,
        action_repeat: int = 1,
        size: int = 96,
        camera: str = NEAR_VIEW,
        terminate_on_success: bool = False,
        render_mode: str | None = "rgb_array",
    ) -> None:
        for name, value in (("max_steps", max_steps), ("action_repeat", action_repeat), ("size", size)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if reward not in ("none", "sparse", "dense"):
            raise UserError(f"unknown reward {reward!r} of Meta-World: give none, sparse or dense")
        self.simulator = Simulator(task)
        self.task, self.instruction = task, TASKS[task].text
        self.render_mode = render_mode
        self._reward, self._max_steps, self._repeat = reward, max_steps, action_repeat
        self._size, self._camera, self._terminate = size, camera, terminate_on_success
        self.metadata = {**type(self).metadata, "render_fps": FPS / action_repeat}
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (39,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self._now: Snapshot | None = None
        self._scene = 0
        self._actions: list[NDArray[np.float32]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._scene = _draw(self.np_random)
        self._now = self.simulator.reset(self._scene)
        self._actions = []
        return self._now.obs.astype(np.float32), {"success": self._now.success}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        action = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        if self._now is None:
            raise UserError("no episode is running: call reset() before step()")
        self._actions.append(action)
        dense, success, moments = 0.0, False, 0
        for _ in range(self._repeat):
            self._now = self.simulator.step(action)
            dense += self._now.reward / DENSE_SCALE
            success |= self._now.success
            moments += 1
            if success and self._terminate:
                break
        reward = {"none": 0.0, "sparse": float(success) - 1.0, "dense": dense / moments}[self._reward]
        terminated = success and self._terminate
        truncated = len(self._actions) >= self._max_steps and not terminated
        return self._now.obs.astype(np.float32), reward, terminated, truncated, {"success": success}

    def done_soon(self, actions: int) -> bool:
        """Whether the task is done within so many more actions like the last. The episode is over then."""
        last = self._actions[-1]
        return any(self.step(last)[4]["success"] for _ in range(actions))

    def attempt(self) -> dict[str, Any]:
        """What was done since the reset, in plain values: `rbm build source=metaworld_attempts` shows it again."""
        actions = [[float(value) for value in action] for action in self._actions]
        return {"env": self.task, "scene": self._scene, "action_repeat": self._repeat, "actions": actions}

    def render(self) -> NDArray[np.uint8] | None:
        """What the camera sees now: uint8 (size, size, 3)."""
        if self.render_mode is None:
            return None
        if self._now is None:
            raise UserError("nothing to see before the first reset()")
        return self.simulator.render([self._now.physics], (self._camera,), self._size)[self._camera][0]

    def close(self) -> None:
        self.simulator.close()
