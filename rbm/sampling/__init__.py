"""Sampling: from an index of trajectories to pairs of clips with targets. Pure numpy.

1. `Planner` says what a sample is made of: a strategy and two rows of the corpus. It has the table of all trajectories.
2. `PairMaker` makes the pair: which frames are shown, in which order, with which targets. It has the corpus's columns.
3. `Sampler` is both.
"""

from rbm.sampling.balance import Balance
from rbm.sampling.clips import ClipOptions
from rbm.sampling.mixture import Plan, Planner
from rbm.sampling.pairs import Clip, Pair, PairMaker, Sampler
from rbm.sampling.table import Table, with_completion
from rbm.sampling.targets import ClipTargets, Outcome, clip_targets

__all__ = [
    "Balance",
    "Clip",
    "ClipOptions",
    "ClipTargets",
    "Outcome",
    "Pair",
    "PairMaker",
    "Plan",
    "Planner",
    "Sampler",
    "Table",
    "clip_targets",
    "with_completion",
]
