"""SAC seeded with demonstrations: half of each batch is theirs, several updates a decision (RLPD, arXiv 2302.02948).

python -m policies.online.seeded_sac task=drawer-open reward=learned run_dir=runs/seeded
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from policies.demonstrations import demonstrate, replay
from policies.flow import clone_flow
from policies.online.learner import Learner
from policies.online.run import Schedule, Setup, success_rate
from policies.online.world import World


@dataclass(frozen=True)
class SeededSac:
    """SAC that begins as nobody, but remembers demonstrations, paid by the same reward as its own attempts.

    Attributes:
        count, aside, tremble, successes: of the demonstrations (`policies.demonstrations.demonstrate`).
        learner: options of `Learner`.
        schedule: how long.
    """

    count: int = 20
    aside: float = 0.12
    tremble: float = 0.3
    successes: int | None = None
    learner: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)

    def setup(self, world: World, seed: int, folder: Path) -> Setup:
        training, test = world.training(), world.test()
        shown = demonstrate(world.stage(False), self.count, seed, self.aside, self.tremble, self.successes)
        policy = clone_flow(shown, 1, seed)
        rng = np.random.default_rng([seed, 1])
        base = success_rate(
            test,
            lambda seen: policy.act(seen, rng.standard_normal(policy.action, np.float32))[0],
            self.schedule.episodes,
        )
        paid = [replay(training, demo) for demo in shown]
        learner = Learner(test.observation_space, test.action_space, seed=seed, demonstrations=paid, **self.learner)  # type: ignore[arg-type]
        return Setup(
            training,
            test,
            learner,
            lambda rng: rng.uniform(-1, 1, test.action_space.shape).astype(np.float32),
            base=base,
        )


if __name__ == "__main__":
    from policies.cli import example

    example("seeded_sac")
