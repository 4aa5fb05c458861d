import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from attempts import attempt, payload_bytes, write
from damage import flip, folder, manifest_file, rewrite_index, shard_file
from rich.progress import Progress
from s3_server import BUCKET

from rbm.corpus import Corpus, CorpusWriter, cache, pack
from rbm.corpus.check import check_corpus
from rbm.corpus.export import export_plain
from rbm.corpus.payload import PREFIX
from rbm.corpus.repair import repair_corpus
from rbm.errors import UserError
from rbm.trajectory import Task

IDS = [attempt(number)[0].id for number in range(9)]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """9 attempts in 3 segments of one shard each; one has a side array and dense labels."""
    path = tmp_path_factory.mktemp("original") / "c"
    with CorpusWriter(path, commit_every=3) as writer:
        writer.add_source("tests", completion=0.9)
        for number in range(9):
            changes = {"progress": np.linspace(0, 1, 6)} if number == 4 else {}
            record, clips = attempt(number, partial_success=0.3 if number == 2 else None, **changes)
            writer.add(record, clips, {"action": np.arange(40.0)} if number == 4 else None)
    return path


@pytest.fixture
def corpus(original, tmp_path, monkeypatch) -> Corpus:
    monkeypatch.setenv("RBM_CACHE", str(tmp_path / "cache"))
    shutil.copytree(original, tmp_path / "c")
    return Corpus.open(tmp_path / "c")


def names(report):
    return {bad.id: bad.what for bad in report.bad}


def test_a_whole_corpus_is_clean(corpus):
    with Progress(disable=True) as progress:
        report = check_corpus(corpus.location, decode=True, progress=progress)
    assert report.clean
    assert (report.trajectories, report.bytes) == (9, int(corpus.columns.length.sum()))
    assert report.snapshot == corpus.snapshot
    assert json.loads(json.dumps(report.to_json()))["clean"]


def test_a_flipped_byte_anywhere_in_a_payload_is_found_and_named(corpus):
    """Row 4 has all that a payload can have; one byte of each region, and thirty more at random."""
    head = corpus.payload(4).head
    ends = head.ends.tolist()
    regions = {
        "magic": 0, "head size": 5, "JSON size": 9, "checksum": 13, "JSON": 40, "frame_index": ends[0] - 200,
        "sizes and checksums": ends[0] - 1, "first frame": ends[0], "last frame": ends[6] - 1, "array": ends[-1] - 1,
    }  # fmt: skip
    assert PREFIX.size == 16
    file, _ = shard_file(corpus, 4)
    whole = file.read_bytes()
    more = np.random.default_rng(0).integers(0, ends[-1], 30).tolist()
    for place in [*regions.values(), *more]:
        flip(corpus, 4, place)
        report = check_corpus(corpus.location)
        assert [bad.id for bad in report.bad] == [IDS[4]], place
        assert report.bad[0].what
        assert not report.clean
        file.write_bytes(whole)
    assert check_corpus(corpus.location).clean


def test_it_says_what_is_damaged(corpus):
    ends = corpus.payload(4).head.ends.tolist()
    flip(corpus, 4, ends[2] + 10)
    flip(corpus, 7, 0)
    flip(corpus, 1, 30)
    assert names(check_corpus(corpus.location)) == {
        IDS[1]: "the checksum of its header does not match",
        IDS[4]: "the checksum of frame 2 of view 'main' does not match",
        IDS[7]: "no payload starts where the index says",
    }


def test_a_missing_and_a_truncated_shard_are_named_with_what_was_in_them(corpus):
    missing, _ = shard_file(corpus, 0)
    cut, at = shard_file(corpus, 7)
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[: at + 50])
    report = check_corpus(corpus.location)
    assert [(shard.name, shard.what, shard.ids) for shard in report.shards] == [
        ("segments/0/c/0", "missing", tuple(IDS[:3])),
        ("segments/2/c/0", "cut short", (IDS[7], IDS[8])),
    ]
    assert sorted(names(report)) == sorted([*IDS[:3], IDS[7], IDS[8]])
    assert "rows" not in report.to_json()["shards"][0]


def test_an_index_that_does_not_fit_the_payloads(corpus):
    def change(root):
        for name, row, value in (
            ("n_frames", 0, 5), ("task", 1, 99), ("source", 2, -1), ("quality", 3, 2), ("done", 4, 0),
            ("content", 5, 12345), ("length", 6, 10**9), ("partial_success", 8, 0.5),
        ):  # fmt: skip
            root[f"index/{name}"][row] = value

    rewrite_index(corpus, change)
    found = names(check_corpus(corpus.location))
    assert found[IDS[0]] == "the index says n_frames 5, its record 6"
    assert found[IDS[1]] == "the index says task number 99, there are 3"
    assert found[IDS[2]] == "the index says source number -1, there are 1"
    assert found[IDS[3]] == "the index says quality 2, its record 1"
    assert "done" in found[IDS[4]]
    assert "content 12345" in found[IDS[5]]
    assert "segment 2" in found[IDS[6]]
    assert found[IDS[8]] == "the index says partial_success 0.5, its record None"
    assert set(found) == {*IDS} - {IDS[7]}


def test_ids_that_repeat_and_rows_that_lie_on_each_other(corpus):
    def change(root):
        heap = root["index/id_heap"]
        size = heap.shape[0] // 9
        heap[size * 3 : size * 4] = heap[size * 2 : size * 3]
        for name in ("segment", "offset", "length"):
            root[f"index/{name}"][6] = root[f"index/{name}"][5]

    rewrite_index(corpus, change)
    report = check_corpus(corpus.location)
    assert report.index == (f"2 trajectories have the id {IDS[2]!r}",)
    assert {bad.row for bad in report.bad} == {3, 6}


def test_frames_that_do_not_decode_are_found_only_by_decoding(tmp_path):
    with CorpusWriter(tmp_path / "c") as writer:
        writer.add(*attempt(0))
        good = pack(*attempt(1))
        broken = pack(*attempt(1), codec=_NotJpeg())
        assert broken.codec == good.codec
        writer.add_packed(broken)
    assert check_corpus(tmp_path / "c").clean
    report = check_corpus(tmp_path / "c", decode=True)
    assert list(names(report)) == [IDS[1]]
    assert "frame 0 of view 'main'" in report.bad[0].what


class _NotJpeg:
    """An encoder gone wrong: its bytes carry good checksums and are no pictures."""

    name = "jpeg"

    def encode(self, frames, fps):
        return [b"\xff\xd8 no picture" for _ in frames]

    def decode(self, part, indices, height, width, min_side=None):
        raise NotImplementedError


def test_an_older_snapshot_can_be_checked(corpus):
    with CorpusWriter(corpus.location) as writer:
        writer.remove([IDS[0]])
    flip(corpus, 0, 100)
    assert check_corpus(corpus.location).clean
    assert list(names(check_corpus(corpus.location, corpus.snapshot))) == [IDS[0]]


def test_a_damaged_cache_is_found_and_made_again(corpus):
    assert check_corpus(corpus.location).clean
    for name in ("task.npy", "partial_success.npy", "id_heap.npy"):
        file = next(cache.folder().glob(f"{corpus.snapshot}*/{name}"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        report = check_corpus(corpus.location)
        assert report.cache_damaged
        assert not report.bad  # payloads are compared with the store's index
        assert repair_corpus(corpus.location).cache_made
        assert check_corpus(corpus.location).clean
    assert Corpus.open(corpus.location).snapshot == corpus.snapshot  # no new snapshot for that


def test_repair_takes_out_what_is_damaged_and_keeps_the_rest(corpus):
    before = payload_bytes(corpus)
    flip(corpus, 4, 100)
    shard_file(corpus, 0)[0].unlink()
    done = repair_corpus(corpus.location)
    assert (done.removed, done.moved, done.lost_snapshot) == (4, 0, "")
    assert [bad.id for bad in done.report.bad] == [*IDS[:3], IDS[4]]
    mended = Corpus.open(corpus.location)
    assert mended.snapshot == done.snapshot != corpus.snapshot
    assert payload_bytes(mended) == {id: before[id] for id in (IDS[3], *IDS[5:])}
    assert check_corpus(corpus.location).clean
    assert len(Corpus.open(corpus.location, corpus.snapshot)) == 9
    assert repair_corpus(corpus.location).snapshot == done.snapshot
    json.dumps(done.to_json())


def test_a_shard_whose_own_index_is_damaged_gives_its_payloads_to_a_new_one(corpus):
    before = payload_bytes(corpus)
    file, _ = shard_file(corpus, 4)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    report = check_corpus(corpus.location)
    assert [(shard.name, shard.ids) for shard in report.shards] == [("segments/1/c/0", ())]
    assert "plain zarr" in report.shards[0].what
    assert not report.bad
    assert repair_corpus(corpus.location).moved == 3
    assert check_corpus(corpus.location).clean
    assert list(payload_bytes(Corpus.open(corpus.location)).items()) == list(before.items())


@pytest.mark.parametrize("kind", ["snapshot", "index"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_lost_index_sets_the_corpus_back_to_the_snapshot_before(corpus, kind, how):
    with CorpusWriter(corpus.location) as writer:
        writer.add(*attempt(9))
    lost = Corpus.open(corpus.location).snapshot
    file = folder(corpus) / "snapshots" / lost if kind == "snapshot" else manifest_file(corpus, lost, "/index/task")
    _damage(file, how)
    report = check_corpus(corpus.location)
    assert not report.clean
    assert f"the index of snapshot {lost} is damaged" in report.index[0]
    assert report.trajectories == 0
    done = repair_corpus(corpus.location)
    assert done.lost_snapshot == lost
    assert (done.lost_trajectories, done.report.trajectories) == (10, 9)
    assert done.lost_ids == (attempt(9)[0].id,)  # told by the local copy
    assert done.snapshot == corpus.snapshot
    assert done.collected == 0
    assert check_corpus(corpus.location).clean
    assert list(write(corpus.location, range(9, 12)).ids) == [attempt(number)[0].id for number in range(12)]


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_lost_list_of_shards_costs_what_only_it_knew(corpus, how):
    with CorpusWriter(corpus.location) as writer:
        writer.add(*attempt(9))
    newest = Corpus.open(corpus.location).snapshot
    _damage(manifest_file(corpus, newest, "/segments/3"), how)
    report = check_corpus(corpus.location)
    assert list(names(report)) == [attempt(9)[0].id]
    assert [shard.name for shard in report.shards] == ["segments/3/c/0"]
    assert repair_corpus(corpus.location).removed == 1
    assert check_corpus(corpus.location).clean
    assert len(payload_bytes(Corpus.open(corpus.location))) == 9


def _damage(file: Path, how: str) -> None:
    """Not of one byte only: in a snapshot, which has no checksum, that may be a letter of its message."""
    data = bytearray(file.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 16):
        data[place] ^= 255
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data if how == "flipped" else data[:-10])


def test_a_snapshot_reference_left_empty_by_a_power_failure(corpus):
    with CorpusWriter(corpus.location) as writer:
        writer.add(*attempt(9))
    newest = Corpus.open(corpus.location).snapshot
    for text in ("", "{}"):
        (folder(corpus) / "refs" / "branch.main" / "ref.json").write_text(text)
        with pytest.raises(UserError, match=r"ref.json, .* is damaged: run `rbm corpus check --repair"):
            Corpus.open(corpus.location)
        report = check_corpus(corpus.location)
        assert (report.clean, report.snapshot, len(report.index)) == (False, "", 1)
        done = repair_corpus(corpus.location)
        assert done.reference_made
        assert done.snapshot == newest
        assert len(Corpus.open(corpus.location)) == 10


@pytest.mark.parametrize("reference", [None, b"", b"{garbage"])
def test_a_corpus_is_not_set_back_to_nothing(tmp_path, monkeypatch, reference):
    monkeypatch.setenv("RBM_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "c"
    with CorpusWriter(place) as writer:
        writer.add_task(Task("open the door"))
    lost = write(place, range(3))
    (place / "snapshots" / lost.snapshot).write_bytes(b"garbage")
    file = place / "refs" / "branch.main" / "ref.json"
    if reference is not None:
        file.write_bytes(reference)
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"no snapshot with trajectories can be read, .* restore it from a backup"):
        repair_corpus(place)
    assert file.read_bytes() == before


def test_a_corpus_emptied_on_purpose_stays_empty(tmp_path):
    write(tmp_path / "c", range(2))
    with CorpusWriter(tmp_path / "c") as writer:
        writer.remove(IDS[:2])
        newest = writer.commit()
    (tmp_path / "c" / "refs" / "branch.main" / "ref.json").write_text("")
    assert repair_corpus(tmp_path / "c").snapshot == newest


def test_what_can_not_be_repaired_is_not_sent_round(corpus):
    (folder(corpus) / "config.yaml").write_bytes(b"{garbage")
    with pytest.raises(UserError, match="run `rbm corpus check --repair"):
        check_corpus(corpus.location)
    with pytest.raises(UserError, match=r"can not be repaired \(.*\): restore it from a backup") as caught:
        repair_corpus(corpus.location)
    assert "--repair" not in str(caught.value)


def test_parts_of_a_corpus_and_a_plain_export_are_not_taken_for_room(corpus, tmp_path):
    export_plain(corpus, tmp_path / "plain")
    with pytest.raises(UserError, match="a plain Zarr export of a corpus: open the corpus that it came from"):
        check_corpus(tmp_path / "plain")
    for name in ("refs", "snapshots"):
        (folder(corpus) / name).rename(tmp_path / "aside")
        for use in (Corpus.open, check_corpus, repair_corpus):
            with pytest.raises(UserError, match=f"parts of a corpus are there, but {name}/ is missing: restore it"):
                use(corpus.location)
        (tmp_path / "aside").rename(folder(corpus) / name)


def test_nothing_is_done_where_all_is_damaged(corpus):
    shutil.move(folder(corpus) / "chunks", folder(corpus).parent / "elsewhere")
    with pytest.raises(UserError, match=r"every trajectory is damaged .* nothing was changed"):
        repair_corpus(corpus.location)
    shutil.move(folder(corpus).parent / "elsewhere", folder(corpus) / "chunks")
    assert check_corpus(corpus.location).clean
    assert Corpus.open(corpus.location).snapshot == corpus.snapshot


def test_files_that_may_not_be_read_are_not_taken_for_damage(corpus):
    if os.geteuid() == 0:
        file, _ = shard_file(corpus, 0)
        file.rename(file.with_suffix(".aside"))
        file.mkdir()  # the superuser may read all, but no directory
    else:
        shard_file(corpus, 0)[0].chmod(0)
    with pytest.raises(UserError, match=r"can not be read: (Permission denied|Is a directory)"):
        repair_corpus(corpus.location)
    assert len(Corpus.open(corpus.location)) == 9


_DIE = """
import os, signal, sys
from attempts import attempt
from rbm.corpus import CorpusWriter
with CorpusWriter(sys.argv[1], commit_every=None) as writer:
    writer.add(*attempt(20))
    writer._segment.close()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_repair_collects_what_a_killed_writer_left(corpus):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    before = len(list((folder(corpus) / "chunks").iterdir()))
    died = subprocess.run([sys.executable, "-c", _DIE, str(folder(corpus))], env=environment)
    assert died.returncode == -signal.SIGKILL
    assert len(list((folder(corpus) / "chunks").iterdir())) == before + 1
    done = repair_corpus(corpus.location)
    assert done.collected > 1000
    assert len(list((folder(corpus) / "chunks").iterdir())) == before
    assert check_corpus(corpus.location).clean


def test_repair_waits_for_no_writer(corpus):
    with CorpusWriter(corpus.location), pytest.raises(UserError, match="is writing to it"):
        repair_corpus(corpus.location)


def test_places_without_a_corpus(tmp_path):
    for run in (check_corpus, repair_corpus):
        with pytest.raises(UserError, match="no such directory"):
            run(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_an_object_store_that_lost_or_cut_an_object(s3):
    corpus = write(f"s3://{BUCKET}/checked/c", range(9), commit_every=3)
    objects = corpus.location.objects(20)
    shards = [item["path"] for item in objects.list("checked/c/chunks/").collect()]
    assert len(shards) == 3
    objects.delete(shards[0])
    data = bytes(objects.get(shards[1]).bytes())
    objects.put(shards[1], data[:9000])
    report = check_corpus(corpus.location)
    lost = {shard.name: shard.what for shard in report.shards}
    assert len(lost) == 2
    assert {bad.id for bad in report.bad} == {id for shard in report.shards for id in shard.ids}
    assert 4 <= len(report.bad) <= 6
    assert repair_corpus(corpus.location).removed == len(report.bad)
    assert check_corpus(corpus.location).clean
    assert len(payload_bytes(Corpus.open(corpus.location))) == 9 - len(report.bad)
