import gzip
import json
import shutil

import numpy as np
import pytest
from attempts import attempt, write

from rbm.corpus import Corpus, CorpusWriter
from rbm.corpus.compact import compact_corpus
from rbm.corpus.index import Ids, Names
from rbm.corpus.selection import Selection
from rbm.corpus.tables import pack_strings
from rbm.errors import UserError


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return write(tmp_path / "data" / "c", range(9))


@pytest.mark.parametrize("name", ["some.json", "some.json.gz"])
def test_it_comes_back_as_it_was(corpus, tmp_path, name):
    selection = Selection.of(corpus, [7, 2, 5], {"quality": ["failure"]})
    assert selection.ids == ("tests/0002-é", "tests/0005-é", "tests/0007-é")
    selection.save(tmp_path / name)
    assert Selection.load(tmp_path / name) == selection
    opened, rows = selection.open()
    assert opened.snapshot == corpus.snapshot
    assert rows.dtype == np.int64
    assert rows.tolist() == [2, 5, 7]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["data", name]
    assert (gzip.decompress if name.endswith("gz") else bytes)((tmp_path / name).read_bytes()).startswith(b'{"format"')


def test_it_stays_what_it_was_when_the_corpus_changes(corpus):
    selection = Selection.of(corpus, corpus.select(task="open the drawer"), {"task": "open the drawer"})
    with CorpusWriter(corpus.location) as writer:
        writer.remove(["tests/0000-é", "tests/0003-é"])
        writer.add(*attempt(12))
    opened, rows = selection.open()
    assert opened.snapshot == corpus.snapshot != Corpus.open(corpus.location).snapshot
    assert rows.tolist() == [0, 3, 6]


def test_a_folder_with_both_can_be_moved(corpus, tmp_path):
    Selection.of(corpus, [1], {}).save(tmp_path / "data" / "some.json")
    assert json.loads((tmp_path / "data" / "some.json").read_text())["corpus"] == "c"
    shutil.move(tmp_path / "data", tmp_path / "moved")
    opened, rows = Selection.load(tmp_path / "moved" / "some.json").open()
    assert opened.location.local == tmp_path / "moved" / "c"
    assert rows.tolist() == [1]


def test_a_relative_path_is_meant_from_the_file(corpus, tmp_path, monkeypatch):
    (tmp_path / "selections").mkdir()
    file = tmp_path / "selections" / "some.json"
    Selection.of(corpus, [1], {}).save(file)
    assert json.loads(file.read_text())["corpus"] == str(tmp_path / "data" / "c")  # not below the file: as it is
    file.write_text(file.read_text().replace(str(tmp_path / "data" / "c"), "../data/c"))
    monkeypatch.chdir(tmp_path)
    assert Selection.load("selections/some.json").open()[1].tolist() == [1]


def test_none_and_all(corpus, tmp_path):
    assert Selection.of(corpus, [], {}).open()[1].tolist() == []
    assert Selection.of(corpus, range(9), {}).ids == tuple(corpus.ids)


def test_what_does_not_fit_the_corpus_is_named(corpus):
    place, snapshot = str(corpus.location), corpus.snapshot
    with pytest.raises(UserError, match=r"no trajectory 'x' \(unknown ids: 2\)"):
        Selection(place, snapshot, ("tests/0001-é", "x", "y")).open()
    with pytest.raises(UserError, match="twice"):
        Selection(place, snapshot, ("tests/0001-é", "tests/0001-é")).open()
    with pytest.raises(UserError, match=r"snapshot BBBBBBBBBBBBBBBBBBBB of corpus .* is gone"):
        Selection(place, "BBBBBBBBBBBBBBBBBBBB", ()).open()


def test_a_dropped_snapshot_is_said_with_the_file(corpus, tmp_path):
    Selection.of(corpus, [1], {}).save(tmp_path / "some.json")
    write(corpus.location, range(9, 10))
    compact_corpus(corpus.location, drop_history=True)
    with pytest.raises(UserError, match=rf"selection .*some.json: its snapshot {corpus.snapshot} .* is gone .*select`"):
        Selection.load(tmp_path / "some.json").open()


def test_files_that_are_no_selection(corpus, tmp_path):
    file = tmp_path / "some.json"
    good = Selection.of(corpus, [1, 2], {})
    good.save(file)
    text = file.read_text()
    for wrong, says in (
        (text[:-20], "damaged, or no selection"),
        ("[]", "some other file"),
        ('{"format": "rbm-corpus", "version": 1}', "some other file"),
        (text.replace('"version": 1', '"version": 2'), "reads up to 1: upgrade robot-rbm"),
        (text.replace('"snapshot"', '"snap"'), "lacks its corpus, snapshot, ids or filters"),
        (text.replace('"tests/0001-é"', "1"), "lacks"),
    ):
        file.write_text(wrong)
        with pytest.raises(UserError, match=says) as caught:
            Selection.load(file)
        assert "line 1" not in str(caught.value)
    good.save(tmp_path / "some.json.gz")
    packed = (tmp_path / "some.json.gz").read_bytes()
    for wrong in (packed[:-12], packed[:40] + bytes([packed[40] ^ 255]) + packed[41:], b"plain"):
        (tmp_path / "some.json.gz").write_bytes(wrong)
        with pytest.raises(UserError, match="damaged, or no selection"):
            Selection.load(tmp_path / "some.json.gz")
    with pytest.raises(UserError, match="No such file"):
        Selection.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="does not exist"):
        good.save(tmp_path / "none" / "some.json")


def test_many_ids_are_found_at_once():
    known = [f"source/{number % 7}/{number:06d}" for number in range(40_000)] + ["é", "ee", ""]
    heap, end = pack_strings(known)
    ids = Ids(heap, end, Names.build(heap, end))
    order = np.random.default_rng(0).permutation(len(known))
    asked = [known[row] for row in order] + ["nobody", "source/0/00000", "e"]
    assert ids.find_many(asked).tolist() == [*order.tolist(), -1, -1, -1]
    assert ids.find_many([]).tolist() == []
    single = Ids(*pack_strings(["one"]), Names.build(*pack_strings(["one"])))
    assert single.find_many(["two", "one", "three"]).tolist() == [-1, 0, -1]


def test_ids_that_share_a_hash_are_told_apart():
    heap, end = pack_strings(["first", "other"])
    true = Names.build(heap, end)
    wanted = true.hashes[true.rows.tolist().index(0)]
    ids = Ids(heap, end, Names(np.array([wanted, wanted]), np.array([1, 0], np.int32)))
    assert ids.find_many(["first", "other"]).tolist() == [0, -1]  # the hash of "other" is not in the table
