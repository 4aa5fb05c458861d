"""A picture of one video's scores: curves over time above a strip of its frames."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rbm.frames import pick_frames
from rbm.output import whole_file
from rbm.scoring.scores import Scores
from rbm.video import StoredClip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROGRESS, SUCCESS, INK, FAINT = "#2563eb", "#059669", "#1f2937", "#d1d5db"
SUFFIXES = (".png", ".pdf", ".svg")

_WIDTH = 10.0  # inches
_CURVES = 3.0  # inches, height of the curves
_STRIP = 8  # frames in the strip, fewer where they are wide


def draw_scores(scores: Scores, clip: StoredClip) -> Figure:
    """A matplotlib figure: progress with a band of ±1 standard deviation, success, and frames of the clip."""
    from matplotlib.figure import Figure

    height, width = clip.frames.shape[1:3]
    shown = pick_frames(len(clip.frames), max(2, min(_STRIP, len(clip.frames), round(_STRIP * 1.8 * height / width))))
    inner = _WIDTH - 1.1
    strip = min(2.2, inner / len(shown) * height / width)
    title = textwrap.wrap(scores.task, 100)[:2]
    top, gap, bottom = 0.45 + 0.2 * len(title), 0.62, 0.32
    total = top + _CURVES + gap + strip + bottom
    figure = Figure(figsize=(_WIDTH, total), dpi=150, facecolor="white")
    left, right = 0.75 / _WIDTH, 0.35 / _WIDTH
    curves = figure.add_axes((left, (bottom + strip + gap) / total, 1 - left - right, _CURVES / total))
    _draw_curves(curves, scores)
    figure.text(
        left, 1 - 0.16 / total, "\n".join(title), fontsize=12, fontweight="bold", color=INK, va="top", parse_math=False
    )
    step = (1 - left - right) / len(shown)
    for place, i in enumerate(shown):
        axes = figure.add_axes((left + place * step, bottom / total, step * 0.97, strip / total))
        axes.imshow(clip.frames[i], aspect="equal", interpolation="antialiased")
        axes.set_axis_off()
        axes.set_title(f"{clip.timestamp[i]:.1f} s", fontsize=8, color=INK, y=-0.02, va="top", pad=0)
        curves.axvline(clip.timestamp[i], color=FAINT, linewidth=0.6, zorder=0)
    return figure


def write_plot(target: Path, scores: Scores, clip: StoredClip) -> None:
    """Writes `draw_scores` to a .png, .pdf or .svg file.

    Raises:
        UserError: the file cannot be written.
    """
    figure = draw_scores(scores, clip)
    with whole_file(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lower().lstrip("."))


def _draw_curves(axes: Axes, scores: Scores) -> None:
    time = scores.timestamp
    low, high = np.clip([scores.progress - scores.progress_std, scores.progress + scores.progress_std], 0, 1)
    marker = "o" if len(scores) <= 64 else ""
    axes.fill_between(time, low, high, color=PROGRESS, alpha=0.15, linewidth=0)
    axes.plot(time, scores.progress, color=PROGRESS, linewidth=2, marker=marker, markersize=3, label="progress ± std")
    axes.plot(time, scores.success, color=SUCCESS, linewidth=2, marker=marker, markersize=3, label="success")
    axes.set_ylim(-0.03, 1.03)
    span = float(time[-1] - time[0])
    margin = 0.02 * span if span > 0 else 0.5
    if span == 0:
        axes.set_xticks([float(time[0])])
    axes.set_xlim(time[0] - margin, time[-1] + margin)
    axes.set_xlabel("time in s", color=INK, fontsize=9, labelpad=1)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=2, frameon=False, fontsize=9, borderaxespad=0.2)
