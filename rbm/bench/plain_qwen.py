"""The straightforward way to train a reward model on Qwen3-VL, as a baseline: transformers' own forward.

Every clip is a row of its own, the prompt in front of each; rows are padded to the longest, with a 2-D attention mask;
the tower sees every frame of every clip at every step. Weights, heads and read-outs are those of the model that it is
compared with, so the outputs are the same.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from rbm.model import RewardModel, RewardOutput
from rbm.model.backbones.qwen3_vl import HALF, Qwen3VLBackbone
from rbm.model.batch import ClipBatch
from rbm.model.pixels import normalised, patches


@dataclass(frozen=True)
class PlainBatch:
    """What a processor hands to the model: N rows of T places, padded on the right.

    Attributes:
        input_ids, attention_mask, mm_token_type_ids: int64 (N, T).
        pixel_values: float (patches, 3 t p²), of all frames of all clips, one after the other.
        image_grid_thw: int64 (F, 3).
        frames: int64 (F,), the places, counted through all rows, at which frames are read.
        readouts: int64 (N,), those of the preference.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mm_token_type_ids: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    frames: Tensor
    readouts: Tensor

    def to(self, device: torch.device) -> PlainBatch:
        return PlainBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class PlainQwen(nn.Module):
    """A utility model's forward without any of our packing, on the very parameters of `model`."""

    def __init__(self, model: RewardModel) -> None:
        super().__init__()
        from transformers import Qwen3VLModel

        assert isinstance(model.backbone, Qwen3VLBackbone)
        ours = model.backbone.model
        with torch.device("meta"):
            self.qwen: Any = Qwen3VLModel._from_config(copy.deepcopy(ours.config), attn_implementation="sdpa")
        for name, module in self.qwen.named_modules():
            other = ours.get_submodule(name)
            module._parameters, module._buffers = other._parameters, other._buffers
        self.reward = model

    def share_markers(self) -> None:
        """Put the markers, which `model` keeps apart, into the embedding table, from which the rows here are read."""
        backbone = self.reward.backbone
        assert isinstance(backbone, Qwen3VLBackbone)
        with torch.no_grad():
            backbone.embedding.weight[backbone.words.markers] = backbone.markers.weight.to(backbone.embedding.weight)

    def batch(self, clips: ClipBatch) -> PlainBatch:
        """Rows and pixels of clips of one view: what a loader would have ready."""
        backbone = self.reward.backbone
        assert isinstance(backbone, Qwen3VLBackbone)
        prompt, words, vision = backbone.prompt, backbone.words, backbone.model.config.vision_config
        pad = words.id_of(prompt.pad)
        rows: list[Tensor] = []
        pixels: list[Tensor] = []
        grids: list[list[int]] = []
        pool = [frame for group in clips.frames for frame in group]
        for shown, task in zip(clips.frame_ids[:, 0].split(clips.lengths.tolist()), clips.tasks, strict=True):
            steps = prompt.steps(len(shown), (("",),) * len(shown)) + prompt.closing + prompt.readout + prompt.end
            counts = []
            for number in shown.tolist():
                pixel = normalised(pool[number][None], torch.float32, HALF, HALF)
                pixels.append(patches(pixel, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size))
                grids.append([1, pixel.shape[2] // vision.patch_size, pixel.shape[3] // vision.patch_size])
                counts.append(len(pixels[-1]) // vision.spatial_merge_size**2)
            tokens = torch.tensor([*words.encode(prompt.question(task)).tolist(), *words.encode(steps).tolist()])
            repeats = torch.ones_like(tokens)
            repeats[tokens == pad] = torch.tensor(counts)
            rows.append(tokens.repeat_interleave(repeats))
        padded = torch.nn.utils.rnn.pad_sequence
        ids = padded(rows, batch_first=True)
        mask = padded([torch.ones_like(row) for row in rows], batch_first=True)
        flat = torch.where(mask.bool(), ids, torch.full_like(ids, -1)).flatten()
        return PlainBatch(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=mask * (ids == pad),
            pixel_values=torch.cat(pixels),
            image_grid_thw=torch.tensor(grids),
            frames=torch.nonzero(flat == words.id_of(prompt.frame)).squeeze(1),
            readouts=torch.nonzero(flat == words.id_of(prompt.readout)).squeeze(1),
        )

    def forward(self, batch: PlainBatch, pairs: Tensor) -> RewardOutput:
        found = self.qwen(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_token_type_ids=batch.mm_token_type_ids,
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.image_grid_thw,
            use_cache=False,
        )
        hidden = found.last_hidden_state.flatten(0, 1)
        frames = hidden[batch.frames]
        utility = self.reward.preference_head(hidden[batch.readouts]).squeeze(-1)
        return RewardOutput(
            progress_logits=self.reward.progress_head(frames),
            success_logits=self.reward.success_head(frames).squeeze(-1),
            utility=utility,
            preference_logits=utility[pairs[:, 0]] - utility[pairs[:, 1]],
        )
