import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier, Thread

import pytest
from s3_server import S3

from rbm.corpus import lock
from rbm.corpus.location import Location
from rbm.corpus.lock import WriterLock
from rbm.errors import UserError

HOLD = """
import sys
from rbm.corpus.location import Location
from rbm.corpus.lock import WriterLock
with WriterLock(Location.parse(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["disk", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "disk":
        return Location.parse(tmp_path / "corpus")
    return Location.parse(request.getfixturevalue("s3").place())


@contextmanager
def held_elsewhere(location: Location) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(location)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def lease(location: Location) -> Location:
    return location.sibling(f".{location.name}.writer.lock")


def test_a_second_writer_is_refused_and_told_who_holds_it(location: Location) -> None:
    with WriterLock(location), pytest.raises(UserError, match=rf"pid {os.getpid()}\b.* is writing to it"):
        WriterLock(location).acquire()
    with WriterLock(location) as again:
        assert not again.predecessor_died
        again.check()


def test_another_process_is_refused_until_it_ends(location: Location) -> None:
    with held_elsewhere(location) as process:
        with pytest.raises(UserError, match=f"pid {process.pid}"):
            WriterLock(location).acquire()
        process.communicate()  # its standard input ends: it releases the lock
    with WriterLock(location) as mine:
        assert not mine.predecessor_died


def test_the_lock_of_a_dead_process_is_free_at_once(location: Location) -> None:
    with held_elsewhere(location) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with WriterLock(location) as mine:
            assert mine.predecessor_died
    with WriterLock(location) as mine:
        assert not mine.predecessor_died


def test_of_many_at_once_one_gets_it(location: Location) -> None:
    barrier = Barrier(6)
    got: list[WriterLock] = []

    def attempt() -> None:
        mine = WriterLock(location)
        barrier.wait()
        try:
            mine.acquire()
        except UserError:
            return
        got.append(mine)

    threads = [Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].release()


def test_nothing_is_left(location: Location, tmp_path: Path) -> None:
    with WriterLock(location):
        pass
    if location.local is None:
        assert not location.objects(5).list(location.path.rpartition("/")[0]).collect()
    else:
        assert not list(tmp_path.iterdir())


def test_a_lock_that_can_not_be_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can not be made \(.*\.c\.writer\.lock: No such file.* .*/none is there"):
        WriterLock(Location.parse(tmp_path / "none" / "c")).acquire()


def test_a_lease_is_renewed(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.5)
    location = Location.parse(s3.place())
    with WriterLock(location) as mine:
        time.sleep(2)
        with pytest.raises(UserError, match="is writing to it"):
            WriterLock(location).acquire()
        mine.check()


def test_a_lease_of_another_machine_is_taken_over_when_it_has_run_out(s3: S3) -> None:
    location = Location.parse(s3.place())
    there = lock._Holder("elsewhere", "another machine", 7, "its token", time.time() + 0.5)
    location.objects(5).put(lease(location).path, json.dumps(asdict(there)).encode())
    with pytest.raises(UserError, match="pid 7 on elsewhere"):
        WriterLock(location).acquire()
    time.sleep(0.6)
    with WriterLock(location) as mine:
        assert mine.predecessor_died


def test_who_lost_the_lease_may_not_commit(s3: S3, caplog: pytest.LogCaptureFixture) -> None:
    location = Location.parse(s3.place())
    mine = WriterLock(location)
    mine.acquire()
    objects, key = location.objects(5), lease(location).path
    found = lock._Holder(**json.loads(bytes(objects.get(key).bytes())))
    objects.put(key, json.dumps(asdict(replace(found, host="elsewhere", token="another"))).encode())
    with pytest.raises(UserError, match=r"on elsewhere took over the writing .*nothing more is committed"):
        mine.check()
    mine.release()
    assert json.loads(bytes(objects.get(key).bytes()))["token"] == "another"


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("fault", ["drop", "cut"])
def test_a_broken_connection_changes_nothing(s3: S3, at: int, fault: str) -> None:
    """Be it before the request (drop) or after it, so that it was carried out (cut)."""
    location = Location.parse(s3.place())
    strike: Callable[[int], None] = getattr(s3.proxy, fault)
    s3.proxy.skip(at)  # looking, making it, renewing it for check
    strike(1)
    with WriterLock(location) as mine:
        mine.check()
        assert not mine.predecessor_died
        with pytest.raises(UserError, match="is writing to it"):
            WriterLock(location).acquire()


def test_a_store_without_conditional_writes(s3: S3) -> None:
    s3.proxy.skip(1)
    s3.proxy.answer(1, 501, "NotImplemented")
    with pytest.raises(UserError, match="has to know conditional writes"):
        WriterLock(Location.parse(s3.place())).acquire()
