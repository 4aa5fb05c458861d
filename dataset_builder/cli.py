"""`rbm build`."""

from __future__ import annotations

import os
import sys

import click


@click.command()
@click.argument("overrides", nargs=-1, metavar="source=NAME corpus=FOLDER [KEY=VALUE]...")
@click.option("--cfg", "show", is_flag=True, help="Print the configuration and stop.")
def build(overrides: tuple[str, ...], show: bool) -> None:
    """Make a corpus from a source, or go on with a build that was stopped.

    \b
    Examples:
      rbm build source=videos source.manifest=demos.csv corpus=data/mine
      rbm build source=metaworld 'source.envs=[drawer-open-v3,door-close-v3]' corpus=data/sim
      rbm build source=metaworld_attempts source.runs=runs/rl corpus=data/sim      what policies did
      rbm build source=metaworld --cfg          every key there is
    The simulator needs `make sim` (pip install 'robot-rbm[sim]').
    """
    from omegaconf import OmegaConf

    from dataset_builder.pipeline import build as run
    from rbm.config import compose, instantiate
    from rbm.errors import UserError

    config = compose("build", overrides)
    if config.get("source") is None:
        raise UserError(
            "say where trajectories come from: source=videos, metaworld or metaworld_attempts (see rbm build --help)"
        )
    if show:
        click.echo(OmegaConf.to_yaml(config))
        return
    if config.corpus is None:
        raise UserError("say where the corpus is written: corpus=FOLDER")
    try:
        run(
            instantiate(config.source),
            config.corpus,
            codec=config.codec,
            workers=config.workers or os.cpu_count() or 1,
            commit_every=config.commit_every,
        )
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on from here", err=True)
        sys.exit(130)
