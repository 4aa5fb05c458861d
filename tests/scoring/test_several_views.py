"""Scoring of several views: the same moments whatever the videos' lengths and rates; `rbm score --view`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from rbm.cli import cli
from rbm.errors import UserError
from rbm.frames import session_context
from rbm.model import RewardModel
from rbm.model.backbones import NanoBackbone
from rbm.scoring import Scorer
from rbm.scoring.views import clips_of, nearest_in_time
from rbm.video import VideoFile, encode_video, stored_clip

TASK = "push the square"
VIEWS = ("near", "wrist")


def two_view_scorer(preference: str = "utility", **options) -> Scorer:
    torch.manual_seed(0)
    backbone = NanoBackbone(image_size=32, width=8, hidden=32, layers=2, heads=2, words=64, views=VIEWS)
    return Scorer(RewardModel(backbone, context_frames=6, preference=preference, **options), "cpu")


def numbers(scores) -> np.ndarray:
    return np.stack([scores.progress, scores.progress_std, scores.success])


def counted(n: int) -> np.ndarray:
    """uint8 (n, 16, 16, 3): a frame's brightness is its number."""
    return np.repeat(np.arange(n, dtype=np.uint8), 16 * 16 * 3).reshape(n, 16, 16, 3)


def test_nearest_in_time_by_hand():
    times = np.array([0.0, 1.0, 2.5, 4.0])
    wanted = np.array([-1.0, 0.0, 0.4, 0.5, 0.6, 1.75, 1.76, 3.9, 9.0])
    assert nearest_in_time(times, wanted).tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 3]
    assert nearest_in_time(np.zeros(1), wanted).tolist() == [0] * 9
    assert nearest_in_time(times.astype(np.float32), times).tolist() == [0, 1, 2, 3]


def test_views_of_other_lengths_and_rates_show_the_same_moments(tmp_path):
    # the first: 5 frames at 10 a second, at 0, .1, .2, .3, .4 s
    first = stored_clip(counted(5), fps=10)
    # 24 frames a second: at these moments frames 0, 2.4, 4.8, 7.2, 9.6
    faster = stored_clip(counted(20), fps=24)
    clips = clips_of({"wrist": faster, "near": first}, VIEWS)
    assert list(clips) == ["near", "wrist"]  # the model's order
    assert clips["wrist"].frames[:, 0, 0, 0].tolist() == [0, 2, 5, 7, 10]
    assert clips["wrist"].frame_index.tolist() == [0, 2, 5, 7, 10]
    np.testing.assert_array_equal(clips["wrist"].timestamp, first.timestamp)
    # one that ends early goes on with its last frame: 5 a second, 0, .2 s
    slow = clips_of({"near": first, "wrist": stored_clip(counted(2), fps=5)}, VIEWS)["wrist"]
    assert slow.frames[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 1]
    # an array has no times of its own: it counts as filmed at the first's rate
    assert clips_of({"near": first, "wrist": counted(9)}, VIEWS)["wrist"].frame_index.tolist() == [0, 1, 2, 3, 4]
    # again, nothing changes
    again = clips_of(clips, VIEWS)
    for name in VIEWS:
        np.testing.assert_array_equal(again[name].frames, clips[name].frames)


def test_a_long_file_is_looked_at_where_the_first_one_is(tmp_path, clip_of):
    encode_video(tmp_path / "near.mp4", clip_of(1, 100), fps=10)
    encode_video(tmp_path / "wrist.mp4", clip_of(2, 300), fps=30)
    clips = clips_of({"near": tmp_path / "near.mp4", "wrist": str(tmp_path / "wrist.mp4")}, VIEWS)
    assert len(clips["near"].frames) == 64
    assert clips["wrist"].frame_index.tolist() == (3 * clips["near"].frame_index).tolist()
    expected = VideoFile(tmp_path / "wrist.mp4").read(3 * clips["near"].frame_index)
    np.testing.assert_array_equal(clips["wrist"].frames, expected)
    long = clips_of({"near": stored_clip(clip_of(1, 100), fps=10), "wrist": clip_of(3, 100)}, VIEWS)["wrist"]
    np.testing.assert_array_equal(long.frames, clip_of(3, 100)[long.frame_index])


def test_every_way_to_give_views_scores_alike(clip_of):
    scorer = two_view_scorer()
    near, wrist = clip_of(1, 20), clip_of(2, 20, 60, 48)
    both = scorer.score({"near": near, "wrist": wrist}, TASK)
    assert both.progress.shape == (6,)
    np.testing.assert_array_equal(both.frame_index, scorer.score(near, TASK).frame_index)
    batch = scorer.score_batch([(near, TASK), ({"wrist": wrist, "near": near}, TASK), ({"wrist": wrist}, TASK)])
    np.testing.assert_allclose(numbers(batch[1]), numbers(both), atol=1e-5)
    for alone, together in ((near, batch[0]), ({"wrist": wrist}, batch[2])):
        np.testing.assert_allclose(numbers(scorer.score(alone, TASK)), numbers(together), atol=1e-5)
    np.testing.assert_allclose(numbers(scorer.score({"near": near}, TASK)), numbers(batch[0]), atol=1e-5)
    curves = [scores.progress for scores in batch] + [scorer.score({"near": near, "wrist": near}, TASK).progress]
    for index, a in enumerate(curves):
        for b in curves[index + 1 :]:
            assert np.abs(a - b).max() > 1e-4  # every one is another showing
    shown = scorer.context_clip({"near": near, "wrist": wrist})
    (clip,) = scorer.predict([({name: one.frames for name, one in shown.items()}, TASK)])
    np.testing.assert_allclose(clip.progress, both.progress, atol=1e-5)


def test_every_moment_is_scored_from_what_a_session_holds_of_each_view(clip_of):
    scorer = two_view_scorer(remaining=True)
    near, wrist = clip_of(1, 20), clip_of(2, 20, 60, 48)
    for video in ({"near": near, "wrist": wrist}, {"wrist": wrist}, near):
        scores = scorer.score(video, TASK, every=1)
        for moment in (0, 3, 11, 19):
            held = session_context(moment, 6)
            shown = {name: frames[held] for name, frames in video.items()} if isinstance(video, dict) else video[held]
            (expected,) = scorer.predict([(shown, TASK)])
            assert scores.progress[moment] == pytest.approx(expected.progress[-1], abs=1e-5)
            assert scores.remaining[moment] == pytest.approx(expected.remaining[-1], rel=1e-3)


@pytest.mark.parametrize("preference", ["utility", "joint"])
def test_compare_and_rank_look_at_all_views(preference, clip_of):
    scorer = two_view_scorer(preference)
    a = {"near": clip_of(1), "wrist": clip_of(2)}
    b = {"near": clip_of(1), "wrist": clip_of(3)}
    p = scorer.compare(a, b, TASK)
    assert p + scorer.compare(b, a, TASK) == pytest.approx(1, abs=1e-5)
    assert abs(p - 0.5) > 1e-6  # they differ in the second view only
    order = scorer.rank([b, a, clip_of(1)], TASK)
    assert sorted(order) == [0, 1, 2]
    assert (order.index(1) < order.index(0)) == (p > 0.5)


def test_what_is_wrong_with_views_is_said(clip_of, scorer):
    video = clip_of(1)
    with pytest.raises(UserError, match="this model reads one view: give it one video"):
        scorer.score({"near": video}, TASK)
    several = two_view_scorer()
    for given, message in (
        ({"near": video, "wirst": video}, "this model has no view wirst; it reads near, wrist"),
        ({}, "no view was given; this model reads near, wrist"),
        ({"near": video, "wrist": np.zeros((0, 8, 8, 3), np.uint8)}, "there is no frame"),
        ({"near": video, "wrist": np.zeros((4, 8, 8, 3), np.float32)}, "give uint8"),
        ({"near": video, "wrist": "nowhere.mp4"}, "nowhere.mp4"),
    ):
        with pytest.raises(UserError, match=message):
            several.score(given, TASK)
    with pytest.raises(UserError, match="this model has no view far; it reads near, wrist"):
        several.predict([({"far": video[:4]}, TASK)])
    with pytest.raises(UserError, match=r"the same number of frames, not \[3, 4\]"):
        several.predict([({"near": video[:4], "wrist": video[:3]}, TASK)])


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_command_takes_views(tmp_path, video_path, clip_of):
    other = tmp_path / "wrist.mp4"
    encode_video(other, clip_of(5, 60), fps=10)
    scorer = two_view_scorer(remaining=True)
    scorer.model.save_pretrained(str(tmp_path / "model"))
    usual = ["--task", TASK, "--checkpoint", tmp_path / "model", "--device", "cpu", "--every", "9"]
    done = run("score", video_path, "--view", f"wrist={other}", *usual, "--json", tmp_path / "scores.json")
    assert done.exit_code == 0, done.output
    assert "remaining s" in done.stdout
    assert "s to go" in done.stdout
    (entry,) = json.loads((tmp_path / "scores.json").read_text())["videos"]
    assert entry["views"] == {"wrist": str(other)}
    expected = scorer.score({"near": video_path, "wrist": other}, TASK, every=9)
    np.testing.assert_allclose(entry["progress"], expected.progress, atol=1e-5)
    np.testing.assert_allclose(entry["remaining"], expected.remaining, rtol=1e-3)
    for wrong, message in (
        (["--view", "wrist"], "write NAME=FILE"),
        (["--view", f"top={other}"], "this model has no view top; it reads near, wrist"),
        (["--view", f"near={other}"], "VIDEO is this view already"),
        (["--view", f"wrist={other}", "--view", f"wrist={other}"], "given twice"),
        ([video_path, "--view", f"wrist={other}"], "belongs to one video, 2 were given"),
        (["--view", f"wrist={other}", "--json", other], "wrist.mp4"),
    ):
        done = run("score", video_path, *wrong, *usual)
        assert isinstance(done.exception, UserError), (wrong, done.output)
        assert message in str(done.exception)
    done = run("score", video_path, "--view", f"wrist={other}", "--task", TASK, "--device", "cpu")
    assert isinstance(done.exception, UserError)
    assert "this model reads one view" in str(done.exception)
