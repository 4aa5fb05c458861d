"""Run a scorer over trajectories of a corpus and sum up what it says.

Trajectories are read task by task, a few at a time, each decoded once; every showing of one clip (right and
wrong instructions, other wordings, reversed, shuffled) goes to the scorer together. Only the frames of the
trajectories that stand in preference pairs are kept until their task is done, so memory does not grow with
the number of trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rbm.corpus import Corpus
from rbm.corpus.split import Split
from rbm.errors import UserError
from rbm.evaluation.baselines.clock import Clock
from rbm.evaluation.baselines.constant import Constant
from rbm.evaluation.protocols import ClipScorer, Frames, Prediction, Showing, Shown, instructions, number_of, showing
from rbm.evaluation.results import Evaluation, Preferences, Record, Result
from rbm.evaluation.strips import report_strips
from rbm.evaluation.summary import SUCCESS, summarise

CHUNK = 16  # trajectories whose frames are held at a time, besides those in pairs


@dataclass(frozen=True)
class Protocol:
    """How much is tried.

    Attributes:
        most_instructions: wrong instructions a task, same-scene ones first.
        most_in_pairs: trajectories of one task × outcome that stand in preference pairs, drawn by seed.
        draws: bootstrap draws.
        seed: of shuffles, draws and choices.
    """

    most_instructions: int = 16
    most_in_pairs: int = 16
    draws: int = 500
    seed: int = 0


def evaluate(
    scorer: ClipScorer,
    corpus: Corpus,
    rows: ArrayLike,
    allowed: Sequence[int] | None = None,
    protocol: Protocol = Protocol(),
    title: str = "evaluating",
) -> Result:
    """What `scorer` says of the trajectories `rows`, and the figures of it.

    Args:
        allowed: task numbers whose instructions may be tried as wrong ones; default: the tasks of `rows`.

    Raises:
        UserError: no trajectories to evaluate.
    """
    return evaluate_together({"": scorer}, corpus, rows, allowed, protocol, title)[""]


def evaluate_together(
    scorers: Mapping[str, ClipScorer],
    corpus: Corpus,
    rows: ArrayLike,
    allowed: Sequence[int] | None = None,
    protocol: Protocol = Protocol(),
    title: str = "evaluating",
) -> dict[str, Result]:
    """`evaluate` for several scorers that look at equally many frames; every trajectory is still decoded once."""
    numbers = np.unique(np.asarray(rows, np.int64))  # in order, so that the order given changes nothing
    if not len(numbers):
        raise UserError(f"{title}: no trajectories to evaluate; check the split (heldout_tasks, heldout_per_quality)")
    if len({scorer.context_frames for scorer in scorers.values()}) != 1:
        raise ValueError("scorers evaluated together must have the same context_frames")
    context = next(iter(scorers.values())).context_frames
    views = next((_views(scorer) for scorer in scorers.values() if _views(scorer)), ())
    task_of = corpus.columns.task[numbers]
    tries = [int(number) for number in (np.unique(task_of) if allowed is None else allowed)]

    records: dict[str, list[Record]] = {name: [] for name in scorers}
    pairs: dict[str, list[Preferences]] = {name: [] for name in scorers}
    with _bar() as bar:
        step = bar.add_task(title, total=len(numbers))
        for task in np.unique(task_of):
            members = numbers[task_of == task]
            paired = _in_pairs(corpus, members, protocol)
            first = len(next(iter(records.values())))
            kept: dict[int, Shown] = {}
            under = instructions(int(task), corpus.tasks, tries, protocol.most_instructions, protocol.seed)
            for start in range(0, len(members), CHUNK):
                clips = [
                    _show(corpus, int(row), context, under, protocol.seed, views)
                    for row in members[start : start + CHUNK]
                ]
                for name, scorer in scorers.items():
                    records[name] += _judge(scorer, clips)
                kept |= {
                    first + start + place: clip.requests[0][0] for place, clip in enumerate(clips) if clip.row in paired
                }
                bar.advance(step, len(clips))
            text = corpus.tasks[int(task)].text
            for name, scorer in scorers.items():
                pairs[name].append(_prefer(scorer, kept, records[name], text))
    results = {}
    scenes = [task.scene for task in corpus.tasks]
    for name in scorers:
        joined = _join(pairs[name])
        metrics, intervals = summarise(records[name], joined, scenes, protocol.draws, protocol.seed)
        results[name] = Result(tuple(records[name]), joined, metrics, intervals)
    return results


def evaluate_split(
    scorer: ClipScorer,
    corpus: Corpus,
    split: Split,
    protocol: Protocol = Protocol(),
    facts: Mapping[str, str] | None = None,
) -> Evaluation:
    """The whole evaluation: held-out trajectories (with clock and constant beside the model), then new tasks.

    Held-out trajectories are shown under the instructions of the tasks that are trained on; trajectories of new
    tasks under those of all tasks, since an instruction known from training is the likelier one to mislead.
    """
    n = scorer.context_frames
    scorers: dict[str, ClipScorer] = {"heldout": scorer, "clock": Clock(n), "constant": Constant(n)}
    groups = evaluate_together(scorers, corpus, split.heldout, None, protocol, "held-out trajectories")
    if len(split.newtask):
        everything = range(len(corpus.tasks))
        new = evaluate(scorer, corpus, split.newtask, everything, protocol, "new tasks")
        groups = {
            "heldout": groups["heldout"],
            "newtask": new,
            "clock": groups["clock"],
            "constant": groups["constant"],
        }
    found = Evaluation(
        tasks=tuple(task.text for task in corpus.tasks),
        scenes=tuple(task.scene for task in corpus.tasks),
        groups=groups,
        facts=dict(facts or {}),
    )
    return replace(found, strips=report_strips(found, corpus))


@dataclass(frozen=True)
class _Clip:
    """One trajectory, decoded, with every (frames, instruction) that it is shown as; the first is the plain one."""

    row: int
    record: Record  # with the predictions still empty
    requests: tuple[tuple[Shown, str], ...]


def _views(scorer: ClipScorer) -> tuple[str, ...]:
    return tuple(getattr(scorer, "views", ()))


def _seen_by(scorer: ClipScorer, shown: Shown) -> Shown:
    """A scorer that knows no views is shown the first."""
    return next(iter(shown.values())) if isinstance(shown, Mapping) and not _views(scorer) else shown


def _changed(shown: Shown, change: Callable[[Frames], Frames]) -> Shown:
    """The same done to every view."""
    if isinstance(shown, Mapping):
        return {name: np.ascontiguousarray(change(frames)) for name, frames in shown.items()}
    return np.ascontiguousarray(change(shown))


def _show(corpus: Corpus, row: int, context: int, under: NDArray[np.int64], seed: int, views: tuple[str, ...]) -> _Clip:
    columns, trajectory = corpus.columns, corpus[row]
    quality, messy = int(columns.quality[row]), bool(columns.messy[row])
    shown = showing(
        trajectory.id,
        trajectory.n_frames,
        quality,
        int(columns.done[row]),
        bool(columns.done_known[row]),
        context,
        seed,
    )
    frames: Shown
    if views:
        there = [name for name in views if name in trajectory.views]
        if not there:
            raise UserError(
                f"trajectory {trajectory.id!r} has none of the views that the model reads ({', '.join(views)}), only "
                f"{', '.join(trajectory.views)}"
            )
        frames = {name: np.ascontiguousarray(trajectory.frames(shown.frames, name)) for name in there}
    else:
        frames = np.ascontiguousarray(trajectory.frames(shown.frames))
    task = corpus.tasks[int(columns.task[row])]
    requests: list[tuple[Shown, str]] = [(frames, task.text)]
    success = quality == SUCCESS
    tried = under if success else under[:0]
    if success:
        requests += [(frames, corpus.tasks[number].text) for number in under[1:]]
        requests += [(frames, wording) for wording in _rewordings(task.text, task.paraphrases)]
    if success and not messy:
        requests.append((_changed(frames, lambda view: view[: shown.ordered][::-1]), task.text))
        requests.append((_changed(frames, lambda view: view[: shown.ordered][shown.permutation]), task.text))
    label = trajectory.progress
    empty = np.zeros(0, np.float32)
    record = Record(
        id=trajectory.id,
        task=int(columns.task[row]),
        quality=quality,
        messy=messy,
        ordered=shown.ordered,
        frames=shown.frames.astype(np.int32),
        time=trajectory.timestamp[shown.frames],
        label=empty if label is None else label[shown.frames],
        done=shown.done,
        progress=empty,
        spread=empty,
        success=empty,
        backward=empty,
        shuffled=empty,
        permutation=_permutation(shown, success and not messy),
        instructions=tried.astype(np.int32),
        final_under=empty,
        misled=empty,
        rephrased=empty,
    )
    return _Clip(row, record, tuple(requests))


def _judge(scorer: ClipScorer, clips: Sequence[_Clip]) -> list[Record]:
    answers = scorer.predict([(_seen_by(scorer, shown), task) for clip in clips for shown, task in clip.requests])
    said = iter(answers)
    return [_fill(clip.record, [next(said) for _ in clip.requests]) for clip in clips]


def _fill(record: Record, said: Sequence[Prediction]) -> Record:
    """The record with the answers to its requests, which come in the order in which `_show` made them."""
    answers: Iterator[Prediction] = iter(said)
    plain = next(answers)
    wrong = [next(answers).progress for _ in record.instructions[1:]]
    backward = shuffled = np.zeros(0, np.float32)
    rest = list(answers)
    if len(record.permutation):
        backward, shuffled = (answer.progress for answer in rest[-2:])
        rest = rest[:-2]
    finals = [plain.progress[-1], *(curve[-1] for curve in wrong)] if len(record.instructions) else []
    return replace(
        record,
        progress=plain.progress,
        spread=plain.progress_std,
        success=plain.success,
        backward=backward,
        shuffled=shuffled,
        final_under=np.array(finals, np.float32),
        misled=max(wrong, key=lambda curve: float(curve[-1])) if wrong else np.zeros(0, np.float32),
        rephrased=np.array([answer.progress[-1] for answer in rest], np.float32),
    )


def _prefer(scorer: ClipScorer, kept: Mapping[int, Shown], records: Sequence[Record], text: str) -> Preferences:
    """All pairs of kept clips of one task whose outcomes differ, the better and the worse in hashed order."""
    better, worse = [], []
    for a in kept:
        for b in kept:
            if records[a].quality < records[b].quality:
                better.append(a)
                worse.append(b)
    # Half of the pairs are asked the other way round, so that a bias towards the first shows as what it is.
    swapped = [number_of(f"{records[a].id} {records[b].id}") % 2 == 1 for a, b in zip(better, worse, strict=True)]
    asked = [(b, a) if swap else (a, b) for a, b, swap in zip(better, worse, swapped, strict=True)]
    seen = {number: _seen_by(scorer, shown) for number, shown in kept.items()}
    said = scorer.prefer([(seen[first], seen[second], text) for first, second in asked]) if asked else np.zeros(0)
    probability = np.where(swapped, 1 - np.asarray(said), said).astype(np.float32)
    return Preferences(np.array(better, np.int32), np.array(worse, np.int32), probability)


def _join(parts: Sequence[Preferences]) -> Preferences:
    return Preferences(
        np.concatenate([part.better for part in parts]),
        np.concatenate([part.worse for part in parts]),
        np.concatenate([part.probability for part in parts]),
    )


def _in_pairs(corpus: Corpus, members: NDArray[np.int64], protocol: Protocol) -> set[int]:
    """The trajectories of one task that stand in pairs: at most so many of each outcome, the same in every run."""
    chosen: set[int] = set()
    quality = corpus.columns.quality[members]
    for rank in np.unique(quality):
        rows = members[quality == rank]
        if len(rows) > protocol.most_in_pairs:
            text = corpus.tasks[int(corpus.columns.task[members[0]])].text
            rng = np.random.default_rng([protocol.seed, number_of(text), int(rank)])
            rows = rng.choice(rows, protocol.most_in_pairs, replace=False)
        chosen |= {int(row) for row in rows}
    return chosen


def _rewordings(text: str, paraphrases: Sequence[str]) -> list[str]:
    return [wording for wording in paraphrases if wording != text]


def _permutation(shown: Showing, applies: bool) -> NDArray[np.int32]:
    return shown.permutation.astype(np.int32) if applies else np.zeros(0, np.int32)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True
    )
