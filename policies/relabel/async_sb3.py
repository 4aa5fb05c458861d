"""A replay buffer of stable-baselines3 whose rewards come later, from a reward model in another process.

env = FramesInInfo(gymnasium.make(…, render_mode="rgb_array"))
model = SAC("MlpPolicy", env, replay_buffer_class=LateRewardBuffer,
            replay_buffer_kwargs={"task": "open the drawer", "every": 2})
model.learn(100_000)
model.replay_buffer.save("buffer.npz")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from policies.relabel.async_frames import FIRST, FRAME, INSTRUCTION
from policies.relabel.async_labels import EMPTY, Labels, labeller_of, tasks_of
from policies.relabel.async_storage import check_file, read_arrays, write_arrays
from policies.relabel.labeller import Labeller
from policies.shaping import Shaping
from policies.wrapper import Between, Rules
from rbm.errors import UserError
from rbm.scoring.vote import SuccessVote

try:
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.type_aliases import ReplayBufferSamples
    from stable_baselines3.common.vec_env import VecNormalize
except ImportError as error:
    raise UserError(f"this buffer is one of stable-baselines3 ({error}): pip install 'robot-rbm[rl]'") from error


class LateRewardBuffer(ReplayBuffer):
    """`replay_buffer_class` of SAC, TD3, DDPG: its rewards are written into it as the scores of pictures come.

    Pictures are taken out of `infos`, as `policies.relabel.FramesInInfo` puts them there. What the environment paid
    itself is in `labels.env_rewards`; `rewards` is NaN where no score has come, and such transitions are not drawn.

    Args:
        buffer_size, observation_space, action_space, device, n_envs, optimize_memory_usage, handle_timeout_termination:
            as of `ReplayBuffer`; memory usage cannot be optimised.
        source: where scores come from (`Labeller`): a checkpoint, "http://…"; none: the shipped weights; or a labeller.
        task: the instruction, or one for each environment; none: that of the environment (infos[i]["instruction"]).
        shaping, every, between, vote: as of `policies.wrapper.RewardModelWrapper`, with `terminate=False`.
        ready_share: of the transitions that must have their reward before `sample` draws (it draws only among those
            that have); 1 for runs that shall come out the same again, 0 to wait only where there are none at all.
        save_on_failure: a file (.npz) for the buffer, where the run cannot go on.
        frame_key: the name of the picture in `infos`.
        options: of `Labeller`.

    Raises:
        UserError: a number out of its range. From `add` and `sample`: a frame that is none, and see `Labeller`.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: Any = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        *,
        source: str | os.PathLike[str] | Labeller | None = None,
        task: str | Sequence[str] | None = None,
        shaping: Shaping = Shaping(),  # noqa: B008 (frozen)
        every: int = 1,
        between: Between = "hold",
        vote: SuccessVote | None = None,
        ready_share: float = 0.9,
        save_on_failure: str | os.PathLike[str] | None = None,
        frame_key: str = FRAME,
        **options: Any,
    ) -> None:
        if optimize_memory_usage:
            raise UserError("optimize_memory_usage=True overwrites what waits for a score: leave it off")
        super().__init__(
            buffer_size, observation_space, action_space, device, n_envs, False, handle_timeout_termination
        )
        self._tasks, self._key = tasks_of(task, n_envs), frame_key
        save_to = None if save_on_failure is None else check_file(os.fspath(save_on_failure))
        rules = Rules(shaping, every, between, vote, terminate=False)
        self.labeller, self._owned = labeller_of(source, options)
        self.labels = Labels(self.rewards.reshape(-1), self.labeller, rules, n_envs, ready_share, self._write, save_to)

    def add(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        action: NDArray[Any],
        reward: NDArray[Any],
        done: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Remember a step of each environment; pictures are taken out of `infos`."""
        shown = [
            (info.pop(self._key, None), info.pop(FIRST + self._key, None), info.get(INSTRUCTION)) for info in infos
        ]
        slots = self.pos * self.n_envs + np.arange(self.n_envs)
        super().add(obs, next_obs, action, reward, done, infos)
        self.labels.claim(slots)
        for env, (slot, info, (frame, first, said)) in enumerate(zip(slots.tolist(), infos, shown, strict=True)):
            truncated = bool(done[env]) and bool(info.get("TimeLimit.truncated", False))
            self.labels.add(
                slot,
                env,
                frame=frame,
                first=first,
                task=self._tasks[env] or said,
                env_reward=float(reward[env]),
                terminated=bool(done[env]) and not truncated,
                truncated=truncated,
            )

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Transitions that have their reward, each as likely; waits where too few have."""
        drawn = self.labels.draw(self.size() * self.n_envs, batch_size, np.random.randint)
        rows, envs = np.divmod(drawn, self.n_envs)
        ended = self.dones[rows, envs] * (1 - self.timeouts[rows, envs])
        data = (
            self._normalize_obs(self.observations[rows, envs], env),
            self.actions[rows, envs],
            self._normalize_obs(self.next_observations[rows, envs], env),
            ended.reshape(-1, 1),
            self._normalize_reward(self.rewards[rows, envs].reshape(-1, 1), env),
        )
        return ReplayBufferSamples(*(self.to_torch(array) for array in data))  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.labels.restore(np.full(self.labels.state.shape, EMPTY, np.uint8))

    def save(self, path: str | os.PathLike[str], wait: bool = True) -> None:
        """Write a .npz for `load`; a run goes on from it with new episodes.

        Args:
            wait: for all scores; transitions that have none in the file will never have one.
        """
        check_file(os.fspath(path))
        if wait:
            self.labels.finish()
        self._write(Path(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """What `save` wrote, in place of what is here.

        Raises:
            UserError: there is no such file, or it is of another buffer.
        """
        state = np.full(self.rewards.shape, EMPTY, np.uint8)
        filled, self.pos = read_arrays(os.fspath(path), self._arrays(state))
        self.full = filled == self.buffer_size
        self.labels.restore(state.reshape(-1))

    def close(self) -> None:
        """End the process that scores, unless it was given."""
        if self._owned:
            self.labeller.close()

    def __getstate__(self) -> dict[str, Any]:
        raise UserError("this buffer is not pickled: use replay_buffer.save('buffer.npz') and replay_buffer.load")

    def _write(self, path: Path) -> None:
        write_arrays(path, self._arrays(self.labels.state.reshape(self.rewards.shape)), self.size(), self.pos)

    def _arrays(self, state: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        names = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
        return {name: getattr(self, name) for name in names} | {
            "env_rewards": self.labels.env_rewards.reshape(self.rewards.shape),
            "state": state,
        }
