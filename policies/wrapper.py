"""A gymnasium environment whose reward is what a reward model sees.

    env = RewardModelWrapper(gymnasium.make(…, render_mode="rgb_array"), None, "open the drawer", every=2)

`policies.vector` has the same for many environments at once; what an episode is worth is decided here for both.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import gymnasium
import numpy as np

from policies.judges import Frame, Judge, JudgeError, Watch, make_judge
from policies.shaping import Shaping
from rbm.errors import UserError
from rbm.scoring.client import Client
from rbm.scoring.scorer import Scorer
from rbm.scoring.scores import FrameScore
from rbm.scoring.vote import SuccessVote

Between = Literal["hold", "interpolate"]
Source = Scorer | Client | Judge | str | os.PathLike[str] | None
Camera = str | Mapping[str, str] | None

OBSERVATION = "observation"
"""The name of a camera for an observation that is one picture, not a dict of them."""


@dataclass(frozen=True)
class Rules:
    """What the wrappers make of scores; arguments as of `RewardModelWrapper`.

    Raises:
        UserError: a rule that makes no sense.
    """

    shaping: Shaping
    every: int = 1
    between: Between = "hold"
    vote: SuccessVote | None = None
    terminate: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise UserError(f"every={self.every!r}: give 1 to score every step, 2 for every second, …")
        if self.between not in get_args(Between):
            raise UserError(f"between={self.between!r}: give one of {', '.join(get_args(Between))}")
        if self.shaping.success_bonus and self.vote is None:
            raise UserError("a success bonus is paid when a vote says that the task is done: give vote=SuccessVote()")


class Episode:
    """The episode that one environment is in: its steps, its value, whether it counts as done."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._vote = copy.deepcopy(rules.vote)
        self.steps = -1
        """Steps that were done; −1 before the frame of a reset was scored."""
        self._done = self._paid = False
        self._value = self._from = self._to = 0.0
        self._left = 0
        """Steps over which the last known change is still paid out."""
        self._score = FrameScore(0.0, 0.0, 0.0)

    @property
    def place(self) -> str:
        """Which frame comes next, for a sentence."""
        return f"step {self.steps + 1}" if self.steps >= 0 else "reset"

    def renew(self) -> None:
        """What comes next is the frame of a reset."""
        self.steps = -1

    def begin(self, score: FrameScore) -> dict[str, Any]:
        """Take the score of the frame after a reset; what `info` says of it."""
        if self._vote is not None:
            self._vote.reset()
        self.steps = 0
        self._done = self._paid = False
        self._take(score)
        self._value = self._from = self._to
        self._left = 0
        return self._info(True)

    def due(self, over: bool) -> bool:
        """Whether the frame after the step that was just done is scored; `over`: the episode ended with it."""
        return over or (self.steps + 1) % self._rules.every == 0

    def step(
        self, score: FrameScore | None, env_reward: float, terminated: bool, over: bool
    ) -> tuple[float, bool, dict[str, Any]]:
        """The reward of a step, whether it terminated the episode, and what `info` says of it.

        Args:
            score: of the frame after it, where it was `due`.
            env_reward, terminated: what the environment says.
            over: whether it ended the episode, one way or the other.
        """
        self.steps += 1
        before, newly_done = self._value, False
        if score is not None:
            self._take(score)
            newly_done = self._done and not self._paid
            self._paid |= newly_done
            terminated = terminated or (newly_done and self._rules.terminate)
            self._from, self._left = before, self._rules.every
        if self._rules.between == "hold" or over or terminated:
            self._left = 0
        if self._left:
            self._left -= 1
            part = 1 - self._left / self._rules.every
            self._value = self._from + part * (self._to - self._from)
        else:
            self._value = self._to
        reward = self._rules.shaping.reward(
            before, self._value, terminated=terminated, newly_done=newly_done, env_reward=env_reward
        )
        return reward, terminated, {"env_reward": env_reward, **self._info(score is not None)}

    def _take(self, score: FrameScore) -> None:
        self._score = score
        self._to = self._rules.shaping.value(score.progress, score.progress_std)
        if self._vote is not None:
            self._done = self._vote.add(score.success)

    def _info(self, scored: bool) -> dict[str, Any]:
        return {
            "progress": self._score.progress,
            "progress_std": self._score.progress_std,
            "success_probability": self._score.success,
            "value": self._value,
            "scored": scored,
            "done_by_vote": self._done,
        }


class RewardModelWrapper(gymnasium.Wrapper[Any, Any, Any, Any], gymnasium.utils.RecordConstructorArgs):
    """Pays what a reward model says of the pictures, instead of the environment's own reward.

    It must see the end of an episode, whose last frame is always scored: a `TimeLimit` belongs inside.

    `info` of a step keeps `env_reward` (the environment's own), `progress`, `progress_std` and `success_probability`
    (of the frame that was scored last), `value` (Φ, as it was paid), `scored` (whether this step's frame was), and
    `done_by_vote`; that of a reset all but the first.

    Args:
        env: with render_mode "rgb_array", or with pictures in its observations.
        source: where scores come from (`policies.judges.make_judge`); none for the shipped weights.
        task: the instruction; none: the environment's `instruction`, read at each reset.
        shaping: how rewards follow from scores.
        every: score every so many steps, and the first and last frame of an episode.
        between: what the steps between are worth. `hold`: the last value stands, so that `difference` pays nothing and
            then all at once. `interpolate`: a change is paid in equal parts over as many steps, that at which it is
            seen being the first; the value trails by at most `every` − 1 steps, and the last step pays what is left.
        vote: says when the task is done, by the frames that are scored; the success bonus is paid then.
        terminate: whether the episode terminates there.
        camera: none: what `render()` shows. Else the key of a picture in the observation (`observation` where it is a
            picture itself), or {view of the model: key} for several.
        judge_options: `device`, `budget_bytes`, `patience_seconds`, `token` of `make_judge`.

    Raises:
        UserError: no pictures, an unknown camera, an empty task, a number out of its range. From `reset` and `step`:
            what comes is no picture, or of another size than before in the episode; a score is not finite; the server
            is gone (`policies.judges`).
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        source: Source = None,
        task: str | None = None,
        *,
        shaping: Shaping = Shaping(),  # noqa: B008 (frozen)
        every: int = 1,
        between: Between = "hold",
        vote: SuccessVote | None = None,
        terminate: bool = True,
        camera: Camera = None,
        **judge_options: Any,
    ) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(
            self,
            _disable_deepcopy=True,
            source=source,
            task=task,
            shaping=shaping,
            every=every,
            between=between,
            vote=vote,
            terminate=terminate,
            camera=camera,
            **judge_options,
        )
        super().__init__(env)
        self._episode = Episode(Rules(shaping, every, between, vote, terminate))
        check_pictures(env.observation_space, env.render_mode, camera)
        if camera is None:  # made again from its `spec` it would need the same
            self.metadata = {**env.metadata, "render_modes": ["rgb_array"]}
        self._task, self._camera = task, camera
        self._watch: Watch | None = None
        self._running = False
        self.judge = make_judge(source, **judge_options)
        self._owns_judge = self.judge is not source
        if task is not None:
            self._watch = self.judge.open(task)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._running = False
        observation, info = self.env.reset(seed=seed, options=options)
        task = self._instruction() if self._task is None else self._task
        if self._watch is None:
            self._watch = self.judge.open(task)
        else:
            self._watch.reset(task)
        self._episode.renew()
        score = self._score(observation)
        self._running = True
        return observation, {**info, **self._episode.begin(score)}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self._running:
            raise UserError("no episode is running: call reset() before step()")
        observation, env_reward, terminated, truncated, info = self.env.step(action)
        over = bool(terminated or truncated)
        self._running = False  # should the score fail, this episode cannot go on
        score = None
        if self._episode.due(over):
            score = self._score(observation)
        reward, terminated, own = self._episode.step(score, float(env_reward), bool(terminated), over)
        self._running = not (terminated or truncated)
        return observation, reward, terminated, bool(truncated), {**info, **own}

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._running = False
        if self._owns_judge:
            self.judge.close()
        super().close()

    def _score(self, observation: Any) -> FrameScore:
        assert self._watch is not None
        frame: Any = self.env.render() if self._camera is None else picture_in(observation, self._camera)
        try:
            return self.judge.push([(self._watch, frame)])[0]
        except JudgeError as error:
            raise error.at(f"the environment, {self._episode.place}") from error

    def _instruction(self) -> str:
        try:
            found = self.env.get_wrapper_attr("instruction")
        except AttributeError:
            found = None
        return check_instruction(found)


def check_instruction(found: Any) -> str:
    """What an environment gives as its `instruction`, where it is one."""
    if not isinstance(found, str):
        raise UserError("the environment has no `instruction`: give it with task='open the drawer'")
    return found


def picture_in(observation: Any, camera: str | Mapping[str, str], number: int | None = None) -> Frame:
    """The picture of an observation; `number`: of one environment in a batch of them."""
    if isinstance(camera, Mapping):
        return {view: picture_in(observation, key, number) for view, key in camera.items()}  # type: ignore[misc]
    shown = observation[camera] if isinstance(observation, Mapping) else observation
    return shown if number is None else shown[number]


def check_pictures(space: gymnasium.Space[Any], render_mode: str | None, camera: Camera) -> None:
    """Raises UserError where an environment with this space of observations has no such camera."""
    if camera is None:
        if render_mode != "rgb_array":
            raise UserError(
                f"the environment shows no pictures (render_mode is {render_mode!r}): make it with "
                "render_mode='rgb_array', or name a picture in its observations with camera="
            )
        return
    spaces = dict(space.spaces) if isinstance(space, gymnasium.spaces.Dict) else {OBSERVATION: space}
    pictures = sorted(str(key) for key, held in spaces.items() if _is_picture(held))
    for key in camera.values() if isinstance(camera, Mapping) else [camera]:
        if key not in spaces:
            there = f"it has {', '.join(pictures)}" if pictures else "it has none: leave camera out to use render()"
            raise UserError(f"the environment's observations have no picture {key!r}; {there}")
        if key not in pictures:
            raise UserError(
                f"{key!r} of the environment's observations is {_described(spaces[key])}, not a uint8 picture (H, W, 3)"
            )


def _is_picture(space: gymnasium.Space[Any]) -> bool:
    shape = space.shape
    return space.dtype == np.uint8 and shape is not None and len(shape) == 3 and shape[2] == 3


def _described(space: gymnasium.Space[Any]) -> str:
    return type(space).__name__ if space.shape is None else f"{space.dtype} {space.shape}"
