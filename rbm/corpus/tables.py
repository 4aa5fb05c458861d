"""The small tables that code numbers point into: tasks, sources, embodiments.

Sources and embodiments stand in the root group's attributes; tasks, which may be many, as a heap of JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.trajectory import Task


@dataclass(frozen=True)
class SourceInfo:
    """One source of trajectories.

    Attributes:
        name: as in `conf/source`.
        completion: the fraction of a successful demonstration at which its task is done, where the
            source has such a cut-off (`completion_index`).
        facts: whatever else is known (origin, licence, category, ...), JSON values.
    """

    name: str
    completion: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise UserError("a source needs a name")
        if self.completion is not None and not 0 < self.completion <= 1:
            raise UserError(f"source {self.name!r}: completion cut-off {self.completion} must be in (0, 1]")
        try:
            json.dumps(self.facts, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"source {self.name!r}: its facts are no JSON values: {error}") from error

    def to_json(self) -> dict[str, Any]:
        return {"completion": self.completion, "facts": self.facts}


def sources_to_json(sources: dict[str, SourceInfo]) -> list[dict[str, Any]]:
    """In the order of their numbers."""
    return [{"name": name, **info.to_json()} for name, info in sources.items()]


def sources_from_json(rows: list[dict[str, Any]]) -> dict[str, SourceInfo]:
    return {row["name"]: SourceInfo(row["name"], row["completion"], row["facts"]) for row in rows}


def merge_tasks(old: Task, new: Task) -> Task:
    """One row for a task that was described twice: paraphrases add up.

    Raises:
        UserError: the two name different scenes.
    """
    if old.scene and new.scene and old.scene != new.scene:
        raise UserError(f"task {old.text!r} has scene {old.scene!r} in the corpus, and now {new.scene!r}")
    wordings = dict.fromkeys((*old.paraphrases, *new.paraphrases))
    return Task(old.text, new.scene or old.scene, tuple(wordings))


def pack_tasks(tasks: list[Task]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Heap and ends: one JSON object a task, end to end."""
    rows = [
        json.dumps({"text": task.text, "scene": task.scene, "paraphrases": task.paraphrases}, ensure_ascii=False)
        for task in tasks
    ]
    return pack_strings(rows)


def unpack_tasks(heap: NDArray[np.uint8], end: NDArray[np.int64]) -> tuple[Task, ...]:
    data = heap.tobytes()
    rows = (json.loads(data[start:stop]) for start, stop in pairwise([0, *end.tolist()]))
    return tuple(Task(row["text"], row["scene"], tuple(row["paraphrases"])) for row in rows)


def pack_strings(strings: list[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Strings end to end as UTF-8, uint8, and where each ends, int64.

    Raises:
        UserError: one is not valid Unicode.
    """
    try:
        raw = [text.encode("utf-8") for text in strings]
    except UnicodeEncodeError as error:
        raise UserError(f"not valid Unicode: {error.object!r}") from error
    heap = np.frombuffer(b"".join(raw), np.uint8)
    return heap, np.cumsum([len(item) for item in raw], dtype=np.int64)
