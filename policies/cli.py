"""`rbm rl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from rbm.errors import UserError

_OFFLINE = "policies.offline"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--cfg", "show", is_flag=True, help="Print the configuration and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def rl(overrides: tuple[str, ...], show: bool, as_json: bool) -> None:
    """Train a policy from a reward; the same command again continues a run that was stopped.

    \b
    policy=dsrl               noise-space SAC over a flow policy that is cloned from poor demonstrations
    policy=seeded_sac         SAC with demonstrations in half of each batch
    policy=sac                SAC from scratch
    policy=best_of_k          no learning: the best of K chunks of actions, played in the simulator first
    policy=offline/iql        and awr, cql, cloning, filtered, reward_weighted: from a mixed data set

    \b
    Examples:
      rbm rl task=drawer-open reward=learned run_dir=runs/dsrl
      rbm rl policy=sac task=drawer-close reward=dense seed=1 run_dir=runs/ceiling
      rbm rl policy=offline/iql task=window-open run_dir=runs/iql
      rbm report rl runs
    """
    from omegaconf import OmegaConf

    from rbm.config import compose, plain

    config = compose("rl", overrides)
    if show:
        click.echo(OmegaConf.to_yaml(config))
        return
    result = run(plain(config))
    click.echo(json.dumps(result) if as_json else _sentence(result))


def example(policy: str) -> None:
    """What `python -m policies.….<policy> [KEY=VALUE]...` does: `rbm rl policy=<policy> …`."""
    import sys

    from rbm.cli import main

    sys.argv[1:1] = ["rl", f"policy={policy}"]
    main()


def run(config: dict[str, Any]) -> dict[str, Any]:
    """Make or continue the run that a configuration of `conf/rl.yaml` describes. Returns its result.

    Raises:
        UserError: it cannot be, or its folder holds another.
    """
    try:
        import stable_baselines3  # noqa: F401
        import torch
    except ImportError as error:
        raise UserError(f"learning policies needs more ({error}): pip install 'robot-rbm[rl]'") from error
    torch.set_num_threads(config["threads"])
    target = str(config["policy"].get("_target_"))
    return _offline(config) if target.startswith(_OFFLINE) else _online(config)


def _online(config: dict[str, Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from policies.online.run import Run
    from policies.online.world import World
    from policies.planning.best_of_k import BestOfK
    from policies.shaping import Shaping
    from rbm.config import instantiate

    settings = dict(config["online"])
    settings["vote"] = tuple(settings["vote"])
    world = World(
        config["task"],
        config["reward"],
        checkpoint=config["checkpoint"],
        shaping=Shaping(**config["shaping"]),
        **settings,
    )
    algorithm = instantiate(OmegaConf.create(config["policy"]))
    asked = {key: value for key, value in config.items() if key not in ("run_dir", "threads")}
    folder = Path(config["run_dir"])
    start = None if config["start"] is None else Path(config["start"])
    if isinstance(algorithm, BestOfK):
        if start is not None:
            raise UserError("best-of-K learns nothing that start= could go on from: leave it out")
        return algorithm.run(world, config["seed"], folder, asked, _tell)
    made = Run(folder, asked, algorithm, world, config["seed"], start)
    return made.train(_tell)


def _offline(config: dict[str, Any]) -> dict[str, Any]:
    from policies.offline.run import run as run_offline

    shared = {
        key: config[key] for key in ("policy", "task", "reward", "run_dir", "seed", "threads", "shaping", "checkpoint")
    }
    return run_offline({**shared, **config["offline"]}, lambda text: click.echo(text, err=True))


def _tell(line: dict[str, Any]) -> None:
    parted = "  score and success part: see clips/" if line["diverged"] else ""
    click.echo(
        f"{line['step']:>7} decisions {line['episode']:>5} episodes {line['seconds']:>7.0f} s  "
        f"success {line['success_rate']:.2f}{parted}",
        err=True,
    )


def _sentence(result: dict[str, Any]) -> str:
    return f"success {result['success_rate']:.2f} of {result['task']} under the {result['reward']} reward"
