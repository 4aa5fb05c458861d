"""Offline RL on Meta-World with three rewards: does a learned reward beat cloning and sparse rewards? Prints JSON.

    python tests/benchmarks/offline_rl.py --out runs/offline                  # goes on where it was stopped
    python tests/benchmarks/offline_rl.py --out runs/offline --summary        # of what is finished, no run is made

One folder a run under `--out` (TASK-ALGORITHM-REWARD-SUCCESSES-SEED, see `policies/offline/run.py`), `data/` with the
data sets, and `summary-SUCCESSES.json`: for each arm the success rate of each seed, its mean and standard deviation, by
task and over tasks, and the gains in points.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from policies.offline.run import run
from rbm.config import compose
from rbm.output import whole_file

TASKS = ("door-open", "plate-slide-side", "drawer-open")
ARMS = (
    ("cloning", "none"),
    ("filtered", "learned"),
    ("iql", "learned"),
    ("iql", "sparse"),
    ("iql", "dense"),
    ("reward_weighted", "learned"),
    ("awr", "learned"),
    ("cql", "learned"),
)
"""Algorithm and reward; the first five are what the headline compares."""

RECIPE = {"successes": 20, "failures": 180}
"""Of the data sets; `--successes` says how many of the successes are used."""


def configurations(
    out: Path, judge: str | None, tasks: list[str], seeds: int, successes: int, arms: list[tuple[str, ...]]
) -> Iterator[dict[str, Any]]:
    """Of all runs, those of the headline first."""
    first = [arm for arm in arms if arm in ARMS[:5]]
    for group in (first, [arm for arm in arms if arm not in first]):
        for seed in range(seeds):
            for task in tasks:
                for algorithm, reward in group:
                    yield {
                        "policy": compose(f"policy/offline/{algorithm}")["policy"]["offline"],
                        "task": task,
                        "reward": reward,
                        "checkpoint": judge,
                        "seed": seed,
                        "run_dir": str(out / f"{task}-{algorithm}-{reward}-{successes}-{seed}"),
                        "data_dir": str(out / "data"),
                        "recipe": RECIPE,
                        "successes": successes,
                    }


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and spreads of success rates, and what IQL with learned rewards gains (points)."""
    arms: dict[str, dict[str, list[float]]] = {}
    for found in results:
        arm = arms.setdefault(f"{found['algorithm']}/{found['reward']}", {})
        arm.setdefault(found["task"], []).append(found["success_rate"])
    told: dict[str, Any] = {"runs": len(results), "arms": {}}
    for name, by_task in arms.items():
        told["arms"][name] = {task: _spread(rates) for task, rates in by_task.items()}
        means = [float(np.mean(rates)) for rates in by_task.values()]
        told["arms"][name]["mean"] = round(float(np.mean(means)), 3)
    for better in ("iql/learned", "filtered/learned"):
        for worse in ("cloning/none", "iql/sparse", "iql/dense"):
            if better in arms and worse in arms:
                both = [task for task in arms[better] if task in arms[worse]]
                gains = [float(np.mean(arms[better][task]) - np.mean(arms[worse][task])) for task in both]
                if gains:
                    told.setdefault("gains", {})[f"{better} - {worse}"] = round(100 * float(np.mean(gains)), 1)
    return told


def _spread(rates: list[float]) -> dict[str, Any]:
    return {"mean": round(float(np.mean(rates)), 3), "std": round(float(np.std(rates)), 3), "seeds": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--judge", help="folder of the reward model; default: the shipped weights")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--successes", type=int, default=4, help="of the data set, beside its 180 failures")
    parser.add_argument("--arms", nargs="+", default=["/".join(arm) for arm in ARMS], metavar="ALGORITHM/REWARD")
    parser.add_argument("--summary", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    given.out.mkdir(parents=True, exist_ok=True)
    arms = [tuple(arm.split("/")) for arm in given.arms]
    results = []
    for configuration in configurations(given.out, given.judge, given.tasks, given.seeds, given.successes, arms):
        if not given.summary:
            results.append(run(configuration, say=lambda text: print(text, flush=True)))
        elif (found := Path(configuration["run_dir"], "result.json")).exists():
            results.append(json.loads(found.read_text(encoding="utf-8")))
        with whole_file(given.out / f"summary-{given.successes}.json") as temporary:
            temporary.write_text(json.dumps(summary(results), indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary(results), indent=2))


if __name__ == "__main__":
    main()
