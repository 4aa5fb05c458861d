"""Robot policies that learn from the reward: wrappers for gymnasium, relabelling, algorithms.

import policies

env = policies.RewardModelWrapper(env, task="open the drawer")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policies.monitor import Monitor
    from policies.relabel import LateRewardBuffer
    from policies.shaping import Shaping
    from policies.wrapper import RewardModelWrapper

__all__ = ["LateRewardBuffer", "Monitor", "RewardModelWrapper", "Shaping"]

_PLACES = {
    "LateRewardBuffer": "policies.relabel",
    "Monitor": "policies.monitor",
    "RewardModelWrapper": "policies.wrapper",
    "Shaping": "policies.shaping",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'policies' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
