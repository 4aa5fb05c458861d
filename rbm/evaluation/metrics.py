"""The measures of a reward model, as pure functions; docs/metrics.md says what each is good for.

Two kinds stand here. Measures of one trajectory (VOC, label agreement) take its arrays and give a number.
Measures over trajectories (AUC, Kendall τ, calibration error, means) take `weights`, the number of times
that each trajectory counts: a bootstrap draws a matrix of such counts and every draw is evaluated at once.

Letters in shapes: n frames of a clip, N trajectories, B bootstrap draws, K bins. Wherever `weights` is
(..., N) the answer is (...): a scalar without weights, (B,) for (B, N). A measure that is undefined
(no such trajectory) is nan, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from rbm.trajectory import Quality

Floats = NDArray[np.float64]

CALIBRATION_BINS = 10
"""Equal-width bins of the calibration error, as in Naeini et al. 2015; more would be thin with some hundred clips."""

_CONSTANT = 1e-9  # a spread below this is rounding, not an order


# --- one trajectory ---------------------------------------------------------------------------------------------


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Σ(x−x̄)(y−ȳ) / √(Σ(x−x̄)² Σ(y−ȳ)²) in [−1, 1]; 0 if either is constant, nan for fewer than two values."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(a) != len(b):
        raise ValueError(f"correlation of {len(a)} values with {len(b)}")
    if len(a) < 2:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    if np.abs(a).max() < _CONSTANT or np.abs(b).max() < _CONSTANT:
        return 0.0
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson correlation of the ranks, ties sharing their mean rank, in [−1, 1]; 0 if either is constant.

    Source: Spearman 1904; ties as in scipy.stats.spearmanr.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(a) >= 2 and (np.ptp(a) < _CONSTANT or np.ptp(b) < _CONSTANT):
        return 0.0
    return pearson(rankdata(a), rankdata(b))


def voc_spearman(progress: ArrayLike, time: ArrayLike | None = None) -> float:
    """Value-order correlation: Spearman of predicted progress against time, in [−1, 1].

    Give only frames whose order means something: of a success those up to its completion. A constant
    prediction has no order and gives 0. High for a clock too, so it says nothing by itself.

    Args:
        progress: (n,) predictions.
        time: (n,) when each frame was filmed; the order given, where left out.

    Source: Ma et al. 2024, "Vision Language Models are In-Context Value Learners" (GVL), section 4.
    """
    values = np.asarray(progress, np.float64)
    return spearman(values, np.arange(len(values)) if time is None else time)


def voc_pearson(progress: ArrayLike, time: ArrayLike | None = None) -> float:
    """As `voc_spearman` with Pearson's correlation: 1 only where progress rises evenly, in [−1, 1]."""
    values = np.asarray(progress, np.float64)
    return pearson(values, np.arange(len(values)) if time is None else time)


def label_error(progress: ArrayLike, label: ArrayLike) -> float:
    """Mean absolute error (1/n) Σ|p_i − l_i| of predicted progress against the dense label, in [0, 1]."""
    return float(np.mean(np.abs(np.asarray(progress, np.float64) - np.asarray(label, np.float64))))


def label_spearman(progress: ArrayLike, label: ArrayLike) -> float:
    """Spearman of predicted progress against the dense label, in [−1, 1]; nan where the label is constant."""
    values = np.asarray(label, np.float64)
    if len(values) < 2 or np.ptp(values) < _CONSTANT:
        return float("nan")
    return spearman(progress, values)


# --- over trajectories ------------------------------------------------------------------------------------------


def mean(values: ArrayLike, weights: NDArray | None = None) -> Floats:
    """Σ w_i v_i / Σ w_i over the values that are not nan."""
    v = np.asarray(values, np.float64)
    w = np.ones(len(v)) if weights is None else np.asarray(weights, np.float64)
    known = ~np.isnan(v)
    return _ratio(w[..., known] @ v[known], w[..., known].sum(-1))


def auc(scores: ArrayLike, positive: ArrayLike, weights: NDArray | None = None) -> Floats:
    """P(score of a positive > score of a negative) + ½ P(equal), in [0, 1]: the area under the ROC curve.

    The accuracy of "positive over negative" over all their pairs is the same number, ties counted as ½.
    Source: Mann & Whitney 1947; Hanley & McNeil 1982.
    """
    plus, minus = _by_score(scores, positive, weights)
    below = np.cumsum(minus, -1) - minus
    return _ratio((plus * (below + minus / 2)).sum(-1), plus.sum(-1) * minus.sum(-1))


def average_precision(scores: ArrayLike, positive: ArrayLike, weights: NDArray | None = None) -> Floats:
    """AUPRC as average precision Σ_k (R_k − R_{k−1}) P_k over falling thresholds, in [0, 1].

    Equal scores share a threshold; there is no interpolation. Chance is the share of positives, not ½.
    Source: Davis & Goadrich 2006; the same sum as sklearn.metrics.average_precision_score.
    """
    plus, minus = (side[..., ::-1] for side in _by_score(scores, positive, weights))
    hits = np.cumsum(plus, -1)
    precision = _ratio(hits, hits + np.cumsum(minus, -1))
    return _ratio(np.where(plus > 0, plus * precision, 0).sum(-1), plus.sum(-1))


def kendall_tau(final: ArrayLike, rank: ArrayLike, weights: NDArray | None = None) -> Floats:
    """Kendall τ-a of one task over all its (success, suboptimal, failure) triples, in [−1, 1].

    A triple holds three pairs whose order is known; τ-a = (concordant − discordant) / 3, ties by final
    progress counting 0. Averaged over all triples every pair of two outcomes comes up equally often, so
    τ = (2A_su + 2A_sf + 2A_uf − 3) / 3 with A the pair accuracies. nan where an outcome is missing.

    Args:
        final: (N,) final progress of the task's trajectories.
        rank: (N,) Quality.rank.

    Source: Kendall 1938; over outcome triples as in Robometer's RBM-EVAL.
    """
    success, suboptimal, failure = (q.rank for q in (Quality.SUCCESSFUL, Quality.SUBOPTIMAL, Quality.FAILURE))
    pairs = ((success, suboptimal), (success, failure), (suboptimal, failure))
    accuracy = [over(final, rank, better, worse, weights) for better, worse in pairs]
    return np.asarray((2 * np.sum(accuracy, axis=0) - 3) / 3)


def over(final: ArrayLike, rank: ArrayLike, better: int, worse: int, weights: NDArray | None = None) -> Floats:
    """Accuracy of "outcome `better` over outcome `worse`" over all pairs of one task by `final`, ties ½."""
    ranks = np.asarray(rank)
    chosen = (ranks == better) | (ranks == worse)
    w = None if weights is None else np.asarray(weights)[..., chosen]
    return auc(np.asarray(final)[chosen], ranks[chosen] == better, w)


def preference_accuracy(
    better: NDArray[np.integer], worse: NDArray[np.integer], probability: ArrayLike, weights: NDArray | None = None
) -> Floats:
    """Share of pairs with P(better is better) > ½, a tie counting ½, in [0, 1].

    Args:
        better, worse: int (P,), numbers of the pair's trajectories among the N that `weights` counts; a
            pair counts as often as both its trajectories together, w_better · w_worse.
        probability: (P,) what the preference read-out says.
    """
    p = np.asarray(probability, np.float64)
    right = np.where(p == 0.5, 0.5, p > 0.5)
    counts = np.ones(len(p)) if weights is None else np.asarray(weights, np.float64)
    counts = counts if weights is None else counts[..., better] * counts[..., worse]
    return _ratio(counts @ right, counts.sum(-1))


def over_groups(values: Sequence[Floats]) -> Floats:
    """Plain mean over groups (tasks) of a measure, leaving out those where it is nan; nan if all are."""
    if not values:
        return np.asarray(np.nan)
    stacked = np.stack([np.asarray(value, np.float64) for value in values])
    known = ~np.isnan(stacked)
    return _ratio(np.where(known, stacked, 0).sum(0), known.sum(0))


def calibration_sums(
    probability: ArrayLike, outcome: ArrayLike, owner: ArrayLike, n: int, bins: int = CALIBRATION_BINS
) -> Floats:
    """What calibration needs of each trajectory: (N, K, 3) count, sum of probabilities, sum of outcomes.

    Bin b holds (b/K, (b+1)/K], the first one 0 as well.

    Args:
        probability, outcome: (F,) predictions in [0, 1] and what came true, 0 or 1.
        owner: int (F,) the trajectory of each, below n = N.
    """
    p = np.asarray(probability, np.float64)
    index = np.clip(np.ceil(p * bins).astype(np.int64) - 1, 0, bins - 1)
    sums = np.zeros((n, bins, 3))
    np.add.at(sums, (np.asarray(owner, np.int64), index), np.stack([np.ones_like(p), p, np.asarray(outcome)], -1))
    return sums


def calibration_error(sums: Floats, weights: NDArray | None = None) -> Floats:
    """Expected calibration error Σ_b (n_b / n) |mean outcome in b − mean probability in b|, in [0, 1].

    Args:
        sums: (N, K, 3) of `calibration_sums`.

    With few samples a bin it is biased upwards (see `calibration_floor`).
    Source: Naeini et al. 2015; Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    w = np.ones(len(sums)) if weights is None else np.asarray(weights, np.float64)
    total = np.tensordot(w, sums, axes=1)  # (..., K, 3)
    return _ratio(np.abs(total[..., 2] - total[..., 1]).sum(-1), total[..., 0].sum(-1))


def calibration_floor(probability: ArrayLike, seed: int, draws: int = 200, bins: int = CALIBRATION_BINS) -> float:
    """The calibration error that a perfectly calibrated head with these very predictions would show on average.

    Outcomes are drawn from the predictions themselves; what remains is the chance of small bins. A measured
    error near this floor can't be told from perfect. Source: Bröcker & Smith 2007 (consistency resampling).
    """
    p = np.asarray(probability, np.float64)
    if not len(p):
        return float("nan")
    index = np.clip(np.ceil(p * bins).astype(np.int64) - 1, 0, bins - 1)
    drawn = np.random.default_rng(seed).random((draws, len(p))) < p
    onehot = np.zeros((len(p), bins))
    onehot[np.arange(len(p)), index] = 1
    return float(np.abs((drawn - p) @ onehot).sum(-1).mean() / len(p))


# --- bootstrap --------------------------------------------------------------------------------------------------


def bootstrap_weights(strata: ArrayLike, draws: int, seed: int) -> NDArray[np.float64]:
    """How often each trajectory is drawn: float64 (B, N), every stratum keeping its size in every draw.

    Source: Efron & Tibshirani 1993, chapter 8 (stratified resampling of whole trajectories: the frames of one
    are not independent).

    Args:
        strata: int (N,), the stratum (task × outcome) of each trajectory.
    """
    groups = np.asarray(strata)
    weights = np.zeros((draws, len(groups)))
    rng = np.random.default_rng(seed)
    for stratum in np.unique(groups):
        members = np.flatnonzero(groups == stratum)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=draws)
    return weights


def interval(draws: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the draws (B,); (nan, nan) where the measure is undefined in all of them."""
    known = draws[~np.isnan(draws)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _by_score(scores: ArrayLike, positive: ArrayLike, weights: NDArray | None) -> tuple[Floats, Floats]:
    """Weight of positives and of negatives at each distinct score, lowest first: two (..., distinct)."""
    s, y = np.asarray(scores, np.float64), np.asarray(positive, bool)
    w = np.ones(len(s)) if weights is None else np.asarray(weights, np.float64)
    if not len(s):
        return np.zeros((*w.shape[:-1], 0)), np.zeros((*w.shape[:-1], 0))
    distinct, group = np.unique(s, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(distinct)))
    plus = np.add.reduceat((w * y)[..., order], starts, axis=-1)
    minus = np.add.reduceat((w * ~y)[..., order], starts, axis=-1)
    return plus, minus


def _ratio(above: ArrayLike, below: ArrayLike) -> Floats:
    """above / below, nan where below is 0."""
    a, b = np.broadcast_arrays(np.asarray(above, np.float64), np.asarray(below, np.float64))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)
