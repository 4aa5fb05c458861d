import ctypes
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import icechunk
import numpy as np
import pytest
import zarr
from attempts import TASKS, attempt, same_record, write

from rbm.corpus import Corpus, CorpusWriter, CorruptPayload
from rbm.errors import UserError
from rbm.trajectory import Quality


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    path = tmp_path_factory.mktemp("corpora") / "c"
    with CorpusWriter(path, commit_every=10) as writer:
        for number in range(24):
            embodiment = "sawyer" if number % 2 else "panda"
            changes = {"n_frames": 4 + number % 3, "embodiment": embodiment, "source": f"s{number % 2}"}
            writer.add(*attempt(number, **changes), {"step": np.array([number])})
    return Corpus.open(path)


def test_it_is_a_sequence_of_trajectories(corpus):
    assert len(corpus) == 24
    assert [trajectory.id for trajectory in corpus] == list(corpus.ids)
    assert corpus[-1].id == corpus[23].id
    for number in (24, -25):
        with pytest.raises(IndexError, match="has 24"):
            corpus[number]
    assert corpus[np.int64(3)].n_frames == 4


def test_by_id_and_task_number(corpus):
    assert same_record(corpus.by_id("tests/0005-é"), corpus[5])
    with pytest.raises(UserError, match="no trajectory has the id 'x'"):
        corpus.by_id("x")
    assert corpus.tasks[corpus.task_number(TASKS[2])].text == TASKS[2]
    with pytest.raises(UserError, match="no task 'open the drawers'; there are 'open the drawer'"):
        corpus.task_number("open the drawers")


def test_frames_and_arrays_are_read_on_demand(corpus):
    trajectory = corpus[7]
    np.testing.assert_array_equal(trajectory.frames([2, 0]), trajectory.frames()[[2, 0]])
    assert trajectory.array("step").tolist() == [7]
    with pytest.raises(UserError, match="no array 'stop'; it has: step"):
        trajectory.array("stop")
    assert corpus.progress(7) is None


def test_select_combines_filters(corpus):
    def brute(keep):
        return [row for row, trajectory in enumerate(corpus) if keep(trajectory)]

    assert corpus.select().tolist() == list(range(24))
    assert corpus.select(task=TASKS[1]).tolist() == brute(lambda t: t.task == TASKS[1])
    assert corpus.select(task=TASKS[:2], quality=Quality.FAILURE).tolist() == brute(
        lambda t: t.task in TASKS[:2] and t.quality == "failure"
    )
    assert corpus.select(quality=["successful", Quality.SUBOPTIMAL]).tolist() == brute(lambda t: t.quality != "failure")
    assert corpus.select(source="s1", embodiment=["sawyer"], min_frames=5).tolist() == brute(
        lambda t: t.source == "s1" and t.n_frames >= 5
    )
    assert corpus.select(ids=["tests/0003-é", "tests/0001-é"]).tolist() == [1, 3]
    assert corpus.select(ids=[]).tolist() == []
    assert corpus.select(ids="tests/0003-é").dtype == np.int64


@pytest.mark.parametrize(
    ("filters", "sentence"),
    [
        ({"source": "s9"}, "no source 's9'; there are"),
        ({"quality": "good"}, "no quality 'good'"),
        ({"embodiment": "pandas"}, "no embodiment 'pandas'; there are 'panda'"),
        ({"task": ["fly"]}, "no task 'fly'"),
        ({"ids": ["nope"]}, "no trajectory has the id 'nope'"),
    ],
)
def test_select_refuses_names_that_are_not_there(corpus, filters, sentence):
    with pytest.raises(UserError, match=sentence):
        corpus.select(**filters)


def test_rows_by_task_and_quality(corpus):
    for number, task in enumerate(corpus.tasks):
        for quality in Quality:
            rows = corpus.by_task_quality.rows(number, quality.rank)
            assert rows.tolist() == corpus.select(task=task.text, quality=quality).tolist()


def test_info_is_json_and_adds_up(corpus):
    info = json.loads(json.dumps(corpus.info()))
    assert info["trajectories"] == 24
    assert sum(info["by_quality"].values()) == sum(info["by_source"].values()) == 24
    assert sum(sum(counts.values()) for counts in info["by_task"].values()) == 24
    assert info["bytes"] == int(corpus.columns.length.sum())
    assert info["snapshot"] == corpus.snapshot


def _look(corpus: Corpus, row: int) -> tuple[str, int]:
    return corpus[row].id, int(corpus.frames(row).sum())


def test_spawned_processes_open_it_for_themselves(corpus):
    assert len(pickle.dumps(corpus)) < 1000
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        seen = list(pool.map(_look, [corpus] * 6, range(6)))
    assert seen == [_look(corpus, row) for row in range(6)]


def _in_a_fork(work) -> str:
    """What `work` gives in a forked child, or the error that it ends with."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(work()).encode())
        except BaseException as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


def test_a_forked_process_reads_on(corpus):
    assert _in_a_fork(lambda: _look(corpus, 3)) == str(_look(corpus, 3))


def test_a_forked_process_that_needs_icechunk_is_told_to_spawn(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("RBM_CACHE", str(tmp_path / "empty"))
    assert "'spawn'" in _in_a_fork(lambda: Corpus.open(corpus.location))


_OPEN_READ_ONLY = """
import os, sys
from rbm.corpus import Corpus
path = sys.argv[1]
assert not os.access(path, os.W_OK, effective_ids=True)
corpus = Corpus.open(path)
print(len(corpus), corpus.frames(3).shape[0])
"""
_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE = 24, 1


def _heed_modes() -> None:
    """Root passes over file modes; without this capability it does not."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE) != 0:
        raise OSError("the capability could not be dropped")


def test_a_read_only_directory_opens_without_a_warning(corpus, tmp_path):
    path = tmp_path / "c"
    shutil.copytree(corpus.location.local, path)
    places = [path, *path.rglob("*")]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    command = [sys.executable, "-c", _OPEN_READ_ONLY, str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, preexec_fn=_heed_modes, env=environment, capture_output=True, text=True, check=False)
    for place in places:
        place.chmod(0o755 if place.is_dir() else 0o644)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["24", "4"]
    assert done.stderr == ""


def test_places_that_hold_no_corpus(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("x")
    for name, sentence in [
        ("missing", "no such directory"),
        ("empty", "empty directory"),
        ("other", "holds no corpus"),
        ("other/x", "is a file"),
    ]:
        with pytest.raises(UserError, match=sentence) as caught:
            Corpus.open(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("snapshot", ["nonsense", "1CECHNKREP0F1RSTCMTG"])
def test_an_unknown_snapshot(corpus, snapshot):
    with pytest.raises(UserError, match=f"has no snapshot or tag '{snapshot}'") as caught:
        Corpus.open(corpus.location, snapshot)
    assert "\n" not in str(caught.value)


def _repository(path: Path, attributes: dict) -> None:
    path.mkdir()
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(path)))
    session = repository.writable_session("main")
    zarr.create_group(session.store, attributes=attributes)
    session.commit("made by hand")


def test_a_newer_format_and_a_foreign_repository_are_refused(tmp_path):
    _repository(tmp_path / "newer", {"format": "rbm-corpus", "version": 2})
    _repository(tmp_path / "foreign", {"title": "sea temperatures"})
    for use in (Corpus.open, lambda path: CorpusWriter(path).__enter__()):
        with pytest.raises(UserError, match=r"has format version 2.*upgrade robot-rbm"):
            use(tmp_path / "newer")
        with pytest.raises(UserError, match="of another program"):
            use(tmp_path / "foreign")


def test_a_truncated_or_missing_shard_names_its_trajectories(tmp_path):
    corpus = write(tmp_path / "c", range(6), commit_every=3)
    shards = [file for file in (tmp_path / "c" / "chunks").iterdir() if b"RBMP" in file.read_bytes()]
    assert len(shards) == 2
    segment = next(k for k in (0, 1) if corpus.payload(3 * k).data.tobytes() in shards[0].read_bytes())
    theirs = [3 * segment, 3 * segment + 1, 3 * segment + 2]
    second = int(corpus.columns.offset[theirs[1]])
    os.truncate(shards[0], second + 1000)
    assert _damaged(corpus) == theirs[1:]
    shards[0].unlink()
    assert _damaged(corpus) == theirs


def _damaged(corpus: Corpus) -> list[int]:
    """Rows that can not be read, each named in its error."""
    bad = []
    for row, id in enumerate(corpus.ids):
        try:
            Corpus.open(corpus.location).frames(row)
        except CorruptPayload as error:
            assert error.trajectory == id  # noqa: PT017
            bad.append(row)
    return bad


def test_a_damaged_index_is_found_at_opening(tmp_path):
    with CorpusWriter(tmp_path / "c", codec="h264", commit_every=None) as writer:
        for number in range(300):
            writer.add(*attempt(number))
    files = [file for file in (tmp_path / "c" / "chunks").iterdir() if b"RBMP" not in file.read_bytes()]
    assert files
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.raises(UserError, match=r"index of snapshot .* is damaged"):
        Corpus.open(tmp_path / "c")
