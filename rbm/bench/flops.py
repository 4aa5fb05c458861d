"""Floating point operations of a Qwen3-VL reward model, counted from its dimensions: 2 for a multiply-add.

A linear layer of N weights takes 2 N a token forward. Backward it takes 2 N for the gradient of its input and, if it is
trained, 2 N for that of its weights. Attention takes 4 H D for each (query, key) that see each other, and twice that
backward. A frozen tower runs forward only. What gradient checkpointing computes again is no part of this
(`Work.again`). Norms, rotary encoding, softmax and the heads are left out: together they are below one percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """FLOPs of one training step.

    Attributes:
        language, attention: of the language model's matrices and of its attention, forward and backward.
        tower: of the vision tower, forward.
        again: of the forward that gradient checkpointing repeats; not in `total`.
    """

    language: float
    attention: float
    tower: float
    again: float = 0.0

    @property
    def total(self) -> float:
        return self.language + self.attention + self.tower


def language_weights(text: Mapping[str, Any]) -> int:
    """Weights of the language model's matrices, all layers; the table of words is looked up, not multiplied."""
    d, inner = text["hidden_size"], text["intermediate_size"]
    queries, keys = text["num_attention_heads"] * text["head_dim"], text["num_key_value_heads"] * text["head_dim"]
    return int(text["num_hidden_layers"] * (2 * d * queries + 2 * d * keys + 3 * d * inner))


def tower_frame(vision: Mapping[str, Any], tokens: int) -> float:
    """One frame of so many visual tokens through the tower, forward."""
    d, inner, merge = vision["hidden_size"], vision["intermediate_size"], vision["spatial_merge_size"] ** 2
    patches = tokens * merge
    pixels = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    blocks = vision["depth"] * (2 * patches * (4 * d * d + 2 * d * inner) + 4 * patches**2 * d)
    wide = d * merge
    mergers = 1 + len(vision["deepstack_visual_indexes"])
    return blocks + 2 * patches * pixels * d + mergers * 2 * tokens * (wide * wide + wide * vision["out_hidden_size"])


def step(
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    places: int,
    seen: int,
    frames: int,
    tokens: int,
    trained: bool = True,
    checkpointing: bool = False,
) -> Work:
    """A training step with a frozen tower.

    Args:
        text, vision: the two parts of the architecture (`rbm.bench.dims`).
        places: of all sequences that the language model reads.
        seen: (query, key) pairs in all of them.
        frames: that the tower reads, of `tokens` visual tokens each.
        trained: the language model's weights get gradients.
    """
    forward = 2.0 * language_weights(text) * places
    width = text["num_hidden_layers"] * text["num_attention_heads"] * text["head_dim"]
    attention = 4.0 * width * seen
    return Work(
        language=forward * (3 if trained else 2),
        attention=attention * 3,
        tower=tower_frame(vision, tokens) * frames,
        again=forward + attention if checkpointing else 0.0,
    )
