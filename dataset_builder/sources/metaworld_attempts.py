"""What policies did in Meta-World, seen and labelled: the attempts of RL runs, played again in the simulator.

A reward model that trains policies is shown what policies do while they learn, which no scripted plan looks like. A
file of attempts has a JSON line for each: `env`, `scene` (the simulator's seed), `action_repeat` (control steps for
each action), `actions` (N rows of four numbers, −1 to 1). `rbm rl` writes one, `attempts.jsonl`, in a run's folder.

Outcome and progress are the simulator's, as for every other attempt (`dataset_builder.metaworld.rollout.Judge`). A
success ends some moments after it came; if the policy had stopped by then, the hand stays where it is. The stored
frames are the moments between two actions: what the reward model saw. An attempt's id ends in a hash of what was done,
so that runs of the same name in two folders are two.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_builder.metaworld.rollout import TAIL, Attempt, Judge, Study
from dataset_builder.metaworld.simulator import NEAR_VIEW
from dataset_builder.metaworld.tasks import TASKS
from dataset_builder.sources.base import Episode, Skipped
from dataset_builder.sources.metaworld import check_size, film, simulator_version
from rbm.errors import UserError
from rbm.frames import pick_frames
from rbm.trajectory import MAX_STORED_FRAMES, Quality, Task

FILE = "attempts.jsonl"
_KEYS = {"env", "scene", "action_repeat", "actions"}


@dataclass(frozen=True)
class Recorded:
    """One line of a file of attempts: what was done in which scene; actions float32 (N, 4)."""

    env: str
    scene: int
    action_repeat: int
    actions: NDArray[np.float32]

    @property
    def digest(self) -> str:
        """Hexadecimal, of all of it."""
        what = f"{self.env} {self.scene} {self.action_repeat} ".encode() + self.actions.tobytes()
        return hashlib.sha256(what).hexdigest()[:10]


class MetaworldAttempts:
    """The source; see the module's text. One unit is one file.

    Args:
        runs: a folder; every `attempts.jsonl` in it or below is read.
        per_quality: trajectories a file, by outcome, even over the time of the run; null for all there are.
        size: pixels a side.
        suboptimal_from, failure_to: where the dense label's end counts as real or as no progress.
        name: of the source, and first part of every id.
        facts: what else is known of the source.

    Raises:
        UserError: no such file, one that is damaged, or a number that makes no sense.
    """

    def __init__(
        self,
        runs: str,
        per_quality: Mapping[str, int | None] | None = None,
        size: int = 96,
        suboptimal_from: float = 0.40,
        failure_to: float = 0.27,
        name: str = "policies",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._root = Path(runs)
        self._judge = Judge(suboptimal_from, failure_to)
        self._most: dict[Quality, int | None] = dict.fromkeys(Quality)
        for key, count in (per_quality or {}).items():
            if key not in set(Quality) or (count is not None and (type(count) is not int or count < 0)):
                raise UserError(f"per_quality: {key}={count}: give {', '.join(Quality)} a number from 0 on, or null")
            self._most[Quality(key)] = count
        self._size = int(size)
        check_size(name, self._size)
        self._facts = dict(facts or {})
        folders = sorted(path.parent for path in self._root.rglob(FILE))
        self._folders = {
            self._root.resolve().name if it == self._root else it.relative_to(self._root).as_posix(): it
            for it in folders
        }
        if not folders:
            raise UserError(f"there is no {FILE} in {runs}: give the folder of a run of `rbm rl`, or of several")
        self._study: tuple[str, Study] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_study": None}  # a simulator does not travel to another process

    def source_facts(self) -> dict[str, Any]:
        return {
            "completion": None,
            **self._facts,
            "metaworld": simulator_version(),
            "suboptimal_from": self._judge.suboptimal_from,
            "failure_to": self._judge.failure_to,
        }

    def tasks(self) -> list[Task]:
        files = [folder / FILE for folder in self._folders.values()]
        return [TASKS[env] for env in dict.fromkeys(one.env for path in files for one in read_attempts(path))]

    def units(self) -> list[str]:
        return list(self._folders)

    def collect(self, unit: str, skip: Container[str]) -> Iterator[Episode | Skipped]:
        """The chosen attempts less those in `skip`, in their order, then what was left out."""
        recorded = read_attempts(self._folders[unit] / FILE)
        found: dict[Quality, list[int]] = {quality: [] for quality in Quality}
        left_out: Counter[str] = Counter()
        for index, one in enumerate(recorded):
            attempt = self._played(one)
            if attempt.quality is None:
                left_out[attempt.why] += 1
            else:
                found[attempt.quality].append(index)
        for index in sorted(index for quality in Quality for index in _spread(found[quality], self._most[quality])):
            one = recorded[index]
            identity = f"{self.name}/{unit}/{index:05d}-{one.digest}"
            if identity in skip:
                continue
            attempt = self._played(one)
            moments = np.append(np.arange(0, len(attempt) - 1, one.action_repeat), len(attempt) - 1)
            picked = moments[pick_frames(len(moments), MAX_STORED_FRAMES)]
            simulator, provenance = self._studied(one.env).simulator, f"run {unit}, attempt {index}"
            yield film(simulator, attempt, picked, (NEAR_VIEW,), self._size, identity, provenance, {})
        for why, count in sorted(left_out.items()):
            yield Skipped(f"{self.name}/{unit}: {count} of {len(recorded)} attempts", why)

    def _played(self, one: Recorded) -> Attempt:
        """The attempt, again; its scene stays in the simulator."""
        study = self._studied(one.env)
        tail = int(np.random.default_rng(one.scene).integers(TAIL[0], TAIL[1] + 1))
        still = np.array([0, 0, 0, one.actions[-1, 3]], np.float32)
        planned = np.repeat(one.actions, one.action_repeat, axis=0)
        snapshots = [study.simulator.reset(one.scene)]
        actions: list[NDArray[np.float32]] = []
        done = 0 if snapshots[0].success else None
        while len(actions) < (len(planned) if done is None else done + tail):
            actions.append(planned[len(actions)] if len(actions) < len(planned) else still)
            snapshots.append(study.simulator.step(actions[-1]))
            if done is None and snapshots[-1].success:
                done = len(actions)
        progress = study.label.over(snapshots).astype(np.float32)
        quality, why = self._judge.outcome(np.array([now.success for now in snapshots]), progress)
        rows = np.array([*actions, still], np.float32)
        won = quality is Quality.SUCCESSFUL
        # a policy's success is no straight line, as an expert's is
        return Attempt("policy", tuple(snapshots), rows, progress, quality, why, done=done if won else None, messy=won)

    def _studied(self, env: str) -> Study:
        if self._study is None or self._study[0] != env:
            if self._study is not None:
                self._study[1].close()
            self._study = (env, Study(env, self._judge))
        return self._study[1]


def read_attempts(path: Path) -> list[Recorded]:
    """The lines of a file of attempts.

    Raises:
        UserError: one of them is none; it says which and why.
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            found.append(_recorded(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; leave the line out") from error
    return found


def _recorded(line: str) -> Recorded:
    given = json.loads(line)
    if not isinstance(given, dict) or given.keys() != _KEYS:
        raise ValueError(f"an attempt has {', '.join(sorted(_KEYS))} and nothing else")
    if given["env"] not in TASKS:
        raise ValueError(f"unknown Meta-World environment {given['env']!r}")
    for key, least in (("scene", 0), ("action_repeat", 1)):
        if type(given[key]) is not int or not least <= given[key] < 2**31:
            raise ValueError(f"{key}={given[key]!r} must be a whole number from {least} on")
    try:
        actions = np.array(given["actions"], np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"actions are no rows of numbers ({error})") from error
    if actions.ndim != 2 or actions.shape[1] != 4 or not len(actions) or not np.all(np.abs(actions) <= 1):
        raise ValueError(f"actions {actions.shape} must be rows of four numbers from -1 to 1, one at least")
    return Recorded(given["env"], given["scene"], given["action_repeat"], actions)


def _spread(indices: list[int], most: int | None) -> list[int]:
    """At most so many of them, even, first and last among them."""
    if most is None or len(indices) <= most:
        return indices
    return [indices[i] for i in np.linspace(0, len(indices) - 1, most).round().astype(int)] if most else []
