"""Reward models: what they read (`ClipBatch`), what they say (`RewardOutput`), how they learn (`losses`)."""

from rbm.model.batch import ClipBatch, Counts, FramePool, PairBatch, RewardOutput, Targets
from rbm.model.losses import Losses, LossWeights, reward_losses
from rbm.model.reward_model import RewardModel

__all__ = [
    "ClipBatch",
    "Counts",
    "FramePool",
    "LossWeights",
    "Losses",
    "PairBatch",
    "RewardModel",
    "RewardOutput",
    "Targets",
    "reward_losses",
]
