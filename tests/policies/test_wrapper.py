"""One environment whose reward is what a reward model sees."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit
from picture_env import TASK, Shown, SquareEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from policies.judges import BadFrame, BadScore
from policies.metaworld import MetaWorld
from policies.shaping import FORMS, Shaping
from policies.wrapper import RewardModelWrapper
from rbm.errors import UserError
from rbm.scoring import FrameScore, Scorer, SuccessVote

gymnasium.register("rbm/Square-v0", SquareEnv, max_episode_steps=5)


def play(env: gymnasium.Env, episodes: int, seed: int = 3) -> list[dict[str, Any]]:
    """Whole episodes: `frames` (T + 1, …) as observed, `infos` (T + 1), `rewards` (T), `terminated`."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(episodes):
        observation, info = env.reset(seed=seed if number == 0 else None)
        frames, infos, rewards, terminated, truncated = [observation["picture"]], [info], [], False, False
        while not (terminated or truncated):
            action = rng.uniform(-1, 1, 2).astype(np.float32)
            observation, reward, terminated, truncated, info = env.step(action)
            frames.append(observation["picture"])
            infos.append(info)
            rewards.append(reward)
        found.append({"frames": np.stack(frames), "infos": infos, "rewards": rewards, "terminated": terminated})
    return found


def of(episode: dict[str, Any], name: str) -> np.ndarray:
    return np.array([info[name] for info in episode["infos"]])


@pytest.mark.parametrize("camera", [None, "picture"])
def test_scores_are_those_of_the_episode_alone(judge_scorer, camera):
    env = RewardModelWrapper(SquareEnv((9, 1, 4)), judge_scorer, TASK, camera=camera)
    episodes = play(env, 6)
    assert [len(episode["rewards"]) for episode in episodes] == [9, 1, 4, 9, 1, 4]
    for episode in episodes:
        expected = judge_scorer.score(episode["frames"], TASK, every=1)
        np.testing.assert_allclose(of(episode, "progress"), expected.progress, atol=1e-5)
        np.testing.assert_allclose(of(episode, "progress_std"), expected.progress_std, atol=1e-5)
        np.testing.assert_allclose(of(episode, "success_probability"), expected.success, atol=1e-5)
    # and the frames before it would have made another score, so that the test can see them
    both = np.concatenate([episodes[0]["frames"], episodes[2]["frames"]])
    leaked = judge_scorer.score(both, TASK, every=1).progress[-5:]
    assert np.abs(leaked - of(episodes[2], "progress")).max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_rewards_are_those_of_shaping(judge_scorer, form):
    shaping = Shaping(form, gamma=0.9, scale=3.0, pessimism=0.5)
    for episode in play(RewardModelWrapper(SquareEnv(), judge_scorer, TASK, shaping=shaping), 2):
        scores = judge_scorer.score(episode["frames"], TASK, every=1)
        own = 0.5 * np.arange(1, len(episode["frames"]), dtype=np.float32)
        np.testing.assert_array_equal([info["env_reward"] for info in episode["infos"][1:]], own)
        expected = shaping.rewards(
            shaping.value(scores.progress, scores.progress_std), terminated=episode["terminated"], env_rewards=own
        )
        np.testing.assert_allclose(episode["rewards"], expected, atol=1e-5)


def test_hold_pays_a_change_when_it_is_seen(judge_scorer):
    episode = play(RewardModelWrapper(SquareEnv((8,)), judge_scorer, TASK, every=3), 1)[0]
    assert of(episode, "scored").tolist() == [True, False, False, True, False, False, True, False, True]
    with judge_scorer.stream(TASK) as session:  # the model sees the frames that are scored, no others
        seen = [session.push(episode["frames"][t]).progress for t in (0, 3, 6, 8)]
    np.testing.assert_allclose(of(episode, "progress"), np.array(seen)[[0, 0, 0, 1, 1, 1, 2, 2, 3]], atol=1e-5)
    np.testing.assert_allclose(of(episode, "value"), of(episode, "progress"))
    a, b, c = np.diff(seen)
    np.testing.assert_allclose(episode["rewards"], [0, 0, a, 0, 0, b, 0, c], atol=1e-5)


def test_interpolation_pays_a_change_in_equal_parts_and_loses_nothing(judge_scorer):
    env = RewardModelWrapper(SquareEnv((8, 5, 1)), judge_scorer, TASK, every=3, between="interpolate")
    eight, five, one = play(env, 3)
    with judge_scorer.stream(TASK) as session:
        seen = [session.push(eight["frames"][t]).progress for t in (0, 3, 6, 8)]
    a, b, c = np.diff(seen)
    np.testing.assert_allclose(eight["rewards"], [0, 0, a / 3, a / 3, a / 3, b / 3, b / 3, b / 3 + c], atol=1e-5)
    for episode in (eight, five, one):
        progress = of(episode, "progress")
        assert sum(episode["rewards"]) == pytest.approx(progress[-1] - progress[0], abs=1e-5)
        assert of(episode, "value")[-1] == pytest.approx(progress[-1])


def test_every_first_step_interpolated_is_held(judge_scorer):
    held, drawn = (
        play(RewardModelWrapper(SquareEnv(), judge_scorer, TASK, between=between), 2)
        for between in ("hold", "interpolate")
    )
    assert [episode["rewards"] for episode in held] == [episode["rewards"] for episode in drawn]


class Told:
    """A judge whose success probabilities are told beforehand; progress is the number of the frame, in hundredths."""

    def __init__(self, *success: float) -> None:
        self.told, self.task, self.count = success, TASK, 0

    def open(self, task: str) -> Told:
        return self

    def push(self, requests: Any) -> list[FrameScore]:
        self.count += 1
        return [FrameScore(0.01 * (self.count - 1), 0.0, self.told[self.count - 1])]

    def reset(self, task: str | None = None) -> None:
        self.count = 0

    def close(self) -> None:
        pass


@pytest.mark.parametrize("every", [1, 2])
def test_the_vote_ends_an_episode_and_pays_the_bonus(every):
    judge = Told(0.1, 0.9, 0.2, 0.9, 0.9, 0.9)
    shaping = Shaping("potential", gamma=0.5, success_bonus=7)
    env = RewardModelWrapper(SquareEnv((12,)), judge, TASK, shaping=shaping, every=every, vote=SuccessVote(2, 3))
    episode = play(env, 2)[1]
    assert len(episode["rewards"]) == 3 * every
    assert episode["terminated"]
    assert of(episode, "done_by_vote").tolist() == [False] * (3 * every) + [True]
    before = 0.02
    own = 0.5 * 3 * every
    assert episode["rewards"][-1] == pytest.approx(own - before + 7)  # terminated: Φ of what follows is 0


def test_the_vote_may_only_pay():
    told = (0.1, 0.9, 0.9, 0.1, 0.1, 0.9, 0.9)
    env = RewardModelWrapper(
        SquareEnv((6,)), Told(*told), TASK, shaping=Shaping(success_bonus=7), vote=SuccessVote(2, 2), terminate=False
    )
    episode = play(env, 1)[0]
    # once, though it is done twice
    np.testing.assert_allclose(episode["rewards"], [0.01, 7.01, 0.01, 0.01, 0.01, 0.01], atol=1e-6)
    assert of(episode, "done_by_vote").tolist() == [False, False, True, False, False, False, True]


def test_a_vote_that_passes_at_the_reset_ends_the_first_step():
    env = RewardModelWrapper(SquareEnv((6,)), Told(0.9, 0.9), TASK, vote=SuccessVote(1, 1))
    episode = play(env, 1)[0]
    assert episode["terminated"]
    assert len(episode["rewards"]) == 1


def test_a_reset_in_the_middle_forgets_what_was_seen(judge_scorer):
    env = RewardModelWrapper(SquareEnv((9,)), judge_scorer, TASK, every=2, between="interpolate")
    env.reset(seed=1)
    for _ in range(3):
        env.step(np.zeros(2, np.float32))
    frames, progress = [], []
    observation, info = env.reset()
    for _ in range(4):
        frames.append(observation["picture"])
        progress.append(info["progress"])
        observation, _, _, _, info = env.step(np.zeros(2, np.float32))
    expected = judge_scorer.score(np.stack(frames)[::2], TASK, every=1).progress
    np.testing.assert_allclose(progress[::2], expected, atol=1e-5)


def test_the_environment_may_name_its_task(judge_scorer):
    env = RewardModelWrapper(SquareEnv((3,)), judge_scorer)
    first = play(env, 1)[0]
    env.unwrapped.instruction = "open the drawer"  # as one that draws a task at each reset
    second = play(env, 1)[0]
    for episode, task in ((first, TASK), (second, "open the drawer")):
        expected = judge_scorer.score(episode["frames"], task, every=1).progress
        np.testing.assert_allclose(of(episode, "progress"), expected, atol=1e-5)
    assert np.abs(of(first, "progress") - of(second, "progress")).max() > 1e-3
    env.unwrapped.instruction = None
    with pytest.raises(UserError, match="the environment has no `instruction`: give it with task="):
        env.reset()


@pytest.mark.parametrize("camera", [None, "picture"])
def test_passes_gymnasiums_check(judge_scorer, camera):
    made = gymnasium.make("rbm/Square-v0", render_mode="rgb_array")
    for env in (SquareEnv(), made):
        check_env(RewardModelWrapper(env, judge_scorer, TASK, camera=camera, vote=SuccessVote(), every=2))


def test_statistics_and_limits_around_and_inside(judge_scorer):
    wrapped = RewardModelWrapper(TimeLimit(SquareEnv((50,)), 5), judge_scorer, TASK, every=2)
    episode = play(RecordEpisodeStatistics(wrapped), 1)[0]
    assert len(episode["rewards"]) == 5
    assert episode["infos"][-1]["scored"]  # the last frame of what the limit cut
    assert episode["infos"][-1]["episode"]["r"] == pytest.approx(sum(episode["rewards"]))
    assert episode["infos"][-1]["episode"]["l"] == 5


def test_runs_in_stable_baselines3(judge_scorer):
    envs = DummyVecEnv([lambda: RewardModelWrapper(SquareEnv((4, 3)), judge_scorer, TASK) for _ in range(2)])
    envs.seed(3)
    observation = envs.reset()
    rng = np.random.default_rng(3)
    episodes: list[list[np.ndarray]] = [[observation["picture"][0]]]
    progress: list[list[float]] = [[envs.reset_infos[0]["progress"]]]
    for _ in range(14):
        observation, _, done, infos = envs.step(rng.uniform(-1, 1, (2, 2)).astype(np.float32))
        progress[-1].append(infos[0]["progress"])
        if done[0]:
            episodes[-1].append(infos[0]["terminal_observation"]["picture"])
            episodes.append([])
            progress.append([envs.reset_infos[0]["progress"]])
        episodes[-1].append(observation["picture"][0])
    assert [len(episode) for episode in episodes] == [5, 4, 5, 4, 1]
    for frames, found in zip(episodes, progress, strict=True):
        np.testing.assert_allclose(found, judge_scorer.score(np.stack(frames), TASK, every=1).progress, atol=1e-5)


def test_the_shipped_weights_watch_meta_world():
    env = RewardModelWrapper(MetaWorld("drawer-open", max_steps=5, action_repeat=3))
    check_env(env)
    _, info = env.reset(seed=0)
    frames, progress, truncated = [env.render()], [info["progress"]], False
    while not truncated:
        _, _, terminated, truncated, info = env.step(np.array([0, 1, -1, 0], np.float32))
        assert not terminated
        frames.append(env.render())
        progress.append(info["progress"])
    expected = Scorer.from_pretrained().score(np.stack(frames), env.unwrapped.instruction, every=1)
    np.testing.assert_allclose(progress, expected.progress, atol=1e-5)
    env.close()


# what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "every=0: give 1 to score every step"),
        ({"every": 1.5}, r"every=1\.5"),
        ({"every": True}, "every=True"),
        ({"between": "wait"}, "between='wait': give one of hold, interpolate"),
        ({"task": "  "}, r"the task \(instruction\) is empty"),
        ({"camera": "wrist"}, "no picture 'wrist'; it has picture"),
        ({"camera": {"near": "wrist"}}, "no picture 'wrist'"),
        ({"camera": "state"}, r"'state' of the environment's observations is float32 \(2,\), not a uint8 picture"),
        ({"shaping": Shaping(success_bonus=1)}, r"a success bonus is paid when a vote says .*: give vote=SuccessVote"),
    ],
    ids=["zero", "half", "bool", "between", "task", "camera", "view", "state", "bonus"],
)
def test_refuses_what_makes_no_sense(judge_scorer, options, said):
    with pytest.raises(UserError, match=said):
        RewardModelWrapper(SquareEnv(), judge_scorer, **{"task": TASK, **options})


@pytest.mark.parametrize("render_mode", [None, "human"])
def test_refuses_an_environment_without_pictures(judge_scorer, render_mode):
    with pytest.raises(UserError, match=f"shows no pictures .render_mode is {render_mode!r}.*render_mode='rgb_array'"):
        RewardModelWrapper(SquareEnv(render_mode=render_mode), judge_scorer, TASK)
    RewardModelWrapper(SquareEnv(render_mode=render_mode), judge_scorer, TASK, camera="picture").reset()


def test_a_plain_picture_is_a_camera_too(judge_scorer):
    plain = gymnasium.wrappers.TransformObservation(
        SquareEnv(), lambda shown: shown["picture"], SquareEnv().observation_space["picture"]
    )
    env = RewardModelWrapper(plain, judge_scorer, TASK, camera="observation")
    frame, info = env.reset(seed=1)
    assert info["progress"] == pytest.approx(judge_scorer.score(frame[None], TASK).progress[0], abs=1e-5)
    with pytest.raises(UserError, match="no picture 'picture'; it has observation"):
        RewardModelWrapper(plain, judge_scorer, TASK, camera="picture")
    with pytest.raises(UserError, match="no picture 'near'; it has none: leave camera out"):
        RewardModelWrapper(MetaWorld("drawer-open"), judge_scorer, TASK, camera="near")


def shrunk(picture: np.ndarray, step: int) -> np.ndarray:
    return picture[:-2] if step == 2 else picture


def unknown(picture: np.ndarray, step: int) -> np.ndarray:
    return np.where(step == 2, np.nan, picture / 255)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shrunk, "environment, step 2: the frame is 56×38 and those before it in the episode were 56×40"),
        (unknown, "environment, reset: the frame is float64; give uint8"),
        (lambda x, step: x if step < 2 else x / 0.0 * 0.0, "step 2: the frame is float64 and holds NaN"),
        (lambda x, step: x[..., :1], r"reset: the frame has shape \(40, 56, 1\); give \(H, W, 3\), RGB"),
        (lambda x, step: None, "reset: there is no frame; make the environment with render_mode='rgb_array'"),
        (lambda x, step: [x], "reset: the frame is a list, not an array"),
    ],
    ids=["size", "float", "nan", "grey", "none", "list"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_says_which_frame_is_no_picture(judge_scorer, change, said):
    env = RewardModelWrapper(Shown(SquareEnv((9,)), change), judge_scorer, TASK)
    with pytest.raises(BadFrame, match=said):  # noqa: PT012 (at the reset or a step)
        env.reset(seed=1)
        for _ in range(3):
            env.step(np.zeros(2, np.float32))
    with pytest.raises(UserError, match=r"no episode is running: call reset\(\)"):
        env.step(np.zeros(2, np.float32))


def test_another_size_in_another_episode_is_none_of_these(judge_scorer):
    sizes = iter([0, 0, 2, 2])
    env = RewardModelWrapper(Shown(SquareEnv((1,)), lambda x, step: x[next(sizes) :]), judge_scorer, TASK)
    for _ in range(2):
        env.reset(seed=1)
        assert env.step(np.zeros(2, np.float32))[2]


def test_a_score_that_is_no_number_is_said(blind_scorer):
    env = RewardModelWrapper(SquareEnv(), blind_scorer, TASK)
    with pytest.raises(BadScore, match=r"the environment, reset: the score is not a finite number \(progress nan"):
        env.reset(seed=1)


def test_no_step_without_an_episode(judge_scorer):
    env = RewardModelWrapper(SquareEnv((1,)), judge_scorer, TASK)
    with pytest.raises(UserError, match=r"call reset\(\) before step\(\)"):
        env.step(np.zeros(2, np.float32))
    env.reset(seed=1)
    env.step(np.zeros(2, np.float32))
    with pytest.raises(UserError, match=r"call reset\(\) before step\(\)"):
        env.step(np.zeros(2, np.float32))
    env.close()
    env.close()
