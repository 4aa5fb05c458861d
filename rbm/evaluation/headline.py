"""The few figures that stand on top of the report, with what they must reach and what they mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rbm.evaluation.results import Evaluation, Result

GROUP_TITLES = {
    "heldout": "held-out trajectories",
    "clock": "clock",
    "constant": "constant",
    "newtask": "new tasks",
}


@dataclass(frozen=True)
class Headline:
    """A metric by its flat name; the target is a bound from below, or from above where `at_most`; nan = none."""

    metric: str
    title: str
    target: float
    at_most: bool
    meaning: str

    @property
    def bound(self) -> str:
        if math.isnan(self.target):
            return ""
        return f"{'≤' if self.at_most else '≥'} {self.target:.2f}".replace("0.", ".").replace("-", "−")

    def verdict(self, value: float) -> str:
        """`met`, `missed`, or `` where there is no target or no value."""
        if math.isnan(self.target) or math.isnan(value):
            return ""
        return "met" if (value <= self.target if self.at_most else value >= self.target) else "missed"


_NONE = math.nan
HEADLINES = (
    Headline("preference_accuracy", "Success preferred to failure", 0.97, False,
             "Pairs of one task; the preference read-out says which is better. Chance is .5."),
    Headline("success_auc", "Success AUC", 0.96, False,
             "Success probability at the last frame against the outcome, over all trajectories."),
    Headline("kendall_tau", "Kendall τ", 0.75, False,
             "Triples of success, suboptimal and failure of one task, ordered by final progress."),
    Headline("suboptimal_over_failure", "Suboptimal over failure", 0.70, False,
             "Pairs of one task by final progress: is real progress told from none?"),
    Headline("gap", "Gap, success − failure", 0.60, False,
             "Final progress of successes minus that of failures: the reward between doing it and not."),
    Headline("wrong_instruction", "Progress, wrong instruction", 0.25, True,
             "Final progress of successful videos, told the task of another scene."),
    Headline("wrong_instruction_same_scene", "  … of the same scene", 0.25, True,
             "The same, told the other task of the scene (close instead of open)."),
    Headline("voc", "VOC, clean successes", 0.97, False,
             "Spearman of predicted progress against time. A clock has 1, so read it with the next lines."),
    Headline("voc_failure", "VOC, failures", 0.35, True,
             "On failures progress should not rise with time."),
    Headline("voc_reversed", "VOC, reversed successes", -0.90, True,
             "Clean successes shown backwards: progress should fall."),
    Headline("voc_shuffled_true_order", "VOC, shuffled, true order", _NONE, False,
             "High if the model reads the picture, whatever the order in which frames are shown."),
    Headline("voc_shuffled_shown_order", "VOC, shuffled, shown order", _NONE, True,
             "High if the model reads the clock. 0 is right."),
    Headline("label_mae", "Error to the dense label", _NONE, True,
             "Mean absolute difference over all frames of all outcomes."),
    Headline("instruction_margin", "Instruction margin", _NONE, False,
             "Final progress under the right instruction minus the highest under a wrong one."),
    Headline("ece", "Calibration error (last frames)", 0.10, True,
             "Of the success probability, 10 equal bins."),
)  # fmt: skip


def show(value: float) -> str:
    """A figure in at most five signs: .97, −.90, 1.00; a dash where it is undefined."""
    if math.isnan(value):
        return "–"
    text = f"{abs(value):.2f}" if abs(value) >= 0.9951 else f"{abs(value):.3f}".removeprefix("0")
    text = text if text.strip("0.") else "0"
    return f"−{text}" if value < 0 and text != "0" else text


def show_interval(result: Result, metric: str) -> str:
    """`.95 … 1.00`, or nothing where there is no interval."""
    low, high = result.intervals.get(metric, (math.nan, math.nan))
    return "" if math.isnan(low) else f"{show(low)} … {show(high)}"


def console_table(evaluation: Evaluation) -> Table:
    """The headline figures for the terminal."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("measure", no_wrap=True)
    table.add_column("target", justify="right", no_wrap=True)
    groups = [name for name in GROUP_TITLES if name in evaluation.groups]
    for name in groups:
        table.add_column(name, justify="right", no_wrap=True)
    for line in HEADLINES:
        cells = []
        for name in groups:
            value = evaluation.groups[name].metrics.get(line.metric, math.nan)
            verdict = line.verdict(value) if name == "heldout" else ""
            mark = {"met": " ✓", "missed": " ✗", "": ""}[verdict]
            cells.append(Text(show(value) + mark, style={"met": "green", "missed": "red", "": ""}[verdict]))
        table.add_row(line.title, line.bound, *cells)
    return table
