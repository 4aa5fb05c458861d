"""Which attempts a policy should be cloned from, by what the model says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rbm.errors import UserError
from rbm.evaluation.attempts import ScoredAttempt
from rbm.evaluation.successes import SuccessRule, detect_successes

Keep = Literal["successes"] | float


def filter_trajectories(
    attempts: Sequence[ScoredAttempt],
    keep: Keep = "successes",
    rule: SuccessRule | None = None,
    min_worth: float | None = None,
) -> list[ScoredAttempt]:
    """The attempts worth imitating, in their order.

    Args:
        keep: `successes`: those that count as done; a share above 0, up to 1: of each task the best so many, by
            `ScoredAttempt.worth`, ⌈share × number⌉ of them, equals in their order.
        rule: when an attempt counts as done; none: the usual rule.
        min_worth: of these only those that end at least so well, 0 to 1.

    Raises:
        UserError: no attempts, a share or a bound outside its range.
    """
    if not attempts:
        raise UserError("there is nothing to filter: no attempts were given")
    if min_worth is not None and not 0 <= min_worth <= 1:
        raise UserError(f"min_worth={min_worth}: an attempt's worth is a number from 0 to 1")
    if keep == "successes":
        chosen = np.array([at is not None for at in detect_successes(attempts, rule or SuccessRule())])
    elif isinstance(keep, str):
        raise UserError(f"keep={keep!r}: give 'successes', or a share such as 0.3")
    else:
        chosen = _best(attempts, float(keep))
    if min_worth is not None:
        chosen &= np.array([attempt.worth >= min_worth for attempt in attempts])
    return [attempt for attempt, good in zip(attempts, chosen, strict=True) if good]


@dataclass(frozen=True)
class FilterResult:
    """What a filter kept, against the true outcomes.

    Attributes:
        attempts, successes: how many there were. kept, kept_successes: and are left.
    """

    attempts: int
    successes: int
    kept: int
    kept_successes: int

    def to_json(self) -> dict[str, Any]:
        """Counts; the share of successes before and after, and of the successes the share that was kept."""
        return {
            **vars(self),
            "successful_before": _share(self.successes, self.attempts),
            "successful_after": _share(self.kept_successes, self.kept),
            "successes_kept": _share(self.kept_successes, self.successes),
        }


def evaluate_filter(attempts: Sequence[ScoredAttempt], kept: Sequence[ScoredAttempt]) -> FilterResult | None:
    """How much better what was kept is; none where an outcome is not known."""
    if any(attempt.succeeded is None for attempt in attempts):
        return None
    won = sum(bool(attempt.succeeded) for attempt in attempts)
    return FilterResult(len(attempts), won, len(kept), sum(bool(attempt.succeeded) for attempt in kept))


def _best(attempts: Sequence[ScoredAttempt], share: float) -> np.ndarray:
    if not 0 < share <= 1:
        raise UserError(f"keep={share}: a share is a number above 0 and up to 1")
    chosen = np.zeros(len(attempts), bool)
    worth = np.array([attempt.worth for attempt in attempts])
    for task in {attempt.task for attempt in attempts}:
        own = np.array([n for n, attempt in enumerate(attempts) if attempt.task == task])
        count = int(np.ceil(share * len(own) - 1e-9))
        chosen[own[np.argsort(-worth[own], kind="stable")[:count]]] = True
    return chosen


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
