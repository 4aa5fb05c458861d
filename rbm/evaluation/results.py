"""What an evaluation found, trajectory by trajectory, and its file: enough to make the report again without
the corpus and without the model.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError

RESULTS_VERSION = 1


@dataclass(frozen=True)
class Record:
    """One trajectory and what was said of it. n frames shown, m of them with an order, k instructions.

    Arrays that do not apply are empty: reversed and shuffled frames are shown of clean successes, other
    instructions of successes.

    Attributes:
        id, task, quality, messy: of the trajectory; task number and Quality.rank.
        ordered: m, how many of the frames come before or at completion.
        frames, time: int32 (n,) stored frames shown, float32 (n,) their seconds.
        label: float32 (n,) dense label, or (0,).
        done: float32 (n,) success target, nan where unknown.
        progress, spread, success: float32 (n,) predictions under the right instruction.
        backward: float32 (m,) progress of the ordered frames shown last to first.
        shuffled, permutation: float32 (m,) progress and int32 (m,) true place of shuffled frames, as shown.
        instructions, final_under: int32 (k,) task numbers, the right one first, and float32 (k,) final progress.
        misled: float32 (n,) progress under the wrong instruction that ends highest.
        rephrased: float32 (p,) final progress under each other wording of the right instruction.
    """

    id: str
    task: int
    quality: int
    messy: bool
    ordered: int
    frames: NDArray[np.int32]
    time: NDArray[np.float32]
    label: NDArray[np.float32]
    done: NDArray[np.float32]
    progress: NDArray[np.float32]
    spread: NDArray[np.float32]
    success: NDArray[np.float32]
    backward: NDArray[np.float32]
    shuffled: NDArray[np.float32]
    permutation: NDArray[np.int32]
    instructions: NDArray[np.int32]
    final_under: NDArray[np.float32]
    misled: NDArray[np.float32]
    rephrased: NDArray[np.float32]

    @property
    def final(self) -> float:
        """Progress at the last frame."""
        return float(self.progress[-1])

    @property
    def misleading_task(self) -> int:
        """The wrong instruction under which the video ends highest; -1 where none was tried."""
        return int(self.instructions[1 + np.argmax(self.final_under[1:])]) if len(self.instructions) > 1 else -1


@dataclass(frozen=True)
class Preferences:
    """Pairs of one task that the preference read-out judged: numbers into the records, P(better is better)."""

    better: NDArray[np.int32]
    worse: NDArray[np.int32]
    probability: NDArray[np.float32]


@dataclass(frozen=True)
class Result:
    """One scorer on one set of trajectories."""

    records: tuple[Record, ...]
    preferences: Preferences
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Evaluation:
    """All that the report shows.

    Attributes:
        tasks, scenes: instruction and scene of every task of the corpus.
        groups: results by name: heldout, newtask, clock, constant.
        strips: JPEG pictures of a few frames side by side, by trajectory id, of those that the report shows.
        facts: what was evaluated: checkpoint, corpus, snapshot, seed.
    """

    tasks: tuple[str, ...]
    scenes: tuple[str, ...]
    groups: Mapping[str, Result]
    strips: Mapping[str, bytes] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


def flat_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """`group.metric` -> number (None where undefined), then "intervals" and "facts": the content of metrics.json."""
    flat: dict[str, Any] = {}
    intervals: dict[str, list[float | None]] = {}
    for group, result in evaluation.groups.items():
        for name, value in result.metrics.items():
            flat[f"{group}.{name}"] = _number(value)
        for name, (low, high) in result.intervals.items():
            intervals[f"{group}.{name}"] = [_number(low), _number(high)]
    return {**flat, "intervals": intervals, "facts": dict(evaluation.facts)}


def save(evaluation: Evaluation, path: Path) -> None:
    """Write everything as one JSON file, at once or not at all."""
    groups = {}
    for name, result in evaluation.groups.items():
        groups[name] = {
            "records": [_plain(asdict(record)) for record in result.records],
            "preferences": _plain(asdict(result.preferences)),
            "metrics": {key: _number(value) for key, value in result.metrics.items()},
            "intervals": {key: [_number(v) for v in pair] for key, pair in result.intervals.items()},
        }
    document = {
        "version": RESULTS_VERSION,
        "tasks": list(evaluation.tasks),
        "scenes": list(evaluation.scenes),
        "groups": groups,
        "strips": {key: base64.b64encode(jpeg).decode() for key, jpeg in evaluation.strips.items()},
        "facts": dict(evaluation.facts),
    }
    write_atomic(path, json.dumps(document, separators=(",", ":"), allow_nan=False).encode())


def load(path: Path) -> Evaluation:
    """Read what `save` wrote.

    Raises:
        UserError: no such file, not ours, or of another version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no saved results here; run `rbm eval` first")
    try:
        document = json.loads(path.read_text())
        version = document["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: these are not results of `rbm eval`; run it again") from error
    if version != RESULTS_VERSION:
        raise UserError(f"{path}: results of version {version}, this program reads {RESULTS_VERSION}; evaluate again")
    groups = {name: _result(entry) for name, entry in document["groups"].items()}
    strips = {key: base64.b64decode(text) for key, text in document["strips"].items()}
    return Evaluation(tuple(document["tasks"]), tuple(document["scenes"]), groups, strips, document["facts"])


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside the file and rename, so that a reader sees the old file or the whole new one.

    Raises:
        UserError: the folder can't be written to, or the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write ({error.strerror}); free the disk or choose another folder") from error


def _result(entry: dict[str, Any]) -> Result:
    def nan(value: float | None) -> float:
        return math.nan if value is None else value

    return Result(
        records=tuple(Record(**_arrays(Record, record)) for record in entry["records"]),
        preferences=Preferences(**_arrays(Preferences, entry["preferences"])),
        metrics={key: nan(value) for key, value in entry["metrics"].items()},
        intervals={key: (nan(low), nan(high)) for key, (low, high) in entry["intervals"].items()},
    )


def _arrays(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """JSON lists back into arrays of the type that the field is annotated with."""
    out = dict(values)
    for item in fields(kind):
        if isinstance(values[item.name], list):
            integer = "int32" in str(item.type)
            numbers = [math.nan if value is None else value for value in values[item.name]]
            out[item.name] = np.array(numbers, np.int32 if integer else np.float32)
    return out


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype.kind == "f":
            return [_number(float(str(number))) for number in value]  # the shortest text that gives this float32
        return value.tolist()

    return {key: plain(value) for key, value in values.items()}


def _number(value: float) -> float | None:
    """JSON has no nan: an undefined figure is null."""
    return None if math.isnan(value) else float(value)
