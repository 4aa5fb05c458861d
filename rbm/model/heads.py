"""The heads and the progress bins.

Head: Linear(d, d/2) -> LayerNorm -> GELU -> Dropout -> Linear(d/2, out), the published shape
(indices 0, 1, 4 carry weights). Progress is a distribution over K bins with centres
linspace(0, 1, K): its mean is the progress, its standard deviation says how sure the model is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PROGRESS_BINS = 10


class Head(nn.Sequential):
    """hidden (..., d) -> (..., out)."""

    def __init__(self, hidden: int, out: int, dropout: float = 0.1) -> None:
        super().__init__(
            nn.Linear(hidden, hidden // 2),
            nn.LayerNorm(hidden // 2),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden // 2, out),
        )


def bin_centres(bins: int, like: Tensor) -> Tensor:
    """float (K,): linspace(0, 1, K) on the device of `like`."""
    return torch.linspace(0, 1, bins, device=like.device, dtype=torch.float32)


def progress_moments(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the bin distribution: logits (..., K) -> two float32 (...).

    A single logit (K = 1) is a value through a sigmoid; it says nothing of its spread: nan.
    """
    if logits.shape[-1] == 1:
        value = logits.float().squeeze(-1).sigmoid()
        return value, torch.full_like(value, torch.nan)
    probability = logits.float().softmax(-1)
    centres = bin_centres(logits.shape[-1], logits)
    mean = probability @ centres
    variance = (probability * (centres - mean[..., None]).square()).sum(-1)
    return mean, variance.sqrt()


def two_hot(target: Tensor, bins: int) -> Tensor:
    """Distribution over the bins whose mean is the target: float32 (...) in [0, 1] -> (..., K).

    With x = t (K-1) and k = floor(x), bin k gets 1 - (x - k) and bin k+1 gets x - k.
    """
    x = target.float().clamp(0, 1) * (bins - 1)
    lower = x.floor().clamp(max=bins - 2)
    weight = x - lower
    index = lower.long()
    out = torch.zeros(*target.shape, bins, device=target.device)
    out.scatter_(-1, index[..., None], (1 - weight)[..., None])
    out.scatter_add_(-1, index[..., None] + 1, weight[..., None])
    return out
