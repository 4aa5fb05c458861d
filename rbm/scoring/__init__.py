"""Scoring: a reward model looks at video and says how far along, whether done, and which attempt is better.

Needs torch, numpy, pillow and a video decoder; no training framework, corpus or simulator.
"""

from rbm.scoring.scorer import Scorer
from rbm.scoring.scores import ClipScores, Scores

__all__ = ["ClipScores", "Scorer", "Scores"]
