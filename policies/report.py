"""`rbm report rl`: what a folder of runs came to, as a table, figures and one JSON file.

A run is a folder with `config.json`, `curve.jsonl` where something is learned and, once it is finished, `result.json`:
`policies.online`, `policies.offline` and `policies.planning` all write them. Runs that differ in their seed alone are
one line; where others of the same algorithm, task and reward differ in more, what they differ in is told.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import click
import numpy as np

from policies.monitor import Watched, read_monitor
from rbm.errors import UserError
from rbm.output import whole_file

COLOURS = {"learned": "#0072B2", "sparse": "#E69F00", "dense": "#009E73", "none": "#777777"}
ORDER = tuple(COLOURS)
GOOD = 0.8
"""Success whose first moment the table tells."""
STYLES = ("-", "--", ":", "-.")

_ELSEWHERE = ("seed", "run_dir", "data_dir", "threads", "offline.data_dir")
"""Keys of a configuration in which the runs of a line may differ."""


@dataclass(frozen=True)
class FinishedRun:
    """One run.

    Attributes:
        name: the folder, relative to the one that was asked for.
        result: `result.json`.
        steps, success: the curve; success is nan where a point of it has none.
        watched: what a monitor said of each training episode.
        config: `config.json`, a value for each dotted key.
        variant: in what it differs from others of its algorithm, task and reward, as `key=value, …`; mostly empty.
    """

    name: str
    result: dict[str, Any]
    steps: list[int]
    success: list[float]
    watched: list[Watched] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Algorithm, task, reward."""
        return str(self.result["algorithm"]), str(self.result["task"]), str(self.result["reward"])

    def success_at(self, budget: int) -> float:
        """Mean of the last three evaluations within so many steps of learning; nan where there is none."""
        known = [rate for step, rate in zip(self.steps, self.success, strict=True) if step <= budget and rate == rate]
        return float(np.mean(known[-3:])) if known else float("nan")

    @property
    def good_from(self) -> int | None:
        """Steps at the first evaluation with a success of `GOOD`; none if there never was one."""
        return next((step for step, rate in zip(self.steps, self.success, strict=True) if rate >= GOOD), None)

    @property
    def label(self) -> str:
        """Reward and variant."""
        return f"{self.key[2]} ({self.variant})" if self.variant else self.key[2]


def read_runs(folder: Path) -> tuple[list[FinishedRun], list[str]]:
    """The finished runs below a folder, and the names of those that are not finished.

    Raises:
        UserError: there is no run at all, or a file is damaged.
    """
    finished, unfinished = [], []
    for config in sorted(folder.rglob("config.json")):
        place = config.parent
        if (place / "model.safetensors").exists():  # a model that a run made, as `rbm refine` does
            continue
        name = place.relative_to(folder).as_posix()
        if not (place / "result.json").exists():
            unfinished.append(name)
            continue
        try:
            result = json.loads((place / "result.json").read_text())
            curve = place / "curve.jsonl"
            lines = [json.loads(line) for line in curve.read_text().splitlines()] if curve.exists() else []
            points = [(line["step"], line.get("success_rate", float("nan"))) for line in lines]
            told = _flat(json.loads(config.read_text()))
            steps, success = [p[0] for p in points], [p[1] for p in points]
            run = FinishedRun(name, result, steps, success, read_monitor(place), told)
            assert run.key
            finished.append(run)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{place} is damaged: delete it, or run it again ({error})") from error
    if not finished and not unfinished:
        raise UserError(f"no runs in {folder}: `rbm rl run_dir={folder}/…` makes them")
    return _told_apart(finished), unfinished


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found.update(_flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value})
    return found


def _told_apart(runs: list[FinishedRun]) -> list[FinishedRun]:
    """The same with their variants."""
    groups: dict[tuple[str, str, str], list[FinishedRun]] = defaultdict(list)
    for run in runs:
        groups[run.key].append(run)
    for group in groups.values():
        origins: dict[str, str] = {}
        for number, run in enumerate(group):
            if start := run.config.get("start"):  # policies that go on from several seeds of one run are seeds of one
                same = origins.setdefault(_origin(start), start)
                group[number] = replace(run, config={**run.config, "start": same})
    by_name = {run.name: run for group in groups.values() for run in group}
    found = []
    for name in (run.name for run in runs):
        run = by_name[name]
        group = groups[run.key]
        keys = sorted({key for other in group for key in other.config} - set(_ELSEWHERE))
        said = []
        for key in keys:
            values = {str(other.config.get(key)) for other in group}
            if len(values) > 1:
                said.append(f"{key.rpartition('.')[2]}={_short(str(run.config.get(key)), values)}")
        found.append(replace(run, variant=", ".join(said)))
    return found


def _short(value: str, others: set[str]) -> str:
    """A value; of a path so many of its last parts, two at least, as tell it from the others."""
    if value.count("/") < 2 or "://" in value:
        return "none" if value == "None" else value
    parts = Path(value).parts
    for count in range(2, len(parts)):
        ends = {Path(other).parts[-count:] for other in others if other != value}
        if parts[-count:] not in ends:
            return "/".join(parts[-count:])
    return value


def _origin(start: str) -> str:
    """What the run that another began with was asked for, whatever its seed; where it is gone, its folder."""
    try:
        config = json.loads((Path(start) / "config.json").read_text())
    except (OSError, ValueError):
        return start
    before = config.get("start")
    return json.dumps({**config, "seed": None, "start": before and _origin(before)}, sort_keys=True)


Budgets = Mapping[str, int]
"""Steps of learning, for `ALGORITHM/TASK` or, under the empty name, for all others."""


def read_budgets(given: Sequence[str]) -> dict[str, int]:
    """`["1600", "sac/door-close=800"]` as budgets.

    Raises:
        UserError: one of them is neither a number of steps nor ALGORITHM/TASK=NUMBER.
    """
    found: dict[str, int] = {}
    for text in given:
        key, _, number = text.rpartition("=")
        if not number.isdecimal() or ("=" in text and key.count("/") != 1):
            raise UserError(
                f"--at {text}: give steps, such as 1600, or ALGORITHM/TASK=STEPS, such as sac/door-close=800"
            )
        found[key] = int(number)
    return found


def _budget(budgets: Budgets, algorithm: str, task: str) -> int | None:
    return budgets.get(f"{algorithm}/{task}", budgets.get(""))


def table(runs: Sequence[FinishedRun], budgets: Budgets | None = None) -> list[dict[str, Any]]:
    """A line for each algorithm, task, reward, variant, in this order: success over seeds (mean, lowest, highest).

    Args:
        budgets: tell also the success within so many steps.

    Raises:
        UserError: a budget of runs that are not there.
    """
    budgets = budgets or {}
    unknown = set(budgets) - {"", *(f"{run.key[0]}/{run.key[1]}" for run in runs)}
    if unknown:
        raise UserError(f"--at: there is no finished run of {', '.join(sorted(unknown))}")
    groups: dict[tuple[str, str, str, str], list[FinishedRun]] = defaultdict(list)
    for run in runs:
        groups[*run.key, run.variant].append(run)
    lines = []
    for key in sorted(groups, key=lambda key: (key[0], key[1], ORDER.index(key[2]), key[3])):
        group = groups[key]
        algorithm, task, reward, variant = key
        budget = _budget(budgets, algorithm, task)
        rates = [float(run.result["success_rate"]) for run in group]
        bases = [run.result["base"] for run in group if run.result.get("base") is not None]
        good = [run.good_from for run in group if run.good_from is not None]
        lines.append(
            {
                "algorithm": algorithm,
                "task": task,
                "reward": reward,
                "variant": variant,
                "seeds": sorted(int(run.result["seed"]) for run in group),
                "success": float(np.mean(rates)),
                "lowest": min(rates),
                "highest": max(rates),
                "before": float(np.mean(bases)) if bases else None,
                "good_from": float(np.median(good)) if good else None,
                "good_seeds": len(good),
                **({} if budget is None else _within(group, budget)),
                "minutes": float(np.mean([run.result.get("seconds", float("nan")) for run in group])) / 60,
            }
        )
    return lines


def _within(group: Sequence[FinishedRun], budget: int) -> dict[str, Any]:
    rates = [run.success_at(budget) for run in group]
    return {
        "budget": budget,
        "within": float(np.mean(rates)),
        "within_lowest": min(rates),
        "within_highest": max(rates),
    }


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The lines as a Markdown table."""
    heads = ["algorithm", "task", "reward", "seeds", "before", "success", f"steps to {GOOD:.0%} (seeds)", "minutes"]
    early = any("within" in line for line in lines)
    if early:
        heads.insert(5, "early")
    found = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for line in lines:
        cells = [
            line["algorithm"],
            line["task"],
            f"{line['reward']} ({line['variant']})" if line["variant"] else line["reward"],
            str(len(line["seeds"])),
            "–" if line["before"] is None else f"{line['before']:.2f}",
            f"{line['success']:.2f} ({line['lowest']:.2f} to {line['highest']:.2f})",
            "–" if line["good_from"] is None else f"{line['good_from']:,.0f} ({line['good_seeds']})",
            f"{line['minutes']:.1f}",
        ]
        if early:
            cells.insert(5, f"{line['within']:.2f} within {line['budget']:,}" if "within" in line else "–")
        found.append(f"| {' | '.join(cells)} |")
    return "\n".join(found)


def plot_curves(runs: Sequence[FinishedRun], algorithm: str, target: Path) -> None:
    """One panel a task, one colour a reward: the mean over seeds, and lowest to highest as a band.

    Dotted: the policy that was cloned from the demonstrations, where there is one.
    """
    plt = _pyplot()
    mine = [run for run in runs if run.key[0] == algorithm and run.steps]
    tasks = sorted({run.key[1] for run in mine})
    labels = {run.label for run in mine}
    columns = len(labels) if sum(map(len, labels)) < 40 * len(tasks) else 1
    size = (3.6 * len(tasks), 3.0 + 0.2 * len(labels) / columns)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        for reward in ORDER:
            of_reward = [run for run in mine if run.key[1:] == (task, reward)]
            for number, label in enumerate(sorted({run.label for run in of_reward})):
                group = [run for run in of_reward if run.label == label]
                steps = np.linspace(max(run.steps[0] for run in group), min(run.steps[-1] for run in group), 41)
                curves = np.array([np.interp(steps, run.steps, run.success) for run in group])
                style = STYLES[number % len(STYLES)]
                axis.plot(steps, curves.mean(0), style, color=COLOURS[reward], label=label)
                axis.fill_between(steps, curves.min(0), curves.max(0), color=COLOURS[reward], alpha=0.15, lw=0)
        bases = [run.result["base"] for run in mine if run.key[1] == task and run.result.get("base") is not None]
        if any(bases):
            axis.axhline(float(np.mean(bases)), color="#777777", ls=":", lw=1, zorder=0)
        axis.set_title(task, fontsize=10)
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.2)
        axis.set_xlabel("updates" if mine[0].result.get("transitions") else "decisions")
    axes[0][0].set_ylabel("success rate")
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside lower left", ncols=columns)
    figure.suptitle(algorithm.replace("_", " "), fontsize=10)
    with whole_file(target) as temporary:
        figure.savefig(temporary, dpi=130, bbox_inches="tight")
    plt.close(figure)


def plot_watched(runs: Sequence[FinishedRun], target: Path, window: int = 20) -> None:
    """What the judge said against what was true, over training episodes: means of the last `window`.

    A row a reward and variant, a column a seed.
    """
    plt = _pyplot()
    rows: dict[str, list[FinishedRun]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.label, int(run.result["seed"]))):
        rows[run.label].append(run)
    width = max(map(len, rows.values()))
    size = (max(6.4, 3.6 * width), 0.8 + 1.8 * len(rows))
    figure, axes = plt.subplots(len(rows), width, figsize=size, sharex=True, sharey=True, squeeze=False)
    for row, group in zip(axes, rows.values(), strict=True):
        for axis in row[len(group) :]:
            axis.set_visible(False)
        row[0].set_ylabel(fill(group[0].label.replace("(", "\n("), 30), fontsize=7)
        for axis, run in zip(row, group, strict=False):
            _watched(axis, run, window)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.supxlabel("training episode (shaded: the monitor says that score and success part)", fontsize=8)
    figure.tight_layout()
    with whole_file(target) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def _watched(axis: Any, run: FinishedRun, window: int) -> None:
    for name, colour, label in (("judged", "#D55E00", "judged done"), ("success", "#009E73", "truly done")):
        values = np.array([getattr(episode, name) for episode in run.watched], float)
        width = min(window, len(values))
        means = np.convolve(values, np.ones(width) / width, "valid")
        axis.plot(np.arange(width - 1, len(values)), means, color=colour, label=label)
    parted = np.array([episode.diverged for episode in run.watched])
    axis.fill_between(np.arange(len(parted)), 0, 1, where=parted.tolist(), color="#D55E00", alpha=0.12, lw=0)
    axis.set_ylim(-0.02, 1.02)
    axis.set_title(run.name, fontsize=7, loc="left")
    axis.grid(alpha=0.2)


def _last_watched(run: FinishedRun, count: int = 60) -> dict[str, Any] | None:
    """Of its last training episodes the share that was judged done and that was, and the first at which they parted."""
    if not run.watched:
        return None
    return {
        "judged": float(np.mean([episode.judged for episode in run.watched[-count:]])),
        "success": float(np.mean([episode.success for episode in run.watched[-count:]])),
        "diverged_from": next((n for n, episode in enumerate(run.watched, 1) if episode.diverged), None),
    }


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


@click.command("rl")
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where to write; default: FOLDER/report.")
@click.option(
    "--at",
    "budgets",
    multiple=True,
    metavar="[ALGORITHM/TASK=]STEPS",
    help="Also the success within so many steps of learning.",
)
def report_rl(folder: Path, out: Path | None, budgets: tuple[str, ...]) -> None:
    """Tables and figures of the policies that were trained in FOLDER.

    Writes results.json (every curve; of the last 60 training episodes what was judged done, and what was), table.md, a
    figure for each algorithm, and, where score and success parted in a run, one of all watched runs of its algorithm
    and task: what was judged done, and what was.

    A step is a decision online and an update offline. Success is that of the last policy, or of the last three that
    were evaluated online; "steps to 80%" is the first evaluation that good, the median of the seeds that have one.

    \b
    Examples:
      rbm report rl runs --out docs/rl
      rbm report rl runs --at 1000
      rbm report rl runs --at 2000 --at sac/door-close=800
    """
    early = read_budgets(budgets)
    runs, unfinished = read_runs(folder)
    target = out or folder / "report"
    target.mkdir(parents=True, exist_ok=True)
    lines = table(runs, early)
    saved = {
        "table": lines,
        "runs": [
            {
                "name": run.name,
                "result": run.result,
                "variant": run.variant,
                "steps": run.steps,
                "success_rate": run.success,
                "watched": _last_watched(run),
            }
            for run in runs
        ],
    }
    with whole_file(target / "results.json") as temporary:
        temporary.write_text(json.dumps(saved) + "\n")
    with whole_file(target / "table.md") as temporary:
        temporary.write_text(markdown(lines) + "\n")
    for algorithm in sorted({run.key[0] for run in runs if run.steps}):
        plot_curves(runs, algorithm, target / f"{algorithm}.png")
    parted = {run.key[:2] for run in runs if any(episode.diverged for episode in run.watched)}
    for algorithm, task in sorted(parted):
        watched = [run for run in runs if run.key[:2] == (algorithm, task) and run.watched]
        plot_watched(watched, target / f"watched_{algorithm}_{task}.png")
    click.echo(markdown(lines))
    if unfinished:
        click.echo(f"{len(unfinished)} not finished: {', '.join(unfinished)}", err=True)
    click.echo(f"report: {target}", err=True)
