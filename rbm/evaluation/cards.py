"""One case of the gallery as HTML can show it: a film strip and, under it, curves as SVG.

There are dozens of cases in a report, too many to draw each with matplotlib; SVG also stays sharp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rbm.evaluation.gallery import Case, strip_places
from rbm.evaluation.results import Evaluation
from rbm.evaluation.summary import SUCCESS

WIDTH, HEIGHT, MARGIN = 800.0, 150.0, 8.0  # of the SVG's own coordinates


@dataclass(frozen=True)
class Card:
    """What the template needs of a case.

    Attributes:
        title, told: what it is; the wrong instruction that it was given, or "".
        strip: JPEG.
        curves: (CSS class, SVG points) of the lines, the most important last, on top.
        done: x of the completion; negative where there is none.
        seconds: times of the first and the last frame.
    """

    title: str
    instruction: str
    told: str
    strip: bytes
    curves: tuple[tuple[str, str], ...]
    done: float
    seconds: tuple[float, float]


def card(case: Case, evaluation: Evaluation) -> Card:
    """The card of a case; frames of the strip stand centred above their own place in the curves."""
    record = case.record
    lines = [("label", record.label), ("probability", record.success), ("progress", record.progress)]
    if case.misled:
        lines.append(("wrong", record.misled))
    reached = np.flatnonzero(record.done == 1)
    x = _across(len(record.progress))
    return Card(
        title=case.title,
        instruction=evaluation.tasks[record.task],
        told=evaluation.tasks[record.misleading_task] if case.misled else "",
        strip=evaluation.strips.get(record.id, b""),
        curves=tuple((name, _points(x, values)) for name, values in lines if len(values)),
        done=float(x[reached[0]]) if record.quality == SUCCESS and len(reached) else -1.0,
        seconds=(float(record.time[0]), float(record.time[-1])),
    )


def height_of(value: float) -> float:
    """y of a progress or probability in [0, 1]: SVG counts downwards."""
    return MARGIN + (1 - value) * (HEIGHT - 2 * MARGIN)


def _across(n: int) -> NDArray[np.float64]:
    """x of n frames, where the k pictures above fill the width evenly."""
    pictures = len(strip_places(n))
    return WIDTH * (np.linspace(0, 1, n) * (1 - 1 / pictures) + 0.5 / pictures)


def _points(x: NDArray[np.float64], values: NDArray[np.float32]) -> str:
    return " ".join(f"{a:.1f},{height_of(float(b)):.1f}" for a, b in zip(x, values, strict=True))
