"""Does the score still mean success? A monitor that watches a policy learn to please its judge.

A policy that is trained against a score finds what the score likes, and that need not be the task (reward hacking). The
monitor compares for each episode what the reward model ended with (its vote says done) and what was true (a simulator's
signal, a person's check), says when they part, and keeps the clips on which they do, for a person and for `rbm refine`.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from policies.folder import keep_lines
from rbm.errors import UserError
from rbm.output import whole_file
from rbm.video import encode_video

CLIP_FPS = 10.0


@dataclass(frozen=True)
class Watched:
    """One training episode.

    Attributes:
        episode, step: its number, and decisions made until its end.
        judged: whether the reward model's vote said that the task was done.
        success: whether it truly was, at any moment (in `rbm rl` also within two actions after the vote).
        value: the highest value Φ that was paid.
        diverged: what the monitor said after it.
        clip: the file that shows it, where one was kept.
    """

    episode: int
    step: int
    judged: bool
    success: bool
    value: float
    diverged: bool
    clip: str | None


class Monitor:
    """Watches episodes, in a folder with `monitor.jsonl` and `clips/`.

    It says *diverged* while more than `share` of the last `window` episodes were judged done and were no success.

    Args:
        folder: where to write; none for nowhere.
        task: the instruction, written beside each clip.
        window, share: see above.
        clips: so many clips of wrong judgements are kept at most.

    Raises:
        UserError: a window below 1, or a share outside 0 to 1.
    """

    def __init__(self, folder: Path | None, task: str, window: int = 20, share: float = 0.2, clips: int = 40) -> None:
        if window < 1 or not 0 <= share <= 1:
            raise UserError(
                f"a monitor over {window} episodes with a share of {share} cannot be: window ≥ 1, 0 ≤ share ≤ 1"
            )
        self.folder, self.task, self._share, self._clips = folder, task, share, clips
        self._wrong: deque[bool] = deque(maxlen=window)
        self._kept = 0
        if folder is not None:
            (folder / "clips").mkdir(parents=True, exist_ok=True)

    @property
    def diverged(self) -> bool:
        """Whether score and success part now; not before a whole window was seen."""
        return len(self._wrong) == self._wrong.maxlen and float(np.mean(self._wrong)) > self._share

    def episode(
        self, number: int, step: int, judged: bool, success: bool, value: float, frames: list[NDArray[np.uint8]]
    ) -> Watched:
        """Take one episode; frames uint8 (H, W, 3) as the reward model saw them."""
        wrong = judged and not success
        self._wrong.append(wrong)
        clip = None
        if wrong and self.folder is not None and frames and self._kept < self._clips:
            clip = f"clips/{number:06d}.mp4"
            encode_video(self.folder / clip, frames, CLIP_FPS)
            with whole_file((self.folder / clip).with_suffix(".json")) as target:
                label = {
                    "task": self.task,
                    "quality": "failure",
                    "episode": number,
                    "step": step,
                    "frames": len(frames),
                }
                target.write_text(json.dumps(label))
            self._kept += 1
        watched = Watched(number, step, judged, success, round(value, 4), self.diverged, clip)
        if self.folder is not None:
            with (self.folder / "monitor.jsonl").open("a") as file:
                file.write(json.dumps(asdict(watched)) + "\n")
        return watched

    def state(self) -> dict[str, Any]:
        return {"wrong": list(self._wrong), "kept": self._kept}

    def restore(self, state: dict[str, Any], episodes: int) -> None:
        """Go on after `episodes` episodes: what was written of later ones is dropped."""
        self._wrong.extend(state["wrong"])
        self._kept = state["kept"]
        if self.folder is not None and (self.folder / "monitor.jsonl").exists():
            keep_lines(self.folder / "monitor.jsonl", episodes)


def read_monitor(folder: Path) -> list[Watched]:
    """What a monitor wrote; empty where there was none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "monitor.jsonl"
    if not path.is_file():
        return []
    try:
        return [Watched(**json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: delete it, or run the policy again ({error})") from error


class Film(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Keeps the pictures that are taken of an episode, so that the monitor can keep it."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.frames: list[NDArray[np.uint8]] = []

    def reset(self, **options: Any) -> Any:
        self.frames = []
        return self.env.reset(**options)

    def render(self) -> Any:
        picture = self.env.render()
        if isinstance(picture, np.ndarray):
            self.frames.append(picture)
        return picture
