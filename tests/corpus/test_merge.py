import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from attempts import TASKS, attempt, payload_bytes, write
from damage import flip
from rich.progress import Progress
from s3_server import BUCKET

from rbm.corpus import Corpus, CorpusWriter, CorruptPayload
from rbm.corpus.check import check_corpus
from rbm.corpus.history import read_history
from rbm.corpus.merge import merge_corpora
from rbm.errors import UserError
from rbm.trajectory import Task


def id_of(number: int) -> str:
    return attempt(number)[0].id


@pytest.fixture
def a(tmp_path) -> Corpus:
    with CorpusWriter(tmp_path / "a") as writer:
        writer.add_source("tests", completion=0.9, licence="MIT")
        writer.add_task(Task(TASKS[0], scene="drawer", paraphrases=("pull",)))
        for number in range(5):
            writer.add(*attempt(number, embodiment="panda"), {"action": np.eye(3) * number})
    return Corpus.open(tmp_path / "a")


@pytest.fixture
def b(tmp_path) -> Corpus:
    with CorpusWriter(tmp_path / "b", "h264") as writer:
        writer.add_source("tests", completion=0.9, licence="other", origin="lab")
        writer.add_source("more")
        writer.add_task(Task("hang the cup"))
        writer.add_task(Task(TASKS[0], paraphrases=("tug",)))
        for number in range(5, 9):
            writer.add(*attempt(number, embodiment="sawyer", source="more"))
    return Corpus.open(tmp_path / "b")


def test_payloads_go_over_byte_for_byte_and_tables_are_joined(a, b, tmp_path):
    with Progress(disable=True) as progress:
        done = merge_corpora(tmp_path / "all", [str(a.location), b], progress=progress)
    assert (done.added, done.replaced, done.present, done.skipped, done.damaged) == (9, 0, 0, 0, ())
    merged = Corpus.open(tmp_path / "all")
    assert merged.snapshot == done.snapshot
    assert list(payload_bytes(merged).items()) == [*payload_bytes(a).items(), *payload_bytes(b).items()]
    assert merged.sources["tests"].completion == 0.9
    assert merged.sources["tests"].facts == {"licence": "MIT", "origin": "lab"}
    assert [task for task in merged.tasks if task.text == TASKS[0]] == [Task(TASKS[0], "drawer", ("pull", "tug"))]
    assert merged.embodiments == ("panda", "sawyer")
    assert merged.info()["codecs"] == ["jpeg", "h264"]
    assert merged.columns.done.tolist()[:5] == a.columns.done.tolist()
    assert check_corpus(merged.location, decode=True).clean


def test_what_is_there_already_is_passed_over(a, b, tmp_path):
    first = merge_corpora(tmp_path / "all", [a])
    second = merge_corpora(tmp_path / "all", [a, b, a])
    assert (second.added, second.present) == (4, 10)
    again = merge_corpora(tmp_path / "all", [a, b])
    assert (again.added, again.present, again.snapshot) == (0, 9, second.snapshot)
    assert first.added == 5


def others(tmp_path: Path, name: str, *numbers: int, **changes) -> Corpus:
    """Attempts of the same ids with other records."""
    with CorpusWriter(tmp_path / name) as writer:
        writer.add_source("tests", completion=0.9)
        for number in numbers:
            writer.add(*attempt(number, **changes))
    return Corpus.open(tmp_path / name)


def test_another_payload_under_a_known_id_is_a_conflict(a, tmp_path):
    other = others(tmp_path, "other", 1, 3, 11, embodiment="panda", provenance="relabelled")
    np.testing.assert_array_equal(other.columns.content[:2], a.columns.content[[1, 3]])  # the frames are the same
    with pytest.raises(
        UserError, match=rf"different trajectories: 2 \('{id_of(1)}', '{id_of(3)}'\); nothing was written"
    ) as caught:
        merge_corpora(tmp_path / "all", [a, other])
    assert "--conflict" in str(caught.value)
    assert not (tmp_path / "all").exists()

    done = merge_corpora(tmp_path / "first", [a, other], conflict="skip")
    assert (done.added, done.skipped) == (6, 2)
    assert payload_bytes(Corpus.open(tmp_path / "first")) == payload_bytes(other) | payload_bytes(a)

    done = merge_corpora(tmp_path / "last", [a, other], conflict="replace")
    assert (done.added, done.replaced, done.skipped) == (6, 0, 2)
    assert payload_bytes(Corpus.open(tmp_path / "last")) == payload_bytes(a) | payload_bytes(other)


def test_replacing_in_the_destination_keeps_the_former_in_older_snapshots(a, tmp_path):
    other = others(tmp_path, "other", 1, 11, provenance="relabelled")
    before = payload_bytes(a)
    with pytest.raises(UserError, match="that stand for different trajectories: 1"):
        merge_corpora(a.location, [other])
    assert merge_corpora(a.location, [other], conflict="skip").added == 1
    done = merge_corpora(a.location, [other], conflict="replace")
    assert (done.added, done.replaced, done.present) == (0, 1, 1)
    now = Corpus.open(a.location)
    assert payload_bytes(now) == before | payload_bytes(other)
    assert now[now.row(id_of(1))].provenance == "relabelled"
    assert payload_bytes(Corpus.open(a.location, a.snapshot)) == before
    assert merge_corpora(a.location, [other], conflict="replace").snapshot == done.snapshot


def test_the_last_of_three_that_differ_stays_and_stays_so(a, tmp_path):
    b = others(tmp_path, "b", 1, provenance="b")
    c = others(tmp_path, "c", 1, provenance="c")
    for _ in range(2):
        merge_corpora(tmp_path / "all", [a, b, c], conflict="replace")
        merged = Corpus.open(tmp_path / "all")
        assert len(merged) == 5
        assert merged.by_id(id_of(1)).provenance == "c"
    assert len(read_history(tmp_path / "all")) == 2  # the second time nothing was to do


def test_tables_that_contradict_each_other_are_refused_before_anything_is_written(a, tmp_path):
    with CorpusWriter(tmp_path / "cut") as writer:
        writer.add_source("tests", completion=0.5)
        writer.add(*attempt(20))
    with CorpusWriter(tmp_path / "scene") as writer:
        writer.add_task(Task(TASKS[0], scene="kitchen"))
    with pytest.raises(UserError, match=r"cut: source 'tests' has completion cut-off 0\.5, .* it is 0\.9"):
        merge_corpora(tmp_path / "all", [a, tmp_path / "cut"])
    with pytest.raises(UserError, match=r"scene does not go together .* 'drawer' .* 'kitchen'"):
        merge_corpora(tmp_path / "all", [a, tmp_path / "scene"])
    with pytest.raises(UserError, match="leave it out of the sources"):
        merge_corpora(a.location, [a])
    with pytest.raises(UserError, match="no such directory"):
        merge_corpora(tmp_path / "all", [tmp_path / "nowhere"])
    assert not (tmp_path / "all").exists()


def test_a_damaged_trajectory_is_named_and_never_written(a, b, tmp_path):
    flip(a, 2, int(a.columns.length[2]) - 3)
    with pytest.raises(CorruptPayload, match=f"'{id_of(2)}' of corpus {a.location} .*array 'action'") as caught:
        merge_corpora(tmp_path / "all", [a, b])
    assert f"`rbm corpus check --repair {a.location}`, or leave it out with --skip-damaged" in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    done = merge_corpora(tmp_path / "all", [a, b], skip_damaged=True)
    assert [id for id, _ in done.damaged] == [id_of(2)]
    assert done.to_json()["damaged"] == [{"id": id_of(2), "what": "the checksum of array 'action' does not match"}]
    assert done.added == 8
    assert id_of(2) not in list(Corpus.open(tmp_path / "all").ids)
    assert check_corpus(tmp_path / "all").clean


def test_a_backup_mends_a_corpus_that_lost_trajectories(a, tmp_path):
    shutil.copytree(tmp_path / "a", tmp_path / "backup")
    before = payload_bytes(a)
    with CorpusWriter(a.location) as writer:
        writer.remove([id_of(0), id_of(4)])
    done = merge_corpora(a.location, [tmp_path / "backup"])
    assert (done.added, done.present) == (2, 3)
    assert payload_bytes(Corpus.open(a.location)) == before


_MERGE = """
import sys
from rbm.corpus import merge
from rbm.corpus.merge import merge_corpora
merge._SEGMENT_BYTES = 8000
merge_corpora(sys.argv[1], sys.argv[2:])
"""


def test_a_killed_merge_goes_on_when_it_is_run_again(tmp_path):
    source = write(tmp_path / "source", range(60))
    command = [sys.executable, "-c", _MERGE, str(tmp_path / "all"), str(tmp_path / "source")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment)
    snapshots = tmp_path / "all" / "snapshots"
    while process.poll() is None and not (snapshots.is_dir() and len(list(snapshots.iterdir())) > 4):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    some = len(Corpus.open(tmp_path / "all"))
    assert 0 < some < 60
    done = merge_corpora(tmp_path / "all", [source])
    assert (done.added, done.present) == (60 - some, some)
    assert list(payload_bytes(Corpus.open(tmp_path / "all")).items()) == list(payload_bytes(source).items())


def test_to_an_object_store_and_back(s3, a, b, tmp_path):
    url = f"s3://{BUCKET}/merged/all"
    merge_corpora(url, [a])
    done = merge_corpora(url, [a, b])
    assert (done.added, done.present) == (4, 5)
    merge_corpora(tmp_path / "back", [url])
    assert list(payload_bytes(Corpus.open(tmp_path / "back")).items()) == [
        *payload_bytes(a).items(), *payload_bytes(b).items(),
    ]  # fmt: skip
    assert check_corpus(url, decode=True).clean
    with pytest.raises(UserError, match="that stand for different trajectories: 1"):
        merge_corpora(url, [others(tmp_path, "other", 1, provenance="x")])


def test_a_payload_of_another_size_is_another_payload(a, tmp_path):
    record, clips = attempt(1, embodiment="panda")
    with CorpusWriter(tmp_path / "other") as writer:
        writer.add_source("tests", completion=0.9)
        writer.add(replace(record), clips, {"action": np.eye(7)})
    with pytest.raises(UserError, match="that stand for different trajectories: 1"):
        merge_corpora(tmp_path / "all", [a, tmp_path / "other"])
