"""`rbm score`, `rbm compare`, `rbm rank`: a trained model looks at video."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from rbm.errors import UserError
from rbm.output import check_target, whole_file
from rbm.scoring.overlay import MAX_FRAMES, write_overlay
from rbm.scoring.scorer import Scorer, best_first, check_task
from rbm.scoring.scores import Scores
from rbm.scoring.views import Video
from rbm.scoring.vote import parse_vote
from rbm.video import VideoFile, stored_clip

_task = click.option("--task", required=True, help="The instruction, such as 'open the drawer'.")
_checkpoint = click.option(
    "--checkpoint",
    help="A trained model: folder, file, or id on the Hugging Face hub; without it, the nano weights shipped here.",
)
_dtype = click.option("--dtype", help="Precision of the weights: float32, bfloat16, float16; default as stored.")
_device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
_json = click.option("--json", "json_path", metavar="FILE", help="Write everything as JSON; - is the standard output.")


@click.command(short_help="Progress and success of a video, frame by frame.")
@click.argument("videos", nargs=-1, required=True, metavar="VIDEO...")
@_task
@_checkpoint
@_json
@click.option("--plot", "plot_path", metavar="FILE", help="Draw curves above a strip of frames (.png, .pdf, .svg).")
@click.option("--video", "video_path", metavar="FILE", help="Write the video with its scores drawn in (.mp4).")
@click.option(
    "--every",
    type=click.IntRange(min=1),
    help="Score every k-th frame of the video, and the last; without it, 64 spread evenly over it.",
)
@click.option("--dense", is_flag=True, help="Say a score for every frame, those in between on the line between two.")
@click.option("--vote", default="3/5", show_default=True, metavar="K/N", help="Done: K of the last N scored frames.")
@click.option(
    "--view",
    "views",
    metavar="NAME=FILE",
    multiple=True,
    help="Another view of the same attempt, for models that read several; VIDEO is the first. Repeatable.",
)
@click.option("--rows", type=click.IntRange(min=2), default=20, show_default=True, help="Rows of the table.")
@_device
@_dtype
def score(
    videos: tuple[str, ...],
    task: str,
    checkpoint: str | None,
    json_path: str | None,
    plot_path: str | None,
    video_path: str | None,
    every: int | None,
    dense: bool,
    vote: str,
    views: tuple[str, ...],
    rows: int,
    device: str,
    dtype: str | None,
) -> None:
    """Progress (0 to 1, with its spread) and success probability for frames of each VIDEO.

    Each frame is scored from what came before it, as a live session would say it. A long video takes no more memory
    than a short one.

    \b
    Examples:
      rbm score attempt.mp4 --task "open the drawer"
      rbm score attempt.mp4 --task "open the drawer" --plot scores.png --video scored.mp4
      rbm score runs/*.mp4 --task "open the drawer" --json scores.json
      rbm score long.mp4 --task "open the drawer" --every 5 --dense --json scores.json
      rbm score near.mp4 --view wrist=wrist.mp4 --task "open the drawer" --checkpoint runs/two_views/model
    """
    check_task(task)
    k, n = parse_vote(vote)
    others = _other_views(views, videos)
    _check_outputs((*videos, *others.values()), json_path, plot_path, video_path, len(videos))
    scorer = Scorer.from_pretrained(checkpoint, device, dtype)
    if others and scorer.views and scorer.views[0] in others:
        raise UserError(f"--view {scorer.views[0]}=…: VIDEO is this view already, the first that the model reads")
    out = _console(json_path)
    entries = []
    for path in videos:
        video = VideoFile(path)
        clip = stored_clip(video)
        seen = clip if every is None else video
        shown: Video = {(*scorer.views, "")[0]: seen, **others} if others else seen
        scores = scorer.score(shown, task, every or 1)
        done = scores.done_at(k, n)
        done_frame = None if done is None else int(scores.frame_index[done])
        if dense:
            scores = scores.dense()
        entries.append(
            {"video": path, **({"views": others} if others else {}), **scores.to_json(), "done_frame": done_frame}
        )
        out.print(scores.table(path, rows))
        out.print(_summary(scores, done_frame), highlight=False)
        if plot_path is not None:
            from rbm.scoring.plot import write_plot

            write_plot(Path(plot_path), scores, clip)
            out.print(f"plot: {plot_path}", highlight=False, markup=False, soft_wrap=True)
        if video_path is not None:
            _write_video(Path(video_path), video, scores, out)
    _write_json(json_path, {"task": task, "checkpoint": checkpoint, "videos": entries}, out)


@click.command(short_help="Which of two attempts is better.")
@click.argument("a")
@click.argument("b")
@_task
@_checkpoint
@_json
@_device
@_dtype
def compare(
    a: str, b: str, task: str, checkpoint: str | None, json_path: str | None, device: str, dtype: str | None
) -> None:
    """Probability that attempt A at the task is better than attempt B.

    \b
    Example:
      rbm compare monday.mp4 tuesday.mp4 --task "open the drawer"
    """
    check_task(task)
    _check_outputs((a, b), json_path)
    scorer = Scorer.from_pretrained(checkpoint, device, dtype)
    clip_a, clip_b = scorer.context_clip(a), scorer.context_clip(b)
    p = scorer.compare(clip_a, clip_b, task)
    scored = scorer.score_batch([(clip_a, task), (clip_b, task)])
    out = _console(json_path)
    out.print(_attempts([("A", a, scored[0]), ("B", b, scored[1])], ""))
    verdict = "neither is better" if abs(p - 0.5) < 5e-4 else f"{'A' if p > 0.5 else 'B'} is better"
    out.print(f"P(A is better) = {p:.3f}: {verdict}", highlight=False)
    _write_json(json_path, {"task": task, "checkpoint": checkpoint, "a": a, "b": b, "p_a_better": round(p, 6)}, out)


@click.command(short_help="Order several attempts, best first.")
@click.argument("videos", nargs=-1, required=True, metavar="VIDEO...")
@_task
@_checkpoint
@_json
@_device
@_dtype
def rank(
    videos: tuple[str, ...], task: str, checkpoint: str | None, json_path: str | None, device: str, dtype: str | None
) -> None:
    """Attempts at one task, best first.

    They are ordered by their worth: the model's utility, or, of a model that compares pairs jointly, the mean
    preference over all others. It means something beside other attempts at the same task only.

    \b
    Example:
      rbm rank attempts/*.mp4 --task "open the drawer" --json order.json
    """
    check_task(task)
    _check_outputs(videos, json_path)
    scorer = Scorer.from_pretrained(checkpoint, device, dtype)
    clips = [scorer.context_clip(path) for path in videos]
    worth = scorer.worth(clips, task)
    order = best_first(worth)
    scored = scorer.score_batch([(clip, task) for clip in clips])
    out = _console(json_path)
    rows = [(str(n + 1), videos[i], scored[i]) for n, i in enumerate(order)]
    out.print(_attempts(rows, "rank", worth=[worth[i] for i in order]))
    entries = [
        {
            "video": videos[i],
            "progress": _last(scored[i].progress),
            "success": _last(scored[i].success),
            "worth": round(worth[i], 6),
        }
        for i in order
    ]
    _write_json(json_path, {"task": task, "checkpoint": checkpoint, "order": order, "ranked": entries}, out)


def _other_views(views: tuple[str, ...], videos: tuple[str, ...]) -> dict[str, str]:
    """Files of the views that `--view` names."""
    found: dict[str, str] = {}
    for given in views:
        name, sign, path = given.partition("=")
        if not (name and sign and path):
            raise UserError(f"--view {given}: write NAME=FILE, such as --view wrist=wrist.mp4")
        if name in found:
            raise UserError(f"--view {name} is given twice")
        found[name] = path
    if found and len(videos) > 1:
        raise UserError(f"--view belongs to one video, {len(videos)} were given; score them one by one")
    return found


def _check_outputs(
    files: tuple[str, ...],
    json_path: str | None,
    plot_path: str | None = None,
    video_path: str | None = None,
    videos: int | None = None,
) -> None:
    """Every output that could not be written is refused before anything is scored.

    `files` are what is read, `videos` says how many of them are scored (default all).
    """
    count = len(files) if videos is None else videos
    from rbm.scoring.plot import SUFFIXES

    for option, path, suffixes in (("--plot", plot_path, SUFFIXES), ("--video", video_path, (".mp4",))):
        if path is not None:
            if count > 1:
                raise UserError(f"{option} draws one video, {count} were given; score them one by one")
            check_target(Path(path), suffixes, files)
    if json_path not in (None, "-"):
        check_target(Path(str(json_path)), (), files)


def _console(json_path: str | None) -> Console:
    """Where the tables go: not in between JSON."""
    return Console(stderr=json_path == "-")


def _summary(scores: Scores, done_frame: int | None) -> str:
    text = f"at the end: progress {scores.progress[-1]:.2f} ± {scores.progress_std[-1]:.2f}, success "
    text += f"{scores.success[-1]:.2f}"
    if scores.remaining is not None:
        text += f", {scores.remaining[-1]:.1f} s to go"
    if done_frame is not None:
        text += f", done at {np.interp(done_frame, scores.frame_index, scores.timestamp):.2f} s"
    return text + "\n"


def _attempts(rows: list[tuple[str, str, Scores]], label: str, **more: list[float]) -> Table:
    """A row for each attempt; `more` are further columns."""
    table = Table(header_style="dim")
    table.add_column(label, justify="right")
    table.add_column("video", overflow="fold")
    for heading in ("final progress", "±", "final success", *more):
        table.add_column(heading, justify="right")
    for n, (name, path, scores) in enumerate(rows):
        numbers = (scores.progress[-1], scores.progress_std[-1], scores.success[-1], *(own[n] for own in more.values()))
        table.add_row(name, Text(path), *(f"{value:.3f}" for value in numbers))
    return table


def _write_video(target: Path, video: VideoFile, scores: Scores, out: Console) -> None:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("drawing the video", total=min(video.n_frames, MAX_FRAMES))
        written = write_overlay(target, video, scores, lambda: progress.advance(bar))
    lapse = f" (a time lapse: {written} of {video.n_frames} frames)" if written < video.n_frames else ""
    out.print(f"video: {target}{lapse}", highlight=False, markup=False, soft_wrap=True)


def _write_json(json_path: str | None, content: dict[str, Any], out: Console) -> None:
    if json_path is None:
        return
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    text = re.sub(r"\[[-+.,eE\d\s]*\]", lambda found: " ".join(found[0].split()), text)  # one line for a row of numbers
    if json_path == "-":
        sys.stdout.write(text)
        return
    with whole_file(Path(json_path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    out.print(f"json: {json_path}", highlight=False, markup=False, soft_wrap=True)


def _last(values: Any) -> float:
    return round(float(values[-1]), 6)
