"""What offline algorithms share: the data as tensors, a loop that can be stopped at any step, one optimiser.

An `Algorithm` is numbers only, so that a configuration can name one (`_target_`); `start` makes a `Learning`, the
networks and everything that changes. A `Learning` that is saved and loaded goes on as the unbroken one would have:
weights, targets, the optimiser's moments and the state of the random numbers are saved.
"""

from __future__ import annotations

import argparse
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from policies.offline.actor import Actor
from policies.transitions import Transitions
from rbm.errors import UserError
from rbm.output import whole_file


@dataclass(frozen=True)
class Batch:
    """Rows of the data: float32 (N, D), (N, A), (N,), (N, D), bool (N,), and float32 (N,) weights of the rows."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminated: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.observations)

    def at(self, rows: Tensor) -> Batch:
        return Batch(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def check(data: Transitions) -> None:
    """Refuses data that nothing can be learned from.

    Raises:
        UserError: no transitions, numbers that are not finite, actions beyond −1 to 1.
    """
    if not len(data.observations):
        raise UserError("there are no transitions to learn from: give data with at least one episode")
    for name in ("observations", "actions", "rewards", "next_observations"):
        finite = np.isfinite(np.asarray(getattr(data, name))).reshape(len(data.observations), -1).all(1)
        if not finite.all():
            raise UserError(f"{name} of transition {int(finite.argmin())} are not finite: mend the data, or relabel it")
    if np.abs(data.actions).max() > 1 + 1e-4:
        raise UserError(
            f"actions reach {np.abs(data.actions).max():.3g}, but the policies here act from -1 to 1: scale them first"
        )


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """Numbers that every algorithm has; a subclass adds its own.

    Attributes:
        steps: updates.
        batch: transitions in each, drawn with replacement.
        rate: of Adam at the start; it falls to 0 along half a cosine.
        hidden, layer_norm: of all networks.
    """

    steps: int = 5_000
    batch: int = 128
    rate: float = 1e-3
    hidden: Sequence[int] = (256, 256)
    layer_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise UserError(f"rate={self.rate} must be above 0")

    @abstractmethod
    def start(self, data: Transitions, seed: int = 0, steps: int | None = None) -> Learning:
        """Networks and optimiser before the first update.

        Raises:
            UserError: data that nothing can be learned from (`check`).
        """

    def train(
        self,
        data: Transitions,
        *,
        seed: int = 0,
        steps: int | None = None,
        every: int = 1_000,
        watch: Callable[[Learning], None] | None = None,
    ) -> Actor:
        """Learn from `data`; the same seed gives the same policy again.

        Args:
            seed: of weights and draws.
            steps: updates; none for the algorithm's own.
            every, watch: `watch` is called after every so many updates, and after the last.

        Raises:
            UserError: data that nothing can be learned from (`check`).
        """
        learning = self.start(data, seed, steps)
        while learning.step < learning.steps:
            learning.advance(min(every, learning.steps - learning.step))
            if watch is not None:
                watch(learning)
        return learning.actor.eval()


class Learning(ABC):
    """An algorithm at work.

    Attributes:
        actor: the policy as it is now.
        step: updates done, of `steps`.
        metrics: losses of the last update.
    """

    def __init__(self, algorithm: Algorithm, data: Transitions, seed: int, steps: int | None) -> None:
        check(data)
        self.algorithm, self.steps, self.step = algorithm, algorithm.steps if steps is None else steps, 0
        if self.steps < 1:
            raise UserError(f"steps={self.steps} must be at least 1")
        self.metrics: dict[str, float] = {}
        observations, actions, rewards, following = (
            torch.from_numpy(np.ascontiguousarray(getattr(data, name), np.float32))
            for name in ("observations", "actions", "rewards", "next_observations")
        )
        terminated = torch.from_numpy(np.asarray(data.terminated, bool))
        self.data = Batch(observations, actions, rewards, following, terminated, torch.ones(len(observations)))
        self._targets: Any = None
        """Moves copies of networks after them with each `step()`, where an algorithm has such copies."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = Actor(
                self.data.observations.shape[1], self.data.actions.shape[1], algorithm.hidden, algorithm.layer_norm
            )
            self.actor.standard.fit(self.data.observations)
            self.networks = self._build()
            self._rng = torch.get_rng_state()
        self.optimizer = torch.optim.Adam([p for p in self.networks.parameters() if p.requires_grad], algorithm.rate)

    @abstractmethod
    def _build(self) -> nn.Module:
        """All that is learned, the actor in it; called once, with the seed set."""

    @abstractmethod
    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """Terms of the loss, which are added; their gradients do not mix."""

    def _draw(self) -> Batch:
        return self.data.at(torch.randint(len(self.data), (self.algorithm.batch,)))

    def advance(self, steps: int) -> None:
        """Makes so many updates."""
        losses: dict[str, Tensor] = {}
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._rng)
            for _ in range(steps):
                for group in self.optimizer.param_groups:
                    group["lr"] = self.algorithm.rate * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
                losses = self._losses(self._draw())
                self.optimizer.zero_grad(set_to_none=True)
                torch.stack(list(losses.values())).sum().backward()
                self.optimizer.step()
                if self._targets is not None:
                    self._targets.step()
                self.step += 1
            self._rng = torch.get_rng_state()
        self.metrics = {name: float(value.detach()) for name, value in losses.items()}
        if not all(map(math.isfinite, self.metrics.values())):
            raise UserError(f"the losses are not finite after {self.step} updates: lower rate, or scale the rewards")

    def save(self, path: Path) -> None:
        """Writes everything that the next update depends on."""
        with whole_file(path) as temporary:
            torch.save(
                {
                    "step": self.step,
                    "networks": dict(self.networks.state_dict()),
                    "optimizer": self.optimizer.state_dict(),
                    "rng": self._rng,
                },
                temporary,
            )

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote.

        Raises:
            UserError: the file is of another algorithm, of other sizes, or broken.
        """
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            self.networks.load_state_dict(state["networks"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self._rng = int(state["step"]), state["rng"]
        except Exception as error:  # torch raises many kinds for a broken file
            raise UserError(f"cannot go on from {path}: {error}; delete it to start again") from error


def command(algorithm: type[Algorithm], arguments: Sequence[str] | None = None) -> None:
    """What `python -m policies.offline.<algorithm> data.npz --out folder` does."""
    parser = argparse.ArgumentParser(description=(algorithm.__doc__ or "").partition("\n")[0])
    parser.add_argument("data", help="transitions with rewards (.npz)")
    parser.add_argument("--out", required=True, help="folder for the policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=algorithm.steps)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)

    def watch(learning: Learning) -> None:
        print(learning.step, {name: round(value, 4) for name, value in learning.metrics.items()}, flush=True)

    try:
        actor = algorithm().train(Transitions.load(given.data), seed=given.seed, steps=given.steps, watch=watch)
        actor.save(os.fspath(given.out))
    except UserError as error:
        parser.error(str(error))
