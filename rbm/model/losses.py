"""The losses. Every one is a sum over this micro-batch divided by a count of the optimiser batch.

So the losses (and gradients) of its micro-batches, added up, are exactly those of the whole batch,
however unevenly supervision falls on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rbm.model.batch import Counts, RewardOutput, Targets
from rbm.model.heads import symlog_share, two_hot


@dataclass(frozen=True)
class LossWeights:
    """Weights of the sum. The defaults are those with which two CPU cores learn ten tasks in minutes.

    `value` is the loss of progress in models without bins: l1 or l2. `remaining` matters to models that have that head.
    """

    progress: float = 1.0
    success: float = 0.5
    preference: float = 0.5
    value: str = "l2"
    remaining: float = 0.5

    def __post_init__(self) -> None:
        if self.value not in ("l1", "l2"):
            raise ValueError(f"loss.value must be l1 or l2, not {self.value!r}")


@dataclass(frozen=True)
class Losses:
    """Scalars; `total` is their weighted sum. `remaining` is none for models without that head."""

    total: Tensor
    progress: Tensor
    success: Tensor
    preference: Tensor
    remaining: Tensor | None = None


def progress_loss(logits: Tensor, target: Tensor, mask: Tensor, count: int, value_loss: str = "l2") -> Tensor:
    """Cross entropy against the two-hot target: -(1/count) sum_f mask_f sum_k q_fk log p_fk.

    With a single logit (K = 1) |v - t| (`l1`) or (v - t)^2 (`l2`) of its sigmoid v instead.
    """
    if logits.shape[-1] == 1:
        off = logits.float().squeeze(-1).sigmoid() - target
        each = off.abs() if value_loss == "l1" else off.square()
    else:
        each = -(two_hot(target, logits.shape[-1]) * logits.float().log_softmax(-1)).sum(-1)
    return torch.where(mask, each, 0.0).sum() / max(count, 1)


def success_loss(logits: Tensor, target: Tensor, mask: Tensor, positives: int, negatives: int) -> Tensor:
    """Binary cross entropy, both classes weighing the same: (mean over positives + mean over negatives) / 2.

    Where the batch has frames of one class only, that mean alone, still halved: a batch without a success
    must not weigh its failures double.
    """
    entropy = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    positive = mask & (target > 0.5)
    negative = mask & (target <= 0.5)
    positive_mean = torch.where(positive, entropy, 0.0).sum() / max(positives, 1)
    negative_mean = torch.where(negative, entropy, 0.0).sum() / max(negatives, 1)
    return (positive_mean + negative_mean) / 2


def preference_loss(logits: Tensor, target: Tensor, mask: Tensor, count: int) -> Tensor:
    """Binary cross entropy of "the first is better": (1/count) sum_p mask_p BCE(logit_p, label_p)."""
    entropy = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    return torch.where(mask, entropy, 0.0).sum() / max(count, 1)


def remaining_loss(logits: Tensor, seconds: Tensor, mask: Tensor, count: int) -> Tensor:
    """Cross entropy -(1/count) sum_f mask_f sum_k q_fk log p_fk, q the two-hot of log(1 + s) over R bins.

    Source: RynnValue (arXiv 2608.09853) has a head for the remaining seconds with such bins.
    """
    target = two_hot(symlog_share(seconds), logits.shape[-1])
    each = -(target * logits.float().log_softmax(-1)).sum(-1)
    return torch.where(mask, each, 0.0).sum() / max(count, 1)


def reward_losses(output: RewardOutput, targets: Targets, counts: Counts, weights: LossWeights) -> Losses:
    """The losses of a micro-batch and their weighted sum.

    Raises:
        ValueError: the output has no preference (the model was called without pairs), or the targets lack what a head
            of the model is trained on.
    """
    if output.preference_logits is None:
        raise ValueError("losses need the preference of pairs: call the model with pairs")
    progress = progress_loss(
        output.progress_logits, targets.progress, targets.progress_mask, counts.progress, weights.value
    )
    success = success_loss(
        output.success_logits,
        targets.success,
        targets.success_mask,
        counts.success_positive,
        counts.success_negative,
    )
    preference = preference_loss(
        output.preference_logits, targets.preference, targets.preference_mask, counts.preference
    )
    total = weights.progress * progress + weights.success * success + weights.preference * preference
    if output.remaining_logits is None:
        return Losses(total, progress, success, preference)
    if targets.remaining is None or targets.remaining_mask is None:
        raise ValueError("the model says how much time remains, and the targets do not")
    remaining = remaining_loss(output.remaining_logits, targets.remaining, targets.remaining_mask, counts.remaining)
    return Losses(total + weights.remaining * remaining, progress, success, preference, remaining)
