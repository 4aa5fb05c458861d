"""Attempts collected in Meta-World: fifty table-top tasks of a simulated Sawyer arm.

An attempt number `index` of an environment is a pure function of (configuration, seed, environment,
index): the scene, the plan, the noise and the length come from one generator keyed by them. It is
rolled out on state alone and labelled by the simulator; only attempts that a quota still needs are
rendered. A resumed build labels again from index 0, which costs a tenth of a second an attempt, and
so comes to the same choice; it renders only what is not there yet.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset_builder.metaworld.plans import PLANS, Aim, Plan
from dataset_builder.metaworld.rollout import Attempt, Judge, Study
from dataset_builder.metaworld.simulator import FPS, NEAR_VIEW, Simulator, did_you_mean, load_metaworld
from dataset_builder.metaworld.tasks import MT10, TASKS
from dataset_builder.sources.base import Episode, Skipped
from rbm.errors import UserError
from rbm.frames import pick_frames
from rbm.trajectory import MAX_SHORT_SIDE, MAX_STORED_FRAMES, Quality, Task, Trajectory

logger = logging.getLogger(__name__)

ARRAYS = ("action", "state", "env_reward", "success")
"""Side arrays at full rate, row i for moment i: action float32 (L, 4), done at this moment; state float32
(L, 39), the observation; env_reward float32 (L,), the dense reward of this state, earned by action i-1;
success bool (L,)."""

DEFAULT_PLANS: dict[str, float] = {
    "clean": 5,
    **dict.fromkeys(("pause", "detour", "overshoot", "retry", "undo_retry", "clumsy"), 1.0),
    **dict.fromkeys(("stop_part", "leave_part", "near_miss", "drop", "wrong_place", "stutter_part", "late"), 1.2),
    **dict.fromkeys(("undo", "drift"), 2.0),
    **dict.fromkeys(("miss", "push_back", "go_elsewhere"), 0.8),
    **dict.fromkeys(("hover", "freeze"), 0.4),
    **dict.fromkeys(("no_grip", "wrong_object", "random"), 0.5),
    **dict.fromkeys(("clone_early", "clone_middle", "clone_late"), 0.6),
}
"""How often each plan is drawn. Undoing and drifting off are drawn more often than their share, since they often end
as something else (a success that was lost, a suboptimal attempt); freezing near the object never does."""


@dataclass(frozen=True)
class _Slot:
    """What a quota counts: an outcome, successes split into clean and messy, and each into thirds by length.

    Who is cut off early fails more often: without the thirds a trajectory's length would tell its outcome.
    """

    quality: Quality
    messy: bool
    length_class: int

    def __str__(self) -> str:
        kind = ("messy " if self.messy else "clean ") if self.quality is Quality.SUCCESSFUL else ""
        return f"{('short', 'middling', 'long')[self.length_class]} {kind}{self.quality.value}"


@dataclass
class _Ledger:
    """What one walk over a unit still wants, how many attempts it ran, and what it left out for which reason."""

    wanted: dict[_Slot, int]
    tried: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


class Metaworld:
    """The source; see the module's text. One unit is one environment.

    Args:
        envs: environment names (with or without Meta-World's "-v3"), or "all" or "mt10".
        exclude: names to leave out of `envs`.
        per_quality: trajectories an environment, by outcome (0: none).
        messy_share: of the successes, how many are messy (pauses, detours, retries).
        cameras: views to render; "near" is our own, the others are Meta-World's.
        size: pixels a side.
        seed: of the attempts (labels and usual lengths have a seed of their own).
        first_index: the number of the first attempt looked at.
        max_attempts: how many attempts an environment may take to fill the quotas.
        plans: how often each plan is drawn; None for the usual mixture.
        arrays: which of `ARRAYS` ride along.
        suboptimal_from, failure_to: where the dense label's end counts as real or as no progress.
        name: of the source, and first part of every id.
        facts: what else is known of the source.

    Raises:
        UserError: a name, a number or a share that makes no sense; it says which would.
    """

    def __init__(
        self,
        envs: Sequence[str] | str = "mt10",
        per_quality: Mapping[str, int] | None = None,
        messy_share: float = 0.5,
        cameras: Sequence[str] = (NEAR_VIEW,),
        size: int = 96,
        seed: int = 0,
        first_index: int = 0,
        max_attempts: int = 2_000,
        plans: Mapping[str, float] | None = None,
        arrays: Sequence[str] = (),
        suboptimal_from: float = 0.40,
        failure_to: float = 0.27,
        exclude: Sequence[str] = (),
        name: str = "metaworld",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._envs = _chosen(envs, exclude)
        self._judge = Judge(suboptimal_from, failure_to)
        self._quotas = _quotas(per_quality or {"successful": 24, "suboptimal": 16, "failure": 20}, messy_share)
        self._messy_share = float(messy_share)
        self._cameras = tuple(cameras)
        self._size, self._seed = int(size), int(seed)
        self._first, self._most = int(first_index), int(max_attempts)
        self._arrays = tuple(arrays)
        weights = dict(plans or DEFAULT_PLANS)
        for given, known, what in ((weights, PLANS, "plan"), (self._arrays, ARRAYS, "array")):
            for item in given:
                if item not in known:
                    raise UserError(f"unknown {what} {item!r} in source {name!r}: {did_you_mean(item, list(known))}")
        if not self._cameras or len(set(self._cameras)) < len(self._cameras):
            raise UserError(f"source {name!r}: cameras={list(self._cameras)} must name at least one, none twice")
        check_size(name, self._size)
        if min(self._seed, self._first) < 0 or self._most < 1:
            raise UserError(f"source {name!r}: seed and first_index must not be negative, max_attempts at least 1")
        if min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise UserError(f"source {name!r}: plan weights must not be negative, nor all 0")
        self._plan_names = tuple(weights)
        self._plan_odds = np.array(list(weights.values()), np.float64) / sum(weights.values())
        self._facts = dict(facts or {})
        self._study: tuple[str, Study] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_study": None}  # a simulator does not travel to another process

    def source_facts(self) -> dict[str, Any]:
        """The configured facts, and what a reader of the corpus needs to make it again."""
        version = simulator_version()
        return {
            "completion": None,
            **self._facts,
            "metaworld": version,
            "seed": self._seed,
            "cameras": list(self._cameras),
            "suboptimal_from": self._judge.suboptimal_from,
            "failure_to": self._judge.failure_to,
        }

    def tasks(self) -> list[Task]:
        return [TASKS[env] for env in self._envs]

    def units(self) -> list[str]:
        return list(self._envs)

    def attempts(self, unit: str, unwanted: Collection[Aim] = ()) -> Iterator[tuple[int, Attempt]]:
        """Labelled attempts without pixels, from `first_index` on: what quotas choose from.

        Plans whose aim is in `unwanted` (looked at anew for every index) are passed over.
        """
        study = self._studied(unit)
        for index in range(self._first, self._first + self._most):
            attempt = study.attempt(self._seed, index, self._draw_plan, unwanted)
            if attempt is not None:
                yield index, attempt

    def chosen(self, unit: str) -> Iterator[tuple[int, Attempt]]:
        """The attempts that fill the quotas, without pixels, in order of index."""
        return self._choose(unit, _Ledger(dict(self._quotas)))

    def collect(self, unit: str, skip: Container[str]) -> Iterator[Episode | Skipped]:
        """The chosen attempts less those in `skip`, then what was left out and which quotas stayed open."""
        ledger = _Ledger(dict(self._quotas))
        for index, attempt in self._choose(unit, ledger):
            identity = f"{self.name}/{unit}/{self._seed}-{index:05d}"
            if identity not in skip:
                yield self._episode(unit, identity, index, attempt)
        for why, count in sorted(ledger.left_out.items()):
            yield Skipped(f"{self.name}/{unit}: {count} of {ledger.tried} attempts", why)
        for slot, missing in ledger.wanted.items():
            if missing:
                asked = self._quotas[slot]
                message = f"found {asked - missing} of {asked} {slot} in {ledger.tried} attempts"
                logger.warning("%s/%s: %s", self.name, unit, message)
                yield Skipped(f"{self.name}/{unit}: {message}", "quota not filled")

    def _choose(self, unit: str, ledger: _Ledger) -> Iterator[tuple[int, Attempt]]:
        """Walks the attempts until the quotas are full. The last one's scene stays in the simulator for rendering."""
        wanted = ledger.wanted
        unwanted = _full_aims(wanted)
        if not any(wanted.values()):
            return
        for index, attempt in self.attempts(unit, unwanted):
            ledger.tried += 1
            if attempt.quality is None:
                ledger.left_out[attempt.why] += 1
                continue
            # where one third stays empty for long, any length will do rather than none
            slot = self._slot(unit, attempt, wanted, strict=index - self._first < self._most / 2)
            if slot is None:
                continue
            wanted[slot] -= 1
            yield index, attempt
            if not any(wanted.values()):
                return
            unwanted |= _full_aims(wanted)

    def _slot(self, unit: str, attempt: Attempt, wanted: Mapping[_Slot, int], strict: bool) -> _Slot | None:
        assert attempt.quality is not None
        own = self._studied(unit).length_class(attempt)
        classes = [own] if strict else [own, *range(3)]
        slots = [_Slot(attempt.quality, attempt.messy, length) for length in classes]
        return next((slot for slot in slots if wanted[slot]), None)

    def _episode(self, unit: str, identity: str, index: int, attempt: Attempt) -> Episode:
        return film(
            self._studied(unit).simulator,
            attempt,
            pick_frames(len(attempt), MAX_STORED_FRAMES),
            self._cameras,
            self._size,
            identity,
            f"seed {self._seed}, attempt {index}, plan {attempt.plan}",
            {key: _array(attempt, key) for key in self._arrays},
        )

    def _studied(self, unit: str) -> Study:
        if self._study is None or self._study[0] != unit:
            if self._study is not None:
                self._study[1].close()
            self._study = (unit, Study(unit, self._judge, self._messy_share))
        return self._study[1]

    def _draw_plan(self, rng: np.random.Generator) -> Plan:
        return PLANS[self._plan_names[int(rng.choice(len(self._plan_names), p=self._plan_odds))]]


def check_size(name: str, size: int) -> None:
    """Raises UserError for pictures that a corpus does not hold."""
    if not 8 <= size <= MAX_SHORT_SIDE:
        raise UserError(f"source {name!r}: size={size} must be 8 to {MAX_SHORT_SIDE} pixels")


def film(
    simulator: Simulator,
    attempt: Attempt,
    picked: NDArray[np.int64],
    cameras: tuple[str, ...],
    size: int,
    identity: str,
    provenance: str,
    arrays: dict[str, NDArray[Any]],
) -> Episode:
    """An attempt with a quality, at the moments `picked`; its scene must still be in the simulator.

    The source's name is what the identity begins with.
    """
    assert attempt.quality is not None
    frames = simulator.render([attempt.snapshots[i].physics for i in picked], cameras, size)
    trajectory = Trajectory(
        id=identity,
        task=TASKS[simulator.name].text,
        source=identity.partition("/")[0],
        quality=attempt.quality,
        frame_index=picked.astype(np.int32),
        timestamp=(picked / FPS).astype(np.float32),
        fps=FPS,
        height=size,
        width=size,
        views=cameras,
        messy=attempt.messy,
        embodiment="sawyer",
        is_robot=True,
        is_sim=True,
        done_index=attempt.done,
        progress=attempt.progress[picked],
        provenance=f"metaworld {simulator_version()} {simulator.name}-v3, {provenance}",
    )
    return Episode(trajectory, frames, arrays)


def _array(attempt: Attempt, key: str) -> NDArray[Any]:
    if key == "action":
        return attempt.actions
    if key == "state":
        return np.array([now.obs for now in attempt.snapshots], np.float32)
    if key == "env_reward":
        return np.array([now.reward for now in attempt.snapshots], np.float32)
    return np.array([now.success for now in attempt.snapshots], np.bool_)


def _chosen(envs: Sequence[str] | str, exclude: Sequence[str]) -> tuple[str, ...]:
    if isinstance(envs, str):
        groups = {"all": tuple(TASKS), "mt10": MT10}
        chosen = groups.get(envs, (envs,))
    else:
        chosen = tuple(envs)
    chosen, exclude = (tuple(name.removesuffix("-v3") for name in names) for names in (chosen, exclude))
    for name in (*chosen, *exclude):
        if name not in TASKS:
            raise UserError(f"unknown Meta-World environment {name!r}: {did_you_mean(name, list(TASKS))}")
    left = tuple(dict.fromkeys(name for name in chosen if name not in exclude))
    if not left:
        raise UserError('envs and exclude leave no Meta-World environment: name at least one, or "all" or "mt10"')
    return left


def _quotas(per_quality: Mapping[str, int], messy_share: float) -> dict[_Slot, int]:
    for key, count in per_quality.items():
        if key not in set(Quality):
            raise UserError(f"per_quality: unknown outcome {key!r}, use {', '.join(Quality)}")
        if count < 0:
            raise UserError(f"per_quality: {key}={count} must not be negative")
    if not 0 <= messy_share <= 1:
        raise UserError(f"messy_share={messy_share} must be in [0, 1]")
    successes = int(per_quality.get("successful", 0))
    messy = round(messy_share * successes)
    counts = {
        (Quality.SUCCESSFUL, False): successes - messy,
        (Quality.SUCCESSFUL, True): messy,
        (Quality.SUBOPTIMAL, False): int(per_quality.get("suboptimal", 0)),
        (Quality.FAILURE, False): int(per_quality.get("failure", 0)),
    }
    return {
        _Slot(quality, is_messy, third): (count + 2 - third) // 3
        for (quality, is_messy), count in counts.items()
        for third in range(3)
    }


def _full_aims(wanted: Mapping[_Slot, int]) -> set[Aim]:
    """Aims of plans that need not be run any more: nearly all that they give is no longer wanted."""
    open_aims = {_aim(slot) for slot, count in wanted.items() if count}
    if Aim.MESSY in open_aims:
        open_aims.add(Aim.CLEAN)  # an expert that has to try again is messy too, in some tasks the most of it
    return set(Aim) - open_aims


def _aim(slot: _Slot) -> Aim:
    if slot.quality is not Quality.SUCCESSFUL:
        return Aim.NO_SUCCESS
    return Aim.MESSY if slot.messy else Aim.CLEAN


def simulator_version() -> str:
    from importlib.metadata import version

    load_metaworld()
    return version("metaworld")
