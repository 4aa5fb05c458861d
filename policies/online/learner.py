"""Soft actor-critic of stable-baselines3, stepped by hand, so that a stopped run goes on as if it had not been.

What is ours here: layer-normalised critics, batches that are half demonstrations (Ball et al. 2023, arXiv 2302.02948),
and a state of tensors and plain values alone.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.sac.policies import SACPolicy
from torch import nn

from policies.demonstrations import Demonstration
from rbm.errors import UserError

Floats = NDArray[np.float32]

_COLUMNS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


class NormedCritic(ContinuousCritic):
    """Critics with a LayerNorm behind every hidden layer: they do not run away where data is scarce."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for number, network in enumerate(self.q_networks):
            layers: list[nn.Module] = []
            for layer in network.children():
                layers.append(layer)
                if isinstance(layer, nn.Linear) and layer.out_features > 1:
                    layers.append(nn.LayerNorm(layer.out_features))
            self.q_networks[number] = nn.Sequential(*layers)
            setattr(self, f"qf{number}", self.q_networks[number])


class NormedPolicy(SACPolicy):
    def make_critic(self, features_extractor: Any = None) -> ContinuousCritic:
        return NormedCritic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)


class HalfDemonstrations(ReplayBuffer):
    """A replay buffer; where it was given demonstrations, half of each batch is theirs."""

    demonstrations: ReplayBuffer | None = None

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        if self.demonstrations is None:
            return super().sample(batch_size, env)
        shown = self.demonstrations.sample(batch_size // 2)
        own = super().sample(batch_size - batch_size // 2)
        joined = [torch.cat([a, b]) for a, b in zip(own[:5], shown[:5], strict=True)]
        return ReplayBufferSamples(*joined)


class Learner:
    """One SAC.

    Args:
        observations, actions: spaces; actions a finite box.
        seed: of weights, exploration and batches; it sets the global generators of numpy and PyTorch.
        gamma, rate, batch, hidden: discount, learning rate, batch size, units of the two hidden layers.
        layer_norm: in the critics.
        entropy: α at the start; it is learned.
        target_entropy: as a share of −(dimensions of an action).
        capacity: transitions that are kept.
        demonstrations: they fill half of each batch.

    Raises:
        UserError: a number out of its range.
    """

    def __init__(
        self,
        observations: gymnasium.spaces.Box,
        actions: gymnasium.spaces.Box,
        *,
        seed: int,
        gamma: float = 0.97,
        rate: float = 3e-4,
        batch: int = 256,
        hidden: int = 256,
        layer_norm: bool = True,
        entropy: float = 0.1,
        target_entropy: float = 0.5,
        capacity: int = 100_000,
        demonstrations: list[Demonstration] | None = None,
    ) -> None:
        for name, value, least, most in (
            ("gamma", gamma, 0.0, 1.0),
            ("rate", rate, 1e-12, 1.0),
            ("batch", batch, 2, 1e9),
            ("hidden", hidden, 1, 1e9),
            ("entropy", entropy, 1e-12, 1e9),
            ("capacity", capacity, 1, 1e12),
        ):
            if not least <= value <= most:
                raise UserError(f"{name}={value} of a learner must be from {least:g} to {most:g}")
        set_random_seed(seed)
        size = int(np.prod(actions.shape))
        self._batch = batch
        self.sac = SAC(
            NormedPolicy if layer_norm else SACPolicy,
            None,  # type: ignore[arg-type]
            learning_rate=rate,
            batch_size=batch,
            buffer_size=capacity,
            gamma=gamma,
            ent_coef=f"auto_{entropy}",
            target_entropy=-target_entropy * size,
            policy_kwargs={"net_arch": [hidden, hidden]},
            replay_buffer_class=HalfDemonstrations,
            seed=seed,
            device="cpu",
            _init_setup_model=False,
        )
        self.sac.observation_space, self.sac.action_space, self.sac.n_envs = observations, actions, 1
        self.sac._setup_model()
        self.sac.set_logger(Logger(None, []))
        self.buffer = self.sac.replay_buffer
        assert isinstance(self.buffer, HalfDemonstrations)
        if demonstrations:
            shown = ReplayBuffer(sum(map(len, demonstrations)), observations, actions, "cpu")
            for demo in demonstrations:
                self._fill(shown, demo)
            self.buffer.demonstrations = shown

    def act(self, observation: Floats, explore: bool) -> Floats:
        """An action in the box for an observation (D,)."""
        action, _ = self.sac.predict(observation, deterministic=not explore)
        return np.asarray(action, np.float32)

    def add(
        self, before: Floats, action: Floats, reward: float, after: Floats, terminated: bool, truncated: bool
    ) -> None:
        """Remember a transition; a truncation is no end."""
        assert self.buffer is not None
        self._add(self.buffer, before, action, reward, after, terminated, truncated)

    def learn(self, updates: int) -> None:
        """So many gradient steps.

        Raises:
            UserError: the networks are no numbers any more.
        """
        self.sac.train(updates, self._batch)
        if not all(torch.isfinite(values).all() for values in self.sac.policy.parameters()):
            raise UserError(f"weights are not finite after {self.sac._n_updates} updates: lower rate, or scale rewards")

    def state(self) -> dict[str, Any]:
        """All that is needed to go on: tensors and plain values."""
        sac, buffer = self.sac, self.buffer
        assert buffer is not None
        assert sac.ent_coef_optimizer is not None
        filled = buffer.size()
        name, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 (what the buffer draws from)
        return {
            "policy": sac.policy.state_dict(),
            "actor_optimizer": sac.actor.optimizer.state_dict(),
            "critic_optimizer": sac.critic.optimizer.state_dict(),
            "entropy": _there(sac.log_ent_coef).detach(),
            "entropy_optimizer": sac.ent_coef_optimizer.state_dict(),
            "updates": sac._n_updates,
            "buffer": {column: torch.from_numpy(getattr(buffer, column)[:filled].copy()) for column in _COLUMNS},
            "place": (buffer.pos, buffer.full),
            "torch": torch.get_rng_state(),
            "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has_gauss, gauss),
        }

    def take(self, state: dict[str, Any]) -> None:
        """The networks of `state` and how they were trained, but nothing that was remembered."""
        sac = self.sac
        assert sac.ent_coef_optimizer is not None
        sac.policy.load_state_dict(state["policy"])
        sac.actor.optimizer.load_state_dict(state["actor_optimizer"])
        sac.critic.optimizer.load_state_dict(state["critic_optimizer"])
        with torch.no_grad():
            _there(sac.log_ent_coef).copy_(state["entropy"])
        sac.ent_coef_optimizer.load_state_dict(state["entropy_optimizer"])
        sac._n_updates = state["updates"]

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.take(state)
        buffer = self.buffer
        assert buffer is not None
        for column, values in state["buffer"].items():
            getattr(buffer, column)[: len(values)] = values.numpy()
        buffer.pos, buffer.full = state["place"]
        torch.set_rng_state(state["torch"])
        name, keys, place, has_gauss, gauss = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), place, has_gauss, gauss))  # noqa: NPY002

    def _fill(self, buffer: ReplayBuffer, demo: Demonstration) -> None:
        for step in range(len(demo)):
            last = step == len(demo) - 1
            ended = last and demo.terminated
            self._add(
                buffer,
                demo.observations[step],
                demo.actions[step],
                float(demo.rewards[step]),
                demo.observations[step + 1],
                ended,
                last and not ended,
            )

    def _add(
        self,
        buffer: ReplayBuffer,
        before: Floats,
        action: Floats,
        reward: float,
        after: Floats,
        terminated: bool,
        truncated: bool,
    ) -> None:
        buffer.add(
            before[None],
            after[None],
            self.sac.policy.scale_action(action)[None],
            np.array([reward], np.float32),
            np.array([terminated or truncated]),
            [{"TimeLimit.truncated": truncated and not terminated}],
        )


def _there(entropy: torch.Tensor | None) -> torch.Tensor:
    assert entropy is not None
    return entropy
