"""A small real environment with pictures: a square that the actions move over a background, other for each episode."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

TASK = "push the square to the right"
HEIGHT, WIDTH, SIDE = 40, 56, 10


class SquareEnv(gymnasium.Env[dict[str, Any], np.ndarray]):
    """Observation: `picture` uint8 (40, 56, 3), `state` float32 (2,) the square's place. Action float32 (2,): its way.

    Args:
        lengths: steps of the episodes, in turn for ever; odd ones are terminated at their end, even ones truncated.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, lengths: tuple[int, ...] = (7, 4), render_mode: str | None = "rgb_array") -> None:
        self.render_mode, self.lengths = render_mode, lengths
        self.instruction = TASK
        self.observation_space = gymnasium.spaces.Dict(
            {
                "picture": gymnasium.spaces.Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8),
                "state": gymnasium.spaces.Box(0.0, 100.0, (2,), np.float32),
            }
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.episodes = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.episodes = 0
        self.length = self.lengths[self.episodes % len(self.lengths)]
        self.episodes += 1
        self.steps = 0
        coarse = self.np_random.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        self.background = coarse.repeat(8, 0).repeat(8, 1)
        self.colours = self.np_random.integers(0, 256, (64, 3), dtype=np.uint8)
        self.place = np.array([15.0, 5.0])
        return self._observation(), {"episode_number": self.episodes}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place = np.clip(self.place + 3 * action + [0, 2], 0, [HEIGHT - SIDE, WIDTH - SIDE])
        self.steps += 1
        over = self.steps >= self.length
        terminated = over and self.length % 2 == 1
        info = {"steps": self.steps, "right": bool(self.place[1] > 20), "name": f"step {self.steps}"}
        return self._observation(), 0.5 * self.steps, terminated, over and not terminated, info

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        return self._picture() if self.render_mode == "rgb_array" else None

    def _picture(self) -> np.ndarray:
        picture = self.background.copy()
        y, x = self.place.astype(int)
        picture[y : y + SIDE, x : x + SIDE] = self.colours[self.steps % 64]
        return picture

    def _observation(self) -> dict[str, Any]:
        return {"picture": self._picture(), "state": self.place.astype(np.float32)}


class Shown(gymnasium.Wrapper):
    """Shows something else: `change(picture, step)` in place of each picture of `render()`."""

    def __init__(self, env: gymnasium.Env, change: Any) -> None:
        super().__init__(env)
        self.change = change

    def render(self) -> Any:
        return self.change(self.env.render(), self.env.unwrapped.steps)
