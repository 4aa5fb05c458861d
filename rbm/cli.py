"""One command, `rbm`. Every subcommand lives beside the code that it runs and is imported when called."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any

import click

from rbm.errors import UserError

# Threads that wait for each other must not spin: on a machine whose cores are shared with a loader process (or
# anything else) a training step otherwise takes several times as long. Read when PyTorch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# name: (module, attribute, one-line help); the line stands here so that `rbm --help` imports nothing heavy
COMMANDS = {
    "demo": ("rbm.demo", "demo", "Open the bundled corpus, train, evaluate, score a video: the whole loop."),
    "build": ("dataset_builder.cli", "build", "Make a corpus from a source (simulator, your own videos)."),
    "corpus": (
        "rbm.corpus.cli",
        "corpus",
        "Look at a corpus, check and repair it, select from it, merge, compact, export.",
    ),
    "train": ("rbm.training.cli", "train", "Train a reward model."),
    "cache-features": (
        "rbm.training.features_cli",
        "cache_features",
        "Run a frozen vision tower over a corpus once, so that training need not.",
    ),
    "eval": ("rbm.evaluation.cli", "evaluate", "Evaluate a reward model and write a report."),
    "report": ("rbm.report_cli", "report", "Write a report again from saved results."),
    "score": ("rbm.evaluation.bulk_cli", "score", "Progress and success of a video, or of a whole corpus."),
    "compare": ("rbm.scoring.cli", "compare", "Which of two attempts is better."),
    "serve": ("rbm.scoring.server.cli", "serve", "Serve a model over HTTP and websockets, and a page at /."),
    "rl": ("policies.cli", "rl", "Train a policy from a reward, online or offline."),
    "relabel": (
        "policies.relabel.cli",
        "relabel",
        "Rewards of a model for a data set: Minari, LeRobot, HDF5, a corpus.",
    ),
    "refine": ("policies.refine", "refine", "Teach a reward model the clips by which a policy fooled it."),
    "detect": ("rbm.evaluation.uses_cli", "detect", "When does an attempt fail, when is it done."),
    "retrieve": ("rbm.evaluation.uses_cli", "retrieve_command", "Pick from a pool the trajectories that help a task."),
    "filter": ("rbm.evaluation.uses_cli", "filter_command", "Pick the trajectories that are worth cloning."),
    "bench": ("rbm.bench.cli", "bench", "Measure this machine: storing, reading, training; what fits in memory."),
    "export": ("rbm.model.export_cli", "export", "Write a model in another layout: ours, or the published ones."),
    "rank": ("rbm.scoring.cli", "rank", "Order several attempts, best first."),
    "push": ("rbm.model.hub_cli", "push", "Send a model to the Hugging Face hub."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used: `rbm --help` answers at once.

    Args:
        commands: name to module, attribute and one line of help; none: those of `rbm`.
    """

    def __init__(
        self, name: str | None = None, commands: dict[str, tuple[str, str, str]] | None = None, **options: Any
    ) -> None:
        super().__init__(name, **options)
        self._lazy = COMMANDS if commands is None else commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        module, attribute, _ = self._lazy[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[2]) for name, entry in self._lazy.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="robot-rbm")
@click.option("--verbose", is_flag=True, help="Log what happens, and show tracebacks of users' errors.")
def cli(verbose: bool) -> None:
    """Reward models for robots: how well is this attempt going, says the video.

    \b
    Examples:
      rbm demo
      rbm score attempt.mp4 --task "open the drawer" --plot scores.png
      rbm train experiment=demo run_dir=runs/first
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


def main() -> None:
    """Entry point of the `rbm` command: a user's error is one line on stderr and exit code 2."""
    try:
        cli(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):  # click makes the first of the second
        click.echo("stopped", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except UserError as error:
        if "--verbose" in sys.argv:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
