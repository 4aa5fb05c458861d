"""Backbones by name. A new one is one file here and one line in this table."""

from importlib import import_module

from rbm.model.backbones.base import Backbone, PairMode, States
from rbm.model.backbones.nano import NanoBackbone

BACKBONES = {
    "nano": "rbm.model.backbones.nano.NanoBackbone",
    "qwen3_vl": "rbm.model.backbones.qwen3_vl.Qwen3VLBackbone",
    "qwen2_5_vl": "rbm.model.backbones.qwen2_5_vl.Qwen25VLBackbone",
    "smolvlm": "rbm.model.backbones.smolvlm.SmolVLMBackbone",
    "rewind": "rbm.model.backbones.rewind.RewindBackbone",
}
"""Where each is; it is imported when it is used: transformers takes seconds."""


def backbone_class(name: str) -> type[Backbone]:
    """Raises KeyError for a name that is not in the table."""
    module, _, attribute = BACKBONES[name].rpartition(".")
    found: type[Backbone] = getattr(import_module(module), attribute)
    return found


__all__ = ["BACKBONES", "Backbone", "NanoBackbone", "PairMode", "States", "backbone_class"]
