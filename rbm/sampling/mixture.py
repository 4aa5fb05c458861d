"""What comes next: which strategy makes the n-th sample of a run, and of which trajectories.

Drawn for a block of samples at once, from a table of all trajectories; only the process that hands out the work needs
that. What comes out is a few numbers a sample, of which any process makes the pair (`rbm.sampling.pairs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.sampling.balance import Balance
from rbm.sampling.draws import BLOCK, block_uniforms
from rbm.sampling.strategies import STRATEGIES, Strategy
from rbm.sampling.table import Table, Trajectories

DEFAULT_WEIGHTS = {"outcome": 4.0, "wrong_task": 3.0, "rewind": 1.0, "reverse": 1.0, "grade": 1.0}
"""Without grades: 4 in 9 real outcomes (the only pairs that show failures under their own instruction), 3 in 9 wrong
instructions, 1 in 9 each rewind and reverse."""

PLANNED = 5
"""Numbers of each sample that go into the choice of strategy (1), partners (3) and order (1)."""

_NUMBER = {name: number for number, name in enumerate(STRATEGIES)}


@dataclass(frozen=True)
class Plan:
    """What n samples are made of, from sample `first` on.

    Attributes:
        strategy: int8 (n,), places in `STRATEGIES`.
        chosen, rejected: int32 (n,), rows of the corpus.
        attempt: 0, or the how manieth substitute these are (for samples that could not be read).
    """

    first: int
    strategy: NDArray[np.int8]
    chosen: NDArray[np.int32]
    rejected: NDArray[np.int32]
    attempt: int = 0

    def __len__(self) -> int:
        return len(self.strategy)


class Planner:
    """Plans samples: O(1) each, however large the corpus.

    Pickling leaves the table behind; another process makes it again if it ever plans.

    Args:
        corpus: the trajectories.
        seed: of all draws.
        rows: those that may be drawn, int (n,); none for all.
        weights: strategy -> relative weight; one whose needs the table does not meet is left out.
        balance: which trajectories are drawn more often than others; none for all alike.

    Raises:
        UserError: a negative seed, unknown strategies, negative weights, or no strategy that these trajectories can
            serve.
    """

    def __init__(
        self,
        corpus: Trajectories,
        seed: int,
        rows: NDArray[np.integer] | None = None,
        weights: Mapping[str, float] | None = None,
        balance: Balance | None = None,
    ) -> None:
        if seed < 0:
            raise UserError(f"the seed is {seed}, it must not be negative")
        self.corpus, self.seed, self.balance = corpus, seed, balance
        self.weights = dict(DEFAULT_WEIGHTS if weights is None else weights)
        unknown = sorted(self.weights.keys() - STRATEGIES.keys())
        if unknown:
            raise UserError(f"no such strategy: {', '.join(unknown)}; there are: {', '.join(STRATEGIES)}")
        if any(not weight >= 0 for weight in self.weights.values()):
            raise UserError(f"strategy weights must not be negative: {self.weights}")
        self._members: NDArray[np.uint8] | None = None  # one bit a row: all that goes to another process
        if rows is not None:
            member = np.zeros(len(corpus.columns.task), bool)
            member[rows] = True
            self._members = np.packbits(member)
        self._prepare()

    def plan(self, first: int, count: int, attempt: int = 0) -> Plan:
        """Samples first, first + 1, ...: `count` of them."""
        if not self._strategies:
            self._prepare()
        parts = []
        index = first
        while index < first + count:
            block, place = divmod(index, BLOCK)
            end = min(BLOCK, place + first + count - index)
            parts.append([column[place:end] for column in self._block(block, attempt)])
            index += end - place
        strategy, chosen, rejected = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return Plan(first, strategy, chosen, rejected, attempt)

    def _prepare(self) -> None:
        count = len(self.corpus.columns.task)
        rows = None if self._members is None else np.flatnonzero(np.unpackbits(self._members, count=count))
        table = Table.of(self.corpus, rows)
        wanted = {name: weight for name, weight in self.weights.items() if weight > 0}
        made = [STRATEGIES[name](table, self.balance) for name in wanted]
        self._strategies: list[Strategy] = [strategy for strategy in made if strategy.available()]
        if not self._strategies:
            raise UserError(
                f"none of the strategies {sorted(wanted)} can make a pair of these {len(table)} trajectories: "
                "they need clean successes, two outcomes of one task, or two tasks"
            )
        share = np.array([wanted[strategy.name] for strategy in self._strategies])
        self._edges = np.cumsum(share / share.sum())[:-1]
        self._numbers = np.array([_NUMBER[strategy.name] for strategy in self._strategies], np.int8)
        self._table = table
        self._planned: tuple[tuple[int, int], _Columns] | None = None

    def _block(self, block: int, attempt: int) -> _Columns:
        """Strategy, chosen and rejected row of each sample of a block, drawn once for all of them."""
        if self._planned is None or self._planned[0] != (block, attempt):
            self._planned = (block, attempt), self._draw(block_uniforms(self.seed, block, attempt))
        return self._planned[1]

    def _draw(self, uniforms: NDArray[np.float64]) -> _Columns:
        strategy = np.searchsorted(self._edges, uniforms[:, 0], side="right")
        chosen, rejected = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
        for number, maker in enumerate(self._strategies):
            mine = np.flatnonzero(strategy == number)
            if len(mine):
                chosen[mine], rejected[mine] = maker.partners(uniforms[mine, 1:4])
        row = self._table.row
        return self._numbers[strategy], row[chosen], row[rejected]

    def __getstate__(self) -> dict[str, Any]:
        names = ("corpus", "seed", "balance", "weights", "_members")
        return {name: self.__dict__[name] for name in names} | {"_strategies": []}


_Columns = tuple[NDArray[np.int8], NDArray[np.int32], NDArray[np.int32]]
