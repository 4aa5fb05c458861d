"""Rewards of a reward model for data sets that are there already: scores of every episode, and what follows from them.

    source = open_data("data/lift.hdf5", task="lift the cube")            # or a folder of Minari's, LeRobot's, a corpus
    relabel(source, Path("data/lift_rm.hdf5"), LocalScores(Scorer.from_pretrained()), Labelling(Shaping("minus_one")))

Moments of an episode of T steps are 0 to T: step t leads from moment t to t+1. A frame shows one of them. Frames are
scored as a live session would score them (`Scorer.score`, every=k); other moments have the value between, or the last;
moments after the last frame, where a format has no picture of the state that the last action led to, have the last.

`minari_data`, `lerobot_data`, `hdf5_data` and `corpus_data` read and write one format each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from policies.relabel.offline_labels import Episode, Flat, Labelling, Labels, joined, label
from policies.relabel.offline_scores import Found, KeptScores, LocalScores, RemoteScores, Scores, Unusable
from policies.transitions import Transitions
from rbm.errors import UserError
from rbm.output import check_target

__all__ = [
    "Data",
    "Episode",
    "Flat",
    "Found",
    "KeptScores",
    "Labelling",
    "Labels",
    "LocalScores",
    "Outcome",
    "RemoteScores",
    "Scores",
    "Transitions",
    "Unusable",
    "choose_camera",
    "label",
    "open_data",
    "relabel",
]

FORMATS = (
    "Minari (a folder, or an id under MINARI_DATASETS_PATH), LeRobot v2.0 to v3.0 (a folder with meta/info.json), HDF5 "
    "in robomimic's layout (a file with data/demo_…), and a corpus (`rbm build`)"
)


class Data(Protocol):
    """Episodes of one data set, by number.

    Attributes:
        kind: name of the format.
        cameras: names of what could be shown.
        transitions: whether `flat` is there for `--transitions`.
    """

    kind: str
    transitions: bool

    @property
    def cameras(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def facts(self) -> dict[str, Any]:
        """What says that two runs have read the same: JSON values."""

    def show(self, camera: str) -> None:
        """Which camera's frames episodes have from now on; one of `cameras`."""

    def name(self, number: int) -> str: ...

    def episode(self, number: int) -> Episode:
        """Raises UserError for one that cannot be read."""

    def target(self, out: str) -> Path:
        """Where what `--out` names will be. Raises UserError where it cannot be."""

    def write(self, target: Path, labels: Mapping[int, Labels], labelling: Labelling) -> None:
        """Write all of it with these rewards, whole or not at all; episodes without labels could not be read."""

    def flat(self, number: int) -> Flat:
        """Raises UserError where an episode has no flat states."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        kind, target: the format, and where the result is.
        episodes, steps, frames: relabelled, and scored frames among all.
        kept: episodes whose scores were there from a run that was stopped.
        done: episodes that the success vote counts as done.
        reward: mean of the new rewards; `env_reward` of the environment's own.
        unreadable: name and reason of each episode that was left out.
    """

    kind: str
    target: str
    episodes: int
    steps: int
    frames: int
    kept: int
    done: int
    reward: float
    env_reward: float
    unreadable: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        named = [{"episode": name, "why": why} for name, why in self.unreadable]
        numbers = {name: getattr(self, name) for name in ("episodes", "steps", "frames", "kept", "done")}
        means = {"mean_reward": round(self.reward, 6), "mean_env_reward": round(self.env_reward, 6)}
        return {"format": self.kind, "out": self.target, **numbers, **means, "unreadable": named}


def open_data(place: str | os.PathLike[str], task: str | None = None) -> Data:
    """The data set that lies there, whichever format it has.

    Args:
        place: a file, a folder, a corpus's URL, or an id of Minari's.
        task: the instruction of every episode; none: what the data says of each.

    Raises:
        UserError: nothing is there, or of no format that is known.
    """
    from policies.relabel.corpus_data import CorpusData
    from policies.relabel.hdf5_data import HDF5Data, is_hdf5
    from policies.relabel.lerobot_data import LeRobotData
    from policies.relabel.minari_data import MinariData, minari_folder
    from rbm.evaluation.lerobot import is_lerobot

    name = os.fspath(place)
    if "://" in name:
        return CorpusData(name, task)
    if is_hdf5(Path(name)):
        return HDF5Data(Path(name), task)
    if is_lerobot(name):
        return LeRobotData(Path(name), task)
    if (folder := minari_folder(name)) is not None:
        return MinariData(folder, task, by_id=not Path(name).exists())
    if not Path(name).exists():
        raise UserError(f"{name}: there is no such file or folder, and no such Minari data set here")
    if Path(name).is_dir():
        try:
            return CorpusData(name, task)
        except UserError as error:
            if "holds no corpus" not in str(error):
                raise
    raise UserError(f"{name} is in no format that can be relabelled: there are {FORMATS}")


def choose_camera(data: Data, where: str, asked: str | None, prefer: Sequence[str] = ()) -> str:
    """The camera of a name, or of the last part of one; without a name one that the model prefers, else the first.

    Raises:
        UserError: there are no pictures, no such camera, or several of that name.
    """
    there = list(data.cameras)
    if not there:
        raise UserError(f"{where} has no pictures (uint8, height × width × 3): a reward model looks at video")
    if asked is None:
        return next((one for name in prefer for one in there if name in (one, _last(one))), there[0])
    found = [one for one in there if one == asked] or [one for one in there if _last(one) == asked]
    if len(found) != 1:
        raise UserError(
            f"{where} has {'no' if not found else 'more than one'} camera {asked!r}; there are {', '.join(there)}"
        )
    return found[0]


def _last(camera: str) -> str:
    return camera.replace("/", ".").rpartition(".")[2]


def relabel(
    data: Data,
    out: str | os.PathLike[str],
    scores: Scores,
    labelling: Labelling,
    *,
    camera: str | None = None,
    where: str = "the data set",
    kept: Path | None = None,
    transitions: Path | None = None,
    tick: Callable[[int, int], None] = lambda episodes, frames: None,
) -> Outcome:
    """Score every episode, and write the data set again with the rewards that follow.

    Args:
        out: a new place, in the format's own way; `Data.target` says where that is.
        camera: whose frames are scored (`choose_camera`).
        where: what the data set is called in messages.
        kept: file for the scores, so that a run that was stopped goes on, and stays for other rewards from the same
            scores; none: a file beside `out` that is deleted at the end.
        transitions: a further file for states, actions and rewards (`policies.transitions.Transitions`).
        tick: is told how many episodes were dealt with, and how many frames were scored for it.

    Raises:
        UserError: no pictures, no instruction, no episode that can be read, or the result cannot be written.
    """
    target = data.target(os.fspath(out))
    if target.exists():
        raise UserError(f"{target} exists already: give another --out, or delete it first")
    if transitions is not None:
        if not data.transitions:
            raise UserError(f"transitions cannot be made of {data.kind} data: leave out --transitions")
        check_target(transitions, (".npz",))
        if transitions.exists():
            raise UserError(f"{transitions} exists already: give another --transitions, or delete it first")
    if not len(data):
        raise UserError(f"{where} has no episode")
    shown = choose_camera(data, where, camera, scores.views)
    data.show(shown)
    asked = {**data.facts(), "camera": shown, "every": labelling.every, "model": scores.identity()}
    store = KeptScores(target.parent / f"{target.name}.scores.jsonl" if kept is None else kept, asked)
    labels: dict[int, Labels] = {}
    flats: dict[int, Flat] = {}
    unreadable: list[tuple[str, str]] = []
    frames = old = 0
    with store:
        for number in range(len(data)):
            new = 0
            try:
                episode = _usable(data.episode(number))
                found = store.get(number, episode.name, len(episode.moments))
                if found is None:
                    task = _instruction(episode)
                    found = scores.of(
                        episode.name, episode.pictures, len(episode.moments), task, labelling.every, shown
                    )
                    found.check(episode.name)
                    store.add(number, episode.name, len(episode.moments), found)
                    new = len(found.at)
                else:
                    old += 1
                if transitions is not None:
                    flats[number] = data.flat(number)
                labels[number] = label(episode, found, labelling)
                frames += len(found.at)
            except Unusable as error:
                unreadable.append((data.name(number), str(error)))
            tick(1, new)
    if not labels:
        name, why = unreadable[0]
        raise UserError(f"{where}: none of {len(unreadable)} episodes could be read; the first, {name}: {why}")
    if transitions is not None:
        joined(flats, labels).save(transitions)
    try:
        data.write(target, labels, labelling)
    except BaseException:
        if transitions is not None:
            transitions.unlink(missing_ok=True)  # both are there, or none
        raise
    if kept is None:
        store.path.unlink(missing_ok=True)
    rewards, own = (np.concatenate([getattr(x, name) for x in labels.values()]) for name in ("rewards", "env_rewards"))
    return Outcome(
        kind=data.kind,
        target=str(target),
        episodes=len(labels),
        steps=len(rewards),
        frames=frames,
        kept=old,
        done=sum(one.done is not None for one in labels.values()),
        reward=float(rewards.mean(dtype=np.float64)),
        env_reward=float(own.mean(dtype=np.float64)),
        unreadable=tuple(unreadable),
    )


def _usable(episode: Episode) -> Episode:
    if episode.steps < 1:
        raise Unusable("it has no step")
    if episode.env_rewards is not None and not np.isfinite(episode.env_rewards).all():
        raise Unusable("its own rewards are not finite numbers")
    return episode


def _instruction(episode: Episode) -> str:
    if episode.task is None or not episode.task.strip():
        raise Unusable("it has no instruction: say with --task what the robot should do")
    return episode.task
