"""`rbm relabel`: a data set again, with the rewards that a reward model gives."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from policies.shaping import FORMS, Shaping
from rbm.errors import UserError


@click.command(short_help="Rewards of a model for a data set: Minari, LeRobot, HDF5, a corpus.")
@click.argument("source")
@click.option("--out", required=True, metavar="PLACE", help="A new place for the result, in the format of SOURCE.")
@click.option("--task", help="The instruction of every episode; by default what the data says of each.")
@click.option("--camera", help="Whose pictures are scored, by name or last part of it; by default the first.")
@click.option("--every", type=click.IntRange(min=1), default=1, show_default=True, help="Score every k-th frame.")
@click.option(
    "--between",
    type=click.Choice(["interpolate", "hold"]),
    default="interpolate",
    show_default=True,
    help="Frames that are not scored: on the line between two that are, or as the last that is.",
)
@click.option("--form", type=click.Choice(FORMS), default=Shaping.form, show_default=True, help="Form of the reward.")
@click.option("--gamma", type=float, default=Shaping.gamma, show_default=True, help="Discount, of form potential only.")
@click.option("--scale", type=float, default=Shaping.scale, show_default=True, help="Multiplies what is learned.")
@click.option(
    "--pessimism", type=float, default=Shaping.pessimism, show_default=True, help="β: value = progress − β·spread."
)
@click.option(
    "--success-bonus",
    type=float,
    default=Shaping.success_bonus,
    show_default=True,
    help="Paid once, when the vote first says that the task is done.",
)
@click.option(
    "--vote",
    default="3/5",
    show_default=True,
    metavar="K/N",
    help="Done: K of the last N scored frames reach the threshold.",
)
@click.option("--threshold", default=0.5, show_default=True, help="Of the success probability, for the vote.")
@click.option(
    "--checkpoint",
    help="A trained model: folder, file, or id on the Hugging Face hub; without it, the nano weights shipped here.",
)
@click.option("--server", metavar="URL", help="Scores of a server (`rbm serve`) in place of a model here.")
@click.option(
    "--scores",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep the scores in this file: other rewards from them need no model run. By default they go at the end.",
)
@click.option(
    "--transitions",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.npz",
    help="Also write states, actions and rewards for `python -m policies.offline.iql` (Minari, HDF5; flat states).",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
@click.option("--json", "as_json", is_flag=True, help="Print what came of it as JSON.")
def relabel(
    source: str,
    out: str,
    task: str | None,
    camera: str | None,
    every: int,
    between: str,
    form: str,
    gamma: float,
    scale: float,
    pessimism: float,
    success_bonus: float,
    vote: str,
    threshold: float,
    checkpoint: str | None,
    server: str | None,
    scores: Path | None,
    transitions: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Score every episode of SOURCE with a reward model, and write the data set again with rewards made of the scores.

    \b
    SOURCE and what is written:
      Minari    a folder, or an id      a data set with other rewards; the old ones and the scores in infos
      LeRobot   a folder (v2.0 to 3.0)  a copy with the columns reward, progress, success
      HDF5      a file as robomimic's   a copy with other rewards; the old ones in env_rewards
      corpus    a folder or URL         FILE.npz of states, actions, rewards, for `python -m policies.offline.iql`

    A run that was stopped goes on with the same command. Episodes that cannot be read are named and left out.

    \b
    Examples:
      rbm relabel data/lift.hdf5 --out data/lift_rm.hdf5 --task "lift the cube"
      rbm relabel mine/door-v0 --out mine/door-relabelled-v0 --form potential --gamma 0.98
      rbm relabel data/aloha --out data/aloha_rm --camera top --every 5 --server http://127.0.0.1:8000
      rbm relabel data/corpus --out mixed.npz --form minus_one --success-bonus 1 --vote 3/5
    """
    from policies.relabel.offline import Labelling, LocalScores, RemoteScores, Scores, open_data
    from policies.relabel.offline import relabel as run
    from rbm.scoring.client import Client
    from rbm.scoring.scorer import Scorer
    from rbm.scoring.vote import parse_vote

    if server is not None and checkpoint is not None:
        raise UserError("--checkpoint is for a model here and --server for one elsewhere: give one of them")
    shaping = Shaping(form, gamma, scale, success_bonus, pessimism)  # type: ignore[arg-type]
    labelling = Labelling(shaping, every, between, (*parse_vote(vote), threshold))  # type: ignore[arg-type]
    data = open_data(source, task)
    client = None if server is None else Client(server, token=os.environ.get("RBM_TOKEN") or None)
    try:
        model: Scores = (
            LocalScores(Scorer.from_pretrained(checkpoint, device)) if client is None else RemoteScores(client)
        )
        with _stoppable(), _bar(len(data)) as tick:
            outcome = run(
                data,
                out,
                model,
                labelling,
                camera=camera,
                where=source,
                kept=scores,
                transitions=transitions,
                tick=tick,
            )
    finally:
        if client is not None:
            client.close()
    for name, why in outcome.unreadable:
        _say(f"left out: {name}: {why}")
    if outcome.unreadable:
        _say(f"{len(outcome.unreadable)} episodes could not be read, of {len(data)}")
    if outcome.kept:
        _say(f"{outcome.kept} episodes had been scored already")
    _say(
        f"{outcome.episodes} episodes of {outcome.kind} data, {outcome.steps} steps, {outcome.frames} frames scored; "
        f"mean reward {outcome.reward:.4f} (the environment's own: {outcome.env_reward:.4f}); "
        f"done by vote: {outcome.done}"
    )
    click.echo(json.dumps(outcome.to_json(), indent=2, ensure_ascii=False) if as_json else outcome.target)


@contextmanager
def _stoppable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say("stopped; the same command goes on")
        sys.exit(130)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int, int], None]]:
    """What is told of episodes and scored frames: a bar; without a terminal a line a tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    done = frames = 0
    began = time.monotonic()
    columns = (TextColumn("relabelling"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("", total=total, rate="")

        def tick(more: int, more_frames: int) -> None:
            nonlocal done, frames
            before, done, frames = done, done + more, frames + more_frames
            rate = f"{frames / max(time.monotonic() - began, 1e-9):.0f} frames/s"
            progress.update(bar, completed=done, rate=rate)
            if not console.is_terminal and before * 10 // total < done * 10 // total:
                _say(f"  {done} of {total}, {rate}")

        yield tick


def _say(line: str) -> None:
    click.echo(line, err=True)
