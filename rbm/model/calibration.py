"""Temperature and bias of the success head, fitted on validation data.

Training balances successes against the rest, which shifts every probability; ranking stays right, the
numbers do not. Two numbers mend it: P(success) = σ(z / T + b).
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

log = logging.getLogger(__name__)

_LOG_SCALE_RANGE = (-4.0, 4.0)  # T between 1/55 and 55: beyond it the fit is chasing noise


def fit_calibration(logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> tuple[float, float]:
    """(temperature, bias) that make σ(logit / temperature + bias) most likely: maximum likelihood, T > 0.

    Where successes and failures separate, plain likelihood wants T → 0 and is certain of everything. So the
    labels are Platt's: (N₊ + 1)/(N₊ + 2) for a success, 1/(N₋ + 2) else, N the (weighted) counts.

    Args:
        logits: (F,) of the success head.
        labels: (F,) 0 or 1.
        weights: (F,) how much each counts; 1/n for the n frames of a clip makes clips count alike and keeps
            N at the number of clips, which is the honest sample size.

    Returns:
        (1, 0), with a warning, where all labels are equal: nothing can be fitted.

    Source: Platt 1999 (targets); Guo et al. 2017 (temperature).
    """
    z, y = np.asarray(logits, np.float64).ravel(), np.asarray(labels, np.float64).ravel()
    w = np.ones_like(z) if weights is None else np.asarray(weights, np.float64).ravel()
    if not z.shape == y.shape == w.shape:
        raise ValueError(f"logits, labels and weights differ in length: {len(z)}, {len(y)}, {len(w)}")
    plus, minus = float(w @ y), float(w @ (1 - y))
    if plus == 0 or minus == 0:
        log.warning("success calibration: all %d labels are equal, so the head stays as it is", len(z))
        return 1.0, 0.0
    target = np.where(y > 0.5, (plus + 1) / (plus + 2), 1 / (minus + 2))

    def loss(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scale = np.exp(x[0])
        logit = scale * z + x[1]
        error = w * (1 / (1 + np.exp(-np.clip(logit, -500, 500))) - target)
        value = w @ (np.logaddexp(0, logit) - target * logit)
        return float(value) / w.sum(), np.array([scale * (error @ z), error.sum()]) / w.sum()

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[_LOG_SCALE_RANGE, (None, None)])
    return float(np.exp(-found.x[0])), float(found.x[1])
