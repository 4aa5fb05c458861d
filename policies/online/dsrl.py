"""DSRL: a flow policy stays as it is, and SAC learns which noise to give it (Wagenmaker et al. 2025, arXiv 2506.15799).

python -m policies.online.dsrl task=drawer-open reward=learned run_dir=runs/dsrl
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from policies.demonstrations import demonstrate
from policies.flow import FlowPolicy, clone_flow
from policies.online.learner import Learner
from policies.online.run import FLOW, Schedule, Setup, success_rate
from policies.online.world import Noise, World


@dataclass(frozen=True)
class Dsrl:
    """Noise-space SAC over a flow policy that is cloned from poor demonstrations first.

    Attributes:
        count, aside, tremble, successes: of the demonstrations (`policies.demonstrations.demonstrate`).
        chunk: actions of a decision.
        bound: the noise is within ±bound.
        learner: options of `Learner`.
        schedule: how long.
    """

    count: int = 20
    aside: float = 0.12
    tremble: float = 0.3
    successes: int | None = None
    chunk: int = 4
    bound: float = 1.5
    learner: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)

    def setup(self, world: World, seed: int, folder: Path) -> Setup:
        place = folder / FLOW
        if not place.exists():
            shown = demonstrate(world.stage(True), self.count, seed, self.aside, self.tremble, self.successes)
            clone_flow(shown, self.chunk, seed).save(place)
        policy = FlowPolicy.load(place)
        training = Noise(world.training(self.chunk), policy, self.bound)
        test = Noise(world.test(self.chunk), policy, self.bound)
        learner = Learner(test.observation_space, test.action_space, seed=seed, **self.learner)  # type: ignore[arg-type]
        size = self.chunk * policy.action

        def noise(rng: np.random.Generator) -> np.ndarray:
            return np.clip(rng.standard_normal(size), -self.bound, self.bound).astype(np.float32)

        rng = np.random.default_rng([seed, 1])
        base = success_rate(test, lambda seen: rng.standard_normal(size, np.float32), self.schedule.episodes)
        # a flow policy acts by drawn noise; its mean is not what it was trained for
        return Setup(training, test, learner, noise, draws=True, base=base, continues=True)


if __name__ == "__main__":
    from policies.cli import example

    example("dsrl")
