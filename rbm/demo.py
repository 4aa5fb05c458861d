"""`rbm demo`: the whole loop on the bundled corpus, from robot video to rewards."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

if TYPE_CHECKING:
    from rbm.corpus import Corpus
    from rbm.scoring import Scorer

console = Console()

FINISHED = "finished"
"""Mark in the working folder of a demo that ran to its end."""


@click.command()
@click.option("--out", default="runs/demo", show_default=True, type=click.Path(path_type=Path), help="Working folder.")
@click.option("--report", default="report", show_default=True, type=click.Path(path_type=Path), help="Report folder.")
@click.option("--seed", default=0, show_default=True, help="Of weights, draws and dropout.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def demo(out: Path, report: Path, seed: int, overrides: tuple[str, ...]) -> None:
    """Train nano on the bundled corpus, evaluate it on what it never saw, score a video, write a report.

    \b
    Examples:
      rbm demo
      rbm demo --seed 1 --out runs/demo1 --report report1
      rbm demo trainer.max_steps=100              a quick look
    A demo that was stopped goes on where it was; a finished one starts again.
    """
    from rbm.assets import bundled_corpus
    from rbm.corpus import Corpus, JpegCodec, copy_corpus
    from rbm.training.run import Interrupted

    began = time.monotonic()
    _stage(1, "Opening the bundled corpus and unpacking it for training (h264 → jpeg)")
    packed = Corpus.open(bundled_corpus())
    _clear_finished(out)
    corpus = out / "corpus"
    if not corpus.exists():
        from rich.progress import Progress

        with Progress(console=console, transient=True) as progress:
            # settings of its own: the published figures of the demo hold for exactly these pixels
            copy_corpus(packed, corpus, codec=JpegCodec(quality=90, subsampling="444"), progress=progress)
    tasks = len(packed.tasks)
    console.print(f"  {len(packed)} trajectories of {tasks} tasks; four tasks and a part of the others are held out")

    _stage(2, "Training the nano reward model: progress, success and preference")
    from rbm.config import compose, override
    from rbm.training.run import train

    config = compose(
        "train",
        ["experiment=demo", override("run_dir", out), override("data.corpus", corpus), f"seed={seed}", *overrides],
    )
    try:
        model = train(config)
    except Interrupted as stopped:
        console.print(str(stopped), markup=False)
        sys.exit(130)
    trained = time.monotonic()

    _stage(3, "Evaluating on held-out trajectories and on tasks never trained on")
    from rbm.corpus.split import split_corpus
    from rbm.evaluation import report as pages
    from rbm.evaluation.evaluate import evaluate_split
    from rbm.evaluation.headline import console_table
    from rbm.evaluation.results import write_atomic
    from rbm.scoring import Scorer
    from rbm.trajectory import Quality

    unpacked = Corpus.open(corpus)
    split = split_corpus(
        unpacked,
        config.data.heldout_tasks,
        config.data.heldout_per_quality,
        config.data.validation_per_quality,
        config.data.split_seed,
        config.data.heldout_scenes,
    )
    scorer = Scorer.from_pretrained(str(model), "cpu")
    facts = {"model": str(model), "corpus": "bundled", "snapshot": packed.snapshot, "seed": str(seed)}
    evaluation = evaluate_split(scorer, unpacked, split, facts=facts)
    page = pages.write(evaluation, report)

    _stage(4, "Scoring a held-out video")
    successes = split.heldout[unpacked.columns.quality[split.heldout] == Quality.SUCCESSFUL.rank]
    _score_one(scorer, unpacked, int(successes[0]), report)

    console.print(console_table(evaluation))
    spent = {"train_seconds": round(trained - began), "total_seconds": round(time.monotonic() - began)}
    write_atomic(report / "timing.json", (json.dumps(spent) + "\n").encode())
    (out / FINISHED).touch()
    console.print(f"{spent['total_seconds']} s in all, {spent['train_seconds']} s of it until the end of training")
    console.print(f"model:   {model}", soft_wrap=True)
    console.print(f"metrics: {report / pages.METRICS}", soft_wrap=True)
    console.print(f"report:  {page}", soft_wrap=True, style="bold")


def _score_one(scorer: Scorer, corpus: Corpus, number: int, folder: Path) -> None:
    """Write a trajectory's video to `folder`, score it as `rbm score` does, and draw the result."""
    from rbm.scoring.overlay import write_overlay
    from rbm.scoring.plot import write_plot
    from rbm.video import VideoFile, encode_video, stored_clip

    trajectory = corpus[number]
    video = folder / "attempt.mp4"
    encode_video(video, trajectory.frames(), fps=10)
    clip = stored_clip(VideoFile(str(video)))
    scores = scorer.score(clip, trajectory.task, every=1)
    write_plot(folder / "attempt.png", scores, clip)
    write_overlay(folder / "attempt-scored.mp4", VideoFile(str(video)), scores)
    console.print(
        f"  {video}: “{trajectory.task}” ends at progress {scores.progress[-1]:.2f}, "
        f"success {scores.success[-1]:.2f} (it was {trajectory.quality})"
    )
    console.print(f"  plot {folder / 'attempt.png'}, scored video {folder / 'attempt-scored.mp4'}")


def _clear_finished(out: Path) -> None:
    """Remove what an earlier demo made, if it came to its end; nothing else in the folder is touched."""
    if not (out / FINISHED).exists():
        return
    for name in ("corpus", "checkpoints", "logs", "model"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("config.yaml", FINISHED):
        (out / name).unlink(missing_ok=True)


def _stage(number: int, what: str) -> None:
    console.print(f"[bold cyan]{number}/4[/] [bold]{what}[/]")
