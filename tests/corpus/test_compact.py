import json
from pathlib import Path

import icechunk
import numpy as np
import pytest
import zarr
from attempts import attempt, payload_bytes, write
from damage import flip, folder

from rbm.corpus import Corpus, CorpusWriter, CorruptPayload
from rbm.corpus.check import check_corpus
from rbm.corpus.compact import compact_corpus, rows_to_move
from rbm.corpus.history import add_tag, read_history
from rbm.errors import UserError


def id_of(number: int) -> str:
    return attempt(number)[0].id


def disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def segments(corpus: Corpus) -> set[str]:
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(folder(corpus))))
    root = zarr.open_group(repository.readonly_session(snapshot_id=corpus.snapshot).store, mode="r")
    return set(root["segments"].array_keys())


def test_which_trajectories_move():
    """Segments of at most 100 bytes: 0 is full, 1 and 2 are small, 3 is mostly dead, 4 is half alive, 5 is empty."""
    segment = np.array([0, 0, 1, 2, 2, 3, 4], np.int32)
    length = np.array([50, 40, 20, 10, 5, 30, 50])
    sizes = {0: 90, 1: 20, 2: 15, 3: 100, 4: 100, 5: 80}
    assert rows_to_move(segment, length, sizes, full=100).tolist() == [2, 3, 4, 5]
    alone = segment != 2
    assert rows_to_move(segment[alone], length[alone], sizes, full=100).tolist() == [3]  # one small one can stay
    assert rows_to_move(np.zeros(0, np.int32), np.zeros(0, np.int64), {}, full=100).tolist() == []


def test_small_segments_are_joined_and_nothing_else_changes(tmp_path):
    corpus = write(tmp_path / "c", range(12), commit_every=2)
    before, columns = payload_bytes(corpus), corpus.columns
    done = compact_corpus(tmp_path / "c")
    assert (done.moved, done.segments, done.dead, done.dropped, done.freed) == (12, (6, 1), 0, 0, 0)
    now = Corpus.open(tmp_path / "c")
    assert now.snapshot == done.snapshot
    assert list(payload_bytes(now).items()) == list(before.items())
    assert segments(now) == {"6"}
    assert now.columns.segment.tolist() == [6] * 12
    for name in ("task", "quality", "done", "length", "content", "n_frames"):
        np.testing.assert_array_equal(getattr(now.columns, name), getattr(columns, name))
    assert check_corpus(tmp_path / "c").clean
    assert payload_bytes(Corpus.open(tmp_path / "c", corpus.snapshot)) == before
    assert compact_corpus(tmp_path / "c").snapshot == done.snapshot  # nothing is left to do
    assert len(write(tmp_path / "c", range(12, 14))) == 14
    assert check_corpus(tmp_path / "c").clean


def test_full_segments_stay_and_new_ones_are_filled(tmp_path):
    corpus = write(tmp_path / "c", range(3), commit_every=None)
    full = int(corpus.columns.length.sum())
    for number in range(3, 9):
        corpus = write(tmp_path / "c", range(number, number + 1))
    before = payload_bytes(corpus)
    length = int(corpus.columns.length.max())
    assert length < full / 4 * 2
    done = compact_corpus(tmp_path / "c", segment_bytes=max(full - 100, 4 * length + 1))
    now = Corpus.open(tmp_path / "c")
    assert now.columns.segment.tolist()[:3] == [0, 0, 0]
    assert done.moved == 6
    assert len(set(now.columns.segment.tolist())) == done.segments[1] < 7
    assert list(payload_bytes(now).items()) == list(before.items())
    assert check_corpus(tmp_path / "c").clean


def test_what_was_removed_is_freed_with_the_history_and_tagged_snapshots_stay(tmp_path):
    corpus = write(tmp_path / "c", range(30), commit_every=10)
    all_of_it = payload_bytes(corpus)
    gone = [id_of(number) for number in range(30) if number % 10 > 2]
    with CorpusWriter(tmp_path / "c") as writer:
        writer.remove(gone)
    with CorpusWriter(tmp_path / "c") as writer:
        writer.remove([id_of(20), id_of(21), id_of(22)])  # segment 2 holds nothing now
    full = disk(tmp_path / "c" / "chunks")
    done = compact_corpus(tmp_path / "c")
    assert disk(tmp_path / "c" / "chunks") > full  # older snapshots still have theirs
    assert (done.moved, done.segments, done.dead) == (6, (3, 1), 0)
    left = payload_bytes(Corpus.open(tmp_path / "c"))
    assert list(left) == [id_of(number) for number in (0, 1, 2, 10, 11, 12)]
    assert left.items() <= all_of_it.items()

    add_tag(tmp_path / "c", "v1", corpus.snapshot)
    before = len(read_history(tmp_path / "c")) - 2
    done = compact_corpus(tmp_path / "c", drop_history=True)
    assert (done.dropped, done.kept) == (before - 1, ("v1",))  # the newest and v1 stay, as does the first, empty one
    assert len(list((tmp_path / "c" / "snapshots").iterdir())) == 3
    assert payload_bytes(Corpus.open(tmp_path / "c", "v1")) == all_of_it
    history = read_history(tmp_path / "c")
    assert history[0].trajectories == 6
    assert check_corpus(tmp_path / "c").clean
    assert check_corpus(tmp_path / "c", "v1").clean


def test_without_tags_the_disk_holds_little_more_than_what_is_left(tmp_path):
    write(tmp_path / "c", range(40), commit_every=4)
    before = disk(tmp_path / "c")
    with CorpusWriter(tmp_path / "c") as writer:
        writer.remove([id_of(number) for number in range(4, 40)])
    old = Corpus.open(tmp_path / "c").snapshot
    done = compact_corpus(tmp_path / "c", drop_history=True)
    assert done.freed > 0.8 * (before - disk(tmp_path / "c"))
    assert disk(tmp_path / "c") < before / 4
    assert len(payload_bytes(Corpus.open(tmp_path / "c"))) == 4
    assert check_corpus(tmp_path / "c").clean
    if old != done.snapshot:
        with pytest.raises(UserError, match="has no snapshot or tag"):
            Corpus.open(tmp_path / "c", old)
    assert len(write(tmp_path / "c", range(4, 6))) == 6
    json.dumps(vars(done))


def test_a_damaged_trajectory_stops_it_and_nothing_is_lost(tmp_path):
    corpus = write(tmp_path / "c", range(6), commit_every=2)
    before = payload_bytes(corpus)
    flip(corpus, 3, 200)
    with pytest.raises(CorruptPayload, match=rf"{id_of(3)}' of corpus .*check --repair {corpus.location}`"):
        compact_corpus(tmp_path / "c", drop_history=True)
    flip(corpus, 3, 200)
    assert Corpus.open(tmp_path / "c").snapshot == corpus.snapshot
    assert payload_bytes(Corpus.open(tmp_path / "c")) == before


def test_places_without_a_corpus(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        compact_corpus(tmp_path / "none")
    write(tmp_path / "c", range(2))
    with CorpusWriter(tmp_path / "c"), pytest.raises(UserError, match="is writing to it"):
        compact_corpus(tmp_path / "c")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["c"]
