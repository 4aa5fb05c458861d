"""The picture of `rbm bench corpus scale`: what grows with a corpus, and what does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rbm.output import check_target, whole_file

_PANELS: tuple[tuple[str, str, dict[str, str], dict[str, float]], ...] = (
    ("open", "seconds", {"first": "first_open_seconds", "later": "open_seconds"}, {"first": 5.0, "later": 1.0}),
    ("memory", "MB", {"open, resident": "resident_MB", "a worker, private": "worker_private_MB"},
     {"open, resident": 200.0, "a worker, private": 10.0}),
    ("draw of a pair", "µs", {"which trajectories": "draw_us", "with frames and wording": "pair_us"},
     {"which trajectories": 5.0}),
    ("a pair read, 8 of 64 frames each", "ms", {"read and decoded": "sample_ms"}, {}),
)  # fmt: skip


def draw(facts: Mapping[str, Any], target: Path) -> None:
    """Four panels over the number of trajectories; dashed lines are the limits that are aimed at.

    Raises:
        UserError: the file can not be written, or is no .png or .svg.
    """
    import matplotlib.pyplot as plt

    check_target(target, (".png", ".svg"))
    sizes = facts["sizes"]
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(14, 3.4), constrained_layout=True)
    for axis, (title, unit, lines, limits) in zip(axes, _PANELS, strict=True):
        for number, (label, field) in enumerate(lines.items()):
            values = [row[field]["spawn"] if isinstance(row[field], dict) else row[field] for row in facts["results"]]
            axis.plot(sizes, values, "o-", color=f"C{number}", label=label)
            if label in limits:
                axis.axhline(limits[label], color=f"C{number}", linestyle="--", linewidth=1, alpha=0.7)
        axis.set(xlabel="trajectories", ylabel=unit, xscale="log", yscale="log")
        axis.set_title(title, fontsize="medium")
        if len(lines) == 1:
            axis.set_ylim(min(values) / 3, max(values) * 3)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter("")
        axis.legend(frameon=False, fontsize="small")
        axis.grid(alpha=0.25)
    with whole_file(target) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
