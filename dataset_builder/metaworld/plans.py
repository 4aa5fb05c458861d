"""What an attempt tries: expert, messy expert, half an attempt, a failed one, random or half-trained.

A plan is a generator of actions. It steers by a live view of the attempt (`Robot`), mostly with the
scripted expert, and departs from it at moments chosen by *progress* rather than by time, so that "stops
half way" means the same in a task of forty steps and one of two hundred. A plan is only an intent: how
the attempt ended is read from the simulator afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Action = NDArray[np.float64]
Script = Generator[Action, None, None]
OPEN, CLOSED = -1.0, 1.0


class Policy(Protocol):
    def get_action(self, obs: NDArray[np.float64]) -> NDArray[np.floating]: ...


@dataclass
class Robot:
    """The live view that a plan steers by; the rollout updates it before each action.

    Attributes:
        expert: the task's scripted expert.
        clones: half-trained policies, least trained first.
        rng: the attempt's own generator.
        usual: steps a clean expert needs for this task.
        length: steps after which an attempt that is not meant to succeed ends.
        obs: float64 (39,), the present observation.
        first_object: float64 (3,), where the object stood at the start.
        progress: the present dense label.
        path: hand positions (3,) so far; efforts: gripper efforts so far.
    """

    expert: Policy
    clones: Callable[[], tuple[Policy, ...]]
    rng: np.random.Generator
    usual: int
    length: int
    obs: NDArray[np.float64]
    first_object: NDArray[np.float64]
    progress: float = 0.0
    path: list[NDArray[np.float64]] = field(default_factory=list)
    efforts: list[float] = field(default_factory=list)
    gain: float = 1.0
    tremble: float = 0.0
    _noise: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))

    @property
    def hand(self) -> NDArray[np.float64]:
        return self.obs[:3].copy()

    @property
    def object(self) -> NDArray[np.float64]:
        return self.obs[4:7].copy()

    @property
    def effort(self) -> float:
        return self.efforts[-1] if self.efforts else OPEN

    def asked(self, policy: Policy, object_shift: NDArray[np.float64], goal_shift: NDArray[np.float64]) -> Action:
        """What `policy` does when it believes object and goal to stand elsewhere (metres)."""
        believed = self.obs.copy()
        believed[4:7] += object_shift
        believed[36:39] += goal_shift
        return self.shaken(np.clip(np.asarray(policy.get_action(believed), np.float64), -1, 1))

    def shaken(self, action: Action) -> Action:
        """The attempt's own speed and tremble (correlated over about five steps) on a hand velocity."""
        self._noise = 0.8 * self._noise + 0.6 * self.tremble * self.rng.standard_normal(3)
        action = action.copy()
        action[:3] = np.clip(self.gain * action[:3] + self._noise, -1, 1)
        return action

    def towards(self, point: NDArray[np.float64], effort: float, speed: float = 1.0) -> Action:
        """One step of the hand towards a point (metres)."""
        velocity = np.clip(12.0 * (point - self.hand), -speed, speed)
        return self.shaken(np.array([*velocity, effort]))


class Aim(StrEnum):
    """What a plan is meant to end in; how it does end is another matter."""

    CLEAN = "clean success"
    MESSY = "messy success"
    NO_SUCCESS = "no success"


@dataclass(frozen=True)
class Plan:
    """A named intent. `long`: it does a thing and takes it back, and so gets one of the task's longer lengths."""

    name: str
    script: Callable[[Robot], Script]
    aim: Aim
    long: bool = False


# --- pieces ---------------------------------------------------------------------------------------

_NOWHERE = np.zeros(3)


def _expert(
    robot: Robot,
    until: Callable[[], bool] = lambda: False,
    steps: int = 1_000,
    object_shift: NDArray[np.float64] = _NOWHERE,
    goal_shift: NDArray[np.float64] = _NOWHERE,
    effort: float | None = None,
) -> Script:
    for _ in range(steps):
        if until():
            return
        action = robot.asked(robot.expert, object_shift, goal_shift)
        if effort is not None:
            action[3] = effort
        yield action


def _hold(robot: Robot, steps: int = 1_000, sway: float = 0.0) -> Script:
    """Stays where the hand is now; `sway` metres of slow wandering."""
    home, effort = robot.hand, robot.effort
    offset = np.zeros(3)
    for _ in range(steps):
        offset = 0.95 * offset + 0.3 * sway * robot.rng.standard_normal(3)
        yield robot.towards(home + offset, effort)


def _go(robot: Robot, point: NDArray[np.float64], steps: int, effort: float | None = None) -> Script:
    held = robot.effort if effort is None else effort
    speed = robot.rng.uniform(0.5, 1.0)
    for _ in range(steps):
        if np.linalg.norm(point - robot.hand) < 0.015:
            return
        yield robot.towards(point, held, speed)


def _back(robot: Robot, distance: float, effort: float | None = None) -> Script:
    """Leaves towards where the hand came from, and up."""
    earlier = robot.path[max(len(robot.path) - 25, 0)]
    away = earlier - robot.hand + np.array([0.0, -0.02, 0.05])
    point = robot.hand + distance * away / max(float(np.linalg.norm(away)), 1e-6)
    return _go(robot, point, steps=40, effort=effort)


def _rewind_path(robot: Robot, steps: int) -> Script:
    """Goes the hand's own way back with the gripper as it is: what was moved is moved back where it can be."""
    effort = robot.effort
    way = [point.copy() for point in robot.path[max(len(robot.path) - steps, 0) :]]
    for point in reversed(way):
        yield robot.towards(point, effort)


def _wander(
    robot: Robot, centre: Callable[[], NDArray[np.float64]], radius: float, effort: float | None = None
) -> Script:
    while True:
        point = centre() + robot.rng.uniform(-radius, radius, 3) + np.array([0.0, 0.0, 0.5 * radius])
        grip = float(robot.rng.choice([OPEN, CLOSED])) if effort is None else effort
        yield from _go(robot, point, steps=int(robot.rng.integers(10, 30)), effort=grip)
        yield from _hold(robot, steps=int(robot.rng.integers(1, 8)))


def _aside(robot: Robot, low: float, high: float) -> NDArray[np.float64]:
    """A shift on the table (and a little in height) of low to high metres."""
    angle = robot.rng.uniform(0, 2 * np.pi)
    size = robot.rng.uniform(low, high)
    return np.array([size * np.cos(angle), size * np.sin(angle), robot.rng.uniform(0.0, 0.5 * low)])


def _at(robot: Robot, level: float) -> Callable[[], bool]:
    return lambda: robot.progress >= level


def _after(robot: Robot, step: float) -> Callable[[], bool]:
    return lambda: len(robot.path) > step


# --- successes, clean and messy -------------------------------------------------------------------


def clean(robot: Robot) -> Script:
    yield from _expert(robot)


def pause(robot: Robot) -> Script:
    for when in np.sort(robot.rng.uniform(0.1, 0.9, int(robot.rng.integers(1, 4)))):
        yield from _expert(robot, _after(robot, when * robot.usual))
        yield from _hold(robot, int(robot.rng.integers(6, 22)))
    yield from _expert(robot)


def detour(robot: Robot) -> Script:
    yield from _expert(robot, _after(robot, robot.rng.uniform(0.1, 0.8) * robot.usual))
    for _ in range(int(robot.rng.integers(1, 3))):
        point = robot.hand + robot.rng.uniform(-0.14, 0.14, 3) + np.array([0.0, 0.0, 0.06])
        yield from _go(robot, point, int(robot.rng.integers(10, 25)))
    yield from _expert(robot)


def overshoot(robot: Robot) -> Script:
    yield from _expert(robot, _after(robot, robot.rng.uniform(0.15, 0.6) * robot.usual))
    shift = _aside(robot, 0.04, 0.09)
    yield from _expert(robot, steps=int(robot.rng.integers(12, 30)), object_shift=shift)
    yield from _expert(robot)


def retry(robot: Robot) -> Script:
    """Lets go half way (drops what it holds), withdraws, and tries again."""
    for _ in range(int(robot.rng.integers(1, 3))):
        yield from _expert(robot, _at(robot, robot.rng.uniform(0.25, 0.8)), steps=2 * robot.usual)
        yield from _hold_open(robot, int(robot.rng.integers(2, 8)))
        yield from _back(robot, robot.rng.uniform(0.07, 0.15), effort=OPEN)
        yield from _hold(robot, int(robot.rng.integers(0, 8)))
    yield from _expert(robot)


def undo_retry(robot: Robot) -> Script:
    """Takes half of it back, then does it after all."""
    yield from _expert(robot, _at(robot, robot.rng.uniform(0.35, 0.85)), steps=2 * robot.usual)
    yield from _rewind_path(robot, int(robot.rng.integers(10, 35)))
    yield from _expert(robot)


def clumsy(robot: Robot) -> Script:
    robot.gain, robot.tremble = robot.rng.uniform(0.5, 0.9), robot.rng.uniform(0.3, 0.6)
    yield from _expert(robot)


# --- real progress, no success --------------------------------------------------------------------


def stop_part(robot: Robot) -> Script:
    """Stops on the way; early enough that what coasts on (a window) does not arrive by itself."""
    yield from _expert(robot, _at(robot, robot.rng.uniform(0.26, 0.85)))
    yield from _hold(robot, sway=robot.rng.uniform(0.0, 0.012))


def leave_part(robot: Robot) -> Script:
    """Lets go part-way, backs off, and stays away."""
    yield from _expert(robot, _at(robot, robot.rng.uniform(0.27, 0.9)))
    yield from _hold_open(robot, int(robot.rng.integers(2, 6)))
    yield from _back(robot, robot.rng.uniform(0.05, 0.15), effort=OPEN)
    yield from _hold(robot, sway=robot.rng.uniform(0.0, 0.01))


def near_miss(robot: Robot) -> Script:
    """Almost there, then a little back."""
    yield from _expert(robot, _at(robot, robot.rng.uniform(0.75, 0.95)))
    yield from _rewind_path(robot, int(robot.rng.integers(2, 8)))
    yield from _hold(robot, sway=robot.rng.uniform(0.0, 0.01))


def drop(robot: Robot) -> Script:
    """Opens the gripper on the way and goes on as if nothing had happened."""
    yield from _expert(robot, _at(robot, robot.rng.uniform(0.4, 0.9)))
    yield from _expert(robot, effort=OPEN, steps=int(robot.rng.integers(8, 30)))
    yield from _hold(robot, sway=0.01)


def wrong_place(robot: Robot) -> Script:
    """Takes the object to a place beside the goal."""
    yield from _expert(robot, goal_shift=_aside(robot, 0.09, 0.2), object_shift=_aside(robot, 0.0, 0.015))


def stutter_part(robot: Robot) -> Script:
    """Part of the way, wanders about, comes back to it, and is not done when time is up."""
    yield from _expert(robot, _at(robot, robot.rng.uniform(0.27, 0.8)))
    yield from _rewind_path(robot, int(robot.rng.integers(3, 12)))
    yield from _hold(robot, int(robot.rng.integers(5, 20)), sway=0.02)
    yield from _wander(robot, lambda: robot.hand, 0.04, effort=robot.effort)


def late(robot: Robot) -> Script:
    """Loses its time on the way to the object and runs out of it while it is at work."""
    needed = robot.rng.uniform(0.85, 1.05) * robot.usual / robot.gain
    spare = max(robot.length - needed, 0.0)
    yield from _expert(robot, _after(robot, robot.rng.uniform(0.05, 0.6) * robot.usual))
    start, place = len(robot.path), robot.hand
    idle = _hold(robot, sway=0.01) if robot.rng.random() < 0.4 else _wander(robot, lambda: place, 0.07, robot.effort)
    while len(robot.path) - start < spare:
        yield next(idle)
    yield from _expert(robot)


# --- no lasting progress --------------------------------------------------------------------------


def miss(robot: Robot) -> Script:
    """Everything as it should be, some centimetres beside the object."""
    yield from _expert(robot, object_shift=_aside(robot, 0.05, 0.12))


def no_grip(robot: Robot) -> Script:
    yield from _expert(robot, effort=OPEN, object_shift=_aside(robot, 0.0, 0.02))


def undo(robot: Robot) -> Script:
    """Does part of it, or nearly all, and takes it back."""
    yield from _expert(robot, _at(robot, robot.rng.uniform(0.3, 0.92)))
    yield from _hold(robot, int(robot.rng.integers(0, 6)))
    yield from _rewind_path(robot, int(robot.rng.integers(35, 120)))
    yield from _hold_open(robot, 5)
    yield from _hold(robot, sway=0.01)


def push_back(robot: Robot) -> Script:
    """Moves the object part of the way, goes round it, and pushes it back from the far side."""
    yield from _expert(robot, _at(robot, robot.rng.uniform(0.35, 0.92)))
    height = max(float((robot.hand - robot.object)[2]), -0.02)
    yield from _hold_open(robot, 3)
    way = robot.first_object - robot.object
    way /= max(float(np.linalg.norm(way)), 1e-6)
    far = robot.object - robot.rng.uniform(0.07, 0.11) * way + np.array([0.0, 0.0, height])
    yield from _go(robot, robot.hand + np.array([0.0, 0.0, 0.12]), 25, effort=CLOSED)
    yield from _go(robot, far + np.array([0.0, 0.0, 0.12]), 40, effort=CLOSED)
    yield from _go(robot, far, 30, effort=CLOSED)
    yield from _go(robot, robot.first_object + 0.03 * way + np.array([0.0, 0.0, height]), 80, effort=CLOSED)
    yield from _hold(robot, sway=0.01)


def freeze(robot: Robot) -> Script:
    yield from _expert(robot, _at(robot, robot.rng.uniform(0.05, 0.24)), steps=int(0.7 * robot.usual))
    yield from _hold(robot, sway=robot.rng.uniform(0.0, 0.015))


def drift(robot: Robot) -> Script:
    yield from _expert(robot, _at(robot, robot.rng.uniform(0.02, 0.22)), steps=int(0.6 * robot.usual))
    yield from _babble(robot, robot.rng.uniform(0.3, 0.8))


def hover(robot: Robot) -> Script:
    """Comes close and fumbles around the object without moving it."""
    yield from _expert(robot, _at(robot, robot.rng.uniform(0.1, 0.22)), steps=int(0.7 * robot.usual))
    offset = robot.hand - robot.object + np.array([0.0, 0.0, 0.03])
    yield from _wander(robot, lambda: robot.object + offset, robot.rng.uniform(0.02, 0.07))


def wrong_object(robot: Robot) -> Script:
    """Acts with purpose somewhere else on the table."""
    far = _aside(robot, 0.12, 0.25)
    yield from _expert(robot, object_shift=far, goal_shift=far)


def go_elsewhere(robot: Robot) -> Script:
    """Comes near, then leaves the object for another place."""
    yield from _expert(robot, _at(robot, robot.rng.uniform(0.1, 0.22)), steps=int(0.7 * robot.usual))
    place = np.array([robot.rng.uniform(-0.3, 0.3), robot.rng.uniform(0.45, 0.8), robot.rng.uniform(0.08, 0.35)])
    yield from _go(robot, place, 80)
    yield from _wander(robot, lambda: place, 0.05)


def random(robot: Robot) -> Script:
    yield from _babble(robot, robot.rng.uniform(0.5, 1.2))


# --- policies that learn --------------------------------------------------------------------------


def _clone(stage: int) -> Callable[[Robot], Script]:
    def script(robot: Robot) -> Script:
        policy = robot.clones()[stage]
        while True:
            yield robot.asked(policy, _NOWHERE, _NOWHERE)

    return script


def _hold_open(robot: Robot, steps: int) -> Script:
    home = robot.hand
    for _ in range(steps):
        yield robot.towards(home, OPEN)


def _babble(robot: Robot, size: float) -> Script:
    """Smooth random motion, the gripper opening and closing now and then."""
    velocity, effort = np.zeros(3), robot.effort
    while True:
        velocity = 0.93 * velocity + 0.37 * size * robot.rng.standard_normal(3)
        if robot.rng.random() < 0.03:
            effort = -effort
        yield np.clip(np.array([*velocity, effort]), -1, 1)


PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan("clean", clean, Aim.CLEAN),
        *(Plan(f.__name__, f, Aim.MESSY) for f in (pause, detour, overshoot, retry, undo_retry, clumsy)),
        *(Plan(f.__name__, f, Aim.NO_SUCCESS) for f in (stop_part, leave_part, near_miss, drop, wrong_place, late)),
        *(Plan(f.__name__, f, Aim.NO_SUCCESS) for f in (stutter_part, miss, no_grip, freeze)),
        *(Plan(f.__name__, f, Aim.NO_SUCCESS, long=True) for f in (undo, push_back)),
        *(Plan(f.__name__, f, Aim.NO_SUCCESS) for f in (drift, hover, wrong_object, go_elsewhere, random)),
        *(Plan(f"clone_{stage}", _clone(i), Aim.NO_SUCCESS) for i, stage in enumerate(("early", "middle", "late"))),
    )
}

MESSY = tuple(name for name, plan in PLANS.items() if plan.aim is Aim.MESSY)
"""Plans that mean to succeed after all: the task's usual lengths are drawn from these and from clean ones."""
