"""How well failures and successes were noticed, over attempts whose true outcomes are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.evaluation.attempts import ScoredAttempt, check_known

if TYPE_CHECKING:
    from rich.table import Table

EARLY = 0.1
"""A success noticed sooner than this share of the time to it was noticed before it was there."""


@dataclass(frozen=True)
class Counts:
    """Attempts by what was said and what was so.

    Attributes:
        tp, fp, fn, tn: positive is a failure, in failure detection; a success, in success detection.
        when: float64 (tp,), of each true positive when it was noticed: of a failure as a share of its length, of a
            success in seconds after it was there.
        frames: float64 (tp,), scored frames after the success; of failures, frames from the start.
        missed_early: successes that were noticed before they were there: among `fp`, and missed.
    """

    tp: int
    fp: int
    fn: int
    tn: int
    when: NDArray[np.float64]
    frames: NDArray[np.float64]
    missed_early: int = 0

    @property
    def precision(self) -> float:
        """tp / (tp + fp); nan where nothing was said."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Share of the positives that were noticed; nan where there are none."""
        return _ratio(self.tp, self.tp + self.fn + self.missed_early)

    @property
    def f1(self) -> float:
        """2 tp / (2 tp + fp + missed); nan where there is neither an alarm nor a positive."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn + self.missed_early)

    @property
    def false_alarms(self) -> float:
        """fp / (fp + tn) of failure detection: the share of successes with an alarm."""
        return _ratio(self.fp, self.fp + self.tn)

    @property
    def median(self) -> float:
        return float(np.median(self.when)) if len(self.when) else math.nan

    def to_json(self, when: str) -> dict[str, Any]:
        """Counts and rates, null where a rate has no meaning; the median of `when` under that name."""
        rates = {name: _short(getattr(self, name)) for name in ("precision", "recall", "f1")}
        frames = float(np.median(self.frames)) if len(self.frames) else math.nan
        counts = {"tp": self.tp, "fp": self.fp, "fn": self.fn, "tn": self.tn, "missed_early": self.missed_early}
        return {**counts, **rates, when: _short(self.median), "median_frames": _short(frames)}


@dataclass(frozen=True)
class Detection:
    """What came of failure or success detection over a set of attempts.

    Attributes:
        what: `failure` or `success`.
        all: over all of them. by_task: of each instruction.
    """

    what: str
    all: Counts
    by_task: dict[str, Counts] = field(default_factory=dict)

    @property
    def _when(self) -> str:
        return "median_alarm" if self.what == "failure" else "median_delay_seconds"

    def to_json(self) -> dict[str, Any]:
        by_task = {task: counts.to_json(self._when) for task, counts in self.by_task.items()}
        return {"positive": self.what, **self.all.to_json(self._when), "by_task": by_task}

    def table(self) -> Table:
        """A row a task, and one for all."""
        from rich.table import Table
        from rich.text import Text

        table = Table(header_style="dim")
        table.add_column("task")
        when = "median alarm" if self.what == "failure" else "median delay s"
        for name in ("right", "false", "missed", "precision", "recall", "F1", when):
            table.add_column(name, justify="right")
        rows = [*self.by_task.items(), *([("all", self.all)] if len(self.by_task) != 1 else [])]
        for task, one in rows:
            rates = (one.precision, one.recall, one.f1, one.median)
            counts = (one.tp, one.fp, one.fn + one.missed_early)
            table.add_row(
                Text(task), *(str(count) for count in counts), *("–" if math.isnan(x) else f"{x:.2f}" for x in rates)
            )
        return table


def evaluate_detection(attempts: Sequence[ScoredAttempt], alarms: Sequence[float | None]) -> Detection:
    """Alarms against outcomes; a failure is positive.

    An alarm in a failure is right. One in a success is false if it came before the success, or where it is not known
    when that was; after it, it does not count. `when` is the alarm's time as a share of the attempt's length.

    Raises:
        UserError: no attempts, an outcome that is not known, or not one alarm (or none) for each.
    """
    check_known(attempts)
    _check_fit(attempts, alarms)

    def count(chosen: Sequence[tuple[ScoredAttempt, float | None]]) -> Counts:
        said = [(attempt, alarm) for attempt, alarm in chosen if alarm is not None]
        right = [(attempt, alarm) for attempt, alarm in said if not attempt.succeeded]
        false = sum(bool(attempt.succeeded) and alarm < false_until(attempt) for attempt, alarm in said)
        failed = sum(not attempt.succeeded for attempt, _ in chosen)
        when = [(alarm - a.time[0]) / max(a.time[-1] - a.time[0], 1e-9) for a, alarm in right]
        frames = [float(np.searchsorted(attempt.time, alarm)) for attempt, alarm in right]
        return Counts(
            len(right), false, failed - len(right), len(chosen) - failed - false, np.array(when), np.array(frames)
        )

    return _detection("failure", attempts, alarms, count)


def evaluate_success_detection(
    attempts: Sequence[ScoredAttempt], said: Sequence[float | None], early: float = EARLY
) -> Detection:
    """When attempts were said to be done, against when they were; a success is positive.

    Said of a failure: false. Said of a success: right, unless it came sooner than `early` of the time to the true
    success: that is false too, and the success is missed. `when` are seconds after the true success, below 0 before
    it; a success counts without, where it is not known when it was.

    Raises:
        UserError: as `evaluate_detection`.
    """
    check_known(attempts)
    _check_fit(attempts, said)

    def count(chosen: Sequence[tuple[ScoredAttempt, float | None]]) -> Counts:
        tp = fp = fn = tn = missed = 0
        when, frames = [], []
        for attempt, at in chosen:
            if at is None:
                fn, tn = fn + bool(attempt.succeeded), tn + (not attempt.succeeded)
            elif not attempt.succeeded:
                fp += 1
            elif attempt.done is not None and at < attempt.done - early * (attempt.done - attempt.time[0]):
                fp, missed = fp + 1, missed + 1
            else:
                tp += 1
                if attempt.done is not None:
                    when.append(at - attempt.done)
                    frames.append(
                        float(np.searchsorted(attempt.time, at) - np.searchsorted(attempt.time, attempt.done))
                    )
        return Counts(tp, fp, fn, tn, np.array(when), np.array(frames), missed)

    return _detection("success", attempts, said, count)


def false_until(attempt: ScoredAttempt) -> float:
    """Up to when an alarm in this attempt is false: a success's end, where that is known."""
    return math.inf if attempt.done is None else attempt.done


def _detection(what: str, attempts: Sequence[ScoredAttempt], said: Sequence[float | None], count: Any) -> Detection:
    pairs = list(zip(attempts, said, strict=True))
    tasks = sorted({attempt.task for attempt in attempts})
    return Detection(
        what, count(pairs), {task: count([pair for pair in pairs if pair[0].task == task]) for task in tasks}
    )


def _check_fit(attempts: Sequence[ScoredAttempt], said: Sequence[float | None]) -> None:
    if len(attempts) != len(said):
        raise UserError(f"{len(said)} alarms for {len(attempts)} attempts: give one (or none) for each")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _short(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
