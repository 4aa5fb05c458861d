import json
import logging
import multiprocessing
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from attempts import attempt, payload_bytes, write

from rbm.corpus import Corpus, CorpusWriter, cache
from rbm.errors import UserError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache of this test's own."""
    monkeypatch.setenv("RBM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "corpus"


@pytest.fixture
def corpus(place, tmp_path):
    return write(tmp_path / "c", range(7), commit_every=3)


def test_every_array_is_a_mapped_file_that_can_not_be_written_to(corpus, place):
    (folder,) = (item for item in place.iterdir() if item.is_dir())
    assert folder.name == f"{corpus.snapshot}.{cache.VERSION}"
    mapped = Path("/proc/self/maps").read_text()
    for name in ("task", "content", "id_heap", "id_hash", "group_rows", "shard_key"):
        assert str(folder / f"{name}.npy") in mapped
    with pytest.raises(ValueError, match="read-only"):
        corpus.columns.task[0] = 1


def test_an_open_from_the_cache_reads_nothing_of_the_corpus_but_its_payloads(corpus):
    """An index that has gone meanwhile is not missed; the snapshot's own file says that it belongs here."""
    expected = payload_bytes(corpus)
    for folder in ("manifests", "transactions", "refs"):
        for file in (corpus.location.local / folder).rglob("*"):
            if file.is_file():
                file.unlink()
    again = Corpus.open(corpus.location, corpus.snapshot)
    assert payload_bytes(again) == expected
    assert again.ids.find(corpus.ids[4]) == 4
    assert again.by_task_quality.rows(0, 0).tolist() == corpus.by_task_quality.rows(0, 0).tolist()


def _read(corpus, answers):
    answers.put((os.getpid(), corpus.snapshot, corpus.frames(2).sum(), list(corpus.ids)))


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_processes_share_it_whatever_way_they_start(corpus, method):
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    processes = [context.Process(target=_read, args=(corpus, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    said = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert len({pid for pid, *_ in said} | {os.getpid()}) == 4
    for _, snapshot, total, ids in said:
        assert (snapshot, total, ids) == (corpus.snapshot, corpus.frames(2).sum(), list(corpus.ids))


def _open(path, go, answers):
    go.wait(60)
    start = time.monotonic()
    corpus = Corpus.open(path)
    answers.put((len(corpus), corpus.columns.length.sum(), start))


def test_many_first_opens_at_once_write_it_once(tmp_path, place):
    write(tmp_path / "c", range(7))
    for item in place.glob("*"):
        assert item.name.endswith(".lock") or item.is_dir()
    context = multiprocessing.get_context("spawn")
    go, answers = context.Event(), context.Queue()
    with CorpusWriter(tmp_path / "c") as writer:
        writer.add(*attempt(50))
    processes = [context.Process(target=_open, args=(tmp_path / "c", go, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    go.set()
    said = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {(count, length) for count, length, _ in said} == {(8, Corpus.open(tmp_path / "c").columns.length.sum())}
    assert not list(place.glob("*.part"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "no facts"])
def test_a_damaged_cache_is_made_again(corpus, place, damage):
    (folder,) = (item for item in place.iterdir() if item.is_dir())
    offset = corpus.columns.offset.copy()  # what is mapped goes with its file
    if damage == "truncated":
        os.truncate(folder / "offset.npy", 130)
    elif damage == "missing":
        (folder / "id_hash.npy").unlink()
    else:
        (folder / "facts.json").write_text("{")
    again = Corpus.open(corpus.location, corpus.snapshot)
    np.testing.assert_array_equal(again.columns.offset, offset)
    assert json.loads((folder / "facts.json").read_text())["files"]["offset"] == (folder / "offset.npy").stat().st_size


def test_what_a_dead_process_left_is_swept_and_old_snapshots_go(corpus, place, monkeypatch):
    (folder,) = (item for item in place.iterdir() if item.is_dir())
    (place / "junk.part").mkdir()
    os.utime(place / "junk.part", (0, 0))
    os.utime(folder, (0, 0))
    newer = write(corpus.location.local, range(7, 9))
    assert [item.name for item in place.iterdir() if item.is_dir()] == [f"{newer.snapshot}.{cache.VERSION}"]


def test_without_a_place_to_write_every_process_holds_its_own(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RBM_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        corpus = write(tmp_path / "c", range(4))
    assert "set RBM_CACHE to a folder with room" in caplog.text
    assert len(payload_bytes(corpus)) == 4


def test_a_full_disk_leaves_no_half_cache(tmp_path, place):
    """The system refuses to let a file grow beyond a few bytes, as a full disk would."""
    write(tmp_path / "c", range(40))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (256, resource.RLIM_INFINITY))
            made = cache.load_or_make("X" * 20, lambda: cache.Index({"a": np.arange(1000)}, {}))
            whole = len(made.arrays["a"]) == 1000 and not [item for item in place.glob("X*") if item.is_dir()]
            code = 0 if whole else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("RBM_CACHE", "~/here")
    assert str(cache.folder()) == os.path.expanduser("~/here/corpus")
    monkeypatch.delenv("RBM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "rbm" / "corpus"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(cache.folder()) == os.path.expanduser("~/.cache/rbm/corpus")


def test_a_newer_format_is_refused_from_the_cache_too(corpus, place):
    """A newer rbm, which has written to the corpus, fills the cache that an older one then finds."""
    (folder,) = (item for item in place.iterdir() if item.is_dir())
    known = json.loads((folder / "facts.json").read_text())
    known["facts"]["attributes"]["version"] = 2
    (folder / "facts.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"has format version 2.*upgrade robot-rbm"):
        Corpus.open(corpus.location, corpus.snapshot)
