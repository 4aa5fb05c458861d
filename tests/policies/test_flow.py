"""The flow policy and best of K."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dataset_builder.metaworld.simulator import Simulator
from policies.cli import run
from policies.demonstrations import Demonstration, demonstrate
from policies.flow import FlowPolicy, chunks, clone_flow
from policies.metaworld import MetaWorld, drawn_scene
from policies.online.run import TEST_SEED
from policies.online.world import World
from policies.planning.best_of_k import BestOfK, Planner
from policies.report import read_runs
from policies.shaping import Shaping
from rbm.config import compose, plain
from rbm.errors import UserError
from rbm.scoring import Scorer


def demo(actions: list[float]) -> Demonstration:
    count = len(actions)
    observations = np.arange(count + 1, dtype=np.float32)[:, None]
    return Demonstration(
        0, observations, np.array(actions, np.float32)[:, None], np.zeros(count, np.float32), False, False
    )


def test_chunks_repeat_the_last_action():
    seen, acted = chunks([demo([0.1, 0.2, 0.3])], 3)
    assert seen[:, 0].tolist() == [0, 1, 2]
    expected = [[0.1, 0.2, 0.3], [0.2, 0.3, 0.3], [0.3, 0.3, 0.3]]
    torch.testing.assert_close(acted, torch.tensor(expected))


def test_acting_is_euler_steps_along_the_velocity():
    policy = FlowPolicy(1, 1, 2, hidden=4, layers=1, steps=4)
    with torch.no_grad():
        for parameter in policy.net.parameters():
            parameter.zero_()
        policy.net[-1].bias.copy_(torch.tensor([0.5, -3.0]))  # the velocity everywhere
    acted = policy.act(np.zeros(1, np.float32), np.array([0.1, 0.2], np.float32))
    assert acted.shape == (2, 1)
    assert acted[:, 0] == pytest.approx([0.6, -1.0])  # 0.1 + 0.5; 0.2 − 3 clipped


def test_what_was_demonstrated_is_done_whatever_the_noise(tmp_path: Path):
    shown = [demo([0.5, -0.5, 0.5, -0.5])] * 4
    policy = clone_flow(shown, 1, seed=0, steps=1200, batch=64)
    rng = np.random.default_rng(0)
    for moment, action in enumerate([0.5, -0.5, 0.5, -0.5]):
        for _ in range(3):
            acted = policy.act(np.array([moment], np.float32), rng.standard_normal(1, np.float32))
            assert acted[0, 0] == pytest.approx(action, abs=0.12)
    policy.save(tmp_path / "flow.safetensors")
    again = FlowPolicy.load(tmp_path / "flow.safetensors")
    noise = rng.standard_normal(1, np.float32)
    seen = np.array([2.0], np.float32)
    assert np.array_equal(again.act(seen, noise), policy.act(seen, noise))
    same = clone_flow(shown, 1, seed=0, steps=1200, batch=64)
    assert np.array_equal(same.act(seen, noise), policy.act(seen, noise))


def test_what_is_no_flow_policy_is_a_sentence(tmp_path: Path):
    (tmp_path / "flow.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no flow policy"):
        FlowPolicy.load(tmp_path / "flow.safetensors")
    with pytest.raises(UserError, match="no demonstrations"):
        clone_flow([], 1, 0)


@pytest.fixture(scope="module")
def flow() -> FlowPolicy:
    env = MetaWorld("window-close", max_steps=25, action_repeat=8, render_mode=None)
    return clone_flow(demonstrate(env, 8, 0, 0.05), 2, 0, steps=300)


def planner(flow: FlowPolicy, scorer: Scorer, k: int) -> Planner:
    settings = BestOfK(k=k, chunk=2)
    return Planner(Simulator("window-close"), flow, scorer, "close the window", settings, 8, Shaping("progress"))


def test_one_proposal_is_the_flow_policy_alone(flow: FlowPolicy, judge_scorer: Scorer):
    planned = planner(flow, judge_scorer, 1)
    for number in range(2):
        scene = TEST_SEED + number
        won, decisions = planned.attempt(scene, 3, 25)
        simulator, rng = Simulator("window-close"), np.random.default_rng([3, scene])
        now, success, count = simulator.reset(scene), False, 0
        while count < 13 and not success:
            count += 1
            actions = flow.act(now.obs.astype(np.float32), rng.standard_normal((1, 8), np.float32)[0])
            for action in actions[: 1 if count == 13 else 2]:  # 25 actions in all
                for _ in range(8):
                    now = simulator.step(action)
                    success |= now.success
        assert (won, decisions) == (success, count)
    planned.close()


def test_the_best_of_many_is_the_one_that_scores_best(flow: FlowPolicy, judge_scorer: Scorer):
    planned = planner(flow, judge_scorer, 6)
    now = planned._simulator.reset(1)
    session = planned._pool.open("close the window")
    session.push(planned._picture(now))
    noises = np.random.default_rng([0, 1]).standard_normal((6, 8), np.float32)
    worth = []
    for noise in noises:  # each played and scored by itself
        end, _ = planned._play(now, noise, 2)
        fork = session.fork()
        score = fork.push(planned._picture(end))
        worth.append(score.progress + 0.5 * score.success)
    best, _ = planned._play(now, noises[int(np.argmax(worth))], 2)
    assert len(set(np.round(worth, 6))) > 1
    planned.attempt(1, 0, 2)  # one decision, in the same scene with the same draws
    assert len(planned._pool) == 7  # nothing is left but what this test opened
    after = planned._simulator.step(np.zeros(4, np.float32))
    assert np.allclose(after.obs[18:36], best.obs[:18], atol=1e-9)  # an observation holds the moment before, too


def test_an_evaluation_goes_on_where_it_was_stopped(judge_checkpoint: Path, tmp_path: Path):
    world = World("window-close", "learned", 2, 8, str(judge_checkpoint))
    settings = BestOfK(k=2, chunk=2, count=2, episodes=3)
    result = settings.run(world, 0, tmp_path / "run", {"seed": 0})
    lines = (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()
    assert len(lines) == result["episodes"] == 3
    (tmp_path / "run" / "episodes.jsonl").write_text(lines[0] + "\n")
    assert settings.run(world, 0, tmp_path / "run", {"seed": 0}) == result
    assert (tmp_path / "run" / "episodes.jsonl").read_text().splitlines() == lines
    with pytest.raises(UserError, match="holds another run"):
        settings.run(world, 0, tmp_path / "run", {"seed": 1})
    assert [told.result for told in read_runs(tmp_path)[0]] == [result]


def test_best_of_k_that_cannot_be(tmp_path: Path):
    with pytest.raises(UserError, match="k=0 of best-of-K"):
        BestOfK(k=0)
    with pytest.raises(UserError, match="cannot use reward=dense"):
        BestOfK().run(World("window-close", "dense"), 0, tmp_path / "run", {})
    with pytest.raises(UserError, match="is a server, but this needs the model itself"):
        BestOfK().run(World("window-close", checkpoint="http://127.0.0.1:1"), 0, tmp_path / "run", {})
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="leave it out"):
        run({**plain(compose("rl", ["policy=best_of_k", "start=there"])), "run_dir": str(tmp_path / "run")})


def test_it_is_tested_in_the_scenes_of_the_others():
    env = MetaWorld("window-close", render_mode=None)
    seen, _ = env.reset(seed=TEST_SEED + 3)
    simulator = Simulator("window-close")
    assert np.array_equal(simulator.reset(drawn_scene(TEST_SEED + 3)).obs.astype(np.float32), seen)
