"""`rbm relabel` on what it cannot use: a sentence each, and nothing half-written; stopped runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from relabel_data import TASK, film, lerobot, write_corpus, write_hdf5, write_minari

from policies.relabel.cli import relabel
from policies.relabel.offline import Episode, Labelling, LocalScores, Unusable, open_data
from policies.relabel.offline import relabel as run_relabel
from policies.transitions import Transitions
from rbm.errors import UserError

Run = Callable[..., Any]


@pytest.fixture
def run(judge_checkpoint: Path) -> Run:
    def call(*args: object) -> Any:
        words = [*map(str, args), "--json", "--device", "cpu", "--checkpoint", str(judge_checkpoint)]
        return CliRunner().invoke(relabel, words, catch_exceptions=False, standalone_mode=False)

    return call


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "minari"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


def left_out(result: Any) -> list[tuple[str, str]]:
    for one in (found := json.loads(result.stdout)["unreadable"]):
        assert f"left out: {one['episode']}: {one['why']}" in result.stderr
    return [(one["episode"], one["why"]) for one in found]


# nothing to look at, nothing to do


def test_hdf5_without_pictures(tmp_path, run):
    path = write_hdf5(tmp_path / "in.hdf5", (4,))
    with h5py.File(path, "r+") as file:
        for camera in ("agentview_image", "wrist_image"):
            del file[f"data/demo_0/obs/{camera}"]
    with pytest.raises(UserError, match=r"in\.hdf5 has no pictures"):
        run(path, "--out", tmp_path / "out.hdf5")
    assert [p.name for p in tmp_path.iterdir()] == ["in.hdf5"]


def test_minari_without_pictures(datasets, run):
    import gymnasium

    space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    buffer = minari.data_collector.EpisodeBuffer(
        observations=np.zeros((3, 2), np.float32),
        actions=np.zeros((2, 2), np.float32),
        rewards=[0.0, 0.0],
        terminations=[False, False],
        truncations=[False, True],
    )
    minari.create_dataset_from_buffers("blind-v0", [buffer], observation_space=space, action_space=space)
    with pytest.raises(UserError, match="blind-v0 has no pictures"):
        run("blind-v0", "--out", "seeing-v0", "--task", TASK)


def test_unknown_camera(tmp_path, run):
    path = write_hdf5(tmp_path / "in.hdf5", (4,))
    with pytest.raises(UserError, match="no camera 'top'; there are agentview_image, wrist_image"):
        run(path, "--out", tmp_path / "out.hdf5", "--camera", "top")


def test_no_instruction(tmp_path, datasets, run):
    path = write_hdf5(tmp_path / "in.hdf5", (4, 4), task=None)
    with pytest.raises(UserError, match=r"none of 2 episodes.*demo_0: it has no instruction: say with --task"):
        run(path, "--out", tmp_path / "out.hdf5")
    write_minari("squares-v0", task=None)
    with pytest.raises(UserError, match="episode 0: it has no instruction: say with --task"):
        run("squares-v0", "--out", "out-v0")
    assert not (tmp_path / "out.hdf5").exists()
    assert not (datasets / "out-v0").exists()


@pytest.mark.parametrize("where", ["demo", "file", "ep_meta", "problem_info"])
def test_instructions_of_hdf5(tmp_path, run, where):
    path = write_hdf5(tmp_path / "in.hdf5", (4,), task=None)
    with h5py.File(path, "r+") as file:
        if where == "ep_meta":
            file["data/demo_0"].attrs["ep_meta"] = json.dumps({"lang": "lift it"})
        elif where == "problem_info":
            file["data"].attrs["problem_info"] = json.dumps({"language_instruction": ["lift", " it"]})
        else:
            (file["data/demo_0"] if where == "demo" else file).attrs["language_instruction"] = "lift it"
    assert open_data(path).cameras == ["agentview_image", "wrist_image"]
    data = open_data(path)
    data.show("wrist_image")
    assert data.episode(0).task == "lift it"


# places and formats


def test_out_exists(tmp_path, datasets, run):
    path, out = write_hdf5(tmp_path / "in.hdf5", (4,)), tmp_path / "out.hdf5"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"out\.hdf5 exists already"):
        run(path, "--out", out)
    assert out.read_text() == "mine"
    write_minari("squares-v0")
    with pytest.raises(UserError, match="squares-v0 exists already"):
        run("squares-v0", "--out", "squares-v0")
    source = lerobot(tmp_path / "lerobot")
    for place, why in (
        (source, "lies in the data set"),
        (source / "copy", "lies in the data set"),
        (tmp_path, "exists"),
    ):
        with pytest.raises(UserError, match=why):
            run(source, "--out", place)
    with pytest.raises(UserError, match="does not exist; make it first"):
        run(source, "--out", tmp_path / "none" / "copy")
    with pytest.raises(UserError, match="no id of a Minari data set"):
        run("squares-v0", "--out", "what is this")
    with pytest.raises(UserError, match=r"must end in \.npz"):
        run(write_corpus(tmp_path / "corpus"), "--out", tmp_path / "corpus.zip")


def test_unknown_format(tmp_path, datasets, run):
    (tmp_path / "notes.txt").write_text("no data")
    (tmp_path / "folder").mkdir()
    for name in ("notes.txt", "folder"):
        with pytest.raises(UserError, match=rf"{name} is in no format.*Minari.*LeRobot.*HDF5.*corpus"):
            run(tmp_path / name, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="there is no such file or folder, and no such Minari data set"):
        run("nowhere-v0", "--out", "out-v0")


@pytest.mark.parametrize("damage", ["cut", "text", "layout"])
def test_broken_hdf5(tmp_path, run, damage):
    path = write_hdf5(tmp_path / "in.hdf5", (4,))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "text":
        path.write_text("no HDF5")
    else:
        path.unlink()
        with h5py.File(path, "w") as file:
            file["observations"] = np.zeros(3)
    why = (
        "data/demo_0 and so on: HDF5 is read in robomimic's layout" if damage == "layout" else "cannot be read as HDF5"
    )
    with pytest.raises(UserError, match=why):
        run(path, "--out", tmp_path / "out.hdf5", "--task", TASK)


def test_both_files_are_written_or_none(tmp_path, run):
    path, file = write_hdf5(tmp_path / "in.hdf5", (4, 4)), tmp_path / "t.npz"
    with h5py.File(path, "a") as source:
        for group in ("obs", "next_obs"):
            del source[f"data/demo_1/{group}/object"]
            source[f"data/demo_1/{group}/object"] = np.zeros((4, 5))
    command = ("--out", tmp_path / "out.hdf5", "--transitions", file)
    for _ in range(2):  # and the same command says the same again
        with pytest.raises(UserError, match="states"):
            run(path, *command)
        assert not (tmp_path / "out.hdf5").exists()
        assert not file.exists()


def test_options_that_make_no_sense(tmp_path, run):
    path = write_hdf5(tmp_path / "in.hdf5", (4,))
    out = ("--out", tmp_path / "out.hdf5")
    with pytest.raises(UserError, match="write K/N"):
        run(path, *out, "--vote", "3,5,0.5")
    with pytest.raises(UserError, match="a vote of 6 of 5 frames"):
        run(path, *out, "--vote", "6/5")
    with pytest.raises(UserError, match="give one of them"):
        run(path, *out, "--server", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="gamma=2"):
        run(path, *out, "--gamma", "2")
    with pytest.raises(UserError, match="transitions cannot be made of LeRobot data"):
        run(lerobot(tmp_path / "le"), "--out", tmp_path / "copy", "--transitions", tmp_path / "t.npz")


def test_a_server_that_is_not_there(tmp_path):
    path = write_hdf5(tmp_path / "in.hdf5", (4,))
    words = [str(path), "--out", str(tmp_path / "out.hdf5"), "--server", "http://127.0.0.1:9"]
    with pytest.raises(UserError, match=r"the scoring server at http://127\.0\.0\.1:9 gives no scores"):
        CliRunner().invoke(relabel, words, catch_exceptions=False, standalone_mode=False)


# single episodes


def test_an_unreadable_demonstration_is_left_out(tmp_path, run):
    path, out = write_hdf5(tmp_path / "in.hdf5", (4, 5, 6, 3, 2)), tmp_path / "out.hdf5"
    with h5py.File(path, "r+") as file:
        del file["data/demo_1/actions"]
        del file["data/demo_3/obs/agentview_image"]
        file["data/demo_3/obs/agentview_image"] = film(9, 0)
        file["data/demo_4/rewards"][0] = np.nan
    found = left_out(run(path, "--out", out))
    assert [name for name, _ in found] == ["demo_1", "demo_3", "demo_4"]
    assert "actions" in found[0][1]
    assert "not of one length" in found[1][1]
    assert "not finite" in found[2][1]
    with h5py.File(out) as file:
        assert sorted(file["data"]) == ["demo_0", "demo_2"]
        assert file["data"].attrs["total"] == 10
        assert file["mask/train"][()].tolist() == [b"demo_0", b"demo_2"]


@pytest.mark.parametrize("format", ["hdf5", "arrow"])
def test_frames_of_changing_size_in_minari(datasets, run, format):
    write_minari("squares-v0", format, jpeg=True)
    place = datasets / "squares-v0/data"
    if format == "hdf5":
        with h5py.File(place / "main_data.hdf5", "r+") as file:
            pictures = file["episode_1/observations/camera"]
            frames = [row.astype(np.uint8) for row in pictures[()]]
            frames[2] = minari.dataset._storages.hdf5_storage.encode_frame(np.zeros((50, 60, 3), np.uint8))
            del file["episode_1/observations/camera"]
            file.create_dataset("episode_1/observations/camera", data=frames, dtype=h5py.vlen_dtype(np.uint8))
    else:
        next((place / "1").glob("*.arrow")).write_bytes(b"nothing")
    found = left_out(run("squares-v0", "--out", "out-v0"))
    assert [name for name, _ in found] == ["episode 1"]
    made = minari.load_dataset("out-v0")
    assert [(episode.id, len(episode)) for episode in made] == [(0, 6), (1, 8)]
    assert made.total_steps == 14


def test_frames_of_changing_size_are_said_with_their_number(judge_scorer):
    def pictures(positions: Any) -> Iterator[Any]:
        return (film(1, 0, size=40 if at < 3 else 48)[0] for at in positions)

    episode = Episode("one", TASK, 5, pictures, np.arange(6))
    with pytest.raises(Unusable, match="frame 3 is 48×48, those before it 40×40"):
        LocalScores(judge_scorer).of(episode.name, episode.pictures, 6, TASK, 1, "main")


def test_an_episode_without_its_video_keeps_its_rows(tmp_path, run):
    source, out = lerobot(tmp_path / "in", "v2.1"), tmp_path / "out"
    (source / "videos/chunk-000/observation.images.top/episode_000001.mp4").write_bytes(b"nothing")
    (source / "data/chunk-000/episode_000002.parquet").write_bytes(b"nothing")
    found = left_out(run(source, "--out", out))
    assert [name for name, _ in found] == ["episode 1", "episode 2"]
    for number, good in ((0, True), (1, False), (3, True)):
        table = pq.read_table(out / f"data/chunk-000/episode_{number:06d}.parquet")
        for name in ("reward", "progress", "success"):
            assert (np.isfinite(table[name].to_numpy()) == good).all()
    assert (out / "data/chunk-000/episode_000002.parquet").read_bytes() == b"nothing"


def test_a_trajectory_without_states_is_left_out(tmp_path, run):
    place = write_corpus(tmp_path / "corpus", arrays=False)
    found = left_out(run(place, "--out", tmp_path / "mixed.npz"))
    assert found == [("square-2", "it has no side array state and no action; build the corpus with them")]
    assert len(Transitions.load(tmp_path / "mixed.npz").success) == 2


def test_scores_that_are_no_numbers(tmp_path, blind_scorer):
    path, out = write_hdf5(tmp_path / "in.hdf5", (4,)), tmp_path / "out.hdf5"
    with pytest.raises(UserError, match="demo_0: the score of frame 0 is not a finite number"):
        run_relabel(open_data(path), out, LocalScores(blind_scorer), Labelling())
    assert not out.exists()


# stopped, and gone on with


class Stopped(Exception):
    pass


def stop_after(count: int) -> Callable[[int, int], None]:
    done = 0

    def tick(episodes: int, frames: int) -> None:
        nonlocal done
        done += episodes
        if done == count:
            raise Stopped

    return tick


def test_a_stopped_run_goes_on(tmp_path, judge_scorer):
    path, out = write_hdf5(tmp_path / "in.hdf5"), tmp_path / "out.hdf5"
    side = tmp_path / "out.hdf5.scores.jsonl"
    scores = LocalScores(judge_scorer)
    run_relabel(open_data(path), tmp_path / "whole.hdf5", scores, Labelling())
    with pytest.raises(Stopped):
        run_relabel(open_data(path), out, scores, Labelling(), tick=stop_after(2))
    assert side.exists()
    assert not out.exists()
    with pytest.raises(UserError, match="scores of another data set, model, camera, task or --every"):
        run_relabel(open_data(path), out, scores, Labelling(every=2))
    with pytest.raises(UserError, match="scores of another"):
        run_relabel(open_data(path, task="another"), out, scores, Labelling())
    with side.open("ab") as file:
        file.write(b'{"number": 2, "name": "demo_2", "fra')  # killed in the middle of a line
    outcome = run_relabel(open_data(path), out, scores, Labelling())
    assert outcome.kept == 2
    assert not side.exists()
    with h5py.File(out) as a, h5py.File(tmp_path / "whole.hdf5") as b:
        for k in range(3):
            np.testing.assert_array_equal(a[f"data/demo_{k}/rewards"][()], b[f"data/demo_{k}/rewards"][()])


def test_scores_that_are_damaged_or_another_models(tmp_path, judge_scorer, blind_scorer):
    path, kept = write_hdf5(tmp_path / "in.hdf5", (4,)), tmp_path / "kept.jsonl"
    run_relabel(open_data(path), tmp_path / "a.hdf5", LocalScores(judge_scorer), Labelling(), kept=kept)
    with pytest.raises(UserError, match="scores of another"):
        run_relabel(open_data(path), tmp_path / "b.hdf5", LocalScores(blind_scorer), Labelling(), kept=kept)
    whole = kept.read_text()
    kept.write_text(whole.replace('"at": [0, ', '"at": ['))
    with pytest.raises(UserError, match="its scores of demo_0 are damaged"):
        run_relabel(open_data(path), tmp_path / "b.hdf5", LocalScores(judge_scorer), Labelling(), kept=kept)
    kept.write_text("{}\nno json\n")
    with pytest.raises(UserError, match="holds no scores that can be read"):
        run_relabel(open_data(path), tmp_path / "b.hdf5", LocalScores(judge_scorer), Labelling(), kept=kept)


def test_a_full_run_shows_help_and_progress(tmp_path, run):
    text = CliRunner().invoke(relabel, ["--help"]).stdout
    assert all(word in text for word in ("Examples:", "rbm relabel data/lift.hdf5", "--pessimism", "--transitions"))
    result = run(write_hdf5(tmp_path / "in.hdf5", (4, 4)), "--out", tmp_path / "out.hdf5")
    assert "2 of 2" in result.stderr
    assert "2 episodes of HDF5 data, 8 steps, 10 frames scored" in result.stderr


def test_no_episode_that_can_be_read(datasets, run):
    write_minari("squares-v0", jpeg=True)
    with h5py.File(datasets / "squares-v0/data/main_data.hdf5", "r+") as file:
        for episode in file:
            del file[episode]["observations"]["camera"]
    with pytest.raises(UserError, match="none of 3 episodes could be read; the first, episode 0: "):
        run("squares-v0", "--out", "out-v0")
