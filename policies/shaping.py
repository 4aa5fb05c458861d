"""From scores to rewards: one implementation for environments that run and for data that is relabelled.

Φ is the value of a frame: its progress, less `pessimism` times the spread of the progress bins, never below 0.

| form | reward of a step s → s′ |
| --- | --- |
| `progress` | scale · Φ(s′) |
| `difference` | scale · (Φ(s′) − Φ(s)) |
| `potential` | r_env + scale · (γΦ(s′) − Φ(s)); Φ(s′) = 0 where the episode terminated, not where it was truncated |
| `minus_one` | scale · (Φ(s′) − 1) |

`success_bonus` comes on top of each, once in an episode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError

Form = Literal["progress", "difference", "potential", "minus_one"]
FORMS: tuple[str, ...] = get_args(Form)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Shaping:
    """How rewards follow from scores.

    Attributes:
        form: see the table above.
        gamma: the discount of the learner, of `potential` only: with it, and with scale 1 or any other, the best policy
            under the environment's own reward stays the best.
        scale: multiplies the learned part, not the environment's own reward and not the bonus.
        success_bonus: added at the step at which the success vote says for the first time that the task is done.
        pessimism: β in max(progress − β·std, 0).

    Raises:
        UserError: an unknown form, or a number out of its range.
    """

    form: Form = "difference"
    gamma: float = 0.99
    scale: float = 1.0
    success_bonus: float = 0.0
    pessimism: float = 0.0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"unknown form of reward {self.form!r}: give one of {', '.join(FORMS)}")
        if not 0 <= self.gamma <= 1:
            raise UserError(f"gamma={self.gamma} of a reward must be from 0 to 1")
        if not (math.isfinite(self.pessimism) and self.pessimism >= 0):
            raise UserError(f"pessimism={self.pessimism} must be 0 or more")
        for name, value in (("scale", self.scale), ("success_bonus", self.success_bonus)):
            if not math.isfinite(value):
                raise UserError(f"{name}={value} of a reward must be a finite number")

    def check_alone(self) -> None:
        """That this is a reward by itself.

        Raises:
            UserError: it is `potential`, which guides under another reward: alone, its discounted sum depends on an
                episode's first and last state only, so that nothing is to be learned from it (Ng et al. 1999).
        """
        if self.form == "potential":
            raise UserError(
                "form=potential only guides under an environment's reward, and here the learned one is alone: give "
                "minus_one, progress or difference"
            )

    @overload
    def value(self, progress: float, progress_std: float) -> float: ...

    @overload
    def value(self, progress: Floats, progress_std: Floats) -> Floats: ...

    def value(self, progress: float | Floats, progress_std: float | Floats) -> float | Floats:
        """Φ of one frame, or float32 (T,) of as many."""
        value = np.maximum(np.float32(progress) - np.float32(self.pessimism) * np.float32(progress_std), np.float32(0))
        return value if isinstance(progress, np.ndarray) else float(value)

    def reward(
        self, before: float, after: float, *, terminated: bool, newly_done: bool, env_reward: float = 0.0
    ) -> float:
        """The reward of one step.

        Args:
            before, after: values of the frames before and after it.
            terminated: whether it ended the episode, other than by a limit of time.
            newly_done: whether the success vote said here for the first time that the task is done.
            env_reward: the environment's own; only `potential` uses it.
        """
        return float(self._rewards(before, after, float(not terminated), float(newly_done), env_reward))

    def rewards(
        self,
        values: Floats,
        *,
        terminated: bool,
        done: NDArray[np.bool_] | None = None,
        env_rewards: Floats | None = None,
    ) -> Floats:
        """The rewards of an episode of T steps: float32 (T,), equal to T calls of `reward`.

        Args:
            values: float32 (T+1,), the first that of the frame after the reset.
            terminated: whether the last step ended the episode, other than by a limit of time.
            done: bool (T,), after each step whether the vote counts the task as done; the bonus goes to the first.
            env_rewards: float32 (T,), the environment's own; none for an environment that gives none.

        Raises:
            UserError: arrays of other lengths, or values that are not finite.
        """
        values = np.asarray(values, np.float32)
        if values.ndim != 1 or not len(values):
            raise UserError(f"values of an episode have shape (T + 1,), not {values.shape}")
        if not np.isfinite(values).all():
            raise UserError(f"value {int(np.isfinite(values).argmin())} of the episode is not a finite number")
        steps = len(values) - 1
        for name, given in (("done", done), ("env_rewards", env_rewards)):
            if given is not None and np.shape(given) != (steps,):
                raise UserError(f"{name} of an episode of {steps} steps has shape ({steps},), not {np.shape(given)}")
        after = values[1:].astype(np.float64)
        kept = np.ones(steps)
        newly = np.zeros(steps)
        if steps and terminated:
            kept[-1] = 0.0
        if done is not None and np.any(done):
            newly[int(np.argmax(done))] = 1.0
        own = np.zeros(steps) if env_rewards is None else np.asarray(env_rewards, np.float64)
        return np.asarray(self._rewards(values[:-1].astype(np.float64), after, kept, newly, own), np.float32)

    def _rewards(
        self,
        before: float | NDArray[np.float64],
        after: float | NDArray[np.float64],
        kept: float | NDArray[np.float64],
        newly: float | NDArray[np.float64],
        own: float | NDArray[np.float64],
    ) -> float | NDArray[np.float64]:
        """The table above; `kept` is 0 where a step terminated, `newly` 1 where the vote came true."""
        bonus = self.success_bonus * newly
        if self.form == "progress":
            return self.scale * after + bonus
        if self.form == "difference":
            return self.scale * (after - before) + bonus
        if self.form == "minus_one":
            return self.scale * (after - 1.0) + bonus
        return own + self.scale * (self.gamma * kept * after - before) + bonus
