"""`policies.wrapper` for many environments at once: all that is to be scored in a step is scored together.

    envs = gymnasium.make_vec(…, render_mode="rgb_array")
    envs = RewardModelWrapper(envs, None, "open the drawer")

It gives what a vector of environments gives that are each wrapped by themselves, in all three ways of autoreset:

- NEXT_STEP: the step after an episode's end is the reset of the next one: its frame begins a new attempt, and its
  reward is 0.
- SAME_STEP: the last frame of an episode is that of `final_obs`, or `final_info["final_frame"]`, which `FinalFrame`
  puts there: `render()` shows the next episode by then. `final_info` has the scores of the last step, `info` those of
  the new episode's first frame.
- DISABLED: environments whose episode has ended are reset by `reset(options={"reset_mask": …})`, also those that only
  the vote has ended.

Where only the vote ends an episode the environments do not know of it; those are reset here by a `reset_mask`, in
NEXT_STEP after a step whose outcome is thrown away.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import iterate
from numpy.typing import NDArray

from policies.judges import JudgeError, Watch, make_judge
from policies.shaping import Shaping
from policies.wrapper import (
    Between,
    Camera,
    Episode,
    Rules,
    Source,
    check_instruction,
    check_pictures,
    picture_in,
)
from rbm.errors import UserError
from rbm.scoring.scores import FrameScore
from rbm.scoring.vote import SuccessVote

FINAL_FRAME = "final_frame"

Mask = NDArray[np.bool_]
Infos = dict[str, Any]


class FinalFrame(gymnasium.Wrapper[Any, Any, Any, Any], gymnasium.utils.RecordConstructorArgs):
    """Puts what `render()` shows after an episode's last step into its info, for vectors that reset in the same step.

    Each environment of the vector is wrapped, outside its `TimeLimit`.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        check_pictures(env.observation_space, env.render_mode, None)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            info = {**info, FINAL_FRAME: self.env.render()}
        return observation, reward, terminated, truncated, info


class RewardModelWrapper(VectorWrapper[Any, Any, Any, Any, Any]):
    """Pays what a reward model says of the pictures of each environment, instead of the environments' own rewards.

    One call of the judge scores a step of all environments; where episodes end in SAME_STEP, another scores the first
    frames of the next ones.

    Args:
        envs: with render_mode "rgb_array", or with pictures in their observations.
        task: one instruction for all, or one for each; none: the environments' `instruction`, read at each reset.
        others: as of `policies.wrapper.RewardModelWrapper`.

    Raises:
        UserError: as there; or the environments do not say how they are reset.
    """

    def __init__(
        self,
        envs: VectorEnv[Any, Any, Any],
        source: Source = None,
        task: str | Sequence[str] | None = None,
        *,
        shaping: Shaping = Shaping(),  # noqa: B008 (frozen)
        every: int = 1,
        between: Between = "hold",
        vote: SuccessVote | None = None,
        terminate: bool = True,
        camera: Camera = None,
        **judge_options: Any,
    ) -> None:
        super().__init__(envs)
        rules = Rules(shaping, every, between, vote, terminate)
        check_pictures(envs.single_observation_space, envs.render_mode, camera)
        mode = envs.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise UserError("the environments do not say how they are reset: set envs.metadata['autoreset_mode']")
        base = envs.unwrapped
        if mode is AutoresetMode.NEXT_STEP and isinstance(base, AsyncVectorEnv) and not base.shared_memory:
            # its processes reset an environment once more after a reset at an episode's end, and nothing tells of it
            raise UserError("AsyncVectorEnv with NEXT_STEP loses track of resets without shared memory: leave it on")
        if task is not None and not isinstance(task, str) and len(task) != self.num_envs:
            raise UserError(f"{len(task)} tasks for {self.num_envs} environments: give one, or one for each")
        self._tasks = [task] * self.num_envs if isinstance(task, str) else None if task is None else list(task)
        self._mode, self._camera = mode, camera
        self._episodes = [Episode(rules) for _ in range(self.num_envs)]
        self._watches: list[Watch] = []
        self._begun = np.zeros(self.num_envs, bool)
        """Which environments have an episode, running or at its end."""
        self._over = np.zeros(self.num_envs, bool)
        """Which episodes have ended with the last step."""
        self._unaware = np.zeros(self.num_envs, bool)
        """Which of these only the vote has ended."""
        self.judge = make_judge(source, **judge_options)
        self._owns_judge = self.judge is not source
        if self._tasks is not None:
            self._watches = [self.judge.open(name) for name in self._tasks]

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Infos]:
        """Reset all environments, or those of `options["reset_mask"]`, bool (N,)."""
        given = (options or {}).get("reset_mask")
        mask = np.ones(self.num_envs, bool) if given is None else np.array(given, bool)
        # a copy: environments take the mask out of the options, and wrappers around this one look for it afterwards
        options = None if options is None else dict(options)
        observations, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        return observations, self._begin(observations, infos, _numbers(mask))

    def step(self, actions: Any) -> tuple[Any, NDArray[np.float64], Mask, Mask, Infos]:
        self._check_running()
        renewed, unaware = self._over, self._unaware  # NEXT_STEP: what ended before is reset in this step
        observations, own, terminations, truncations, infos = self.env.step(actions)
        self._begun[:] = False  # should a score fail, no episode can go on
        if unaware.any():
            observations, infos = self._reset_late(unaware, infos)
        terminations, truncations = terminations & ~unaware, truncations & ~unaware
        over = terminations | truncations

        stepped, firsts = _numbers(~renewed), _numbers(renewed)
        due = [i for i in stepped if self._episodes[i].due(bool(over[i]))]
        frames = self._frames(observations, due + firsts, infos, over)
        self._renew(firsts)
        scores = self._scores(frames)
        said = {i: self._episodes[i].begin(scores[i]) for i in firsts}
        rewards = np.zeros(self.num_envs, np.float64)
        for i in stepped:
            rewards[i], terminations[i], said[i] = self._episodes[i].step(
                scores.get(i), float(own[i]), bool(terminations[i]), bool(over[i])
            )
        self._begun[:] = True
        ended = terminations | truncations
        voted = ended & ~over
        if self._mode is AutoresetMode.SAME_STEP:
            observations, infos = self._renewed_at_once(observations, infos, said, over, voted)
        else:
            infos = self._with(infos, said)
            self._over, self._unaware = ended, voted & (self._mode is AutoresetMode.NEXT_STEP)
        return observations, rewards, terminations, truncations, infos

    def close(self, **kwargs: Any) -> None:
        for watch in self._watches:
            watch.close()
        self._watches = []
        self._begun[:] = False
        if self._owns_judge:
            self.judge.close()
        super().close(**kwargs)

    # episodes that end and begin

    def _begin(self, observations: Any, infos: Infos, numbers: list[int]) -> Infos:
        """New episodes of these environments, whose first frame is shown now."""
        self._begun[numbers] = False
        frames = self._frames(observations, numbers)
        self._renew(numbers)
        scores = self._scores(frames)
        infos = self._with(infos, {i: self._episodes[i].begin(scores[i]) for i in numbers})
        self._begun[numbers] = True
        self._over[numbers] = self._unaware[numbers] = False
        return infos

    def _renew(self, numbers: list[int]) -> None:
        """Forget the frames of these environments."""
        if not numbers:
            return
        tasks = self._instructions() if self._tasks is None else self._tasks
        if not self._watches:
            self._watches = [self.judge.open(task) for task in tasks]
        for i in numbers:
            self._watches[i].reset(tasks[i])
            self._episodes[i].renew()

    def _reset_late(self, mask: Mask, infos: Infos) -> tuple[Any, Infos]:
        """NEXT_STEP: the vote had ended these; what they did in this step does not count."""
        observations, first = self.env.reset(options={"reset_mask": mask.copy()})
        for i in _numbers(mask):
            _take(infos, i)
        return observations, self._with(infos, {i: _take(first, i) for i in _numbers(mask)})

    def _renewed_at_once(
        self, observations: Any, infos: Infos, said: dict[int, Infos], over: Mask, voted: Mask
    ) -> tuple[Any, Infos]:
        """SAME_STEP: where episodes ended the next begin; those that only the vote ended (`voted`) are reset now."""
        final = {i: values for i, values in said.items() if over[i]}
        if final:
            infos["final_info"] = self._with(infos["final_info"], final)
        infos = self._with(infos, {i: values for i, values in said.items() if not over[i]})
        if voted.any():
            shown = list(iterate(self.env.observation_space, observations))
            last = {i: {"final_obs": copy.deepcopy(shown[i]), "final_info": _take(infos, i)} for i in _numbers(voted)}
            observations, first = self.env.reset(options={"reset_mask": voted.copy()})
            infos = self._with(infos, {i: values | _take(first, i) for i, values in last.items()})
        return observations, self._begin(observations, infos, _numbers(over | voted))

    def _with(self, infos: Infos, added: Mapping[int, Infos]) -> Infos:
        """The infos of the vector and what is to be said of some environments."""
        for i, values in added.items():
            infos = self._add_info(infos, values, i)
        return infos

    # what is shown, and what it is worth

    def _frames(
        self, observations: Any, numbers: list[int], infos: Infos | None = None, over: Mask | None = None
    ) -> dict[int, Any]:
        """The pictures of these environments; `over`: whose episodes ended with the step that gave `infos`."""
        found: dict[int, Any] = {}
        if infos is not None and over is not None and self._mode is AutoresetMode.SAME_STEP:
            for i in [i for i in numbers if over[i]]:
                if self._camera is None:
                    found[i] = self._final_frame(infos, i)
                else:
                    found[i] = picture_in(infos["final_obs"][i], self._camera)
        rest = [i for i in numbers if i not in found]
        if self._camera is not None:
            return found | {i: picture_in(observations, self._camera, i) for i in rest}
        if not rest:
            return found
        if isinstance(self.env, SyncVectorEnv):
            return found | {i: self.env.envs[i].render() for i in rest}
        shown = self.env.render()
        if not isinstance(shown, tuple | list) or len(shown) != self.num_envs:
            raise UserError(
                "render() of these environments does not give a picture of each: name one in their observations "
                "with camera="
            )
        return found | {i: shown[i] for i in rest}

    def _final_frame(self, infos: Infos, i: int) -> Any:
        final = infos.get("final_info", {})
        if FINAL_FRAME not in final or not final[f"_{FINAL_FRAME}"][i]:
            raise UserError(
                f"environment {i} was reset in the step that ended its episode, and render() shows the next one: "
                "wrap each environment in policies.vector.FinalFrame, name a picture in the observations with camera=, "
                "or use AutoresetMode.NEXT_STEP"
            )
        return final[FINAL_FRAME][i]

    def _scores(self, frames: Mapping[int, Any]) -> dict[int, FrameScore]:
        """The scores of these environments' frames, in one call."""
        if not frames:
            return {}
        numbers = list(frames)
        try:
            scores = self.judge.push([(self._watches[i], frame) for i, frame in frames.items()])
        except JudgeError as error:
            i = numbers[error.request]
            raise error.at(f"environment {i}, {self._episodes[i].place}") from error
        return dict(zip(numbers, scores, strict=True))

    def _instructions(self) -> list[str]:
        try:
            found = self.env.unwrapped.get_attr("instruction")  # type: ignore[attr-defined]
        except AttributeError:
            found = [None]
        return [check_instruction(name) for name in found]

    def _check_running(self) -> None:
        if not self._begun.all():
            i = int(np.argmin(self._begun))
            raise UserError(f"environment {i} has no episode: call reset() before step()")
        if self._mode is AutoresetMode.DISABLED and self._over.any():
            raise UserError(
                f"the episode of environment {int(np.argmax(self._over))} has ended: reset it with "
                "reset(options={'reset_mask': terminated | truncated})"
            )


def _numbers(mask: Mask) -> list[int]:
    return [int(i) for i in np.flatnonzero(mask)]


def _take(infos: Infos, i: int) -> Infos:
    """What `infos` of a vector say of environment i, as a dict of its own; it is taken out of them."""
    taken: Infos = {}
    for key, value in infos.items():
        mask = infos.get(f"_{key}")
        if mask is None or not mask[i]:
            continue
        mask[i] = False
        if isinstance(value, dict):
            taken[key] = _take(value, i)
        else:
            taken[key] = bool(value[i]) if value.dtype == bool else copy.deepcopy(value[i])
            value[i] = None if value.dtype == object else 0
    return taken
