"""A corpus in memory: numpy columns and four tasks, as far as sampling looks at one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rbm.corpus import CSR
from rbm.trajectory import Task

TASKS = (
    Task("open the drawer", "drawer", ("pull the drawer open",)),
    Task("close the drawer", "drawer"),
    Task("open the door", "door"),
    Task("pick up the cup"),
)
SOURCES = ("lab", "kitchen", "simulator")


@dataclass(frozen=True)
class Columns:
    task: np.ndarray
    source: np.ndarray
    quality: np.ndarray
    n_frames: np.ndarray
    done: np.ndarray
    done_known: np.ndarray
    messy: np.ndarray
    dense: np.ndarray
    partial_success: np.ndarray


@dataclass(frozen=True)
class World:
    """What `rbm.sampling.table.Trajectories` asks for."""

    columns: Columns
    tasks: Sequence[Task] = TASKS
    sources: Sequence[str] = SOURCES

    @property
    def task_scene(self) -> np.ndarray:
        names = sorted({task.scene for task in self.tasks if task.scene})
        return np.array([names.index(task.scene) if task.scene else -1 for task in self.tasks], np.int32)

    @property
    def by_task_quality(self) -> CSR:
        return CSR.build(self.columns.task, self.columns.quality, len(self.tasks))

    def changed(self, **columns: np.ndarray) -> World:
        """The same with other columns."""
        return replace(self, columns=replace(self.columns, **columns))


def world(
    n: int = 60, seed: int = 0, graded: bool = False, dense: bool = False, tasks: Sequence[Task] = TASKS
) -> World:
    """`n` attempts at random tasks, with random outcomes and lengths."""
    rng = np.random.default_rng(seed)
    quality = rng.integers(0, 3, n).astype(np.int8)
    n_frames = rng.integers(2, 65, n).astype(np.int32)
    success = quality == 0
    columns = Columns(
        task=rng.integers(0, len(tasks), n).astype(np.int32),
        quality=quality,
        n_frames=n_frames,
        done=np.where(success, np.maximum(0, n_frames - 1 - rng.integers(0, 6, n)), -1).astype(np.int32),
        done_known=rng.random(n) < 0.7,
        messy=success & (rng.random(n) < 0.4),
        dense=np.full(n, dense),
        partial_success=np.where(success, 1, rng.random(n)).astype(np.float32)
        if graded
        else np.full(n, np.nan, np.float32),
        source=rng.integers(0, len(SOURCES), n).astype(np.int16),
    )
    return World(columns, tasks)


def attempts(task: Sequence[int], quality: Sequence[int], source: Sequence[int] | None = None) -> World:
    """Attempts of 20 frames with these tasks, outcomes and sources; successes are done at frame 18."""
    n = len(task)
    rank = np.array(quality, np.int8)
    columns = Columns(
        task=np.array(task, np.int32),
        source=np.array(source or [0] * n, np.int16),
        quality=rank,
        n_frames=np.full(n, 20, np.int32),
        done=np.where(rank == 0, 18, -1).astype(np.int32),
        done_known=np.ones(n, bool),
        messy=np.zeros(n, bool),
        dense=np.zeros(n, bool),
        partial_success=np.full(n, np.nan, np.float32),
    )
    return World(columns)
