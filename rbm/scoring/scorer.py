"""`Scorer`: a trained reward model, ready to look at video.

What is notable here:

- A video becomes a clip through `rbm.video.stored_clip`, as it does in a corpus: scoring sees what training saw.
- Attention is causal, so that one forward scores every prefix of a clip. `every=k` asks for the contexts that a
  live session would hold; those that are prefixes of one another share a row, and a frame is encoded once a batch.
- A score does not depend on what else is in the batch, beyond rounding.
- Where a model reads several views, a video may be a mapping of their names to videos. Those of one attempt may differ
  in length and frame rate: they are looked at at the same moments.

Letters in shapes: n frames of a clip, N clips, P pairs, U distinct frames, F frames shown (see `ClipBatch`).
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import as_file, files
from itertools import combinations, islice
from typing import TYPE_CHECKING, TypeVar, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rbm.errors import UserError
from rbm.frames import pick_frames, session_strides
from rbm.model import ClipBatch, RewardModel, RewardOutput
from rbm.model.adapter import fingerprint
from rbm.scoring.scores import ClipScores, Floats, FrameScore, Scores
from rbm.scoring.views import Clips, Footage, Recording, Video, check_views, clips_of
from rbm.video import Frames, StoredClip

if TYPE_CHECKING:
    from rbm.scoring.sessions import Session

Shown = Frames | Mapping[str, Frames]
"""A clip as it is read: uint8 (n, H, W, 3) of the model's first view, or of several views by name, equally many."""

Decoded = tuple[Floats, Floats, Floats, Floats | None]
"""Progress, its spread, success, and remaining seconds where the model says them: float32 (F,) each."""

_T = TypeVar("_T")

BATCH_SIZE = 64
"""The most clips in one forward. On two cores larger batches gain nothing; on a GPU they may."""

BATCH_FRAMES = 64
"""Frames of a long video that are read before they are scored."""

FORWARD_PLACES, FORWARD_PLACES_CPU = 65536, 4096
"""Places of a sequence (tokens) that one forward takes, over all its clips, on a GPU and on the CPU."""


class Scorer:
    """Scores video with a reward model.

    Args:
        model: a trained model; it is moved to `device` and set to eval mode.
        device: `auto` (a GPU where there is one), or any name that torch knows.

    Raises:
        UserError: the device does not exist here.
    """

    def __init__(self, model: RewardModel, device: str | torch.device = "auto") -> None:
        self.device = _device(device)
        self.model = model.to(self.device).eval()

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str] | None = None, device: str = "auto", dtype: str | None = None
    ) -> Scorer:
        """The model in the folder `path`; without one, the `nano` weights that come with the package.

        Raises:
            UserError: the checkpoint is missing, truncated or of another version, or the device does not exist.
        """
        if path is not None:
            return cls(RewardModel.from_pretrained(os.fspath(path), dtype), device)
        with as_file(files("rbm") / "assets" / "nano") as folder:
            return cls(RewardModel.from_pretrained(str(folder), dtype), device)

    @property
    def forward_places(self) -> int:
        """Places of a sequence that one forward takes: what bounds its memory."""
        return FORWARD_PLACES_CPU if self.device.type == "cpu" else FORWARD_PLACES

    @property
    def context_frames(self) -> int:
        """The most frames that the model reads at once."""
        return self.model.context_frames

    def fingerprint(self) -> str:
        """Hexadecimal; another one for other weights, whatever their precision (`rbm.model.adapter.fingerprint`)."""
        return fingerprint(self.model.state_dict())

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views that the model reads; empty: one, whichever it is given."""
        return self.model.backbone.views

    def check(self, task: str) -> None:
        """Raises UserError for an instruction without a word in it, or one that the model cannot read."""
        check_task(task)
        self.model.backbone.check_task(task)

    def score(self, video: Video, task: str, every: int | None = None) -> Scores:
        """Progress and success for frames of a video.

        Without `every`: `context_frames` of the stored frames, even, ends kept, in one forward. With `every=k`: every
        k-th frame of the video and the last, each scored from what a live session would hold at that moment
        (`rbm.frames.session_context`): so scores of a moment do not depend on what follows it, nor on k. Memory does
        not grow with the video's length. (A `StoredClip` has the frames that it has, at most 64.)

        A model with several views takes a mapping, `score({"near": video, "wrist": video}, task)`: the moments are
        those of the first view, in the model's order, and the others show their frames nearest in time.

        Raises:
            UserError: the video cannot be read, the instruction is empty, `every` is not positive, or the model does
                not read such a view.
        """
        if every is None:
            return self.score_batch([(video, task)])[0]
        steps = self.score_gradually(video, task, every)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                return cast(Scores, done.value)

    def score_gradually(self, video: Video, task: str, every: int) -> Generator[int, None, Scores]:
        """`score` with `every`, a piece at a time: yields how many frames were looked at, returns the scores.

        Raises:
            UserError: as `score`.
        """
        from rbm.scoring.sessions import SessionPool

        self.check(task)
        if every < 1:
            raise UserError(f"every is {every}; give 1 for every frame, 2 for every second, …")
        footage = Footage.of(video, self.views)
        last = len(footage.frame_index) - 1
        moments = np.array(sorted({*range(0, last + 1, every), last}))
        asked = np.zeros(last + 1, bool)
        asked[moments] = True
        looked_at = np.flatnonzero(asked | (np.arange(last + 1) % session_strides(last + 1, self.context_frames) == 0))
        pool = SessionPool(self)
        session = pool.open(task)
        found: list[FrameScore] = []
        for chunk in _chunks(zip(looked_at.tolist(), footage.stream(looked_at), strict=True), BATCH_FRAMES):
            found += pool.push_at([(session, n, shown.get("", shown), bool(asked[n])) for n, shown in chunk])
            yield len(chunk)
        progress, spread, success = (
            np.array([getattr(score, name) for score in found], np.float32)
            for name in ("progress", "progress_std", "success")
        )
        return Scores(
            progress,
            spread,
            success,
            footage.frame_index[moments],
            footage.timestamp[moments],
            task,
            footage.fps,
            footage.n_frames,
            np.array([score.remaining for score in found], np.float32) if self.model.remaining else None,
        )

    def stream(self, task: str) -> Session:
        """A live session: it is given a frame at a time and says how far the attempt has got.

        Sessions that shall be advanced together, or share a budget of memory, come from one `SessionPool`.

        Raises:
            UserError: the instruction is empty.
        """
        from rbm.scoring.sessions import SessionPool

        return SessionPool(self).open(task)

    def score_batch(self, items: Sequence[tuple[Video, str]]) -> list[Scores]:
        """`score` for many videos, in shared forwards; videos are opened a batch at a time."""
        results = []
        for chunk in _chunks(items, BATCH_SIZE):
            for _, task in chunk:
                self.check(task)
            clips = [self._context(video) for video, _ in chunk]
            predicted = self.predict([(_shown(clip), task) for clip, (_, task) in zip(clips, chunk, strict=True)])
            results += [
                scores_of(_first(clip), scored, task)
                for clip, scored, (_, task) in zip(clips, predicted, chunk, strict=True)
            ]
        return results

    def compare(self, a: Video, b: Video, task: str) -> float:
        """Probability that attempt `a` at the task is better than `b`; compare(a, b) + compare(b, a) = 1."""
        return float(self.prefer([(_shown(self._context(a)), _shown(self._context(b)), task)])[0])

    def rank(self, videos: Sequence[Video], task: str) -> list[int]:
        """Positions of the videos, best attempt first, by `worth`; equals keep their order."""
        return best_first(self.worth(videos, task))

    def worth(self, videos: Sequence[Video], task: str) -> list[float]:
        """By what attempts at one task are ranked: the utility, in N forwards, where the model has one, else the mean
        preference (0 to 1) over all the other videos."""
        self.check(task)
        if self.model.preference == "utility":
            clips = ((_shown(self._context(video)), task) for video in videos)
            return [scored.utility for chunk in _chunks(clips, BATCH_SIZE) for scored in self.predict(chunk)]
        frames = [_shown(self._context(video)) for video in videos]
        pairs = list(combinations(range(len(frames)), 2))
        better = self.prefer([(frames[a], frames[b], task) for a, b in pairs])
        return worth_of_pairs(len(frames), pairs, better.tolist())

    def predict(self, clips: Sequence[tuple[Shown, str]], batch_size: int = BATCH_SIZE) -> list[ClipScores]:
        """Scores of clips (uint8 (n, H, W, 3), instruction) that are read as they are, n <= context_frames.

        In place of the frames a mapping of views' names to frames may stand.

        An array that stands in several clips of a batch (under other instructions) is encoded once.

        Raises:
            UserError: a clip is empty or longer than `context_frames`, or an instruction is empty.
        """
        results = []
        for chunk in self._portions(clips, [[shown] for shown, _ in clips], batch_size):
            batch = self._batch(chunk)
            output = self._forward(batch)
            decoded = self.decode(output)
            worth = [float("nan")] * len(chunk) if output.utility is None else output.utility.float().tolist()
            ends = np.cumsum(batch.lengths.numpy())[:-1]
            progress, spread, success = (np.split(array, ends) for array in decoded[:3])
            remaining = [None] * len(chunk) if decoded[3] is None else np.split(decoded[3], ends)
            results += [ClipScores(*scored) for scored in zip(progress, spread, success, worth, remaining, strict=True)]
        return results

    def prefer(self, pairs: Sequence[tuple[Shown, Shown, str]], batch_size: int = BATCH_SIZE) -> Floats:
        """Probability that the first clip of each pair (frames, frames, instruction) is better: float32 (P,).

        Models with `joint` preference read each pair in both orders; the mean is antisymmetric.
        """
        better = [np.zeros(0, np.float32)]
        for chunk in self._portions(pairs, [[a, b] for a, b, _ in pairs], max(1, batch_size // 2)):
            clips = [(frames, task) for a, b, task in chunk for frames in (a, b)]
            batch = self._batch(clips)
            rows = torch.arange(len(clips), device=self.device).reshape(-1, 2)
            logits = self._preference(batch, rows)
            if self.model.preference == "utility":
                p = logits.sigmoid()
            else:
                p = (logits.sigmoid() + (-self._preference(batch, rows.flip(1))).sigmoid()) / 2
            better.append(p.float().cpu().numpy())
        return np.concatenate(better)

    @overload
    def context_clip(self, video: Recording) -> StoredClip: ...

    @overload
    def context_clip(self, video: Mapping[str, Recording]) -> Clips: ...

    def context_clip(self, video: Video) -> StoredClip | Clips:
        """The frames of a video that one forward looks at: at most `context_frames`, even, ends kept."""
        clips = self._context(video)
        return clips if isinstance(video, Mapping) else _first(clips)

    def _context(self, video: Video) -> Clips:
        clips = clips_of(video, self.views)
        picked = pick_frames(len(_first(clips).frames), self.context_frames)
        return {name: _part(clip, picked) for name, clip in clips.items()}

    def _batch(self, clips: Sequence[tuple[Shown, str]]) -> ClipBatch:
        tensors: dict[int, Tensor] = {}
        views = [self._by_view(shown) for shown, _ in clips]
        for shown, (_, task) in zip(views, clips, strict=True):
            self.check(task)
            lengths = {len(frames) for frames in shown if frames is not None}
            if len(lengths) > 1:
                raise UserError(f"the views of a clip must have the same number of frames, not {sorted(lengths)}")
            if not 1 <= max(lengths) <= self.context_frames:
                raise UserError(
                    f"a clip has {max(lengths)} frames, this model reads 1 to {self.context_frames}: "
                    "choose some with rbm.frames.pick_frames"
                )
            for frames in shown:
                if frames is not None and id(frames) not in tensors:
                    tensors[id(frames)] = self.model.preprocess(frames)
        seen = [[None if frames is None else tensors[id(frames)] for frames in shown] for shown in views]
        return ClipBatch.from_clips([(shown, task) for shown, (_, task) in zip(seen, clips, strict=True)])

    def _portions(self, items: Sequence[_T], shown: Sequence[Sequence[Shown]], most: int) -> Iterator[list[_T]]:
        """Runs of at most `most` items whose clips fit into one forward together; at least one each."""
        portion: list[_T] = []
        taken = 0
        for item, clips in zip(items, shown, strict=True):
            arrays = [x for clip in clips for x in (clip.values() if isinstance(clip, Mapping) else [clip])]
            places = sum(len(x) * self.model.backbone.places(*x.shape[1:3]) for x in arrays if x.ndim == 4)
            if portion and (len(portion) == most or taken + places > self.forward_places):
                yield portion
                portion, taken = [], 0
            portion.append(item)
            taken += places
        if portion:
            yield portion

    def _by_view(self, shown: Shown) -> list[Frames | None]:
        """Frames of each view that the model reads, none where it is not there."""
        if not isinstance(shown, Mapping):
            return [shown]
        check_views(shown, self.views)
        return [shown.get(name) for name in self.views]

    def _forward(self, batch: ClipBatch, pairs: Tensor | None = None) -> RewardOutput:
        with torch.inference_mode():
            output: RewardOutput = self.model(batch.to(self.device), pairs)
        return output

    def _preference(self, batch: ClipBatch, pairs: Tensor) -> Tensor:
        logits = self._forward(batch, pairs).preference_logits
        assert logits is not None, "pairs were asked for"
        return logits

    def decode(self, output: RewardOutput) -> Decoded:
        """What a model said, as numbers: progress, its spread, success (and remaining seconds), float32 (F,) each."""
        with torch.inference_mode():
            progress, spread, success = (x.float().cpu().numpy() for x in self.model.decode(output))
            if not self.model.remaining:
                return progress, spread, success, None
            return progress, spread, success, self.model.decode_remaining(output)[0].cpu().numpy()


def _first(clips: Clips) -> StoredClip:
    return next(iter(clips.values()))


def _shown(clips: Clips) -> Shown:
    """Frames by the names of their views, as they are where the model has no names."""
    return _first(clips).frames if "" in clips else {name: clip.frames for name, clip in clips.items()}


def _part(clip: StoredClip, picked: NDArray[np.int64]) -> StoredClip:
    if len(picked) == len(clip.frames):
        return clip
    return replace(
        clip, frames=clip.frames[picked], frame_index=clip.frame_index[picked], timestamp=clip.timestamp[picked]
    )


def scores_of(clip: StoredClip, scored: ClipScores, task: str) -> Scores:
    """What the model said of a clip, with the times at which its frames stand in the video."""
    return Scores(
        scored.progress,
        scored.progress_std,
        scored.success,
        clip.frame_index,
        clip.timestamp,
        task,
        clip.fps,
        clip.n_frames,
        scored.remaining,
    )


def worth_of_pairs(count: int, pairs: Sequence[tuple[int, int]], better: Sequence[float]) -> list[float]:
    """For each of `count` clips its mean preference over the others (0.5 where there is none).

    `pairs` are all pairs of two of them, `better` P(first is better) of each.
    """
    if count == 1:
        return [0.5]
    worth = [0.0] * count
    for (a, b), p in zip(pairs, better, strict=True):
        worth[a] += p / (count - 1)
        worth[b] += (1 - p) / (count - 1)
    return worth


def best_first(worth: Sequence[float]) -> list[int]:
    """Positions, the largest worth first; equals keep their order."""
    return sorted(range(len(worth)), key=lambda i: -worth[i])


def check_task(task: str) -> None:
    """Raises UserError for an instruction without a word in it."""
    if not task.strip():
        raise UserError("the task (instruction) is empty; say what the robot should do, such as 'open the drawer'")


def _device(name: str | torch.device) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(f"device {str(name)!r} cannot be used here; try 'auto' or 'cpu'") from error
    return device


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Runs of at most `size` items; an iterator is only drawn from as far as needed."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
