"""The policy that all offline algorithms learn: a small network from observations to actions."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rbm.errors import UserError
from rbm.output import whole_file

Floats = NDArray[np.float32]

CONFIG, WEIGHTS = "policy.json", "policy.safetensors"

_LEAST_STD = 1e-2
"""An observation that hardly moves (a goal that stands still) is not blown up."""

_LOG_STD = (-3.0, 0.5)


def mlp(inputs: int, hidden: Sequence[int], outputs: int, layer_norm: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them, each normalised before it if asked for."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers.append(nn.Linear(inputs, width))
        if layer_norm:
            layers.append(nn.LayerNorm(width))
        layers.append(nn.ReLU())
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class Standard(nn.Module):
    """Observations with mean 0 and spread 1, as measured on the data; saved with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def fit(self, observations: Tensor) -> None:
        self.mean.copy_(observations.mean(0))
        self.std.copy_(observations.std(0, unbiased=False).clamp_min(_LEAST_STD))

    def forward(self, observations: Tensor) -> Tensor:
        return (observations - self.mean) / self.std


class Actor(nn.Module):
    """Observations (…, D) to actions (…, A) from −1 to 1.

    The network's output m gives the action tanh(m). For losses that need a distribution it is a normal around tanh(m),
    or the tanh of a normal around m, with one spread for each of the A numbers, the same everywhere.

    Args:
        observation_size, action_size: D and A.
        hidden: widths of the hidden layers.
        layer_norm: whether they are normalised.
    """

    def __init__(
        self, observation_size: int, action_size: int, hidden: Sequence[int] = (256, 256), layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.config = {
            "observation_size": observation_size,
            "action_size": action_size,
            "hidden": list(hidden),
            "layer_norm": layer_norm,
        }
        self.standard = Standard(observation_size)
        self.net = mlp(observation_size, hidden, action_size, layer_norm)
        self.log_std = nn.Parameter(torch.full((action_size,), -0.5))

    def mean(self, observations: Tensor) -> Tensor:
        """m, before the tanh."""
        found: Tensor = self.net(self.standard(observations))
        return found

    def std(self) -> Tensor:
        return self.log_std.clamp(*_LOG_STD).exp()

    def forward(self, observations: Tensor) -> Tensor:
        """The most likely action, tanh(m)."""
        return torch.tanh(self.mean(observations))

    def act(self, observations: NDArray[np.floating]) -> Floats:
        """Actions float32 (A,) or (N, A) for observations (D,) or (N, D).

        Raises:
            UserError: observations of another size.
        """
        given = np.asarray(observations, np.float32)
        if given.ndim not in (1, 2) or given.shape[-1] != self.config["observation_size"]:
            raise UserError(
                f"observations of shape {given.shape} do not fit this policy: it takes (N, D) with "
                f"D = {self.config['observation_size']}"
            )
        with torch.inference_mode():
            actions: Floats = self(torch.from_numpy(given)).numpy()
        return actions

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `policy.json` and `policy.safetensors` into a folder, which is made."""
        from safetensors.torch import save_file

        at = Path(folder)
        at.mkdir(parents=True, exist_ok=True)
        with whole_file(at / WEIGHTS) as temporary:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, temporary)
        with whole_file(at / CONFIG) as temporary:
            temporary.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Actor:
        """The policy that `save` wrote.

        Raises:
            UserError: there is none, or its files do not belong together.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        at = Path(folder)
        try:
            actor = cls(**json.loads((at / CONFIG).read_text(encoding="utf-8")))
            actor.load_state_dict(load_file(at / WEIGHTS))
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{at} holds no policy that can be read ({CONFIG}, {WEIGHTS}): {error}") from error
        return actor.eval()
