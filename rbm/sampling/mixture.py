"""What comes next: the n-th sample of a run, drawn from its strategies.

Strategy and partners are drawn for a block of samples at once, the frames of a sample when it is asked for.
Sample n depends on (seed, n), the trajectories and the options, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.sampling.clips import ClipOptions
from rbm.sampling.draws import BLOCK, Draw, block_uniforms
from rbm.sampling.strategies import STRATEGIES
from rbm.sampling.table import Table
from rbm.sampling.targets import ClipTargets, clip_targets

DEFAULT_WEIGHTS = {"outcome": 4.0, "wrong_task": 3.0, "rewind": 1.0, "reverse": 1.0, "grade": 1.0}
"""Without grades: 4 in 9 real outcomes (the only pairs that show failures under their own instruction), 3 in 9 wrong
instructions, 1 in 9 each rewind and reverse."""

DenseLabels = Callable[[int], NDArray[np.float32] | None]
"""Dense labels float32 (T,) of trajectory `number` of the corpus, or none."""

_PLANNED = 5  # numbers of each sample that go into the choice of strategy (1), partners (3) and order (1)


@dataclass(frozen=True)
class Clip:
    """One clip of a pair: stored `frames` int64 (n,) of the trajectory in row `row` of the table."""

    row: int
    number: int
    frames: NDArray[np.int64]
    wrong_instruction: bool


@dataclass(frozen=True)
class Pair:
    """Two clips under one instruction. `preference` is 1 if the first is better, 0 if not; none for shuffled clips."""

    index: int
    strategy: str
    task: str
    first: Clip
    second: Clip
    preference: float | None


_Plan = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Strategy, chosen row and rejected row of each sample of a block: int64 (BLOCK,) each."""


class Sampler:
    """Draws pairs.

    Args:
        table: the trajectories to draw from.
        seed: of all draws.
        weights: strategy -> relative weight; one whose needs the table does not meet is left out.
        options: how clips are drawn.
        use_dense: supervise progress by dense labels where a trajectory has them.
        relative: progress targets relative to the clip (published layouts).
        paraphrases: draw among all wordings of an instruction.

    Raises:
        UserError: unknown strategies, negative weights, or no strategy that this table can serve.
    """

    def __init__(
        self,
        table: Table,
        seed: int,
        weights: Mapping[str, float] | None = None,
        options: ClipOptions | None = None,
        use_dense: bool = True,
        relative: bool = False,
        paraphrases: bool = True,
    ) -> None:
        self.options = options or ClipOptions()
        self.table, self.seed, self.use_dense, self.relative, self.paraphrases = (
            table,
            seed,
            use_dense,
            relative,
            paraphrases,
        )
        if relative and self.options.shuffle:
            raise UserError(
                "shuffled frames have no clip-relative progress: set data.clips.shuffle=0 or model.target=absolute"
            )
        wanted = dict(DEFAULT_WEIGHTS if weights is None else weights)
        unknown = sorted(wanted.keys() - STRATEGIES.keys())
        if unknown:
            raise UserError(f"no such strategy: {', '.join(unknown)}; there are: {', '.join(STRATEGIES)}")
        if any(not weight >= 0 for weight in wanted.values()):
            raise UserError(f"strategy weights must not be negative: {wanted}")
        made = {name: STRATEGIES[name](table) for name, weight in wanted.items() if weight > 0}
        self.strategies = [strategy for strategy in made.values() if strategy.available()]
        if not self.strategies:
            raise UserError(
                f"none of the strategies {sorted(made)} can make a pair of these {len(table)} trajectories: "
                "they need clean successes, two outcomes of one task, or two tasks"
            )
        share = np.array([wanted[strategy.name] for strategy in self.strategies])
        self._edges = np.cumsum(share / share.sum())[:-1]
        self._planned: dict[int, _Plan] = {}

    def _plan(self, block: int) -> _Plan:
        """The plan of a block, drawn once for all its samples."""
        if block not in self._planned:
            self._planned = {block: self._draw_plan(block)}
        return self._planned[block]

    def _draw_plan(self, block: int) -> _Plan:
        uniforms = block_uniforms(self.seed, block)
        strategy = np.searchsorted(self._edges, uniforms[:, 0], side="right")
        chosen, rejected = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
        for index, maker in enumerate(self.strategies):
            mine = strategy == index
            if mine.any():
                chosen[mine], rejected[mine] = maker.partners(uniforms[mine, 1:4])
        return strategy, chosen, rejected

    def pair(self, index: int) -> Pair:
        """Sample `index` of the run."""
        block, place = divmod(index, BLOCK)
        strategies, chosen_rows, rejected_rows = self._plan(block)
        strategy = self.strategies[strategies[place]]
        chosen_row, rejected_row = int(chosen_rows[place]), int(rejected_rows[place])
        numbers = block_uniforms(self.seed, block)[place]
        chosen_first = bool(numbers[_PLANNED - 1] < 0.5)
        draw = Draw(numbers[_PLANNED:])

        chosen_frames, rejected_frames = strategy.clips(chosen_row, rejected_row, self.options, draw)
        shuffled = draw.chance(self.options.shuffle)
        if shuffled:
            chosen_frames = chosen_frames[np.argsort(draw.uniforms(len(chosen_frames)))]
            rejected_frames = rejected_frames[np.argsort(draw.uniforms(len(rejected_frames)))]
        chosen = self._clip(chosen_row, chosen_frames, False)
        rejected = self._clip(rejected_row, rejected_frames, strategy.wrong_instruction)
        first, second = (chosen, rejected) if chosen_first else (rejected, chosen)
        preference = None if shuffled else float(chosen_first)
        return Pair(index, strategy.name, self._wording(chosen_row, draw), first, second, preference)

    def targets(self, clip: Clip, dense: DenseLabels) -> ClipTargets:
        """Targets of a clip; `dense` is asked only where labels exist and are used."""
        use = self.use_dense and bool(self.table.dense[clip.row]) and not clip.wrong_instruction
        labels = dense(clip.number) if use else None
        outcome = self.table.outcome(clip.row)
        return clip_targets(clip.frames, outcome, labels, clip.wrong_instruction, self.relative)

    def _clip(self, row: int, frames: NDArray[np.int64], wrong: bool) -> Clip:
        return Clip(row, int(self.table.number[row]), frames, wrong)

    def _wording(self, row: int, draw: Draw) -> str:
        task = self.table.tasks[self.table.task[row]]
        wordings = (task.text, *task.paraphrases)
        place = draw.integer(0, len(wordings) - 1)
        return wordings[place] if self.paraphrases else task.text
