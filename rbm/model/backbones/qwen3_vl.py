"""`qwen3_vl`: Qwen3-VL through transformers (arXiv 2511.21631), frames as pictures; reads published reward models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rbm.model.backbones.vlm import VisionLanguageBackbone
from rbm.model.packing import PACKED, Pack
from rbm.model.pixels import still_patches

HALF = (0.5, 0.5, 0.5)


class StillPatches(nn.Module):
    """The tower's patch embedding for still pictures, which show the same patch at every time: (n, 3 p²) -> (n, d).

    The convolution's weights are added up over time first, and it is a product of matrices: a fifth of its time.
    """

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        self.proj = proj  # under its old name: its weights are those of any checkpoint

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.sum(2, dtype=torch.float32).flatten(1).to(self.proj.weight.dtype)
        return F.linear(patches.to(weight.dtype), weight, self.proj.bias)


class Qwen3VLBackbone(VisionLanguageBackbone):
    """Qwen3-VL of any size; arguments as in `VisionLanguageBackbone`."""

    name = "qwen3_vl"

    def _build(self, architecture: dict[str, Any]) -> Any:
        from transformers import Qwen3VLConfig, Qwen3VLModel

        architecture.pop("model_type", None)
        config: Any = Qwen3VLConfig(**architecture)
        if max(config.vision_config.deepstack_visual_indexes, default=0) >= config.vision_config.depth:
            raise ValueError("deepstack_visual_indexes names a block that the tower does not have")
        model = Qwen3VLModel._from_config(config, attn_implementation=PACKED)
        vision = model.config.vision_config
        self.unit = vision.patch_size * vision.spatial_merge_size
        model.visual.patch_embed = StillPatches(model.visual.patch_embed.proj)
        return model

    @property
    def language(self) -> Any:
        return self.model.language_model

    @property
    def tower(self) -> Any:
        return self.model.visual

    def _encode(self, frames: Tensor) -> Tensor:
        vision = self.model.config.vision_config
        U, h, w = frames.shape[:3]
        # x / 127.5 - 1 in float32, as `normalised` does it for a mean and spread of a half
        cut = still_patches(frames, vision.patch_size, vision.spatial_merge_size).float().sub_(127.5).mul_(1 / 127.5)
        grid = torch.tensor([[1, h // vision.patch_size, w // vision.patch_size]], device=frames.device).expand(U, 3)
        # one run of attention over pictures of one size, not one a picture
        whole = torch.tensor([0, len(cut)], dtype=torch.int32, device=frames.device)
        found = self.tower(cut, grid_thw=grid, cu_seqlens=whole, pictures=U)
        levels = torch.stack([found.pooler_output, *found.deepstack_features], 1)  # (U rows columns, levels, d)
        rows, columns = h // self.unit, w // self.unit
        return levels.unflatten(0, (U, rows, columns)).permute(0, 3, 1, 2, 4)

    def _read(self, x: Tensor, pack: Pack, features: Tensor) -> Tensor:
        there = torch.zeros(1, len(x), dtype=torch.bool, device=x.device)
        there[0, pack.picture] = True
        found = self.language(
            inputs_embeds=x[None],
            position_ids=pack.position[:, None],
            use_cache=False,
            streams=pack.streams,
            visual_pos_masks=there,
            deepstack_visual_embeds=list(features[:, 1:].unbind(1)) or None,
        )
        hidden: Tensor = found.last_hidden_state[0]
        return hidden
