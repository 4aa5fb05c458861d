"""`rbm score`, `rbm compare`, `rbm rank` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from rbm.cli import cli
from rbm.errors import UserError
from rbm.scoring import Scorer
from rbm.scoring.scorer import worth_of_pairs
from rbm.video import VideoFile, stored_clip


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture
def usual(checkpoints: dict[str, Path]) -> list[str | Path]:
    return ["--task", "push the square", "--checkpoint", checkpoints["utility"], "--device", "cpu"]


def test_score_writes_everything_asked_for(tmp_path: Path, video_path: Path, usual: list[str | Path]) -> None:
    outputs = {name: tmp_path / f"scores.{name}" for name in ("json", "png", "mp4")}
    result = run(
        "score", video_path, *usual, "--json", outputs["json"], "--plot", outputs["png"], "--video", outputs["mp4"]
    )
    assert "20 of 64 scored frames" in result.stdout
    assert "at the end: progress" in result.stdout
    content = json.loads(outputs["json"].read_text())
    assert content["task"] == "push the square"
    (entry,) = content["videos"]
    assert entry["video"] == str(video_path)
    expected = Scorer.from_pretrained(usual[3], device="cpu").score(stored_clip(video_path), "push the square", every=1)
    np.testing.assert_allclose(entry["progress"], expected.progress, atol=1e-5)
    np.testing.assert_allclose(entry["success"], expected.success, atol=1e-5)
    assert entry["frame_index"] == expected.frame_index.tolist()
    assert VideoFile(outputs["mp4"]).n_frames == 90
    assert sorted(tmp_path.iterdir()) == sorted(outputs.values())


def test_json_on_the_standard_output_is_alone_there(video_path: Path, usual: list[str | Path]) -> None:
    result = run("score", video_path, video_path, *usual, "--every", "9", "--json", "-")
    content = json.loads(result.stdout)
    assert [len(entry["progress"]) for entry in content["videos"]] == [11, 11]  # 0, 9, …, 81, 89
    assert "at the end" in result.stderr


def test_rows_and_every(video_path: Path, usual: list[str | Path]) -> None:
    result = run("score", video_path, *usual, "--every", "21", "--rows", "50")
    assert result.stdout.count("│") == 6 * 7  # frames 0, 21, 42, 63, 84, 89
    assert "scored frames" not in result.stdout


def test_dense_scores_and_the_vote(tmp_path: Path, video_path: Path, usual: list[str | Path]) -> None:
    run("score", video_path, *usual, "--every", "8", "--dense", "--vote", "1/1", "--json", tmp_path / "s.json")
    (entry,) = json.loads((tmp_path / "s.json").read_text())["videos"]
    sparse = Scorer.from_pretrained(usual[3], device="cpu").score(video_path, "push the square", every=8)
    assert entry["frame_index"] == list(range(90))
    np.testing.assert_allclose(entry["progress"], sparse.dense().progress, atol=1e-5)
    over = np.flatnonzero(sparse.success >= 0.5)
    assert entry["done_frame"] == (sparse.frame_index[over[0]] if len(over) else None)
    for bad in ("3", "5/3", "0/2", "a/b"):
        result = CliRunner().invoke(cli, ["score", str(video_path), *map(str, usual), "--vote", bad])
        assert isinstance(result.exception, UserError)
        assert "vote" in str(result.exception)


@pytest.mark.parametrize("preference", ["utility", "joint"])
def test_compare_and_rank(
    tmp_path: Path, video_path: Path, checkpoints: dict[str, Path], preference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "[b] other.mp4"  # brackets are markup to the table's library
    other.write_bytes(video_path.read_bytes())
    usual = ["--task", "push", "--checkpoint", checkpoints[preference], "--json"]
    monkeypatch.chdir(tmp_path)
    result = run("compare", video_path, other.name, *usual, tmp_path / "compare.json")
    assert "neither is better" in result.stdout
    assert "[b] other.mp4" in result.stdout
    assert json.loads((tmp_path / "compare.json").read_text())["p_a_better"] == pytest.approx(0.5, abs=1e-4)
    run("rank", video_path, other, *usual, tmp_path / "rank.json")
    content = json.loads((tmp_path / "rank.json").read_text())
    assert sorted(content["order"]) == [0, 1]
    assert [entry["video"] for entry in content["ranked"]] == [str([video_path, other][i]) for i in content["order"]]
    worth = Scorer.from_pretrained(checkpoints[preference], device="cpu").worth([video_path, other], "push")
    assert [entry["worth"] for entry in content["ranked"]] == pytest.approx(sorted(worth, reverse=True), abs=1e-5)
    if preference == "joint":
        assert worth == pytest.approx([0.5, 0.5], abs=1e-4)


def test_worth_by_hand():
    """P(0 over 1) = .8, P(0 over 2) = .5, P(1 over 2) = .3: means (.8 + .5)/2, (.2 + .3)/2, (.5 + .7)/2."""
    assert worth_of_pairs(3, [(0, 1), (0, 2), (1, 2)], [0.8, 0.5, 0.3]) == pytest.approx([0.65, 0.25, 0.6])
    assert worth_of_pairs(1, [], []) == [0.5]


@pytest.mark.parametrize("command", ["score", "compare", "rank"])
def test_help_has_an_example(command: str) -> None:
    output = run(command, "--help").stdout
    assert f"rbm {command} " in output
    assert "--task" in output
