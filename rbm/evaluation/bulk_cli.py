"""`rbm score`: of videos (`rbm.scoring.cli`), or with `--corpus` of a whole corpus or LeRobot data set."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from rbm.scoring.cli import score as score_videos


@click.command("score", short_help="Scores of a whole corpus or LeRobot data set.")
@click.option("--corpus", "place", required=True, help="Folder or URL of a corpus, or folder of a LeRobot data set.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the scores (parquet)."
)
@click.option(
    "--checkpoint",
    help="A trained model: folder, file, or id on the Hugging Face hub; without it, the nano weights shipped here.",
)
@click.option("--selection", help="File of a saved selection (`rbm corpus select`): only its trajectories.")
@click.option("--snapshot", help="An older snapshot of the corpus, by its id or tag; the newest by default.")
@click.option("--view", help="Camera that is shown; by default those that the model reads, or else the first.")
@click.option(
    "--every",
    type=click.IntRange(min=1),
    help="Score every k-th frame from what a live session would have seen; by default a clip of even frames at once.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes, each with a model of its own: one a GPU, or (each computes with one thread) one a core.",
)
@click.option("--ray", metavar="ADDRESS", help="Work on a Ray cluster: its address, auto, or local.")
@click.option("--part-size", type=click.IntRange(min=1), default=256, show_default=True, help="Trajectories in a file.")
@click.option("--retry", is_flag=True, help="Try again what an earlier run could not read.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
@click.option("--dtype", help="Precision of the weights: float32, bfloat16, float16; default as stored.")
@click.option("--json", "as_json", is_flag=True, help="Print what came of it as JSON.")
def score_corpus(
    place: str,
    out: Path,
    checkpoint: str | None,
    selection: str | None,
    snapshot: str | None,
    view: str | None,
    every: int | None,
    workers: int | None,
    ray: str | None,
    part_size: int,
    retry: bool,
    device: str,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Progress and success for frames of every trajectory of a corpus, or every episode of a LeRobot data set.

    Scores go to FOLDER/part-000000.parquet and so on; those of a LeRobot data set also, a row a frame, to
    FOLDER/robometer_progress.parquet, which its reward-weighted cloning reads. The same command goes on where it was
    stopped. What cannot be read is named and left out.

    \b
    Examples:
      rbm score --corpus data/mine --out scores
      rbm score --corpus s3://lab/corpus --snapshot v1 --out scores --workers 8
      rbm score --corpus data/aloha --view top --every 5 --out scores --checkpoint runs/mine/model
      rbm score --corpus /shared/corpus --out /shared/scores --ray auto
    """
    from rbm.evaluation.bulk_run import Crew, open_source, plan, run
    from rbm.evaluation.bulk_sources import LeRobotSource

    source = open_source(place, snapshot, selection, view)
    job, model = plan(source, out, checkpoint, device, dtype, every, part_size)
    _say(f"{len(source)} {'episodes' if isinstance(source, LeRobotSource) else 'trajectories'}, {job.parts} parts")
    if isinstance(source, LeRobotSource):
        cameras = source.cameras(model.backbone.views)
        shown = ", ".join(f"{key} as {view}" if view else key for view, key in cameras.items())
        _say(f"camera: {shown} (of {', '.join(source.dataset.cameras)})")
    with _stoppable(), _bar(len(source)) as tick:
        outcome = run(job, model, Crew(workers, ray), tick, retry)
    for name, why in outcome.unreadable:
        _say(f"left out: {name}: {why}")
    if outcome.several_tasks:
        _say(f"{outcome.several_tasks} episodes have more than one task; they were scored under the first")
    facts = outcome.to_json()
    if outcome.unreadable:
        _say(f"{len(outcome.unreadable)} could not be read, of {len(source)}; --retry tries them again")
    kept = f", {outcome.kept_parts} of {outcome.parts} parts were there already" if outcome.kept_parts else ""
    if outcome.kept_parts == outcome.parts:
        _say(f"{outcome.trajectories} scored, {outcome.frames} frames: all of it was there already")
    else:
        _say(
            f"{outcome.trajectories} scored, {outcome.frames} frames, in {outcome.seconds:.1f} s "
            f"({facts['trajectories_per_second']:g} trajectories, {facts['frames_per_second']:g} frames a second{kept})"
        )
    if as_json:
        click.echo(json.dumps({"folder": str(job.folder.path), **facts}, indent=2, ensure_ascii=False))
    else:
        click.echo(str(job.folder.path / (source.joined or "")))


class _Score(click.Command):
    """Two commands of one name: `--corpus` makes the difference. Each has its own options and help."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if any(arg == "--corpus" or arg.startswith("--corpus=") for arg in args):
            return score_corpus.make_context(info_name, args, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


score = _Score(
    "score",
    params=score_videos.params,
    callback=score_videos.callback,
    help=score_videos.help,
    short_help=score_videos.short_help,
    epilog="A whole corpus, or a LeRobot data set: rbm score --corpus PATH --out FOLDER; its options: rbm score "
    "--corpus PATH --help",
)


@contextmanager
def _stoppable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say("stopped; the same command goes on")
        sys.exit(130)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int, int], None]]:
    """What is told of trajectories and frames: a bar with rates and time left; without a terminal a line a tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    done = frames = scored = 0
    began = time.monotonic()
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=total, rate="")

        def tick(more: int, more_frames: int) -> None:
            nonlocal done, frames, scored
            before, done, frames = done, done + more, frames + more_frames
            scored += more if more_frames else 0
            seconds = max(time.monotonic() - began, 1e-9)
            rate = f"{scored / seconds:.1f}/s, {frames / seconds:.0f} frames/s"
            progress.update(task, completed=done, rate=rate)
            if not console.is_terminal and scored and before * 10 // total < done * 10 // total:
                _say(f"  {done} of {total}, {rate}, {seconds * (total - done) / scored:.0f} s left")

        yield tick


def _say(line: str) -> None:
    click.echo(line, err=True)
