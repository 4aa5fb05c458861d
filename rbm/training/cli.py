"""`rbm train`."""

from __future__ import annotations

import sys

import click

from rbm.training.callbacks import console


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--cfg", "show", is_flag=True, help="Print the configuration and stop.")
def train(overrides: tuple[str, ...], show: bool) -> None:
    """Train a reward model; the same command again continues a run that was stopped.

    \b
    Examples:
      rbm train run_dir=runs/first              the bundled corpus, nano from scratch
      rbm train run_dir=runs/mine data=corpus data.corpus=data/mine init=nano experiment=finetune
      rbm train --cfg                           every key there is
    """
    from omegaconf import OmegaConf

    from rbm.config import compose
    from rbm.training.parallel import first_process, leave
    from rbm.training.run import Interrupted
    from rbm.training.run import train as run

    config = compose("train", overrides)
    if show:
        click.echo(OmegaConf.to_yaml(config))
        return
    try:
        model = run(config)
    except Interrupted as stopped:
        console.print(str(stopped), markup=False)
        sys.exit(130)
    finally:
        leave()
    if first_process():
        click.echo(str(model))
