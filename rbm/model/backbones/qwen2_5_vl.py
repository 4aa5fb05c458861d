"""`qwen2_5_vl`: Qwen2.5-VL through transformers (arXiv 2502.13923), frames as pictures."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rbm.errors import UserError
from rbm.model.backbones.vlm import VisionLanguageBackbone
from rbm.model.packing import PACKED
from rbm.model.pixels import normalised, patches
from rbm.model.weights import State

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the model's pixels (those of CLIP)."""

WINDOWED = "rbm_windowed"
"""The name of the tower's attention in transformers."""


def windowed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    pictures: int = 1,
    windows: tuple[int, ...] = (),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of pictures of one size: query, key, value (1, H, L, D) -> (1, L, H, D).

    A picture's places are ordered window by window, `windows` are their sizes. A module that is `windowed` attends
    within them, another within the picture; all pictures go at once.
    """
    q, k, v = (x[0].unflatten(1, (pictures, -1)).transpose(0, 1) for x in (query, key, value))  # (U, H, n, D)
    sizes = windows if module.windowed else (q.shape[2],)
    parts = zip(*(x.split(sizes, 2) for x in (q, k, v)), strict=True)
    seen = torch.cat([F.scaled_dot_product_attention(a, b, c, scale=scaling) for a, b, c in parts], 2)
    return seen.transpose(1, 2).flatten(0, 1)[None], None


class Qwen25VLBackbone(VisionLanguageBackbone):
    """Qwen2.5-VL of any size; arguments as in `VisionLanguageBackbone`."""

    name = "qwen2_5_vl"

    def _build(self, architecture: dict[str, Any]) -> Any:
        from transformers import AttentionInterface, Qwen2_5_VLConfig, Qwen2_5_VLModel

        AttentionInterface.register(WINDOWED, windowed_attention)
        architecture.pop("model_type", None)
        config = Qwen2_5_VLConfig(**architecture)
        parts = {"text_config": PACKED, "vision_config": WINDOWED}
        model = Qwen2_5_VLModel._from_config(config, attn_implementation=parts)
        if model.language_model.has_sliding_layers:
            raise UserError("this Qwen2.5-VL reads its text through a sliding window, which is not supported")
        vision = model.config.vision_config
        for number, block in enumerate(model.visual.blocks):
            block.attn.windowed = number not in vision.fullatt_block_indexes
        self.unit = vision.patch_size * vision.spatial_merge_size
        return model

    @property
    def language(self) -> Any:
        return self.model.language_model

    @property
    def tower(self) -> Any:
        return self.model.visual

    def base_keys(self, state: State) -> State:
        # files of before transformers 4.52 have the language model's tensors directly under `model.`
        older = re.compile(r"^model\.(?!language_model\.|visual\.)")
        return super().base_keys({older.sub("model.language_model.", name): x for name, x in state.items()})

    def _encode(self, frames: Tensor) -> Tensor:
        vision = self.model.config.vision_config
        U, h, w = frames.shape[:3]
        rows, columns = h // self.unit, w // self.unit
        pixels = normalised(frames, self.tower.patch_embed.proj.weight.dtype, MEAN, STD)
        cut = patches(pixels, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        grid = torch.tensor([[1, h // vision.patch_size, w // vision.patch_size]], device=frames.device).expand(U, 3)
        cells = torch.arange(rows * columns).view(rows, columns)
        side = vision.window_size // self.unit
        windows = [window.flatten() for band in cells.split(side) for window in band.split(side, 1)]
        order = torch.cat(windows) + torch.arange(U)[:, None] * len(cells.flatten())  # window by window in each picture
        # the attention knows pictures and windows: for transformers all is one run
        whole = torch.tensor([0, len(cut)], dtype=torch.int32, device=frames.device)
        found = self.tower(
            cut,
            grid_thw=grid,
            cu_seqlens=whole,
            cu_window_seqlens=whole,
            window_index=order.flatten().to(frames.device),
            pictures=U,
            windows=tuple(len(window) * vision.spatial_merge_size**2 for window in windows),
        )
        features: Tensor = found.pooler_output  # (U rows columns, d)
        return features.unflatten(0, (U, 1, rows, columns))
