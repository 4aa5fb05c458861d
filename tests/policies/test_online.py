"""Online learning: what a learner remembers, that a killed run goes on as the unbroken one, what a run writes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from running import free_port, serving

from dataset_builder.sources.metaworld_attempts import read_attempts
from policies.demonstrations import Demonstration, demonstrate, replay
from policies.judges import JudgeGone
from policies.metaworld import MetaWorld, drawn_scene
from policies.online.dsrl import Dsrl
from policies.online.learner import Learner, NormedCritic
from policies.online.run import Run, Schedule, read_curve, scene
from policies.online.sac import Sac
from policies.online.seeded_sac import SeededSac
from policies.online.world import Chunks, World
from rbm.cli import cli
from rbm.corpus import Corpus
from rbm.errors import UserError
from rbm.model import RewardModel

BOX = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)
SMALL: dict[str, Any] = {"hidden": 16, "batch": 16}
SCHEDULE = Schedule(steps=24, first=8, updates=1, evaluate_every=8, episodes=2)


def learner(seed: int = 0, **options: Any) -> Learner:
    return Learner(BOX, ACTIONS, seed=seed, **{**SMALL, **options})


def fill(one: Learner, count: int = 20, reward: float = 0.0) -> None:
    rng = np.random.default_rng(0)
    for _ in range(count):
        seen = rng.standard_normal((2, 3), np.float32)
        one.add(seen[0], rng.uniform(-2, 2, 2).astype(np.float32), reward, seen[1], False, False)


def test_critics_are_normed_behind_every_hidden_layer():
    critic = learner().sac.critic
    assert isinstance(critic, NormedCritic)
    kinds = [type(layer).__name__ for layer in critic.q_networks[0]]
    assert kinds == ["Linear", "LayerNorm", "ReLU", "Linear", "LayerNorm", "ReLU", "Linear"]
    # what is trained is what answers
    assert {id(p) for p in critic.parameters()} == {
        id(p) for group in critic.optimizer.param_groups for p in group["params"]
    }


def test_half_of_a_batch_is_demonstrations():
    shown = Demonstration(
        0, np.ones((5, 3), np.float32), np.full((4, 2), 2.0, np.float32), np.full(4, 7.0, np.float32), True, True
    )
    one = learner(demonstrations=[shown])
    fill(one, reward=-1.0)
    batch = one.buffer.sample(10)
    assert sorted(batch.rewards[:, 0].tolist()) == [-1.0] * 5 + [7.0] * 5
    assert batch.actions[batch.rewards[:, 0] == 7.0].eq(1.0).all()  # scaled to the box
    ended = one.buffer.demonstrations.dones[:, 0]
    assert ended.tolist() == [0, 0, 0, 1]  # terminated with its last action


def test_a_truncation_is_no_end():
    one = learner()
    seen = np.zeros(3, np.float32)
    one.add(seen, np.zeros(2, np.float32), 0.0, seen, False, True)
    assert one.buffer.sample(4).dones.eq(0).all()
    one = learner()
    one.add(seen, np.zeros(2, np.float32), 0.0, seen, True, False)
    assert one.buffer.sample(4).dones.eq(1).all()


def test_a_restored_learner_goes_on_bit_for_bit(tmp_path: Path):
    one = learner()
    fill(one)
    one.learn(3)
    torch.save(one.state(), tmp_path / "state.pt")
    one.learn(3)
    expected = [p.clone() for p in one.sac.policy.parameters()]
    other = learner(seed=5)
    other.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    other.learn(3)
    assert all(torch.equal(a, b) for a, b in zip(expected, other.sac.policy.parameters(), strict=True))
    assert torch.equal(one.sac.log_ent_coef, other.sac.log_ent_coef)


def test_chunks_play_all_actions_and_pay_their_mean():
    plain = MetaWorld("window-close", "dense", max_steps=5, action_repeat=2, render_mode=None)
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 4)).astype(np.float32)
    plain.reset(seed=1)
    steps = [plain.step(action) for action in actions]
    grouped = Chunks(MetaWorld("window-close", "dense", max_steps=5, action_repeat=2, render_mode=None), 3)
    grouped.reset(seed=1)
    seen, reward, *_ = grouped.step(actions.ravel())
    assert np.array_equal(seen, steps[-1][0])
    assert reward == pytest.approx(np.mean([step[1] for step in steps]))
    *_, truncated, _ = grouped.step(actions.ravel())
    assert truncated  # after two of the three


def test_demonstrations_are_the_same_again_and_some_fail():
    env = MetaWorld(
        "window-close", "sparse", max_steps=25, action_repeat=8, render_mode=None, terminate_on_success=True
    )
    shown = demonstrate(env, 6, seed=3, aside=0.15)
    again = demonstrate(env, 6, seed=3, aside=0.15)
    assert all(np.array_equal(a.actions, b.actions) for a, b in zip(shown, again, strict=True))
    assert 0 < sum(demo.success for demo in shown) < 6
    for demo in shown:
        assert len(demo.observations) == len(demo) + 1
        assert demo.terminated == demo.success
        assert demo.rewards[-1] == (0.0 if demo.success else -1.0)
    longer = demonstrate(MetaWorld("window-close", max_steps=25, action_repeat=8, render_mode=None), 6, 3, 0.15)
    assert any(len(long) > len(short) for long, short in zip(longer, shown, strict=True))
    for long, short in zip(longer, shown, strict=True):  # an end that comes sooner changes nothing else
        assert np.array_equal(long.actions[: len(short)], short.actions)
    for long, short in zip(longer, shown, strict=True):
        paid = replay(env, long)
        assert np.array_equal(paid.observations, short.observations)
        assert np.array_equal(paid.rewards, short.rewards)
        assert (paid.scene, paid.terminated, paid.success) == (long.scene, long.success, long.success)
    with pytest.raises(UserError, match="ask for one at least"):
        demonstrate(env, 0, 0, 0.1)


def test_every_reward_is_given_the_same_demonstrations(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """A vote that comes early, or an end at success, cuts what is learned from, never what counts as demonstrated."""
    algorithm = SeededSac(4, 0.15, successes=2, learner={"hidden": 16}, schedule=Schedule(episodes=2))
    lengths, rates = {}, set()
    for reward in ("learned", "sparse", "dense"):
        world = World(
            "window-close",
            reward,  # type: ignore[arg-type]
            checkpoint=str(tiny_checkpoint),
            vote=(1, 1, 0.0),  # whatever it says counts as done
        )
        setup = algorithm.setup(world, 0, tmp_path)
        assert setup.learner.buffer.demonstrations is not None
        lengths[reward] = setup.learner.buffer.demonstrations.size()
        rates.add(setup.base)
    assert lengths["learned"] == 4 < lengths["sparse"] < lengths["dense"]
    assert len(rates) == 1


def make_run(folder: Path, algorithm: Any, reward: str, checkpoint: Path | None = None, seed: int = 0) -> Run:
    world = World(
        "window-close",
        reward,  # type: ignore[arg-type]
        max_steps=4,
        action_repeat=8,
        checkpoint=None if checkpoint is None else str(checkpoint),
        vote=(1, 1, 0.0),  # whatever it says counts as done: episodes of one decision, and all of them clips
    )
    return Run(folder, {"seed": seed}, algorithm, world, seed)


@pytest.mark.parametrize(
    ("algorithm", "reward"),
    [
        (Sac(SMALL, SCHEDULE), "dense"),
        (SeededSac(3, learner=SMALL, schedule=SCHEDULE), "sparse"),
        (Dsrl(3, chunk=2, learner=SMALL, schedule=SCHEDULE), "learned"),
    ],
    ids=["sac", "seeded", "dsrl"],
)
@pytest.mark.parametrize("at", [0, 16])
def test_a_stopped_run_goes_on_as_the_unbroken_one(
    algorithm: Any, reward: str, at: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(line: dict[str, Any]) -> None:
        if line["step"] >= at:
            broken._attempt()  # what came after the last evaluation is lost and done again
            raise Stop

    whole = make_run(tmp_path / "whole", algorithm, reward, tiny_checkpoint)
    result = whole.train()
    broken = make_run(tmp_path / "broken", algorithm, reward, tiny_checkpoint)
    with pytest.raises(Stop):
        broken.train(stop)
    resumed = make_run(tmp_path / "broken", algorithm, reward, tiny_checkpoint)
    assert at <= resumed.step < at + 8
    again = resumed.train()
    for name in ("seconds",):
        result.pop(name), again.pop(name)
    assert again == result

    def curve(name: str) -> list[dict[str, Any]]:
        return [{**line, "seconds": 0} for line in read_curve(tmp_path / name)]

    assert curve("broken") == curve("whole")
    a, b = (run.setup.learner.sac.policy.state_dict() for run in (whole, resumed))
    assert all(torch.equal(a[key], b[key]) for key in a)
    for file in ("attempts.jsonl", "monitor.jsonl") if reward == "learned" else ("attempts.jsonl",):
        written = [(tmp_path / name / file).read_text() for name in ("whole", "broken")]
        assert written[0] == written[1]
        assert len(written[0].splitlines()) == result["episodes"]
    attempts = read_attempts(tmp_path / "whole" / "attempts.jsonl")
    assert [one.scene for one in attempts] == [drawn_scene(scene(0, number)) for number in range(result["episodes"])]
    assert sum(len(one.actions) for one in attempts) == result["steps"] * (2 if isinstance(algorithm, Dsrl) else 1)
    with pytest.raises(UserError, match="holds another run"):
        make_run(tmp_path / "broken", algorithm, reward, tiny_checkpoint, seed=1)


def test_a_run_whose_judge_goes_away_keeps_its_attempts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    schedule = Schedule(steps=12, first=2, updates=1, evaluate_every=12, episodes=1)
    world = World(
        "window-close", checkpoint=f"http://127.0.0.1:{port}", max_steps=4, vote=(1, 1, 0.0), patience_seconds=0.3
    )

    def made() -> Run:
        return Run(tmp_path / "run", {}, Sac(SMALL, schedule), world, 0)

    with serving(tmp_path / "log", f"port={port}", checkpoint=tiny_checkpoint) as running:
        run = made()
        attempt, done = run._attempt, itertools.count()

        def attempt_until_it_goes() -> int:
            if next(done) == 5:
                running.process.kill()
                running.process.wait()
            return attempt()

        run._attempt = attempt_until_it_goes  # type: ignore[method-assign]
        with pytest.raises(JudgeGone, match="has been away"):
            run.train()
    with serving(tmp_path / "log2", f"port={port}", checkpoint=tiny_checkpoint):
        run = made()
        assert (run.step, run.episode, run.setup.learner.buffer.size()) == (5, 5, 5)
        assert run.train()["steps"] == 12
    assert [line["step"] for line in read_curve(tmp_path / "run")] == [0, 12]


def test_the_command_trains_and_reports(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = [
        "rl",
        "--json",
        "policy=sac",
        "task=window-close",
        f"checkpoint={tiny_checkpoint}",
        "online.max_steps=4",
        "policy.schedule={_target_: policies.online.run.Schedule, steps: 16, first: 4, updates: 1, evaluate_every: 8, "
        "episodes: 2}",
        f"run_dir={tmp_path / 'runs' / 'a'}",
    ]
    done = CliRunner().invoke(cli, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["task"], result["algorithm"], result["reward"], result["seed"]) == (
        "window-close",
        "sac",
        "learned",
        0,
    )
    steps = [line["step"] for line in read_curve(tmp_path / "runs" / "a")]
    assert len(steps) == 3
    assert 8 <= steps[1] < 12  # evaluations come at an episode's end
    assert steps[2] == result["steps"] >= 16
    report = CliRunner().invoke(cli, ["report", "rl", str(tmp_path / "runs")], catch_exceptions=False)
    assert report.exit_code == 0, report.output
    assert "| sac | window-close | learned | 1 |" in report.stdout
    saved = json.loads((tmp_path / "runs" / "report" / "results.json").read_text())
    assert saved["table"][0]["success"] == result["success_rate"]
    assert (tmp_path / "runs" / "report" / "sac.png").stat().st_size > 1000


def test_a_judgement_may_be_an_instant_early():
    env = MetaWorld("window-close", max_steps=25, action_repeat=8, render_mode=None)
    (shown,) = demonstrate(env, 1, seed=3, aside=0.0, tremble=0.0)
    assert shown.success
    first = len(shown) - 3  # it ends three actions after its success
    env.reset(seed=int(np.random.default_rng([3, 0]).integers(2**31)))
    assert not any(env.step(action)[4]["success"] for action in shown.actions[:first])
    assert env.done_soon(2)
    env.reset(seed=1)
    env.step(np.zeros(4, np.float32))
    assert not env.done_soon(2)


def test_a_judge_is_refined_and_the_policies_go_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    schedule = {"steps": 6, "first": 2, "updates": 1, "evaluate_every": 6, "episodes": 1}
    common = [
        "rl",
        "policy=sac",
        "task=window-close",
        f"checkpoint={tiny_checkpoint}",
        "online.max_steps=3",
        "online.vote=[1,1,0.0]",  # everything is judged done
        *(f"policy.schedule.{key}={value}" for key, value in schedule.items()),
    ]
    for seed in (0, 1):
        options = [*common, f"seed={seed}", f"run_dir={tmp_path / f'run-{seed}'}"]
        assert CliRunner().invoke(cli, options, catch_exceptions=False).exit_code == 0
    runs = [str(tmp_path / f"run-{seed}") for seed in (0, 1)]
    clips = [path for run in runs for path in Path(run, "clips").glob("*.mp4")]
    assert len(clips) >= 4
    out = tmp_path / "refined"
    done = CliRunner().invoke(cli, ["refine", *runs, "--out", str(out), "--steps", "2"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    corpus = Corpus.open(out / "corpus")
    joined = [trajectory for trajectory in corpus if trajectory.source == "refined"]
    assert len(joined) == len(clips)
    assert {(trajectory.task, trajectory.quality) for trajectory in joined} == {("close the window", "failure")}
    old, new = (RewardModel.from_pretrained(str(place)) for place in (tiny_checkpoint, out / "judge" / "model"))
    assert any(not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    sizes = json.loads(Path(runs[0], "config.json").read_text())["policy"]["learner"]
    again = Sac(sizes, Schedule(**schedule))
    begun = Run(tmp_path / "begun", {}, again, World("window-close", "sparse"), 9, Path(runs[0]))
    learnt = torch.load(Path(runs[0], "state.pt"), weights_only=True)["learner"]["policy"]
    networks = begun.setup.learner.sac.policy.state_dict()
    assert all(torch.equal(networks[name], values) for name, values in learnt.items())
    assert begun.setup.learner.buffer.size() == 0  # what the old judge paid for is forgotten
    for run in runs:
        went_on = json.loads((out / f"policy-{Path(run).name}" / "config.json").read_text())
        assert (went_on["start"], went_on["checkpoint"]) == (run, str(out / "judge" / "model"))
        assert read_curve(out / f"policy-{Path(run).name}")[-1]["step"] >= 6
    config = Path(runs[1], "config.json")
    config.write_text(config.read_text().replace(str(tiny_checkpoint), "http://127.0.0.1:1"))
    with pytest.raises(UserError, match="judged by different models"):
        CliRunner().invoke(cli, ["refine", *runs, "--out", str(out)], catch_exceptions=False)
    with pytest.raises(UserError, match="the judge was a server"):
        CliRunner().invoke(cli, ["refine", runs[1], "--out", str(out)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=nothing"], "unknown Meta-World environment 'nothing'"),
        (["reward=lots"], "unknown reward 'lots'"),
        (["policy.schedule.steps=0"], "steps=0 of a schedule is too small"),
        (["policy=none"], "dsrl"),
        (["online.vote=[3,2,0.5]"], "vote of 3 of 2"),
        (["shaping.form=big"], "unknown form of reward"),
        (["shaping.form=potential"], "form=potential only guides under an environment's reward"),
        (["policy=sac", "policy.learner.gamma=2"], "gamma=2 of a learner must be from 0 to 1"),
        (["policy=sac", "policy.learner.batch=0"], "batch=0 of a learner"),
        (["policy=offline/iql", "policy.steps=0"], "steps=0 must be at least 1"),
        (["policy=offline/iql", "checkpoint=http://127.0.0.1:1"], "is a server, but this needs the model itself"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_a_sentence(overrides: list[str], words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["rl", f"run_dir={tmp_path / 'run'}", *overrides])
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)
