"""`rbm relabel`: each format read back with its own library, rewards against hand-computed ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from relabel_data import TASK, add_column, by_hand, film, lerobot, write_corpus, write_hdf5, write_minari
from running import serving

from policies.relabel.cli import relabel
from policies.transitions import Transitions
from rbm.corpus import Corpus
from rbm.evaluation.lerobot import LeRobotDataset

COLUMNS = ("reward", "progress", "success")
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(judge_checkpoint: Path) -> Run:
    """The command, and the summary that it prints."""

    def call(*args: object, **options: object) -> dict[str, Any]:
        named = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        words = [*map(str, args), *named, "--json", "--device", "cpu"]
        if "server" not in options:
            words += ["--checkpoint", str(judge_checkpoint)]
        result = CliRunner().invoke(relabel, words, catch_exceptions=False, standalone_mode=False)
        return dict(json.loads(result.stdout))

    return call


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "minari"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


# HDF5


@pytest.mark.parametrize("every", [1, 3])
def test_hdf5_has_new_rewards_and_keeps_the_old(tmp_path, judge_scorer, run, every):
    source, out = write_hdf5(tmp_path / "in.hdf5"), tmp_path / "out.hdf5"
    before = source.read_bytes()
    said = run(source, out=out, every=every)
    assert (said["format"], said["episodes"], said["steps"], said["unreadable"]) == ("HDF5", 3, 21, [])
    assert source.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.hdf5", "out.hdf5"]
    with h5py.File(out) as file:
        for k, steps in enumerate((9, 5, 7)):
            demo = file[f"data/demo_{k}"]
            value = by_hand(judge_scorer, film(steps + 1, k), every)
            assert np.ptp(value) > 0.01
            np.testing.assert_allclose(demo["rewards"][()], np.diff(value), atol=1e-5)
            np.testing.assert_allclose(demo["progress"][()], value[:-1], atol=1e-5)
            np.testing.assert_array_equal(demo["env_rewards"][()], np.eye(steps)[-1])
            np.testing.assert_array_equal(demo["obs/agentview_image"][()], film(steps + 1, k)[:-1])
        assert json.loads(file.attrs["relabelled"])["every"] == every


def test_every_form_of_reward(tmp_path, judge_scorer, run):
    source = write_hdf5(tmp_path / "in.hdf5", (6,))
    value, own = by_hand(judge_scorer, film(7, 0), 1), np.eye(6)[-1]
    kept = tmp_path / "kept.jsonl"
    left = np.array([1, 1, 1, 1, 1, 0])  # the last step terminated
    expected = {
        "progress": 2 * value[1:],
        "minus_one": 2 * (value[1:] - 1),
        "difference": 2 * np.diff(value),
        "potential": own + 2 * (0.9 * left * value[1:] - value[:-1]),
    }
    for form, wanted in expected.items():
        out = tmp_path / f"{form}.hdf5"
        said = run(source, out=out, form=form, scale=2, gamma=0.9, scores=kept)
        assert said["kept"] == (0 if form == "progress" else 1)  # other rewards from the same scores
        with h5py.File(out) as file:
            np.testing.assert_allclose(file["data/demo_0/rewards"][()], wanted, atol=1e-5)


def test_pessimism_bonus_and_hold(tmp_path, judge_scorer, run):
    source, out = write_hdf5(tmp_path / "in.hdf5", (8,)), tmp_path / "out.hdf5"
    scores = judge_scorer.score(film(9, 0), TASK, every=3)
    assert scores.frame_index.tolist() == [0, 3, 6, 8]
    threshold = float(np.sort(scores.success)[1])  # three of the four scored frames reach it
    reach = scores.success >= threshold
    done = next(i for i in range(4) if reach[: i + 1].sum() >= 2)
    phi = np.maximum(scores.progress - 0.5 * scores.progress_std, 0)
    value = phi[[0, 0, 0, 1, 1, 1, 2, 2, 3]]
    wanted = np.diff(value)
    wanted[scores.frame_index[done] - 1] += 5
    votes = {"vote": "2/4", "threshold": repr(threshold)}
    said = run(source, out=out, every=3, between="hold", pessimism=0.5, success_bonus=5, **votes)
    assert said["done"] == 1
    with h5py.File(out) as file:
        np.testing.assert_allclose(file["data/demo_0/rewards"][()], wanted, atol=1e-5)


def test_hdf5_without_next_pictures_holds_the_last_value(tmp_path, judge_scorer, run):
    source, out = write_hdf5(tmp_path / "in.hdf5", (6,), after=False), tmp_path / "out.hdf5"
    run(source, out=out, camera="wrist_image", form="progress")
    value = by_hand(judge_scorer, 255 - film(7, 0)[:-1], 1)
    with h5py.File(out) as file:
        np.testing.assert_allclose(file["data/demo_0/rewards"][()], [*value[1:], value[-1]], atol=1e-5)


def test_relabelled_again_the_environments_own_rewards_stay(tmp_path, run):
    source = write_hdf5(tmp_path / "in.hdf5", (6,))
    run(source, out=tmp_path / "a.hdf5", form="progress")
    run(tmp_path / "a.hdf5", out=tmp_path / "b.hdf5", form="potential")
    run(source, out=tmp_path / "c.hdf5", form="potential")
    with h5py.File(tmp_path / "b.hdf5") as b, h5py.File(tmp_path / "c.hdf5") as c:
        for name in ("rewards", "env_rewards"):
            np.testing.assert_array_equal(b["data/demo_0"][name][()], c["data/demo_0"][name][()])


@pytest.mark.parametrize("after", [True, False])
def test_transitions_of_hdf5(tmp_path, judge_scorer, run, after):
    source, file = write_hdf5(tmp_path / "in.hdf5", (6, 4), after), tmp_path / "t.npz"
    run(source, out=tmp_path / "out.hdf5", transitions=file, form="progress")
    found = Transitions.load(file)
    steps = [6, 4] if after else [5, 3]  # what the last action led to is not kept
    assert len(found) == sum(steps)
    assert found.observations.shape[1] == 5
    assert found.episode.tolist() == [0] * steps[0] + [1] * steps[1]
    assert np.flatnonzero(found.terminated).tolist() == ([5, 9] if after else [])
    states = np.random.default_rng(0).normal(size=(7, 3))
    wanted = np.concatenate([states, states[:, :2] * 2], 1)  # eef_pos, object
    np.testing.assert_allclose(found.observations[:5], wanted[:5], rtol=1e-6)
    np.testing.assert_allclose(found.next_observations[:5], wanted[1:6], rtol=1e-6)
    shown = film(7, 0) if after else film(7, 0)[:-1]
    value = by_hand(judge_scorer, shown, 1)
    np.testing.assert_allclose(found.rewards[:5], value[1:6], atol=1e-5)
    np.testing.assert_allclose(found.values[:5], value[1:6], atol=1e-5)


# Minari


@pytest.mark.parametrize("format", ["hdf5", "arrow", "parquet"])
@pytest.mark.parametrize("plain", [True, False])
def test_minari_by_id(datasets, judge_scorer, run, format, plain):
    films = write_minari("squares/plain-v0", format, plain)
    said = run("squares/plain-v0", out="learned/plain-v1", every=2)
    assert (said["format"], said["episodes"], said["steps"]) == ("Minari", 3, 18)
    made, old = minari.load_dataset("learned/plain-v1"), minari.load_dataset("squares/plain-v0")
    assert (made.spec.dataset_id, made.total_episodes, made.total_steps) == ("learned/plain-v1", 3, 18)
    assert "learned/plain-v1" in minari.list_local_datasets()
    for shown, new, was in zip(films, made, old, strict=True):
        value = by_hand(judge_scorer, shown, 2)
        np.testing.assert_allclose(new.rewards, np.diff(value), atol=1e-5)
        np.testing.assert_allclose(new.infos["env_rewards"], [0, *was.rewards], atol=1e-6)
        np.testing.assert_allclose(new.infos["progress"], value, atol=1e-5)
        np.testing.assert_array_equal(new.infos["time"], was.infos["time"])
        np.testing.assert_array_equal(new.terminations, was.terminations)
        np.testing.assert_array_equal(new.actions, was.actions)
        pictures = [one.observations if plain else one.observations["camera"] for one in (new, was)]
        np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("format", ["hdf5", "arrow"])
def test_minari_by_folder_with_jpeg_pictures_and_transitions(datasets, tmp_path, judge_scorer, run, format):
    films = write_minari("squares-v0", format, jpeg=True, task=None)
    out, file = tmp_path / "other place", tmp_path / "t.npz"
    run(datasets / "squares-v0", out=out, task=TASK, form="potential", gamma=0.5, transitions=file)
    made = minari.MinariDataset(out / "data")
    assert made.spec.dataset_id == "other_place-v0"
    for k, (shown, episode) in enumerate(zip(films, made, strict=True)):
        value = by_hand(judge_scorer, shown, 1)
        own = np.arange(len(value) - 1) / 10
        wanted = own + 0.5 * value[1:] - value[:-1]
        if k == 0:  # the only one that terminated
            wanted[-1] = own[-1] - value[-2]
        np.testing.assert_allclose(episode.rewards, wanted, atol=1e-5)
        np.testing.assert_array_equal(episode.observations["camera"], shown)  # not encoded once more
    found = Transitions.load(file)
    np.testing.assert_allclose(found.rewards, np.concatenate([one.rewards for one in made]), rtol=1e-6)
    np.testing.assert_array_equal(
        found.next_observations[:6], minari.load_dataset("squares-v0")[0].observations["state"][1:]
    )
    assert np.flatnonzero(found.terminated).tolist() == [5]


# LeRobot


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_lerobot_has_three_columns_more(tmp_path, judge_scorer, run, version):
    source, out = lerobot(tmp_path / "in", version), tmp_path / "out"
    said = run(source, out=out, camera="wrist", every=3)
    assert (said["format"], said["episodes"], said["steps"]) == ("LeRobot", 4, 23)
    dataset = LeRobotDataset(out)
    features = json.loads((out / "meta/info.json").read_text())["features"]
    assert all(features[name] == {"dtype": "float32", "shape": [1], "names": None} for name in COLUMNS)
    tables = [pq.read_table(path) for path in sorted((out / "data").rglob("*.parquet"))]
    assert len(tables) == (2 if version == "v3.0" else 4)
    rows = {name: np.concatenate([table[name].to_numpy() for table in tables]) for name in (*COLUMNS, "episode_index")}
    for number in range(4):
        episode = dataset.episode(number)
        shown = np.stack(list(dataset.frames(episode, "observation.images.wrist", np.arange(len(episode)))))
        scores = judge_scorer.score(shown, episode.task, every=3).dense()
        here = rows["episode_index"] == number
        np.testing.assert_allclose(rows["progress"][here], scores.progress, atol=1e-5)
        np.testing.assert_allclose(rows["success"][here], scores.success, atol=1e-5)
        np.testing.assert_allclose(rows["reward"][here], [*np.diff(scores.progress), 0], atol=1e-5)
    for path in (source / "videos").rglob("*.mp4"):
        assert (out / path.relative_to(source)).read_bytes() == path.read_bytes()


def test_lerobot_with_rewards_of_its_own(tmp_path, judge_scorer, run):
    source = lerobot(tmp_path / "in", "v3.0")
    add_column(source, "reward", lambda index: index / 100)
    run(source, out=tmp_path / "a", form="potential", gamma=0.5)
    run(tmp_path / "a", out=tmp_path / "b", form="potential", gamma=0.5)  # the environment's own are still its own
    dataset = LeRobotDataset(source)
    for out in ("a", "b"):
        table = pq.read_table(tmp_path / out / "data/chunk-000/file-000.parquet")
        assert "env_reward" in json.loads((tmp_path / out / "meta/info.json").read_text())["features"]
        np.testing.assert_allclose(table["env_reward"].to_numpy(), np.arange(len(table)) / 100, atol=1e-6)
        shown = np.stack(list(dataset.frames(dataset.episode(0), dataset.cameras[0], np.arange(6))))
        value = by_hand(judge_scorer, shown, 1, task="push the cube", last=6)
        wanted = np.arange(6) / 100 + 0.5 * value[1:] - value[:-1]
        np.testing.assert_allclose(table["reward"].to_numpy()[:6], wanted, atol=1e-5)
    features = json.loads(pq.read_schema(tmp_path / "a/data/chunk-000/file-000.parquet").metadata[b"huggingface"])
    kinds = features["info"]["features"]
    assert kinds["reward"] == kinds["env_reward"] == {"dtype": "float32", "_type": "Value"}


# a corpus


def test_corpus_becomes_transitions(tmp_path, judge_scorer, run):
    place, out = write_corpus(tmp_path / "corpus"), tmp_path / "mixed.npz"
    said = run(place, out=out, form="minus_one", every=2)
    assert (said["format"], said["episodes"], said["steps"]) == ("corpus", 3, 36)
    found = Transitions.load(out)
    assert found.success.tolist() == [False, True, False]
    assert not found.terminated.any()
    for k, record in enumerate(Corpus.open(place)):
        here = found.episode == k
        value = by_hand(judge_scorer, record.frames(), 2, record.frame_index)  # stored frames show every third moment
        np.testing.assert_allclose(found.rewards[here], value[1:] - 1, atol=1e-5)
        np.testing.assert_allclose(found.values[here], value[1:], atol=1e-5)
        np.testing.assert_array_equal(found.observations[here], record.array("state")[:-1])
        np.testing.assert_array_equal(found.next_observations[here], record.array("state")[1:])
        np.testing.assert_array_equal(found.actions[here], record.array("action")[:-1])
        np.testing.assert_array_equal(found.env_rewards[here], np.arange(1, 13))
        assert found.step[here].tolist() == list(range(12))


# a server


def test_a_server_gives_the_same(tmp_path, judge_checkpoint, run):
    source = write_hdf5(tmp_path / "in.hdf5", (6, 4))
    run(source, out=tmp_path / "here.hdf5", every=2)
    with serving(tmp_path / "log", checkpoint=judge_checkpoint) as server:
        run(source, out=tmp_path / "there.hdf5", every=2, server=server.url)
    with h5py.File(tmp_path / "here.hdf5") as here, h5py.File(tmp_path / "there.hdf5") as there:
        for k in range(2):
            a, b = (file[f"data/demo_{k}/rewards"][()] for file in (here, there))
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_pictures_with_channels_first(tmp_path, judge_scorer, run):
    source, out = write_hdf5(tmp_path / "in.hdf5", (6,), after=False), tmp_path / "out.hdf5"
    with h5py.File(source, "r+") as file:
        obs = file["data/demo_0/obs"]
        del obs["wrist_image"], obs["agentview_image"]
        obs["depth"] = np.zeros((6, 40, 40, 1), np.uint8)
        obs["front"] = np.moveaxis(film(6, 0), -1, 1)
    run(source, out=out, form="progress")
    value = by_hand(judge_scorer, film(6, 0), 1)
    with h5py.File(out) as file:
        np.testing.assert_allclose(file["data/demo_0/rewards"][()], [*value[1:], value[-1]], atol=1e-5)
