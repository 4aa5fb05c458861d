"""One run of offline RL on Meta-World: a mixed data set, one reward, one algorithm, one seed, a folder.

| in the folder | |
| --- | --- |
| `config.json` | what the run was asked for |
| `curve.jsonl` | every `curve_every` updates: `step`, `success_rate` on the curve's scenes, losses, `seconds` |
| `checkpoint.pt` | where it goes on when it was stopped; gone when it is finished |
| `policy.json`, `policy.safetensors` | the policy after the last update |
| `result.json` | success on scenes that nothing else looks at: that of the last policy, whatever the curve says |

Data, curve and result each have scenes of their own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataset_builder.metaworld.simulator import Simulator
from policies.folder import claim
from policies.judges import local_scorer
from policies.offline.learning import Algorithm, Learning
from policies.offline.mixed import REWARDS, Mixed, Recipe, make_mixed
from policies.shaping import Shaping
from rbm.errors import UserError
from rbm.output import whole_file

if TYPE_CHECKING:
    from policies.offline.actor import Actor
ALGORITHMS = {
    "cloning": "policies.offline.cloning.Cloning",
    "filtered": "policies.offline.cloning.FilteredCloning",
    "reward_weighted": "policies.offline.cloning.RewardWeightedCloning",
    "awr": "policies.offline.awr.AWR",
    "iql": "policies.offline.iql.IQL",
    "cql": "policies.offline.cql.CQL",
}

EVALUATION_SCENES, CURVE_SCENES = 1_000_000, 2_000_000
"""First of the scenes for results and for curves; each run's seed has a thousand of its own behind them."""

_CHECKPOINT = "checkpoint.pt"


def make_algorithm(policy: Mapping[str, Any] | Algorithm) -> tuple[str, Algorithm]:
    """The name and the algorithm that a configuration describes: `_target_`, or `name`, and its numbers.

    Raises:
        UserError: an unknown algorithm, or a number that it does not have or refuses.
    """
    if isinstance(policy, Algorithm):
        return next(name for name, path in ALGORITHMS.items() if path.endswith(type(policy).__name__)), policy
    numbers = dict(policy)
    given = str(numbers.pop("name", None) or numbers.pop("_target_", None))
    numbers.pop("_target_", None)
    by_path = {path: name for name, path in ALGORITHMS.items()}
    name = by_path.get(given, given)
    if name not in ALGORITHMS:
        raise UserError(f"unknown offline algorithm {given!r}: give one of {', '.join(ALGORITHMS)}")
    module, _, kind = ALGORITHMS[name].rpartition(".")
    try:
        return name, getattr(import_module(module), kind)(**numbers)
    except TypeError as error:
        raise UserError(f"policy {name}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a run is asked for.

    Attributes:
        policy: the algorithm and its numbers (`conf/policy/offline`).
        task: of Meta-World.
        reward: `learned`, `sparse`, `dense` or `none`.
        checkpoint: folder of the reward model that scores the data set; none for the shipped weights.
        seed: of weights, draws and evaluation scenes; not of the data.
        run_dir, data_dir: folders of the run, and of data sets.
        recipe: numbers of the data set's `Recipe`, but the task.
        successes: of the data set's successes so many are used, the first; none for all.
        shaping: numbers of the learned reward's `Shaping`.
        episodes: of the result, as long as the data's, with its action repeat.
        curve_every: updates between points of the curve and checkpoints; curve_episodes: of each point, 0 for none.
        threads: of torch.
    """

    policy: Mapping[str, Any]
    task: str
    run_dir: str
    data_dir: str
    reward: str = "learned"
    checkpoint: str | None = None
    seed: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    successes: int | None = None
    shaping: Mapping[str, Any] = field(default_factory=lambda: {"form": "minus_one"})
    episodes: int = 50
    curve_every: int = 1_000
    curve_episodes: int = 10
    threads: int = 1

    def __post_init__(self) -> None:
        if self.reward not in REWARDS:
            raise UserError(f"unknown reward {self.reward!r}: give one of {', '.join(REWARDS)}")
        for name, least in (("episodes", 1), ("curve_every", 1), ("curve_episodes", 0), ("threads", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Config:
        unknown = set(given) - {f.name for f in fields(cls)}
        missing = {"policy", "task", "run_dir", "data_dir"} - set(given)
        if unknown or missing:
            raise UserError(f"offline run: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}")
        return cls(**given)

    def asked(self) -> dict[str, Any]:
        """All of it but the places where things are kept, so that a moved folder goes on."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("run_dir", "data_dir")}


def success_rate(actor: Actor, recipe: Recipe, scenes: Sequence[int]) -> float:
    """Share of the scenes in which the simulator says "done" at any control step of an episode."""
    return float(np.mean([_attempt(actor, recipe, scene) for scene in scenes]))


@lru_cache(maxsize=2)
def _simulator(task: str) -> Simulator:
    return Simulator(task)


def _attempt(actor: Actor, recipe: Recipe, scene: int) -> bool:
    simulator = _simulator(recipe.task)
    now = simulator.reset(scene)
    for _ in range(recipe.steps):
        action: NDArray[np.float32] = actor.act(now.obs)
        for _ in range(recipe.repeat):
            now = simulator.step(action)
            if now.success:
                return True
    return False


def run(cfg: Mapping[str, Any] | Config, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Make or continue a run; a finished one is only read.

    Args:
        cfg: see `Config`; also what Hydra composes.
        say: is told how far it has come.

    Returns:
        What `result.json` says: task, algorithm, reward, seed, success_rate, episodes, steps, transitions,
        data_episodes, data_successes, seconds.

    Raises:
        UserError: a configuration that cannot be, a folder of another run.
    """
    config = cfg if isinstance(cfg, Config) else Config.of(_plain(cfg))
    name, algorithm = make_algorithm(config.policy)
    recipe = _recipe(config)
    folder = Path(config.run_dir)
    claim(folder, config.asked())
    if (folder / "result.json").exists():
        found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return found
    torch.set_num_threads(config.threads)
    scorer = local_scorer(config.checkpoint)
    mixed = make_mixed(recipe, Path(config.data_dir), scorer, say).take(config.successes)
    learning, seconds = _learn(config, algorithm, mixed, recipe, folder, say)
    started = time.monotonic()
    first = EVALUATION_SCENES + 1_000 * config.seed
    rate = success_rate(learning.actor.eval(), recipe, range(first, first + config.episodes))
    learning.actor.save(folder)
    result = {
        "task": config.task,
        "algorithm": name,
        "reward": config.reward,
        "seed": config.seed,
        "success_rate": rate,
        "episodes": config.episodes,
        "steps": learning.step,
        "transitions": len(learning.data),
        "data_episodes": len(mixed),
        "data_successes": int(mixed.success.any(1).sum()),
        "seconds": round(seconds + time.monotonic() - started, 1),
    }
    with whole_file(folder / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / _CHECKPOINT).unlink(missing_ok=True)
    say(f"{config.task} {name} {config.reward} seed {config.seed}: {rate:.2f}")
    return result


def _learn(
    config: Config, algorithm: Algorithm, mixed: Mixed, recipe: Recipe, folder: Path, say: Callable[[str], None]
) -> tuple[Learning, float]:
    """Train from the checkpoint, if there is one, to the end; returns the seconds spent in all, too."""
    shaping = Shaping(**config.shaping)
    learning = algorithm.start(mixed.transitions(config.reward, shaping), config.seed)  # type: ignore[arg-type]
    curve: list[dict[str, Any]] = []
    if (folder / _CHECKPOINT).exists():
        learning.load(folder / _CHECKPOINT)
        lines = (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()
        curve = [point for point in map(json.loads, lines) if point["step"] <= learning.step]
    before = curve[-1]["seconds"] if curve else 0.0
    started = time.monotonic()
    scenes = range(CURVE_SCENES + 1_000 * config.seed, CURVE_SCENES + 1_000 * config.seed + config.curve_episodes)
    while learning.step < learning.steps:
        learning.advance(min(config.curve_every, learning.steps - learning.step))
        point: dict[str, Any] = {"step": learning.step}
        if scenes:
            point["success_rate"] = success_rate(learning.actor, recipe, scenes)
        point |= {key: round(value, 6) for key, value in learning.metrics.items()}
        curve.append({**point, "seconds": round(before + time.monotonic() - started, 1)})
        # the curve first: points beyond the checkpoint are dropped when a run goes on
        with whole_file(folder / "curve.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(one) + "\n" for one in curve), encoding="utf-8")
        learning.save(folder / _CHECKPOINT)
        say(f"{config.task} {config.reward} seed {config.seed} {point}")
    return learning, before + time.monotonic() - started


def _recipe(config: Config) -> Recipe:
    try:
        return Recipe(config.task, **config.recipe)
    except TypeError as error:
        raise UserError(f"recipe of the mixed data set: {error}") from error


def _plain(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Hydra's containers as plain ones."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.create(dict(cfg)), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
