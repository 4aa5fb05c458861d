"""`smolvlm`: SmolVLM and SmolVLM2 through transformers (arXiv 2504.05299), a frame as one picture that is not split."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rbm.model.backbones.vlm import VisionLanguageBackbone
from rbm.model.packing import PACKED, Pack
from rbm.model.pixels import PillowSquare, normalised
from rbm.model.prompt import ISOLATED, Prompt

HALF = (0.5, 0.5, 0.5)

SMOL = Prompt(
    **vars(ISOLATED)
    | {
        "opening": "<|im_start|>User: ",
        "image": "<fake_token_around_image><global-img><image><fake_token_around_image>",
        "pad": "<image>",
    }
)
"""The words of new models in the signs of SmolVLM: a turn opens, and a picture stands, as its chat template has it."""


class SmolVLMBackbone(VisionLanguageBackbone):
    """SmolVLM of any size; arguments as in `VisionLanguageBackbone`.

    A frame is brought to the square of the tower by one Lanczos resize of Pillow's, its aspect ratio not kept (the
    published processor scales it up first and splits it, into up to 17 pictures).
    """

    name = "smolvlm"
    default_prompt = SMOL
    grid_positions = False

    def _build(self, architecture: dict[str, Any]) -> Any:
        from transformers import SmolVLMConfig, SmolVLMModel

        architecture.pop("model_type", None)
        config = SmolVLMConfig(**architecture)
        parts = {"text_config": PACKED, "vision_config": "sdpa"}
        model = SmolVLMModel._from_config(config, attn_implementation=parts)
        self.unit = model.config.vision_config.patch_size * model.config.scale_factor
        return model

    @property
    def language(self) -> Any:
        return self.model.text_model

    @property
    def tower(self) -> nn.Module:
        """The vision model, and the connector behind it, whose output features are."""
        return nn.ModuleDict({"vision_model": self.model.vision_model, "connector": self.model.connector})

    @property
    def _resize(self) -> PillowSquare:
        return PillowSquare(self.model.config.vision_config.image_size, "LANCZOS")

    def _encode(self, frames: Tensor) -> Tensor:
        vision = self.model.vision_model
        pixels = normalised(frames, vision.embeddings.patch_embedding.weight.dtype, HALF, HALF)
        features: Tensor = self.model.connector(vision(pixel_values=pixels).last_hidden_state)  # (U, tokens, d)
        side = frames.shape[1] // self.unit
        return features.unflatten(1, (1, side, side))

    def _read(self, x: Tensor, pack: Pack, features: Tensor) -> Tensor:
        found = self.language(
            inputs_embeds=x[None], position_ids=pack.position[:1], use_cache=False, streams=pack.streams
        )
        hidden: Tensor = found.last_hidden_state[0]
        return hidden
