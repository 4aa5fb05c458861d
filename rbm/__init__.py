"""Reward models for robots: how well is this attempt going, says the video.

    scorer = rbm.Scorer.from_pretrained()
    scores = scorer.score("attempt.mp4", "open the drawer")
    corpus = rbm.Corpus.open("data/corpus")

The names below are imported when they are used: scoring does not need what reading a corpus needs.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("robot-rbm")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

_PUBLIC = {
    "Corpus": "rbm.corpus",
    "CorpusWriter": "rbm.corpus",
    "Quality": "rbm.trajectory",
    "RewardModel": "rbm.model",
    "Scorer": "rbm.scoring",
    "Task": "rbm.trajectory",
    "Trajectory": "rbm.trajectory",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rbm' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
