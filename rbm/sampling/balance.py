"""Drawing some trajectories more often than others: weights and temperatures of sources and tasks.

Of n candidates, those of a group g (a source, or a task) number n_g. Its weight w_g (1 where none is given) and the
temperature T make it

    probability of the group  ∝  (w_g n_g)^(1/T)          so that each row of it has the factor (w_g n_g)^(1/T) / n_g

T = 1: groups are drawn by their size times their weight; T = 2: by the square root of that; T → inf: all alike.
A row's weight is the factor of its source times the factor of its task. With both in use the formula holds for each
where all sources have the same tasks; else the shares are what the products add up to.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.sampling.table import Table, Trajectories

Places = NDArray[np.integer]


class Balance:
    """Weights and temperatures of the sources and tasks of one corpus.

    They govern which trajectory a strategy draws first: the chosen one of rewind, reverse, wrong_task and grade, the
    worse one of outcome. n_g counts what that strategy could draw. Its partner is drawn as ever, all alike.

    Args:
        corpus: tells the numbers of the names.
        source_weights: source -> relative weight, 1 for those not named; 0 leaves a source out.
        source_temperature: T of the sources, above 0; `inf` for all alike.
        task_weights, task_temperature: likewise of tasks, by their instructions.

    Raises:
        UserError: a name that the corpus does not have (says which are close), a weight below 0, T not above 0.
    """

    def __init__(
        self,
        corpus: Trajectories,
        source_weights: Mapping[str, float] | None = None,
        source_temperature: float = 1.0,
        task_weights: Mapping[str, float] | None = None,
        task_temperature: float = 1.0,
    ) -> None:
        self._temperature = {"source": source_temperature, "task": task_temperature}
        for group, temperature in self._temperature.items():
            if not temperature > 0:
                raise UserError(f"{group}_temperature must be above 0, not {temperature}")
        # float64 (groups,), or none where all rows have the factor 1
        self._weight: dict[str, NDArray[np.float64] | None] = {"source": None, "task": None}
        if source_weights or source_temperature != 1:
            self._weight["source"] = _by_number(source_weights or {}, corpus.sources, "source")
        if task_weights or task_temperature != 1:
            texts = (task.text for task in corpus.tasks)
            self._weight["task"] = _by_number(task_weights or {}, texts, "task")

    def weights(self, table: Table, places: Places) -> NDArray[np.float64] | None:
        """Weight of each of these places of a table, float64 (n,); none where all are alike."""
        columns = table.corpus.columns
        factors = [
            group_factors(codes[table.row[places]], weight, self._temperature[group])
            for group, codes in (("source", columns.source), ("task", columns.task))
            if (weight := self._weight[group]) is not None
        ]
        return np.prod(factors, axis=0) if factors else None


def group_factors(
    group: NDArray[np.integer], weight: NDArray[np.float64], temperature: float = 1.0
) -> NDArray[np.float64]:
    """(w_g n_g)^(1/T) / n_g of each row's group, up to one common factor: float64 (n,).

    `group` (n,) numbers the group of each row, `weight` (groups,) is w_g. A group of weight 0 has the factor 0.
    """
    size = np.bincount(group, minlength=len(weight))
    mass = weight * size
    there = mass > 0
    factor = np.zeros(len(weight))
    if there.any():
        factor[there] = (mass[there] / mass.max()) ** (1 / temperature) / size[there]
    return factor[group]


def _by_number(weights: Mapping[str, float], names: Iterable[str], group: str) -> NDArray[np.float64]:
    numbers = {name: number for number, name in enumerate(names)}
    result = np.ones(len(numbers))
    for name, weight in weights.items():
        if name not in numbers:
            close = difflib.get_close_matches(name, numbers, n=3) or list(numbers)[:5]
            raise UserError(f"{group}_weights: no {group} {name!r}; there are " + ", ".join(map(repr, close)))
        if not 0 <= weight < np.inf:
            raise UserError(f"{group}_weights: the weight of {name!r} must be a number from 0 on, not {weight}")
        result[numbers[name]] = weight
    return result


class Lottery:
    """Draws one of n by one uniform number, O(1) a draw: all alike, or by weight.

    By weight it is an indexed search (Chen & Asau 1974): a guide table says in which short stretch of the cumulative
    weights the number lies, and bisection finds it there.

    Args:
        n: how many there are; weights: float64 (n,), none where all are alike.
    """

    def __init__(self, n: int, weights: NDArray[np.float64] | None = None) -> None:
        self._n = n
        self._cumulative: NDArray[np.float64] | None = None
        if weights is not None:
            self._n = n if weights.any() else 0
            total = np.cumsum(weights)
            self._cumulative = total / total[-1] if self._n else total
            self._guide = np.searchsorted(self._cumulative, np.arange(n + 1) / max(n, 1), side="right").astype(np.int32)

    def __len__(self) -> int:
        """How many there are to draw; 0 also where all weights are 0."""
        return self._n

    def draw(self, uniform: NDArray[np.float64]) -> NDArray[np.int64]:
        """Which one each of the numbers in [0, 1) draws: int64, as many."""
        place = (uniform * self._n).astype(np.int64)
        if self._cumulative is None:
            return place
        place -= uniform < place / self._n  # where the product was rounded up
        # the first whose cumulative weight exceeds the number lies in low..high
        low, high = self._guide[place].astype(np.int64), self._guide[place + 1].astype(np.int64)
        while (searching := low < high).any():
            middle = (low + high) // 2
            beyond = searching & (self._cumulative[middle] <= uniform)
            low, high = np.where(beyond, middle + 1, low), np.where(beyond, high, middle)
        return low
