"""Tiny vision-language reward models with random weights, of the real architectures."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from rbm.model import RewardModel
from rbm.model.backbones.qwen2_5_vl import Qwen25VLBackbone
from rbm.model.backbones.qwen3_vl import Qwen3VLBackbone
from rbm.model.backbones.rewind import RewindBackbone
from rbm.model.backbones.smolvlm import SmolVLMBackbone

FIXTURE = Path(__file__).with_name("data") / "robometer_tiny_a"
TOKENIZER = (FIXTURE / "tokenizer.json").read_text()


def architecture(**text: Any) -> dict[str, Any]:
    """transformers' configuration of the fixture's Qwen3-VL: width 64, 3 layers, a tower of 2 blocks, 1 deepstack."""
    found: dict[str, Any] = json.loads((FIXTURE / "config.json").read_text())
    found["text_config"] |= text
    return found


def qwen3_model(
    seed: int = 0,
    context_frames: int = 8,
    backbone: dict[str, Any] | None = None,
    sizes: dict[str, Any] | None = None,
    **options: Any,
) -> RewardModel:
    """A reward model over a tiny Qwen3-VL, in eval mode; by default isolated pairs with a utility read-out."""
    torch.manual_seed(seed)
    vlm = Qwen3VLBackbone(sizes or architecture(), TOKENIZER, **(backbone or {}))
    return RewardModel(vlm, context_frames, **options).eval()


LIVELY = 0.15
"""Standard deviation of random weights: with transformers' .02 so narrow a model hardly looks at its pictures."""


def qwen2_5_architecture(**text: Any) -> dict[str, Any]:
    """A Qwen2.5-VL: width 64, 3 layers, a tower of 3 blocks, the second of which sees the whole picture."""
    return {
        "image_token_id": 492,
        "video_token_id": 493,
        "vision_start_token_id": 489,
        "vision_end_token_id": 490,
        "text_config": {
            "initializer_range": LIVELY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "vocab_size": 499,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        }
        | text,
        "vision_config": {
            "depth": 3,
            "initializer_range": LIVELY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
    }


def qwen2_5_model(seed: int = 0, backbone: dict[str, Any] | None = None, **options: Any) -> RewardModel:
    """A reward model over a tiny Qwen2.5-VL, in eval mode."""
    torch.manual_seed(seed)
    vlm = Qwen25VLBackbone(qwen2_5_architecture(), TOKENIZER, **(backbone or {}))
    return RewardModel(vlm, 8, **options).eval()


SENTENCES = ["open the drawer and close it", "How good was that? That was attempt A.", "A robot has to move the dot."]


@cache
def smolvlm_tokenizer() -> str:
    """A byte-level tokenizer with the signs of SmolVLM."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    signs = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=signs,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(SENTENCES, trainer)
    return str(found.to_str())


def smolvlm_architecture(image_size: int = 64, patch_size: int = 8) -> dict[str, Any]:
    """A SmolVLM: width 64, 2 layers of a Llama, a tower of 2 blocks, 2 × 2 patches in a token."""
    words = Tokenizer.from_str(smolvlm_tokenizer())
    return {
        "scale_factor": 2,
        "image_token_id": words.token_to_id("<image>"),
        "text_config": {
            "model_type": "llama",
            "initializer_range": LIVELY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "vocab_size": words.get_vocab_size(),
            "pad_token_id": None,
        },
        "vision_config": {
            "initializer_range": LIVELY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": image_size,
            "patch_size": patch_size,
        },
    }


def smolvlm_model(
    seed: int = 0, backbone: dict[str, Any] | None = None, sizes: dict[str, Any] | None = None, **options: Any
) -> RewardModel:
    """A reward model over a tiny SmolVLM, in eval mode."""
    torch.manual_seed(seed)
    vlm = SmolVLMBackbone(sizes or smolvlm_architecture(), smolvlm_tokenizer(), **(backbone or {}))
    return RewardModel(vlm, 8, **options).eval()


@cache
def bert_tokenizer() -> str:
    """A WordPiece tokenizer that writes [CLS] and [SEP], and pads, as that of a sentence encoder."""
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer()
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    signs = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    found.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=signs, show_progress=False)
    )
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(sign, found.token_to_id(sign)) for sign in ("[CLS]", "[SEP]")]
    )
    found.enable_padding(length=16)
    return str(found.to_str())


REWIND = {
    "image_architecture": {
        "initializer_range": LIVELY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 42,
        "patch_size": 7,
    },
    "text_architecture": {
        "initializer_range": LIVELY,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        "vocab_size": 200,
    },
}


def rewind_model(seed: int = 0, backbone: dict[str, Any] | None = None, **options: Any) -> RewardModel:
    """A reward model over tiny frozen encoders (a DINOv2, a BERT), in eval mode."""
    torch.manual_seed(seed)
    small = {"image_size": 28, "hidden": 32, "layers": 2, "heads": 4} | (backbone or {})
    rewind = RewindBackbone(**REWIND, tokenizer=bert_tokenizer(), **small)  # type: ignore[arg-type]
    return RewardModel(rewind, 8, **options).eval()
