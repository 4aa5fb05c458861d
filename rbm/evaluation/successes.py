"""When does an attempt count as done? A vote over frames, chosen where the true outcomes are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from rbm.errors import UserError
from rbm.evaluation.attempts import ScoredAttempt, check_known
from rbm.evaluation.detection_results import EARLY, evaluate_success_detection
from rbm.scoring.vote import SuccessVote

Of = Literal["success", "progress", "mean"]

MOST_FRAMES = 7
THRESHOLDS = tuple(round(0.1 + 0.05 * step, 2) for step in range(17))
"""What `calibrate_success` tries: n/2 <= k <= n <= `MOST_FRAMES`, each of these thresholds, each `Of`."""


@dataclass(frozen=True)
class SuccessRule:
    """Done once k of the last n frames reach the threshold (`rbm.scoring.vote.SuccessVote`).

    Attributes:
        of: what reaches it: the success probability, the progress, or the mean of both.

    Raises:
        UserError: not 1 <= k <= n, a threshold outside 0 to 1, or another `of`.
    """

    k: int = 3
    n: int = 5
    threshold: float = 0.5
    of: Of = "success"

    def __post_init__(self) -> None:
        SuccessVote(self.k, self.n, self.threshold)
        if self.of not in get_args(Of):
            raise UserError(f"a vote is held on {', '.join(get_args(Of))}, not on {self.of!r}")

    def vote(self) -> SuccessVote:
        """A fresh vote, to be given `value` of each frame."""
        return SuccessVote(self.k, self.n, self.threshold)

    def value(self, progress: float, success: float) -> float:
        return {"success": success, "progress": progress, "mean": (progress + success) / 2}[self.of]


def detect_successes(
    attempts: Sequence[ScoredAttempt], rules: SuccessRule | Mapping[str, SuccessRule] = SuccessRule()
) -> list[float | None]:
    """For each attempt the time, by its own clock, from which on it counts as done; none if it never does.

    Args:
        rules: one for all, or by instruction; an instruction without one gets the usual rule.
    """
    found: list[float | None] = []
    for attempt in attempts:
        rule = rules if isinstance(rules, SuccessRule) else rules.get(attempt.task, SuccessRule())
        held = rule.vote()
        frames = zip(attempt.time, attempt.progress, attempt.success, strict=True)
        found.append(next((float(t) for t, p, s in frames if held.add(rule.value(float(p), float(s)))), None))
    return found


def calibrate_success(attempts: Sequence[ScoredAttempt], early: float = EARLY) -> SuccessRule:
    """The rule with the best F1 (`evaluate_success_detection`) over these attempts; among equals that of least
    delay, then of the fewest frames and the threshold nearest to one half.

    Raises:
        UserError: no attempts, an outcome that is not known, or no success among them.
    """
    check_known(attempts)
    if not any(attempt.succeeded for attempt in attempts):
        raise UserError("no success is among these attempts: a vote cannot be chosen without one")
    found = []
    for place, of in enumerate(get_args(Of)):
        rule = SuccessRule(of=of)
        values = [
            [rule.value(float(p), float(s)) for p, s in zip(a.progress, a.success, strict=True)] for a in attempts
        ]
        for threshold in THRESHOLDS:
            reached = [np.cumsum([0, *(value >= threshold for value in row)]) for row in values]
            for n in range(1, MOST_FRAMES + 1):
                votes = [total[1:] - total[np.maximum(np.arange(1, len(total)) - n, 0)] for total in reached]
                for k in range((n + 1) // 2, n + 1):
                    said = [_first(attempt, vote >= k) for attempt, vote in zip(attempts, votes, strict=True)]
                    one = evaluate_success_detection(attempts, said, early).all
                    delay = float(np.median(np.abs(one.when))) if len(one.when) else math.inf
                    found.append((-one.f1, delay, n, k, place, abs(threshold - 0.5), threshold))
    _, _, n, k, place, _, threshold = min(found)
    return replace(SuccessRule(k, n, threshold), of=get_args(Of)[place])


def _first(attempt: ScoredAttempt, held: np.ndarray) -> float | None:
    return float(attempt.time[held.argmax()]) if held.any() else None
