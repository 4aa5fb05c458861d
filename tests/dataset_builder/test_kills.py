"""A build by several writers, killed again and again, comes to the corpus that an unbroken one makes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from test_pipeline import Slides, contents

from dataset_builder.pipeline import build
from rbm.corpus import Corpus
from rbm.errors import UserError

KILLS = 50
_BUILD = """
import sys
from dataset_builder.pipeline import build
from test_kills import source
if __name__ == "__main__":
    build(source(), sys.argv[1], workers=2, commit_every=4, progress=False)
"""


def source() -> Slides:
    return Slides(n_units=40, per_unit=8, seconds=0.0005)


def test_fifty_kills_lose_and_double_nothing(tmp_path):
    build(source(), tmp_path / "unbroken", workers=1, progress=False)
    expected = contents(tmp_path / "unbroken")
    assert len(expected) == 280
    script = tmp_path / "script.py"
    script.write_text(_BUILD)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    rng = np.random.default_rng(0)
    kills = finished = 0
    place = tmp_path / "broken-0"
    while kills < KILLS or not finished:
        process = subprocess.Popen(
            [sys.executable, str(script), str(place)], env=environment, stderr=subprocess.PIPE, start_new_session=True
        )
        if kills < KILLS:
            _wait_until_it_writes(process, place)
            time.sleep(float(rng.uniform(0, 0.7)))
        alone = kills >= KILLS or process.poll() is not None
        if not alone and rng.random() < 0.5:
            os.killpg(process.pid, signal.SIGKILL)  # the machine goes down
        elif not alone:
            process.kill()  # the coordinator alone: its workers must end by themselves
        _, errors = process.communicate(timeout=120)  # the pipe closes when the last worker is gone
        kills += not alone
        if alone:
            assert process.returncode == 0, errors.decode()
            assert contents(place) == expected
            finished += 1
            place = tmp_path / f"broken-{finished}"
        else:
            seen = _contents_so_far(place)
            assert seen == expected[: len(seen)]
    orphans = _orphans(tmp_path / f"broken-{finished - 1}")
    assert orphans == 0, "a writer that starts after a dead one collects what that left"


def _wait_until_it_writes(process: subprocess.Popen, place: Path) -> None:
    """Until it has taken the lock (before that nothing happens), or ended."""
    lock = place.with_name(f".{place.name}.writer.lock")
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(FileNotFoundError):  # it may be done, and the lock gone, between any two looks
            if lock.read_text().strip() == str(process.pid):
                return
        time.sleep(0.01)


def _contents_so_far(place: Path) -> list[tuple[str, bytes]]:
    try:
        return contents(place)
    except UserError as error:
        assert "nothing has been committed" in str(error) or "holds no corpus" in str(error)  # noqa: PT017
        return []


def _orphans(place: Path) -> int:
    """Chunk files that no snapshot knows, found by Icechunk itself."""
    from datetime import UTC, datetime

    from rbm.corpus import store

    repository = store.open_repository(Corpus.open(place).location)
    return repository.garbage_collect(datetime.now(UTC), dry_run=True).chunks_deleted
