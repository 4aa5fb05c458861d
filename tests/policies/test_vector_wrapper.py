"""Many environments at once: the same as each by itself, whichever way they are reset, and no attempt sees another's
frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from picture_env import TASK, Shown, SquareEnv

from policies import vector
from policies.judges import BadFrame, BadScore, LocalJudge
from policies.shaping import Shaping
from policies.wrapper import RewardModelWrapper
from rbm.errors import UserError
from rbm.scoring import Scorer, SuccessVote

NEXT, SAME, DISABLED = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED
LENGTHS = ((9, 1, 4), (1, 1, 5), (12, 7, 2))
"""Of the episodes of three environments, in turn."""
STEPS = 30
modes = pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name.lower())


def sync(makers: list[Callable[[], gymnasium.Env]], mode: AutoresetMode) -> VectorEnv:
    return SyncVectorEnv(makers, autoreset_mode=mode)


def processes(makers: list[Callable[[], gymnasium.Env]], mode: AutoresetMode) -> VectorEnv:
    return AsyncVectorEnv(makers, autoreset_mode=mode)


def square(lengths: tuple[int, ...]) -> Callable[[], gymnasium.Env]:
    return lambda: vector.FinalFrame(SquareEnv(lengths))


@contextmanager
def closing(envs: VectorEnv) -> Iterator[VectorEnv]:
    try:
        yield envs
    finally:
        envs.close()


@dataclass
class Attempt:
    """What one environment showed and was given in one episode."""

    frames: list[np.ndarray] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminated: bool = False
    whole: bool = False

    def add(self, frame: np.ndarray, progress: float) -> None:
        self.frames.append(frame.copy())
        self.progress.append(float(progress))


def watch(
    envs: VectorEnv, mode: AutoresetMode, steps: int = STEPS, cuts: dict[int, np.ndarray] | None = None
) -> list[list[Attempt]]:
    """The episodes of each environment, read from what the vector says; `cuts`: which are reset before which step."""
    rng = np.random.default_rng(5)
    observations, infos = envs.reset(seed=11)
    attempts: list[list[Attempt]] = [[Attempt()] for _ in range(envs.num_envs)]
    for i, own in enumerate(attempts):
        own[-1].add(observations["picture"][i], infos["progress"][i])
    over = np.zeros(envs.num_envs, bool)

    def reset(mask: np.ndarray) -> None:
        observations, infos = envs.reset(options={"reset_mask": mask.copy()})
        assert infos["_progress"].tolist() == mask.tolist()
        for i in np.flatnonzero(mask):
            attempts[i].append(Attempt())
            attempts[i][-1].add(observations["picture"][i], infos["progress"][i])
        over[mask] = False

    for step in range(steps):
        if cuts and step in cuts:
            reset(cuts[step])
        if mode is DISABLED and over.any():
            reset(over.copy())
        actions = rng.uniform(-1, 1, (envs.num_envs, 2)).astype(np.float32)
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        for i, own in enumerate(attempts):
            if mode is NEXT and over[i]:
                own.append(Attempt())
                assert rewards[i] == 0
                assert not infos["_env_reward"][i] if "env_reward" in infos else True
            else:
                own[-1].rewards.append(rewards[i])
                own[-1].terminated = bool(terminated[i])
                own[-1].whole = bool(terminated[i] or truncated[i])
            if mode is SAME and (terminated[i] or truncated[i]):
                assert infos["_final_obs"][i]
                assert infos["final_info"]["_progress"][i]
                own[-1].add(infos["final_obs"][i]["picture"], infos["final_info"]["progress"][i])
                own.append(Attempt())
            assert infos["_progress"][i]
            own[-1].add(observations["picture"][i], infos["progress"][i])
        over = terminated | truncated
    return attempts


def check(attempts: list[list[Attempt]], scorer: Scorer, shaping: Shaping) -> None:
    """Scores and rewards of each episode are those of its own frames alone."""
    for own in attempts:
        for attempt in own:
            scores = scorer.score(np.stack(attempt.frames), TASK, every=1)
            np.testing.assert_allclose(attempt.progress, scores.progress, atol=1e-5)
            if len(attempt.rewards):
                values = shaping.value(scores.progress, scores.progress_std)[: len(attempt.rewards) + 1]
                env_rewards = 0.5 * np.arange(1, len(values), dtype=np.float32)
                expected = shaping.rewards(values, terminated=attempt.terminated, env_rewards=env_rewards)
                np.testing.assert_allclose(attempt.rewards, expected, atol=1e-5)


@modes
@pytest.mark.parametrize("make", [sync, processes])
@pytest.mark.parametrize("camera", [None, "picture"])
def test_no_episode_sees_another(judge_scorer, make, mode, camera):
    shaping = Shaping("potential", gamma=0.9)
    envs = vector.RewardModelWrapper(
        make([square(lengths) for lengths in LENGTHS], mode), judge_scorer, TASK, shaping=shaping, camera=camera
    )
    with closing(envs):
        attempts = watch(envs, mode)
    check(attempts, judge_scorer, shaping)
    for own, lengths in zip(attempts, LENGTHS, strict=True):
        whole = [len(attempt.rewards) for attempt in own if attempt.whole]
        assert len(whole) >= 3
        assert whole == [lengths[n % 3] for n in range(len(whole))]
    # scores of an episode that had seen the one before it would be others: this test can tell
    first, second = attempts[0][0], attempts[0][2]
    leaked = judge_scorer.score(np.stack(first.frames + second.frames), TASK, every=1).progress
    assert np.abs(leaked[len(first.frames) :] - second.progress).max() > 1e-3


@modes
@pytest.mark.parametrize("make", [sync, processes])
def test_a_reset_in_the_middle(judge_scorer, make, mode):
    """Of some environments: one that runs, one whose episode has just ended or just begun."""
    envs = vector.RewardModelWrapper(make([square(lengths) for lengths in LENGTHS], mode), judge_scorer, TASK)
    cuts = {n: np.array(mask) for n, mask in {3: [1, 0, 0], 8: [0, 1, 1], 9: [1, 1, 1], 14: [0, 1, 0]}.items()}
    with closing(envs):
        attempts = watch(envs, mode, cuts={n: mask.astype(bool) for n, mask in cuts.items()})
    check(attempts, judge_scorer, Shaping())
    assert any(not attempt.whole for attempt in attempts[2][:-1])


VOTE = {"vote": SuccessVote(2, 3), "shaping": Shaping("minus_one", success_bonus=3.0)}


@modes
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (sync, {}),
        (sync, {"every": 3}),
        (sync, {"every": 2, "between": "interpolate", "camera": "picture"}),
        (sync, VOTE),
        (sync, {"vote": SuccessVote(1, 3), "every": 2, "between": "interpolate", "camera": "picture"}),
        (sync, {**VOTE, "terminate": False}),
        (processes, VOTE),
    ],
    ids=["plain", "held", "interpolated", "vote", "vote-interpolated", "vote-pays", "vote-processes"],
)
def test_equals_environments_that_are_each_wrapped(judge_scorer, make, mode, options):
    """Observations, rewards, ends and infos; with the vote at a threshold that some episodes pass."""
    if "vote" in options:
        threshold = typical_success(judge_scorer)
        options = options | {"vote": SuccessVote(options["vote"].k, 3, threshold)}

    def wrapped(lengths: tuple[int, ...]) -> Callable[[], gymnasium.Env]:
        return lambda: RewardModelWrapper(vector.FinalFrame(SquareEnv(lengths)), judge_scorer, TASK, **options)

    together = vector.RewardModelWrapper(
        make([square(lengths) for lengths in LENGTHS], mode), judge_scorer, TASK, **options
    )
    with closing(together), closing(SyncVectorEnv([wrapped(n) for n in LENGTHS], autoreset_mode=mode)) as single:
        rng, ended_by_vote = np.random.default_rng(5), 0
        same(together.reset(seed=11), single.reset(seed=11))
        over = np.zeros(3, bool)
        for _ in range(STEPS):
            if mode is DISABLED and over.any():
                same(*(envs.reset(options={"reset_mask": over.copy()}) for envs in (together, single)))
            actions = rng.uniform(-1, 1, (3, 2)).astype(np.float32)
            ours, theirs = together.step(actions), single.step(actions)
            same(ours, theirs)
            over = ours[2] | ours[3]
            said = ours[4].get("final_info", {}) if mode is SAME else ours[4]
            if over.any():
                ended_by_vote += int((said["done_by_vote"] & over & ours[2]).sum())
    if "vote" in options and options.get("terminate", True):
        assert ended_by_vote >= 3


def typical_success(scorer: Scorer) -> float:
    """A probability that about a third of the frames of such episodes reach."""
    envs = SyncVectorEnv([square((12,))] * 3, autoreset_mode=SAME)
    found = []
    observations, _ = envs.reset(seed=11)
    for _ in range(12):
        found.append(observations["picture"])
        observations, *_ = envs.step(np.zeros((3, 2), np.float32))
    scores = [scorer.score(np.stack(found)[:, i], TASK, every=1).success for i in range(3)]
    return float(np.quantile(np.concatenate(scores), 0.66))


def same(ours: Any, theirs: Any) -> None:
    """Equal to 1e-5, in what is there: of infos the entries that their masks mark."""
    if isinstance(ours, dict):
        marked = {key for key in (*ours, *theirs) if f"_{key}" in ours or f"_{key}" in theirs}
        for key in {*ours, *theirs} - {f"_{key}" for key in marked}:
            mask = [infos.get(f"_{key}", np.zeros(3, bool)) for infos in (ours, theirs)] if key in marked else None
            if mask is None:
                same(ours[key], theirs[key])
                continue
            assert mask[0].tolist() == mask[1].tolist(), key
            if isinstance(ours.get(key, theirs.get(key)), dict):
                same(ours.get(key, {}), theirs.get(key, {}))
            else:
                for i in np.flatnonzero(mask[0]):
                    same(ours[key][i], theirs[key][i])
    elif isinstance(ours, tuple | list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    elif isinstance(ours, str):
        assert ours == theirs
    else:
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


class Counting(LocalJudge):
    """Counts the calls and what was in them."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__(scorer)
        self.calls: list[int] = []

    def push(self, requests: Any) -> Any:
        self.calls.append(len(requests))
        return super().push(requests)


def test_one_call_of_the_judge_for_all_environments(judge_scorer):
    for mode, ended in ((NEXT, [4]), (SAME, [4, 4])):
        judge = Counting(judge_scorer)
        envs = vector.RewardModelWrapper(sync([square((4,))] * 4, mode), judge, TASK, every=2)
        envs.reset(seed=1)
        for _ in range(4):
            envs.step(np.zeros((4, 2), np.float32))
        assert judge.calls == [4, 4, *ended]


@modes
def test_statistics_of_episodes(judge_scorer, mode):
    envs = RecordEpisodeStatistics(
        vector.RewardModelWrapper(sync([square(lengths) for lengths in LENGTHS], mode), judge_scorer, TASK)
    )
    attempts = watch(envs, mode)
    returns = [sum(attempt.rewards) for own in attempts for attempt in own if attempt.whole]
    assert envs.episode_count == len(returns)
    lengths = [len(attempt.rewards) for own in attempts for attempt in own if attempt.whole]
    assert sorted(envs.length_queue) == sorted(lengths)
    np.testing.assert_allclose(sorted(envs.return_queue), sorted(returns), atol=1e-5)


def test_a_task_for_each_environment_or_from_each(judge_scorer):
    tasks = [TASK, "open the drawer", TASK]
    with_tasks = [lambda task=task: tasked(task) for task in tasks]
    given = vector.RewardModelWrapper(sync([square((4,))] * 3, NEXT), judge_scorer, tasks)
    named = vector.RewardModelWrapper(sync(with_tasks, NEXT), judge_scorer)
    apart = vector.RewardModelWrapper(processes(with_tasks, NEXT), judge_scorer)
    with closing(apart):
        for _ in range(2):
            infos = [envs.reset(seed=[5, 5, 5])[1] for envs in (given, named, apart)]
            for info in infos:
                np.testing.assert_allclose(info["progress"], infos[0]["progress"], atol=1e-5)
            assert infos[0]["progress"][0] == infos[0]["progress"][2] != infos[0]["progress"][1]
    with pytest.raises(UserError, match="2 tasks for 3 environments: give one, or one for each"):
        vector.RewardModelWrapper(sync([square((4,))] * 3, NEXT), judge_scorer, tasks[:2])
    with pytest.raises(UserError, match=r"the task \(instruction\) is empty"):
        vector.RewardModelWrapper(sync([square((4,))] * 3, NEXT), judge_scorer, [TASK, "", TASK])
    nameless = vector.RewardModelWrapper(sync([lambda: tasked(None)], NEXT), judge_scorer)
    with pytest.raises(UserError, match="the environment has no `instruction`"):
        nameless.reset()


def tasked(task: str | None) -> gymnasium.Env:
    env = SquareEnv((4,))
    env.instruction = task
    return env


# what is refused


def test_a_last_frame_that_nobody_kept_is_said(judge_scorer):
    envs = vector.RewardModelWrapper(sync([lambda: SquareEnv((2,))] * 2, SAME), judge_scorer, TASK)
    envs.reset(seed=1)
    envs.step(np.zeros((2, 2), np.float32))
    with pytest.raises(UserError, match=r"environment 0 was reset in the step .* wrap each .* in policies\.vector\.F"):
        envs.step(np.zeros((2, 2), np.float32))
    with pytest.raises(UserError, match=r"environment 0 has no episode: call reset\(\)"):
        envs.step(np.zeros((2, 2), np.float32))


def test_an_episode_that_is_over_must_be_reset(judge_scorer):
    envs = vector.RewardModelWrapper(sync([square((3,)), square((1,))], DISABLED), judge_scorer, TASK)
    with pytest.raises(UserError, match=r"environment 0 has no episode: call reset\(\)"):
        envs.step(np.zeros((2, 2), np.float32))
    envs.reset(seed=1)
    envs.step(np.zeros((2, 2), np.float32))
    with pytest.raises(UserError, match=r"the episode of environment 1 has ended: reset it with reset\(options="):
        envs.step(np.zeros((2, 2), np.float32))
    envs.reset(options={"reset_mask": np.array([False, True])})
    envs.step(np.zeros((2, 2), np.float32))


def test_refuses_environments_that_it_cannot_watch(judge_scorer):
    with pytest.raises(UserError, match="shows no pictures"):
        vector.RewardModelWrapper(sync([lambda: SquareEnv(render_mode=None)], NEXT), judge_scorer, TASK)
    with pytest.raises(UserError, match="no picture 'wrist'; it has picture"):
        vector.RewardModelWrapper(sync([square((3,))], NEXT), judge_scorer, TASK, camera="wrist")
    with pytest.raises(UserError, match="every=0"):
        vector.RewardModelWrapper(sync([square((3,))], NEXT), judge_scorer, TASK, every=0)
    silent = sync([square((3,))], NEXT)
    silent.metadata = {}
    with pytest.raises(UserError, match="do not say how they are reset"):
        vector.RewardModelWrapper(silent, judge_scorer, TASK)


def test_refuses_processes_that_reset_once_more(judge_scorer):
    with (
        closing(AsyncVectorEnv([square((3,))], shared_memory=False)) as envs,
        pytest.raises(UserError, match="without shared memory: leave it on"),
    ):
        vector.RewardModelWrapper(envs, judge_scorer, TASK)


class OnePicture(gymnasium.vector.VectorWrapper):
    """Shows all environments in one picture, as simulators on a GPU do."""

    def render(self) -> Any:
        return np.concatenate(self.env.render(), axis=1)


def test_refuses_one_picture_of_all_environments(judge_scorer):
    envs = vector.RewardModelWrapper(OnePicture(sync([square((3,))] * 2, NEXT)), judge_scorer, TASK)
    with pytest.raises(UserError, match=r"does not give a picture of each: name one .* with camera="):
        envs.reset()


def spoiled(picture: np.ndarray, step: int) -> np.ndarray:
    return picture[2:] if step == 2 else picture


@pytest.mark.parametrize("make", [sync, processes])
def test_says_which_environment_shows_no_picture(judge_scorer, make):
    makers = [square((9,)), lambda: Shown(SquareEnv((9,)), spoiled)]
    with closing(vector.RewardModelWrapper(make(makers, NEXT), judge_scorer, TASK)) as envs:
        envs.reset(seed=1)
        envs.step(np.zeros((2, 2), np.float32))
        with pytest.raises(BadFrame, match="environment 1, step 2: the frame is 56×38 and those before it"):
            envs.step(np.zeros((2, 2), np.float32))


def test_a_score_that_is_no_number_is_said(blind_scorer):
    envs = vector.RewardModelWrapper(sync([square((9,))] * 2, NEXT), blind_scorer, TASK)
    with pytest.raises(BadScore, match="environment 0, reset: the score is not a finite number"):
        envs.reset(seed=1)
