"""Failures noticed while a policy runs.

A failure shows in three signs, each a number that is larger the worse it looks:

    behind(t) = (m(t) − q(t)) / (s(t) + 0.05)      below what successes of the task have reached by this time
    stall(t)  = time since the progress last rose by 0.03 / usual time of the task
    fall(t)   = best progress so far − q(t)

q is the mean progress of the last three frames, m and s mean and standard deviation of the same of calibration
successes, which count as 1 from their end on. An alarm goes off when a sign passes its limit while the task does not
count as done (`SuccessRule`). Limits are conformal: the limit of a sign at level α is the ⌈(n+1)(1−α)⌉-th smallest of
the n largest values that it took in calibration successes before they were done, each under a band that was made
without it; so of new successes about a share α at most passes it. Which α each sign gets is decided by calibration
failures, where there are some.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rbm.errors import UserError
from rbm.evaluation.attempts import ScoredAttempt, check_finite, check_known
from rbm.evaluation.successes import SuccessRule, calibrate_success
from rbm.output import whole_file
from rbm.scoring.scores import FrameScore

Doubles = NDArray[np.float64]

SIGNS = ("behind", "stall", "fall")
SMOOTH = 3
"""Frames over which progress is averaged."""
RISE = 0.03
"""By so much progress must rise to count as moving on."""
SPREAD = 0.05
"""Added to the spread of the band, which may be 0."""
ALPHAS = (0.0, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3)
F1_SLACK = 0.01
"""Limits whose F1 is so close to the best count as equal: of these the earliest alarm wins."""
FEWEST = 4
"""Calibration successes that a task needs: below, its band has no spread worth the name."""

_FORMAT, _VERSION = "rbm-failure-limits", 1


@dataclass(frozen=True)
class Band:
    """How far successes of one task are at each time.

    Attributes:
        time: float64 (K,), rising, seconds from 0; the last holds for ever.
        mean, std: float64 (K,), of smoothed progress.
        usual: seconds, the median time to success.
        period: seconds between two scored frames, median.
        count: successes that it was made of.
    """

    time: Doubles
    mean: Doubles
    std: Doubles
    usual: float
    period: float
    count: int

    @classmethod
    def of(cls, successes: Sequence[ScoredAttempt]) -> Band:
        """The band of at least two successes of one task."""
        period = float(np.median([_period(attempt) for attempt in successes]))
        ends = [_done(attempt) - attempt.time[0] for attempt in successes]
        time = np.arange(0, max(ends) + 2 * period, period)
        curves = np.array([_curve(attempt, time) for attempt in successes])
        return cls(time, curves.mean(0), curves.std(0, ddof=1), float(np.median(ends)), period, len(successes))

    def behind(self, time: float, progress: float) -> float:
        mean, std = np.interp(time, self.time, self.mean), np.interp(time, self.time, self.std)
        return float((mean - progress) / (std + SPREAD))


@dataclass(frozen=True)
class FailureLimits:
    """What `FailureDetector` needs to know; made by `calibrate_failures`, kept as JSON.

    Attributes:
        bands: by instruction.
        behind, stall, fall: alarm above; infinite where the sign is of no use.
        alphas: the share of calibration successes that each sign may pass.
        done: by instruction, when a task counts as done; one that is not there has the usual rule.
    """

    bands: Mapping[str, Band]
    behind: float
    stall: float
    fall: float
    alphas: tuple[float, float, float] = (0.0, 0.0, 0.0)
    done: Mapping[str, SuccessRule] = field(default_factory=dict)

    def band(self, task: str) -> Band:
        """Raises UserError: it was not calibrated for this task."""
        if task not in self.bands:
            known = ", ".join(repr(text) for text in sorted(self.bands))
            raise UserError(f"no limits for the task {task!r}, only for {known}: calibrate with successes of it")
        return self.bands[task]

    def save(self, file: Path) -> None:
        """Write them as JSON, whole or not at all."""
        limits = {name: None if math.isinf(value := getattr(self, name)) else value for name in SIGNS}
        bands: dict[str, Any] = {
            task: {
                name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(band).items()
            }
            for task, band in self.bands.items()
        }
        done = {task: asdict(rule) for task, rule in self.done.items()}
        facts = {"format": _FORMAT, "version": _VERSION, **limits, "alphas": self.alphas, "done": done, "bands": bands}
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(facts, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> FailureLimits:
        """Raises UserError: no such file, or something else."""
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"limits {file} cannot be read: make them with `rbm detect calibrate`") from error
        if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
            raise UserError(f"{file} is some other file: limits come from `rbm detect calibrate`")
        if facts.get("version") != _VERSION:
            raise UserError(f"{file} is of version {facts.get('version')}, this rbm reads {_VERSION}: calibrate again")
        try:
            bands = {task: _band(band) for task, band in facts["bands"].items()}
            done = {task: SuccessRule(**rule) for task, rule in facts["done"].items()}
            behind, stall, fall = (math.inf if facts[name] is None else float(facts[name]) for name in SIGNS)
            alphas = (float(facts["alphas"][0]), float(facts["alphas"][1]), float(facts["alphas"][2]))
            return cls(bands, behind, stall, fall, alphas, done)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(f"limits {file} are damaged: make them again with `rbm detect calibrate`") from error


class Detector(Protocol):
    """Takes a frame's score at a time and says whether there has been an alarm."""

    def add(self, score: FrameScore | float, success: float = 0.0, time: float | None = None) -> bool: ...

    def reset(self) -> None: ...


class FailureDetector:
    """Watches one attempt at a task; from its alarm on it says so until it is reset.

    Attributes:
        alarm: the sign that set it off, none before.
        signs: values of the three signs at the last frame.
        done: whether the task counts as done at the last frame.
    """

    def __init__(self, limits: FailureLimits, task: str) -> None:
        """Raises UserError: no limits for this task."""
        self.limits, self.task = limits, task
        self._band = limits.band(task)
        self._signs = _Signs(self._band)
        self._rule = limits.done.get(task, SuccessRule())
        self.reset()

    def reset(self) -> None:
        """A new attempt."""
        self.alarm: str | None = None
        self.signs: tuple[float, float, float] = (0.0, 0.0, 0.0)
        self.done = False
        self._signs.reset()
        self._vote = self._rule.vote()
        self._count = 0
        self._start = 0.0

    def add(self, score: FrameScore | float, success: float = 0.0, time: float | None = None) -> bool:
        """Look at the next frame.

        Args:
            score: what a session said of it; or its progress, and then `success` is its success probability.
            time: seconds, by the clock that all of this attempt's frames have; without it, frames come as fast as in
                calibration.

        Returns:
            Whether there was an alarm, now or earlier.

        Raises:
            UserError: a number that is not finite.
        """
        progress = score.progress if isinstance(score, FrameScore) else float(score)
        success = score.success if isinstance(score, FrameScore) else float(success)
        check_finite(self.task, progress, success)
        now = self._count * self._band.period if time is None else time
        if not self._count:
            self._start = now
        self._count += 1
        self.signs = self._signs.add(progress, now - self._start)
        self.done = self._vote.add(self._rule.value(progress, success))
        if self.alarm is None and not self.done:
            limits = (self.limits.behind, self.limits.stall, self.limits.fall)
            passed = [name for name, value, limit in zip(SIGNS, self.signs, limits, strict=True) if value > limit]
            self.alarm = passed[0] if passed else None
        return self.alarm is not None


class CorrelationDetector:
    """The plain recipe: alarm where progress falls with time, by Pearson's correlation over the last frames.

    Raises:
        UserError: a window below 2 frames.
    """

    def __init__(self, window: int = 7, threshold: float = -0.5) -> None:
        if window < 2:
            raise UserError(f"a window of {window} frames has no correlation: give at least 2")
        self.threshold = threshold
        self._last: deque[tuple[float, float]] = deque(maxlen=window)
        self.reset()

    def reset(self) -> None:
        self._last.clear()
        self._count, self._alarm = 0, False

    def add(self, score: FrameScore | float, success: float = 0.0, time: float | None = None) -> bool:
        """As `FailureDetector.add`; times default to 0, 1, 2, …. Constant progress correlates with nothing."""
        progress = score.progress if isinstance(score, FrameScore) else float(score)
        check_finite("", progress, success)
        self._last.append((float(self._count) if time is None else time, progress))
        self._count += 1
        if len(self._last) == self._last.maxlen:
            self._alarm |= correlation(*zip(*self._last, strict=True)) < self.threshold
        return self._alarm


def correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's, 0 where either is constant."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 1e-12 else 0.0


def detect_failures(attempts: Sequence[ScoredAttempt], limits: FailureLimits) -> list[float | None]:
    """For each attempt the time of the alarm, in seconds by the attempt's own clock; none without one.

    Raises:
        UserError: no limits for one of the tasks.
    """
    return [first_alarm(FailureDetector(limits, attempt.task), attempt) for attempt in attempts]


def first_alarm(detector: Detector, attempt: ScoredAttempt) -> float | None:
    """Frame after frame through a detector that is fresh or reset: when it first says so."""
    for time, progress, success in zip(attempt.time, attempt.progress, attempt.success, strict=True):
        if detector.add(float(progress), float(success), float(time)):
            return float(time)
    return None


def calibrate_failures(
    attempts: Sequence[ScoredAttempt], false_alarms: float = 0.1, done: Mapping[str, SuccessRule] | None = None
) -> FailureLimits:
    """Bands and limits from attempts with known outcomes, by task.

    With failures among them, α of each sign is the one of `ALPHAS` for which F1 over these attempts is best; among
    those that come within `F1_SLACK` of it, the one with the earliest median alarm. Without failures, `false_alarms` is
    shared out evenly to `behind` and `stall`.

    Args:
        attempts: successes and, better, failures. Attempts of tasks with fewer than `FEWEST` successes are left out.
        false_alarms: the share of successes in which an alarm may go off, where there are no failures to choose by.
        done: when each task counts as done; without it, by the rule that is best here (`calibrate_success`).

    Raises:
        UserError: an outcome is not known, or no task has enough successes.
    """
    check_known(attempts)
    if not 0 < false_alarms < 1:
        raise UserError(f"false_alarms={false_alarms} is a share of successes: give a number between 0 and 1")
    tasks = list(dict.fromkeys(attempt.task for attempt in attempts))
    successes = {task: [a for a in attempts if a.task == task and a.succeeded] for task in tasks}
    enough = {task: found for task, found in successes.items() if len(found) >= FEWEST}
    if not enough:
        most = max((len(found) for found in successes.values()), default=0)
        raise UserError(
            f"calibration needs at least {FEWEST} successes of a task, the most here are {most}: give more attempts "
            "with known outcomes"
        )
    if done is None:
        done = {task: calibrate_success([a for a in attempts if a.task == task]) for task in enough}
    bands = {task: Band.of(found) for task, found in enough.items()}
    curves: list[tuple[ScoredAttempt, NDArray[np.float64]]] = []
    for attempt in attempts:
        if attempt.task in bands:
            others = [one for one in enough[attempt.task] if one is not attempt]
            band = Band.of(others) if attempt.succeeded else bands[attempt.task]
            curves.append((attempt, _watched(attempt, band, done.get(attempt.task, SuccessRule()))))
    largest = np.array([signs[:, _counts(a)].max(1, initial=0.0) for a, signs in curves if a.succeeded])
    levels = [[conformal_limit(largest[:, i], alpha) for alpha in ALPHAS] for i in range(len(SIGNS))]
    if all(attempt.succeeded for attempt, _ in curves):
        share = false_alarms / 2
        behind, stall = (conformal_limit(largest[:, i], share) for i in range(2))
        return FailureLimits(bands, behind, stall, math.inf, (share, share, 0.0), done)
    a, b, c = _choose(curves, levels)
    return FailureLimits(bands, levels[0][a], levels[1][b], levels[2][c], (ALPHAS[a], ALPHAS[b], ALPHAS[c]), done)


def conformal_limit(values: ArrayLike, alpha: float) -> float:
    """The ⌈(n+1)(1−α)⌉-th smallest of n values, infinite where that is beyond the n-th.

    One more value from where these come from passes it with probability at most α.
    """
    rising = np.sort(np.asarray(values, np.float64))
    place = math.ceil((len(rising) + 1) * (1 - alpha) - 1e-9)
    return float(rising[place - 1]) if place <= len(rising) else math.inf


def _choose(
    curves: Sequence[tuple[ScoredAttempt, NDArray[np.float64]]], levels: Sequence[Sequence[float]]
) -> tuple[int, ...]:
    """For each sign the place of its level."""
    attempts = [attempt for attempt, _ in curves]
    never = math.inf
    first = np.full((len(attempts), len(SIGNS), len(ALPHAS)), never)
    for n, (attempt, signs) in enumerate(curves):
        for i, at in product(range(len(SIGNS)), range(len(ALPHAS))):
            passed = signs[i] > levels[i][at]
            if passed.any():
                first[n, i, at] = attempt.time[passed.argmax()]
    start = np.array([attempt.time[0] for attempt in attempts])
    length = np.array([attempt.time[-1] for attempt in attempts]) - start
    failed = np.array([not attempt.succeeded for attempt in attempts])
    until = np.array([never if attempt.done is None else attempt.done for attempt in attempts])
    found = []
    for chosen in product(range(len(ALPHAS)), repeat=len(SIGNS)):
        alarm = first[:, np.arange(len(SIGNS)), chosen].min(1)
        alarmed = alarm < until
        right = int((alarmed & failed).sum())
        f1 = 2 * right / (int(alarmed.sum()) + int(failed.sum()))
        median = float(np.median(((alarm - start) / np.maximum(length, 1e-9))[alarmed & failed])) if right else never
        found.append((f1, median, chosen))
    best = max(f1 for f1, *_ in found)
    _, _, chosen = min((one for one in found if one[0] >= best - F1_SLACK), key=lambda one: (one[1], -one[0], one[2]))
    return chosen


class _Signs:
    """The three signs, frame by frame; times count from the attempt's first frame."""

    def __init__(self, band: Band) -> None:
        self._band = band
        self._last: deque[float] = deque(maxlen=SMOOTH)
        self.reset()

    def reset(self) -> None:
        self._last.clear()
        self._best = self._reference = -math.inf
        self._moved = 0.0

    def add(self, progress: float, time: float) -> tuple[float, float, float]:
        self._last.append(progress)
        now = sum(self._last) / len(self._last)
        self._best = max(self._best, now)
        if now >= self._reference + RISE:
            self._reference, self._moved = now, time
        stall = (time - self._moved) / self._band.usual
        return self._band.behind(time, now), stall, self._best - now


def _watched(attempt: ScoredAttempt, band: Band, rule: SuccessRule) -> NDArray[np.float64]:
    """Signs at every frame, float64 (3, n); −∞ where the task counts as done, so that nothing passes."""
    signs, held = _Signs(band), rule.vote()
    rows = []
    for time, progress, success in zip(attempt.time - attempt.time[0], attempt.progress, attempt.success, strict=True):
        values = signs.add(float(progress), float(time))
        rows.append((-math.inf,) * len(SIGNS) if held.add(rule.value(float(progress), float(success))) else values)
    return np.array(rows, np.float64).T


def _smooth(progress: NDArray[np.float32]) -> Doubles:
    """Mean of the last `SMOOTH` values at each place."""
    total = np.cumsum(np.concatenate([np.zeros(1), progress.astype(np.float64)]))
    stop = np.arange(1, len(progress) + 1)
    start = np.maximum(stop - SMOOTH, 0)
    return (total[stop] - total[start]) / (stop - start)


def _curve(attempt: ScoredAttempt, time: Doubles) -> Doubles:
    """Smoothed progress of a success at these times, 1 from its end on."""
    own, done = attempt.time - attempt.time[0], _done(attempt) - attempt.time[0]
    return np.where(time > done, 1.0, np.interp(time, own, _smooth(attempt.progress)))


def _done(attempt: ScoredAttempt) -> float:
    """When a success was done: its last frame, where that is not known."""
    return float(attempt.time[-1]) if attempt.done is None else attempt.done


def _counts(attempt: ScoredAttempt) -> NDArray[np.bool_]:
    """Frames at which an alarm in a success would be false: before it was done, all where that is not known."""
    return np.ones(len(attempt), bool) if attempt.done is None else attempt.time < attempt.done


def _band(facts: dict[str, Any]) -> Band:
    """As it stands in a file."""
    time, mean, std = (np.array(facts[name], np.float64) for name in ("time", "mean", "std"))
    if not len(time) or not time.shape == mean.shape == std.shape:
        raise ValueError("a band's arrays do not fit each other")
    return Band(time, mean, std, float(facts["usual"]), float(facts["period"]), int(facts["count"]))


def _period(attempt: ScoredAttempt) -> float:
    return float(np.median(np.diff(attempt.time))) if len(attempt) > 1 else 1.0
