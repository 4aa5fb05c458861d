"""The LightningModule: one optimiser step over a batch of pairs."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from rbm.errors import UserError
from rbm.model import LossWeights, PairBatch, RewardModel, reward_losses
from rbm.model.adapter import fingerprint, plain_name
from rbm.training.parallel import outline, shard, summed, whole
from rbm.training.tuning import Tuning, named_parts

log = logging.getLogger(__name__)


class RewardModule(L.LightningModule):
    """Trains a `RewardModel` with AdamW, a linear warm-up and a cosine.

    Args:
        model: to be trained; changed in place by `tuning`.
        lr: peak learning rate. weight_decay: of matrices; biases, norms and embeddings have none.
        warmup: fraction of the steps in which the rate rises.
        loss: weights of the losses.
        seed: of dropout. Every step seeds itself, so a resumed run continues as the unbroken one.
        betas: of AdamW.
        final_lr: what the cosine ends at, as a fraction of the peak.
        tuning: what is trained; none for all that the backbone trains by default.

    Where the language model is frozen, checkpoints leave out what is not trained: a resumed run has it from where
    the first one had it, and a fingerprint tells whether it is the same.
    """

    def __init__(
        self,
        model: RewardModel,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        loss: LossWeights | None = None,
        seed: int = 0,
        betas: Sequence[float] = (0.9, 0.95),
        final_lr: float = 0.01,
        tuning: Tuning | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= final_lr <= 1:
            raise ValueError(f"final_lr is a fraction of lr, between 0 and 1, not {final_lr}")
        self.tuning = tuning or Tuning()
        self.tuning.apply(model)
        self.model = model
        self.betas, self.final_lr = (betas[0], betas[1]), final_lr
        self.lr, self.weight_decay, self.warmup, self.seed = lr, weight_decay, warmup, seed
        if model.backbone.freezes_tower and (tuning is None or tuning.language == "full") and lr > 1e-4:
            log.warning("lr=%g is much for all weights of a pretrained model: the published recipe has 2e-5", lr)
        self.loss_weights = loss or LossWeights()
        self._sums: dict[str, float] = defaultdict(float)
        self._outline: tuple[RewardModel, ...] = ()  # in a tuple, so that it is no part of this module

    def configure_model(self) -> None:
        """Under FSDP: share the model out over the processes."""
        if self.device_mesh is not None and not self._outline:
            self._outline = (outline(self.model),)
            shard(self.model, self.device_mesh, self.trainer.precision_plugin)

    def trained(self) -> RewardModel | None:
        """The model with all its weights; under FSDP the first process has it, all must ask, the others get none."""
        return whole(self.model, *self._outline) if self._outline else self.model

    def configure_optimizers(self) -> Any:
        tables = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Embedding)}
        vision_lr = self.tuning.vision_lr
        rates = [self.lr] if vision_lr is None else [self.lr, vision_lr]
        groups: list[dict[str, Any]] = [
            {"params": [], "lr": rate, "weight_decay": decay} for rate in rates for decay in (self.weight_decay, 0.0)
        ]
        for _, part, parameter in named_parts(self.model):
            if parameter.requires_grad:
                matrix = parameter.ndim >= 2 and id(parameter) not in tables
                own_rate = vision_lr is not None and part == "vision"
                groups[2 * own_rate + (not matrix)]["params"].append(parameter)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)
        total = self.trainer.max_steps

        def factor(step: int) -> float:
            return learning_rate_factor(step, total, self.warmup, self.final_lr)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _left_out(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a state dict is in no checkpoint: pretrained weights that are not trained."""
        sharded = isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy)  # reads files its own way
        if self.tuning.language == "full" or sharded:
            return {}
        return {
            f"model.{name}": state[f"model.{name}"]
            for name, part, parameter in named_parts(self.model)
            if part != "own" and not parameter.requires_grad
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if left_out := self._left_out(checkpoint["state_dict"]):
            checkpoint["left_out"] = _fingerprint(left_out)
            for name in left_out:
                del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "left_out" not in checkpoint:
            return
        left_out = self._left_out(self.state_dict())
        if _fingerprint(left_out) != checkpoint["left_out"]:
            raise UserError(
                "the weights that this run started from have changed since: bring them back as they were, "
                "or choose another run_dir"
            )
        checkpoint["state_dict"] |= left_out

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        place = (self.global_step * self.trainer.accumulate_grad_batches + batch_idx) * self.trainer.world_size
        torch.manual_seed(self.seed * 1_000_000_007 + place + self.trainer.global_rank)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        parts = self.trainer.accumulate_grad_batches
        losses = reward_losses(self.model(batch.clips, batch.pairs), batch.targets, batch.counts, self.loss_weights)
        for name in ("total", "progress", "success", "preference", "remaining"):
            if getattr(losses, name) is not None:
                self._sums[name] += float(getattr(losses, name).detach())
        if (batch_idx + 1) % parts == 0:
            # sums over the micro-batches and ranks are means over the optimiser batch
            rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
            sums = summed(self._sums)
            self.log_dict({f"train/{name}": value for name, value in sums.items()} | {"train/lr": rate})
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
        if losses.remaining is not None:
            values["val/remaining"] = losses.remaining
        self.log_dict(values, batch_size=len(batch.strategies))


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    """Of weights under the names that they have in a plain model."""
    return fingerprint({plain_name(name.removeprefix("model.")): tensor for name, tensor in state.items()})


def learning_rate_factor(step: int, total: int, warmup: float, final: float = 0.01) -> float:
    """Linear from 0 to 1 over the first `warmup` part of the steps, then a cosine down to `final`."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    way = min(1.0, (step - rise) / max(1, total - rise))
    return final + (1 - final) * (1 + math.cos(math.pi * way)) / 2
