"""Backbones by name. A new one is one file here and one line in this table."""

from rbm.model.backbones.base import Backbone, PairMode, States
from rbm.model.backbones.nano import NanoBackbone

BACKBONES: dict[str, type[Backbone]] = {"nano": NanoBackbone}

__all__ = ["BACKBONES", "Backbone", "NanoBackbone", "PairMode", "States"]
