"""Pairs of clips: what a loader process makes of a plan.

It looks up a few numbers of two trajectories in the corpus's columns, and draws which frames are shown. Sample n
depends on (seed, n), the trajectories and the options, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.sampling.balance import Balance
from rbm.sampling.clips import ClipOptions
from rbm.sampling.draws import BLOCK, Draw, block_uniforms
from rbm.sampling.mixture import PLANNED, Plan, Planner
from rbm.sampling.strategies import STRATEGIES
from rbm.sampling.table import Trajectories, outcome
from rbm.sampling.targets import ClipTargets, clip_targets

DenseLabels = Callable[[int], NDArray[np.float32] | None]
"""Dense labels float32 (T,) of a row of the corpus, or none."""

Timestamps = Callable[[int], NDArray[np.float32]]
"""Seconds float32 (T,) of the stored frames of a row of the corpus."""

_STRATEGIES = tuple(STRATEGIES.values())


@dataclass(frozen=True)
class Clip:
    """One clip of a pair: stored `frames` int64 (n,) of the trajectory in row `row` of the corpus."""

    row: int
    frames: NDArray[np.int64]
    wrong_instruction: bool


@dataclass(frozen=True)
class Pair:
    """Two clips under one instruction. `preference` is 1 if the first is better, 0 if not; none for shuffled clips.

    `attempt` is 0, or says the how manieth substitute of sample `index` this is.
    """

    index: int
    strategy: str
    task: str
    first: Clip
    second: Clip
    preference: float | None
    attempt: int = 0


class PairMaker:
    """Makes pairs of planned samples, and their targets. It keeps nothing but the corpus and these options.

    Args:
        corpus: the trajectories.
        seed: of all draws.
        options: how clips are drawn.
        use_dense: supervise progress by dense labels where a trajectory has them.
        relative: progress targets relative to the clip (published layouts).
        paraphrases: draw among all wordings of an instruction.

    Raises:
        UserError: shuffled clips with relative targets.
    """

    def __init__(
        self,
        corpus: Trajectories,
        seed: int,
        options: ClipOptions | None = None,
        use_dense: bool = True,
        relative: bool = False,
        paraphrases: bool = True,
    ) -> None:
        self.corpus, self.seed, self.options = corpus, seed, options or ClipOptions()
        self.use_dense, self.relative, self.paraphrases = use_dense, relative, paraphrases
        if relative and self.options.shuffle:
            raise UserError(
                "shuffled frames have no clip-relative progress: set data.clips.shuffle=0 or model.target=absolute"
            )

    def pairs(self, plan: Plan) -> list[Pair]:
        """The pairs of a plan, in its order."""
        columns = zip(plan.strategy.tolist(), plan.chosen.tolist(), plan.rejected.tolist(), strict=True)
        return [
            self._pair(plan.first + place, plan.attempt, strategy, chosen, rejected)
            for place, (strategy, chosen, rejected) in enumerate(columns)
        ]

    def _pair(self, index: int, attempt: int, number: int, chosen_row: int, rejected_row: int) -> Pair:
        strategy = _STRATEGIES[number]
        block, place = divmod(index, BLOCK)
        numbers = block_uniforms(self.seed, block, attempt)[place]
        chosen_first = numbers.item(PLANNED - 1) < 0.5
        draw = Draw(numbers[PLANNED:])

        chosen_frames, rejected_frames = strategy.clips(
            self.corpus.columns, chosen_row, rejected_row, self.options, draw
        )
        shuffled = draw.chance(self.options.shuffle)
        if shuffled:
            chosen_frames = chosen_frames[np.argsort(draw.uniforms(len(chosen_frames)))]
            rejected_frames = rejected_frames[np.argsort(draw.uniforms(len(rejected_frames)))]
        chosen = Clip(chosen_row, chosen_frames, False)
        rejected = Clip(rejected_row, rejected_frames, strategy.wrong_instruction)
        first, second = (chosen, rejected) if chosen_first else (rejected, chosen)
        preference = None if shuffled else float(chosen_first)
        return Pair(index, strategy.name, self._wording(chosen_row, draw), first, second, preference, attempt)

    def targets(
        self, clip: Clip, dense: DenseLabels, masks_only: bool = False, timestamps: Timestamps | None = None
    ) -> ClipTargets:
        """Targets of a clip; `dense` is asked only where labels exist and are used.

        `masks_only`: the values do not matter (what is supervised is only counted), so that `dense` is asked only
        where the masks depend on the labels: for successes of which the completion is not known. With `timestamps`
        also targets of the time that remains; asked for the values only.
        """
        columns = self.corpus.columns
        facts = outcome(columns, clip.row)
        labels = None
        if self.use_dense and not clip.wrong_instruction and columns.dense.item(clip.row):
            decided = masks_only and (facts.quality > 0 or facts.done_known or facts.partial_success < 1)
            labels = np.zeros(facts.n_frames, np.float32) if decided else dense(clip.row)
        seconds = None
        if timestamps is not None:
            unread = masks_only or clip.wrong_instruction or facts.quality > 0
            seconds = np.zeros(facts.n_frames, np.float32) if unread else timestamps(clip.row)
        return clip_targets(clip.frames, facts, labels, clip.wrong_instruction, self.relative, seconds)

    def _wording(self, row: int, draw: Draw) -> str:
        task = self.corpus.tasks[self.corpus.columns.task.item(row)]
        wordings = (task.text, *task.paraphrases)
        place = draw.integer(0, len(wordings) - 1)
        return wordings[place] if self.paraphrases else task.text


class Sampler:
    """Draws pairs: a planner and a pair maker with one seed.

    Pickled, it is small (no table, no columns): a loader process gets one, and its plans from the process that has
    the table. Arguments and errors: as `Planner` and `PairMaker` have them.
    """

    def __init__(
        self,
        corpus: Trajectories,
        seed: int,
        rows: NDArray[np.integer] | None = None,
        weights: Mapping[str, float] | None = None,
        balance: Balance | None = None,
        options: ClipOptions | None = None,
        use_dense: bool = True,
        relative: bool = False,
        paraphrases: bool = True,
    ) -> None:
        self.seed = seed
        self.maker = PairMaker(corpus, seed, options, use_dense, relative, paraphrases)
        self.planner = Planner(corpus, seed, rows, weights, balance)

    def pair(self, index: int, attempt: int = 0) -> Pair:
        """Sample `index` of the run, or its substitute number `attempt`."""
        return self.maker.pairs(self.planner.plan(index, 1, attempt))[0]

    def targets(self, clip: Clip, dense: DenseLabels) -> ClipTargets:
        """Targets of a clip; `dense` is asked only where labels exist and are used."""
        return self.maker.targets(clip, dense)
