"""What a reward model costs a training loop, scored at once or by another process; prints JSON.

    python tests/benchmarks/bench_relabel.py [--steps 200] [--repeats 7] [--task drawer-open]

stable-baselines3's SAC (two layers of 256, batch 256, a gradient step for each step) on a Meta-World task that renders
a picture of 96 px at every step, in all arms:

none     no reward model: the pictures are thrown away
late     `LateRewardBuffer`, every step's picture is scored
late_4   the same, every fourth step's
sync     `RewardModelWrapper`, every step's picture is scored before the next step

Arms take turns, `--steps` steps each, and the medians over turns are told: other work on the machine then weighs on all
alike. A turn of a late arm ends when all its labels have come. `share_of_none` is the median of the ratios within a
round. `cpu_ms` is processor time for each step, of the loop and of the process that scores: where neither has a core of
its own, `share_of_cpu`, none's over both, is what is left. `waiting` are transitions without a label at the moments at
which a batch is drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer

from policies.metaworld import MetaWorld
from policies.relabel import FramesInInfo, LateRewardBuffer
from policies.wrapper import RewardModelWrapper

FIRST = 100
"""Steps before learning begins."""


class Watched(LateRewardBuffer):
    """Notes how many transitions wait for their label when a batch is drawn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lag: list[int] = []
        self.sampling_seconds = 0.0

    def sample(self, batch_size: int, env: Any = None) -> Any:
        self.lag.append(self.labels.waiting)
        began = time.perf_counter()
        try:
            return super().sample(batch_size, env)
        finally:
            self.sampling_seconds += time.perf_counter() - began


def arms(task: str, seed: int, options: dict[str, Any]) -> dict[str, SAC]:
    def world() -> MetaWorld:
        return MetaWorld(task, max_steps=200)

    def late(every: int) -> SAC:
        settings = {"task": world().instruction, "every": every, **options}
        return learner(FramesInInfo(world()), Watched, settings)

    def learner(env: Any, buffer: type[ReplayBuffer], settings: dict[str, Any]) -> SAC:
        return SAC(
            "MlpPolicy",
            env,
            batch_size=256,
            buffer_size=100_000,
            learning_starts=FIRST,
            train_freq=1,
            gradient_steps=1,
            policy_kwargs={"net_arch": [256, 256]},
            replay_buffer_class=buffer,
            replay_buffer_kwargs=settings,
            seed=seed,
            device="cpu",
        )

    return {
        "none": learner(FramesInInfo(world()), ReplayBuffer, {}),
        "late": late(1),
        "late_4": late(4),
        "sync": learner(RewardModelWrapper(world(), None, device="cpu"), ReplayBuffer, {}),
    }


def turn(model: SAC, steps: int) -> tuple[float, float, float]:
    """Steps a second; milliseconds of processor time for each step, of this process and of the one that scores."""
    buffer = model.replay_buffer
    late = buffer if isinstance(buffer, LateRewardBuffer) else None
    other = cpu_seconds(late.labeller.pid) if late else 0.0
    began, cpu = time.perf_counter(), time.process_time()
    model.learn(steps, reset_num_timesteps=False)
    if late:
        late.labels.finish()
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - began
    other = cpu_seconds(late.labeller.pid) - other if late else 0.0
    return steps / seconds, 1e3 * cpu / steps, 1e3 * other / steps


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(models: dict[str, SAC], steps: int, repeats: int, tell: Callable[[str], None]) -> dict[str, Any]:
    for model in models.values():
        turn(model, 2 * FIRST)
        if isinstance(model.replay_buffer, Watched):
            model.replay_buffer.lag.clear()
            model.replay_buffer.sampling_seconds = 0.0
    rates: dict[str, list[float]] = {name: [] for name in models}
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(repeats):
        order = list(models)[number % len(models) :] + list(models)[: number % len(models)]
        for name in order:
            rate, own, other = turn(models[name], steps)
            rates[name].append(rate)
            costs[name].append((own, other))
        tell(json.dumps({name: round(rates[name][-1], 1) for name in models}))
    told: dict[str, Any] = {}
    alone = np.median(costs["none"], 0).sum()
    for name, found in rates.items():
        own, other = np.median(costs[name], 0)
        ratios = [a / b for a, b in zip(found, rates["none"], strict=True)]
        told[name] = {
            "steps_per_second": round(statistics.median(found), 1),
            "share_of_none": round(statistics.median(ratios), 3),
            "cpu_ms": {"loop": round(float(own), 1), "scoring": round(float(other), 2)},
            "share_of_cpu": round(float(alone / (own + other)), 3),
            "all": [round(rate, 1) for rate in found],
        }
        buffer = models[name].replay_buffer
        if isinstance(buffer, Watched):
            told[name] |= {
                "waiting_median": float(np.median(buffer.lag)),
                "waiting_most": max(buffer.lag),
                "sampling_ms": round(1e3 * buffer.sampling_seconds / len(buffer.lag), 2),
                "deaths": buffer.labeller.deaths,
            }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="drawer-open")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--wait-seconds", type=float, default=0.5)
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    models = arms(
        given.task, given.seed, {"batch": given.batch, "wait_seconds": given.wait_seconds, "score_device": "cpu"}
    )
    told = measure(models, given.steps, given.repeats, print if given.verbose else lambda line: None)
    print(json.dumps({"task": given.task, "steps": given.steps, "load": os.getloadavg()[0], "arms": told}, indent=2))
    for model in models.values():
        if isinstance(model.replay_buffer, LateRewardBuffer):
            model.replay_buffer.close()


if __name__ == "__main__":
    main()
