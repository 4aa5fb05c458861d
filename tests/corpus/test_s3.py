"""A corpus in an object store: a real server, and connections that break."""

import multiprocessing
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attempts
import icechunk
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from s3_server import S3

from rbm.corpus import Corpus, CorpusWriter, retry
from rbm.corpus.location import Location
from rbm.corpus.payload import CorruptPayload
from rbm.errors import UserError

WRITE = """
import sys
sys.path[:0] = {path!r}
import attempts
from rbm.corpus import CorpusWriter
with CorpusWriter(sys.argv[1]) as writer:
    writer.add(*attempts.attempt(0))
    writer.commit()
    writer.add(*attempts.attempt(1))
    print("added", flush=True)
    sys.stdin.read()
"""

FAULTS: dict[str, Callable[[S3], None]] = {
    "dropped": lambda s3: s3.proxy.drop(2),
    "cut short": lambda s3: s3.proxy.cut(2, 100),
    "too many requests": lambda s3: s3.proxy.answer(2, 503, "SlowDown"),
    "server error": lambda s3: s3.proxy.answer(2, 500, "InternalError"),
}


def equal(a: Corpus, b: Corpus) -> bool:
    return attempts.payload_bytes(a) == attempts.payload_bytes(b) and all(
        attempts.same_record(a[row], b[row]) for row in range(len(a))
    )


def frames_elsewhere(data: bytes) -> tuple[str, NDArray[np.uint8]]:
    corpus: Corpus = pickle.loads(data)
    return corpus.snapshot, corpus.frames(2, np.array([1, 3]))


def test_the_same_as_on_a_disk(s3: S3, tmp_path: Path) -> None:
    local = attempts.write(tmp_path / "corpus", range(5))
    there = attempts.write(s3.place(), range(5))
    assert equal(local, there)
    assert there.select(quality="successful").tolist() == local.select(quality="successful").tolist()
    np.testing.assert_array_equal(there.frames(3), local.frames(3))
    assert there.location.local is None


def test_readers_of_an_older_snapshot_go_on(s3: S3) -> None:
    place = s3.place()
    old = attempts.write(place, range(3))
    before = attempts.payload_bytes(old)
    with CorpusWriter(place) as writer:
        assert writer.ids == set(old.ids)
        writer.add(*attempts.attempt(3))
        writer.commit()
        assert attempts.payload_bytes(old) == before
        assert len(Corpus.open(place)) == 4
    assert attempts.payload_bytes(Corpus.open(place, snapshot=old.snapshot)) == before


def test_a_tag_names_a_snapshot(s3: S3) -> None:
    place = s3.place()
    old = attempts.write(place, range(2))
    retry.connect(Location.parse(place)).create_tag("first", old.snapshot)
    attempts.write(place, range(2, 4))
    assert len(Corpus.open(place, snapshot="first")) == 2
    assert len(Corpus.open(place)) == 4


def test_a_worker_process_reads_it(s3: S3) -> None:
    corpus = attempts.write(s3.place(), range(3))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        snapshot, frames = pool.apply(frames_elsewhere, (pickle.dumps(corpus),))
    assert snapshot == corpus.snapshot
    np.testing.assert_array_equal(frames, corpus.frames(2, np.array([1, 3])))


@pytest.mark.parametrize("fault", FAULTS)
def test_reading_goes_on_after(fault: str, s3: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = s3.place()
    written = attempts.write(place, range(3))
    kept = attempts.payload_bytes(written)
    assert equal(written, attempts.write(tmp_path / "local", range(3)))
    for at in (0, 5, 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RBM_CACHE", str(tmp_path / f"cache {at}"))
            s3.proxy.skip(at)
            FAULTS[fault](s3)
            assert attempts.payload_bytes(Corpus.open(place)) == kept
            s3.proxy.forget()
    warnings = [record.getMessage() for record in caplog.records if record.name == retry.__name__]
    assert warnings
    assert all(re.match(rf"corpus {place}: .* failed \(.+\); try \d of 5 follows in", text) for text in warnings)


@pytest.mark.parametrize("fault", FAULTS)
def test_writing_goes_on_after(fault: str, s3: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = attempts.write(tmp_path / "local", range(3))
    for at in (4, 26, 45):
        place = s3.place()
        s3.proxy.skip(at)
        FAULTS[fault](s3)
        with CorpusWriter(place) as writer:
            for number in range(3):
                writer.add(*attempts.attempt(number))
                writer.commit()
        s3.proxy.forget()
        assert equal(Corpus.open(place), wanted)
        assert len(history(place)) == 4
    assert "try 2 of 5 follows" in caplog.text


def history(place: str) -> list[icechunk.SnapshotInfo]:
    return list(retry.connect(Location.parse(place)).ancestry(branch="main"))


@pytest.mark.parametrize("fault", ["drop", "cut"])
def test_a_commit_lands_once_wherever_the_connection_breaks(s3: S3, fault: str) -> None:
    location = Location.parse(s3.place())
    repository = retry.create(location)
    for at in range(10):
        session = repository.writable_session("main")
        root = zarr.open_group(retry.patient(session.store, location), mode="a")
        root.attrs["at"] = at
        before = repository.lookup_branch("main")
        s3.proxy.skip(at)
        getattr(s3.proxy, fault)(1)
        snapshot = retry.commit(repository, session, "one", location)
        s3.proxy.forget()
        newest, parent, *_ = repository.ancestry(branch="main")
        assert (newest.id, parent.id) == (snapshot, before)


@pytest.mark.parametrize("at", range(3))
def test_a_lost_connection_is_no_missing_snapshot(s3: S3, at: int) -> None:
    """Icechunk by itself says that the snapshot is not there, or shows it as empty."""
    location = Location.parse(s3.place())
    session = retry.create(location).writable_session("main")
    zarr.open_group(session.store, mode="a").attrs["some"] = "thing"
    snapshot = session.commit("one")
    repository = retry.connect(location)
    s3.proxy.skip(at)
    s3.proxy.drop(2)
    session = retry.read_session(repository, snapshot, location)
    assert zarr.open_group(retry.patient(session.store, location), mode="r").attrs["some"] == "thing"
    with pytest.raises(icechunk.IcechunkError):
        retry.read_session(repository, "0" * 20, location)


def test_another_writers_commit_is_not_taken_for_ours(s3: S3) -> None:
    location = Location.parse(s3.place())
    repository = retry.create(location)
    first, second = (repository.writable_session("main") for _ in range(2))
    for session in (first, second):
        zarr.open_group(session.store, mode="a").attrs["by"] = str(session)
    retry.commit(repository, first, "first", location)
    with pytest.raises(icechunk.ConflictError):
        retry.commit(repository, second, "second", location)


def test_a_slow_answer_is_asked_for_again(
    s3: S3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Icechunk by itself waits for ever for a server that takes a request and does not answer."""
    place = s3.place()
    corpus = attempts.write(place, range(2))
    kept = attempts.payload_bytes(corpus)
    monkeypatch.setenv("RBM_STORAGE_TIMEOUT", "1")
    s3.proxy.stall(1, 6)
    assert attempts.payload_bytes(corpus) == kept
    s3.proxy.stall(1, 6)
    assert attempts.payload_bytes(Corpus.open(place)) == kept
    assert caplog.text.count("(no answer in ") == 2


def test_a_long_call_is_reported(s3: S3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    location = Location.parse(s3.place())
    repository = retry.create(location)
    session = repository.writable_session("main")
    zarr.open_group(session.store, mode="a").attrs["some"] = "thing"
    monkeypatch.setenv("RBM_STORAGE_TIMEOUT", "1")
    s3.proxy.stall(1, 2)
    retry.commit(repository, session, "one", location)
    assert "committing has taken 1 s so far; waiting for up to 10 s" in caplog.text


def test_a_dead_server_ends_it_with_a_sentence(s3: S3, caplog: pytest.LogCaptureFixture) -> None:
    place = s3.place()
    corpus = attempts.write(place, range(2))
    s3.proxy.refuse()
    try:
        for read in (lambda: Corpus.open(place), lambda: corpus.frames(0)):
            with pytest.raises(
                UserError, match=r"failed 5 times in .* \(Connection refused.*run the same command again"
            ):
                read()
    finally:
        s3.proxy.listen()
    assert "try 5 of 5 follows" in caplog.text
    assert len(corpus.frames(0)) == 6


def test_wrong_credentials_fail_at_once(s3: S3, caplog: pytest.LogCaptureFixture) -> None:
    place = s3.place()
    corpus = attempts.write(place, range(2))
    s3.check_credentials(True)
    try:
        for use in (lambda: Corpus.open(place), lambda: corpus.frames(0), lambda: CorpusWriter(place).__enter__()):
            with pytest.raises(UserError, match=r"refused \(InvalidAccessKeyId.*set AWS_ACCESS_KEY_ID"):
                use()
    finally:
        s3.check_credentials(False)
    assert "follows in" not in caplog.text


def test_a_bucket_that_is_not_public(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "true")
    s3.proxy.answer(1000, 403, "AccessDenied")
    with pytest.raises(UserError, match="it is not public: unset AWS_NO_SIGN_REQUEST and set AWS_ACCESS_KEY_ID"):
        Corpus.open(s3.place())


@pytest.mark.parametrize(
    ("name", "value"), [("TIMEOUT", "-1"), ("TIMEOUT", "nan"), ("TIMEOUT", "abc"), ("TRIES", "abc"), ("TRIES", "0")]
)
def test_settings_that_make_no_sense(s3: S3, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"RBM_STORAGE_{name}", value)
    with pytest.raises(UserError, match=f"RBM_STORAGE_{name} is '{value}': give"):
        Corpus.open(s3.place())


@pytest.mark.parametrize(
    "code", ["AccessDenied", "SignatureDoesNotMatch", "ExpiredToken", "AuthorizationHeaderMalformed"]
)
@pytest.mark.parametrize("at", range(0, 12, 2))
def test_what_is_refused_is_not_tried_again(s3: S3, code: str, at: int, caplog: pytest.LogCaptureFixture) -> None:
    place = s3.place()
    s3.proxy.skip(at)
    s3.proxy.answer(1000, 403 if code != "ExpiredToken" else 400, code)
    with pytest.raises(UserError, match=rf"refused \({code}.*set AWS_"):
        attempts.write(place, range(2))
    assert "follows in" not in caplog.text


def test_a_missing_shard_is_damage_and_not_asked_for_again(s3: S3, caplog: pytest.LogCaptureFixture) -> None:
    place = s3.place()
    corpus = attempts.write(place, range(2))
    location = Location.parse(place)
    found = location.objects(5).list(f"{location.path}/chunks").collect()
    shard = max(found, key=lambda entry: entry["size"])
    location.objects(5).delete(shard["path"])
    with pytest.raises(CorruptPayload) as damage:
        corpus.frames(0)
    assert damage.value.trajectory == corpus.ids[0]
    assert not caplog.text


def test_a_missing_bucket_and_a_missing_corpus(s3: S3) -> None:
    for use in (Corpus.open, lambda place: CorpusWriter(place).__enter__()):
        with pytest.raises(UserError, match="there is no bucket 'nowhere'"):
            use("s3://nowhere/corpus")
    with pytest.raises(UserError, match=r"no corpus .*rbm build"):
        Corpus.open(s3.place())


def test_a_second_coordinator_is_refused_at_its_start(s3: S3) -> None:
    place = s3.place()
    with CorpusWriter(place) as writer:
        writer.add(*attempts.attempt(0))
        with pytest.raises(UserError, match="is writing to it"), CorpusWriter(place):
            pass
    assert len(Corpus.open(place)) == 1


def test_what_a_dead_coordinator_left_is_resumed(s3: S3, tmp_path: Path) -> None:
    place = s3.place()
    code = WRITE.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-c", code, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "added\n"
        with pytest.raises(UserError, match=f"pid {process.pid}"):
            CorpusWriter(place).__enter__()
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    with CorpusWriter(place) as writer:
        assert writer.ids == {attempts.attempt(0)[0].id}
        for number in range(1, 3):
            writer.add(*attempts.attempt(number))
    assert equal(Corpus.open(place), attempts.write(tmp_path / "local", range(3)))


def test_who_lost_the_lease_commits_nothing(s3: S3) -> None:
    place = s3.place()
    lease = Location.parse(place).sibling(".corpus.writer.lock")
    with CorpusWriter(place) as writer:
        writer.add(*attempts.attempt(0))
    writer.__enter__()
    writer.add(*attempts.attempt(1))
    lease.objects(5).delete(lease.path)
    with CorpusWriter(place), pytest.raises(UserError, match="took over the writing"):
        writer.__exit__(None, None, None)
    assert len(Corpus.open(place)) == 1
