"""Scoring: a reward model looks at video and says how far along, whether done, and which attempt is better.

Needs torch, numpy, pillow and a video decoder; no training framework, corpus or simulator. What a client of the server
needs (`client`, `wire`, `scores`) needs numpy alone of these: the names below are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "ClipScores": "rbm.scoring.scores",
    "FrameScore": "rbm.scoring.scores",
    "Scorer": "rbm.scoring.scorer",
    "Scores": "rbm.scoring.scores",
    "Session": "rbm.scoring.sessions",
    "SessionPool": "rbm.scoring.sessions",
    "SuccessVote": "rbm.scoring.vote",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rbm.scoring' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
