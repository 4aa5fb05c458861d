"""Random numbers that depend on nothing but (seed, sample index).

Or on (seed, sample index, attempt), where a sample has to be drawn again since its trajectories could not be read.
Counter-based (Philox, Salmon et al. 2011) and drawn in blocks, since one generator call a sample would
cost more than the sample. Ranks and workers only partition the indices, so the data do not change with
their number, and a resumed run draws what the unbroken one would have drawn.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
"""Samples drawn at once."""

NUMBERS = 320
"""Uniform numbers that one sample may use."""


@lru_cache(maxsize=2)
def block_uniforms(seed: int, block: int, attempt: int = 0) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for the samples of one block: float64 (BLOCK, NUMBERS), read-only."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, attempt, block]))
    numbers = generator.random((BLOCK, NUMBERS))
    numbers.flags.writeable = False
    return numbers


class Draw:
    """The random numbers of one sample, used up one after another.

    Raises:
        RuntimeError: a sample asks for more than `NUMBERS`.
    """

    def __init__(self, numbers: NDArray[np.float64]) -> None:
        self._numbers = numbers
        self._next = 0

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """`count` uniform numbers in [0, 1)."""
        if self._next + count > len(self._numbers):
            raise RuntimeError(f"a sample used up its {len(self._numbers)} random numbers")
        self._next += count
        return self._numbers[self._next - count : self._next]

    def uniform(self) -> float:
        if self._next >= len(self._numbers):
            raise RuntimeError(f"a sample used up its {len(self._numbers)} random numbers")
        self._next += 1
        return self._numbers.item(self._next - 1)

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def integer(self, low: int, high: int) -> int:
        """A whole number, low <= k <= high."""
        return low + int(self.uniform() * (high - low + 1))

    def distinct(self, n: int, count: int) -> NDArray[np.int64]:
        """`count` of 0..n-1, each at most once, rising."""
        return np.sort(np.argsort(self.uniforms(n), kind="stable")[:count])
