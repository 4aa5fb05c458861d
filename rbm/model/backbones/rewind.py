"""`rewind`: frozen embeddings of pictures and words under a small causal transformer, as ReWiND (arXiv 2505.10911).

A frame is the CLS token of DINOv2 after its last norm. An instruction is one vector: the mean of a sentence encoder's
(MiniLM's) hidden states, of length 1. Neither encoder is trained; what is, reads one vector a frame, so that with
cached features (`rbm cache-features`) training costs next to nothing. Sizes are the paper's; what differs: rotary
positions instead of a vector for the first frame, distributions instead of one value, a read-out for preference, and
frames are squeezed to the square (the paper cuts its middle out).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn

from rbm.errors import UserError
from rbm.model.backbones.base import Backbone
from rbm.model.backbones.transformer import RowBackbone
from rbm.model.backbones.vlm import found_base, plain_architecture
from rbm.model.layout import N_MARKERS
from rbm.model.pixels import PillowSquare, normalised
from rbm.model.tokens import TOKENIZER
from rbm.model.weights import read_json

log = logging.getLogger(__name__)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of DINOv2's pixels (those of ImageNet)."""

MOST_TOKENS = 128
"""Of an instruction, as sentence-transformers cuts texts for MiniLM."""

ENCODE_FRAMES = 256
"""Frames that the image encoder gets at once while it is not trained."""

KEPT_TEXTS = 4096
"""Embeddings of instructions that are kept."""


class RewindBackbone(RowBackbone):
    """The `rewind` backbone.

    Args:
        image_architecture: transformers' configuration of a DINOv2.
        text_architecture: that of a BERT.
        tokenizer: content of the text encoder's tokenizer.json.
        image_size: frames are resized to this many pixels on both sides, a multiple of the encoder's patch.
        hidden: d, width of the transformer.
        layers, heads: of the transformer.
        dropout: in the transformer, while training.
        views: names of the views that a step shows, where they are several: each has a learned gain and shift, and a
            step is the mean of those that are there. Empty: one view, whichever comes first.

    Raises:
        ValueError: sizes that do not fit each other. UserError: a text that is no tokenizer.
    """

    name = "rewind"
    freezes_tower = True
    never_trained = ("text_encoder",)

    def __init__(
        self,
        image_architecture: Mapping[str, Any],
        text_architecture: Mapping[str, Any],
        tokenizer: str,
        image_size: int = 224,
        hidden: int = 512,
        layers: int = 4,
        heads: int = 8,
        dropout: float = 0.1,
        views: Sequence[str] = (),
    ) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

        image_config: Any = Dinov2Config(**{k: v for k, v in image_architecture.items() if k != "model_type"})
        text_config: Any = BertConfig(**{k: v for k, v in text_architecture.items() if k != "model_type"})
        if image_size % image_config.patch_size:
            raise ValueError(f"image_size ({image_size}) must be a multiple of the patch ({image_config.patch_size})")
        self.image_size = image_size
        self.tokenizer = _read_tokenizer(tokenizer, min(MOST_TOKENS, text_config.max_position_embeddings))
        self.image_encoder: Any = Dinov2Model._from_config(image_config, attn_implementation="sdpa")
        self.text_encoder: Any = BertModel._from_config(
            text_config, attn_implementation="sdpa", add_pooling_layer=False
        )
        self.image_encoder.requires_grad_(False)
        self.text_encoder.requires_grad_(False)
        self.image_projection = nn.Sequential(nn.Linear(image_config.hidden_size, hidden), nn.LayerNorm(hidden))
        self.text_projection = nn.Sequential(nn.Linear(text_config.hidden_size, hidden), nn.LayerNorm(hidden))
        self.marker_embedding = nn.Embedding(N_MARKERS, hidden)
        nn.init.normal_(self.marker_embedding.weight, std=0.5)
        self.add_transformer(hidden, layers, heads, dropout, views)
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self.register_load_state_dict_post_hook(_forget_texts)
        self.train()

    @classmethod
    def from_base(
        cls,
        image: str = "facebook/dinov2-base",
        text: str = "sentence-transformers/all-MiniLM-L12-v2",
        **options: Any,
    ) -> RewindBackbone:
        """Start from pretrained encoders.

        Args:
            image: folder of a DINOv2, or its id on the Hugging Face hub.
            text: folder or id of a sentence encoder that is a BERT.
            options: arguments of the constructor, but architectures and tokenizer.

        Raises:
            UserError: an encoder cannot be had, or is another kind of model.
        """
        from transformers import BertModel, Dinov2Model

        text_folder = found_base(text)
        if not (text_folder / TOKENIZER).is_file():
            raise UserError(f"{text} has no {TOKENIZER}")
        pictures = _pretrained(Dinov2Model, image)
        sentences = _pretrained(BertModel, text, add_pooling_layer=False)
        backbone = cls(
            plain_architecture(pictures.config),
            plain_architecture(sentences.config),
            (text_folder / TOKENIZER).read_text(),
            **options,
        )
        backbone.image_encoder.load_state_dict(pictures.state_dict())
        backbone.text_encoder.load_state_dict(sentences.state_dict())
        return backbone

    def config(self) -> dict[str, Any]:
        return {
            "image_architecture": plain_architecture(self.image_encoder.config),
            "text_architecture": plain_architecture(self.text_encoder.config),
            "image_size": self.image_size,
            "hidden": self.hidden,
            "layers": self.layers,
            "heads": self.heads,
            "dropout": self.dropout,
            "views": list(self.views),
        }

    def files(self) -> dict[str, str]:
        return {TOKENIZER: str(self.tokenizer.to_str())}

    @classmethod
    def from_config(cls, config: dict[str, Any], files: Mapping[str, str]) -> Backbone:
        if TOKENIZER not in files:
            raise UserError(f"{TOKENIZER} is missing beside the weights")
        return cls(tokenizer=files[TOKENIZER], **config)

    @property
    def preprocessor(self) -> PillowSquare:
        return PillowSquare(self.image_size)

    @property
    def tower(self) -> Any:
        return self.image_encoder

    @property
    def _trains_tower(self) -> bool:
        return any(weight.requires_grad for weight in self.tower.parameters())

    def train(self, mode: bool = True) -> RewindBackbone:
        """Encoders that are not trained have no dropout either."""
        super().train(mode)
        self.text_encoder.eval()
        self.image_encoder.train(mode and self._trains_tower)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RewindBackbone:
        self._texts.clear()  # they were of another device or precision
        super()._apply(fn, recurse)
        return self

    def encode(self, frames: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self._trains_tower:
            return self._encode(frames)
        with torch.no_grad():
            return torch.cat([self._encode(part) for part in frames.split(ENCODE_FRAMES)])

    def _encode(self, frames: Tensor) -> Tensor:
        pixels = normalised(frames, self.image_encoder.embeddings.cls_token.dtype, MEAN, STD)
        features: Tensor = self.image_encoder(pixel_values=pixels).pooler_output
        return features[:, None, None, None]

    def frame_tokens(self, features: Tensor) -> Tensor:
        found: Tensor = self.image_projection(features.to(self.marker_embedding.weight.dtype))
        return found

    def text(self, tasks: Sequence[str]) -> tuple[list[NDArray[np.int64]], Tensor]:
        rows = {task: row for row, task in enumerate(dict.fromkeys(tasks))}
        table = torch.stack([self.sentence(task) for task in rows]).to(self.marker_embedding.weight.dtype)
        return [np.array([rows[task]], np.int64) for task in tasks], self.text_projection(table)

    def sentence(self, task: str) -> Tensor:
        """Embedding of an instruction, of length 1: float (width of the text encoder,). Computed once, then kept."""
        if task in self._texts:
            self._texts.move_to_end(task)
            return self._texts[task]
        found = self.tokenizer.encode(task)
        if found.overflowing:
            log.warning("the instruction is cut after %d tokens: %.60s…", len(found.ids), task)
        device = self.marker_embedding.weight.device
        # by itself and in the weights' precision, so that it is the same in every batch; a plain tensor, for training
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            ids = torch.tensor([found.ids], device=device)
            hidden = self.text_encoder(input_ids=ids).last_hidden_state[0]
            self._texts[task] = F.normalize(hidden.mean(0), dim=0)
        if len(self._texts) > KEPT_TEXTS:
            self._texts.popitem(last=False)
        return self._texts[task]


def _forget_texts(backbone: RewindBackbone, keys: Any) -> None:
    backbone._texts.clear()


def _read_tokenizer(text: str, most: int) -> Tokenizer:
    try:
        tokenizer: Tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{TOKENIZER} cannot be read: {' '.join(str(error).split())}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(most)
    return tokenizer


def _pretrained(kind: Any, place: str, **options: Any) -> Any:
    """A pretrained encoder of the class `kind`, from safetensors alone.

    Raises:
        UserError: nothing there, something else, or weights that are truncated or not all there.
    """
    from safetensors import SafetensorError

    folder = found_base(place)
    wanted, found = kind.config_class.model_type, read_json(folder / "config.json").get("model_type")
    if found != wanted:
        raise UserError(f"{place} is a model of type {found!r}, {wanted!r} is needed")
    try:
        model, report = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{place} cannot be read: {' '.join(str(error).split())}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{place} lacks weights: {', '.join(missing[:20])}")
    return model
