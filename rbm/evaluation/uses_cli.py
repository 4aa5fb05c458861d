"""`rbm detect`, `rbm retrieve`, `rbm filter`: other uses of the score than reward."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rbm.corpus import Corpus, Selection
from rbm.errors import UserError
from rbm.evaluation.attempts import (
    ScoredAttempt,
    find_videos,
    is_scores,
    read_attempts,
    read_manifest,
    score_videos,
    scored_folder,
    with_outcomes,
)
from rbm.evaluation.bulk import Tick
from rbm.evaluation.bulk_sources import CorpusSource
from rbm.evaluation.detection import (
    CorrelationDetector,
    Detector,
    FailureDetector,
    FailureLimits,
    calibrate_failures,
    first_alarm,
)
from rbm.evaluation.detection_results import Detection, evaluate_detection, evaluate_success_detection
from rbm.evaluation.filtering import evaluate_filter, filter_trajectories
from rbm.evaluation.retrieval import By, QuerySource, near_tasks, read_pool, retrieve
from rbm.evaluation.successes import SuccessRule, detect_successes
from rbm.output import check_target, whole_file
from rbm.scoring.scorer import Scorer, check_task
from rbm.scoring.vote import parse_vote

_ROWS = 20
"""Rows of a printed table; --json has them all."""

_F = TypeVar("_F", bound=Callable[..., Any])


def _options(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    def add(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


_checkpoint = click.option(
    "--checkpoint",
    help="A trained model: folder, file, or id on the Hugging Face hub; without it, the nano weights shipped here.",
)
_device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
_workers = click.option("--workers", type=click.IntRange(min=1), help="Processes that score a corpus.")
_json = click.option("--json", "json_path", metavar="FILE", help="Write everything as JSON; - is the standard output.")
_source = _options(
    click.argument("source"),
    click.option("--task", help="The instruction; needed for videos. Of a corpus, only attempts at it."),
    click.option("--corpus", "corpus_place", help="Where SOURCE is a folder of scores: its corpus, for true outcomes."),
    click.option(
        "--scores",
        type=click.Path(path_type=Path, file_okay=False),
        help="Where SOURCE is a corpus: a folder of its scores. What is missing in it is scored; without it, all is.",
    ),
    click.option(
        "--every",
        type=click.IntRange(min=1),
        help="Score every k-th frame as a live session would; by default of a corpus every stored one, of a video 64.",
    ),
    _checkpoint,
    _device,
    _workers,
    _json,
)
_limits = click.option("--limits", type=click.Path(path_type=Path), help="What `rbm detect calibrate` has written.")
_vote = click.option("--vote", default="3/5", show_default=True, metavar="K/N", help="Done: K of the last N frames.")
_threshold = click.option(
    "--threshold", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="… reach this success probability."
)


@click.group(short_help="Failures and successes noticed while a policy runs.")
def detect() -> None:
    """Failures and successes, noticed frame by frame.

    SOURCE is a video, a folder of videos, a corpus, or a folder of scores (`rbm score --corpus`). Where the true
    outcomes are known, what was noticed is compared with them.
    """


@detect.command(short_help="When does it look like a failure?")
@_source
@_limits
@click.option(
    "--window", type=click.IntRange(min=2), default=7, show_default=True, help="Frames, of the recipe without --limits."
)
@click.option(
    "--below", type=click.FloatRange(-1, 1), default=-0.5, show_default=True, help="Correlation, of the same recipe."
)
def failures(
    source: str,
    task: str | None,
    corpus_place: str | None,
    scores: Path | None,
    every: int | None,
    checkpoint: str | None,
    device: str,
    workers: int | None,
    json_path: str | None,
    limits: Path | None,
    window: int,
    below: float,
) -> None:
    """The moment of each attempt at which a failure alarm goes off, and why.

    With --limits: behind what successes of the task have reached by then, a stall, or a fall. Without: where progress
    falls with time (correlation over a window), which needs no calibration and is much worse.

    \b
    Examples:
      rbm detect failures attempt.mp4 --task "open the drawer"
      rbm detect failures runs/videos --task "open the drawer" --limits limits.json --json alarms.json
      rbm detect failures data/rollouts --limits limits.json --scores rollout_scores
      rbm detect failures rollout_scores --corpus data/rollouts --limits limits.json
    """
    _check_json(json_path, source)
    known = None if limits is None else FailureLimits.load(limits)
    attempts = _attempts(source, task, corpus_place, scores, every, checkpoint, device, workers)
    out = Console(stderr=json_path == "-")
    alarms: list[float | None] = []
    why: list[str] = []
    for attempt in attempts:
        detector: Detector = CorrelationDetector(window, below)
        if known is not None:
            detector = FailureDetector(known, attempt.task)
        alarms.append(first_alarm(detector, attempt))
        why.append((detector.alarm or "") if isinstance(detector, FailureDetector) else "")
        if alarms[-1] is not None and known is None:
            why[-1] = "correlation"
    found = evaluate_detection(attempts, alarms) if _known(attempts) else None
    _show(out, attempts, alarms, "alarm s", why, found)
    entries = [
        {**_entry(attempt), "alarm": alarm, "sign": sign or None}
        for attempt, alarm, sign in zip(attempts, alarms, why, strict=True)
    ]
    _write_json(json_path, {"attempts": entries, "evaluation": None if found is None else found.to_json()}, out)


@detect.command(short_help="When does it look done?")
@_source
@_limits
@_vote
@_threshold
def success(
    source: str,
    task: str | None,
    corpus_place: str | None,
    scores: Path | None,
    every: int | None,
    checkpoint: str | None,
    device: str,
    workers: int | None,
    json_path: str | None,
    limits: Path | None,
    vote: str,
    threshold: float,
) -> None:
    """The moment of each attempt from which on it counts as done, by a vote over frames.

    With --limits the vote that calibration has chosen for the task, else --vote and --threshold.

    \b
    Examples:
      rbm detect success attempt.mp4 --task "open the drawer" --vote 2/3
      rbm detect success data/rollouts --limits limits.json --json done.json
    """
    _check_json(json_path, source)
    rule = SuccessRule(*parse_vote(vote), threshold)
    rules = None if limits is None else FailureLimits.load(limits).done
    attempts = _attempts(source, task, corpus_place, scores, every, checkpoint, device, workers)
    out = Console(stderr=json_path == "-")
    said = detect_successes(attempts, rule if rules is None else rules)
    found = evaluate_success_detection(attempts, said) if _known(attempts) else None
    _show(out, attempts, said, "done s", None, found)
    entries = [{**_entry(attempt), "detected": at} for attempt, at in zip(attempts, said, strict=True)]
    _write_json(json_path, {"attempts": entries, "evaluation": None if found is None else found.to_json()}, out)


@detect.command(short_help="Limits for `failures` and votes for `success`, from attempts with known outcomes.")
@_source
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File for the limits, JSON.")
@click.option(
    "--false-alarms",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of successes that may be alarmed, where no failures are there to choose by.",
)
def calibrate(
    source: str,
    task: str | None,
    corpus_place: str | None,
    scores: Path | None,
    every: int | None,
    checkpoint: str | None,
    device: str,
    workers: int | None,
    json_path: str | None,
    out: Path,
    false_alarms: float,
) -> None:
    """Learn from attempts with known outcomes when to give alarm, and when a task counts as done.

    A task needs at least four successes; failures make the choice better. Give attempts that nothing is measured on
    later.

    \b
    Examples:
      rbm detect calibrate data/calibration --out limits.json
      rbm detect calibrate calibration_scores --corpus data/calibration --out limits.json
    """
    check_target(out, (".json",), [source])
    _check_json(json_path, source)
    attempts = _attempts(source, task, corpus_place, scores, every, checkpoint, device, workers)
    limits = calibrate_failures(attempts, false_alarms)
    limits.save(out)
    console = Console(stderr=json_path == "-")
    table = Table(header_style="dim")
    for name in ("task", "successes", "usual s", "done when"):
        table.add_column(name, justify="left" if name in ("task", "done when") else "right")
    for text, band in limits.bands.items():
        rule = limits.done[text]
        when = f"{rule.of} ≥ {rule.threshold:.2f} in {rule.k} of {rule.n}"
        table.add_row(Text(text), str(band.count), f"{band.usual:.2f}", when)
    console.print(table)
    signs = {name: getattr(limits, name) for name in ("behind", "stall", "fall")}
    told = ", ".join(f"{name} > {value:.2f}" for name, value in signs.items() if value != float("inf"))
    console.print(f"alarm: {told or 'never'}; limits: {out}", highlight=False, markup=False, soft_wrap=True)
    facts = {name: None if value == float("inf") else round(value, 4) for name, value in signs.items()}
    facts_done = {text: vars(rule) for text, rule in limits.done.items()}
    _write_json(json_path, {"limits": str(out), **facts, "alphas": limits.alphas, "done": facts_done}, console)


@click.command("retrieve", short_help="From a large pool the trajectories that help a task.")
@click.argument("corpus")
@click.option("--task", required=True, help="The instruction that they shall help.")
@click.option("-k", "--k", type=click.IntRange(min=1), default=50, show_default=True, help="How many.")
@click.option(
    "--by", type=click.Choice(get_args(By)), default="value", show_default=True, help="What they are ordered by."
)
@click.option(
    "--near",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Only what is filed under the so many instructions nearest in words; 0: all, whatever it is filed under.",
)
@click.option("--snapshot", help="An older snapshot, by its id or tag; the newest by default.")
@click.option(
    "--scores",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the scores under this instruction: what is missing in it is scored, the rest is read.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Ids, one a line (for rbm corpus select --ids-from).")
@_checkpoint
@_device
@_workers
@_json
def retrieve_command(
    corpus: str,
    task: str,
    k: int,
    by: By,
    near: int,
    snapshot: str | None,
    scores: Path | None,
    out: Path | None,
    checkpoint: str | None,
    device: str,
    workers: int | None,
    json_path: str | None,
) -> None:
    """The K trajectories of CORPUS that best show TASK done, by the model's scores of their videos under TASK.

    What they are filed under serves as a filter only (--near); true outcomes are not looked at, but compared with.

    \b
    Examples:
      rbm retrieve data/pool --task "open the drawer" --k 50 --out ids.txt
      rbm retrieve data/pool --task "pull the drawer open" --near 0 --by utility --json found.json
    """
    check_task(task)
    _check_json(json_path, corpus)
    if out is not None:
        check_target(out)
    opened = Corpus.open(corpus, snapshot)
    rows = near_tasks(opened, task, near) if near else None
    source = QuerySource(opened, rows, None, task)
    if k > len(source):
        raise UserError(f"k={k} is more than the pool holds: {len(source)} trajectories are left; give a smaller --k")
    with (
        _bar(len(source), "scoring") as tick,
        scored_folder(source, scores, tick, checkpoint, device, None, workers) as folder,
    ):
        pool = read_pool(folder)
    found = retrieve(pool, opened, k, by)
    console = Console(stderr=json_path == "-")
    console.print(found.table(_ROWS))
    if found.precision is not None:
        console.print(f"{found.precision:.0%} are successes of this task; the pool of {found.of} has {found.relevant}")
    if out is not None:
        _write_ids(out, found.ids, console)
    _write_json(json_path, found.to_json(), console)


@click.command("filter", short_help="Which attempts a policy should be cloned from.")
@_source
@click.option("--out", type=click.Path(path_type=Path), help="Ids, one a line; or .json, .json.gz: a saved selection.")
@click.option(
    "--keep",
    default="successes",
    show_default=True,
    help="successes: what counts as done; or a share such as 0.3: of each task the best.",
)
@click.option(
    "--min-worth", type=click.FloatRange(0, 1), help="Only those that end so well (mean of progress and success)."
)
@_vote
@_threshold
def filter_command(
    source: str,
    task: str | None,
    corpus_place: str | None,
    scores: Path | None,
    every: int | None,
    checkpoint: str | None,
    device: str,
    workers: int | None,
    json_path: str | None,
    out: Path | None,
    keep: str,
    min_worth: float | None,
    vote: str,
    threshold: float,
) -> None:
    """Attempts worth imitating, by the model's scores alone: a list of ids, or a selection to train on.

    \b
    Examples:
      rbm filter data/mixed --out good.json
      rbm filter data/mixed --keep 0.3 --out ids.txt
      rbm corpus select data/mixed --ids-from ids.txt -o good.json
    """
    _check_json(json_path, source)
    wanted: Any = keep
    if keep != "successes":
        try:
            wanted = float(keep)
        except ValueError as error:
            raise UserError(f"--keep {keep}: give successes, or a share such as 0.3") from error
    if out is not None:
        check_target(out)
        if (
            out.name.endswith((".json", ".json.gz"))
            and corpus_place is None
            and (is_scores(Path(source)) or find_videos(Path(source)))
        ):
            raise UserError(f"--out {out} is a selection of a corpus: say which with --corpus, or give a .txt")
    rule = SuccessRule(*parse_vote(vote), threshold)
    attempts = _attempts(source, task, corpus_place, scores, every, checkpoint, device, workers)
    kept = filter_trajectories(attempts, wanted, rule, min_worth)
    found = evaluate_filter(attempts, kept)
    console = Console(stderr=json_path == "-")
    console.print(f"{len(kept)} of {len(attempts)} attempts are kept", highlight=False)
    if found is not None:
        facts = found.to_json()
        after = "none" if found.kept == 0 else f"{facts['successful_after']:.0%}"
        console.print(
            f"successes: {facts['successful_before']:.0%} before, {after} of what is kept; "
            f"{found.kept_successes} of {found.successes} successes are kept",
            highlight=False,
        )
    if out is not None and out.name.endswith((".json", ".json.gz")):
        opened = Corpus.open(source if corpus_place is None else corpus_place)
        if not kept:
            raise UserError(f"nothing is kept, so {out} is not written")
        Selection.of(opened, [attempt.row for attempt in kept], {"keep": keep, "min_worth": min_worth}).save(out)
        console.print(f"selection: {out}", highlight=False, markup=False, soft_wrap=True)
    elif out is not None:
        _write_ids(out, [attempt.id for attempt in kept], console)
    content = {"ids": [attempt.id for attempt in kept], "of": len(attempts), "keep": wanted, "min_worth": min_worth}
    _write_json(json_path, {**content, "evaluation": None if found is None else found.to_json()}, console)


def _attempts(
    source: str,
    task: str | None,
    corpus_place: str | None,
    scores: Path | None,
    every: int | None,
    checkpoint: str | None,
    device: str,
    workers: int | None,
) -> list[ScoredAttempt]:
    """What SOURCE stands for, scored."""
    place = Path(source)
    if is_scores(place):
        attempts = read_attempts(place)
        if corpus_place is not None:
            attempts = with_outcomes(attempts, Corpus.open(corpus_place, read_manifest(place)["asked"]["snapshot"]))
        return _of_task(attempts, task, source)
    if videos := find_videos(place):
        if task is None:
            raise UserError("videos have no instruction of their own: say what the robot should do with --task")
        check_task(task)
        scorer = Scorer.from_pretrained(checkpoint, device)
        found = []
        with _bar(len(videos), "scoring") as tick:
            for attempt in score_videos(scorer, videos, task, every):
                found.append(attempt)
                tick(1, len(attempt))
        return found
    if place.is_dir() and not any(place.iterdir()):
        raise UserError(f"{source} is empty: give a video, a folder of videos, a corpus or a folder of scores")
    corpus = Corpus.open(source)
    rows = None if task is None or scores is not None else corpus.select(task=task)
    bulk = CorpusSource(corpus, rows)
    with (
        _bar(len(bulk), "scoring") as tick,
        scored_folder(bulk, scores, tick, checkpoint, device, every or 1, workers) as folder,
    ):
        attempts = read_attempts(folder)
    return _of_task(with_outcomes(attempts, corpus), task, source)


def _of_task(attempts: list[ScoredAttempt], task: str | None, source: str) -> list[ScoredAttempt]:
    found = attempts if task is None else [attempt for attempt in attempts if attempt.task == task]
    if not found:
        there = ", ".join(sorted({repr(attempt.task) for attempt in attempts}))
        raise UserError(f"{source} has no attempt at {task!r}, only at {there}")
    return found


def _known(attempts: Sequence[ScoredAttempt]) -> bool:
    return all(attempt.succeeded is not None for attempt in attempts)


def _show(
    out: Console,
    attempts: Sequence[ScoredAttempt],
    times: Sequence[float | None],
    name: str,
    why: Sequence[str] | None,
    found: Detection | None,
) -> None:
    """A row an attempt, and what came of it."""
    table = Table(header_style="dim")
    table.add_column("attempt", overflow="fold")
    for column in ("length s", name):
        table.add_column(column, justify="right")
    if why is not None:
        table.add_column("sign")
    if found is not None:
        table.add_column("outcome")
    for n, attempt in enumerate(attempts[:_ROWS]):
        at = times[n]
        row = [f"{attempt.time[-1] - attempt.time[0]:.2f}", "–" if at is None else f"{at:.2f}"]
        row += [] if why is None else [why[n]]
        row += [] if found is None else ["success" if attempt.succeeded else "failure"]
        table.add_row(Text(attempt.id), *row)
    if len(attempts) > _ROWS:
        table.caption = f"{_ROWS} of {len(attempts)}; --json keeps all"
    out.print(table)
    if found is not None:
        out.print(found.table())


def _entry(attempt: ScoredAttempt) -> dict[str, Any]:
    return {"id": attempt.id, "task": attempt.task, "succeeded": attempt.succeeded, "done": attempt.done}


def _check_json(json_path: str | None, source: str) -> None:
    if json_path not in (None, "-"):
        check_target(Path(str(json_path)), (), [source])


def _write_json(json_path: str | None, content: dict[str, Any], out: Console) -> None:
    if json_path is None:
        return
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if json_path == "-":
        sys.stdout.write(text)
        return
    with whole_file(Path(json_path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    out.print(f"json: {json_path}", highlight=False, markup=False, soft_wrap=True)


def _write_ids(target: Path, ids: Sequence[str], out: Console) -> None:
    with whole_file(target) as temporary:
        temporary.write_text("".join(f"{id}\n" for id in ids), encoding="utf-8")
    out.print(f"ids: {target}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _bar(total: int, title: str) -> Iterator[Tick]:
    """A bar that is told of trajectories and frames, where somebody can see it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda trajectories, frames: progress.advance(task, trajectories)
