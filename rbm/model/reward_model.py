"""The reward model: a backbone, its heads, and how pairs are laid out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rbm.errors import UserError
from rbm.model.backbones import BACKBONES, Backbone, PairMode, backbone_class
from rbm.model.batch import ClipBatch, RewardOutput
from rbm.model.heads import PROGRESS_BINS, REMAINING_BINS, Head, progress_moments, remaining_moments
from rbm.model.memory import Memory


class RewardModel(nn.Module):
    """Progress and success for every frame, preference between clips.

    Args:
        backbone: turns instructions and frames into hidden states.
        context_frames: N, the most frames that the model was trained to see in one clip.
        pair: `isolated` (each clip sees the instruction and itself, both are supervised) or `causal`
            (the published layout: one stream, progress and success of the first clip only).
        preference: `utility` (a read-out g at the end of each clip, logit = g(A) - g(B): antisymmetric, N clips rank
            in N forwards) or `joint` (one token that sees both). `causal` has `joint` only.
        target: `absolute` (progress counts from the start of the trajectory) or `clip_relative`
            (from the start of the clip, as in published layouts). Stored, since scores mean it.
        dropout: in the heads, while training.
        progress_bins: K, of the distribution over progress; 1 for a single value through a sigmoid, without a spread.
        remaining: also say how many seconds remain until the task is done.

    Raises:
        ValueError: a combination of options that has no meaning.
    """

    success_temperature: Tensor
    success_bias: Tensor

    def __init__(
        self,
        backbone: Backbone,
        context_frames: int = 16,
        pair: str = "isolated",
        preference: str = "utility",
        target: str = "absolute",
        dropout: float = 0.1,
        progress_bins: int = PROGRESS_BINS,
        remaining: bool = False,
    ) -> None:
        super().__init__()
        if pair not in ("isolated", "causal"):
            raise ValueError(f"pair must be 'isolated' or 'causal', not {pair!r}")
        if preference not in ("utility", "joint"):
            raise ValueError(f"preference must be 'utility' or 'joint', not {preference!r}")
        if target not in ("absolute", "clip_relative"):
            raise ValueError(f"target must be 'absolute' or 'clip_relative', not {target!r}")
        if pair == "causal" and preference == "utility":
            raise ValueError("pair='causal' has one read-out for both clips: use preference='joint'")
        if context_frames < 2:
            raise ValueError(f"context_frames must be at least 2, not {context_frames}")
        if progress_bins < 1:
            raise ValueError(f"progress_bins must be at least 1, not {progress_bins}")
        self.backbone = backbone
        self.context_frames, self.pair, self.preference, self.target = context_frames, pair, preference, target
        self.dropout, self.progress_bins, self.remaining = dropout, progress_bins, remaining
        self.progress_head = Head(backbone.hidden, progress_bins, dropout)
        self.success_head = Head(backbone.hidden, 1, dropout)
        self.preference_head = Head(backbone.hidden, 1, dropout)
        if remaining:
            self.remaining_head = Head(backbone.hidden, REMAINING_BINS, dropout)
        # calibrated success = sigmoid(logit / temperature + bias), fitted on validation after training
        self.register_buffer("success_temperature", torch.ones(()))
        self.register_buffer("success_bias", torch.zeros(()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RewardModel:
        """Buffers (calibration, frequencies of the rotary encoding) keep their precision when weights become bf16."""
        before = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            owner, _, attribute = name.rpartition(".")
            module = self.get_submodule(owner)
            now = module.get_buffer(attribute)
            if now.dtype != buffer.dtype:
                setattr(module, attribute, buffer.to(now.device))
        return self

    def config(self) -> dict[str, Any]:
        """Everything needed to make the same architecture again, JSON-able."""
        return {
            "backbone": {"type": self.backbone.name, **self.backbone.config()},
            "context_frames": self.context_frames,
            "pair": self.pair,
            "preference": self.preference,
            "target": self.target,
            "dropout": self.dropout,
            "progress_bins": self.progress_bins,
            "remaining": self.remaining,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], files: Mapping[str, str] | None = None) -> RewardModel:
        """The architecture that `config()` and the backbone's `files()` describe, with random weights.

        Raises:
            UserError: a backbone that this version does not have, or options that it does not know.
        """
        options = dict(config)
        backbone = dict(options.pop("backbone", {}))
        name = backbone.pop("type", None)
        if name not in BACKBONES:
            raise UserError(f"backbone {name!r} does not exist here; there are: {', '.join(sorted(BACKBONES))}")
        try:
            return cls(backbone_class(name).from_config(backbone, files or {}), **options)
        except (TypeError, ValueError) as error:
            raise UserError(f"the model's configuration does not fit this version: {error}") from error

    def preprocess(self, frames: NDArray[np.uint8]) -> Tensor:
        """uint8 (T, H, W, 3), RGB, any size -> uint8 (T, h, w, 3), what `ClipBatch.frames` holds."""
        return self.backbone.preprocessor(frames)

    def forward(self, batch: ClipBatch, pairs: Tensor | None = None) -> RewardOutput:
        """Read a batch of clips; with `pairs` int64 (P, 2), rows of the batch, compare them too.

        With `utility` a clip may be in any number of pairs; with `joint` every clip must be in exactly one.
        """
        if self.preference == "utility":
            states = self.backbone(batch, PairMode.READOUT)
            utility = self.preference_head(self._for_heads(states.readouts)).squeeze(-1)
            compared = None if pairs is None else utility[pairs[:, 0]] - utility[pairs[:, 1]]
        else:
            utility = None
            mode = PairMode.CLIPS
            if pairs is not None:
                mode = PairMode.JOINT if self.pair == "isolated" else PairMode.CAUSAL
            states = self.backbone(batch, mode, pairs)
            compared = None if pairs is None else self.preference_head(self._for_heads(states.readouts)).squeeze(-1)
        return self._heads(states.frames, utility, compared)

    def advance(self, batch: ClipBatch, behind: Sequence[tuple[Memory, int]]) -> RewardOutput:
        """What is said of steps that follow what memories hold (`Backbone.advance`); without preference."""
        with torch.inference_mode():
            return self._heads(self.backbone.advance(batch, behind), None, None)

    def _heads(self, hidden: Tensor, utility: Tensor | None, compared: Tensor | None) -> RewardOutput:
        frames = self._for_heads(hidden)
        return RewardOutput(
            progress_logits=self.progress_head(frames),
            success_logits=self.success_head(frames).squeeze(-1),
            utility=utility,
            preference_logits=compared,
            remaining_logits=self.remaining_head(frames) if self.remaining else None,
        )

    def _for_heads(self, hidden: Tensor) -> Tensor:
        """Hidden states in the heads' precision, where a checkpoint holds them in another than the backbone."""
        return hidden.to(next(self.progress_head.parameters()).dtype)

    def decode(self, output: RewardOutput) -> tuple[Tensor, Tensor, Tensor]:
        """Progress, its standard deviation, and calibrated success probability: three float32 (F,)."""
        progress, spread = progress_moments(output.progress_logits)
        logits = output.success_logits.float() / self.success_temperature + self.success_bias
        return progress, spread, logits.sigmoid()

    def decode_remaining(self, output: RewardOutput) -> tuple[Tensor, Tensor]:
        """Seconds until the task is done, and their spread in seconds: two float32 (F,).

        Raises:
            ValueError: the model was made without `remaining`.
        """
        if output.remaining_logits is None:
            raise ValueError("this model does not say how much time remains: it was made with remaining=False")
        return remaining_moments(output.remaining_logits)

    def calibrate(self, temperature: float, bias: float) -> None:
        """Store what `rbm.model.calibration` fitted: success = sigmoid(logit / temperature + bias)."""
        self.success_temperature.fill_(temperature)
        self.success_bias.fill_(bias)

    def save_pretrained(self, folder: str, facts: dict[str, Any] | None = None) -> None:
        """Write `config.json`, the weights and the backbone's files; `facts` (corpus snapshot, ...) ride along."""
        from rbm.model.checkpoint import save

        save(self, folder, facts)

    @classmethod
    def from_pretrained(cls, place: str, dtype: str | torch.dtype | None = None) -> RewardModel:
        """Read a model, in eval mode, on the CPU.

        Args:
            place: a folder that `save_pretrained` wrote, a published checkpoint in either of its layouts, a Lightning
                checkpoint, one sharded by FSDP, a LoRA adapter's folder; or an id on the Hugging Face hub of one.
            dtype: of the weights; none for that in which they are stored.

        Raises:
            UserError: nothing is there, or what is there is truncated, of a newer version, or does not fit.
        """
        from rbm.model.checkpoint import load

        return load(place, dtype)
