"""Tiny vision-language reward models with random weights, of the real architectures."""

import json
from pathlib import Path
from typing import Any

import torch

from rbm.model import RewardModel
from rbm.model.backbones.qwen3_vl import Qwen3VLBackbone

FIXTURE = Path(__file__).with_name("data") / "robometer_tiny_a"
TOKENIZER = (FIXTURE / "tokenizer.json").read_text()


def architecture(**text: Any) -> dict[str, Any]:
    """transformers' configuration of the fixture's Qwen3-VL: width 64, 3 layers, a tower of 2 blocks, 1 deepstack."""
    found: dict[str, Any] = json.loads((FIXTURE / "config.json").read_text())
    found["text_config"] |= text
    return found


def qwen3_model(
    seed: int = 0, context_frames: int = 8, backbone: dict[str, Any] | None = None, **options: Any
) -> RewardModel:
    """A reward model over a tiny Qwen3-VL, in eval mode; by default isolated pairs with a utility read-out."""
    torch.manual_seed(seed)
    return RewardModel(Qwen3VLBackbone(architecture(), TOKENIZER, **(backbone or {})), context_frames, **options).eval()
