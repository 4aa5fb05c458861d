"""Sampling: from an index of trajectories to pairs of clips with targets. Pure numpy."""

from rbm.sampling.clips import ClipOptions
from rbm.sampling.mixture import Clip, Pair, Sampler
from rbm.sampling.table import Table
from rbm.sampling.targets import ClipTargets, Outcome, clip_targets

__all__ = ["Clip", "ClipOptions", "ClipTargets", "Outcome", "Pair", "Sampler", "Table", "clip_targets"]
