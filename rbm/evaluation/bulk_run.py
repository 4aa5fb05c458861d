"""A run of bulk scoring from its options to its outcome: what is left to do, who does it, what came of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rbm.corpus.split import open_rows
from rbm.errors import UserError
from rbm.evaluation.bulk import Job, Tick, absolute, fingerprint, load_model, score_parts
from rbm.evaluation.bulk_folder import VERSION, Folder, Report
from rbm.evaluation.bulk_sources import CorpusSource, LeRobotSource, Source
from rbm.evaluation.lerobot import LeRobotDataset, is_lerobot
from rbm.model import RewardModel
from rbm.scoring.scorer import Scorer

PART_SIZE = 256
"""Trajectories in a part: some seconds of work, and few files for a million."""


@dataclass(frozen=True)
class Crew:
    """Who does the work.

    Attributes:
        workers: processes, each with a model of its own; none: one, with Ray one a GPU or core.
        ray: `auto`, `local` or the address of a cluster; none: on this machine, without Ray.
    """

    workers: int | None = None
    ray: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a run, earlier runs that it went on from included.

    Attributes:
        parts, kept_parts: how many there are, and were there already.
        trajectories, frames, rows: scored, and written.
        new_trajectories, new_frames: scored in this run, in `seconds`.
        several_tasks: episodes with more than one instruction, scored under the first.
        unreadable: name and reason of each trajectory that was left out.
    """

    parts: int
    kept_parts: int
    trajectories: int
    frames: int
    rows: int
    new_trajectories: int
    new_frames: int
    several_tasks: int
    unreadable: tuple[tuple[str, str], ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """JSON values; rates are those of this run."""
        seconds = max(self.seconds, 1e-9)
        return {
            "parts": self.parts,
            "kept_parts": self.kept_parts,
            "trajectories": self.trajectories,
            "frames": self.frames,
            "rows": self.rows,
            "several_tasks": self.several_tasks,
            "unreadable": [{"trajectory": name, "why": why} for name, why in self.unreadable],
            "seconds": round(self.seconds, 3),
            "trajectories_per_second": round(self.new_trajectories / seconds, 1),
            "frames_per_second": round(self.new_frames / seconds, 1),
        }


def open_source(
    place: str, snapshot: str | None = None, selection: str | None = None, view: str | None = None
) -> Source:
    """The trajectories of a corpus, or the episodes of a LeRobot data set.

    Raises:
        UserError: there is neither; no such snapshot, selection or camera; a data set that cannot be read.
    """
    if not is_lerobot(place):
        corpus, rows = open_rows(place, snapshot, selection)
        return CorpusSource(corpus, rows, view)
    if snapshot is not None or selection is not None:
        raise UserError(f"{place} is a LeRobot data set: snapshots and selections are of a corpus")
    dataset = LeRobotDataset(place)
    dataset.check()
    dataset.camera(view)
    return LeRobotSource(dataset, view)


def plan(
    source: Source,
    out: str | os.PathLike[str],
    checkpoint: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    every: int | None = None,
    size: int = PART_SIZE,
) -> tuple[Job, RewardModel]:
    """What is to be done, and the model that does it, on the CPU.

    Raises:
        UserError: there is nothing to score, a number is below 1, or the model cannot be loaded.
    """
    if not len(source):
        raise UserError("there is nothing to score: no trajectory is there, or none was selected")
    if size < 1 or (every is not None and every < 1):
        raise UserError("--every and --part-size are numbers from 1")
    model = load_model(checkpoint, dtype)
    facts = source.facts()
    asked = {**facts, "dtype": dtype, "weights": fingerprint(model), "every": every, "part_size": size}
    described = {
        "reward_model_path": checkpoint or "rbm/nano",
        "snapshot": str(facts.get("snapshot", facts.get("content"))),
        "every": "" if every is None else str(every),
        "version": str(VERSION),
    }
    folder = Folder(Path(os.path.abspath(out)), asked, described)
    return Job(source, folder, absolute(checkpoint), device, dtype, asked["weights"], every, size), model


def run(job: Job, model: RewardModel, crew: Crew, tick: Tick, retry: bool = False) -> Outcome:
    """Make the parts that are missing; with `retry` also those with trajectories that could not be read.

    Raises:
        UserError: the folder holds something else, a worker cannot go on, or no trajectory could be read.
    """
    began = time.monotonic()
    folder, joined = job.folder, job.source.joined
    with folder.held():
        folder.begin(joined)
        if others := folder.others(job.parts):
            raise UserError(f"{folder.path} holds {others[0]}, which is no part of this run: give another --out")
        kept = [
            report for part in range(job.parts) if (report := folder.report(part)) and not (retry and report.unreadable)
        ]
        for report in kept:
            tick(report.trajectories + len(report.unreadable), 0)
        done = {report.part for report in kept}
        missing = [part for part in range(job.parts) if part not in done]
        new = list(_work(job, model, crew, missing, tick)) if missing else []
        reports = sorted([*kept, *new], key=lambda report: report.part)
        outcome = _outcome(reports, new, time.monotonic() - began)
        if not outcome.trajectories:
            folder.clear(job.parts)
            name, why = outcome.unreadable[0]
            raise UserError(f"none of {len(outcome.unreadable)} could be read; the first, {name}: {why}")
        if joined is not None:
            folder.join(joined, job.parts)
        folder.conclude({name: value for name, value in outcome.to_json().items() if name in _KEPT})
    return outcome


_KEPT = ("parts", "trajectories", "frames", "rows", "several_tasks", "unreadable")
"""What stands in the folder: the same whoever did the work, and how fast."""


def _work(job: Job, model: RewardModel, crew: Crew, parts: Sequence[int], tick: Tick) -> Iterator[Report]:
    if crew.ray is not None:
        from rbm.evaluation.bulk_ray import score_with_ray

        return score_with_ray(job, crew.ray, crew.workers, parts, tick)
    if crew.workers is not None and crew.workers > 1:
        from rbm.evaluation.bulk_workers import score_in_processes

        return score_in_processes(job, crew.workers, parts, tick)
    return score_parts(job, Scorer(model, job.device), parts, tick)


def _outcome(reports: Sequence[Report], new: Sequence[Report], seconds: float) -> Outcome:
    return Outcome(
        parts=len(reports),
        kept_parts=len(reports) - len(new),
        trajectories=sum(report.trajectories for report in reports),
        frames=sum(report.frames for report in reports),
        rows=sum(report.rows for report in reports),
        new_trajectories=sum(report.trajectories for report in new),
        new_frames=sum(report.frames for report in new),
        several_tasks=sum(report.several_tasks for report in reports),
        unreadable=tuple(entry for report in reports for entry in report.unreadable),
        seconds=seconds,
    )
