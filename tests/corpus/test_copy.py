import numpy as np
import pytest
from attempts import attempt, payload_bytes, same_record
from rich.progress import Progress

from rbm.corpus import Corpus, CorpusWriter, CorruptPayload, copy_corpus
from rbm.errors import UserError
from rbm.trajectory import Task


@pytest.fixture
def archive(tmp_path) -> Corpus:
    with CorpusWriter(tmp_path / "archive", "h264", commit_every=2) as writer:
        writer.add_source("tests", completion=0.9, licence="MIT")
        writer.add_task(Task(attempt(0)[0].task, scene="drawer", paraphrases=("pull",)))
        for number in range(5):
            views = ("front", "wrist") if number == 1 else ("main",)
            writer.add(*attempt(number, height=48, width=64, views=views), {"action": np.eye(4) * number})
    return Corpus.open(tmp_path / "archive")


def test_the_same_codec_copies_bytes_into_one_segment(archive, tmp_path):
    copy = copy_corpus(archive.location, tmp_path / "deep" / "copy")
    assert archive.info()["segments"] == 3
    assert copy.info()["segments"] == 1
    assert list(payload_bytes(copy).items()) == list(payload_bytes(archive).items())
    assert copy.sources == archive.sources
    assert tuple(copy.tasks) == tuple(archive.tasks)
    assert copy.info()["facts"] == {"copied_from": archive.snapshot}
    for name in ("task", "quality", "done", "n_frames", "embodiment"):
        np.testing.assert_array_equal(getattr(copy.columns, name), getattr(archive.columns, name))


def test_there_and_back_between_codecs(archive, tmp_path):
    with Progress(disable=True) as progress:
        jpeg = copy_corpus(archive, tmp_path / "jpeg", codec="jpeg", progress=progress)
    back = copy_corpus(jpeg, tmp_path / "back", codec="h264")
    for row, old in enumerate(archive):
        assert same_record(jpeg[row], old)
        assert same_record(back[row], old)
        np.testing.assert_array_equal(jpeg[row].array("action"), old.array("action"))
        for view in old.views:
            pixels = old.frames(view=view).astype(int)
            assert np.abs(jpeg[row].frames(view=view) - pixels).mean() < 5
            assert np.abs(back[row].frames(view=view) - pixels).mean() < 8
    assert jpeg.info()["codecs"] == ["jpeg"]


def test_some_rows_at_a_smaller_size(archive, tmp_path):
    copy = copy_corpus(archive, tmp_path / "small", codec="jpeg", size=24, rows=np.array([4, 1]))
    assert list(copy.ids) == [archive.ids[4], archive.ids[1]]
    assert copy[0].frames().shape == (6, 24, 32, 3)
    assert (copy[0].height, copy[0].width) == (24, 32)
    larger = copy_corpus(archive, tmp_path / "not-larger", codec="jpeg", size=480)
    assert larger[0].frames().shape == (6, 48, 64, 3)


def test_bad_requests(archive, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        copy_corpus(archive, archive.location)
    with pytest.raises(UserError, match="needs a size of at least 1 and a codec"):
        copy_corpus(archive, tmp_path / "x", size=24)
    with pytest.raises(UserError, match="no such directory"):
        copy_corpus(tmp_path / "nowhere", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_where_it_can_not_be_written_the_reason_is_said(archive, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"\(.*/file: (Not a directory|File exists)\): see that it can be") as caught:
        copy_corpus(archive, tmp_path / "file" / "copy")
    assert "make room" not in str(caught.value)
    assert "last commit" not in str(caught.value)


def test_a_damaged_trajectory_stops_the_copy_and_leaves_nothing(archive, tmp_path):
    payload = archive.payload(3)
    clip = payload.data[payload.head.ends[0] : payload.head.ends[1]].tobytes()
    for file in (archive.location.local / "chunks").iterdir():
        data = file.read_bytes()
        if clip in data:
            file.write_bytes(data.replace(clip, clip[:100] + bytes([clip[100] ^ 1]) + clip[101:]))
    for codec in (None, "jpeg"):
        with pytest.raises(CorruptPayload, match=f"tests/0003-é' of corpus {archive.location} .*--repair"):
            copy_corpus(archive.location, tmp_path / "copy", codec=codec)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["archive"]
