"""`rbm refine`: what a policy fooled its judge with becomes the judge's lesson; then the policy goes on.

1. The clips that a run's monitor kept (judged done, truly not) join a corpus as failures.
2. The reward model that judged the run is fine-tuned on it.
3. The policy goes on from where it was, in a new run, judged by the new model. What it remembers was paid by the old
   judge, and is left behind; its networks are kept.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from policies.monitor import read_monitor
from rbm.assets import bundled_corpus
from rbm.config import override
from rbm.errors import UserError
from rbm.output import whole_file

SOURCE = "refined"


def flagged(run: Path) -> list[tuple[Path, str]]:
    """The clips on which score and success parted, each with its instruction.

    Raises:
        UserError: the folder holds no run that was watched, or nothing parted in it.
    """
    watched = [episode for episode in read_monitor(run) if episode.clip is not None]
    if not watched:
        raise UserError(f"{run} holds no clips on which score and success part: there is nothing to refine with")
    found = []
    for episode in watched:
        path = run / str(episode.clip)
        try:
            task = str(json.loads(path.with_suffix(".json").read_text())["task"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} has no description beside it: run the policy again ({error})") from error
        found.append((path, task))
    return found


def write_table(clips: list[tuple[Path, str]], target: Path) -> None:
    """The clips as failures, in a table that `rbm build source=videos` reads."""
    rows = [{"video": str(path.resolve()), "task": task, "quality": "failure"} for path, task in clips]
    with whole_file(target) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument(
    "runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new corpus, model and run.")
@click.option("--corpus", type=click.Path(path_type=Path), help="What the clips join; default: the bundled corpus.")
@click.option("--steps", default=300, show_default=True, type=click.IntRange(min=1), help="Of fine-tuning.")
@click.option(
    "--weight", default=5.0, show_default=True, help="How much oftener a clip of the run is drawn than others."
)
@click.option("--go-on/--stop", default=True, show_default=True, help="Whether policies go on under the new judge.")
def refine(runs: tuple[Path, ...], out: Path, corpus: Path | None, steps: int, weight: float, go_on: bool) -> None:
    """Teach the judge of RUNS that the clips that fooled it are failures, and let their policies go on.

    \b
    Examples:
      rbm refine runs/sac --out runs/refined
      rbm refine runs/try-1 runs/try-2 --out runs/refined --corpus data/rl-judge --steps 600 --stop
    """
    clips = [clip for run in runs for clip in flagged(run)]
    configs = [_config(run) for run in runs]
    judge = configs[0]["checkpoint"]
    for run, config in zip(runs, configs, strict=True):
        if config["checkpoint"] != judge:
            raise UserError(f"{runs[0]} and {run} were judged by different models: refine with runs of one judge")
    if judge is not None and judge.startswith(("http://", "https://")):
        raise UserError(f"the judge was a server, {judge}: give its model's folder as checkpoint= to refine it")
    out.mkdir(parents=True, exist_ok=True)
    place = out / "corpus"
    if not place.exists():
        _copy(corpus or bundled_corpus(), place)
    write_table(clips, out / "clips.jsonl")
    click.echo(f"{len(clips)} clips join {place} as failures", err=True)
    _rbm(
        "build",
        "source=videos",
        f"source.name={SOURCE}",
        "source.is_sim=true",
        override("source.manifest", out / "clips.jsonl"),
        override("corpus", place),
        "workers=1",
    )
    _rbm(
        "train",
        "experiment=finetune",
        "data=corpus",
        override("data.corpus", place),
        f"data.source_weights={{{SOURCE}: {weight}}}",
        override("init", judge or "nano"),
        f"trainer.max_steps={steps}",
        override("run_dir", out / "judge"),
    )
    model = out / "judge" / "model"
    click.echo(f"the refined judge: {model}", err=True)
    if go_on:
        from policies.cli import run as train

        for run, config in zip(runs, configs, strict=True):
            place = out / "policy" if len(runs) == 1 else out / f"policy-{run.name.removeprefix('policy-')}"
            changed = {"checkpoint": str(model), "start": str(run), "run_dir": str(place), "threads": 1}
            result = train({**config, **changed})
            click.echo(json.dumps(result))


def _config(run: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is no run of `rbm rl` ({error})") from error
    if config.get("reward") != "learned" or "online" not in config:
        raise UserError(f"{run} was not judged by a reward model: only runs with reward=learned can be refined")
    return config


def _copy(corpus: Path, place: Path) -> None:
    """A corpus of one's own; there whole or not at all."""
    if not corpus.is_dir():
        raise UserError(f"{corpus} is no folder of a corpus: give --corpus")
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(corpus, partial)
    partial.rename(place)


def _rbm(*arguments: str) -> None:
    """Another command of ours, in a process of its own: policies know nothing of training."""
    done = subprocess.run([sys.executable, "-m", "rbm.cli", *arguments])
    if done.returncode:
        raise UserError(f"`rbm {' '.join(arguments)}` ended with code {done.returncode}; the same command goes on")
