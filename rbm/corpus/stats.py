"""What a corpus is made of, in numbers: `rbm corpus stats`. From the index alone, and the heads of a sample."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from rbm.corpus.ahead import in_order, threads_for
from rbm.corpus.payload import CorruptPayload
from rbm.corpus.reader import Corpus
from rbm.trajectory import Quality, Trajectory

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SAMPLE = 1000

_EXAMPLES = 5
_COPIES_NAMED = 4


@dataclass(frozen=True)
class Group:
    """The trajectories of one source, embodiment, task or scene; `outcomes` counts them by `Quality.rank`."""

    name: str
    trajectories: int
    frames: int
    bytes: int
    outcomes: tuple[int, int, int]


@dataclass(frozen=True)
class Duplicates:
    """Trajectories with the same stored frames.

    Attributes:
        groups: of equal ones. surplus: trajectories in them beyond the first of each. unknown: without a hash.
        examples: ids of the largest groups, a few of each.
    """

    groups: int
    surplus: int
    unknown: int
    examples: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Sample:
    """What only the heads of payloads tell, from trajectories drawn at random.

    Attributes:
        heads: that were read. damaged: of these, could not be.
        seconds: of video in the whole corpus, from first to last stored frame: the sample's mean times all.
        views: trajectories of the sample by their number of views.
    """

    heads: int
    damaged: int
    seconds: float
    views: dict[int, int]


@dataclass(frozen=True)
class Stats:
    """Numbers about one snapshot.

    Attributes:
        n_frames, bytes_each: quantiles `QUANTILES` over trajectories.
        dense, partial: trajectories with dense labels, with a graded outcome. messy: of the successful ones.
        done_known: successes whose first done frame is known exactly.
        tasks, sources, embodiments, scenes: largest first; a task without a scene counts to the scene "".
        unused_tasks: without a trajectory. one_outcome: tasks whose trajectories all ended alike.
    """

    corpus: str
    snapshot: str
    trajectories: int
    frames: int
    bytes: int
    outcomes: tuple[int, int, int]
    n_frames: tuple[float, ...]
    bytes_each: tuple[float, ...]
    dense: int
    messy: int
    partial: int
    done_known: int
    robot: int
    sim: int
    sources: tuple[Group, ...]
    embodiments: tuple[Group, ...]
    scenes: tuple[Group, ...]
    tasks: tuple[Group, ...]
    unused_tasks: tuple[str, ...]
    one_outcome: tuple[str, ...]
    duplicates: Duplicates
    sample: Sample

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"quantiles": QUANTILES}


def corpus_stats(corpus: Corpus, sample: int = SAMPLE, progress: Progress | None = None) -> Stats:
    """Count everything; a million trajectories take seconds. Heads of `sample` trajectories are read, or all."""
    columns = corpus.columns
    total = _Counts(corpus, np.zeros(len(corpus), np.int64), ("all",))
    texts = tuple(task.text for task in corpus.tasks)
    tasks = _Counts(corpus, columns.task, texts)
    used = tasks.outcomes.sum(axis=1) > 0
    alike = used & ((tasks.outcomes > 0).sum(axis=1) == 1)
    scenes = _Counts(corpus, corpus.task_scene[columns.task] + 1, ("", *corpus.scenes))
    whole = total.group(0)
    return Stats(
        corpus=str(corpus.location),
        snapshot=corpus.snapshot,
        trajectories=whole.trajectories,
        frames=whole.frames,
        bytes=whole.bytes,
        outcomes=whole.outcomes,
        n_frames=_quantiles(columns.n_frames),
        bytes_each=_quantiles(columns.length),
        dense=int(columns.dense.sum()),
        messy=int((columns.messy & (columns.quality == Quality.SUCCESSFUL.rank)).sum()),
        partial=int((~np.isnan(columns.partial_success)).sum()),
        done_known=int((columns.done_known & (columns.quality == Quality.SUCCESSFUL.rank)).sum()),
        robot=int(columns.is_robot.sum()),
        sim=int(columns.is_sim.sum()),
        sources=_Counts(corpus, columns.source, tuple(corpus.sources)).groups(),
        embodiments=_Counts(corpus, columns.embodiment, corpus.embodiments).groups(),
        scenes=scenes.groups(),
        tasks=tasks.groups(),
        unused_tasks=tuple(texts[number] for number in np.flatnonzero(~used).tolist()),
        one_outcome=tuple(texts[number] for number in np.flatnonzero(alike).tolist()),
        duplicates=_duplicates(corpus),
        sample=_sample(corpus, sample, progress),
    )


class _Counts:
    """Sums over the trajectories of each code; `outcomes` is int64 (codes, 3)."""

    def __init__(self, corpus: Corpus, codes: NDArray[np.integer], names: tuple[str, ...]) -> None:
        columns, count = corpus.columns, len(names)
        self._names = names
        by_outcome = np.bincount(codes.astype(np.int64) * 3 + columns.quality, minlength=3 * count)
        self.outcomes = by_outcome.reshape(count, 3)
        self._frames = np.bincount(codes, columns.n_frames, minlength=count)
        self._bytes = np.bincount(codes, columns.length, minlength=count)

    def group(self, code: int) -> Group:
        good, middling, bad = self.outcomes[code].tolist()
        frames, size = int(self._frames[code]), int(self._bytes[code])
        return Group(self._names[code], good + middling + bad, frames, size, (good, middling, bad))

    def groups(self) -> tuple[Group, ...]:
        """Those that have a trajectory, largest first."""
        sizes = self.outcomes.sum(axis=1)
        order = np.argsort(-sizes, kind="stable")
        return tuple(self.group(code) for code in order[: np.count_nonzero(sizes)].tolist())


def _quantiles(values: NDArray[np.integer]) -> tuple[float, ...]:
    return tuple(np.quantile(values, QUANTILES).tolist()) if len(values) else ()


def _duplicates(corpus: Corpus) -> Duplicates:
    content = corpus.columns.content
    rows = np.flatnonzero(content)
    rows = rows[np.argsort(content[rows], kind="stable")]
    begins = np.flatnonzero(np.concatenate([[True], content[rows[1:]] != content[rows[:-1]]])[: len(rows)])
    sizes = np.diff(np.append(begins, len(rows)))
    several = np.flatnonzero(sizes > 1)
    largest = several[np.argsort(-sizes[several], kind="stable")][:_EXAMPLES]
    return Duplicates(
        groups=len(several),
        surplus=int((sizes[several] - 1).sum()),
        unknown=len(corpus) - len(rows),
        examples=tuple(
            tuple(corpus.ids[row] for row in rows[begins[g] : begins[g] + min(sizes[g], _COPIES_NAMED)].tolist())
            for g in largest.tolist()
        ),
    )


def _sample(corpus: Corpus, count: int, progress: Progress | None) -> Sample:
    every = np.arange(len(corpus))
    rows = every if len(corpus) <= count else np.sort(np.random.default_rng(0).choice(every, count, replace=False))
    bar = None if progress is None else progress.add_task("reading heads", total=len(rows))

    def read(row: int) -> Trajectory | None:
        try:
            return corpus[row]
        except CorruptPayload:
            return None

    seconds, views = 0.0, dict[int, int]()
    for record in in_order(read, rows.tolist(), threads_for(corpus.location)):
        if record is not None:
            seconds += float(record.timestamp[-1] - record.timestamp[0])
            views[len(record.views)] = views.get(len(record.views), 0) + 1
        if progress is not None and bar is not None:
            progress.advance(bar)
    good = sum(views.values())
    return Sample(
        len(rows), len(rows) - good, seconds / good * len(corpus) if good else 0.0, dict(sorted(views.items()))
    )
