"""What else is the score good for? Failures and successes noticed while policies run, and retrieval; prints JSON.

    python tests/benchmarks/bench_uses.py rollouts --folder runs/uses       # once, some twenty minutes; resumable
    python tests/benchmarks/bench_uses.py detection --folder runs/uses
    python tests/benchmarks/bench_uses.py retrieval --pool data/pool       # see conf/source/metaworld_pool.yaml

Rollouts are of policies in scenes of their own seed, scored with the shipped weights by a live session, a frame every
three or four control steps. A rollout has failed if the simulator's signal did not come on before the task's time was
over; a success goes on for a little, so that it can be noticed. Six in ten rollouts are of half-trained clones of the
expert (of two, five or ten demonstrations; 60, 300 or 1,500 steps) with disturbances of any size: they misjudge where
the object stands, are slow, tremble. The others are of the collector's plans: clean, messy, failing. The first
`--calibration` of each task set the limits; everything is measured on the rest. Baselines in the same run: correlation
of progress with time, and a clock that gives alarm at a fixed share of the task's time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dataset_builder.metaworld.cloning import ClonedPolicy, clone_policy
from dataset_builder.metaworld.plans import PLANS, Action, Aim, Robot
from dataset_builder.metaworld.rollout import Judge, Study
from dataset_builder.metaworld.simulator import FPS, NEAR_VIEW
from dataset_builder.metaworld.tasks import TASKS
from rbm.corpus import Corpus
from rbm.evaluation.attempts import ScoredAttempt
from rbm.evaluation.detection import SIGNS, CorrelationDetector, calibrate_failures, detect_failures, first_alarm
from rbm.evaluation.detection_results import evaluate_detection, evaluate_success_detection
from rbm.evaluation.retrieval import By, near_tasks, relevant_rows, retrieve, score_pool
from rbm.evaluation.successes import SuccessRule, calibrate_success, detect_successes
from rbm.output import whole_file
from rbm.scoring import Scorer, SessionPool

ENVS = ("drawer-open", "door-open", "window-open", "faucet-close", "button-press-topdown", "push")
SEED = 13
SIZE = 96
MOST_FRAMES = 64
AFTER_SUCCESS = 28
"""Control steps that a success goes on for: eight or ten frames."""


class Stage:
    """One task, its horizon, and the policies that try it."""

    def __init__(self, env: str) -> None:
        self.env = env
        self.study = Study(env, Judge())
        self.horizon = int(np.quantile(self.study.messy_lengths, 0.9))
        self.stride = 4 if self.horizon > 3 * (MOST_FRAMES - 1) else 3
        self._clones: dict[int, tuple[ClonedPolicy, ...]] = {}

    def clone(self, demonstrations: int, step: int) -> ClonedPolicy:
        if demonstrations not in self._clones:
            shown = self.study.demonstrations[:demonstrations]
            observations = [np.array([now.obs for now in snapshots]) for snapshots, _ in shown]
            self._clones[demonstrations] = clone_policy(observations, [actions for _, actions in shown], demonstrations)
        return self._clones[demonstrations][step]

    def rollout(self, index: int) -> tuple[str, list[Any], int]:
        """Policy, moments, and the first of them with success (-1: none); a function of task and index alone."""
        rng = np.random.default_rng([SEED, zlib.crc32(self.env.encode()), index])
        simulator = self.study.simulator
        start = simulator.reset(int(rng.integers(2**31)))
        usual = self.study.usual
        robot = Robot(simulator.expert(), self.study.clones, rng, usual, self.horizon, start.obs, start.obs[4:7].copy())
        kind = rng.choice(["clone", "expert", "failing"], p=[0.6, 0.25, 0.15])
        if kind == "clone":
            name, script = self._disturbed(robot)
        else:
            aims = (Aim.NO_SUCCESS,) if kind == "failing" else (Aim.CLEAN, Aim.MESSY)
            names = [plan.name for plan in PLANS.values() if plan.aim in aims and not plan.name.startswith("clone")]
            name = str(rng.choice(names))
            robot.gain, robot.tremble = rng.uniform(0.75, 1.0), rng.uniform(0.0, 0.15)
            script = PLANS[name].script(robot)
        now, done, moments = start, -1, [start]
        for step in range(self.horizon + AFTER_SUCCESS):
            robot.obs, robot.progress = now.obs, self.study.label.at(start, now)
            robot.path.append(now.hand.copy())
            if done < 0 and now.success:
                done = step
            if (done < 0 and step + 1 >= self.horizon) or (done >= 0 and step >= done + AFTER_SUCCESS):
                break
            action = next(script)
            robot.efforts.append(float(action[3]))
            now = simulator.step(action.astype(np.float32))
            moments.append(now)
        return name, moments, done

    def _disturbed(self, robot: Robot) -> tuple[str, Iterator[Action]]:
        rng = robot.rng
        demonstrations, step = int(rng.choice([2, 5, 10])), int(rng.choice(3, p=[0.2, 0.35, 0.45]))
        policy = self.clone(demonstrations, step)
        error = rng.normal(0, 1, 3) * rng.choice([0.0, 0.0, 0.02, 0.04]) * np.array([1.0, 1.0, 0.5])
        robot.gain, robot.tremble = rng.uniform(0.5, 1.0), rng.uniform(0.0, 0.6)

        def script() -> Iterator[Action]:
            while True:
                yield robot.asked(policy, error, np.zeros(3))

        return f"clone of {demonstrations}, stage {step}", script()


def make_rollouts(folder: Path, envs: list[str], count: int) -> None:
    """Scores of rollouts, one file each; what is there is kept."""
    pool = SessionPool(Scorer.from_pretrained(device="cpu"))
    for env in envs:
        (folder / env).mkdir(parents=True, exist_ok=True)
        missing = [index for index in range(count) if not (folder / env / f"{index:04d}.npz").exists()]
        if not missing:
            continue
        stage = Stage(env)
        began = time.monotonic()
        for index in missing:
            name, moments, done = stage.rollout(index)
            steps = np.arange(0, len(moments), stage.stride)
            frames = stage.study.simulator.render([moments[i].physics for i in steps], (NEAR_VIEW,), SIZE)[NEAR_VIEW]
            with pool.open(TASKS[env].text) as session:
                scores = session.push_many(frames)
            columns = {
                key: np.array([getattr(score, key) for score in scores], np.float32)
                for key in ("progress", "progress_std", "success")
            }
            with whole_file(folder / env / f"{index:04d}.npz") as temporary:
                np.savez(temporary, policy=name, step=steps, done=done, horizon=stage.horizon, **columns)
        stage.study.close()
        seconds = (time.monotonic() - began) / len(missing)
        print(f"{env}: {len(missing)} rollouts, {seconds:.2f} s each", file=sys.stderr, flush=True)


def read_rollouts(folder: Path, envs: list[str]) -> list[tuple[int, str, float, ScoredAttempt]]:
    """Number, policy, seconds of the task's time, and scores of each."""
    found = []
    for env in envs:
        for file in sorted((folder / env).glob("*.npz")):
            with np.load(file) as data:
                done = int(data["done"]) / FPS if data["done"] >= 0 else None
                arrays = (data["step"] / FPS, data["progress"], data["success"])
                attempt = ScoredAttempt(f"{env}/{file.stem}", TASKS[env].text, *arrays, done is not None, done)
                found.append((int(file.stem), str(data["policy"]), int(data["horizon"]) / FPS, attempt))
    return found


def detection(folder: Path, envs: list[str], calibration: int) -> dict[str, Any]:
    rollouts = read_rollouts(folder, envs)
    shown = [attempt for number, _, _, attempt in rollouts if number < calibration]
    held = [entry for entry in rollouts if entry[0] >= calibration]
    attempts = [attempt for *_, attempt in held]
    limits = calibrate_failures(shown)
    alone = calibrate_failures([attempt for attempt in shown if attempt.succeeded], done=limits.done)

    def told(alarms: list[float | None]) -> dict[str, Any]:
        found = evaluate_detection(attempts, alarms)
        low, high = interval(attempts, alarms)
        false = round(found.all.false_alarms, 4)
        return {**found.to_json(), "false_alarms": false, "f1_interval_95": [round(low, 3), round(high, 3)]}

    alarms = detect_failures(attempts, limits)
    cloned = [n for n, (_, policy, _, _) in enumerate(held) if policy.startswith("clone")]
    clones = evaluate_detection([attempts[n] for n in cloned], [alarms[n] for n in cloned]).all
    failures = {
        "limits": told(alarms),
        "limits, clones alone": clones.to_json("median_alarm"),
        "limits from successes alone": told(detect_failures(attempts, alone)),
    }
    for window in (5, 7, 9):
        recipe = [first_alarm(CorrelationDetector(window), attempt) for attempt in attempts]
        failures[f"correlation, window {window}, −0.5"] = told(recipe)
    for share in (0.5, 0.6, 0.7):
        clock: list[float | None] = []
        for _, _, horizon, attempt in held:
            late = attempt.time >= share * horizon
            clock.append(float(attempt.time[late.argmax()]) if late.any() else None)
        failures[f"clock at {share}"] = told(clock)
    successes = {}
    rules: dict[str, Any] = {"usual vote": SuccessRule(), "one vote": calibrate_success(shown), "by task": limits.done}
    for name, rule in rules.items():
        found = evaluate_success_detection(attempts, detect_successes(attempts, rule))
        said = vars(rule) if isinstance(rule, SuccessRule) else {task: vars(one) for task, one in rule.items()}
        successes[name] = {"rule": said, **found.to_json()}
    counts = {"calibration": len(shown), "held_out": len(held), "failed": sum(not a.succeeded for a in attempts)}
    signs = {name: None if np.isinf(value := getattr(limits, name)) else round(value, 3) for name in SIGNS}
    return {**counts, "limits": {**signs, "alphas": limits.alphas}, "failures": failures, "successes": successes}


def interval(attempts: list[ScoredAttempt], alarms: list[float | None], draws: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of F1, over rollouts."""
    rng = np.random.default_rng(0)
    failed = np.array([not attempt.succeeded for attempt in attempts])
    until = [np.inf if attempt.done is None else attempt.done for attempt in attempts]
    said = np.array([at is not None and at < end for at, end in zip(alarms, until, strict=True)])
    drawn = rng.integers(0, len(attempts), (draws, len(attempts)))
    f1 = 2 * (said & failed)[drawn].sum(1) / (said[drawn].sum(1) + failed[drawn].sum(1))
    low, high = np.quantile(f1, [0.025, 0.975])
    return float(low), float(high)


def retrieval(place: str, k: int) -> dict[str, Any]:
    """Precision for every query of which the pool holds at least 60 successes, with and without the filter by words."""
    corpus = Corpus.open(place)
    scorer = Scorer.from_pretrained(device="cpu")
    queries = [task.text for task in corpus.tasks if len(relevant_rows(corpus, task.text)) >= 60]
    found: dict[str, Any] = {"pool": len(corpus), "k": k, "queries": {}}
    for query in queries:
        whole = score_pool(corpus, query, scorer)
        row: dict[str, Any] = {"relevant": len(relevant_rows(corpus, query))}
        for near in (1, 2, 3, None):
            rows = whole.rows if near is None else near_tasks(corpus, query, near)
            left = whole.among(rows)
            chance = round(float(np.isin(left.rows, relevant_rows(corpus, query)).mean()), 3)
            figures = {by: retrieve(left, corpus, k, by).precision for by in get_args(By)}
            row["all" if near is None else f"near {near}"] = {"trajectories": len(left), "chance": chance, **figures}
        found["queries"][query] = row
        print(f"{query}: {row['near 1']}, {row['all']}", file=sys.stderr, flush=True)
    for name in ("near 1", "near 2", "near 3", "all"):
        rows = [row[name] for row in found["queries"].values()]
        found[f"mean, {name}"] = {by: round(float(np.mean([row[by] for row in rows])), 3) for by in get_args(By)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    rollouts = commands.add_parser("rollouts")
    rollouts.add_argument("--folder", type=Path, required=True)
    rollouts.add_argument("--envs", nargs="*", default=list(ENVS))
    rollouts.add_argument("--count", type=int, default=120, help="of each task")
    detections = commands.add_parser("detection")
    detections.add_argument("--folder", type=Path, required=True)
    detections.add_argument("--envs", nargs="*", default=list(ENVS))
    detections.add_argument("--calibration", type=int, default=60)
    retrievals = commands.add_parser("retrieval")
    retrievals.add_argument("--pool", required=True)
    retrievals.add_argument("-k", type=int, default=50)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    if given.what == "rollouts":
        make_rollouts(given.folder, given.envs, given.count)
    elif given.what == "detection":
        print(json.dumps(detection(given.folder, given.envs, given.calibration), indent=2, ensure_ascii=False))
    else:
        print(json.dumps(retrieval(given.pool, given.k), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
