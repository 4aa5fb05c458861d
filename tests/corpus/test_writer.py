import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import icechunk
import numpy as np
import pytest
import zarr
from attempts import TASKS, attempt, payload_bytes, same_record, write

from rbm.corpus import Corpus, CorpusWriter, CorruptPayload, pack
from rbm.errors import UserError
from rbm.trajectory import Quality, Task

HERE = Path(__file__).parent


@pytest.mark.parametrize("codec", ["jpeg", "h264"])
def test_what_goes_in_comes_out(tmp_path, codec):
    record, clips = attempt(
        0,
        views=("front", "wrist"),
        messy=True,
        partial_success=0.25,
        embodiment="sawyer",
        is_robot=True,
        is_sim=True,
        done_index=10,
        progress=np.linspace(0, 1, 6),
        provenance="rollout 7",
    )
    action = np.random.default_rng(0).normal(size=(20, 4))
    path = tmp_path / "ein Korpus für Roboter"
    with CorpusWriter(path, codec) as writer:
        writer.add_task(Task(record.task, scene="drawer", paraphrases=("pull the drawer open",)))
        writer.add_source("tests", completion=0.9, licence="MIT")
        writer.add(record, clips, {"action": action})
    corpus = Corpus.open(path)
    assert len(corpus) == 1
    assert same_record(corpus[0], record)
    assert corpus[0].array_names == ("action",)
    np.testing.assert_array_equal(corpus[0].array("action"), action)
    assert corpus[0].frames([0, 5], view="wrist").shape == (2, 24, 32, 3)
    assert np.abs(corpus.frames(0).astype(int) - clips["front"]).mean() < 8
    np.testing.assert_array_equal(corpus.progress(0), record.progress)
    assert tuple(corpus.tasks) == (Task(record.task, "drawer", ("pull the drawer open",)),)
    assert corpus.sources["tests"].completion == 0.9
    assert corpus.sources["tests"].facts == {"licence": "MIT"}
    assert corpus.columns.done.tolist() == [3]  # frame_index 1, 4, 7, 10: the first that is >= 10
    assert corpus.columns.done_known.tolist() == [True]
    assert corpus.columns.partial_success.tolist() == [0.25]


def test_columns_say_when_a_success_is_done(tmp_path):
    with CorpusWriter(tmp_path / "c") as writer:
        writer.add_source("cut", completion=0.5)
        writer.add(*attempt(0, source="cut", n_frames=5))
        writer.add(*attempt(1, n_frames=5))
        writer.add(*attempt(2, n_frames=5, done_index=4))
        writer.add(*attempt(3, n_frames=5, quality=Quality.FAILURE))
    columns = Corpus.open(tmp_path / "c").columns
    assert columns.done.tolist() == [2, 4, 1, -1]
    assert columns.done_known.tolist() == [False, False, True, False]
    assert np.isnan(columns.partial_success).all()
    assert columns.source.tolist() == [0, 1, 1, 1]
    assert not columns.done.flags.writeable


def test_appending_keeps_what_was_there_and_older_snapshots(tmp_path):
    first = write(tmp_path / "c", range(4))
    second = write(tmp_path / "c", range(4, 7), codec="h264")
    assert list(second.ids) == [attempt(number)[0].id for number in range(7)]
    assert second.info()["codecs"] == ["jpeg", "h264"]
    assert second.info()["segments"] == 2
    old = Corpus.open(tmp_path / "c", snapshot=first.snapshot)
    assert len(old) == 4
    assert payload_bytes(old) == {id: data for id, data in payload_bytes(second).items() if id in set(old.ids)}
    np.testing.assert_array_equal(first.frames(3), second.frames(3))


def test_nothing_new_makes_no_snapshot(tmp_path):
    corpus = write(tmp_path / "c", range(2))
    with CorpusWriter(tmp_path / "c") as writer:
        assert writer.snapshot == corpus.snapshot
        writer.add_task(Task(TASKS[0]))
    assert Corpus.open(tmp_path / "c").snapshot == corpus.snapshot


def test_an_empty_corpus_with_tasks_opens(tmp_path):
    with CorpusWriter(tmp_path / "c") as writer:
        writer.add_task(Task("open the door"))
    corpus = Corpus.open(tmp_path / "c")
    assert len(corpus) == 0
    assert list(corpus) == []
    assert len(corpus.by_task_quality.rows(0, 0)) == 0


def test_segments_and_commits_come_by_count_and_by_bytes(tmp_path):
    by_count = write(tmp_path / "count", range(7), commit_every=3)
    assert by_count.columns.segment.tolist() == [0, 0, 0, 1, 1, 1, 2]
    by_bytes = write(tmp_path / "bytes", range(4), segment_bytes=1)
    assert by_bytes.columns.segment.tolist() == [0, 1, 2, 3]
    assert payload_bytes(by_bytes).items() <= payload_bytes(by_count).items()


def test_a_segment_grows_over_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("rbm.corpus.layout.SHARD_BYTES", 1 << 13)
    monkeypatch.setattr("rbm.corpus.layout.INNER_CHUNK_BYTES", 1 << 11)
    corpus = write(tmp_path / "c", range(12))
    assert corpus.columns.length.sum() > 3 << 13
    assert set(corpus.columns.segment.tolist()) == {0}
    for number, trajectory in enumerate(corpus):
        assert same_record(trajectory, attempt(number)[0])
        corpus.payload(number).verify()


def test_plain_zarr_reads_the_same_bytes(tmp_path):
    """What docs/corpus.md promises; runs of zeros, which zarr would leave out of a shard, stand in it too."""
    with CorpusWriter(tmp_path / "c") as writer:
        for number in range(3):
            noise = np.random.default_rng(number).integers(0, 256, 150_000, dtype=np.uint8)
            packed = pack(*attempt(number), {"noise": noise})
            writer.add_packed(replace(packed, payload=packed.payload + bytes(200_000)))
    corpus = Corpus.open(tmp_path / "c")
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(tmp_path / "c")))
    root = zarr.open_group(repository.readonly_session(snapshot_id=corpus.snapshot).store, mode="r")
    for row in range(3):
        start, length = (int(root[f"index/{name}"][row]) for name in ("offset", "length"))
        data = root[f"segments/{int(root['index/segment'][row])}"][start : start + length]
        np.testing.assert_array_equal(data, corpus._read(row, 0, length))
        assert data[:4].tobytes() == b"RBMP"


def test_an_exception_drops_what_was_not_committed(tmp_path):
    with pytest.raises(ZeroDivisionError), CorpusWriter(tmp_path / "c", commit_every=2) as writer:  # noqa: PT012
        for number in range(3):
            writer.add(*attempt(number))
        raise ZeroDivisionError
    assert len(Corpus.open(tmp_path / "c")) == 2
    with pytest.raises(UserError, match="closed"):
        writer.add(*attempt(9))


def test_before_the_first_commit_there_is_no_corpus_and_a_writer_starts_anew(tmp_path):
    with pytest.raises(ZeroDivisionError), CorpusWriter(tmp_path / "c") as writer:  # noqa: PT012
        writer.add(*attempt(0))
        raise ZeroDivisionError
    with pytest.raises(UserError, match="nothing has been committed"):
        Corpus.open(tmp_path / "c")
    assert len(write(tmp_path / "c", range(3))) == 3


def test_ids_are_unique_within_a_build_and_over_builds(tmp_path):
    for _ in range(2):
        with CorpusWriter(tmp_path / "c") as writer:
            if not writer.ids:
                writer.add(*attempt(0))
            assert writer.ids == {attempt(0)[0].id}
            with pytest.raises(UserError, match=r"'tests/0000-é' is already in the corpus"):
                writer.add(*attempt(0))
    assert len(Corpus.open(tmp_path / "c")) == 1


def test_tasks_gather_paraphrases_and_refuse_another_scene(tmp_path):
    with CorpusWriter(tmp_path / "c") as writer:
        writer.add(*attempt(0))
        writer.add_task(Task(TASKS[0], scene="drawer", paraphrases=("pull it",)))
    with CorpusWriter(tmp_path / "c") as writer:
        writer.add_task(Task(TASKS[0], paraphrases=("pull it", "tug it")))
        with pytest.raises(UserError, match="has scene 'drawer'"):
            writer.add_task(Task(TASKS[0], scene="door"))
        with pytest.raises(UserError, match="needs a text"):
            writer.add_task(Task("  "))
    assert tuple(Corpus.open(tmp_path / "c").tasks) == (Task(TASKS[0], "drawer", ("pull it", "tug it")),)


def test_a_source_keeps_its_cutoff(tmp_path):
    with CorpusWriter(tmp_path / "c") as writer:
        writer.add_source("s", completion=0.8)
        writer.add_source("s", completion=0.8, licence="MIT")
        with pytest.raises(UserError, match=r"cut-off 0\.8, now None"):
            writer.add_source("s")
        with pytest.raises(UserError, match=r"must be in \(0, 1\]"):
            writer.add_source("t", completion=1.5)
        with pytest.raises(UserError, match="no JSON"):
            writer.add_source("t", when=object())
    assert Corpus.open(tmp_path / "c").sources["s"].facts == {"licence": "MIT"}


def test_a_done_index_after_the_last_frame_is_refused(tmp_path):
    with CorpusWriter(tmp_path / "c") as writer:
        with pytest.raises(UserError, match="done_index 99 lies after"):
            writer.add(*attempt(0, done_index=99))
        writer.add(*attempt(1))
    assert list(Corpus.open(tmp_path / "c").ids) == [attempt(1)[0].id]


def test_a_second_writer_is_refused_at_its_start(tmp_path):
    with CorpusWriter(tmp_path / "c") as writer:
        with pytest.raises(UserError, match=rf"another process \(pid {os.getpid()}\) is writing"):
            CorpusWriter(tmp_path / "c").__enter__()
        writer.add(*attempt(0))
    assert len(write(tmp_path / "c", range(1, 2))) == 2
    assert sorted(item.name for item in tmp_path.iterdir()) == ["c"]


def test_a_place_that_is_no_corpus_is_refused_and_left_alone(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        CorpusWriter(tmp_path / "file").__enter__()
    with pytest.raises(UserError, match=r"holds other files \(thesis.txt"):
        CorpusWriter(tmp_path / "full").__enter__()
    assert [item.name for item in (tmp_path / "full").iterdir()] == ["thesis.txt"]


_FILL = """
import sys
from attempts import attempt
from rbm.corpus import CorpusWriter
path, commit_every = sys.argv[1], int(sys.argv[2])
with CorpusWriter(path, commit_every=commit_every) as writer:
    for number in range(60):
        if attempt(number)[0].id not in writer.ids:
            writer.add(*attempt(number))
            print(number, flush=True)
"""


def _filler(path, commit_every, limit=None):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, "-c", _FILL, str(path), str(commit_every)]

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    options = {} if limit is None else {"preexec_fn": small_files}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_write_that_fails_is_one_line_and_the_last_commit_stands(tmp_path):
    """The system refuses to let a file grow, as a full disk does: real writes, failing in the storage."""
    first = write(tmp_path / "c", range(4))
    process = _filler(tmp_path / "c", 60, limit=16 << 10)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "UserError: corpus" in errors
    assert "writing failed" in errors
    assert "the last commit stands" in errors
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.snapshot == first.snapshot
    assert len(payload_bytes(corpus)) == 4
    assert len(write(tmp_path / "c", range(4, 5))) == 5


def test_a_killed_build_resumes_without_loss_or_duplicates(tmp_path):
    unbroken = write(tmp_path / "unbroken", range(60), commit_every=7)
    rng = np.random.default_rng(0)
    for _ in range(3):
        process = _filler(tmp_path / "c", 7)
        assert process.stdout is not None
        for _ in range(int(rng.integers(3, 14))):
            process.stdout.readline()
        time.sleep(float(rng.uniform(0, 0.01)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (tmp_path / "c" / "refs").is_dir():
            try:
                seen = payload_bytes(Corpus.open(tmp_path / "c"))
            except UserError as error:
                assert "nothing has been committed" in str(error)  # noqa: PT017
            else:
                assert list(seen.items()) == list(payload_bytes(unbroken).items())[: len(seen)]
    process = _filler(tmp_path / "c", 7)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    resumed = Corpus.open(tmp_path / "c")
    assert list(payload_bytes(resumed).items()) == list(payload_bytes(unbroken).items())
    for name in ("task", "quality", "done", "n_frames", "source", "embodiment"):
        np.testing.assert_array_equal(getattr(resumed.columns, name), getattr(unbroken.columns, name))


def test_a_flipped_byte_on_disk_is_named_and_the_rest_stays_readable(tmp_path):
    corpus = write(tmp_path / "c", range(5))
    payload = corpus.payload(2)
    place = payload.data[payload.head.ends[3] : payload.head.ends[4]].tobytes()
    hits = 0
    for file in (tmp_path / "c" / "chunks").iterdir():
        data = bytearray(file.read_bytes())
        at = data.find(place)
        if at >= 0:
            hits += 1
            data[at + 20] ^= 4
            file.write_bytes(data)
    assert hits == 1
    corpus = Corpus.open(tmp_path / "c")
    with pytest.raises(CorruptPayload, match=r"'tests/0002-é'.*frame 3 of view 'main'") as caught:
        corpus[2].frames()
    assert caught.value.trajectory == "tests/0002-é"
    assert corpus.frames(2, [0, 1, 2, 4, 5]).shape[0] == 5
    for row in (0, 1, 3, 4):
        corpus.payload(row).verify()
