"""Offline algorithms: their formulas on hand-computed numbers, stopping and going on, a real data set and run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataset_builder.metaworld.simulator import Simulator
from policies.offline import mixed as mixed_module
from policies.offline.actor import Actor
from policies.offline.awr import AWR, advantage_weights, lambda_returns
from policies.offline.cloning import Cloning, FilteredCloning, RewardWeightedCloning
from policies.offline.cql import CQL
from policies.offline.iql import IQL
from policies.offline.learning import Algorithm, command
from policies.offline.mixed import Mixed, Recipe, make_mixed
from policies.offline.run import ALGORITHMS, Config, make_algorithm, run, success_rate
from policies.shaping import Shaping
from policies.transitions import Transitions
from rbm.config import compose, instantiate
from rbm.errors import UserError
from rbm.model import RewardModel
from rbm.scoring import Scorer

TINY: dict[str, Any] = {"hidden": (16,), "batch": 32, "rate": 3e-3}

EVERY = [
    Cloning(**TINY),
    FilteredCloning(**TINY, keep=0.5),
    RewardWeightedCloning(**TINY),
    AWR(**TINY, refresh=4),
    IQL(**TINY),
    CQL(**TINY, samples=2),
]


def chain(episodes: int = 6, length: int = 8, seed: int = 0, **changed: np.ndarray) -> Transitions:
    """A point on a line that moves by a tenth of its action; where it stands is the score, and −1 + that the reward."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (episodes, length, 2)).astype(np.float32)
    at = 0.5 + 0.1 * np.cumsum(actions[..., 0], 1)
    at = np.concatenate([np.full((episodes, 1), 0.5), at], 1).astype(np.float32)
    observations = np.stack([at, np.zeros_like(at), np.ones_like(at)], -1)
    arrays: dict[str, Any] = {
        "observations": observations[:, :-1].reshape(-1, 3),
        "actions": actions.reshape(-1, 2),
        "rewards": (at[:, 1:] - 1).ravel(),
        "env_rewards": np.zeros(episodes * length, np.float32),
        "next_observations": observations[:, 1:].reshape(-1, 3),
        "terminated": np.zeros(episodes * length, bool),
        "episode": np.repeat(np.arange(episodes), length),
        "step": np.tile(np.arange(length), episodes),
        "values": at[:, 1:].ravel(),
        "success": np.zeros(episodes, bool),
    }
    return Transitions(**{**arrays, **changed})


def weights_of(actor: Actor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in actor.state_dict().items()}


# --- formulas -------------------------------------------------------------------------------------


def constant(module: torch.nn.Module, value: float) -> None:
    """Makes a network with one number as output say `value` everywhere."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        list(module.parameters())[-1].fill_(value)


def iql_losses(expectile: float, temperature: float, q: float, v: float, terminated: bool) -> dict[str, float]:
    """Losses on one transition with reward −1 and action (½, −½), where Q and V are constant and the policy says 0."""
    data = chain(
        1,
        1,
        actions=np.array([[0.5, -0.5]], np.float32),
        rewards=np.array([-1.0], np.float32),
        terminated=np.array([terminated]),
    )
    algorithm = IQL(hidden=(4,), expectile=expectile, temperature=temperature, discount=0.9)
    learning = algorithm.start(data)
    loss: Any = learning.networks
    with torch.no_grad():
        for name, parameter in learning.networks.named_parameters():
            if not name.endswith("log_std"):
                parameter.zero_()
        for params, value in ((loss.qvalue_network_params, q), (loss.value_network_params, v)):
            params["module", "net", "2", "bias"].data.fill_(value)
        loss.target_qvalue_network_params["module", "net", "2", "bias"].data.fill_(q)
        for layer in ("0", "2"):
            loss.target_qvalue_network_params["module", "net", layer, "weight"].data.zero_()
    return {name: float(value.detach()) for name, value in learning._losses(learning.data).items()}


def test_iql_expectile_weighs_what_lies_above_and_below() -> None:
    assert iql_losses(0.8, 1.0, q=3.0, v=1.0, terminated=False)["loss_value"] == pytest.approx(0.8 * 2**2)
    assert iql_losses(0.8, 1.0, q=1.0, v=2.0, terminated=False)["loss_value"] == pytest.approx(0.2 * 1**2)


def test_iql_target_is_reward_and_discounted_value() -> None:
    # two networks, each (3 − (−1 + 0.9 · 1))² = 3.1²; nothing follows where terminated: (3 − (−1))²
    assert iql_losses(0.8, 1.0, q=3.0, v=1.0, terminated=False)["loss_qvalue"] == pytest.approx(2 * 3.1**2, rel=1e-5)
    assert iql_losses(0.8, 1.0, q=3.0, v=1.0, terminated=True)["loss_qvalue"] == pytest.approx(2 * 4.0**2, rel=1e-5)


@pytest.mark.parametrize(("q", "weight"), [(1.5, math.exp(2 * 0.5)), (0.0, math.exp(-2.0)), (9.0, 100.0)])
def test_iql_clones_with_the_advantages_weight(q: float, weight: float) -> None:
    # a normal around 0 with log spread −½, at ½ and −½
    density = 2 * (-0.5 * (0.5 / math.exp(-0.5)) ** 2 + 0.5 - 0.5 * math.log(2 * math.pi))
    found = iql_losses(0.8, 2.0, q=q, v=1.0, terminated=False)["loss_actor"]
    assert found == pytest.approx(-weight * density, rel=1e-5)


def test_cql_lowers_what_the_data_does_not_show() -> None:
    # Q is 3 everywhere: log Σ over a random action (density ½ each way) and two of the policy's, e^Q ÷ density, less Q
    count, std = 20_000, math.exp(-0.5)
    one = chain(1, 1)
    data = replace(one, **{name.name: np.repeat(getattr(one, name.name), count, axis=0) for name in fields(one)})
    data = replace(data, episode=np.arange(count), actions=np.full((count, 1), 0.5, np.float32))
    torch.manual_seed(0)
    learning = CQL(hidden=(4,), conservatism=5.0, samples=1, discount=0.9).start(data)
    loss: Any = learning.networks
    with torch.no_grad():
        for name, parameter in loss.named_parameters():
            if not name.endswith("log_std"):
                parameter.zero_()
        loss.qvalue_network_params["module", "net", "2", "bias"].data.fill_(3.0)
    found = float(learning._losses(learning.data)["loss_cql"])
    # the policy's action is tanh(z), z normal around 0: density N(z) ÷ (1 − tanh² z); the mean over two z on a grid
    z = np.linspace(-5, 5, 801) * std
    normal = np.exp(-0.5 * (z / std) ** 2) / (std * math.sqrt(2 * math.pi))
    share = normal / normal.sum()
    inverse = (1 - np.tanh(z) ** 2) / normal
    by_hand = float(share @ np.log(2 + inverse[:, None] + inverse[None, :]) @ share)
    assert found == pytest.approx(2 * 5.0 * by_hand, rel=0.01)  # two networks; 20,000 draws


def test_lambda_returns_by_hand() -> None:
    rewards, ahead = np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 20.0, 30.0, 40.0])
    terminated, last = np.array([False, True, False, False]), np.array([False, True, False, True])
    # the first episode terminates after two steps, the second runs out of time
    second = 4 + 0.5 * 40
    by_hand = [1 + 0.5 * (0.75 * 10 + 0.25 * 2), 2, 3 + 0.5 * (0.75 * 30 + 0.25 * second), second]
    found = lambda_returns(rewards, ahead, terminated, last, discount=0.5, lam=0.25)
    assert found.tolist() == pytest.approx(by_hand)
    assert found.dtype == np.float32
    ends = lambda_returns(rewards, ahead, terminated, last, discount=0.5, lam=1.0)
    assert ends.tolist() == pytest.approx([1 + 0.5 * 2, 2, 3 + 0.5 * second, second])


def test_awr_weights_by_hand() -> None:
    found = advantage_weights(torch.tensor([0.0, 0.5, -1.0, 9.0]), temperature=2.0, most=20.0)
    assert found.tolist() == pytest.approx([1.0, math.e, math.exp(-2), 20.0])


def test_filtered_cloning_keeps_the_best_endings() -> None:
    values = np.array([[0, 9, 0, 0.2], [0, 0, 0.4, 0.4], [0, 0, 0, 0.1], [1, 1, 0.5, 0.3]], np.float32)
    data = chain(4, 4, values=values.ravel())
    kept = FilteredCloning(keep=0.5, ending=2).weights(data).reshape(4, 4)
    assert kept.tolist() == [[0] * 4, [1] * 4, [0] * 4, [1] * 4]
    assert FilteredCloning(keep=0.01, ending=1).weights(data).reshape(4, 4).any(1).tolist() == [
        False,
        True,
        False,
        False,
    ]


def test_reward_weighted_cloning_weighs_gains() -> None:
    data = chain(2, 4, values=np.array([0.1, 0.2, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0], np.float32))
    found = RewardWeightedCloning(ahead=2, full=0.5).weights(data)
    # (value two steps on − value before) ÷ 0.5: .2 − .1, .5 − .1, .4 − .2, .4 − .5; the second episode only falls
    assert found.tolist() == pytest.approx([0.2, 0.8, 0.4, 0.0, 0, 0, 0, 0], abs=1e-6)


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", EVERY, ids=lambda a: type(a).__name__)
def test_stopped_and_continued_equals_unbroken(algorithm: Algorithm, tmp_path: Path) -> None:
    unbroken = algorithm.start(chain(), seed=3, steps=12)
    unbroken.advance(12)
    first = algorithm.start(chain(), seed=3, steps=12)
    first.advance(5)
    first.save(tmp_path / "state.pt")
    torch.rand(7)  # what else draws random numbers makes no difference
    second = algorithm.start(chain(), seed=99, steps=12)
    second.load(tmp_path / "state.pt")
    second.advance(7)
    expected = weights_of(unbroken.actor)
    assert second.step == 12
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(second.actor).items())
    assert not torch.equal(expected["net.0.weight"], weights_of(first.actor)["net.0.weight"])


@pytest.mark.parametrize("algorithm", EVERY, ids=lambda a: type(a).__name__)
def test_a_seed_gives_the_same_again_and_leaves_other_draws_alone(algorithm: Algorithm) -> None:
    torch.manual_seed(5)
    one = weights_of(algorithm.train(chain(), seed=1, steps=3))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    two = weights_of(algorithm.train(chain(), seed=1, steps=3))
    other = weights_of(algorithm.train(chain(), seed=2, steps=3))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert not torch.equal(one["net.0.weight"], other["net.0.weight"])


@pytest.mark.parametrize(
    "algorithm",
    [
        IQL(**TINY, steps=150, temperature=5.0, tau=0.1),
        AWR(**TINY, steps=150, temperature=5.0, refresh=50),
        CQL(**TINY, steps=150, samples=2, conservatism=0.1, alpha=0.01, warmup=0.2),
        RewardWeightedCloning(**TINY, steps=150, ahead=1, full=0.1),
        FilteredCloning(**TINY, steps=150, keep=0.1),
    ],
    ids=lambda a: type(a).__name__,
)
def test_random_motion_teaches_where_to_go(algorithm: Algorithm) -> None:
    """Each transition ends its episode and pays its first action; the scores rise with it, too."""
    data = chain(60)
    data = replace(data, rewards=data.actions[:, 0], terminated=np.ones(480, bool))
    here = np.array([[0.4, 0, 1], [0.5, 0, 1], [0.6, 0, 1]], np.float32)
    cloned = Cloning(**TINY, steps=150).train(data).act(here)[:, 0]
    assert abs(cloned.mean()) < 0.25
    assert (algorithm.train(data).act(here)[:, 0] > cloned + 0.2).all()


def test_watch_is_called_at_its_steps_and_at_the_end() -> None:
    seen: list[int] = []
    Cloning(**TINY).train(chain(), steps=25, every=10, watch=lambda learning: seen.append(learning.step))
    assert seen == [10, 20, 25]


def test_policy_is_saved_and_loaded(tmp_path: Path) -> None:
    actor = IQL(**TINY, layer_norm=True).train(chain(), steps=5)
    actor.save(tmp_path / "policy")
    again = Actor.load(tmp_path / "policy")
    observations = chain().observations
    assert np.array_equal(actor.act(observations), again.act(observations))
    one = again.act(observations[0])
    assert one.shape == (2,)
    assert one.dtype == np.float32
    assert np.allclose(one, again.act(observations[:1])[0], atol=1e-6)
    assert np.abs(again.act(1e6 * observations)).max() <= 1
    with pytest.raises(UserError, match="D = 3"):
        again.act(np.zeros(5))
    (tmp_path / "policy" / "policy.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="no policy"):
        Actor.load(tmp_path / "policy")


def test_observations_are_standardised_by_the_data() -> None:
    data = chain()
    standard = Cloning(**TINY).start(data).actor.standard
    assert standard.mean.tolist() == pytest.approx(data.observations.mean(0).tolist(), abs=1e-6)
    # what never moves is divided by a hundredth, not by nothing
    assert standard.std.tolist() == pytest.approx([float(data.observations[:, 0].std()), 0.01, 0.01], abs=1e-6)


def test_command_trains_from_a_file(tmp_path: Path) -> None:
    chain().save(tmp_path / "data.npz")
    command(Cloning, [str(tmp_path / "data.npz"), "--out", str(tmp_path / "policy"), "--steps", "3"])
    assert Actor.load(tmp_path / "policy").act(np.zeros(3)).shape == (2,)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", EVERY, ids=lambda a: type(a).__name__)
def test_data_without_anything_to_learn_from(algorithm: Algorithm) -> None:
    whole = chain()
    empty = Transitions(**{name.name: getattr(whole, name.name)[:0] for name in fields(Transitions)})
    with pytest.raises(UserError, match="no transitions"):
        algorithm.train(empty)
    bad = whole.rewards.copy()
    bad[7] = np.nan
    with pytest.raises(UserError, match="rewards of transition 7"):
        algorithm.train(replace(whole, rewards=bad))
    with pytest.raises(UserError, match="act from -1 to 1"):
        algorithm.train(replace(whole, actions=5 * whole.actions))


@pytest.mark.parametrize("algorithm", EVERY, ids=lambda a: type(a).__name__)
def test_rewards_of_zero_are_allowed(algorithm: Algorithm) -> None:
    actor = algorithm.train(replace(chain(), rewards=np.zeros(48, np.float32)), steps=3)
    assert np.isfinite(actor.act(np.zeros(3))).all()


def test_scores_that_cloning_cannot_use() -> None:
    values = chain().values.copy()
    values[3] = np.inf
    with pytest.raises(UserError, match="value 3"):
        FilteredCloning(**TINY).train(replace(chain(), values=values), steps=1)
    with pytest.raises(UserError, match="nothing to clone"):
        RewardWeightedCloning(**TINY).train(replace(chain(), values=np.zeros(48, np.float32)), steps=1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: make_algorithm({"name": "ppo"}), "unknown offline algorithm 'ppo'"),
        (lambda: make_algorithm({"_target_": "os.system", "command": "true"}), "unknown offline algorithm 'os.system'"),
        (lambda: make_algorithm({"name": "iql", "expectle": 0.7}), "expectle"),
        (lambda: IQL(expectile=1.0), "expectile=1.0"),
        (lambda: IQL(discount=1.0), "discount=1.0"),
        (lambda: IQL(steps=0), "steps=0"),
        (lambda: IQL(rate=float("nan")), "rate=nan"),
        (lambda: CQL(samples=0), "samples=0"),
        (lambda: AWR(lam=2.0), "lam=2.0"),
        (lambda: FilteredCloning(keep=0.0), "keep=0.0"),
        (lambda: Recipe("make-tea"), "unknown Meta-World task 'make-tea'"),
        (lambda: Recipe("reach", successes=0, failures=0), "at least one attempt"),
        (lambda: Recipe("reach", plans={"dance": 1.0}), "dance"),
        (lambda: Config.of({"task": "reach"}), "missing keys"),
        (lambda: Config(policy={}, task="reach", run_dir="a", data_dir="b", reward="kind"), "unknown reward 'kind'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_and_names_that_cannot_be(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    learning = IQL(**TINY).start(chain())
    (tmp_path / "state.pt").write_bytes(b"broken")
    with pytest.raises(UserError, match="delete it to start again"):
        learning.load(tmp_path / "state.pt")


# --- configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_configurations_name_what_the_constructors_take(name: str) -> None:
    node = compose(f"policy/offline/{name}").policy.offline
    made = instantiate(node)
    assert type(made).__module__ + "." + type(made).__qualname__ == ALGORITHMS[name]
    known, same = make_algorithm(dict(node))
    assert known == name
    assert same == made


# --- a real data set, and runs on it --------------------------------------------------------------

RECIPE = {"successes": 1, "failures": 3, "steps": 30, "repeat": 4}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory, judge_scorer: Scorer) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    make_mixed(Recipe("faucet-open", **RECIPE), folder, judge_scorer)
    return folder


@pytest.fixture(scope="module")
def data(data_dir: Path) -> Mixed:
    return Mixed.load(next(data_dir.glob("*.npz")))


def test_mixed_data_is_what_its_recipe_says(data: Mixed) -> None:
    assert data.observations.shape == (4, 31, 39)
    assert data.actions.shape == (4, 30, 4)
    assert np.abs(data.actions).max() <= 1
    assert data.success.any(1).sum() == 1
    assert data.progress.shape == (4, 31)
    assert np.isfinite(data.progress).all()
    assert data.progress.std(1).min() > 0  # frames of an attempt were looked at one by one
    assert 0 <= data.dense.min() < data.dense.max() <= 1


def test_transitions_differ_in_rewards_only(data: Mixed) -> None:
    learned, sparse, dense, none = (data.transitions(reward) for reward in ("learned", "sparse", "dense", "none"))
    assert np.array_equal(learned.observations[1:30], learned.next_observations[:29])
    assert np.array_equal(learned.observations[30], data.observations[1, 0])
    assert np.array_equal(learned.values.reshape(4, 30), data.progress[:, 1:])
    assert np.allclose(learned.rewards.reshape(4, 30), data.progress[:, 1:] - 1)
    assert np.array_equal(sparse.rewards.reshape(4, 30), np.where(data.success, 0, -1))
    assert np.allclose(dense.rewards.reshape(4, 30), data.dense - 1)
    assert not none.rewards.any()
    for other in (sparse, dense, none):
        assert np.array_equal(other.actions, learned.actions)
        assert np.array_equal(other.episode, np.repeat(range(4), 30))
        assert not other.terminated.any()
    steps = data.transitions("learned", Shaping(form="difference", scale=2.0)).rewards.reshape(4, 30)
    assert np.allclose(steps, 2 * np.diff(data.progress, axis=1), atol=1e-6)
    with pytest.raises(UserError, match="form=potential only guides"):
        data.transitions("learned", Shaping("potential"))
    with pytest.raises(UserError, match="unknown reward"):
        data.transitions("kind")  # type: ignore[arg-type]


def test_fewer_successes_leave_the_failures_as_they_are(data: Mixed) -> None:
    assert data.take(None) is data
    none = data.take(0)
    won = data.success.any(1)
    assert np.array_equal(none.observations, data.observations[~won])
    assert np.array_equal(data.take(1).plan, data.plan)
    with pytest.raises(UserError, match="has 1 successes, not 2"):
        data.take(2)


class Stopped(Exception):
    pass


def test_a_data_set_that_was_stopped_goes_on(
    data: Mixed, judge_scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_module, "_PART", 2)

    def stop(text: str) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        make_mixed(Recipe("faucet-open", **RECIPE), tmp_path, judge_scorer, stop)
    again = make_mixed(Recipe("faucet-open", **RECIPE), tmp_path, judge_scorer)
    for name in ("observations", "actions", "success", "dense", "plan"):
        assert np.array_equal(getattr(again, name), getattr(data, name))
    assert np.allclose(again.progress, data.progress, atol=1e-5)
    assert not list(tmp_path.glob("*.parts"))


@pytest.fixture(scope="module")
def configuration(judge_checkpoint: Path) -> Callable[..., dict[str, Any]]:
    return partial(_configuration, checkpoint=str(judge_checkpoint))


def _configuration(run_dir: Path, data_dir: Path, **changed: Any) -> dict[str, Any]:
    return {
        "policy": {"name": "iql", **TINY, "steps": 30},
        "task": "faucet-open",
        "recipe": RECIPE,
        "run_dir": str(run_dir),
        "data_dir": str(data_dir),
        "episodes": 2,
        "curve_every": 10,
        "curve_episodes": 1,
        **changed,
    }


def without_times(text: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in text.splitlines()]


def test_a_run_and_one_that_was_stopped_are_the_same(
    configuration: Callable[..., dict[str, Any]], data_dir: Path, tmp_path: Path
) -> None:
    told = run(configuration(tmp_path / "whole", data_dir))
    assert told.keys() >= {"task", "algorithm", "reward", "seed", "success_rate", "episodes", "seconds", "steps"}
    assert (told["algorithm"], told["reward"], told["steps"], told["transitions"]) == ("iql", "learned", 30, 120)
    assert told["success_rate"] in (0, 0.5, 1)
    assert (told["data_episodes"], told["data_successes"]) == (4, 1)
    curve = (tmp_path / "whole" / "curve.jsonl").read_text()
    assert [point["step"] for point in without_times(curve)] == [10, 20, 30]
    assert sorted(os.listdir(tmp_path / "whole")) == [
        "config.json",
        "curve.jsonl",
        "policy.json",
        "policy.safetensors",
        "result.json",
    ]

    def stop(text: str) -> None:
        if "'step': 20" in text:
            raise Stopped

    with pytest.raises(Stopped):
        run(configuration(tmp_path / "stopped", data_dir), say=stop)
    assert not (tmp_path / "stopped" / "result.json").exists()
    again = run(configuration(tmp_path / "stopped", data_dir))
    assert {**again, "seconds": 0} == {**told, "seconds": 0}
    assert without_times((tmp_path / "stopped" / "curve.jsonl").read_text()) == without_times(curve)
    name = "policy.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    heard: list[str] = []
    assert run(configuration(tmp_path / "whole", data_dir), say=heard.append) == told  # finished: nothing is done
    assert not heard
    with pytest.raises(UserError, match="holds another run"):
        run(configuration(tmp_path / "whole", data_dir, seed=1))


def test_another_models_scores_are_not_taken(judge_checkpoint: Path, tmp_path: Path) -> None:
    recipe = Recipe("faucet-open", successes=0, failures=1, steps=4, repeat=1)
    model = RewardModel.from_pretrained(str(judge_checkpoint))
    one = make_mixed(recipe, tmp_path, Scorer(model, device="cpu"))
    with torch.no_grad():
        list(model.progress_head.parameters())[-1][0] += 3
    other = make_mixed(recipe, tmp_path, Scorer(model, device="cpu"))
    np.testing.assert_array_equal(one.actions, other.actions)
    assert (one.progress != other.progress).all()
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_hydras_configuration_runs(
    configuration: Callable[..., dict[str, Any]], data_dir: Path, tmp_path: Path
) -> None:
    from omegaconf import OmegaConf

    node = compose("policy/offline/filtered").policy.offline
    cfg = configuration(tmp_path / "run", data_dir, policy={**node, "steps": 2}, curve_episodes=0)
    told = run(OmegaConf.create(cfg))
    assert told["algorithm"] == "filtered"
    node.steps = 2
    assert run({**cfg, "policy": node}) == told


class Expert:
    """The task's scripted expert where a policy stands."""

    def __init__(self, task: str) -> None:
        self.expert = Simulator(task).expert()

    def act(self, observation: np.ndarray) -> np.ndarray:
        return np.clip(self.expert.get_action(observation.copy()), -1, 1).astype(np.float32)


def test_success_is_the_simulators() -> None:
    idle = Cloning(hidden=(4,)).start(chain(1, 1, **still())).actor
    constant(idle, 0.0)
    assert success_rate(idle, Recipe("faucet-open"), range(5, 7)) == 0.0
    assert success_rate(Expert("faucet-open"), Recipe("faucet-open"), range(5, 7)) == 1.0  # type: ignore[arg-type]
    assert success_rate(Expert("faucet-open"), Recipe("faucet-open", steps=2), range(5, 7)) == 0.0  # type: ignore[arg-type]


def still() -> dict[str, np.ndarray]:
    zeros = np.zeros((1, 39), np.float32)
    return {"observations": zeros, "next_observations": zeros, "actions": np.zeros((1, 4), np.float32)}
