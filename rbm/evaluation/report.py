"""The report of an evaluation: one HTML file that needs nothing beside it, the same as JSON, three pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from rbm.evaluation import figures
from rbm.evaluation.cards import HEIGHT, WIDTH, Card, card, height_of
from rbm.evaluation.gallery import SHOWN_GROUPS, typical, worst
from rbm.evaluation.headline import GROUP_TITLES, HEADLINES, show, show_interval
from rbm.evaluation.results import Evaluation, flat_metrics, load, save, write_atomic

RESULTS, METRICS, PAGE = "results.json", "metrics.json", "index.html"


@dataclass(frozen=True)
class GroupPictures:
    """The pictures of one group of trajectories, as PNG bytes; `cards` by kind of mistake."""

    title: str
    count: int
    curves: bytes
    matrix: bytes | None
    calibration: bytes
    cards: Mapping[str, tuple[Card, ...]]


def write(evaluation: Evaluation, folder: str | Path) -> Path:
    """Write results.json, metrics.json, index.html and three PNG files into `folder`; the path of the page.

    Raises:
        UserError: the folder can't be written to, or the disk is full.
    """
    where = Path(folder)
    save(evaluation, where / RESULTS)
    return _write_page(evaluation, where)


def rebuild(folder: str | Path) -> Path:
    """Make the page again from the results saved in `folder`, without corpus or model.

    Raises:
        UserError: there are none.
    """
    where = Path(folder)
    return _write_page(load(where / RESULTS), where)


def _write_page(evaluation: Evaluation, where: Path) -> Path:
    pictures = {name: _pictures(evaluation, name) for name in SHOWN_GROUPS if name in evaluation.groups}
    first = next(iter(pictures.values()))
    write_atomic(where / "curves.png", first.curves)
    write_atomic(where / "calibration.png", first.calibration)
    if first.matrix is not None:
        write_atomic(where / "instructions.png", first.matrix)
    write_atomic(where / PAGE, render(evaluation, pictures).encode())
    metrics = json.dumps(flat_metrics(evaluation), indent=1, allow_nan=False, ensure_ascii=False)
    write_atomic(where / METRICS, metrics.encode())
    return where / PAGE


def render(evaluation: Evaluation, pictures: Mapping[str, GroupPictures]) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("rbm.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png"] = lambda data: "data:image/png;base64," + base64.b64encode(data).decode()
    environment.filters["jpeg"] = lambda data: "data:image/jpeg;base64," + base64.b64encode(data).decode()
    groups = {name: evaluation.groups[name] for name in GROUP_TITLES if name in evaluation.groups}
    names = sorted({metric for result in groups.values() for metric in result.metrics})
    return environment.get_template("report.html").render(
        headlines=HEADLINES,
        groups=groups,
        titles=GROUP_TITLES,
        names=names,
        pictures=pictures,
        facts=evaluation.facts,
        show=show,
        show_interval=show_interval,
        nan=float("nan"),
        width=WIDTH,
        height=HEIGHT,
        height_of=height_of,
    )


def _pictures(evaluation: Evaluation, group: str) -> GroupPictures:
    result = evaluation.groups[group]
    return GroupPictures(
        title=SHOWN_GROUPS[group],
        count=len(result.records),
        curves=figures.curves(typical(result), evaluation.tasks, evaluation.strips),
        matrix=figures.instruction_matrix(evaluation, group),
        calibration=figures.calibration_and_finals(evaluation, group),
        cards={title: tuple(card(case, evaluation) for case in cases) for title, cases in worst(result).items()},
    )
