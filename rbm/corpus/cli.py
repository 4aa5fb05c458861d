"""`rbm corpus ...`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from rbm.assets import bundled_corpus
from rbm.corpus.copy import copy_corpus
from rbm.corpus.reader import Corpus
from rbm.errors import UserError
from rbm.trajectory import Quality


@click.group()
def corpus() -> None:
    """Look at a corpus, or copy it to another codec."""


@corpus.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--snapshot", help="An older snapshot; the newest by default.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(path: Path | None, snapshot: str | None, as_json: bool) -> None:
    """What a corpus holds; without PATH, the bundled one.

    \b
    Examples:
      rbm corpus info
      rbm corpus info data/mine --json
    """
    facts = Corpus.open(path or bundled_corpus(), snapshot).info()
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    console = Console()
    console.print(f"[bold]{escape(facts['path'])}[/]  snapshot {facts['snapshot']}", highlight=False, soft_wrap=True)
    size = facts["bytes"] / 1e6
    console.print(
        f"{facts['trajectories']} trajectories, {facts['frames']} frames, "
        f"{size:.1f} MB ({', '.join(facts['codecs'])}); "
        f"{facts['dense']} with dense labels, {facts['messy']} messy successes, {facts['scenes']} scenes",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("task", *(quality.value for quality in Quality), box=None)
    for task, counts in facts["by_task"].items():
        table.add_row(escape(task), *(str(counts.get(quality.value, 0)) for quality in Quality))
    table.add_row("[bold]all[/]", *(str(facts["by_quality"].get(quality.value, 0)) for quality in Quality))
    console.print(table)


@corpus.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--codec", type=click.Choice(["jpeg", "h264"]), help="Encode again; as it is by default.")
@click.option("--short-side", type=int, help="Scale frames down to this many pixels (with --codec).")
def copy(source: Path, destination: Path, codec: str | None, short_side: int | None) -> None:
    """Copy a corpus into one segment, with the same or another codec.

    \b
    Examples:
      rbm corpus copy data/archive data/training --codec jpeg
    """
    if short_side is not None and codec is None:
        raise UserError("--short-side encodes again: say --codec too")
    with Progress(console=Console(stderr=True)) as progress:
        copied = copy_corpus(source, destination, codec, short_side, progress=progress)
    click.echo(f"{len(copied)} trajectories in {copied.path}")
