"""Rewards of a model for data that is there already: replay buffers that fill (`labeller`, `buffers`), data sets."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policies.relabel.async_frames import FramesInInfo
    from policies.relabel.async_sb3 import LateRewardBuffer
    from policies.relabel.buffers import PlainBuffer
    from policies.relabel.labeller import Labeller, LabellerGone, LabelsLate

__all__ = ["FramesInInfo", "Labeller", "LabellerGone", "LabelsLate", "LateRewardBuffer", "PlainBuffer"]

_PLACES = {
    "FramesInInfo": "policies.relabel.async_frames",
    "Labeller": "policies.relabel.labeller",
    "LabellerGone": "policies.relabel.labeller",
    "LabelsLate": "policies.relabel.labeller",
    "LateRewardBuffer": "policies.relabel.async_sb3",
    "PlainBuffer": "policies.relabel.buffers",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'policies.relabel' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
