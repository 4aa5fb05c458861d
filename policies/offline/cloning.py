"""Cloning: of everything, of the episodes that a reward model thinks well of, or of the moments that got further.

    python -m policies.offline.cloning transitions.npz --out runs/cloning

| class | which transitions, with which weight |
| --- | --- |
| `Cloning` | all alike |
| `FilteredCloning` | those of the share `keep` of episodes with the best score, alike |
| `RewardWeightedCloning` | all, by how much the score rises over the next `ahead` steps |

The score of an episode is the mean value (`Transitions.values`) of its last `ending` steps. Neither uses the rewards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policies.offline.actor import Actor
from policies.offline.learning import Algorithm, Batch, Learning, check, command
from policies.transitions import Transitions
from rbm.errors import UserError


def log_likelihood(actor: Actor, batch: Batch) -> Tensor:
    """Log density of the batch's actions, float32 (N,), under a normal around tanh(m)."""
    spread = actor.std()
    found: Tensor = torch.distributions.Normal(actor(batch.observations), spread).log_prob(batch.actions).sum(-1)
    return found


@dataclass(frozen=True, kw_only=True)
class Cloning(Algorithm):
    """Cloning of all transitions alike: maximum likelihood of the actions."""

    def start(self, data: Transitions, seed: int = 0, steps: int | None = None) -> Learning:
        check(data)
        return _Learning(self, data, seed, steps)

    def weights(self, data: Transitions) -> NDArray[np.float32]:
        """Of each transition, float32 (N,), not all 0."""
        return np.ones(len(data.observations), np.float32)


@dataclass(frozen=True, kw_only=True)
class FilteredCloning(Cloning):
    """Cloning of the best episodes by score.

    Attributes:
        keep: share of the episodes that is kept, rounded, at least one.
        ending: steps at an episode's end whose mean value is its score.
    """

    keep: float = 0.05
    ending: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise UserError(f"keep={self.keep} must be above 0 and at most 1")
        if self.ending < 1:
            raise UserError(f"ending={self.ending} must be at least 1")

    def weights(self, data: Transitions) -> NDArray[np.float32]:
        values, scores = _values(data), []
        episodes = np.unique(data.episode)
        for episode in episodes:
            scores.append(float(values[data.episode == episode][-self.ending :].mean()))
        count = max(1, round(self.keep * len(episodes)))
        best = episodes[np.argsort(-np.array(scores), kind="stable")[:count]]
        return np.isin(data.episode, best).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class RewardWeightedCloning(Cloning):
    """Cloning weighted by gain: how much further the score is `ahead` steps later.

    The weight of a transition is its gain as a share of `full`, 0 to 1: what loses ground or stands still has none.

    Attributes:
        ahead: steps; fewer at an episode's end.
        full: gain from which a transition has full weight.
    """

    ahead: int = 5
    full: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ahead < 1:
            raise UserError(f"ahead={self.ahead} must be at least 1")
        if not self.full > 0:
            raise UserError(f"full={self.full} must be above 0")

    def weights(self, data: Transitions) -> NDArray[np.float32]:
        values = _values(data)
        weights = np.zeros(len(values), np.float32)
        for episode in np.unique(data.episode):
            rows = np.flatnonzero(data.episode == episode)
            after = values[rows]
            # the value before the first step is not among the transitions': it starts where the first one ends
            before = np.concatenate([after[:1], after[:-1]])
            later = after[np.minimum(np.arange(len(rows)) + self.ahead - 1, len(rows) - 1)]
            weights[rows] = np.clip((later - before) / self.full, 0, 1)
        if not weights.any():
            raise UserError("no transition of the data gains anything by its scores: nothing to clone")
        return weights


def _values(data: Transitions) -> NDArray[np.float32]:
    values = np.asarray(data.values, np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"value {int(np.isfinite(values).argmin())} of the data is not finite: relabel it")
    return values


class _Learning(Learning):
    algorithm: Cloning

    def __init__(self, algorithm: Cloning, data: Transitions, seed: int, steps: int | None) -> None:
        super().__init__(algorithm, data, seed, steps)
        self.data = replace(self.data, weights=torch.from_numpy(algorithm.weights(data)))

    def _build(self) -> nn.Module:
        return self.actor

    def _draw(self) -> Batch:
        return self.data.at(torch.multinomial(self.data.weights, self.algorithm.batch, replacement=True))

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss_actor": -log_likelihood(self.actor, batch).mean()}


if __name__ == "__main__":
    command(Cloning)
