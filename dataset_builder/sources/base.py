"""What every source of trajectories gives to the pipeline.

A source splits its material into units (a simulator's environment, a folder of videos): the unit of
parallel work. Each worker makes its own copy of the source from the same configuration and walks
whole units, so a unit's episodes must not depend on what other units did, nor on the order of work.

Letters in shapes: T stored frames (at most 64), L steps of the original episode at full rate.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rbm.trajectory import Task, Trajectory


@dataclass(frozen=True)
class Episode:
    """One trajectory with its pixels, ready to be written.

    Attributes:
        trajectory: the record; `views`, `n_frames`, `height`, `width` describe `frames`.
        frames: for each view uint8 (T, H, W, 3), RGB, the stored frames and nothing else.
        arrays: side arrays at full rate, first axis L (`action`, `state`, `env_reward`, ...).

    Raises:
        ValueError: naming the trajectory, when the frames are not what the record says.
    """

    trajectory: Trajectory
    frames: dict[str, NDArray[np.uint8]]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        record = self.trajectory
        if tuple(self.frames) != record.views:
            raise ValueError(f"trajectory {record.id!r}: views {record.views} but frames for {tuple(self.frames)}")
        shape = (record.n_frames, record.height, record.width, 3)
        for view, clip in self.frames.items():
            if clip.shape != shape or clip.dtype != np.uint8:
                raise ValueError(
                    f"trajectory {record.id!r}: view {view!r} is {clip.dtype} {clip.shape}, its record says {shape}"
                )


@dataclass(frozen=True)
class Skipped:
    """Material that gave no trajectory, and why: it is named and counted in the build's summary."""

    what: str
    reason: str


@runtime_checkable
class Source(Protocol):
    """Where trajectories come from; made from `conf/source/<name>.yaml` in every worker.

    `collect(unit, skip)` gives the unit's episodes in a fixed order, the same at every call, less
    those whose id is in `skip` (already written by a build that was cut off). Ids in `skip` still
    count towards quotas: what a resumed build adds is just what the unbroken one would have added.
    """

    name: str

    def source_facts(self) -> dict[str, Any]:
        """What is known of the source (origin, format family, completion cut-off, category, licence)."""
        ...

    def tasks(self) -> list[Task]:
        """Every task that the units can give, for the corpus's task table."""
        ...

    def units(self) -> list[str]:
        """Names of the units, in the order of work."""
        ...

    def collect(self, unit: str, skip: Container[str]) -> Iterator[Episode | Skipped]:
        """The episodes of one unit, but those in `skip`; `Skipped` for material that could not be used."""
        ...
