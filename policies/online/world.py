"""The world that a policy learns in: a Meta-World task, what is called reward in it, and how actions are grouped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import gymnasium
import numpy as np
from numpy.typing import NDArray

from policies.flow import FlowPolicy
from policies.judges import PATIENCE_S
from policies.metaworld import MetaWorld
from policies.monitor import Film
from policies.shaping import Shaping
from policies.wrapper import RewardModelWrapper
from rbm.errors import UserError
from rbm.scoring.vote import SuccessVote

Reward = Literal["learned", "sparse", "dense"]
Env = gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class World:
    """How environments are made.

    Args:
        task: a Meta-World environment, such as `drawer-open`.
        reward: `learned`: the reward model's alone, and its success vote ends an episode; `sparse`: −1 until the
            simulator says that the task is done, which ends the episode; `dense`: the simulator's own.
        max_steps, action_repeat: actions of an episode, control steps (1/80 s) of an action.
        checkpoint: the reward model: a folder, a server's address, none for the shipped weights.
        shaping, vote: of the learned reward; vote is (k, n, threshold) of `SuccessVote`. Not the form `potential`:
            it guides under another reward and is worth nothing alone.
        every: each so many decisions are scored.
        patience_seconds: so long a server may be away.
    """

    task: str = "drawer-open"
    reward: Reward = "learned"
    max_steps: int = 25
    action_repeat: int = 8
    checkpoint: str | None = None
    shaping: Shaping = field(default_factory=lambda: Shaping("minus_one"))
    vote: tuple[int, int, float] = (1, 1, 0.5)
    every: int = 1
    patience_seconds: float = PATIENCE_S

    def __post_init__(self) -> None:
        if self.reward not in ("learned", "sparse", "dense"):
            raise UserError(f"unknown reward {self.reward!r}: give learned, sparse or dense")
        self.shaping.check_alone()
        SuccessVote(*self.vote)  # so that a vote that cannot be held is refused before any work is done

    def training(self, chunk: int = 1) -> Env:
        """An environment whose action is `chunk` actions, end to end, with this reward."""
        if self.reward == "sparse":
            return Chunks(self._plain("sparse", terminate_on_success=True), chunk)
        if self.reward == "dense":
            return Chunks(self._plain("dense"), chunk)
        return RewardModelWrapper(
            Film(Chunks(self._plain("none"), chunk)),
            self.checkpoint,
            shaping=self.shaping,
            every=self.every,
            vote=SuccessVote(*self.vote),
            patience_seconds=self.patience_seconds,
        )

    def test(self, chunk: int = 1) -> Env:
        """The same task without a picture; the simulator's success ends an episode."""
        return Chunks(self._plain("sparse", terminate_on_success=True, render_mode=None), chunk)

    def stage(self, terminate_on_success: bool) -> MetaWorld:
        """The task without reward or picture, for demonstrations: whatever the reward, they are the same."""
        return self._plain("none", terminate_on_success=terminate_on_success, render_mode=None)

    def _plain(self, reward: Any, **options: Any) -> MetaWorld:
        return MetaWorld(self.task, reward, self.max_steps, self.action_repeat, **options)


class Chunks(gymnasium.Wrapper[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]):
    """One decision is `chunk` actions of the environment, end to end; the reward is the mean of theirs."""

    def __init__(self, env: Env, chunk: int) -> None:
        super().__init__(env)
        space = env.action_space
        assert isinstance(space, gymnasium.spaces.Box)
        self._shape = (chunk, *space.shape)
        self.action_space = gymnasium.spaces.Box(
            np.tile(space.low, chunk), np.tile(space.high, chunk), dtype=np.float32
        )

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        rewards, success = [], False
        for part in np.reshape(action, self._shape):
            observation, reward, terminated, truncated, info = self.env.step(part)
            rewards.append(float(reward))
            success |= info["success"]
            if terminated or truncated:
                break
        return observation, float(np.mean(rewards)), terminated, truncated, {**info, "success": success}


class Noise(gymnasium.Wrapper[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]):
    """An action is the noise of a flow policy, `bound` at most, which turns it into a chunk of actions."""

    def __init__(self, env: Env, policy: FlowPolicy, bound: float) -> None:
        super().__init__(env)
        size = policy.chunk * policy.action
        self.action_space = gymnasium.spaces.Box(-bound, bound, (size,), np.float32)
        self._policy = policy
        self._seen = np.zeros(0, np.float32)

    def reset(self, **options: Any) -> tuple[NDArray[np.float32], dict[str, Any]]:
        self._seen, info = self.env.reset(**options)
        return self._seen, info

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        answer = self.env.step(self._policy.act(self._seen, np.asarray(action, np.float32)).ravel())
        self._seen = answer[0]
        return answer  # type: ignore[return-value]
