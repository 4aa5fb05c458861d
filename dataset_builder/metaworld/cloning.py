"""Half-trained policies: a small network cloned from a few expert demonstrations, caught early.

They make the attempts that an RL loop will show a reward model: motion that has the task's shape and
misses its point. Three stages of one training run, a second or so a task; kept by the caller. Written
out in numpy: at this size importing torch would take longer than the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_STAGES = (60, 300, 1500)
_HIDDEN = 64
# 64 rows through 64 units: just below where BLAS starts threads, which hinder each other on busy machines
_BATCH = 64
_RATE = 2e-3


@dataclass(frozen=True)
class ClonedPolicy:
    """A multilayer perceptron on standardised observations."""

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    layers: tuple[tuple[NDArray[np.float64], NDArray[np.float64]], ...]

    def get_action(self, obs: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64 (39,) -> float64 (4,) in [-1, 1]."""
        hidden = (obs - self.mean) / self.scale
        for weight, bias in self.layers[:-1]:
            hidden = np.tanh(weight @ hidden + bias)
        weight, bias = self.layers[-1]
        return np.clip(weight @ hidden + bias, -1.0, 1.0)


def clone_policy(
    observations: Sequence[NDArray[np.float64]], actions: Sequence[NDArray[np.float64]], seed: int
) -> tuple[ClonedPolicy, ...]:
    """Policies after each of a few stages of training (mean squared error, Adam), least trained first.

    Args:
        observations: for each demonstration float64 (L, 39).
        actions: for each demonstration float64 (L, 4).
        seed: of the weights and of the order of the data.
    """
    inputs, targets = np.concatenate(observations), np.concatenate(actions)
    mean, scale = inputs.mean(0), np.maximum(inputs.std(0), 0.01)
    inputs = (inputs - mean) / scale
    rng = np.random.default_rng(seed)
    sizes = (inputs.shape[1], _HIDDEN, _HIDDEN, targets.shape[1])
    parameters: list[NDArray[np.float64]] = []
    for wide, narrow in pairwise(sizes):
        parameters += [rng.standard_normal((narrow, wide)) / np.sqrt(wide), np.zeros(narrow)]
    first = [np.zeros_like(p) for p in parameters]
    second = [np.zeros_like(p) for p in parameters]
    stages: list[ClonedPolicy] = []
    for step in range(1, _STAGES[-1] + 1):
        rows = rng.integers(0, len(inputs), _BATCH)
        gradients = _gradients(parameters, inputs[rows], targets[rows])
        for p, gradient, m, v in zip(parameters, gradients, first, second, strict=True):
            m += 0.1 * (gradient - m)
            v += 0.001 * (gradient**2 - v)
            p -= _RATE * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        if step in _STAGES:
            copies = [p.copy() for p in parameters]
            stages.append(ClonedPolicy(mean, scale, tuple(zip(copies[::2], copies[1::2], strict=True))))
    return tuple(stages)


def _gradients(
    parameters: Sequence[NDArray[np.float64]], x: NDArray[np.float64], y: NDArray[np.float64]
) -> list[NDArray[np.float64]]:
    """Of the mean squared error over a batch, for weights and biases in the order of `parameters`."""
    layers = list(zip(parameters[::2], parameters[1::2], strict=True))
    hidden = [x]
    for weight, bias in layers[:-1]:
        hidden.append(np.tanh(hidden[-1] @ weight.T + bias))
    weight, bias = layers[-1]
    error = 2 * (hidden[-1] @ weight.T + bias - y) / y.size
    gradients: list[NDArray[np.float64]] = []
    for (weight, _), below in zip(reversed(layers), reversed(hidden), strict=True):
        gradients = [error.T @ below, error.sum(0), *gradients]
        error = (error @ weight) * (1 - below**2)
    return gradients
