"""Best of K: a flow policy proposes K chunks of actions, a simulator plays each, the reward model picks one.

    python -m policies.planning.best_of_k task=drawer-open run_dir=runs/best_of_k

The live session is forked for each proposal, and all K are scored in one forward; nothing is learned.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset_builder.metaworld.simulator import NEAR_VIEW, Simulator, Snapshot
from dataset_builder.metaworld.tasks import TASKS
from policies.demonstrations import demonstrate
from policies.flow import FlowPolicy, clone_flow
from policies.folder import claim
from policies.judges import local_scorer
from policies.metaworld import drawn_scene
from policies.online.run import FLOW, TEST_SEED
from policies.online.world import World
from policies.shaping import Shaping
from rbm.errors import UserError
from rbm.output import whole_file
from rbm.scoring import Scorer, SessionPool


@dataclass(frozen=True)
class BestOfK:
    """Settings.

    Attributes:
        k: proposals for each decision; 1 is the flow policy alone.
        chunk: actions of a proposal.
        count, aside, tremble: of the demonstrations that the flow policy is cloned from.
        success_weight: a proposal is worth Φ + success_weight · success probability at its end.
        episodes: of the evaluation.
    """

    k: int = 8
    chunk: int = 4
    count: int = 20
    aside: float = 0.12
    tremble: float = 0.3
    success_weight: float = 0.5
    episodes: int = 40

    def __post_init__(self) -> None:
        for name in ("k", "chunk", "count", "episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} of best-of-K must be at least 1")

    def run(
        self,
        world: World,
        seed: int,
        folder: Path,
        config: Mapping[str, Any],
        tell: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> dict[str, Any]:
        """Evaluate in a folder, episode by episode; a stopped run goes on. Returns the result.

        Args:
            config: what was asked for in all: the folder is this run's alone.

        Raises:
            UserError: another reward than the learned one, a server as its model, a folder of another run.
        """
        if world.reward != "learned":
            raise UserError(f"best-of-K picks by the reward model: it cannot use reward={world.reward}, give learned")
        scorer = local_scorer(world.checkpoint)
        claim(folder, config)
        base = folder / FLOW
        if not base.exists():
            env = world.stage(False)
            clone_flow(demonstrate(env, self.count, seed, self.aside, self.tremble), self.chunk, seed).save(base)
            env.close()
        planner = Planner(
            Simulator(world.task),
            FlowPolicy.load(base),
            scorer,
            TASKS[world.task].text,
            self,
            world.action_repeat,
            world.shaping,
        )
        path = folder / "episodes.jsonl"
        done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        began = time.monotonic()
        for number in range(len(done), self.episodes):
            won, decisions = planner.attempt(drawn_scene(TEST_SEED + number), seed, world.max_steps)
            done.append({"episode": number, "success": won, "decisions": decisions})
            with path.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            tell(
                {
                    "step": sum(line["decisions"] for line in done),
                    "episode": len(done),
                    "seconds": time.monotonic() - began,
                    "success_rate": float(np.mean([line["success"] for line in done])),
                    "diverged": False,
                }
            )
        planner.close()
        result = {
            "task": world.task,
            "algorithm": "best_of_k",
            "reward": "learned",
            "k": self.k,
            "seed": seed,
            "success_rate": float(np.mean([line["success"] for line in done])),
            "episodes": self.episodes,
        }
        with whole_file(folder / "result.json") as target:
            target.write_text(json.dumps(result, indent=2))
        return result


class Planner:
    """Plays episodes of one task; see `BestOfK`."""

    def __init__(
        self,
        simulator: Simulator,
        policy: FlowPolicy,
        scorer: Scorer,
        task: str,
        settings: BestOfK,
        action_repeat: int,
        shaping: Shaping,
    ) -> None:
        self._simulator, self._policy, self._task = simulator, policy, task
        self._settings, self._repeat, self._shaping = settings, action_repeat, shaping
        self._pool = SessionPool(scorer)

    def attempt(self, scene: int, seed: int, max_steps: int) -> tuple[bool, int]:
        """One episode of at most `max_steps` actions: whether it succeeded, and after how many decisions."""
        rng = np.random.default_rng([seed, scene])
        now = self._simulator.reset(scene)
        session = self._pool.open(self._task)
        session.push(self._picture(now))
        steps = decisions = 0
        success = now.success
        while steps < max_steps and not success:
            count = min(self._settings.chunk, max_steps - steps)
            steps += count
            decisions += 1
            proposals = rng.standard_normal((self._settings.k, self._policy.chunk * self._policy.action), np.float32)
            futures = [self._play(now, noise, count) for noise in proposals]
            forks = [session.fork() for _ in futures]
            scores = self._pool.push(
                [(fork, self._picture(end)) for fork, (end, _) in zip(forks, futures, strict=True)]
            )
            worth = [
                self._shaping.value(score.progress, score.progress_std) + self._settings.success_weight * score.success
                for score in scores
            ]
            best = int(np.argmax(worth))
            session.close()
            session = forks.pop(best)
            for fork in forks:
                fork.close()
            now, success = futures[best]
            self._simulator.go_back(now)
        session.close()
        return success, decisions

    def close(self) -> None:
        self._simulator.close()

    def _play(self, now: Snapshot, noise: np.ndarray, count: int) -> tuple[Snapshot, bool]:
        self._simulator.go_back(now)
        moment, success = now, False
        for action in self._policy.act(now.obs.astype(np.float32), noise)[:count]:
            for _ in range(self._repeat):
                moment = self._simulator.step(action)
                success |= moment.success
        return moment, success

    def _picture(self, moment: Snapshot) -> np.ndarray:
        return self._simulator.render([moment.physics], (NEAR_VIEW,), 96)[NEAR_VIEW][0]


if __name__ == "__main__":
    from policies.cli import example

    example("best_of_k")
