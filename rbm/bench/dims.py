"""Sizes of Qwen3-VL that benchmarks build with random weights, and a tokenizer that needs no download."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rbm.model.prompt import MARKERS, PROMPTS

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>")  # fmt: skip

# config.json of Qwen/Qwen3-VL-4B-Instruct; the reward models on it shrink the vocabulary to 151674
_TEXT_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5000000.0, "mrope_interleaved": True, "mrope_section": [24, 20, 20],
    },
}  # fmt: skip
_VISION_4B = {
    "depth": 24,
    "hidden_size": 1024,
    "num_heads": 16,
    "intermediate_size": 4096,
    "out_hidden_size": 2560,
    "deepstack_visual_indexes": [5, 11, 17],
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
}

# The 4B with every width divided by 8 (heads of 64 instead of 128) and every depth by 6: language and tower shrink
# alike. Of the three deepstack levels one stays, since a merger does not shrink with the depth.
_TEXT_SMALL = _TEXT_4B | {
    "hidden_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1216,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5000000.0, "mrope_interleaved": True, "mrope_section": [12, 10, 10],
    },
}  # fmt: skip
_VISION_SMALL = _VISION_4B | {
    "depth": 4,
    "hidden_size": 128,
    "num_heads": 2,
    "intermediate_size": 512,
    "out_hidden_size": 320,
    "deepstack_visual_indexes": [1],
}

# A tower as deep and as wide as its language model, on which it weighs most: what cached features can give at best.
_TEXT_EVEN = _TEXT_SMALL | {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 32, "intermediate_size": 1024,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5000000.0, "mrope_interleaved": True, "mrope_section": [6, 5, 5],
    },
}  # fmt: skip
_VISION_EVEN = _VISION_SMALL | {
    "depth": 6,
    "hidden_size": 256,
    "num_heads": 8,
    "intermediate_size": 1024,
    "out_hidden_size": 256,
    "deepstack_visual_indexes": [1, 3],
}

# For tests: widths below a hundred, where the overhead of each call is most of the time.
_TEXT_TINY = _TEXT_SMALL | {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5000000.0, "mrope_interleaved": True, "mrope_section": [4, 2, 2],
    },
}  # fmt: skip
_VISION_TINY = _VISION_SMALL | {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 64,
}

DIMS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "4b": (_TEXT_4B, _VISION_4B),
    "small": (_TEXT_SMALL, _VISION_SMALL),
    "even": (_TEXT_EVEN, _VISION_EVEN),
    "tiny": (_TEXT_TINY, _VISION_TINY),
}


@lru_cache
def tokenizer() -> str:
    """A `tokenizer.json`, byte-level, trained on the prompts: their words become a token each, as in a large one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = [text for prompt in PROMPTS.values() for text in vars(prompt).values() if isinstance(text, str)]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*_SPECIAL, *MARKERS)])
    return str(made.to_str())


def architecture(dims: str) -> dict[str, Any]:
    """transformers' configuration of one of `DIMS`, with the ids of `tokenizer()`; small ones have its vocabulary."""
    vocabulary = {token["content"]: token["id"] for token in json.loads(tokenizer())["added_tokens"]}
    text, vision = DIMS[dims]
    rows = max(vocabulary.values()) + 1
    return {
        "model_type": "qwen3_vl",
        "text_config": text | ({} if dims == "4b" else {"vocab_size": rows}),
        "vision_config": dict(vision),
        "image_token_id": vocabulary["<|image_pad|>"],
        "video_token_id": vocabulary["<|video_pad|>"],
        "vision_start_token_id": vocabulary["<|vision_start|>"],
        "vision_end_token_id": vocabulary["<|vision_end|>"],
        "tie_word_embeddings": True,
    }
