import json
import logging
from pathlib import Path

import numpy as np
import pytest

from dataset_builder.pipeline import build
from dataset_builder.sources.videos import VideosSource
from rbm.corpus import Corpus
from rbm.errors import UserError
from rbm.video import encode_video

HEADER = "video,task,quality,done_seconds,done_frame,messy,partial_success,embodiment\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three real videos, 10 frames a second."""
    base = tmp_path / "meine Vidéos"
    (base / "clips").mkdir(parents=True)
    for number, n_frames in enumerate((12, 90, 1)):
        frames = np.zeros((n_frames, 40, 60, 3), np.uint8)
        for t, frame in enumerate(frames):
            frame[:, t * 60 // n_frames :] = 200
        encode_video(base / "clips" / f"v{number}.mp4", frames, 10.0)
    return base


def table(folder: Path, text: str, name: str = "table.csv") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def collect(source: VideosSource) -> list:
    return [item for unit in source.units() for item in source.collect(unit, set())]


def test_a_table_of_videos_becomes_a_corpus(folder, tmp_path):
    rows = (
        "clips/v0.mp4,open the door,,0.55,,,,franka\n"
        'clips/v1.mp4,"close it, slowly",suboptimal,,,no,0.4,\n'
        "./clips/v2.mp4,open the door,successful,,0,yes,,\n"
    )
    source = VideosSource(table(folder, HEADER + rows), name="mine", embodiment="hand", rows_per_unit=2)
    summary = build(source, tmp_path / "c", workers=2, progress=False)
    assert summary.added == {"successful": 2, "suboptimal": 1}
    corpus = Corpus.open(tmp_path / "c")
    assert list(corpus.ids) == ["mine/clips/v0.mp4", "mine/clips/v1.mp4", "mine/clips/v2.mp4"]
    first, second, third = corpus
    assert (first.task, first.quality, first.embodiment) == ("open the door", "successful", "franka")
    assert first.done_index == 5  # the frame on screen at 0.55 s
    assert corpus.columns.done.tolist() == [5, -1, 0]
    assert (second.task, second.partial_success, second.embodiment) == ("close it, slowly", 0.4, "hand")
    assert second.n_frames == 64
    assert second.frame_index[[0, -1]].tolist() == [0, 89]
    assert (third.messy, third.n_frames, second.messy) == (True, 1, False)
    assert first.frames().shape == (12, 40, 60, 3)
    assert "sha256:" in first.provenance
    assert corpus.sources["mine"].facts["family"] == "videos"


def test_json_lines_say_the_same_as_csv(folder):
    rows = [
        {"video": "clips/v0.mp4", "task": "open the door", "done_frame": 7, "messy": True},
        {"video": str(folder / "clips" / "v1.mp4"), "task": "shut it", "quality": "failure", "partial_success": None},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    first, second = collect(VideosSource(table(folder, text, "table.jsonl")))
    assert first.trajectory.done_index == 7
    assert first.trajectory.messy
    assert second.trajectory.id == "videos/clips/v1.mp4"
    assert second.trajectory.quality == "failure"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("clips/v0.mp4,,,,,,,", "line 3: the task is empty"),
        (",do,,,,,,", "line 3: the video is empty"),
        ("clips/v0.mp4,do,good,,,,,", "line 3: unknown quality 'good'"),
        ("clips/v0.mp4,do,,soon,,,,", "line 3: done_seconds 'soon' is no number"),
        ("clips/v0.mp4,do,,1,3,,,", "line 3: has done_seconds and done_frame"),
        ("clips/v0.mp4,do,failure,1,,,,", "line 3: says when the task was done, and that it is failure"),
        ("clips/v0.mp4,do,,,2.5,,,", "line 3: done_frame 2.5 is no frame number"),
        ("clips/v0.mp4,do,,,12,,,", "line 3: done_frame 12, the last frame is 11"),
        ("clips/v0.mp4,do,,1.4,,,,", "line 3: done_seconds 1.4, the video ends at 1.10"),
        ("clips/v0.mp4,do,,,,maybe,,", "line 3: messy 'maybe'"),
        ("clips/v0.mp4,do,,,,,1.5,", "line 3: partial_success 1.5"),
        ("clips/v1.mp4,do,,,,,,", "line 3: 'clips/v1.mp4' stands on line 2 already"),
        ("clips/none.mp4,do,,,,,,", "line 3: .*none.mp4"),
        ("broken.mp4,do,,,,,,", "line 3: .*broken.mp4"),
    ],
)
def test_a_bad_row_stops_or_is_skipped_and_named(folder, row, sentence):
    (folder / "broken.mp4").write_bytes((folder / "clips" / "v1.mp4").read_bytes()[:700])
    text = HEADER + "clips/v1.mp4,open the door,,,,,,\n" + row + "\nclips/v2.mp4,do,,,,,,\n"
    path = table(folder, text)
    with pytest.raises(UserError, match=sentence) as caught:
        collect(VideosSource(path))
    assert "\n" not in str(caught.value)
    good, skipped, last = collect(VideosSource(path, on_error="skip"))
    assert good.trajectory.id == "videos/clips/v1.mp4"
    assert last.trajectory.id == "videos/clips/v2.mp4"
    assert f"{path} line 3" in skipped.what
    assert skipped.reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("video,quality\na,b\n", r"has no column task \(columns: video, quality\)"),
        ("", r"has no column video and task \(columns: none\)"),
        ("video,task,qualty\n", "column 'qualty' is unknown: is it 'quality'"),
        (HEADER, "has no rows"),
        (HEADER + "a.mp4,open,,,,,,franka,left\n", "line 2: has more cells than the header"),
    ],
)
def test_a_table_with_wrong_columns_is_refused_even_when_rows_may_be_skipped(folder, text, sentence):
    with pytest.raises(UserError, match=sentence):
        VideosSource(table(folder, text), on_error="skip").units()


def test_tables_that_can_not_be_read(folder):
    (folder / "latin.csv").write_bytes(HEADER.encode() + "a,öffne,,,,,,\n".encode("latin-1"))
    for name, sentence in [
        ("none.csv", "No such file"),
        ("clips/v0.mp4", "is no table of videos"),
        ("latin.csv", "can not be read"),
    ]:
        with pytest.raises(UserError, match=sentence):
            VideosSource(str(folder / name)).units()
    with pytest.raises(UserError, match="line 1: no JSON"):
        VideosSource(table(folder, "{video}\n", "x.jsonl")).units()
    with pytest.raises(UserError, match="line 1: need a JSON object"):
        VideosSource(table(folder, "[1]\n", "x.jsonl")).units()
    with pytest.raises(UserError, match="choose stop or skip"):
        VideosSource("x.csv", on_error="ignore")


def test_a_column_of_the_users_own_is_left_with_a_warning(folder, caplog):
    path = table(folder, "video,task,operator\nclips/v0.mp4,open,Ada\n")
    with caplog.at_level(logging.WARNING):
        assert len(collect(VideosSource(path))) == 1
    assert "column 'operator' is not used" in caplog.text
