"""The monitor, the report of runs, and refining a judge by what fooled it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from policies.monitor import Monitor, read_monitor
from policies.refine import flagged
from policies.report import markdown, read_budgets, read_runs, table
from rbm.cli import cli
from rbm.errors import UserError
from rbm.video import VideoFile

FRAMES = [np.full((64, 64, 3), shade, np.uint8) for shade in (0, 100, 200)]


def test_score_and_success_part_above_the_share_of_a_whole_window(tmp_path: Path):
    monitor = Monitor(tmp_path, "close the window", window=4, share=0.25)
    outcomes = [(True, True), (True, False), (False, False), (True, False), (False, False), (True, True), (True, True)]
    said = [
        monitor.episode(number, 10 * number, judged, success, 0.5, FRAMES).diverged
        for number, (judged, success) in enumerate(outcomes)
    ]
    # wrong judgements in the last four: –, –, –, 2, 2, 1, 1; a quarter is not above a quarter
    assert said == [False, False, False, True, True, False, False]
    watched = read_monitor(tmp_path)
    assert [episode.clip for episode in watched] == [
        None,
        "clips/000001.mp4",
        None,
        "clips/000003.mp4",
        None,
        None,
        None,
    ]
    video = VideoFile(tmp_path / "clips" / "000001.mp4")
    assert video.n_frames == 3
    label = json.loads((tmp_path / "clips" / "000001.json").read_text())
    assert (label["task"], label["quality"], label["step"]) == ("close the window", "failure", 10)
    assert [task for _, task in flagged(tmp_path)] == ["close the window"] * 2


def test_only_so_many_clips_are_kept_and_a_monitor_goes_on(tmp_path: Path):
    monitor = Monitor(tmp_path, "close the window", window=2, share=0.5, clips=2)
    for number in range(2):
        monitor.episode(number, number, True, False, 0.9, FRAMES)
    state = monitor.state()
    monitor.episode(2, 2, True, False, 0.9, FRAMES)
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 2
    again = Monitor(tmp_path, "close the window", window=2, share=0.5, clips=2)
    again.restore(state, 2)
    assert len(read_monitor(tmp_path)) == 2
    assert again.diverged
    assert again.episode(2, 2, True, False, 0.9, FRAMES).clip is None


def test_a_monitor_that_cannot_be_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="window ≥ 1"):
        Monitor(tmp_path, "x", window=0)
    assert read_monitor(tmp_path / "nowhere") == []
    (tmp_path / "monitor.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="is damaged"):
        read_monitor(tmp_path)


def finished(folder: Path, reward: str, seed: int, rate: float, base: float | None = None) -> None:
    folder.mkdir(parents=True)
    result = {"task": "push", "algorithm": "dsrl", "reward": reward, "seed": seed, "success_rate": rate, "base": base}
    (folder / "config.json").write_text("{}")
    (folder / "result.json").write_text(json.dumps({**result, "seconds": 120}))
    points = [{"step": 0, "success_rate": 0.25}, {"step": 10, "success_rate": rate}]
    (folder / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))


def test_seeds_are_one_line_and_unfinished_runs_are_named(tmp_path: Path):
    for seed, rate in enumerate((0.5, 0.75, 1.0)):
        finished(tmp_path / f"learned-{seed}", "learned", seed, rate, 0.25)
    finished(tmp_path / "sparse-0", "sparse", 0, 0.3)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    (tmp_path / "judge" / "model.safetensors").write_bytes(b"")
    runs, unfinished = read_runs(tmp_path)
    assert unfinished == ["half"]
    learned, sparse = table(runs)
    assert (learned["success"], learned["lowest"], learned["highest"], learned["before"]) == (0.75, 0.5, 1.0, 0.25)
    assert learned["seeds"] == [0, 1, 2]
    assert learned["minutes"] == 2
    assert sparse["before"] is None
    assert (learned["good_from"], learned["good_seeds"], sparse["good_from"]) == (10, 1, None)
    assert "| dsrl | push | learned | 3 | 0.25 | 0.75 (0.50 to 1.00) | 10 (1) | 2.0 |" in markdown([learned, sparse])
    assert [line["within"] for line in table(runs, {"": 9})] == [0.25, 0.25]
    within = table(runs, read_budgets(["9", "dsrl/push=10"]))  # (.25 + .5) / 2, (.25 + .75) / 2, (.25 + 1) / 2
    assert within[0]["within"] == pytest.approx(0.5)
    assert (within[0]["within_lowest"], within[0]["within_highest"]) == (0.375, 0.625)
    assert "| 0.25 | 0.50 within 10 | 0.75 (0.50 to 1.00) |" in markdown(within)
    with pytest.raises(UserError, match="no finished run of sac/push"):
        table(runs, {"sac/push": 10})
    done = CliRunner().invoke(cli, ["report", "rl", str(tmp_path)], catch_exceptions=False)
    assert "1 not finished: half" in done.output
    assert (tmp_path / "report" / "dsrl.png").stat().st_size > 1000


@pytest.mark.parametrize("text", ["soon", "-1", "push=10", "dsrl/push=", "dsrl/push=ten", "=5", "a/b/c=5"])
def test_a_budget_that_is_none_is_refused(text: str):
    with pytest.raises(UserError, match="give steps, such as 1600"):
        read_budgets([text])


def test_runs_that_differ_in_more_than_the_seed_are_told_apart(tmp_path: Path):
    for name, seed, pessimism in (("a", 0, 0.0), ("b", 1, 0.0), ("c", 0, 1.5)):
        finished(tmp_path / name, "learned", seed, 0.5)
        config = {"seed": seed, "shaping": {"pessimism": pessimism}, "checkpoint": "/home/someone/judge/model"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        watcher = Monitor(tmp_path / name, "push", window=2)
        for episode in range(4):
            watcher.episode(episode, episode, judged=True, success=name == "c", value=0.5, frames=[])
    finished(tmp_path / "e", "sparse", 0, 0.5)
    runs, _ = read_runs(tmp_path)
    assert {run.name: run.label for run in runs} == {
        "a": "learned (pessimism=0.0)",
        "b": "learned (pessimism=0.0)",
        "c": "learned (pessimism=1.5)",
        "e": "sparse",
    }
    assert [(line["variant"], line["seeds"]) for line in table(runs)] == [
        ("pessimism=0.0", [0, 1]),
        ("pessimism=1.5", [0]),
        ("", [0]),
    ]
    CliRunner().invoke(cli, ["report", "rl", str(tmp_path), "--out", str(tmp_path / "told")], catch_exceptions=False)
    assert sorted(path.name for path in (tmp_path / "told").iterdir()) == [
        "dsrl.png",
        "results.json",
        "table.md",
        "watched_dsrl_push.png",
    ]
    results = json.loads((tmp_path / "told" / "results.json").read_text())
    saved = {run["name"]: run["watched"] for run in results["runs"]}
    assert saved["a"] == {"judged": 1.0, "success": 0.0, "diverged_from": 2}  # a window of two
    assert saved["c"] == {"judged": 1.0, "success": 1.0, "diverged_from": None}
    assert saved["e"] is None
    (tmp_path / "c" / "config.json").write_text(json.dumps({"checkpoint": "/home/someone/other/model"}))
    variants = {run.name: run.variant for run in read_runs(tmp_path)[0]}
    assert variants["c"] == "checkpoint=other/model, pessimism=none"
    assert variants["a"] == "checkpoint=judge/model, pessimism=0.0"


def test_judges_of_one_name_are_two_lines_and_starts_that_differ_in_the_seed_are_one(tmp_path: Path):
    for seed in range(2):
        (tmp_path / "first" / f"run-{seed}").mkdir(parents=True)
        asked = {"seed": seed, "checkpoint": None, "reward": "learned"}
        (tmp_path / "first" / f"run-{seed}" / "config.json").write_text(json.dumps(asked))
        for judge in ("one", "two"):
            place = tmp_path / "runs" / f"{judge}-{seed}"
            finished(place, "learned", seed, 0.2 if judge == "one" else 0.9)
            start = str(tmp_path / "first" / f"run-{seed}")
            asked = {"seed": seed, "checkpoint": f"/r/{judge}/judge/model", "start": start}
            (place / "config.json").write_text(json.dumps(asked))
        finished(tmp_path / "runs" / f"third-{seed}", "learned", seed, 1.0)  # goes on from what went on
        asked |= {"checkpoint": "/r/three/judge/model", "start": str(place)}
        (tmp_path / "runs" / f"third-{seed}" / "config.json").write_text(json.dumps(asked))
    lines = table(read_runs(tmp_path / "runs")[0])
    assert [(line["variant"].split(",")[0], line["seeds"], line["success"]) for line in lines] == [
        ("checkpoint=one/judge/model", [0, 1], 0.2),
        ("checkpoint=three/judge/model", [0, 1], 1.0),
        ("checkpoint=two/judge/model", [0, 1], 0.9),
    ]


def test_a_folder_without_runs_is_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="no runs in"):
        read_runs(tmp_path)
    finished(tmp_path / "a", "learned", 0, 0.5)
    (tmp_path / "a" / "result.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_runs(tmp_path)


def test_nothing_parted_nothing_to_refine(tmp_path: Path):
    with pytest.raises(UserError, match="nothing to refine with"):
        flagged(tmp_path)
