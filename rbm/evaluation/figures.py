"""The report's large pictures, as PNG bytes that stand in the README too: curves under film strips, the instruction
matrix, calibration and final progress.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from rbm.evaluation.gallery import OUTCOMES, Case, strip_places
from rbm.evaluation.results import Evaluation, Record
from rbm.evaluation.summary import SUCCESS, calibration, confusion

PROGRESS, PROBABILITY, LABEL, DONE = "#2563eb", "#f59e0b", "#64748b", "#059669"
OUTCOME_COLOURS = ("#059669", "#f59e0b", "#dc2626")
MOST_TASKS = 24  # a larger matrix is cut: its cells could not be read

_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def curves(cases: Sequence[Case], tasks: Sequence[str], strips: Mapping[str, bytes]) -> bytes:
    """Each case, one above the other, as a film strip with what is predicted under it; colours are explained once.

    Laid out in inches, so that pictures keep their shape and stand above their own time.
    """
    left, width, right, top, gap, plot = 0.42, 5.3, 1.55, 0.42, 0.05, 1.15
    below = 0.34
    films = [_picture(strips.get(case.record.id)) for case in cases]
    heights = [min(width * film.shape[0] / film.shape[1], 1.2) for film in films]
    total = sum(heights) + len(cases) * (top + gap + plot + below)
    across = left + width + right
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(across, total))
        y = total
        for place, (case, film, height) in enumerate(zip(cases, films, heights, strict=True)):
            y -= top + height
            axes = figure.add_axes((left / across, y / total, width / across, height / total))
            axes.imshow(film, aspect="auto", interpolation="lanczos")
            axes.axis("off")
            title = f"{case.title}: “{tasks[case.record.task]}”"
            axes.set_title(textwrap.shorten(title, 72, placeholder="…"), color="#0f172a")
            y -= gap + plot
            axes = figure.add_axes((left / across, y / total, width / across, plot / total))
            _curve(axes, case.record)
            if place == 0:
                axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.6)
            y -= below
        return _png(figure)


def _picture(jpeg: bytes | None) -> NDArray[np.uint8]:
    if jpeg is None:
        return np.full((1, 60, 3), 255, np.uint8)
    return np.asarray(Image.open(io.BytesIO(jpeg)))


def _curve(axes: Axes, record: Record) -> None:
    n = len(record.progress)
    x = np.arange(n)
    low, high = (np.clip(record.progress + sign * record.spread, 0, 1) for sign in (-1, 1))
    axes.fill_between(x, low, high, color=PROGRESS, alpha=0.13, linewidth=0)
    axes.plot(x, record.progress, color=PROGRESS, linewidth=2, marker="o", markersize=2.5, label="progress")
    axes.plot(x, record.success, color=PROBABILITY, linewidth=1.2, label="P(success)")
    if len(record.label):
        axes.plot(x, record.label, color=LABEL, dashes=(3, 2), linewidth=1.2, label="dense label")
    reached = np.flatnonzero(record.done == 1)
    if record.quality == SUCCESS and len(reached):
        axes.axvline(reached[0], color=DONE, linewidth=1.2, linestyle=":", label="done (true)")
    # So wide that each of the k pictures stands centred above the time at which it was taken.
    places = strip_places(n)
    half = (n - 1) / (2 * (len(places) - 1)) if len(places) > 1 else 0.5
    axes.set_xlim(-half, n - 1 + half)
    axes.set_xticks(places, [f"{record.time[place]:.1f} s" for place in places])
    axes.set_ylim(-0.06, 1.06)
    axes.set_yticks([0, 0.5, 1], ["0", ".5", "1"])
    axes.tick_params(length=2, labelsize=8)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)


def instruction_matrix(evaluation: Evaluation, group: str) -> bytes | None:
    """Mean final progress of the successes of each task (rows) under each instruction (columns)."""
    rows, columns, matrix = confusion(evaluation.groups[group].records)
    if not len(rows):
        return None
    order = sorted(range(len(rows)), key=lambda i: (evaluation.scenes[rows[i]], evaluation.tasks[rows[i]]))[:MOST_TASKS]
    # columns start with the rows' own tasks, so the diagonal stays one; other tasks' instructions follow
    across = [*order, *range(len(rows), len(columns))][:MOST_TASKS]
    shown = matrix[np.ix_(order, across)]
    names = [textwrap.shorten(evaluation.tasks[columns[j]], 30, placeholder="…") for j in across]
    with mpl.rc_context(_STYLE):
        cell = 0.42
        figure = Figure(figsize=(2.9 + cell * len(across), 1.95 + cell * len(order)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shown, vmin=0, vmax=1, cmap="Blues", aspect="equal")
        for i, j in np.ndindex(*shown.shape):
            if np.isnan(shown[i, j]):
                continue
            text = f"{shown[i, j]:.2f}".removeprefix("0") if shown[i, j] < 0.995 else "1"
            axes.text(
                j, i, text, ha="center", va="center", fontsize=7.5, color="white" if shown[i, j] > 0.55 else "#334155"
            )
        for i in range(len(order)):
            axes.add_patch(
                mpl.patches.Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="#0f172a", linewidth=1.2)
            )
        axes.set_xticks(range(len(across)), names, rotation=40, ha="left", rotation_mode="anchor", fontsize=8)
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(order)), names[: len(order)], fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.xaxis.set_label_position("top")
        axes.set_xlabel("instruction given", loc="left", labelpad=8, fontweight="bold")
        axes.set_ylabel("video shows", loc="top", labelpad=8, fontweight="bold")
        figure.colorbar(image, ax=axes, shrink=0.8, aspect=25, pad=0.02, ticks=[0, 0.5, 1], label="final progress")
        return _png(figure)


def calibration_and_finals(evaluation: Evaluation, group: str) -> bytes:
    """Left: reliability of the success head. Right: where attempts of each outcome end."""
    result = evaluation.groups[group]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
        _reliability(left, result.records)
        left.set_title(f"Calibration of the success head (ECE {result.metrics['ece']:.3f})")
        _finals(right, result.records)
        right.set_title(f"Final progress by outcome (gap {result.metrics['gap']:.2f})")
        return _png(figure)


def _reliability(axes: Axes, records: Sequence[Record]) -> None:
    axes.plot([0, 1], [0, 1], color="#94a3b8", linewidth=1, linestyle="--")
    for last_only, colour, name in ((False, LABEL, "all frames"), (True, PROGRESS, "last frames")):
        total = calibration(records, last_only).sum(0)
        filled = total[:, 0] > 0
        count, said, came = total[filled].T
        size = 12 + 130 * np.sqrt(count / max(count.sum(), 1))
        axes.plot(said / count, came / count, color=colour, linewidth=1, alpha=0.6)
        axes.scatter(said / count, came / count, s=size, color=colour, alpha=0.8, linewidth=0, label=name)
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xlabel="predicted P(success)", ylabel="share that succeeded")
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])
    axes.legend(loc="lower right")


def _finals(axes: Axes, records: Sequence[Record]) -> None:
    rng = np.random.default_rng(0)  # the jitter only keeps points apart
    groups = [[record.final for record in records if record.quality == rank] for rank in range(3)]
    wrong = [float(value) for record in records for value in record.final_under[1:]]
    names, colours = [*OUTCOMES, "wrong\ninstruction"], [*OUTCOME_COLOURS, LABEL]
    for place, (values, colour) in enumerate(zip([*groups, wrong], colours, strict=True)):
        if not values:
            continue
        alpha = float(np.clip(60 / len(values), 0.12, 0.7))
        axes.scatter(
            values, place + rng.uniform(-0.24, 0.24, len(values)), s=13, color=colour, alpha=alpha, linewidth=0
        )
        axes.plot([np.mean(values)] * 2, [place - 0.36, place + 0.36], color=colour, linewidth=2.5)
        axes.text(1.07, place, f"{np.mean(values):.2f}", va="center", color=colour, fontweight="bold")
    axes.set_yticks(range(4), names)
    axes.invert_yaxis()
    axes.set(xlim=(-0.04, 1.04), xlabel="progress at the last frame (bar: mean)")
    axes.grid(axis="x", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
