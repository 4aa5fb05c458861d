"""`rbm relabel` on data that is odd or hostile: code named in metadata, holes, pictures in infos, long episodes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from relabel_data import SIZE, TASK, by_hand, film, lerobot, write_hdf5, write_minari
from running import serving

from policies.relabel import offline_scores
from policies.relabel.offline import Labelling, LocalScores, Outcome, RemoteScores, open_data, relabel
from policies.shaping import Shaping
from rbm.errors import UserError
from rbm.scoring import Scorer
from rbm.scoring.client import Client, ClientError


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "minari"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


def progress_of(place: str, out: str, scorer: Scorer, task: str | None = TASK) -> Outcome:
    return relabel(open_data(place, task), out, LocalScores(scorer), Labelling(Shaping("progress")))


def test_metadata_cannot_name_code_to_run(datasets, tmp_path):
    """Minari makes the environment that metadata names where the spaces are not there: any function of any module."""
    write_minari("squares-v0")
    path, touched = datasets / "squares-v0/data/metadata.json", tmp_path / "touched"
    spec = {"id": "x-v0", "entry_point": "os:system", "kwargs": {"command": f"touch {touched}"}}
    spec |= dict.fromkeys(("reward_threshold", "max_episode_steps", "vector_entry_point"))
    spec |= {"nondeterministic": False, "order_enforce": False, "disable_env_checker": True, "additional_wrappers": []}
    said = json.loads(path.read_text())
    for name in ("observation_space", "action_space"):
        fewer = {key: value for key, value in said.items() if key != name}
        path.write_text(json.dumps(fewer | {"env_spec": json.dumps(spec)}))
        with pytest.raises(UserError, match=f"metadata does not say its {name}"):
            open_data("squares-v0")
        assert not touched.exists()


@pytest.mark.parametrize("format", ["hdf5", "arrow", "parquet"])
def test_an_episode_that_is_not_there_is_left_out(datasets, judge_scorer, format):
    films = write_minari("squares-v0", format)
    data = datasets / "squares-v0/data"
    if format == "hdf5":
        with h5py.File(data / "main_data.hdf5", "r+") as file:
            del file["episode_1"]
    else:
        shutil.rmtree(data / "1")
    said = progress_of("squares-v0", "left-v0", judge_scorer)
    assert said.episodes == 2
    assert [name for name, _ in said.unreadable] == ["episode 1"]
    made = minari.load_dataset("left-v0")
    assert [episode.id for episode in made] == [0, 1]
    assert made.total_steps == 14
    for episode, shown in zip(made, (films[0], films[2]), strict=True):
        np.testing.assert_allclose(episode.rewards, by_hand(judge_scorer, shown, 1)[1:], atol=1e-5)
    assert [one["id"] for one in made.storage.get_episode_metadata([0, 1])] == [0, 1]


@pytest.mark.parametrize("format", ["hdf5", "arrow"])
def test_pictures_in_infos(datasets, judge_scorer, format):
    """What an environment rendered stands beside the scores, where observations are states."""
    films = [film(steps + 1, steps) for steps in (5, 3)]
    buffers = [
        minari.data_collector.EpisodeBuffer(
            observations=np.zeros((len(shown), 2), np.float32),
            actions=np.zeros((len(shown) - 1, 2), np.float32),
            rewards=[0.5] * (len(shown) - 1),
            terminations=[False] * (len(shown) - 1),
            truncations=[False] * (len(shown) - 2) + [True],
            infos={"render": shown},
        )
        for shown in films
    ]
    space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    minari.create_dataset_from_buffers(
        "rendered-v0", buffers, observation_space=space, action_space=space, data_format=format
    )
    assert open_data("rendered-v0").cameras == ["infos/render"]
    assert progress_of("rendered-v0", "scored-v0", judge_scorer).episodes == 2
    for episode, shown in zip(minari.load_dataset("scored-v0"), films, strict=True):
        np.testing.assert_allclose(episode.rewards, by_hand(judge_scorer, shown, 1)[1:], atol=1e-5)
        np.testing.assert_array_equal(episode.infos["render"], shown)


def test_demonstrations_that_cannot_be_read_are_not_called_blind(tmp_path, judge_scorer):
    path = write_hdf5(tmp_path / "in.hdf5", (4, 4))
    with h5py.File(path, "r+") as file:
        for k in range(2):
            del file[f"data/demo_{k}/obs"]
    with pytest.raises(UserError, match=r"none of its 2 demonstrations can be read; the first, demo_0: .*obs"):
        progress_of(str(path), str(tmp_path / "out.hdf5"), judge_scorer)


@pytest.mark.parametrize("kind", ["missing", "ragged", "empty"])
def test_rewards_that_cannot_be_read_are_not_taken_for_zeros(tmp_path, judge_scorer, kind):
    source = lerobot(tmp_path / "in", "v2.1")
    info = json.loads((source / "meta/info.json").read_text())
    info["features"]["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
    (source / "meta/info.json").write_text(json.dumps(info))
    for path in (source / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        rows: list[object] = [1.0] * len(table)
        if path.stem == "episode_000001":
            rows[2] = {"ragged": [1.0, 2.0], "empty": None, "missing": 1.0}[kind]
            if kind == "missing":
                continue
        rows = [row if isinstance(row, list) or row is None else [row] for row in rows] if kind == "ragged" else rows
        pq.write_table(table.append_column("next.reward", pa.array(rows)), path)
    said = progress_of(str(source), str(tmp_path / "out"), judge_scorer, None)
    assert said.episodes == 3
    assert said.env_reward == 1.0
    name, why = said.unreadable[0]
    assert name == "episode 1"
    assert ("not finite" if kind == "empty" else "next.reward") in why


def test_an_episode_that_is_too_long_for_a_request(tmp_path, judge_checkpoint, judge_scorer, monkeypatch):
    """It goes through a live session, a block of frames at a time; the short one goes whole."""
    monkeypatch.setattr(offline_scores, "BLOCK_FRAMES", 16)
    path = write_hdf5(tmp_path / "in.hdf5", (45, 9))
    body = f"limits.body_bytes={2**16 + 30 * SIZE * SIZE * 3}"
    with serving(tmp_path / "log", body, checkpoint=judge_checkpoint) as server, Client(server.url) as client:
        with pytest.raises(ClientError, match="bytes"):
            client.score(film(46, 0), TASK, every=1)
        for every in (1, 3):
            far, near = tmp_path / f"far{every}.hdf5", tmp_path / f"near{every}.hdf5"
            said = relabel(open_data(path), far, RemoteScores(client), Labelling(every=every))
            assert said.unreadable == ()
            assert (
                said.frames == relabel(open_data(path), near, LocalScores(judge_scorer), Labelling(every=every)).frames
            )
            with h5py.File(far) as there, h5py.File(near) as here:
                for k in range(2):
                    a, b = (file[f"data/demo_{k}/rewards"][()] for file in (here, there))
                    np.testing.assert_allclose(a, b, atol=1e-5)


KILLED = """
import os, signal, sys
from policies.relabel.offline import Labelling, LocalScores, open_data, relabel
from rbm.scoring import Scorer

path, out, checkpoint = sys.argv[1:]
told = []
def tick(episodes, frames):
    told.append(episodes)
    if len(told) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
relabel(open_data(path), out, LocalScores(Scorer.from_pretrained(checkpoint, "cpu")), Labelling(), tick=tick)
"""


def test_a_run_that_is_killed_goes_on(tmp_path, judge_checkpoint, judge_scorer):
    path, out, whole = write_hdf5(tmp_path / "in.hdf5", (9, 8, 7, 6, 5)), tmp_path / "out.hdf5", tmp_path / "whole.hdf5"
    words = [sys.executable, "-c", KILLED, str(path), str(out), str(judge_checkpoint)]
    assert subprocess.run(words, timeout=300, check=False).returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.hdf5", "out.hdf5.scores.jsonl"]
    scores = LocalScores(judge_scorer)
    assert relabel(open_data(path), out, scores, Labelling()).kept == 3
    assert relabel(open_data(path), whole, scores, Labelling()).kept == 0
    with h5py.File(out) as a, h5py.File(whole) as b:
        for k in range(5):
            # the killed process had another number of threads, which rounds otherwise
            a_rewards, b_rewards = (file[f"data/demo_{k}/rewards"][()] for file in (a, b))
            np.testing.assert_allclose(a_rewards, b_rewards, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.hdf5", "out.hdf5", "whole.hdf5"]
