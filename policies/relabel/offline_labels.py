"""Episodes of recorded data, what they are given, and files to write; `offline` explains the words."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from policies.relabel.offline_scores import Found, Pictures
from policies.shaping import Shaping
from policies.transitions import Transitions
from rbm.errors import UserError
from rbm.scoring.vote import SuccessVote, vote

Floats = NDArray[np.float32]
Between = Literal["interpolate", "hold"]

INSTRUCTIONS = ("task", "instruction", "language_instruction", "mission")
"""Names under which formats without a place of their own for an instruction may keep it."""


@dataclass(frozen=True)
class Episode:
    """One episode of T steps and F frames.

    Attributes:
        name: what it is called in messages.
        task: the instruction; none where the data has none.
        steps: T.
        pictures: gives the frames at rising positions among the F.
        moments: int64 (F,), rising, 0 to T: which moment each frame shows.
        terminated: whether the last step ended it, other than by a limit of time.
        env_rewards: float32 (T,), the environment's own; none where there are none.
        success: whether it did the task; none where the data does not say.
    """

    name: str
    task: str | None
    steps: int
    pictures: Pictures
    moments: NDArray[np.int64]
    terminated: bool = False
    env_rewards: Floats | None = None
    success: bool | None = None


@dataclass(frozen=True)
class Labels:
    """What an episode of T steps was given.

    Attributes:
        rewards: float32 (T,).
        values: float32 (T+1,), Φ of every moment.
        progress, progress_std, success: float32 (T+1,), what the model says of every moment.
        done: the step at which the success vote said for the first time that the task is done; none if it never did.
        env_rewards: float32 (T,), the environment's own, 0 where there are none.
        terminated: as of the episode.
        succeeded: as the data says, or else as the vote does.
    """

    rewards: Floats
    values: Floats
    progress: Floats
    progress_std: Floats
    success: Floats
    done: int | None
    env_rewards: Floats
    terminated: bool
    succeeded: bool

    def __len__(self) -> int:
        return len(self.rewards)


@dataclass(frozen=True)
class Labelling:
    """How rewards follow from the scores of an episode.

    Attributes:
        shaping: the rewards.
        every: score every so-many-th frame, and the last.
        between: the value of moments that are not scored: on the line between two scores, or the last score's.
        vote: k, n, threshold of the success vote over scored frames (`rbm.scoring.SuccessVote`).

    Raises:
        UserError: a setting that makes no sense.
    """

    shaping: Shaping = field(default_factory=Shaping)
    every: int = 1
    between: Between = "interpolate"
    vote: tuple[int, int, float] = (3, 5, 0.5)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"every={self.every}: give 1 to score every frame, 2 for every second, …")
        if self.between not in get_args(Between):
            raise UserError(f"between={self.between!r}: give one of {', '.join(get_args(Between))}")
        SuccessVote(*self.vote)

    def to_json(self) -> dict[str, Any]:
        shaping = {name: getattr(self.shaping, name) for name in Shaping.__dataclass_fields__}
        return {**shaping, "every": self.every, "between": self.between, "vote": list(self.vote)}


@dataclass(frozen=True)
class Flat:
    """The numbers of an episode that a learner from states reads: M = T+1 states, or T where the last is not kept.

    Attributes:
        states: float32 (M, D). actions: float32 (T, A).
    """

    states: Floats
    actions: Floats


def label(episode: Episode, found: Found, labelling: Labelling) -> Labels:
    """Rewards of an episode from the scores of some of its frames.

    Raises:
        UserError: a score is not a finite number.
    """
    found.check(episode.name)
    scored = episode.moments[found.at]
    moments = np.arange(episode.steps + 1)

    def everywhere(scores: Floats) -> Floats:
        if labelling.between == "hold":
            return scores[np.maximum(np.searchsorted(scored, moments, side="right") - 1, 0)]
        return np.interp(moments, scored, scores).astype(np.float32)

    values = everywhere(labelling.shaping.value(found.progress, found.progress_std))
    voted = np.zeros(episode.steps + 1, bool)
    voted[scored[vote(found.success, *labelling.vote)]] = True
    done = voted[1:]  # as the wrappers: at steps after which a frame was scored, and not before the first step
    rewards = labelling.shaping.rewards(
        values, terminated=episode.terminated, done=done, env_rewards=episode.env_rewards
    )
    own = np.zeros(episode.steps, np.float32) if episode.env_rewards is None else episode.env_rewards
    return Labels(
        rewards=rewards,
        values=values,
        progress=everywhere(found.progress),
        progress_std=everywhere(found.progress_std),
        success=everywhere(found.success),
        done=int(done.argmax()) if done.any() else None,
        env_rewards=own,
        terminated=episode.terminated,
        succeeded=bool(voted.any()) if episode.success is None else episode.success,
    )


def joined(flats: Mapping[int, Flat], labels: Mapping[int, Labels]) -> Transitions:
    """Transitions of these episodes, numbered from 0; a last step whose next state is not kept is left out.

    Raises:
        UserError: states or actions of different widths.
    """
    widths = {(one.states.shape[1], one.actions.shape[1]) for one in flats.values()}
    if len(widths) != 1:
        raise UserError(f"states and actions have different widths in different episodes: {sorted(widths)}")
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in Transitions.__dataclass_fields__ if name != "success"}
    success = []
    for place, number in enumerate(labels):
        flat, given = flats[number], labels[number]
        steps = min(len(given), len(flat.states) - 1)
        last = np.zeros(steps, bool)
        if steps == len(given):
            last[-1:] = given.terminated
        for name, column in {
            "observations": flat.states[:steps],
            "actions": flat.actions[:steps],
            "rewards": given.rewards[:steps],
            "env_rewards": given.env_rewards[:steps],
            "next_observations": flat.states[1 : steps + 1],
            "terminated": last,
            "episode": np.full(steps, place, np.int64),
            "step": np.arange(steps, dtype=np.int64),
            "values": given.values[1 : steps + 1],
        }.items():
            parts[name].append(column)
        success.append(given.succeeded)
    return Transitions(**{name: np.concatenate(columns) for name, columns in parts.items()}, success=np.array(success))


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A path beside `target` to make a folder at; it takes its name when the block ends without an error.

    Raises:
        UserError: it cannot be written: the disk is full, the folder is missing or read-only.
    """
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as scratch:
            yield Path(scratch, target.name)
            os.rename(Path(scratch, target.name), target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


def check_folder(target: Path, source: Path) -> Path:
    """The same target.

    Raises:
        UserError: the folder that it is to be made in is missing, or is part of the data set.
    """
    if not target.parent.is_dir():
        raise UserError(f"cannot write {target}: the folder {target.parent} does not exist; make it first")
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{target} lies in the data set itself: give an --out elsewhere")
    return target
