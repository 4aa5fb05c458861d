"""`rbm eval` and `rbm report eval`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from rbm.errors import UserError
from rbm.evaluation import report as pages
from rbm.evaluation.headline import HEADLINES, console_table, show
from rbm.evaluation.results import load


@click.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--cfg", "show", is_flag=True, help="Print the configuration and stop.")
def evaluate(overrides: tuple[str, ...], show: bool) -> None:
    """Evaluate a reward model on held-out trajectories and new tasks, and write a report.

    \b
    Examples:
      rbm eval
      rbm eval checkpoint=runs/first/model report=runs/first/report
      rbm eval corpus=data/mine 'split.heldout_tasks=[open the drawer]' device=cpu
      rbm eval --cfg                            every key there is
    """
    from omegaconf import OmegaConf

    from rbm.config import compose, plain
    from rbm.corpus.split import heldout_numbers, open_rows, split_corpus
    from rbm.evaluation.evaluate import Protocol, evaluate_split
    from rbm.scoring import Scorer

    config = compose("eval", overrides)
    if show:
        click.echo(OmegaConf.to_yaml(config))
        return
    unnamed = OmegaConf.is_missing(config, "corpus")
    if unnamed and config.selection is None:
        raise UserError("say which corpus: data.corpus=FOLDER")
    corpus, rows = open_rows(None if unnamed else config.corpus, config.snapshot, config.selection)
    parts = split_corpus(corpus, **config.split, rows=rows)
    scorer = Scorer.from_pretrained(config.checkpoint, device=config.device)
    protocol = Protocol(config.most_instructions, config.most_in_pairs, config.bootstrap, config.seed)
    console = Console()
    heldout = heldout_numbers(corpus, config.split.heldout_tasks, config.split.heldout_scenes)
    known = trained_on(config.checkpoint, [corpus.tasks[number].text for number in heldout])
    for key, now, then in split_differences(config.checkpoint, plain(config.split)):
        console.print(
            f"warning: this model was trained with data.{key}={then} and is evaluated with {now}: it may have been "
            f"trained on some of what is tested; give data.{key}={then}",
            markup=False,
        )
    if known:
        console.print(f"note: this model was trained on {', '.join(known)}: new tasks are not new to it", markup=False)
    facts = {
        "model": str(config.checkpoint or "shipped weights"),
        "corpus": str(corpus.location if config.selection else config.corpus or "bundled"),
        "snapshot": corpus.snapshot,
        "frames a clip": str(scorer.context_frames),
        "seed": str(config.seed),
    }
    evaluation = evaluate_split(scorer, corpus, parts, protocol, facts)
    page = pages.write(evaluation, config.report)
    console.print(console_table(evaluation))
    console.print(f"report: {page}", soft_wrap=True)


def trained_on(checkpoint: str | None, heldout_tasks: Sequence[str]) -> list[str]:
    """Which of the tasks held out here the checkpoint did not hold out when it was trained, by its own record."""
    from rbm.assets import nano_weights
    from rbm.model.checkpoint import facts_of

    record = facts_of(checkpoint or nano_weights()).get("tasks")
    return [] if record is None else [task for task in heldout_tasks if task in record]


SPLIT = {
    "heldout_tasks": "heldout_tasks",
    "heldout_scenes": "heldout_scenes",
    "heldout_per_quality": "heldout_per_quality",
    "validation_per_quality": "validation_per_quality",
    "seed": "split_seed",
}
"""Keys of a split, and what the training's data calls them."""


def split_differences(checkpoint: str | None, split: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where this split is another than that of the training, by the checkpoint's own record: key, now, then.

    Of the shipped weights nothing is said: none of the bundled corpus is in them.
    """
    from rbm.model.checkpoint import facts_of

    if checkpoint is None:
        return []
    data = ((facts_of(checkpoint).get("config") or {}).get("data")) or {}
    return [
        (theirs, split[ours], data[theirs])
        for ours, theirs in SPLIT.items()
        if theirs in data and data[theirs] != split[ours]
    ]


@click.command("eval")
@click.argument("folder", default="report", type=click.Path(path_type=Path))
def report_eval(folder: Path) -> None:
    """Make index.html, metrics.json and the pictures again from FOLDER/results.json (default: ./report)."""
    page = pages.rebuild(folder)
    console = Console()
    console.print(console_table(load(folder / pages.RESULTS)))
    console.print(f"report: {page}", soft_wrap=True)


@click.command("spread")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
def report_spread(folders: tuple[Path, ...]) -> None:
    """Headline figures over several runs, mean (lowest to highest), as a Markdown table.

    \b
    Example:
      rbm report spread report0 report1 report2
    """
    runs = [read_metrics(folder / pages.METRICS) for folder in folders]
    click.echo("| measure | target | held-out trajectories | tasks never trained on | clock |")
    click.echo("| --- | --- | --- | --- | --- |")
    for line in HEADLINES:
        cells = [
            spread([run.get(f"{group}.{line.metric}") for run in runs]) for group in ("heldout", "newtask", "clock")
        ]
        click.echo(f"| {line.title.strip()} | {line.bound} | {' | '.join(cells)} |")


def read_metrics(path: Path) -> dict[str, float | None]:
    """The flat figures of a report.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no figures to read ({error}); `rbm eval report={path.parent}` makes them") from error


def spread(values: Sequence[float | None]) -> str:
    """`mean (lowest to highest)` of the values that are there; one value, or equal ones, alone."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    low, high = show(min(found)), show(max(found))
    return low if low == high else f"{show(sum(found) / len(found))} ({low} to {high})"
