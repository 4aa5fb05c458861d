"""The small tables that code numbers point into: tasks, sources, embodiments.

Sources and embodiments stand in the root group's attributes; tasks, which may be many, as a heap of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from rbm.corpus.index import Names, string_at, strings
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


class Tasks(Sequence[Task]):
    """The task table, a JSON object a row: a row is parsed when it is asked for, so 40,000 cost nothing to open."""

    def __init__(self, heap: NDArray[np.uint8], end: NDArray[np.int64], names: Names) -> None:
        self._heap, self._end, self._names = heap, end, names

    def __len__(self) -> int:
        return len(self._end)

    @overload
    def __getitem__(self, row: int) -> Task: ...
    @overload
    def __getitem__(self, row: slice) -> list[Task]: ...
    def __getitem__(self, row: int | slice) -> Task | list[Task]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        number = row + len(self) if row < 0 else row
        if not 0 <= number < len(self):
            raise IndexError(f"task number {row} of {len(self)}")
        return _task(string_at(self._heap, self._end, number))

    def __iter__(self) -> Iterator[Task]:
        return read_tasks(self._heap, self._end)

    def find(self, text: str) -> int | None:
        """Number of the task with this text, or None."""
        return next((row for row in self._names.candidates(text.encode("utf-8")) if self[row].text == text), None)


def scan_tasks(heap: NDArray[np.uint8], end: NDArray[np.int64]) -> tuple[Names, tuple[str, ...], NDArray[np.int32]]:
    """Of a task table: where its texts are found, the names of its scenes, and each task's scene (-1 = none)."""
    texts, scenes = [], []
    for task in read_tasks(heap, end):
        texts.append(task.text)
        scenes.append(task.scene)
    known = tuple(sorted(set(scenes) - {""}))
    number = {name: place for place, name in enumerate(known)} | {"": -1}
    return Names.build(*pack_strings(texts)), known, np.array([number[scene] for scene in scenes], np.int32)


def read_tasks(heap: NDArray[np.uint8], end: NDArray[np.int64]) -> Iterator[Task]:
    """All tasks of a table, in order."""
    return (_task(text) for text in strings(heap, end, 0, len(end)))


def _task(text: str | bytes) -> Task:
    row = json.loads(text)
    return Task(row["text"], row["scene"], tuple(row["paraphrases"]))


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
