"""`rbm cache-features`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rbm.errors import UserError

if TYPE_CHECKING:
    import torch

    from rbm.corpus import Corpus
    from rbm.model import RewardModel
    from rbm.training.features import Plan

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class Size(click.ParamType):
    """Bytes, such as `50GB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        number = text.rstrip("bkmgt ")
        unit = text[len(number) :].strip()
        try:
            return round(float(number) * _UNITS[unit.removesuffix("b")])
        except (ValueError, KeyError, OverflowError):
            self.fail(f"{value!r} is no size: give a number with MB, GB or TB, such as 50GB", param, ctx)


@click.command("cache-features", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("places", nargs=-1, metavar="[CHECKPOINT] [CORPUS]")
@click.option(
    "--train",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Take model, corpus and selection from what you will give to `rbm train`; once for each word.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder; by default beside the corpus.")
@click.option("--selection", help="File of a saved selection (`rbm corpus select`): only its trajectories.")
@click.option("--snapshot", help="An older snapshot of the corpus, by its id or tag; the newest by default.")
@click.option("--limit", type=Size(), default="50GB", show_default=True, help="Refuse to take more room than this.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "float16"]),
    default="bfloat16",
    show_default=True,
    help="Precision in which features are kept.",
)
@click.option(
    "--device", default="auto", show_default=True, help="Where the tower runs; auto: a GPU where there is one."
)
@click.option(
    "--batch-frames", type=click.IntRange(min=1), default=64, show_default=True, help="Frames that it gets at once."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cache_features(
    places: tuple[str, ...],
    overrides: tuple[str, ...],
    out: Path | None,
    selection: str | None,
    snapshot: str | None,
    limit: int,
    dtype: str,
    device: str,
    batch_frames: int,
    as_json: bool,
) -> None:
    """Run a model's vision tower over all frames of a corpus once, so that training need not.

    Training with data.features=FOLDER then never runs the tower, which must be one that is not trained. The features
    must be of the tower that training starts from: give as CHECKPOINT what you will give as init (a model's folder, or
    nano for the shipped weights), or with --train all that you will give to `rbm train`.

    Features are large, some megabytes for every frame of a large model: they are for the hundreds or thousands of
    trajectories of a fine-tuning. The same command again goes on where it was stopped, and adds what is new.

    \b
    Examples:
      rbm cache-features runs/base/model data/mine
      rbm cache-features nano data/mine --selection some.json --out features
      rbm cache-features --train experiment=lora_finetune --train data.corpus=data/mine --limit 200GB
    """
    from rbm.corpus.split import open_rows
    from rbm.training.features import (
        Encoder,
        FeatureWriter,
        check_folder,
        default_folder,
        make_features,
        plan_features,
        tower_facts,
    )

    where = _device(device)
    model, words, place, selection, snapshot = _chosen(places, overrides, selection, snapshot)
    corpus, rows = open_rows(place, snapshot, selection)
    rows = rows if rows is not None else _all(corpus)
    tower = tower_facts(model)
    bundled = place is None and selection is None
    folder = out or (None if bundled else default_folder(corpus, tower["fingerprint"]))
    if folder is None:
        raise UserError(
            f"corpus {corpus.location}: nothing can be kept beside it: say with --out=FOLDER where features go"
        )
    check_folder(folder, tower, dtype)
    encoder = Encoder(model, where, dtype, batch_frames)
    plan = plan_features(encoder, corpus, rows, folder, limit)
    _check_room(plan, folder, limit)
    _say(_announcement(plan, folder))
    began = time.monotonic()
    with _stoppable(folder), FeatureWriter(folder, words, tower, dtype) as writer, _bar(plan) as advance:
        done = make_features(encoder, corpus, plan, writer, advance)
    seconds = time.monotonic() - began
    for trajectory, what in done.damaged:
        _say(f"left out: trajectory {trajectory!r} can not be decoded ({what})")
    if done.damaged:
        _say(f"{len(done.damaged)} damaged, of {plan.trajectories}: training will take others in their place")
    if as_json:
        facts = {"folder": str(folder), "fingerprint": tower["fingerprint"], "dtype": dtype}
        facts |= {"trajectories": plan.trajectories, "frames": plan.frames, "bytes": plan.bytes}
        facts |= {"kept_clips": plan.kept, "new_clips": done.clips, "new_frames": done.frames}
        facts |= {"damaged": [name for name, _ in done.damaged], "seconds": round(seconds, 3)}
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        rate = f", {done.frames / max(seconds, 1e-9):.0f} frames a second" if done.frames else ""
        _say(f"{done.frames} frames encoded in {seconds:.0f} s{rate}; train with data.features={folder}")
        click.echo(str(folder))


def _chosen(
    places: tuple[str, ...], overrides: tuple[str, ...], selection: str | None, snapshot: str | None
) -> tuple[RewardModel, list[str], str | None, str | None, str | None]:
    """The model, the words that name it on the command line, and corpus, selection and snapshot."""
    if overrides:
        if len(places) > 1:
            raise click.UsageError("--train says which model: give no more than a CORPUS beside it")
        return _of_training(places[0] if places else None, overrides, selection, snapshot)
    if not places or len(places) > 2 or (len(places) == 1 and selection is None):
        raise click.UsageError("give a CHECKPOINT and a CORPUS (or a --selection of one), or --train KEY=VALUE")
    from rbm.assets import nano_weights
    from rbm.model import RewardModel

    name = places[0]
    model = RewardModel.from_pretrained(str(nano_weights()) if name == "nano" else name)
    word = os.path.abspath(name) if name != "nano" and os.path.exists(name) else name
    return model, [word], places[1] if len(places) > 1 else None, selection, snapshot


def _of_training(
    place: str | None, overrides: tuple[str, ...], selection: str | None, snapshot: str | None
) -> tuple[RewardModel, list[str], str | None, str | None, str | None]:
    """What `rbm train` with these words starts from; what is given beside them comes first."""
    import lightning
    from omegaconf import OmegaConf

    from rbm.config import compose
    from rbm.training.run import start_model

    config = compose("train", overrides)
    lightning.seed_everything(config.seed, verbose=False)
    model = start_model(config)
    words = [word for text in overrides for word in ("--train", text)]
    data = config.data
    selection = selection or data.selection
    if place is None and not OmegaConf.is_missing(data, "corpus"):
        place = data.corpus
    if place is None and selection is None and OmegaConf.is_missing(data, "corpus"):
        raise UserError("which corpus? Give a CORPUS, or --train data.corpus=FOLDER")
    return model, words, place, selection, snapshot or data.snapshot


def _all(corpus: Corpus) -> Any:
    import numpy as np

    return np.arange(len(corpus))


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _check_room(plan: Plan, folder: Path, limit: int) -> None:
    from rbm.training.features import free_space

    if not plan.trajectories:
        raise UserError("no trajectories are selected: there is nothing to cache")
    if plan.bytes > limit:
        about = "" if plan.complete else "about "
        each = _size(plan.bytes / plan.frames)
        raise UserError(
            f"features of {plan.trajectories} trajectories ({about}{plan.frames} frames, {each} each) take {about}"
            f"{_size(plan.bytes)}, more than --limit {_size(limit)}: choose fewer with --selection, "
            "or raise --limit"
        )
    free = free_space(folder)
    if plan.new_bytes > free:
        raise UserError(
            f"features take {_size(plan.new_bytes)} more, and the disk of {folder} has {_size(free)} free: free some, "
            "choose fewer trajectories with --selection, or another place with --out"
        )


def _announcement(plan: Plan, folder: Path) -> str:
    from rbm.training.features import free_space

    each = _size(plan.bytes / plan.frames) if plan.frames else "0 bytes"
    there = f"; {_size(plan.bytes - plan.new_bytes)} of it there already" if plan.kept else ""
    return (
        f"{plan.trajectories} trajectories, {plan.frames} frames, {each} a frame: {_size(plan.bytes)}{there}; "
        f"{_size(free_space(folder))} free on the disk of {folder}"
    )


@contextmanager
def _stoppable(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say("stopped; the same command goes on")
        sys.exit(130)


@contextmanager
def _bar(plan: Plan) -> Iterator[Any]:
    """What is told of every clip's frames: a bar with rate and time left, without a terminal a line every tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    total, done, began = sum(work.shape[0] for work in plan.work), 0, time.monotonic()
    columns = (TextColumn("frames"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, rate="")

        def advance(frames: int) -> None:
            nonlocal done
            before, done = done, done + frames
            rate = f"{done / max(time.monotonic() - began, 1e-9):.0f}/s"
            progress.update(task, completed=done, rate=rate)
            if not console.is_terminal and before * 10 // total < done * 10 // total:
                left = (time.monotonic() - began) * (total - done) / done
                _say(f"  {done} of {total} frames, {rate}, {left:.0f} s left")

        yield advance


def _say(line: str) -> None:
    click.echo(line, err=True)


def _size(count: float) -> str:
    power = min(max(len(str(round(count))) - 1, 0) // 3, 4)
    return f"{count:.0f} bytes" if not power else f"{count / 1000**power:.1f} {('', 'kB', 'MB', 'GB', 'TB')[power]}"
