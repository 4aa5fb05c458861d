"""SAC from scratch, on states.

python -m policies.online.sac task=drawer-close reward=learned run_dir=runs/sac
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from policies.online.learner import Learner
from policies.online.run import Schedule, Setup
from policies.online.world import World


@dataclass(frozen=True)
class Sac:
    """Plain SAC.

    Attributes:
        learner: options of `Learner`.
        schedule: how long.
    """

    learner: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)

    def setup(self, world: World, seed: int, folder: Path) -> Setup:
        training, test = world.training(), world.test()
        learner = Learner(test.observation_space, test.action_space, seed=seed, **self.learner)  # type: ignore[arg-type]
        return Setup(
            training, test, learner, lambda rng: rng.uniform(-1, 1, test.action_space.shape).astype(np.float32)
        )


if __name__ == "__main__":
    from policies.cli import example

    example("sac")
