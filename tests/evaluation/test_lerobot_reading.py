"""Reading LeRobot data sets: the right frame of the right episode, and a sentence for whatever is wrong with one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_dataset import CAMERAS, EPISODES, FPS, Filmed, read_picture, write_lerobot

from rbm.errors import UserError
from rbm.evaluation.lerobot import LeRobotDataset, is_lerobot

SHORT = (Filmed("push the cube", 6), Filmed("pull the cube", 4))


@pytest.mark.parametrize(("version", "codec"), [("v3.0", "av1"), ("v3.0", "h264"), ("v2.1", "av1"), ("v2.1", "h264")])
def test_every_frame_of_every_episode_is_the_right_one(tmp_path: Path, version: str, codec: str) -> None:
    folder = write_lerobot(tmp_path / "data set", version, codec)
    assert is_lerobot(folder)
    dataset = pickle.loads(pickle.dumps(LeRobotDataset(folder)))
    assert (dataset.version, dataset.fps, dataset.cameras, len(dataset)) == (version, FPS, CAMERAS, len(EPISODES))
    first = 0
    for number, filmed in enumerate(EPISODES):
        episode = dataset.episode(number)
        assert (episode.index, episode.start, len(episode)) == (number, first, filmed.length)
        assert (episode.task, episode.n_tasks) == (filmed.tasks, 1)
        np.testing.assert_allclose(episode.timestamp, np.arange(filmed.length) / FPS, atol=1e-6)
        first += filmed.length
        for place, camera in enumerate(CAMERAS):
            for positions in (np.arange(filmed.length), np.unique([0, filmed.length // 2, filmed.length - 1])):
                shown = [read_picture(frame) for frame in dataset.frames(episode, camera, positions)]
                assert shown == [(number, position, place) for position in positions]


def test_version_2_0_lies_as_2_1_does(tmp_path: Path) -> None:
    dataset = LeRobotDataset(write_lerobot(tmp_path / "old", "v2.1", episodes=SHORT, info={"codebase_version": "v2.0"}))
    (frame,) = dataset.frames(dataset.episode(1), CAMERAS[1], np.array([3]))
    assert read_picture(frame) == (1, 3, 1)


def test_a_camera_is_named_in_full_or_by_its_end(tmp_path: Path) -> None:
    dataset = LeRobotDataset(write_lerobot(tmp_path / "set", episodes=SHORT))
    assert dataset.camera(None) == CAMERAS[0]
    assert dataset.camera("wrist") == dataset.camera(CAMERAS[1]) == CAMERAS[1]
    with pytest.raises(UserError, match=r"no camera 'side'; there are observation.images.top"):
        dataset.camera("side")
    with pytest.raises(UserError, match="no camera 'depth'"):
        dataset.camera("depth")


def test_an_episode_with_several_tasks_counts_them(tmp_path: Path) -> None:
    mixed = Filmed(["reach"] * 3 + ["grasp"] * 2, 5)
    episode = LeRobotDataset(write_lerobot(tmp_path / "set", episodes=(SHORT[0], mixed))).episode(1)
    assert (episode.task, episode.n_tasks) == ("reach", 2)


def test_two_data_sets_are_told_apart(tmp_path: Path) -> None:
    a, b = (LeRobotDataset(write_lerobot(tmp_path / name, episodes=SHORT)) for name in "ab")
    longer = LeRobotDataset(write_lerobot(tmp_path / "c", episodes=(*SHORT, Filmed("push the cube", 3))))
    assert a.fingerprint == b.fingerprint != longer.fingerprint


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(path: Path, column: str) -> None:
    table = pq.read_table(path)
    pq.write_table(table.drop_columns([column]), path)


def replaced(path: Path, column: str, values: pa.Array) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, values), path)


INFO = "meta/info.json"
LIST = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
VIDEO = f"videos/{CAMERAS[0]}/chunk-000/file-000.mp4"

BROKEN_SET: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "another version": ("v3.0", lambda at: edit(at / INFO, codebase_version="v4.0"), "codebase_version is 'v4.0'"),
    "no version": ("v3.0", lambda at: edit(at / INFO, codebase_version=None), "codebase_version is None"),
    "no JSON": ("v3.0", lambda at: (at / INFO).write_text("{"), "cannot be read as JSON"),
    "a list": ("v3.0", lambda at: (at / INFO).write_text("[]"), "holds no JSON object"),
    "no rate": ("v3.0", lambda at: edit(at / INFO, fps="ten"), "fps in meta/info.json is 'ten'"),
    "pictures": (
        "v3.0",
        lambda at: edit(at / INFO, features={"top": {"dtype": "image"}}),
        "none of its features is a video",
    ),
    "no tasks": ("v3.0", lambda at: (at / "meta/tasks.parquet").unlink(), "tasks.parquet is missing"),
    "tasks without text": (
        "v3.0",
        lambda at: without(at / "meta/tasks.parquet", "__index_level_0__"),
        "needed are task_index and a text",
    ),
    "no list of episodes": ("v3.0", lambda at: (at / LIST).unlink(), "meta/episodes holds no parquet file"),
    "list damaged": ("v3.0", lambda at: (at / LIST).write_bytes(b"PAR1 and no more"), "cannot be read"),
    "list without places": (
        "v3.0",
        lambda at: without(at / LIST, f"videos/{CAMERAS[0]}/from_timestamp"),
        "lacks the column videos/observation.images.top/from_timestamp",
    ),
    "list with gaps": (
        "v3.0",
        lambda at: replaced(at / LIST, "length", pa.array([6, None], pa.int64())),
        "the column length has gaps",
    ),
    "an episode twice": (
        "v3.0",
        lambda at: replaced(at / LIST, "episode_index", pa.array([1, 1], pa.int64())),
        "names an episode twice",
    ),
    "texts for numbers": (
        "v3.0",
        lambda at: replaced(at / LIST, "length", pa.array(["six", "four"])),
        "cannot be read",
    ),
    "frames without times": ("v3.0", lambda at: without(at / DATA, "timestamp"), "lacks the column timestamp"),
    "no tasks in lines": ("v2.1", lambda at: (at / "meta/tasks.jsonl").unlink(), "tasks.jsonl is missing"),
    "lines of something else": (
        "v2.1",
        lambda at: (at / "meta/episodes.jsonl").write_text('{"episode_index": "0"}\n'),
        "line 1 lacks episode_index or length",
    ),
    "lines cut": ("v2.1", lambda at: (at / "meta/episodes.jsonl").write_text('{"episode'), "cannot be read as JSON"),
}


@pytest.mark.parametrize("name", list(BROKEN_SET))
def test_what_is_wrong_with_a_data_set_is_a_sentence(tmp_path: Path, name: str) -> None:
    version, damage, says = BROKEN_SET[name]
    folder = write_lerobot(tmp_path / "set", version, episodes=SHORT)
    damage(folder)
    with pytest.raises(UserError) as caught:
        LeRobotDataset(folder).check()
    assert says in str(caught.value)


def test_a_folder_without_a_data_set(tmp_path: Path) -> None:
    assert not is_lerobot(tmp_path)
    assert not is_lerobot("s3://bucket/set")
    with pytest.raises(UserError, match=r"meta/info.json is missing"):
        LeRobotDataset(tmp_path)


BROKEN_EPISODE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no data": (lambda at: (at / DATA).unlink(), "is missing"),
    "frames lost": (
        lambda at: pq.write_table(pq.read_table(at / DATA).slice(1), at / DATA),
        "has 5 frames of episode 0, the list of episodes says 6",
    ),
    "a frame left out": (
        lambda at: replaced(at / DATA, "index", pa.array([0, 1, 2, 3, 4, 6, 7, 8, 9, 10], pa.int64())),
        "do not follow one another",
    ),
    "time stands still": (
        lambda at: replaced(at / DATA, "timestamp", pa.array(np.zeros(10, np.float32))),
        "not rising seconds",
    ),
    "task unknown": (
        lambda at: replaced(at / DATA, "task_index", pa.array(np.full(10, 9))),
        "task_index 9, which is not in the list",
    ),
    "no video": (lambda at: (at / VIDEO).unlink(), "there is no such file"),
    "video cut": (lambda at: (at / VIDEO).write_bytes((at / VIDEO).read_bytes()[:-40]), "truncated"),
    "video too short": (lambda at: edit(at / INFO, fps=FPS * 3), "episode 0 needs 16"),
    "another frame rate": (lambda at: edit(at / INFO, fps=FPS * 1.7), "its frame rate is not 17"),
    "another pattern of names": (lambda at: edit(at / INFO, video_path="videos/{camera}.mp4"), "not of v3.0"),
}


@pytest.mark.parametrize("name", list(BROKEN_EPISODE))
def test_what_is_wrong_with_an_episode_is_a_sentence(tmp_path: Path, name: str) -> None:
    damage, says = BROKEN_EPISODE[name]
    folder = write_lerobot(tmp_path / "set", episodes=SHORT)
    damage(folder)
    dataset = LeRobotDataset(folder)
    with pytest.raises(UserError) as caught:
        list(dataset.frames(episode := dataset.episode(0), CAMERAS[0], np.arange(len(episode))))
    assert says in str(caught.value)
