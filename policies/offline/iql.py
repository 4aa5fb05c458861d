"""Implicit Q-learning (Kostrikov, Nair, Levine 2021) with TorchRL's `IQLLoss`.

    python -m policies.offline.iql transitions.npz --out runs/iql

V follows an expectile of Q over the actions of the data, Q follows r + γV(s′), and the policy is cloned from the data
with weight exp(temperature · (Q − V)), at most 100. So nothing is ever asked of actions that the data does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from policies.offline.learning import Algorithm, Batch, Learning, command
from policies.offline.torchrl_losses import Critic, as_actor, as_critic, as_tensordict, load_torchrl
from policies.transitions import Transitions
from rbm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class IQL(Algorithm):
    """Implicit Q-learning.

    Attributes:
        discount: γ.
        expectile: of Q that V follows; .5 the mean, towards 1 the best action of the data.
        temperature: of the weights; 0 clones everything alike.
        tau: how much of Q goes into its target after each update.
    """

    discount: float = 0.98
    expectile: float = 0.8
    temperature: float = 5.0
    tau: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.discount < 1:
            raise UserError(f"discount={self.discount} must be from 0 to below 1")
        if not 0 < self.expectile < 1:
            raise UserError(f"expectile={self.expectile} must be between 0 and 1")
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature} must be 0 or more")

    def start(self, data: Transitions, seed: int = 0, steps: int | None = None) -> Learning:
        return _Learning(self, data, seed, steps)


class _Learning(Learning):
    algorithm: IQL

    def _build(self) -> nn.Module:
        _, torchrl = load_torchrl()
        numbers, sizes = self.algorithm, (self.algorithm.hidden, self.algorithm.layer_norm)
        actions = self.data.actions.shape[1]
        loss = torchrl.objectives.IQLLoss(
            as_actor(self.actor, squashed=False),
            # both given: TorchRL would start a copy with other weights from the global generator
            [as_critic(Critic(self.actor.standard, actions, *sizes), of_actions=True) for _ in range(2)],
            as_critic(Critic(self.actor.standard, 0, *sizes), of_actions=False),
            loss_function="l2",
            temperature=numbers.temperature,
            expectile=numbers.expectile,
        )
        loss.make_value_estimator(gamma=numbers.discount)
        self._targets = torchrl.objectives.SoftUpdate(loss, tau=numbers.tau)
        built: nn.Module = loss
        return built

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        found = self.networks(as_tensordict(batch))
        return {name: found[name] for name in ("loss_actor", "loss_qvalue", "loss_value")}


if __name__ == "__main__":
    command(IQL)
