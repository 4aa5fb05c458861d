"""Half-trained policies: a small network cloned from a few expert demonstrations, caught early.

They make the attempts that an RL loop will show a reward model: motion that has the task's shape and
misses its point. Three stages of one training run, a second or so a task; kept by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_STAGES = (60, 250, 1200)
_HIDDEN = 64
_BATCH = 256


@dataclass(frozen=True)
class ClonedPolicy:
    """A multilayer perceptron on standardised observations; in numpy, since torch is slow one row at a time."""

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
    """Policies after each of a few stages of training, least trained first.

    Args:
        observations: for each demonstration float64 (L, 39).
        actions: for each demonstration float64 (L, 4).
        seed: of the weights and of the order of the data.
    """
    import torch

    inputs, targets = np.concatenate(observations), np.concatenate(actions)
    mean, scale = inputs.mean(0), np.maximum(inputs.std(0), 0.01)
    rng = np.random.default_rng(seed)
    sizes = (inputs.shape[1], _HIDDEN, _HIDDEN, targets.shape[1])
    parameters: list[torch.Tensor] = []
    for wide, narrow in pairwise(sizes):
        weight = rng.standard_normal((narrow, wide)) / np.sqrt(wide)
        bias = torch.zeros(narrow, dtype=torch.float64, requires_grad=True)
        parameters += [torch.tensor(weight, requires_grad=True), bias]
    x, y = torch.tensor((inputs - mean) / scale), torch.tensor(targets)
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    stages: list[ClonedPolicy] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: the same weights on every machine with the same torch
    try:
        for step in range(1, _STAGES[-1] + 1):
            rows = torch.from_numpy(rng.integers(0, len(x), _BATCH))
            hidden = x[rows]
            for i in range(0, len(parameters) - 2, 2):
                hidden = torch.tanh(hidden @ parameters[i].T + parameters[i + 1])
            loss = ((hidden @ parameters[-2].T + parameters[-1] - y[rows]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in _STAGES:
                arrays = [p.detach().numpy().copy() for p in parameters]
                stages.append(ClonedPolicy(mean, scale, tuple(zip(arrays[::2], arrays[1::2], strict=True))))
    finally:
        torch.set_num_threads(threads)
    return tuple(stages)
