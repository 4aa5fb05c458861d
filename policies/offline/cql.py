"""Conservative Q-learning (Kumar et al. 2020) with TorchRL's `CQLLoss`.

    python -m policies.offline.cql transitions.npz --out runs/cql

Soft actor-critic on data, with a term that lowers Q at actions of the policy and at random ones and raises it at those
of the data. During the first `warmup` share of the updates the policy is cloned instead, as the authors do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from policies.offline.learning import Algorithm, Batch, Learning, command
from policies.offline.torchrl_losses import Critic, as_actor, as_critic, as_tensordict, load_torchrl
from policies.transitions import Transitions
from rbm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CQL(Algorithm):
    """Conservative Q-learning.

    Attributes:
        discount: γ.
        conservatism: weight of the term that lowers Q away from the data.
        samples: draws of an action (at random, by the policy there, by the policy at what follows) for each transition
            in that term. TorchRL 0.14 takes the log-sum-exp over the three kinds of each draw and the mean over draws,
            where the paper takes it over all of them.
        alpha: weight of the policy's entropy.
        warmup: share of the updates in which the policy is cloned.
        tau: how much of Q goes into its target after each update.
    """

    discount: float = 0.98
    conservatism: float = 5.0
    samples: int = 4
    alpha: float = 0.02
    warmup: float = 0.3
    tau: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.discount < 1:
            raise UserError(f"discount={self.discount} must be from 0 to below 1")
        if not self.conservatism >= 0:
            raise UserError(f"conservatism={self.conservatism} must be 0 or more")
        if self.samples < 1:
            raise UserError(f"samples={self.samples} must be at least 1")
        if not self.alpha > 0:
            raise UserError(f"alpha={self.alpha} must be above 0")

    def start(self, data: Transitions, seed: int = 0, steps: int | None = None) -> Learning:
        return _Learning(self, data, seed, steps)


class _Learning(Learning):
    algorithm: CQL

    def _build(self) -> nn.Module:
        _, torchrl = load_torchrl()
        numbers, sizes = self.algorithm, (self.algorithm.hidden, self.algorithm.layer_norm)
        actions = self.data.actions.shape[1]
        # the tanh of a normal has no density at its bounds
        self.data = Batch(*(self._inside(name) for name in Batch.__dataclass_fields__))
        loss = torchrl.objectives.CQLLoss(
            as_actor(self.actor, squashed=True),
            [as_critic(Critic(self.actor.standard, actions, *sizes), of_actions=True) for _ in range(2)],
            loss_function="l2",
            alpha_init=numbers.alpha,
            fixed_alpha=True,
            target_entropy=-float(actions),
            min_q_weight=numbers.conservatism,
            num_random=numbers.samples,
        )
        loss.make_value_estimator(gamma=numbers.discount)
        self._targets = torchrl.objectives.SoftUpdate(loss, tau=numbers.tau)
        built: nn.Module = loss
        return built

    def _inside(self, name: str) -> Tensor:
        found: Tensor = getattr(self.data, name)
        return found.clamp(-0.999, 0.999) if name == "actions" else found

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        loss: Any = self.networks
        given = as_tensordict(batch)
        found = {"loss_qvalue": loss.q_loss(given)[0], "loss_cql": loss.cql_loss(given)[0]}
        if self.step < self.algorithm.warmup * self.steps:
            return {**found, "loss_actor": loss.actor_bc_loss(given)[0]}
        return {**found, "loss_actor": loss.actor_loss(given)[0]}


if __name__ == "__main__":
    command(CQL)
