"""From a large pool the trajectories that help a task: those that look like it done.

Every trajectory is scored under the query instruction, whatever its own is, a clip of even frames in one forward. The
best k are those of the largest

    value = (mean progress + mean success probability) / 2, over the last three scored frames

or of the largest of either alone, or of utility, the read-out that ranks attempts at one task. A model may take one
task for another that looks like it; where trajectories have instructions of their own, `near_tasks` leaves those of the
nearest words. Bulk scoring does the work: a large pool is scored part by part, by several processes, and goes on where
it was stopped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rbm.corpus import Corpus
from rbm.errors import UserError
from rbm.evaluation.attempts import LAST, check_finite, read_manifest, read_scores
from rbm.evaluation.bulk import Tick, steady
from rbm.evaluation.bulk_sources import Block, CorpusSource, Looks, Scored, Unreadable
from rbm.scoring.scorer import BATCH_SIZE, Scorer, check_task
from rbm.trajectory import Quality

if TYPE_CHECKING:
    from rich.table import Table

By = Literal["value", "progress", "success", "utility"]


@dataclass(frozen=True)
class QuerySource(CorpusSource):
    """Trajectories of a corpus, each shown under the instruction `query` in place of its own."""

    query: str = ""

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "query": self.query}

    def _block(self, number: int, looks: Looks) -> Block | Unreadable:
        found = super()._block(number, looks)
        return (
            found if isinstance(found, Unreadable) else replace(found, attempt=replace(found.attempt, task=self.query))
        )

    def table(self, scored: Sequence[Scored], remaining: bool) -> pa.Table:
        """As of a corpus, with the utility of each clip at all of its frames."""
        table = super().table(scored, remaining)
        worth = [said.utility for attempt, said in scored for _ in attempt.scored]
        return table.append_column("utility", pa.array(worth, pa.float32()))


@dataclass(frozen=True)
class Pool:
    """What a model says of the ends of N trajectories under one instruction.

    Attributes:
        query: the instruction.
        ids: of the trajectories. rows: int64 (N,), their numbers in the corpus, rising.
        progress, success: float64 (N,), means over the last `LAST` scored frames.
        utility: float64 (N,), nan where the model has none.
    """

    query: str
    ids: tuple[str, ...]
    rows: NDArray[np.int64]
    progress: NDArray[np.float64]
    success: NDArray[np.float64]
    utility: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)

    def among(self, rows: NDArray[np.int64]) -> Pool:
        """What is left of it of these rows."""
        kept = np.flatnonzero(np.isin(self.rows, rows))
        ids = tuple(self.ids[i] for i in kept.tolist())
        return Pool(self.query, ids, self.rows[kept], self.progress[kept], self.success[kept], self.utility[kept])

    def worth(self, by: By) -> NDArray[np.float64]:
        """By what the pool is ordered. Raises UserError: no such thing, or the model does not say it."""
        if by not in get_args(By):
            raise UserError(f"a pool is ordered by {', '.join(get_args(By))}, not by {by!r}")
        if by == "utility" and np.isnan(self.utility).any():
            raise UserError("this model compares pairs jointly and has no utility: order by value, progress or success")
        values = {"value": (self.progress + self.success) / 2, "progress": self.progress, "success": self.success}
        return values.get(by, self.utility)


@dataclass(frozen=True)
class Retrieval:
    """The best k of a pool, best first.

    Attributes:
        by: what they were ordered by. values: float64 (k,). of: size of the pool.
        tasks, outcomes: what the corpus says of each.
        precision: share that are successful trajectories of the query's task; none where the corpus has no such task.
        relevant: how many such the pool holds.
    """

    query: str
    by: By
    of: int
    ids: tuple[str, ...]
    rows: NDArray[np.int64]
    values: NDArray[np.float64]
    tasks: tuple[str, ...]
    outcomes: tuple[str, ...]
    precision: float | None
    relevant: int | None

    def __len__(self) -> int:
        return len(self.ids)

    def to_json(self) -> dict[str, Any]:
        found = [
            {"trajectory": id, "row": row, "value": round(value, 6), "task": task, "outcome": outcome}
            for id, row, value, task, outcome in zip(
                self.ids, self.rows.tolist(), self.values.tolist(), self.tasks, self.outcomes, strict=True
            )
        ]
        facts: dict[str, Any] = {"query": self.query, "by": self.by, "pool": self.of, "k": len(self)}
        precision = None if self.precision is None else round(self.precision, 4)
        return {**facts, "precision": precision, "relevant": self.relevant, "found": found}

    def table(self, most: int = 20) -> Table:
        """The first `most`, best first."""
        from rich.table import Table
        from rich.text import Text

        table = Table(header_style="dim")
        table.add_column("rank", justify="right")
        table.add_column("trajectory", overflow="fold")
        table.add_column(self.by, justify="right")
        table.add_column("filed under", overflow="fold")
        table.add_column("outcome")
        for n in range(min(most, len(self))):
            row = (Text(self.ids[n]), f"{self.values[n]:.3f}", Text(self.tasks[n]), self.outcomes[n])
            table.add_row(str(n + 1), *row)
        if len(self) > most:
            table.caption = f"{most} of {len(self)}; --json keeps all"
        return table


def score_pool(
    corpus: Corpus,
    query: str,
    scorer: Scorer,
    rows: NDArray[np.int64] | None = None,
    view: str | None = None,
    tick: Tick = lambda trajectories, frames: None,
) -> Pool:
    """Score the trajectories of a corpus under an instruction, in memory; what cannot be read is left out.

    Args:
        rows: their numbers, rising; none for all.
        view: as `CorpusSource`.
        tick: told how many more trajectories and frames were scored.

    Raises:
        UserError: an instruction that the model cannot read, an empty pool, or nothing in it can be read.
    """
    scorer.check(query)
    source = QuerySource(corpus, rows, view, query)
    if not len(source):
        raise UserError("the pool is empty: no trajectory is there, or none is left by the filters")
    looks = Looks(scorer.context_frames, None, scorer.views)
    scored: list[Scored] = []
    blocks: list[Block] = []

    def work() -> None:
        said = scorer.predict([(block.frames, query) for block in blocks])
        scored.extend(zip((block.attempt for block in blocks), said, strict=True))
        tick(len(blocks), sum(map(len, blocks)))
        blocks.clear()

    with steady(scorer):
        for found in source.read(range(len(source)), looks):
            if isinstance(found, Block):
                blocks.append(found)
            if len(blocks) == BATCH_SIZE:
                work()
        if blocks:
            work()
    if not scored:
        raise UserError(
            f"none of the {len(source)} trajectories of the pool could be read: `rbm corpus check` says why"
        )
    return _pool(query, source.table(scored, remaining=False))


def read_pool(folder: Path) -> Pool:
    """What bulk scoring of a `QuerySource` left in a folder.

    Raises:
        UserError: as `read_scores`; or its trajectories were scored under their own instructions.
    """
    query = read_manifest(folder)["asked"].get("query")
    if not isinstance(query, str):
        raise UserError(
            f"{folder} holds scores of trajectories under their own instructions, and retrieval needs them under the "
            "query's: give another folder, which is then filled"
        )
    return _pool(query, read_scores(folder))


def retrieve(pool: Pool, corpus: Corpus, k: int = 50, by: By = "value") -> Retrieval:
    """The best k trajectories of a scored pool; equals in the order of the corpus.

    Raises:
        UserError: k is below 1 or larger than the pool, or there is no such order.
    """
    if k < 1:
        raise UserError(f"k={k} retrieves nothing: give at least 1")
    if k > len(pool):
        raise UserError(f"k={k} is more than the pool holds: it has {len(pool)} trajectories; give a smaller k")
    worth = pool.worth(by)
    best = np.argsort(-worth, kind="stable")[:k]
    rows = pool.rows[best]
    columns = corpus.columns
    good = relevant_rows(corpus, pool.query)
    return Retrieval(
        query=pool.query,
        by=by,
        of=len(pool),
        ids=tuple(pool.ids[i] for i in best.tolist()),
        rows=rows,
        values=worth[best],
        tasks=tuple(corpus.tasks[int(number)].text for number in columns.task[rows]),
        outcomes=tuple(Quality.from_rank(int(rank)).value for rank in columns.quality[rows]),
        precision=None if good is None else float(np.isin(rows, good).mean()),
        relevant=None if good is None else int(np.isin(pool.rows, good).sum()),
    )


def relevant_rows(corpus: Corpus, query: str) -> NDArray[np.int64] | None:
    """The successful trajectories of the task that the query names, in its own or another wording; none without one."""
    tasks = [number for number, task in enumerate(corpus.tasks) if query in (task.text, *task.paraphrases)]
    if not tasks:
        return None
    columns = corpus.columns
    return np.flatnonzero(np.isin(columns.task, tasks) & (columns.quality == Quality.SUCCESSFUL.rank)).astype(np.int64)


def near_tasks(corpus: Corpus, query: str, most: int) -> NDArray[np.int64]:
    """Rows of the trajectories of the `most` tasks whose words are nearest to the query's, rising.

    Nearness of two wordings is 2 |A ∩ B| / (|A| + |B|) over their sets of words; of a task, that of its nearest one.
    Equals count in the order of the task table.

    Raises:
        UserError: `most` is below 1, or the query has no word.
    """
    check_task(query)
    if most < 1:
        raise UserError(f"{most} tasks leave nothing to retrieve from: give at least 1")
    near = [max(nearness(query, text) for text in (task.text, *task.paraphrases)) for task in corpus.tasks]
    chosen = np.argsort(-np.array(near), kind="stable")[:most]
    return np.flatnonzero(np.isin(corpus.columns.task, chosen)).astype(np.int64)


def nearness(a: str, b: str) -> float:
    """2 |A ∩ B| / (|A| + |B|) over the sets of words, 0 to 1."""
    first, second = (set(re.findall(r"\w+", text.lower())) for text in (a, b))
    return 2 * len(first & second) / max(len(first) + len(second), 1)


def _pool(query: str, table: pa.Table) -> Pool:
    rows = table["row"].to_numpy()
    stops = np.append(np.flatnonzero(np.diff(rows)) + 1, len(rows))
    starts = np.append(0, stops[:-1])
    columns = {name: table[name].to_numpy().astype(np.float64) for name in ("progress", "success", "utility")}
    ids = table["trajectory"].take(pa.array(starts)).to_pylist()
    for id, start, stop in zip(ids, starts, stops, strict=True):
        check_finite(id, columns["progress"][start:stop], columns["success"][start:stop])
    ends = [slice(max(start, stop - LAST), stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
    means = {name: np.array([columns[name][end].mean() for end in ends]) for name in ("progress", "success")}
    return Pool(query, tuple(ids), rows[starts], means["progress"], means["success"], columns["utility"][starts])
