import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_builder.pipeline import build
from dataset_builder.sources.base import Episode, Skipped
from rbm.corpus import Corpus, store
from rbm.corpus.location import Location
from rbm.errors import UserError
from rbm.trajectory import Quality, Task, Trajectory


@dataclass
class Slides:
    """Little clips of a sliding bar; the first units take longest, so that workers finish out of order."""

    n_units: int = 5
    per_unit: int = 4
    seconds: float = 0.0
    refuse: str | None = None
    die: str | None = None
    name: str = "slides"

    def source_facts(self) -> dict[str, Any]:
        return {"name": self.name, "completion": 0.8, "licence": "MIT"}

    def tasks(self) -> list[Task]:
        return [Task("slide the bar", scene="bar", paraphrases=("move the bar",))]

    def units(self) -> list[str]:
        return [f"unit-{number}" for number in range(self.n_units)]

    def collect(self, unit: str, skip: Container[str]) -> Iterator[Episode | Skipped]:
        place = int(unit.split("-")[1])
        for number in range(self.per_unit):
            time.sleep(self.seconds * (self.n_units - place))
            id = f"{self.name}/{place}/{number}"
            if id == self.refuse:
                raise UserError(f"{id}: can not be used")
            if id == self.die:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == 2:
                yield Skipped(id, "every third is out of focus")
            elif id not in skip:
                yield self._episode(id, np.random.default_rng([place, number]))

    def _episode(self, id: str, rng: np.random.Generator) -> Episode:
        frames = np.full((5, 20, 30, 3), rng.integers(0, 255), np.uint8)
        for t, frame in enumerate(frames):
            frame[:, 5 * t : 5 * t + 4] = rng.integers(0, 255, 3)
        record = Trajectory(
            id=id,
            task="slide the bar",
            source=self.name,
            quality=list(Quality)[int(rng.integers(3))],
            frame_index=np.arange(5),
            timestamp=np.arange(5) / 10,
            fps=10.0,
            height=20,
            width=30,
        )
        return Episode(record, {"main": frames}, {"action": rng.normal(size=(5, 2))})


def contents(path: Path) -> list[tuple[str, bytes]]:
    corpus = Corpus.open(path)
    return [(id, corpus.payload(row).data.tobytes()) for row, id in enumerate(corpus.ids)]


EXPECTED = [f"slides/{unit}/{number}" for unit in range(5) for number in (0, 1, 3)]


def test_the_same_corpus_with_any_number_of_workers(tmp_path):
    one = build(Slides(), tmp_path / "one", workers=1, progress=False)
    three = build(Slides(seconds=0.01), tmp_path / "three", workers=3, commit_every=2, progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert [id for id, _ in contents(tmp_path / "one")] == EXPECTED
    assert one.added == three.added
    assert sum(one.added.values()) == 15
    assert one.present == 0
    assert [item.what for item in three.skipped] == [f"slides/{unit}/2" for unit in range(5)]
    corpus = Corpus.open(tmp_path / "three", three.snapshot)
    assert tuple(corpus.tasks) == tuple(Slides().tasks())
    assert corpus.sources["slides"].completion == 0.8
    assert corpus.sources["slides"].facts == {"licence": "MIT"}


def test_a_refusal_keeps_what_came_before_and_the_next_call_goes_on(tmp_path):
    with pytest.raises(UserError, match="slides/3/1: can not be used"):
        build(Slides(refuse="slides/3/1"), tmp_path / "c", workers=2, progress=False)
    kept = [id for id, _ in contents(tmp_path / "c")]
    assert kept == EXPECTED[: EXPECTED.index("slides/3/1")]
    summary = build(Slides(), tmp_path / "c", workers=2, progress=False)
    assert [id for id, _ in contents(tmp_path / "c")] == EXPECTED
    assert summary.present == len(kept)
    assert sum(summary.added.values()) == len(EXPECTED) - len(kept)
    again = build(Slides(), tmp_path / "c", progress=False)
    assert again.added == {}
    assert again.snapshot == summary.snapshot


def test_a_dead_worker_is_named_with_its_unit(tmp_path):
    with pytest.raises(UserError, match=r"worker 0 died by signal 9.*unit 'unit-2'.*run the same command again"):
        build(Slides(die="slides/2/0"), tmp_path / "c", workers=1, commit_every=1, progress=False)
    assert [id for id, _ in contents(tmp_path / "c")] == EXPECTED[:6]


def test_no_workers_is_refused(tmp_path):
    with pytest.raises(UserError, match="workers=0"):
        build(Slides(), tmp_path / "c", workers=0)
    assert not (tmp_path / "c").exists()


def test_the_summary_counts_by_outcome_and_reason(tmp_path, capsys):
    build(Slides(), tmp_path / "c")
    shown = capsys.readouterr().err
    for words in ("added, successful", "there before, kept as they were", "skipped: every third is out of focus"):
        assert words in shown


_BUILD = """
import sys
from dataset_builder.pipeline import build
from test_pipeline import Slides
if __name__ == "__main__":
    build(Slides(n_units=40, seconds=0.001), sys.argv[1], workers=1, commit_every=5, progress=False)
"""


def test_ctrl_c_leaves_a_corpus_that_resumes_and_no_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_BUILD)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "c")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not _committed(tmp_path / "c") and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    # Returns when the last process that holds the other end is gone: no worker is left behind.
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "run the same command again to go on" in errors
    kept = contents(tmp_path / "c")
    assert 5 <= len(kept) < 120
    build(Slides(n_units=40), tmp_path / "c", progress=False)
    build(Slides(n_units=40), tmp_path / "unbroken", progress=False)
    assert contents(tmp_path / "c") == contents(tmp_path / "unbroken")
    assert contents(tmp_path / "c")[: len(kept)] == kept


def _committed(path: Path) -> bool:
    chunks = path / "chunks"
    return chunks.is_dir() and len(list((path / "snapshots").iterdir())) > 2  # one of them is the empty beginning


@dataclass
class Uneven(Slides):
    """The first unit takes for ever."""

    slow: float = 0.0

    def collect(self, unit: str, skip: Container[str]) -> Iterator[Episode | Skipped]:
        for item in super().collect(unit, skip):
            time.sleep(self.slow if unit == "unit-0" else 0)
            yield item


def _run(source: str, place: Path, **options: str) -> subprocess.Popen:
    code = f"""
import sys
from dataset_builder.pipeline import build
from test_pipeline import *
if __name__ == "__main__":
    build({source}, sys.argv[1], progress=False, **{options!r})
"""
    script = place.with_suffix(".py")
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, str(script), str(place)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _dead_bytes(path: Path) -> int:
    """Bytes of segments that belong to no trajectory."""
    corpus = Corpus.open(path)
    sizes = store.segment_sizes(store.open_repository(corpus.location), corpus.location, corpus.snapshot)
    return sum(sizes.values()) - int(corpus.columns.length.sum())


def test_what_runs_ahead_of_a_slow_unit_is_bounded_and_leaves_no_dead_bytes(tmp_path):
    process = _run("Uneven(n_units=60, slow=1.5)", tmp_path / "c", workers=2, commit_every=2)
    deadline = time.monotonic() + 60
    chunks = tmp_path / "c" / "chunks"
    while time.monotonic() < deadline and not (chunks.is_dir() and len(list(chunks.iterdir())) > 20):
        time.sleep(0.1)
    time.sleep(0.5)
    ahead = len(list(chunks.iterdir()))
    assert ahead < 60  # eight units of two segments each at most, and the index
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "run the same command again to go on" in errors
    assert "Traceback" not in errors.split("KeyboardInterrupt")[0] or process.returncode != 0
    build(Uneven(n_units=60), tmp_path / "c", workers=2, progress=False)
    build(Uneven(n_units=60), tmp_path / "unbroken", progress=False)
    assert contents(tmp_path / "c") == contents(tmp_path / "unbroken")
    assert _dead_bytes(tmp_path / "c") == 0
    left = store.open_repository(Location.parse(tmp_path / "c")).garbage_collect(datetime.now(UTC), dry_run=True)
    assert left.chunks_deleted == 0


@dataclass
class Doubled(Slides):
    """The third unit gives an id of the first again."""

    def collect(self, unit: str, skip: Container[str]) -> Iterator[Episode | Skipped]:
        for item in super().collect(unit, skip):
            if unit == "unit-2" and isinstance(item, Episode) and item.trajectory.id.endswith("/1"):
                record = replace(item.trajectory, id="slides/0/0")
                item = Episode(record, item.frames, item.arrays)
            yield item


def test_a_refused_trajectory_keeps_all_before_it_and_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="'slides/0/0' is already in the corpus"):
        build(Doubled(), tmp_path / "c", workers=2, progress=False)
    assert [id for id, _ in contents(tmp_path / "c")] == EXPECTED[:7]


def test_a_disk_that_is_full_for_a_worker_is_said_and_loses_nothing(tmp_path):
    build(Slides(n_units=2), tmp_path / "c", progress=False)
    before = contents(tmp_path / "c")
    process = _run("Full(n_units=9)", tmp_path / "c", workers=2, commit_every=2)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "writing failed" in errors
    assert "exit code" not in errors
    assert contents(tmp_path / "c")[: len(before)] == before
    build(Slides(n_units=9), tmp_path / "c", progress=False)
    build(Slides(n_units=9), tmp_path / "unbroken", progress=False)
    assert contents(tmp_path / "c") == contents(tmp_path / "unbroken")


@dataclass
class Full(Slides):
    """In its process no file may grow beyond a few bytes, as on a full disk."""

    def collect(self, unit: str, skip: Container[str]) -> Iterator[Episode | Skipped]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 10, resource.RLIM_INFINITY))
        yield from super().collect(unit, skip)


@dataclass
class Stillborn(Slides):
    """Can not be made in a worker."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        os._exit(3)


def test_a_worker_that_dies_at_its_start_is_named(tmp_path):
    with pytest.raises(UserError, match=r"worker \d died with exit code 3"):
        build(Stillborn(), tmp_path / "c", workers=2, progress=False)
