"""Our networks as TorchRL's losses want them: modules that read and write tensordicts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from policies.offline.actor import Actor, Standard, mlp
from rbm.errors import UserError

if TYPE_CHECKING:
    from policies.offline.learning import Batch


def load_torchrl() -> tuple[Any, Any]:
    """The packages `tensordict` and `torchrl`.

    Raises:
        UserError: they are not installed.
    """
    # TorchRL imports MuJoCo, which chooses how to render when it is imported
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    try:
        import tensordict.nn
        import torchrl.modules
        import torchrl.objectives
    except ImportError as error:
        raise UserError(f"IQL and CQL need TorchRL ({error}): pip install 'robot-rbm[rl]'") from error
    return tensordict, torchrl


class Critic(nn.Module):
    """Q(s, a), or V(s) without an action: a network on standardised observations, one number each."""

    def __init__(self, standard: Standard, actions: int, hidden: Sequence[int], layer_norm: bool) -> None:
        super().__init__()
        # a copy: TorchRL takes the parameters and buffers of each network apart
        self.standard = Standard(len(standard.mean))
        self.standard.load_state_dict(standard.state_dict())
        self.net = mlp(len(standard.mean) + actions, hidden, 1, layer_norm)

    def forward(self, observations: Tensor, *actions: Tensor) -> Tensor:
        found: Tensor = self.net(torch.cat([self.standard(observations), *actions], -1))
        return found


class _Distribution(nn.Module):
    """The actor's location and spread; the tanh is on the location, or left to the distribution."""

    def __init__(self, actor: Actor, squashed: bool) -> None:
        super().__init__()
        self.actor, self.squashed = actor, squashed

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        loc = self.actor.mean(observations) if self.squashed else self.actor(observations)
        return loc, self.actor.std().expand_as(loc)


def as_actor(actor: Actor, squashed: bool) -> Any:
    """The actor as a `ProbabilisticActor`: a normal around tanh(m), or if `squashed` the tanh of a normal around m."""
    tensordict, torchrl = load_torchrl()
    module = tensordict.nn.TensorDictModule(
        _Distribution(actor, squashed), in_keys=["observation"], out_keys=["loc", "scale"]
    )
    kind = torchrl.modules.TanhNormal if squashed else torchrl.modules.IndependentNormal
    return torchrl.modules.ProbabilisticActor(
        module=module, in_keys=["loc", "scale"], distribution_class=kind, return_log_prob=False
    )


def as_critic(critic: Critic, of_actions: bool) -> Any:
    tensordict, _ = load_torchrl()
    keys = (["observation", "action"], ["state_action_value"]) if of_actions else (["observation"], ["state_value"])
    return tensordict.nn.TensorDictModule(critic, in_keys=keys[0], out_keys=keys[1])


def as_tensordict(batch: Batch) -> Any:
    """A batch under the names that TorchRL's losses read."""
    tensordict, _ = load_torchrl()
    terminated = batch.terminated[:, None]
    after = {
        "observation": batch.next_observations,
        "reward": batch.rewards[:, None],
        "terminated": terminated,
        "done": terminated,
    }
    found = {"observation": batch.observations, "action": batch.actions, "next": after}
    return tensordict.TensorDict(found, batch_size=[len(batch)])
