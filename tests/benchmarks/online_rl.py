"""Online RL on Meta-World under three rewards: all runs of the comparison in docs/policies.md, by the command `rbm rl`.

    python tests/benchmarks/online_rl.py --out runs/rl --judge docs/rl/judge        # goes on where it was stopped
    python tests/benchmarks/online_rl.py --out runs/rl --judge … --arms dsrl/learned --tasks window-open --seeds 1
    rbm report rl runs/rl --out docs/rl

One folder a run, `POLICY-TASK-REWARD-SEED`; a run that is finished is only read. Prints JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rbm.config import override

TASKS: dict[str, dict[str, tuple[str, ...]]] = {
    "seeded_sac": {
        "faucet-close": ("policy.successes=1", "policy.aside=0.08"),
        "window-close": ("policy.successes=1", "policy.aside=0.2", "policy.schedule.steps=4000"),
        "door-close": ("policy.successes=4", "policy.aside=0.16", "policy.schedule.steps=2000"),
        "drawer-close": (
            *("policy.successes=10", "policy.aside=0.16"),
            *("policy.schedule.steps=1000", "policy.schedule.evaluate_every=100"),
        ),
    },
    "dsrl": {
        "drawer-open": ("policy.successes=4", "policy.aside=0.12"),
        "faucet-close": ("policy.successes=10", "policy.aside=0.08"),
        "drawer-close": ("policy.successes=12", "policy.aside=0.16"),
        "window-close": ("policy.successes=7", "policy.aside=0.16"),
    },
    "sac": {
        "drawer-close": ("policy.schedule.steps=2400", "policy.schedule.evaluate_every=300"),
        "door-close": ("policy.schedule.steps=3600", "policy.schedule.evaluate_every=300"),
        "window-close": (),
    },
}
"""By policy, with how its demonstrations are, so that a clone of them succeeds now and then (17 to 40 %), and a budget
where it is not the policy's own. docs/policies.md tells how all of it was chosen."""

REWARDS = ("learned", "sparse", "dense")


def runs(
    out: Path, judge: str | None, arms: list[str], tasks: list[str], seeds: range
) -> Iterator[tuple[Path, list[str]]]:
    """Folder and overrides of each run, seed by seed, so that a part of the matrix is a whole comparison."""
    for seed in seeds:
        for policy, known in TASKS.items():
            for task, own in known.items():
                for reward in REWARDS:
                    if (arms and f"{policy}/{reward}" not in arms) or (tasks and task not in tasks):
                        continue
                    folder = out / f"{policy}-{task}-{reward}-{seed}"
                    options = [f"policy={policy}", f"task={task}", f"reward={reward}", f"seed={seed}", *own]
                    if judge is not None and reward == "learned":
                        options.append(override("checkpoint", judge))
                    yield folder, [*options, override("run_dir", folder)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--judge", help="the reward model; default: the shipped weights")
    parser.add_argument("--arms", nargs="*", default=[], help="POLICY/REWARD, such as dsrl/learned; default: all")
    parser.add_argument("--tasks", nargs="*", default=[], help="default: those of each policy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="from 100 on: runs for a judge to learn from")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    def one(run: tuple[Path, list[str]]) -> str | None:
        folder, options = run
        if (folder / "result.json").exists():
            return None
        with (given.out / f"{folder.name}.log").open("a") as log:
            command = [sys.executable, "-m", "rbm.cli", "rl", *options]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
        print(f"{folder.name}: {'done' if code == 0 else f'ended with code {code}'}", file=sys.stderr, flush=True)
        return None if code == 0 else folder.name

    with ThreadPoolExecutor(given.jobs) as pool:
        seeds = range(given.first_seed, given.first_seed + given.seeds)
        wanted = runs(given.out, given.judge, given.arms, given.tasks, seeds)
        failed = [name for name in pool.map(one, wanted) if name]
    results = [json.loads(path.read_text()) for path in sorted(given.out.glob("*/result.json"))]
    print(json.dumps({"results": results, "failed": failed}, indent=1))


if __name__ == "__main__":
    main()
