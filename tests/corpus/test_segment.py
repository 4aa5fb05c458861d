import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from attempts import attempt, payload_bytes, same_record, write

from rbm.corpus import Corpus, CorpusWriter, ForkWriter, layout, store
from rbm.errors import UserError
from rbm.trajectory import Quality

HERE = Path(__file__).parent


def _fill(fork, numbers, answers):
    writer = ForkWriter(fork)
    segments = [writer.add(*attempt(number)) for number in numbers] + [writer.flush(), writer.flush()]
    answers.put([segment for segment in segments if segment is not None])


def _fork_and_fill(writer, parts):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    forks = writer.fork(len(parts))
    processes = [
        context.Process(target=_fill, args=(fork, numbers, answers)) for fork, numbers in zip(forks, parts, strict=True)
    ]
    for process in processes:
        process.start()
    segments = [segment for _ in processes for segment in answers.get(timeout=60)]
    for process in processes:
        process.join(60)
    return segments


def test_processes_write_and_one_commits(tmp_path, monkeypatch):
    first = write(tmp_path / "c", range(2))
    with CorpusWriter(tmp_path / "c", commit_every=3) as writer:
        segments = _fork_and_fill(writer, [range(2, 10), range(10, 16)])
        assert len(segments) == 3 + 2  # of three trajectories each, and the rest
        for segment in segments:
            writer.take(segment)
        placed = {item.trajectory.id: item for segment in segments for item in segment.placed}
        writer.add(*attempt(16))  # the coordinator's own go on beside them
        for number in (15, *range(2, 15)):
            writer.place(placed[attempt(number)[0].id])
    corpus = Corpus.open(tmp_path / "c")
    order = [0, 1, 16, 15, *range(2, 15)]
    assert list(corpus.ids) == [attempt(number)[0].id for number in order]
    for row, number in enumerate(order):
        assert same_record(corpus[row], attempt(number)[0])
        corpus.payload(row).verify()
    assert len(Corpus.open(tmp_path / "c", first.snapshot)) == 2
    again = write(tmp_path / "c", range(20, 22))  # a segment of its own, not one of those
    assert again.columns.segment[-1] > corpus.columns.segment.max()
    plain = write(tmp_path / "plain", range(17))
    assert payload_bytes(plain) == payload_bytes(corpus)


def test_a_segment_over_several_shards_from_a_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARD_BYTES", 1 << 13)
    monkeypatch.setattr(layout, "INNER_CHUNK_BYTES", 1 << 11)
    with CorpusWriter(tmp_path / "c") as writer:
        (fork,) = writer.fork(1)
        inside = ForkWriter(fork)
        for number in range(9):
            assert inside.add(*attempt(number)) is None
        segment = inside.flush()
        assert inside.flush() is None
        writer.take(segment)
        for placed in segment.placed:
            writer.place(placed)
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.columns.length.sum() > 3 << 13
    assert list(payload_bytes(corpus)) == [attempt(number)[0].id for number in range(9)]


def test_a_segment_ends_by_bytes_and_by_time(tmp_path):
    with CorpusWriter(tmp_path / "c", segment_bytes=1) as writer:
        (fork,) = writer.fork(1)
        assert len(ForkWriter(fork).add(*attempt(0)).placed) == 1
    with CorpusWriter(tmp_path / "d") as writer:
        (fork,) = writer.fork(1)
        assert len(ForkWriter(fork, seconds=0).add(*attempt(0)).placed) == 1


def test_fork_once_and_first(tmp_path):
    with CorpusWriter(tmp_path / "c") as writer:
        writer.add(*attempt(0))
        with pytest.raises(UserError, match="before anything is added"):
            writer.fork(1)
    with CorpusWriter(tmp_path / "c") as writer:
        writer.fork(1)
        with pytest.raises(UserError, match="fork once"):
            writer.fork(1)


def test_removing_and_replacing_are_new_snapshots(tmp_path):
    old = write(tmp_path / "c", range(6), commit_every=4)
    with CorpusWriter(tmp_path / "c") as writer:
        writer.remove([old.ids[1], old.ids[4]])
        writer.add(*attempt(1, n_frames=3, quality=Quality.FAILURE))
        writer.add(*attempt(9))
        with pytest.raises(UserError, match=r"has no trajectory 'nowhere' \(unknown ids: 1\)"):
            writer.remove([old.ids[0], "nowhere"])
    new = Corpus.open(tmp_path / "c")
    assert list(new.ids) == [old.ids[0], old.ids[2], old.ids[3], old.ids[5], old.ids[1], attempt(9)[0].id]
    assert new.by_id(old.ids[1]).n_frames == 3
    assert new.columns.n_frames.tolist() == [6, 6, 6, 6, 3, 6]
    assert payload_bytes(new)[old.ids[5]] == payload_bytes(old)[old.ids[5]]
    assert list(Corpus.open(tmp_path / "c", old.snapshot).ids) == list(old.ids)
    assert payload_bytes(old)[old.ids[1]] != payload_bytes(new)[old.ids[1]]
    with CorpusWriter(tmp_path / "c") as writer:
        writer.add(*attempt(30))
        writer.remove(list(writer.ids))  # also what was not committed yet
    assert len(Corpus.open(tmp_path / "c")) == 0
    assert len(write(tmp_path / "c", range(2))) == 2


def test_copies_share_their_content_hash(tmp_path):
    with CorpusWriter(tmp_path / "c") as writer:
        record, clips = attempt(0)
        writer.add(record, clips)
        writer.add(attempt(1)[0], clips, {"action": np.zeros(3)})
        writer.add(*attempt(2))
    content = Corpus.open(tmp_path / "c").columns.content
    assert content[0] == content[1] != content[2]
    assert content.min() > 0


_HOLD = """
import sys
from attempts import attempt
from rbm.corpus import CorpusWriter, ForkWriter
with CorpusWriter(sys.argv[1], commit_every=None) as writer:
    (fork,) = writer.fork(1)
    inside = ForkWriter(fork)
    for number in range(100, 103):
        inside.add(*attempt(number))
    segment = inside.flush()
    print("written", flush=True)
    sys.stdin.readline()
    writer.take(segment)
    for placed in segment.placed:
        writer.place(placed)
"""


def _holder(path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"written\n"
    return process


def _chunks(path) -> int:
    return len(list((path / "chunks").iterdir()))


def test_what_a_dead_writer_left_is_collected_and_never_what_a_living_one_writes(tmp_path):
    write(tmp_path / "c", range(3))
    before = _chunks(tmp_path / "c")
    dead = _holder(tmp_path / "c")
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    left = _chunks(tmp_path / "c")
    assert left > before
    living = _holder(tmp_path / "c")  # it collects the dead one's, at its start
    during = _chunks(tmp_path / "c")
    assert during <= left
    with pytest.raises(UserError, match="is writing"):
        CorpusWriter(tmp_path / "c").__enter__()
    assert _chunks(tmp_path / "c") == during
    living.communicate(b"\n", timeout=60)
    assert living.returncode == 0
    corpus = write(tmp_path / "c", range(3, 5))
    assert len(payload_bytes(corpus)) == 3 + 3 + 2
    assert _unknown(corpus) == 0


def _unknown(corpus) -> int:
    from datetime import UTC, datetime

    from rbm.corpus import store

    return store.open_repository(corpus.location).garbage_collect(datetime.now(UTC), dry_run=True).chunks_deleted


def test_a_link_to_a_corpus_is_the_same_corpus_to_its_lock(tmp_path):
    write(tmp_path / "c", range(3))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "c")
    with CorpusWriter(tmp_path / "c") as writer:
        writer.add(*attempt(3))
        with pytest.raises(UserError, match="is writing"):
            CorpusWriter(tmp_path / "elsewhere" / "link").__enter__()
    assert len(write(tmp_path / "elsewhere" / "link", range(4, 6))) == 6


def test_a_writer_that_gives_up_leaves_nothing_behind(tmp_path):
    corpus = write(tmp_path / "c", range(3))
    before = sorted((tmp_path / "c" / "chunks").iterdir())
    with pytest.raises(ZeroDivisionError), CorpusWriter(tmp_path / "c") as writer:  # noqa: PT012
        inside = ForkWriter(writer.fork(1)[0])
        inside.add(*attempt(5))
        writer.take(inside.flush())
        raise ZeroDivisionError
    assert Corpus.open(tmp_path / "c").snapshot == corpus.snapshot
    assert sorted((tmp_path / "c" / "chunks").iterdir()) == before


def test_a_making_that_was_killed_half_way_is_begun_again(tmp_path):
    """The repository is made beside its place, so what is there is an empty directory and a half-made neighbour."""
    (tmp_path / "c").mkdir()
    (tmp_path / ".c.new" / "snapshots").mkdir(parents=True)
    (tmp_path / ".c.new" / "snapshots" / "half").write_text("x")
    assert len(write(tmp_path / "c", range(2))) == 2
    assert sorted(item.name for item in tmp_path.iterdir()) == ["c"]


def test_every_file_that_a_commit_names_is_forced_to_the_disk(tmp_path, monkeypatch):
    """A worker's segment that was written while the coordinator committed is not missed by the next commit."""
    forced, segments = set(), []
    really = os.fsync

    def fsync(file):
        if not segments:  # a slow disk, and a worker that goes on meanwhile
            inside.add(*attempt(1))
            segments.append(inside.flush())
            time.sleep(2.5)
        forced.add(os.readlink(f"/proc/self/fd/{file}"))
        really(file)

    with CorpusWriter(tmp_path / "c") as writer:
        inside = ForkWriter(writer.fork(1)[0])
        monkeypatch.setattr(os, "fsync", fsync)
        writer.add(*attempt(0))
        writer.commit()
        writer.take(segments[0])
        writer.place(segments[0].placed[0])
    chunks = {str(file) for file in (tmp_path / "c" / "chunks").iterdir()}
    assert len(chunks) == 2
    assert chunks <= forced
    assert str(tmp_path / "c" / "refs" / "branch.main" / "ref.json") in forced


def test_a_commit_stands_beside_files_that_a_worker_is_still_writing(tmp_path):
    """Object stores write under a passing name, which is gone at any moment."""
    folder, done = tmp_path / "c" / "chunks", threading.Event()

    def write_on():
        for number in itertools.count():
            if done.is_set():
                return
            (folder / f"{number}#1").write_bytes(b"x")
            (folder / f"{number}#1").rename(folder / "whole")

    with CorpusWriter(tmp_path / "c") as writer:
        writer.add(*attempt(0))
        writer.commit()
        busy = threading.Thread(target=write_on)
        busy.start()
        try:
            for _ in range(500):
                store.force_to_disk(writer.location, store.PAYLOAD_FOLDERS, time.time())
        finally:
            done.set()
            busy.join()
        writer.add(*attempt(1))
    assert len(Corpus.open(tmp_path / "c")) == 2


def test_many_replacements_take_no_longer_each(tmp_path):
    with CorpusWriter(tmp_path / "c", commit_every=None) as writer:
        for number in range(40):
            writer.add(*attempt(number))
        for number in range(40):
            writer.remove([attempt(number)[0].id])
            writer.add(*attempt(number, n_frames=2))
    corpus = Corpus.open(tmp_path / "c")
    assert len(corpus) == 40
    assert set(corpus.columns.n_frames.tolist()) == {2}
