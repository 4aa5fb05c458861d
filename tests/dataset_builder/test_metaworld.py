"""The Meta-World source: real simulator, few and short attempts."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from dataset_builder.metaworld.cloning import clone_policy
from dataset_builder.metaworld.plans import PLANS, Aim
from dataset_builder.metaworld.progress import fit_progress
from dataset_builder.metaworld.rollout import Judge
from dataset_builder.metaworld.simulator import Simulator, Snapshot
from dataset_builder.metaworld.tasks import MT10, TASKS
from dataset_builder.sources.base import Episode, Skipped, Source
from dataset_builder.sources.metaworld import ARRAYS, Metaworld
from rbm.errors import UserError
from rbm.trajectory import MAX_STORED_FRAMES, Quality, completion_index

SMALL = {"successful": 4, "suboptimal": 2, "failure": 3}


def small(**changes) -> Metaworld:
    return Metaworld(**{"envs": ["faucet-open"], "per_quality": SMALL, "size": 48, "arrays": ARRAYS, **changes})


def episodes(source: Metaworld, skip: frozenset[str] = frozenset()) -> list[Episode]:
    return [item for item in source.collect(source.units()[0], set(skip)) if isinstance(item, Episode)]


def same(one: Episode, other: Episode) -> bool:
    return (
        one.trajectory.id == other.trajectory.id
        and one.trajectory.provenance == other.trajectory.provenance
        and np.array_equal(one.trajectory.progress, other.trajectory.progress)
        and all(np.array_equal(one.frames[view], other.frames[view]) for view in one.frames)
        and all(np.array_equal(one.arrays[key], other.arrays[key]) for key in one.arrays)
    )


def auc(positive: list[int], negative: list[int]) -> float:
    ranks = rankdata(positive + negative)[: len(positive)]
    return (ranks.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative))


@pytest.fixture(scope="module")
def collected() -> list[Episode]:
    return episodes(small())


def test_is_a_source_that_travels_to_workers():
    source = small()
    assert isinstance(source, Source)
    assert source.units() == ["faucet-open"]
    assert source.tasks()[0].text == "open the faucet"
    assert pickle.loads(pickle.dumps(source)).units() == source.units()
    assert source.source_facts()["completion"] is None


def test_fills_its_quotas(collected):
    counts = {quality: sum(e.trajectory.quality is quality for e in collected) for quality in Quality}
    assert counts == {Quality.SUCCESSFUL: 4, Quality.SUBOPTIMAL: 2, Quality.FAILURE: 3}
    assert sum(e.trajectory.messy for e in collected) == 2


def test_records_say_what_the_simulator_said(collected):
    for episode in collected:
        record, arrays = episode.trajectory, episode.arrays
        length = len(arrays["success"])
        assert arrays["action"].shape == (length, 4)
        assert arrays["state"].shape == (length, 39)
        assert arrays["env_reward"].shape == (length,)
        assert {arrays[key].dtype for key in ("action", "state", "env_reward")} == {np.dtype(np.float32)}
        assert record.frame_index[0] == 0
        assert record.frame_index[-1] == length - 1
        assert record.n_frames == min(length, MAX_STORED_FRAMES)
        assert record.progress[0] <= 0.1
        if record.quality is Quality.SUCCESSFUL:
            assert arrays["success"][-1]
            assert record.done_index == int(np.argmax(arrays["success"]))
            assert 3 <= length - 1 - record.done_index <= 25
            assert record.progress[completion_index(record)] == 1
        else:
            assert not arrays["success"].any()
            assert record.done_index is None
            assert not record.messy
            if record.quality is Quality.SUBOPTIMAL:
                assert record.progress[-1] > 0.3
            else:
                assert record.progress[-1] < 0.4


def test_same_seed_same_bytes_in_another_process_state(collected):
    source = small()
    list(itertools.islice(source.attempts("faucet-open"), 3))  # an environment that was used before
    again = episodes(source)
    assert len(again) == len(collected)
    assert all(same(one, other) for one, other in zip(collected, again, strict=True))
    other_seed = next(iter(small(seed=1).collect("faucet-open", set())))
    assert not np.array_equal(other_seed.frames["near"][0], collected[0].frames["near"][0])


def test_a_resumed_build_adds_just_the_rest(collected):
    there = frozenset(e.trajectory.id for e in collected[:5])
    rest = episodes(small(), there)
    assert [e.trajectory.id for e in rest] == [e.trajectory.id for e in collected[5:]]
    assert all(same(one, other) for one, other in zip(collected[5:], rest, strict=True))


def test_a_quota_that_cannot_be_filled_is_reported(caplog):
    found = list(small(max_attempts=3).collect("faucet-open", set()))
    skipped = [item for item in found if isinstance(item, Skipped)]
    assert any(item.reason == "quota not filled" and "in 3 attempts" in item.what for item in skipped)
    assert "faucet-open" in caplog.text


def test_cameras_are_upright_and_of_the_asked_size():
    """The robot's arm comes from above, the table lies below: in every view red is higher than brown."""
    simulator = Simulator("reach")
    now = simulator.reset(0)
    for camera in ("near", "corner", "corner2", "corner3", "corner4"):
        frame = simulator.render([now.physics], (camera,), 80)[camera][0]
        assert frame.shape == (80, 80, 3)
        red, green, blue = (frame[..., i].astype(int) for i in range(3))
        arm = (red > 90) & (green < 60) & (blue < 60)
        wood = (red > 90) & (green > 65) & (red - blue > 20) & ~arm
        assert arm.sum() > 50, camera
        assert wood.sum() > 50, camera
        assert np.nonzero(arm)[0].mean() < np.nonzero(wood)[0].mean(), camera
    with pytest.raises(UserError, match="did you mean corner"):
        simulator.render([now.physics], ("cornr",), 80)
    simulator.close()


def test_rendering_shows_the_stored_moment():
    simulator = Simulator("push")
    start = simulator.reset(3)
    before = simulator.render([start.physics], ("near",), 48)["near"][0]
    for _ in range(20):
        now = simulator.step(np.array([1, 0, 0, 1], np.float32))
    both = simulator.render([start.physics, now.physics], ("near",), 48)["near"]
    assert np.array_equal(both[0], before)
    assert not np.array_equal(both[1], before)
    simulator.close()


def test_clones_get_better_with_training():
    rng = np.random.default_rng(0)
    observations = [rng.standard_normal((50, 39)) for _ in range(4)]
    actions = [np.clip(np.tanh(obs[:, :4] - obs[:, 4:8]), -1, 1) for obs in observations]
    stages = clone_policy(observations, actions, seed=1)
    errors = [
        np.mean([(policy.get_action(obs) - act) ** 2 for obs, act in zip(observations[0], actions[0], strict=True)])
        for policy in stages
    ]
    assert errors[0] > errors[1] > errors[2]
    again = clone_policy(observations, actions, seed=1)
    assert np.array_equal(again[2].get_action(observations[0][0]), stages[2].get_action(observations[0][0]))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_has_an_expert_that_succeeds(name):
    simulator = Simulator(name)
    for seed in range(4):
        now, expert = simulator.reset(seed), simulator.expert()
        for _ in range(250):
            now = simulator.step(np.clip(expert.get_action(now.obs.copy()), -1, 1).astype(np.float32))
            if now.success:
                simulator.close()
                return
    pytest.fail(f"the expert of {name} did not succeed in four scenes")


def test_scenes_differ_and_the_goal_is_visible():
    simulator = Simulator("door-close")
    one, other = simulator.reset(1), simulator.reset(2)
    assert not np.allclose(one.obs[4:7], other.obs[4:7])
    assert np.allclose(one.obs[36:39], one.target)
    assert np.array_equal(simulator.reset(1).physics, one.physics)
    simulator.close()


def test_length_does_not_tell_the_outcome():
    """Lengths of what the quotas choose, without rendering, over two tasks."""
    areas = []
    for name in ("faucet-open", "plate-slide"):
        source = Metaworld([name], {"successful": 14, "suboptimal": 6, "failure": 9})
        chosen = [attempt for _, attempt in source.chosen(name)]
        lengths = {quality: [len(a) for a in chosen if a.quality is quality] for quality in Quality}
        rest = lengths[Quality.SUBOPTIMAL] + lengths[Quality.FAILURE]
        areas.append(auc(lengths[Quality.SUCCESSFUL], rest))
    assert abs(np.mean(areas) - 0.5) <= 0.1, areas


def test_labels_follow_clean_successes_and_leave_failures_low():
    source = Metaworld(["drawer-open"], plans={"clean": 1, "hover": 1})
    attempts = [attempt for _, attempt in itertools.islice(source.attempts("drawer-open"), 12)]
    clean = [a for a in attempts if a.quality is Quality.SUCCESSFUL and not a.messy]
    failed = [a for a in attempts if a.quality is Quality.FAILURE]
    assert len(clean) >= 3
    assert len(failed) >= 3
    order = [spearmanr(a.progress[: a.done + 1], np.arange(a.done + 1))[0] for a in clean if a.done is not None]
    assert np.median(order) >= 0.95
    assert max(a.progress[-1] for a in failed) <= 0.3


def test_the_outcome_is_read_from_the_end():
    judge = Judge(suboptimal_from=0.4, failure_to=0.27)
    on, off = np.ones(10, bool), np.zeros(10, bool)
    assert judge.outcome(np.r_[off, on], np.zeros(20)) == (Quality.SUCCESSFUL, "")
    assert judge.outcome(np.r_[on, off], np.ones(20)) == (None, "success lost")
    assert judge.outcome(np.r_[on, off, on[:1]], np.ones(21)) == (None, "success flickers")
    assert judge.outcome(off, np.r_[np.ones(5), np.full(5, 0.1)])[0] is Quality.FAILURE
    assert judge.outcome(off, np.full(10, 0.8))[0] is Quality.SUBOPTIMAL
    assert judge.outcome(off, np.full(10, 0.33))[0] is None
    with pytest.raises(UserError, match="must rise"):
        Judge(suboptimal_from=0.2, failure_to=0.3)


def test_the_label_is_bounded_and_one_from_success_on():
    def moment(step: int, length: int) -> Snapshot:
        part = step / (length - 1)
        obs = np.zeros(39)
        obs[:3] = [0.0, 0.3 * (1 - min(1, 2 * part)), 0.1]
        obs[4:7] = [max(0.0, 0.4 * (part - 0.5)), 0.0, 0.1]
        target = np.array([0.2, 0.0, 0.1])
        gap = float(np.linalg.norm(obs[4:7] - target))
        return Snapshot(obs, target, 10 * part, part, gap, step == length - 1, np.zeros(1))

    demo = [moment(step, 40) for step in range(40)]
    label = fit_progress([demo, demo, demo]).over(demo)
    assert label[0] == 0
    assert label[-1] == 1
    assert np.all(np.diff(label) >= -1e-9)
    assert 0.15 < label[20] < 0.4  # the hand is there, nothing has moved


def test_plans_cover_every_aim_and_tasks_every_group():
    assert {plan.aim for plan in PLANS.values()} == set(Aim)
    assert len(TASKS) == 50
    assert set(MT10) <= set(TASKS)
    texts = [text for task in TASKS.values() for text in (task.text, *task.paraphrases)]
    assert len(set(texts)) == len(texts)
    assert all(len(task.paraphrases) >= 3 and task.scene for task in TASKS.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"envs": ["drawer-opn"]}, "did you mean drawer-open"),
        ({"envs": ["push"], "exclude": ["push"]}, "leave no"),
        ({"per_quality": {"success": 3}}, "unknown outcome 'success'"),
        ({"per_quality": {"failure": -1}}, "must not be negative"),
        ({"messy_share": 2}, "messy_share"),
        ({"cameras": []}, "cameras"),
        ({"size": 500}, "size=500"),
        ({"seed": -1}, "seed"),
        ({"plans": {"cleen": 1}}, "did you mean clean"),
        ({"plans": {"clean": 0}}, "nor all 0"),
        ({"arrays": ["actions"]}, "did you mean action"),
    ],
)
def test_mistakes_in_the_configuration_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)


def test_importing_needs_no_simulator():
    code = "import sys, dataset_builder.sources.metaworld; sys.exit('mujoco' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == 0


def test_a_missing_simulator_says_how_to_get_it():
    code = (
        "import sys; sys.modules['metaworld'] = None\n"
        "from dataset_builder.metaworld.simulator import load_metaworld\n"
        "from rbm.errors import UserError\n"
        "try:\n    load_metaworld()\nexcept UserError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "make sim" in result.stdout


@pytest.mark.parametrize("how", ["osmesa", "nonsense", "glfw"])
def test_a_machine_that_can_not_render_says_what_to_install(how, tmp_path):
    for name in ("libOSMesa.so", "libOSMesa.so.8", "libOSMesa.so.6"):
        (tmp_path / name).touch()  # found first, and no library
    code = (
        "from dataset_builder.metaworld.simulator import Simulator\n"
        "from rbm.errors import UserError\n"
        "try:\n"
        "    simulator = Simulator('push')\n"
        "    simulator.render([simulator.reset(0).physics], ('near',), 64)\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "MUJOCO_GL": how, "LD_LIBRARY_PATH": str(tmp_path), "DISPLAY": ""}
    environment.pop("PYOPENGL_PLATFORM", None)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert f"MUJOCO_GL={how}" in result.stdout
    assert "apt-get install libosmesa6" in result.stdout
