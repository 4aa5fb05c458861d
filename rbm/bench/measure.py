"""What benchmarks share: medians of interleaved rounds, memory of a process, one core."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


def medians(calls: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Seconds of each call, the median of `rounds`; the calls take turns, so that a busy machine hits all alike.

    A call gets the number of its round.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call(number)
            spent[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in spent.items()}


def resident_megabytes() -> float:
    """Of this process, shared pages included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6


def private_megabytes() -> float:
    """Memory that this process alone has written to: what one more worker costs the machine.

    Pages of files that are mapped to be read are not counted: processes share them, and the system may drop them.
    """
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=2)
        if "-" in head[0] and len(head[1]) == 4:
            counts = head[1].endswith("p")
        elif counts and head[0] == "Private_Dirty:":
            total += int(head[1])
    return total * 1024 / 1e6


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process to one of its cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def machine() -> dict[str, Any]:
    """Where figures come from."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
