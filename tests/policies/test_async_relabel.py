"""Buffers whose rewards come later: the numbers, the waiting, the ring, the file."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from late_rewards import ACTIONS, StateOnly, paid, plain, play, ready, stopped
from picture_env import TASK, SquareEnv
from running import until
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from policies.relabel import FramesInInfo, Labeller, LateRewardBuffer, PlainBuffer
from policies.relabel.async_labels import LOST, READY
from policies.shaping import FORMS, Shaping
from policies.wrapper import RewardModelWrapper
from rbm.errors import UserError
from rbm.scoring import SuccessVote


@pytest.fixture(scope="module")
def labeller(judge_checkpoint: Path) -> Iterator[Labeller]:
    with Labeller(judge_checkpoint, wait_seconds=0.02) as made:
        yield made
        assert made.deaths == 0
        assert made.waiting == made.waiting_bytes == 0


# the numbers are those of the synchronous wrapper

LENGTHS = (7, 4, 1, 2)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_rewards_are_those_of_the_wrapper(labeller, judge_scorer, form, every):
    for between in ("hold", "interpolate"):
        options: dict[str, Any] = {
            "shaping": Shaping(form, scale=2.0, gamma=0.9, pessimism=0.3),  # type: ignore[arg-type]
            "every": every,
            "between": between,
        }
        buffer = plain(labeller, **options)
        play(buffer, LENGTHS, 28, every)
        buffer.labels.finish()
        assert ready(buffer) == list(range(28))
        expected = paid(judge_scorer, LENGTHS, 28, **options)
        np.testing.assert_allclose(buffer.rewards[:28], expected, atol=1e-5)
        assert np.abs(expected).max() > 0.05


def test_the_bonus_of_a_vote_is_paid_once_an_episode(labeller, judge_scorer):
    world = RewardModelWrapper(SquareEnv((9,)), judge_scorer, TASK)
    world.reset(seed=3)
    usual = float(np.median([world.step(action)[4]["success_probability"] for action in ACTIONS[:9]]))
    options = {"shaping": Shaping(success_bonus=5.0), "vote": SuccessVote(2, 3, usual), "every": 2}
    buffer = plain(labeller, **options)
    play(buffer, (9, 6), 30, 2)
    buffer.labels.finish()
    expected = paid(judge_scorer, (9, 6), 30, **options)
    np.testing.assert_allclose(buffer.rewards[:30], expected, atol=1e-5)
    assert 2 <= (buffer.rewards[:30] > 3).sum() <= 4


def test_an_episode_that_is_reset_in_the_middle(labeller, judge_scorer):
    """Steps behind the last scored frame are worth what the wrapper paid for them; the next episode knows nothing."""
    for resets in ((3,), (1, 2), (7, 8, 12)):
        options = {"shaping": Shaping("progress"), "every": 2}
        buffer = plain(labeller, **options)
        play(buffer, (10,), 20, 2, resets=resets)
        buffer.labels.finish()
        np.testing.assert_allclose(
            buffer.rewards[:20], paid(judge_scorer, (10,), 20, resets=resets, **options), atol=1e-5
        )


def test_environments_take_turns(labeller, judge_scorer):
    buffer = plain(labeller, envs=3, task=[TASK, "open the drawer", TASK])
    for env in range(3):
        play(buffer, (5,), 8, seed=env, env=env)
    buffer.labels.finish()
    for env in (0, 2):
        own = buffer.observations[:24, 1] == env
        np.testing.assert_allclose(buffer.rewards[:24][own], paid(judge_scorer, (5,), 8, seed=env), atol=1e-5)
    world = RewardModelWrapper(SquareEnv((5,)), judge_scorer, "open the drawer", terminate=False)
    world.reset(seed=1)
    found = [world.step(ACTIONS[step])[1] for step in range(5)]
    np.testing.assert_allclose(buffer.rewards[8:13], found, atol=1e-5)


# stable-baselines3


def worlds(lengths: tuple[int, ...], every: int, count: int) -> DummyVecEnv:
    return DummyVecEnv([lambda: FramesInInfo(StateOnly(SquareEnv(lengths)), every=every)] * count)


@pytest.mark.parametrize("count", [1, 2])
def test_a_loop_of_stable_baselines3(labeller, judge_scorer, count):
    shaping = Shaping("potential", gamma=0.9)
    model = SAC(
        "MlpPolicy",
        worlds((7, 4, 1), 2, count),
        learning_starts=30,
        batch_size=32,
        buffer_size=400,
        replay_buffer_class=LateRewardBuffer,
        replay_buffer_kwargs={"source": labeller, "every": 2, "shaping": shaping, "ready_share": 0.5},
        policy_kwargs={"net_arch": [16]},
        seed=11,
        device="cpu",
    )
    model.learn(60)
    buffer = model.replay_buffer
    assert isinstance(buffer, LateRewardBuffer)
    buffer.labels.finish()
    rows = 60 // count
    assert buffer.size() == rows
    assert buffer.labels.ready == 60
    for env in range(count):  # the same actions, judged at once
        world = RewardModelWrapper(SquareEnv((7, 4, 1)), judge_scorer, shaping=shaping, every=2, terminate=False)
        world.reset(seed=11 + env)
        for row in range(rows):
            _, reward, terminated, truncated, info = world.step(buffer.actions[row, env])
            assert buffer.rewards[row, env] == pytest.approx(reward, abs=1e-5)
            assert buffer.labels.env_rewards[row * count + env] == info["env_reward"]
            if terminated or truncated:
                world.reset()
            assert bool(buffer.timeouts[row, env]) == truncated
    assert buffer.timeouts.any()
    assert (buffer.dones > buffer.timeouts).any()
    batch = buffer.sample(500)
    at = {tuple(row): (i, j) for i in range(rows) for j, row in enumerate(buffer.actions[i])}
    places = [at[tuple(row)] for row in batch.actions.numpy()]
    assert len(set(places)) > 40
    for name, drawn in (("observations", batch.observations), ("rewards", batch.rewards)):
        stored = np.array([getattr(buffer, name)[place] for place in places]).reshape(drawn.shape)
        np.testing.assert_array_equal(drawn.numpy(), stored)


def test_other_learners_and_normalised_observations(labeller):
    env = VecNormalize(worlds((6,), 1, 2), norm_reward=False)
    kwargs = {"source": labeller, "task": TASK, "ready_share": 1.0}
    model = TD3(
        "MlpPolicy",
        env,
        learning_starts=20,
        batch_size=16,
        buffer_size=100,
        replay_buffer_class=LateRewardBuffer,
        replay_buffer_kwargs=kwargs,
        policy_kwargs={"net_arch": [8]},
        device="cpu",
        seed=0,
    )
    model.learn(30)
    assert isinstance(model.replay_buffer, LateRewardBuffer)
    batch = model.replay_buffer.sample(64, env)
    assert np.isfinite(batch.rewards.numpy()).all()
    assert batch.observations.abs().max() < 10.1  # places go to 46
    model.replay_buffer.reset()
    assert model.replay_buffer.labels.ready == model.replay_buffer.labels.waiting == 0


def test_pictures_do_not_stay_in_infos(labeller):
    space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    buffer = LateRewardBuffer(10, space, space, source=labeller, frame_key="seen")
    frame = SquareEnv((5,)).reset(seed=0)[0]["picture"]
    infos = [{"seen": frame, "first_seen": frame, "instruction": TASK, "other": 1}]
    buffer.add(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(1), np.array([True]), infos)
    assert infos == [{"instruction": TASK, "other": 1}]
    buffer.labels.finish()
    assert buffer.labels.ready == 1
    with pytest.raises(UserError, match=r"not pickled: use replay_buffer\.save"):
        pickle.dumps(buffer)
    with pytest.raises(UserError, match="leave it off"):
        LateRewardBuffer(10, space, space, source=labeller, optimize_memory_usage=True)


# what waits


def test_only_what_has_its_reward_is_drawn(labeller):
    buffer = plain(labeller, ready_share=0.5, seed=0)
    play(buffer, (10,), 10)
    buffer.labels.finish()
    with stopped(labeller):
        time.sleep(0.1)
        play(buffer, (10,), 9)
        assert buffer.labels.waiting == 9
        batch = buffer.sample(1000)
        assert set(batch.observations[:, 0].astype(int)) == set(range(10))
        assert np.isfinite(batch.rewards).all()
        counts = np.bincount(batch.observations[:, 0].astype(int))
        assert counts.min() > 60  # 100 each, and 9.5 is a standard deviation
    buffer.labels.finish()
    assert buffer.labels.ready == 19


@pytest.mark.parametrize(("share", "needed"), [(0.0, 1), (0.7, 7), (1.0, 10)])
def test_drawing_waits_for_the_share(labeller, share, needed):
    buffer = plain(labeller, ready_share=share)
    with stopped(labeller):
        play(buffer, (10,), 10)
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(buffer.sample(5).rewards.size and buffer.labels.ready))
        thread.start()
        time.sleep(0.5)
        assert thread.is_alive()
    thread.join(20)
    assert found
    assert found[0] >= needed


def test_with_all_rewards_there_a_seed_gives_the_same_again(labeller):
    def run() -> list[np.ndarray]:
        buffer = plain(labeller, ready_share=1.0, seed=7)
        batches = []
        for part in range(4):
            play(buffer, (3, 5), 5, seed=part)
            batches.append(buffer.sample(6))
        return [np.concatenate([batch.observations, batch.rewards[:, None]], 1) for batch in batches]

    for a, b in zip(run(), run(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_ring_forgets_what_it_overwrites(labeller, judge_scorer):
    """Twelve transitions pass through five slots while the first of them wait for their scores."""
    buffer = plain(labeller, capacity=5)
    with stopped(labeller):
        play(buffer, (12,), 12)
        assert buffer.labels.waiting == 5
    buffer.labels.finish()
    assert buffer.observations[:, 0].tolist() == [10, 11, 7, 8, 9]
    expected = paid(judge_scorer, (12,), 12)
    np.testing.assert_allclose(buffer.rewards, expected[[10, 11, 7, 8, 9]], atol=1e-5)
    assert buffer.labels.ready == 5


def test_a_score_for_an_overwritten_slot_is_not_written(labeller):
    """The slot's new transition, of an environment whose frames are not scored yet, keeps waiting."""
    buffer = plain(labeller, capacity=1, envs=2)
    play(buffer, (9,), 1)
    with stopped(labeller):
        time.sleep(0.1)
        play(buffer, (9,), 1, env=1, seed=4)
        assert np.isnan(buffer.rewards[0])
        assert buffer.labels.waiting == 1
        assert buffer.labels.ready == 0
    buffer.labels.finish()
    assert np.isfinite(buffer.rewards[0])


def test_a_full_queue_holds_the_loop_up(judge_checkpoint):
    frame_bytes = 40 * 56 * 3
    with Labeller(judge_checkpoint, wait_seconds=0.01, queue_bytes=10 * frame_bytes) as labeller:
        buffer = plain(labeller)
        with stopped(labeller):
            thread = threading.Thread(target=play, args=(buffer, (30,), 30))
            thread.start()
            until(lambda: labeller.waiting == 11)  # the one that is being pushed is there already
            time.sleep(0.2)
            assert thread.is_alive()
            assert labeller.waiting == 11
            assert len(buffer) == 10
        thread.join(30)
        buffer.labels.finish()
        assert ready(buffer) == list(range(30))
        assert labeller.scored == 31


def test_all_that_waits_goes_out_together(labeller):
    """Of the frames of four environments three messages are made, whatever came first."""
    buffer = plain(labeller, capacity=200, envs=4)
    with stopped(labeller):
        for env in range(4):
            play(buffer, (20,), 20, env=env, seed=env)
        sent = [len(items) for items in labeller._sent]
        assert len(sent) <= 2
        assert sum(sent) + len(labeller._unsent) == labeller.waiting == 84
    buffer.labels.finish()


# files


def test_plain_buffers_are_saved_and_go_on(labeller, judge_scorer, tmp_path):
    buffer = plain(labeller, capacity=12)
    play(buffer, (7, 4), 15)
    buffer.save(tmp_path / "buffer.npz")
    again = plain(labeller, capacity=12)
    again.load(tmp_path / "buffer.npz")
    assert len(again) == 12
    assert again.position == buffer.position == 3
    for name in ("observations", "actions", "rewards", "next_observations", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(again, name), getattr(buffer, name))
    play(again, (7,), 7, seed=9)
    again.labels.finish()
    np.testing.assert_allclose(again.rewards[3:10], paid(judge_scorer, (7,), 7, seed=9), atol=1e-5)
    np.testing.assert_array_equal(again.rewards[10:], buffer.rewards[10:])
    larger = plain(labeller, capacity=20)
    larger.load(tmp_path / "buffer.npz")
    assert (len(larger), larger.position) == (12, 12)


def test_a_file_without_some_rewards(labeller, tmp_path):
    """What waited when it was written is not drawn any more, and not waited for."""
    buffer = plain(labeller)
    play(buffer, (4,), 4)
    buffer.labels.finish()
    with stopped(labeller):
        play(buffer, (4,), 3)
        buffer.save(tmp_path / "early.npz", wait=False)
        buffer.load(tmp_path / "early.npz")
    assert buffer.labels.state[:7].tolist() == [READY] * 4 + [LOST] * 3
    assert set(buffer.sample(100).observations[:, 0]) == {0, 1, 2, 3}
    assert len(buffer) == 7
    empty = plain(labeller)
    with pytest.raises(UserError, match="nothing can be drawn from the buffer"):
        empty.sample(3)
    labeller.wait(lambda: not labeller.waiting)
    assert np.isnan(buffer.rewards[4:7]).all()  # scores that came for them afterwards


def test_buffers_of_stable_baselines3_are_saved(labeller, tmp_path):
    def make() -> SAC:
        return SAC(
            "MlpPolicy",
            worlds((7, 4), 1, 2),
            learning_starts=100,
            buffer_size=30,
            replay_buffer_class=LateRewardBuffer,
            replay_buffer_kwargs={"source": labeller, "task": TASK},
            policy_kwargs={"net_arch": [8]},
            device="cpu",
            seed=0,
        )

    first, second = make().learn(40).replay_buffer, make().learn(4).replay_buffer
    assert isinstance(first, LateRewardBuffer)
    assert isinstance(second, LateRewardBuffer)
    first.save(tmp_path / "buffer.npz")
    second.load(tmp_path / "buffer.npz")
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "pos", "full"):
        np.testing.assert_array_equal(getattr(second, name), getattr(first, name))
    assert second.labels.ready == 30
    np.testing.assert_array_equal(second.labels.env_rewards, first.labels.env_rewards)


def test_files_that_are_none(labeller, tmp_path):
    buffer = plain(labeller, capacity=8)
    play(buffer, (4,), 4)
    buffer.save(tmp_path / "good.npz")
    with pytest.raises(UserError, match="there is no file"):
        buffer.load(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:300])
    np.savez(tmp_path / "pickle.npz", version=np.array(1), position=np.array(0), rewards=np.array([{}], object))
    for name in ("text", "cut", "pickle"):
        with pytest.raises(UserError, match=f"{name}.npz is no saved buffer, or it is damaged"):
            buffer.load(tmp_path / f"{name}.npz")
    for other, said in (
        (plain(labeller, capacity=3), "holds 4 rows, and this buffer 3: make it at least as large"),
        (PlainBuffer(8, (3,), (2,), labeller), r"of another buffer: observations is float32 \(2,\) there and float32"),
    ):
        with pytest.raises(UserError, match=said):
            other.load(tmp_path / "good.npz")
    for name, said in (("x.pkl", r"must end in \.npz"), ("no/x.npz", "does not exist; make it first")):
        with pytest.raises(UserError, match=said):
            buffer.save(tmp_path / name)
        with pytest.raises(UserError, match=said):
            plain(labeller, save_on_failure=tmp_path / name)
