"""Transitions of many episodes in flat arrays: what offline learning reads, what relabelling writes."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.output import whole_file

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Transitions:
    """N transitions of E episodes, episode after episode.

    Attributes:
        observations, next_observations: float32 (N, D).
        actions: float32 (N, A).
        rewards: float32 (N,), what is learned from.
        env_rewards: float32 (N,), the environment's own.
        terminated: bool (N,); a transition that was only cut off (a time limit) is not.
        episode, step: int (N,), which episode, and which of its steps.
        values: float32 (N,), Φ of the state that is reached.
        success: bool (E,), whether the episode did the task.
    """

    observations: Floats
    actions: Floats
    rewards: Floats
    env_rewards: Floats
    next_observations: Floats
    terminated: NDArray[np.bool_]
    episode: NDArray[np.integer]
    step: NDArray[np.integer]
    values: Floats
    success: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.actions)

    def save(self, path: str | os.PathLike[str]) -> None:
        """One .npz file, whole or not at all."""
        target = Path(path)
        if target.suffix != ".npz":
            raise UserError(f"{target}: transitions are kept in a file that ends in .npz")
        with whole_file(target) as temporary:
            np.savez_compressed(temporary, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Transitions:
        """What `save` wrote.

        Raises:
            UserError: there is no such file, or it is none of these.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                found = cls(**{field.name: file[field.name] for field in fields(cls)})
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} holds no transitions: `rbm relabel … --out FILE.npz` makes them ({error})"
            ) from error
        long = {field.name: len(getattr(found, field.name)) for field in fields(cls) if field.name != "success"}
        if len(set(long.values())) != 1:
            raise UserError(f"{path} is damaged: its columns have different lengths {long}")
        return found
