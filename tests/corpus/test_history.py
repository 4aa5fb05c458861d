from datetime import UTC, datetime, timedelta

import pytest
from attempts import attempt, write

from rbm.corpus import Corpus, CorpusWriter
from rbm.corpus.compact import compact_corpus
from rbm.corpus.history import add_tag, delete_tag, read_history
from rbm.errors import UserError


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    write(tmp_path / "c", range(3))
    with CorpusWriter(tmp_path / "c") as writer:
        writer.remove([attempt(0)[0].id])
    return write(tmp_path / "c", range(3, 7))


def test_snapshots_come_newest_first_with_what_they_hold(corpus):
    history = read_history(corpus.location)
    assert history[0].id == corpus.snapshot
    assert [one.trajectories for one in history] == [6, 2, 3, 0]
    assert history[0].message == "4 trajectories added, 6 in all"
    assert "1 removed" in history[1].message
    assert [one.time for one in history] == sorted((one.time for one in history), reverse=True)
    assert abs(datetime.now(UTC) - history[0].time) < timedelta(minutes=5)
    assert read_history(corpus.location, limit=2) == history[:2]


def test_tags_name_snapshots(corpus):
    first = read_history(corpus.location)[2].id
    assert add_tag(corpus.location, "v2") == corpus.snapshot
    assert add_tag(corpus.location, "v1", first) == first
    assert add_tag(corpus.location, "also-v1.0", "v1") == first
    assert [one.tags for one in read_history(corpus.location)] == [("v2",), (), ("also-v1.0", "v1"), ()]
    assert len(Corpus.open(corpus.location, "v1")) == 3
    delete_tag(corpus.location, "v1")
    assert [one.tags for one in read_history(corpus.location)][2] == ("also-v1.0",)
    with pytest.raises(UserError, match="has no snapshot or tag 'v1'"):
        Corpus.open(corpus.location, "v1")


def test_tagged_snapshots_stand_where_they_belong_even_when_cut_off(corpus):
    before = read_history(corpus.location)
    add_tag(corpus.location, "v1", before[2].id)
    assert read_history(corpus.location, limit=2) == before[:2]
    now = compact_corpus(corpus.location, drop_history=True).snapshot
    write(corpus.location, range(7, 8))
    history = read_history(corpus.location)
    assert [(one.trajectories, one.tags) for one in history] == [(7, ()), (6, ()), (3, ("v1",)), (0, ())]
    assert [history[1].id, history[2].id] == [now, before[2].id]
    assert read_history(corpus.location, limit=3) == history[:3]


def test_tags_that_are_refused(corpus):
    add_tag(corpus.location, "v1")
    with pytest.raises(UserError, match="'v1' exists already, for snapshot"):
        add_tag(corpus.location, "v1")
    for name in ("", "a/b", "..", "-x", "ä", "a b"):
        with pytest.raises(UserError, match="a name has letters"):
            add_tag(corpus.location, name)
    with pytest.raises(UserError, match="has no snapshot or tag 'nothing'"):
        add_tag(corpus.location, "v2", "nothing")
    with pytest.raises(UserError, match="has no tag 'v2'; it has: v1"):
        delete_tag(corpus.location, "v2")
    delete_tag(corpus.location, "v1")
    with pytest.raises(UserError, match="a deleted name can not be used again"):
        add_tag(corpus.location, "v1")


def test_a_snapshot_without_a_readable_index_says_so(corpus):
    history = read_history(corpus.location)
    place = corpus.location.local
    assert place is not None
    (place / "snapshots" / history[1].id).unlink()
    with pytest.raises(UserError, match="can not be read"):
        read_history(corpus.location)
    assert read_history(corpus.location, limit=1) == history[:1]
    with pytest.raises(UserError, match="no such directory"):
        read_history(place / "none")
