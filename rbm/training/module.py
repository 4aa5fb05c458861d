"""The LightningModule: one optimiser step over a batch of pairs."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import lightning as L
import torch
from torch import Tensor

from rbm.model import LossWeights, PairBatch, RewardModel, reward_losses


class RewardModule(L.LightningModule):
    """Trains a `RewardModel` with AdamW, a linear warm-up and a cosine to a hundredth of the learning rate.

    Args:
        model: to be trained.
        lr: peak learning rate. weight_decay: of matrices; biases, norms and embeddings have none.
        warmup: fraction of the steps in which the rate rises.
        loss: weights of the three losses.
        seed: of dropout. Every step seeds itself, so a resumed run continues as the unbroken one.
    """

    def __init__(
        self,
        model: RewardModel,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        loss: LossWeights | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.lr, self.weight_decay, self.warmup, self.seed = lr, weight_decay, warmup, seed
        self.loss_weights = loss or LossWeights()
        self._sums: dict[str, float] = defaultdict(float)

    def configure_optimizers(self) -> Any:
        decayed: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim >= 2 and "embedding" not in name
                (decayed if matrix else others).append(parameter)
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))
        total = self.trainer.max_steps

        def factor(step: int) -> float:
            return learning_rate_factor(step, total, self.warmup)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        place = (self.global_step * self.trainer.accumulate_grad_batches + batch_idx) * self.trainer.world_size
        torch.manual_seed(self.seed * 1_000_000_007 + place + self.trainer.global_rank)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        parts = self.trainer.accumulate_grad_batches
        losses = reward_losses(self.model(batch.clips, batch.pairs), batch.targets, batch.counts, self.loss_weights)
        for name in ("total", "progress", "success", "preference"):
            self._sums[name] += float(getattr(losses, name).detach())
        if (batch_idx + 1) % parts == 0:
            # sums over the micro-batches are means over the optimiser batch (of this rank's share)
            rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
            self.log_dict({f"train/{name}": value for name, value in self._sums.items()} | {"train/lr": rate})
            self._sums.clear()
        # Lightning averages over micro-batches and ranks; these losses are shares of one sum
        return losses.total * parts * self.trainer.world_size

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        output = self.model(batch.clips, batch.pairs)
        losses = reward_losses(output, batch.targets, batch.counts, self.loss_weights)
        assert output.preference_logits is not None
        right = ((output.preference_logits > 0) == (batch.targets.preference > 0.5)) & batch.targets.preference_mask
        values = {
            "val/total": losses.total,
            "val/progress": losses.progress,
            "val/success": losses.success,
            "val/preference": losses.preference,
            "val/preference_accuracy": right.sum() / max(batch.counts.preference, 1),
        }
        self.log_dict(values, batch_size=len(batch.strategies))


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Linear from 0 to 1 over the first `warmup` part of the steps, then a cosine down to 0.01."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    way = min(1.0, (step - rise) / max(1, total - rise))
    return 0.01 + 0.99 * (1 + math.cos(math.pi * way)) / 2
