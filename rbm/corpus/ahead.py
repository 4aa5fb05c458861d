"""Reading ahead: several threads fetch what one consumer then takes in order, with a bounded number in flight."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rbm.corpus.location import Location

A = TypeVar("A")
B = TypeVar("B")

_REMOTE_THREADS = 16
"""Each waits for one answer of the object store at a time."""


def threads_for(location: Location) -> int:
    """How many readers keep a corpus there busy: a core each on a local disk."""
    return min(8, os.cpu_count() or 1) if location.local is not None else _REMOTE_THREADS


def in_order(function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """`function(item)` for each item, in the order of the items; at most twice as many are held as there are threads.

    Raises:
        Exception: what `function` raised, at its place; the items after it are dropped.
    """
    waiting: deque[Future[B]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="rbm-corpus")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
