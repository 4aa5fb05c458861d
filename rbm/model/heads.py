"""The heads and the progress bins.

Head: Linear(d, d/2) -> LayerNorm -> GELU -> Dropout -> Linear(d/2, out), the published shape
(indices 0, 1, 4 carry weights). Progress is a distribution over K bins with centres
linspace(0, 1, K): its mean is the progress, its standard deviation says how sure the model is.

The time that remains (arXiv 2608.09853 predicts it beside progress) is a distribution over R bins that are even in
symlog(s) = log(1 + s): seconds matter near the end, minutes far from it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

PROGRESS_BINS = 10

REMAINING_BINS = 32
"""R. The centres are 0 s, 0.23 s, 0.51 s, ..., 488 s, 600 s: neighbours' 1 + s are in the ratio 601^(1/31) = 1.23."""

REMAINING_SECONDS = 600.0
"""The last centre; what takes longer counts as that long."""


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


def symlog_share(seconds: Tensor) -> Tensor:
    """Where a time stands among the bins: log(1 + s) / log(601), cut off at 0 and 1: float32 (...)."""
    return seconds.float().clamp(0, REMAINING_SECONDS).log1p() / math.log1p(REMAINING_SECONDS)


def remaining_centres(like: Tensor) -> Tensor:
    """float32 (R,): seconds at the centres of the bins, on the device of `like`."""
    return (bin_centres(REMAINING_BINS, like) * math.log1p(REMAINING_SECONDS)).expm1()


def remaining_moments(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Remaining seconds and their spread: logits (..., R) -> two float32 (...).

    The mean is taken of log(1 + s), as the target's two bins have it: exp(sum_k p_k log(1 + s_k)) - 1. The spread is
    sqrt(sum_k p_k (s_k - mean)^2), in seconds.
    """
    probability = logits.float().softmax(-1)
    mean = (probability @ bin_centres(REMAINING_BINS, logits) * math.log1p(REMAINING_SECONDS)).expm1()
    off = remaining_centres(logits) - mean[..., None]
    return mean, (probability * off.square()).sum(-1).sqrt()
