"""The words around the frames: stored with the weights, since scores mean nothing under others.

A clip is `opening + clip`, then a step after another: for each of its views `picture + image`, then `frame`. How a pair
is written depends on its layout (`rbm.model.layout`):

    causal   opening + pair + first + steps + split + second + steps + closing + readout + end
    joint    opening + clip | steps + first_end | steps + second_end | closing + readout      (three branches)

In models with `shared` the words up to the first step are a segment of their own, which clips with the same
instruction share; else text runs on (the published layout), and words are merged into tokens across that place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rbm.errors import UserError

SPLIT, REWARD, PREFERENCE, SIMILARITY, PROGRESS = MARKERS = (
    "<|split_token|>",
    "<|reward_token|>",
    "<|pref_token|>",
    "<|sim_token|>",
    "<|prog_token|>",
)
"""The five tokens that published checkpoints add to their tokenizer, in this order; two of them are never used."""


@dataclass(frozen=True)
class Prompt:
    """What is written around the frames.

    Attributes:
        clip, pair: the question about one clip and about two; `{task}` is the instruction.
        picture: before each picture; `{k}` counts them, `{view}` is the view's name.
        image: what stands for a picture; `pad` in it becomes as many tokens as the picture has.
        frame: the token after each step at which progress and success are read; empty: the picture's own tokens are
            pooled.
        opening, first, second, first_end, second_end, split, closing, readout, end: see the module.
        shared: the words before the first step are a segment that clips share.
    """

    clip: str
    pair: str = ""
    picture: str = "Picture {k}: "
    image: str = "<|vision_start|><|image_pad|><|vision_end|>"
    pad: str = "<|image_pad|>"
    frame: str = PROGRESS
    opening: str = "<|im_start|>user\n"
    first: str = ""
    second: str = ""
    first_end: str = ""
    second_end: str = ""
    split: str = SPLIT
    closing: str = ""
    readout: str = PREFERENCE
    end: str = ""
    shared: bool = True

    @classmethod
    def of(cls, values: Prompt | Mapping[str, Any] | str) -> Prompt:
        """From stored values, or one of the names in `PROMPTS`.

        Raises:
            ValueError: a name that does not exist, or fields that a prompt does not have.
        """
        if isinstance(values, Prompt):
            return values
        if isinstance(values, str):
            if values not in PROMPTS:
                raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}, not {values!r}")
            return PROMPTS[values]
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"a prompt has no {', '.join(sorted(unknown))}")
        return cls(**values)

    def signs(self) -> list[str]:
        """Special tokens that the words around the frames are made of, but the markers: a tokenizer must have them."""
        found = re.findall(r"<[^<>\s]+>", self.opening + self.image + self.pad + self.end)
        return [sign for sign in dict.fromkeys(found) if sign not in MARKERS]

    def question(self, task: str, pair: bool = False) -> str:
        return self.opening + (self.pair if pair else self.clip).replace("{task}", task)

    def steps(self, count: int, views: tuple[tuple[str, ...], ...], start: int = 1) -> str:
        """Text of `count` steps that show `views[i]`; pictures are counted from `start`."""
        text = []
        for step in range(count):
            for view in views[step]:
                text.append(self.picture.replace("{k}", str(start)).replace("{view}", view) + self.image)
                start += 1
            text.append(self.frame)
        return "".join(text)


_PROGRESS = (
    "predict the task progress at each frame{of}, how far along the robot is towards completing the task, a float "
    "between 0 and 1, where 0 is the starting state and 1 is when the task is completed. If the robot is not "
    "performing the same task, predict 0 progress."
)

PUBLISHED = Prompt(
    clip="The task for the robot is '{task}'. Given the trajectory video, " + _PROGRESS.replace("{of}", ""),
    pair="Given these two trajectories for the task '{task}', evaluate which one makes more progress towards the task. "
    "Return A for the first trajectory and B for the second trajectory.",
    first="This is Trajectory A. ",
    second="This is Trajectory B. ",
    closing="Now predict the preference between the two trajectories.",
    end="<|im_end|>\n",
    shared=False,
)
"""The words of Robometer's checkpoints (arXiv 2603.02115): data, part of the interface of those weights."""

PUBLISHED_WITH_PROGRESS = Prompt(
    **{field.name: getattr(PUBLISHED, field.name) for field in fields(Prompt) if field.name != "pair"},
    pair=f"{PUBLISHED.pair} Also {_PROGRESS.replace('{of}', ' of the first trajectory')}",
)
"""Those of models trained with `predict_pref_progress`, the released ones among them."""

ISOLATED = Prompt(
    clip="A robot has to do this: {task}\nAfter each picture, say how far it has got and whether it is done.\n",
    first_end="That was attempt A. ",
    second_end="That was attempt B. ",
    closing="How good was that?",
)
"""The words of new models: markers stand behind the frames, so that a clip reads the same alone and in a pair."""

PROMPTS = {"isolated": ISOLATED, "published": PUBLISHED, "published_with_progress": PUBLISHED_WITH_PROGRESS}


def check_text(task: str) -> None:
    """Raises UserError for an instruction that is no text: half of a surrogate pair has no bytes in UTF-8."""
    if any("\ud800" <= sign <= "\udfff" for sign in task):
        raise UserError(f"the instruction {task!r} is not valid text: give it in UTF-8")


def check_instruction(task: str, special: frozenset[str]) -> None:
    """Raises UserError for an instruction that contains a token with a meaning of its own, or is no text."""
    check_text(task)
    for token in special:
        if token in task:
            raise UserError(f"the instruction contains {token!r}, which is a sign of the model's own: leave it out")
