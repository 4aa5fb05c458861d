"""One attempt, rolled out on state alone, and how it ended."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataset_builder.metaworld.cloning import ClonedPolicy, clone_policy
from dataset_builder.metaworld.plans import MESSY, PLANS, Aim, Plan, Policy, Robot
from dataset_builder.metaworld.progress import ProgressLabel, fit_progress
from dataset_builder.metaworld.simulator import Simulator, Snapshot
from rbm.errors import UserError
from rbm.trajectory import Quality

TAIL = (3, 25)
"""A success ends this many steps after the simulator first says so (both included)."""

LONGEST = 400
"""Steps after which an attempt is given up; the environments allow 500."""

_CALIBRATION_SEED = 20_260
_DEMONSTRATIONS = 10
_USUAL_ROLLOUTS = 12
_FINAL_STEPS = 5


@dataclass(frozen=True)
class Attempt:
    """A labelled attempt; its scene is still in the simulator if it was the last one rolled out.

    Attributes:
        plan: what was intended.
        snapshots: L moments, the first after the scene settled.
        actions: float32 (L, 4); row i is what was done at moment i (the last was not carried out any more).
        progress: float32 (L,), the dense label.
        quality: how it ended; None where it counts as neither (see `Judge`), and `why` says so.
        done: the first moment of success, for a success.
        messy: a success under any plan but the clean one, or one that took the expert unusually long.
    """

    plan: str
    snapshots: tuple[Snapshot, ...]
    actions: NDArray[np.float32]
    progress: NDArray[np.float32]
    quality: Quality | None
    why: str
    done: int | None
    messy: bool

    def __len__(self) -> int:
        return len(self.snapshots)


@dataclass(frozen=True)
class Judge:
    """From the simulator's signals to an outcome.

    Successful: the success signal is on at the last moment, and was off for at most `flicker` of the
    moments since it first came on. Without any success: the label's mean over the last five moments
    decides, real progress from `suboptimal_from` on, none up to `failure_to`. What lies between, and
    what was a success on the way but is none at the end, is neither and is left out.
    """

    suboptimal_from: float = 0.40
    failure_to: float = 0.27
    flicker: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.failure_to <= self.suboptimal_from <= 1:
            raise UserError(
                f"failure_to={self.failure_to} and suboptimal_from={self.suboptimal_from} must rise within [0, 1]"
            )

    def outcome(self, success: NDArray[np.bool_], progress: NDArray[np.floating]) -> tuple[Quality | None, str]:
        if success.any():
            if not success[-1]:
                return None, "success lost"
            if np.mean(~success[int(np.argmax(success)) :]) > self.flicker:
                return None, "success flickers"
            return Quality.SUCCESSFUL, ""
        final = float(np.mean(progress[-_FINAL_STEPS:]))
        if final >= self.suboptimal_from:
            return Quality.SUBOPTIMAL, ""
        if final <= self.failure_to:
            return Quality.FAILURE, ""
        return None, "between failure and suboptimal"


class Study:
    """One task, studied before it is collected: its label, its usual lengths, its half-trained policies.

    All of it comes from rollouts with a fixed seed, so that it is the same in every process and corpus.

    Raises:
        UserError: the scripted expert hardly ever succeeds.
    """

    def __init__(self, name: str, judge: Judge, messy_share: float = 0.5) -> None:
        self.simulator = Simulator(name)
        self.judge = judge
        self._seed = [_CALIBRATION_SEED, zlib.crc32(name.encode())]
        demos = self._demonstrate()
        if len(demos) < 3:
            raise UserError(f"Meta-World {name!r}: its scripted expert succeeded in {len(demos)} of 30 scenes, need 3")
        self.demonstrations = tuple(demos)
        self.usual = int(np.median([len(snapshots) for snapshots, _ in demos]))
        self.label: ProgressLabel = fit_progress([snapshots for snapshots, _ in demos])
        self._clones: tuple[ClonedPolicy, ...] | None = None
        self.clean_lengths = self._usual_lengths(["clean"], 60)
        self.messy_lengths = self._usual_lengths(MESSY, 60)
        self.lengths = np.concatenate(
            [
                np.resize(self.clean_lengths, 60 - round(60 * messy_share)),
                np.resize(self.messy_lengths, round(60 * messy_share)),
            ]
        )

    def _demonstrate(self) -> list[tuple[list[Snapshot], NDArray[np.float64]]]:
        """Clean successes up to the first success; slow ones, where the expert had to try again, left out."""
        found: list[tuple[list[Snapshot], NDArray[np.float64]]] = []
        for trial in range(30):
            rng = np.random.default_rng([*self._seed, trial])
            expert = self.simulator.expert()
            now = self.simulator.reset(int(rng.integers(2**31)))
            snapshots, actions = [now], []
            while len(snapshots) < LONGEST and not now.success:
                action = np.clip(np.asarray(expert.get_action(now.obs.copy()), np.float64), -1, 1)
                actions.append(action)
                now = self.simulator.step(action.astype(np.float32))
                snapshots.append(now)
            if now.success and len(snapshots) > 8:
                found.append((snapshots, np.array([*actions, actions[-1]])))
            if len(found) == _DEMONSTRATIONS:
                break
        quick = np.percentile([len(snapshots) for snapshots, _ in found], 25) if found else 0
        return [demo for demo in found if len(demo[0]) <= 1.35 * quick]

    def _usual_lengths(self, plans: Sequence[str], count: int) -> NDArray[np.int64]:
        """`count` lengths of successes under `plans`, with random tails; the demonstrations' where none succeeds."""
        rng = np.random.default_rng([*self._seed, 999])
        done: list[int] = []
        for trial in range(_USUAL_ROLLOUTS):
            name = plans[trial % len(plans)]
            attempt = self._run(
                PLANS[name], np.random.default_rng([*self._seed, zlib.crc32(name.encode()), trial]), LONGEST
            )
            if attempt.done is not None:
                done.append(attempt.done)
        done = done or [len(snapshots) - 1 for snapshots, _ in self.demonstrations]
        return np.resize(done, count) + rng.integers(TAIL[0], TAIL[1] + 1, count)

    def clones(self) -> tuple[Policy, ...]:
        """Half-trained policies, made at the first call."""
        if self._clones is None:
            observations = [np.array([now.obs for now in snapshots]) for snapshots, _ in self.demonstrations]
            self._clones = clone_policy(observations, [actions for _, actions in self.demonstrations], self._seed[1])
        return self._clones

    def attempt(
        self,
        seed: int,
        index: int,
        draw_plan: Callable[[np.random.Generator], Plan],
        unwanted: Collection[Aim] = (),
    ) -> Attempt | None:
        """Attempt number `index`: a pure function of the arguments and the task; None if its plan's aim is unwanted."""
        rng = np.random.default_rng([seed, self._seed[1], index])
        plan = draw_plan(rng)
        if plan.aim in unwanted:
            return None
        fitting = self.lengths >= np.quantile(self.lengths, 2 / 3) if plan.long else np.ones(len(self.lengths), bool)
        length = int(rng.choice(self.lengths[fitting]))
        return self._run(plan, rng, length)

    def length_class(self, attempt: Attempt) -> int:
        """0, 1 or 2: short, middling or long for its kind, a third of the usual lengths each.

        Clean and messy successes are measured at their own kind; the others at both together.
        """
        usual = self.lengths
        if attempt.quality is Quality.SUCCESSFUL:
            usual = self.messy_lengths if attempt.messy else self.clean_lengths
        return int(np.searchsorted(np.quantile(usual, [1 / 3, 2 / 3]), len(attempt)))

    def _run(self, plan: Plan, rng: np.random.Generator, length: int) -> Attempt:
        """Steps until `length`, or for a random tail after the first success; who means to succeed gets the time."""
        limit = length if plan.aim is Aim.NO_SUCCESS else LONGEST
        tail = int(rng.integers(TAIL[0], TAIL[1] + 1))
        holds = bool(rng.random() < 0.7)
        start = self.simulator.reset(int(rng.integers(2**31)))
        robot = Robot(self.simulator.expert(), self.clones, rng, self.usual, length, start.obs, start.obs[4:7].copy())
        robot.gain, robot.tremble = rng.uniform(0.75, 1.0), rng.uniform(0.0, 0.15)
        script = plan.script(robot)
        now, done = start, None
        snapshots, actions = [], []
        for step in range(LONGEST):
            robot.obs, robot.progress = now.obs, self.label.at(start, now)
            robot.path.append(now.hand.copy())
            if done is None and now.success:
                done = step
            if done is not None and holds:
                # some experts spoil it going on; the arm's target stays where it is, so what is pressed stays pressed
                action = robot.shaken(np.array([0.0, 0.0, 0.0, robot.effort]))
            else:
                action = next(script)
            robot.efforts.append(float(action[3]))
            snapshots.append(now)
            actions.append(action.astype(np.float32))
            if step + 1 >= (limit if done is None else done + tail + 1):
                break
            now = self.simulator.step(actions[-1])
        keep = len(snapshots) if done is not None else min(len(snapshots), length)
        kept = tuple(snapshots[:keep])
        success = np.array([moment.success for moment in kept])
        progress = self.label.over(kept).astype(np.float32)
        quality, why = self.judge.outcome(success, progress)
        messy = quality is Quality.SUCCESSFUL and (plan.aim is not Aim.CLEAN or (done or 0) > 1.35 * self.usual)
        done = done if quality is Quality.SUCCESSFUL else None
        return Attempt(plan.name, kept, np.array(actions[:keep]), progress, quality, why, done, messy)

    def close(self) -> None:
        self.simulator.close()
