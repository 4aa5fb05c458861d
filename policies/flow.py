"""A small flow-matching policy: from an observation and noise to a chunk of actions.

Trained by conditional flow matching (Lipman et al. 2023, arXiv 2210.02747) on straight paths: x_t = (1 − t) z + t a,
for noise z and a chunk of actions a, and the network learns the velocity a − z. Acting integrates it from z with a few
Euler steps. The noise decides which of the demonstrated ways it takes; `policies.online.dsrl` learns to choose it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policies.demonstrations import Demonstration
from rbm.errors import UserError
from rbm.output import whole_file

_FREQUENCIES = 4


class FlowPolicy(nn.Module):
    """Chunks of `chunk` actions of size `action` for observations of size `observation`.

    Observations are standardised with `mean` and `std`, float32 (observation,).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, observation: int, action: int, chunk: int, hidden: int = 256, layers: int = 3, steps: int = 5
    ) -> None:
        super().__init__()
        self.settings = {
            "observation": observation,
            "action": action,
            "chunk": chunk,
            "hidden": hidden,
            "layers": layers,
            "steps": steps,
        }
        self.chunk, self.action, self.steps = chunk, action, steps
        sizes = [observation + chunk * action + 2 * _FREQUENCIES, *[hidden] * layers]
        parts: list[nn.Module] = []
        for wide, narrow in pairwise(sizes):
            parts += [nn.Linear(wide, narrow), nn.GELU()]
        self.net = nn.Sequential(*parts, nn.Linear(hidden, chunk * action))
        self.register_buffer("mean", torch.zeros(observation))
        self.register_buffer("std", torch.ones(observation))

    def velocity(self, observations: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Where x (N, chunk · action) moves at time t (N, 1), for observations (N, observation)."""
        angles = t * torch.pi * torch.arange(1, _FREQUENCIES + 1, device=t.device)
        seen = (observations - self.mean) / self.std
        moved: Tensor = self.net(torch.cat([seen, x, angles.sin(), angles.cos()], -1))
        return moved

    def forward(self, observations: Tensor, noise: Tensor) -> Tensor:
        """Noise (N, chunk · action) to actions of the same shape, not clipped."""
        x = noise
        for step in range(self.steps):
            x = x + self.velocity(observations, x, torch.full_like(x[:, :1], step / self.steps)) / self.steps
        return x

    @torch.inference_mode()
    def act(self, observation: NDArray[np.float32], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """One chunk: float32 (observation,) and noise (chunk · action,) to (chunk, action) in [-1, 1]."""
        chunk = self(torch.from_numpy(observation)[None], torch.from_numpy(noise)[None])[0]
        found: NDArray[np.float32] = chunk.reshape(self.chunk, self.action).clamp(-1, 1).numpy()
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file, settings in its metadata."""
        from safetensors.torch import save_file

        with whole_file(Path(path)) as target:
            save_file(self.state_dict(), target, {"flow_policy": json.dumps(self.settings)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FlowPolicy:
        """What `save` wrote.

        Raises:
            UserError: it is no such file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), "pt") as file:
                policy = cls(**json.loads((file.metadata() or {})["flow_policy"]))
                policy.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{path} is no flow policy: give the file that was written for one ({error})") from error
        return policy.eval()


def chunks(demonstrations: Sequence[Demonstration], chunk: int) -> tuple[Tensor, Tensor]:
    """Every moment with the actions that follow: (N, observation), (N, chunk · action); the last action is repeated."""
    observations, actions = [], []
    for demo in demonstrations:
        padded = np.concatenate([demo.actions, np.repeat(demo.actions[-1:], chunk - 1, 0)])
        for step in range(len(demo)):
            observations.append(demo.observations[step])
            actions.append(padded[step : step + chunk].ravel())
    return torch.from_numpy(np.array(observations)), torch.from_numpy(np.array(actions))


def clone_flow(
    demonstrations: Sequence[Demonstration],
    chunk: int,
    seed: int,
    steps: int = 1500,
    batch: int = 256,
    rate: float = 1e-3,
) -> FlowPolicy:
    """A flow policy cloned from all of the demonstrations, good and bad.

    Raises:
        UserError: there are none.
    """
    if not demonstrations:
        raise UserError("there are no demonstrations to clone")
    observations, actions = chunks(demonstrations, chunk)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = FlowPolicy(observations.shape[1], actions.shape[1] // chunk, chunk)
        policy.mean.copy_(observations.mean(0))
        policy.std.copy_(observations.std(0).clamp_min(0.01))
        optimizer = torch.optim.AdamW(policy.net.parameters(), rate, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(0, len(observations), (batch,))
            noise, t = torch.randn_like(actions[rows]), torch.rand(batch, 1)
            x = (1 - t) * noise + t * actions[rows]
            loss = (policy.velocity(observations[rows], x, t) - (actions[rows] - noise)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return policy.eval()
