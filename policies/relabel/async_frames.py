"""Pictures on their way from an environment to a buffer: in `info`."""

from __future__ import annotations

from typing import Any

import gymnasium

from policies.judges import Frame
from policies.wrapper import Camera, check_pictures, picture_in
from rbm.errors import UserError

FRAME, FIRST, INSTRUCTION = "frame", "first_", "instruction"


class FramesInInfo(gymnasium.Wrapper[Any, Any, Any, Any], gymnasium.utils.RecordConstructorArgs):
    """Puts what is seen after a step into `info["frame"]`, for buffers that relabel.

    The first step of an episode has the picture after the reset too, as `info["first_frame"]`, and the environment's
    `instruction`, if it has one. A `TimeLimit` belongs inside.

    Args:
        env: with render_mode "rgb_array", or with pictures in its observations.
        every: give a picture after every so many steps, and after the last of an episode; as in the buffer.
        camera: none: what `render()` shows; else as in `policies.wrapper.RewardModelWrapper`.
        key: the name in `info`.

    Raises:
        UserError: no pictures, an unknown camera, `every` below 1.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], *, every: int = 1, camera: Camera = None, key: str = FRAME
    ) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self, every=every, camera=camera, key=key)
        super().__init__(env)
        if every < 1:
            raise UserError(f"every={every} must be at least 1")
        check_pictures(env.observation_space, env.render_mode, camera)
        self._every, self._camera, self._key = every, camera, key
        self._first: dict[str, Any] = {}
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._steps = 0
        self._first = {FIRST + self._key: self._frame(observation)}
        if self.env.has_wrapper_attr(INSTRUCTION):
            self._first[INSTRUCTION] = self.env.get_wrapper_attr(INSTRUCTION)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        first, self._first = self._first, {}
        info = {**info, **first}
        if terminated or truncated or self._steps % self._every == 0:
            info[self._key] = self._frame(observation)
        return observation, reward, terminated, truncated, info

    def _frame(self, observation: Any) -> Frame:
        if self._camera is None:
            return self.env.render()  # type: ignore[return-value]
        return picture_in(observation, self._camera)
