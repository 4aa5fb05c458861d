"""A replay buffer of plain numpy arrays whose rewards come later, from a reward model in another process.

    buffer = PlainBuffer(100_000, (39,), (4,), task="open the drawer")
    buffer.add(observation, action, reward, next_observation, terminated, truncated, frame, first_frame)
    batch = buffer.sample(256)

`policies.relabel.async_sb3` has the same for stable-baselines3.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from policies.judges import Frame
from policies.relabel.async_labels import EMPTY, Labels, labeller_of, tasks_of
from policies.relabel.async_storage import check_file, read_arrays, write_arrays
from policies.relabel.labeller import Labeller
from policies.shaping import Shaping
from policies.wrapper import Between, Rules
from rbm.errors import UserError
from rbm.scoring.vote import SuccessVote


class Batch(NamedTuple):
    """Transitions, n of them.

    Attributes:
        observations, next_observations: (n, …); actions: (n, …).
        rewards: float32 (n,), of the reward model.
        terminated: bool (n,); an episode that was truncated was not terminated.
    """

    observations: NDArray[Any]
    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    next_observations: NDArray[Any]
    terminated: NDArray[np.bool_]


class PlainBuffer:
    """A ring of transitions; their rewards are written into it as the scores of their pictures come.

    Args:
        capacity: transitions; the oldest make room.
        observation_shape, action_shape: of one transition.
        source: where scores come from (`Labeller`): a checkpoint, "http://…"; none: the shipped weights; or a labeller.
        task: the instruction, or one for each environment; none: given with each episode's first step.
        envs: environments that fill the buffer.
        shaping, every, between, vote: as of `policies.wrapper.RewardModelWrapper`, with `terminate=False`.
        ready_share: of the transitions that must have their reward before `sample` draws (it draws only among those
            that have); 1 for runs that shall come out the same again, 0 to wait only where there are none at all.
        save_on_failure: a file (.npz) for the buffer, where the run cannot go on.
        seed: of `sample`.
        options: of `Labeller`.

    Raises:
        UserError: a number out of its range. From `add` and `sample`: a frame that is none, and see `Labeller`.
    """

    def __init__(
        self,
        capacity: int,
        observation_shape: Sequence[int],
        action_shape: Sequence[int],
        source: str | os.PathLike[str] | Labeller | None = None,
        task: str | Sequence[str] | None = None,
        *,
        envs: int = 1,
        shaping: Shaping = Shaping(),  # noqa: B008 (frozen)
        every: int = 1,
        between: Between = "hold",
        vote: SuccessVote | None = None,
        ready_share: float = 0.9,
        save_on_failure: str | os.PathLike[str] | None = None,
        seed: int | None = None,
        observation_dtype: DTypeLike = np.float32,
        action_dtype: DTypeLike = np.float32,
        **options: Any,
    ) -> None:
        if capacity < 1 or envs < 1:
            raise UserError(f"capacity={capacity} and envs={envs} of a buffer must be at least 1")
        self.capacity = capacity
        self.observations = np.zeros((capacity, *observation_shape), observation_dtype)
        self.next_observations = np.zeros_like(self.observations)
        self.actions = np.zeros((capacity, *action_shape), action_dtype)
        self.rewards = np.full(capacity, np.nan, np.float32)
        self.terminated = np.zeros(capacity, bool)
        self.truncated = np.zeros(capacity, bool)
        self.position, self.full = 0, False
        self.rng = np.random.default_rng(seed)
        self._tasks = tasks_of(task, envs)
        save_to = None if save_on_failure is None else check_file(os.fspath(save_on_failure))
        rules = Rules(shaping, every, between, vote, terminate=False)
        self.labeller, self._owned = labeller_of(source, options)
        self.labels = Labels(self.rewards, self.labeller, rules, envs, ready_share, self._write, save_to)

    def __len__(self) -> int:
        return self.capacity if self.full else self.position

    def add(
        self,
        observation: Any,
        action: Any,
        reward: float,
        next_observation: Any,
        terminated: bool,
        truncated: bool,
        frame: Frame | None = None,
        first_frame: Frame | None = None,
        *,
        task: str | None = None,
        env: int = 0,
    ) -> None:
        """Remember a step.

        Args:
            reward: the environment's own; only `potential` uses it.
            frame: uint8 (H, W, 3) after the step; may be left out where `every` leaves it out.
            first_frame: after the reset, with the first step of an episode.
            task: the instruction of the episode, with `first_frame`, where the buffer has none.
            env: which environment.
        """
        slot = self.position
        self.observations[slot], self.next_observations[slot] = observation, next_observation
        self.actions[slot] = action
        self.terminated[slot], self.truncated[slot] = terminated, truncated
        self.position = (slot + 1) % self.capacity
        self.full |= self.position == 0
        self.labels.claim(np.array([slot]))
        self.labels.add(
            slot,
            env,
            frame=frame,
            first=first_frame,
            task=self._tasks[env] or task,
            env_reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated),
        )

    def sample(self, count: int) -> Batch:
        """Transitions that have their reward, each as likely; waits where too few have."""
        slots = self.labels.draw(len(self), count, self.rng.integers)
        return Batch(
            self.observations[slots],
            self.actions[slots],
            self.rewards[slots],
            self.next_observations[slots],
            self.terminated[slots],
        )

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
        state = np.full(self.capacity, EMPTY, np.uint8)
        filled, self.position = read_arrays(os.fspath(path), self._arrays() | {"state": state})
        self.full = filled == self.capacity
        self.labels.restore(state)

    def close(self) -> None:
        """End the process that scores, unless it was given."""
        if self._owned:
            self.labeller.close()

    def __enter__(self) -> PlainBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, path: Path) -> None:
        write_arrays(path, self._arrays(), len(self), self.position)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        names = ("observations", "next_observations", "actions", "rewards", "terminated", "truncated")
        return {name: getattr(self, name) for name in names} | {
            "env_rewards": self.labels.env_rewards,
            "state": self.labels.state,
        }
