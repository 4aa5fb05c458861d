"""Which trajectories a report shows: one typical of each outcome, and the worst cases of each kind of mistake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rbm.evaluation.metrics import label_error
from rbm.evaluation.results import Evaluation, Record, Result
from rbm.evaluation.summary import FAILURE, SUBOPTIMAL, SUCCESS
from rbm.frames import pick_frames

OUTCOMES = ("success", "suboptimal", "failure")
SHOWN_GROUPS = {"heldout": "held-out trajectories", "newtask": "new tasks"}
"""Groups whose trajectories are shown; clock and constant have nothing to show."""


@dataclass(frozen=True)
class Case:
    """A trajectory to show, and why. `misled`: its curve under the wrong instruction is drawn too."""

    title: str
    record: Record
    misled: bool = False


def typical(result: Result) -> list[Case]:
    """A trajectory of each kind whose final progress is the median of its kind: neither the best nor the worst."""
    kinds: dict[str, Callable[[Record], bool]] = {
        "Clean success": lambda r: r.quality == SUCCESS and not r.messy,
        "Messy success": lambda r: r.quality == SUCCESS and r.messy,
        "Suboptimal": lambda r: r.quality == SUBOPTIMAL,
        "Failure": lambda r: r.quality == FAILURE,
    }
    cases = []
    for title, belongs in kinds.items():
        members = sorted((record for record in result.records if belongs(record)), key=lambda r: (r.final, r.id))
        if members:
            cases.append(Case(title, members[(len(members) - 1) // 2]))
    return cases


def worst(result: Result, most: int = 4) -> dict[str, list[Case]]:
    """The worst `most` of each kind of mistake, worst first; kinds without any trajectory are left out."""

    def top(records: Sequence[Record], badness: Callable[[Record], float], misled: bool = False) -> list[Case]:
        ordered = sorted(records, key=lambda r: (-badness(r), r.id))[:most]
        return [Case(f"{_outcome(record)}, {badness(record):.2f}", record, misled) for record in ordered]

    records = result.records
    found = {
        "Failures that end high (final progress)": top([r for r in records if r.quality == FAILURE], lambda r: r.final),
        "Successes that end low (1 − final progress)": top(
            [r for r in records if r.quality == SUCCESS], lambda r: 1 - r.final
        ),
        "Furthest from the dense label (mean absolute error)": top(
            [r for r in records if len(r.label)], lambda r: label_error(r.progress, r.label)
        ),
        "Wrong instruction scored high (final progress under it)": top(
            [r for r in records if len(r.misled)], lambda r: float(r.misled[-1]), misled=True
        ),
    }
    return {title: cases for title, cases in found.items() if cases}


def shown_records(evaluation: Evaluation) -> list[Record]:
    """Every record that the report draws with pictures, each once."""
    chosen: dict[str, Record] = {}
    for group in SHOWN_GROUPS:
        if group in evaluation.groups:
            result = evaluation.groups[group]
            for case in [*typical(result), *(case for cases in worst(result).values() for case in cases)]:
                chosen[case.record.id] = case.record
    return list(chosen.values())


def _outcome(record: Record) -> str:
    return f"{'messy ' if record.messy else ''}{OUTCOMES[record.quality]}".capitalize()


def strip_places(n: int, most: int = 8) -> NDArray[np.int64]:
    """Which of n clip frames stand in a strip of at most `most`: int64, even, both ends kept."""
    return pick_frames(n, most)
