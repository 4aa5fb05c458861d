"""Advantage-weighted regression (Peng, Kumar, Zhang, Levine 2019); TorchRL has no loss for it.

    python -m policies.offline.awr transitions.npz --out runs/awr

V is regressed on the data's own λ-returns, and the policy is cloned with weight exp(temperature · (return − V)). So it
improves on whole stretches of the attempts as they were, and does not piece attempts together as IQL does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policies.offline.actor import Standard, mlp
from policies.offline.cloning import log_likelihood
from policies.offline.learning import Algorithm, Batch, Learning, command
from policies.transitions import Transitions
from rbm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AWR(Algorithm):
    """Advantage-weighted regression.

    Attributes:
        discount: γ.
        lam: λ of the returns; 1 the sum of rewards to the end, 0 one reward and V.
        temperature: of the weights; 0 clones everything alike.
        most: the largest weight.
        refresh: updates after which returns are made again with the present V.
    """

    discount: float = 0.98
    lam: float = 0.95
    temperature: float = 5.0
    most: float = 100.0
    refresh: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("discount", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must be from 0 to 1")
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature} must be 0 or more")
        if self.refresh < 1:
            raise UserError(f"refresh={self.refresh} must be at least 1")

    def start(self, data: Transitions, seed: int = 0, steps: int | None = None) -> Learning:
        return _Learning(self, data, seed, steps)


def lambda_returns(
    rewards: NDArray[np.floating],
    next_values: NDArray[np.floating],
    terminated: NDArray[np.bool_],
    last: NDArray[np.bool_],
    discount: float,
    lam: float,
) -> NDArray[np.float32]:
    """G_t = r_t + γ ((1 − λ) V(s_{t+1}) + λ G_{t+1}), float32 (N,), over episodes that stand one after another.

    Args:
        rewards: (N,), r_t.
        next_values: (N,), V(s_{t+1}).
        terminated: (N,), where nothing follows: G_t = r_t.
        last: (N,), where an episode ends: if not terminated, time ran out, and G_{t+1} is V(s_{t+1}).
    """
    returns = np.zeros(len(rewards), np.float64)
    for t in range(len(rewards) - 1, -1, -1):
        ahead = next_values[t] if last[t] else (1 - lam) * next_values[t] + lam * returns[t + 1]
        returns[t] = rewards[t] + (0.0 if terminated[t] else discount * ahead)
    return returns.astype(np.float32)


def advantage_weights(advantages: Tensor, temperature: float, most: float) -> Tensor:
    """exp(temperature · advantage), at most `most`."""
    return torch.exp(temperature * advantages).clamp_max(most)


class _Learning(Learning):
    algorithm: AWR

    def __init__(self, algorithm: AWR, data: Transitions, seed: int, steps: int | None) -> None:
        super().__init__(algorithm, data, seed, steps)
        episode = np.asarray(data.episode)
        self._last = np.append(episode[1:] != episode[:-1], True)
        self._rewards, self._terminated = np.asarray(data.rewards, np.float64), np.asarray(data.terminated, bool)

    def _build(self) -> nn.Module:
        size = self.data.observations.shape[1]
        standard = Standard(size)
        standard.load_state_dict(self.actor.standard.state_dict())
        value = nn.Sequential(standard, mlp(size, self.algorithm.hidden, 1, self.algorithm.layer_norm))
        networks = nn.ModuleDict({"actor": self.actor, "value": value})
        networks.register_buffer("returns", torch.zeros(len(self.data)))
        return networks

    def _draw(self) -> Batch:
        numbers = self.algorithm
        if self.step % numbers.refresh == 0:
            with torch.no_grad():
                ahead = self.networks["value"](self.data.next_observations)[:, 0].numpy()  # type: ignore[index]
            found = lambda_returns(self._rewards, ahead, self._terminated, self._last, numbers.discount, numbers.lam)
            self.networks.returns.copy_(torch.from_numpy(found))  # type: ignore[operator]
        rows = torch.randint(len(self.data), (numbers.batch,))
        batch = self.data.at(rows)
        return Batch(
            batch.observations,
            batch.actions,
            self.networks.returns[rows],  # type: ignore[index]
            batch.next_observations,
            batch.terminated,
            batch.weights,
        )

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """Of a batch whose `rewards` are λ-returns."""
        value = self.networks["value"](batch.observations)[:, 0]  # type: ignore[index]
        advantage = batch.rewards - value
        weights = advantage_weights(advantage.detach(), self.algorithm.temperature, self.algorithm.most)
        return {
            "loss_actor": -(weights * log_likelihood(self.actor, batch)).mean(),
            "loss_value": advantage.square().mean(),
        }


if __name__ == "__main__":
    command(AWR)
