"""What is trained: everything, LoRA, or heads alone, and in which precision the rest is held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rbm.errors import UserError
from rbm.model import RewardModel
from rbm.model.adapter import add_lora

LANGUAGE = ("full", "lora", "none")
VISION = ("none", "full", "lora", "last")
FROZEN = (None, "bfloat16")

OWN = ("markers", "marker_embedding", "view_embedding", "frame_pool_attn")
"""Parts of a backbone that its pretrained model does not have: always trained, where they are used, like the heads."""


@dataclass(frozen=True)
class Tuning:
    """What is trained of a model. Heads, markers and embeddings of views always are.

    Attributes:
        language: of the language model (in `nano` all behind the frame encoder) `full` trains everything, its table of
            words too, `lora` low-rank additions to its matrices, `none` nothing.
        vision: the same of the vision tower; `last` trains its last blocks and what comes behind them. None: what the
            backbone is made for (`Backbone.freezes_tower`): `full` or `none`.
        vision_blocks: how many blocks `last` trains.
        vision_lr: peak learning rate of the tower; none for that of the others.
        lora: r and alpha (what is added to a matrix is alpha / r · B A) and dropout of LoRA.
        frozen_dtype: `bfloat16` holds what is not trained in two bytes a weight; what is trained is always float32.
            None: as it was loaded.
        gradient_checkpointing: hidden states of a block are computed again on the way back: less memory, more time.

    Raises:
        ValueError: a value that does not exist, or options that exclude each other.
    """

    language: str = "full"
    vision: str | None = None
    vision_blocks: int = 0
    vision_lr: float | None = None
    lora: Mapping[str, Any] = field(default_factory=lambda: {"r": 32, "alpha": 64, "dropout": 0.05})
    frozen_dtype: str | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("language", self.language, LANGUAGE),
            ("vision", self.vision, (None, *VISION)),
            ("frozen_dtype", self.frozen_dtype, FROZEN),
        ):
            if value not in choices:
                known = ", ".join("null" if choice is None else choice for choice in choices)
                raise ValueError(f"tuning.{name} must be one of {known}, not {value!r}")
        if (self.vision == "last") != (self.vision_blocks > 0):
            raise ValueError(
                "tuning.vision='last' needs tuning.vision_blocks of 1 or more, and nothing else has use for it"
            )
        if self.vision_lr is not None and self.vision == "none":
            raise ValueError("tuning.vision_lr has nothing to train: set tuning.vision to full, lora or last")
        unknown = sorted(set(self.lora) - {"r", "alpha", "dropout"})
        if unknown:
            raise ValueError(f"tuning.lora has r, alpha and dropout, not {', '.join(unknown)}")

    def apply(self, model: RewardModel) -> None:
        """Make the model ready to be trained, in place: LoRA put in, gradients on and off, precisions.

        Raises:
            UserError: this backbone has no such parts.
        """
        backbone = model.backbone
        vision = self.vision or ("none" if backbone.freezes_tower else "full")
        if self.vision_lr is not None and vision == "none":
            raise UserError(
                f"tuning.vision_lr has nothing to train: the tower of {backbone.name} is frozen unless tuning.vision "
                "is full, lora or last"
            )
        if self.language == "lora" or vision == "lora":
            add_lora(model, **self.lora, language=self.language == "lora", vision=vision == "lora")
        open_tower = self._open_tower(model, vision)
        for name, part, parameter in named_parts(model):
            if ".lora_" in name:
                parameter.requires_grad_(True)
            elif part == "vision":
                parameter.requires_grad_(vision == "full" or id(parameter) in open_tower)
            elif part == "language":
                parameter.requires_grad_(self.language == "full")
        self._set_precision(model)
        if self.gradient_checkpointing:
            switch = getattr(backbone, "set_gradient_checkpointing", None)
            if switch is None:
                raise UserError(
                    f"{backbone.name} has no gradient checkpointing: set tuning.gradient_checkpointing=false"
                )
            switch(True)

    def _open_tower(self, model: RewardModel, vision: str) -> set[int]:
        """Which parameters of the tower `last` trains: the last blocks, and all that is no block and no embedding."""
        if vision != "last":
            return set()
        tower, name = model.backbone.tower, model.backbone.name
        found = [
            (path, module)
            for path, module in tower.named_modules()
            if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] in ("blocks", "layers", "layer")
        ]
        if not found:
            raise UserError(f"the tower of {name} has no blocks: set tuning.vision to full or none")
        _, blocks = found[0]
        if self.vision_blocks > len(blocks):
            raise UserError(
                f"tuning.vision_blocks={self.vision_blocks}: the tower of this {name} has {len(blocks)} blocks"
            )
        shut = {id(x) for block in blocks[: -self.vision_blocks] for x in block.parameters()}
        return {id(x) for at, x in tower.named_parameters() if id(x) not in shut and "embed" not in at}

    def _set_precision(self, model: RewardModel) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
            elif self.frozen_dtype is not None:
                parameter.data = parameter.data.to(getattr(torch, self.frozen_dtype))
        if len({parameter.dtype for parameter in model.parameters()}) > 1:
            for module in model.modules():
                own = list(module.parameters(recurse=False))
                if not isinstance(module, nn.Embedding) and any(weight.requires_grad for weight in own):
                    module.register_forward_pre_hook(_in_own_precision)


def _in_own_precision(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What comes out of frozen layers in fewer bits is widened for trained ones; autocast sees to it by itself."""
    weight = next(module.parameters(recurse=False))
    if torch.is_autocast_enabled(weight.device.type):
        return inputs
    return tuple(x.to(weight.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def named_parts(model: RewardModel) -> list[tuple[str, str, nn.Parameter]]:
    """All parameters, in their order: name, `vision`, `language`, `own` or `frozen`, and the parameter."""
    tower = {id(parameter) for parameter in model.backbone.tower.parameters()}
    found = []
    for name, parameter in model.named_parameters():
        place = name.split(".")
        if id(parameter) in tower:
            part = "vision"
        elif place[0] == "backbone" and place[1] in model.backbone.never_trained:
            part = "frozen"
        else:
            part = "own" if place[0] != "backbone" or place[1] in OWN else "language"
        found.append((name, part, parameter))
    return found
