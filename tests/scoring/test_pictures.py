"""The plot and the overlaid video: what is in them, not how they look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rbm.errors import UserError
from rbm.scoring import Scores
from rbm.scoring.overlay import overlay_frames, write_overlay
from rbm.scoring.plot import draw_scores, write_plot
from rbm.video import StoredClip, VideoFile, encode_video, stored_clip

Clips = Callable[..., np.ndarray]


def scores_of(clip: StoredClip, task: str = "push the $square$ to the right") -> Scores:
    """Scores that rise with time, as a perfect model's would."""
    rising = np.linspace(0, 1, len(clip.frames), dtype=np.float32)
    index, times = clip.frame_index, clip.timestamp
    return Scores(rising, np.full_like(rising, 0.1), rising**4, index, times, task, clip.fps, clip.n_frames)


@pytest.mark.parametrize("count", [1, 2, 64])
@pytest.mark.parametrize("size", [(48, 64), (120, 30), (20, 160)])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plots_of_any_video_can_be_written(
    tmp_path: Path, clip_of: Clips, count: int, size: tuple[int, int], suffix: str
) -> None:
    clip = stored_clip(clip_of(0, count, *size), fps=10)
    target = tmp_path / f"plot{suffix}"
    write_plot(target, scores_of(clip), clip)
    assert list(tmp_path.iterdir()) == [target]
    if suffix == ".png":
        assert Image.open(target).width == 1500


def test_the_plot_shows_the_scores(clip_of: Clips) -> None:
    clip = stored_clip(clip_of(0, 30), fps=10)
    scores = scores_of(clip)
    figure = draw_scores(scores, clip)
    curves, *strip = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in curves.lines}
    np.testing.assert_array_equal(drawn["progress ± std"], scores.progress)
    np.testing.assert_array_equal(drawn["success"], scores.success)
    np.testing.assert_array_equal(strip[0].images[0].get_array(), clip.frames[0])
    np.testing.assert_array_equal(strip[-1].images[0].get_array(), clip.frames[-1])
    assert scores.task in [text.get_text() for text in figure.texts]


def test_the_overlaid_video_is_the_video_with_a_panel(tmp_path: Path, clip_of: Clips) -> None:
    source = tmp_path / "in.mp4"
    encode_video(source, clip_of(0, 90, 96, 480), fps=12.5, crf=10)
    video = VideoFile(source)
    target = tmp_path / "out.mp4"
    calls: list[int] = []
    assert write_overlay(target, video, scores_of(stored_clip(video)), lambda: calls.append(1)) == 90
    out = VideoFile(target)
    assert (out.n_frames, out.fps, len(calls)) == (90, 12.5, 90)
    assert out.width == 480
    assert out.height > 96
    picked = [0, 44, 89]
    difference = out.read(picked, None)[:, :96].astype(int) - video.read(picked, None)
    assert np.abs(difference).mean() < 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_the_panel_shows_nothing_of_the_future(clip_of: Clips) -> None:
    frames = clip_of(0, 40, 48, 480)
    clip = stored_clip(frames, fps=10)
    known = scores_of(clip)
    changed = known.progress.copy()
    changed[20:] = 0.5
    other = Scores(
        changed, known.progress_std, known.success, known.frame_index, known.timestamp, known.task, known.fps, 40
    )
    times = clip.timestamp.astype(np.float64)
    a, b = (np.stack(list(overlay_frames(frames, times, scores))) for scores in (known, other))
    np.testing.assert_array_equal(a[:19], b[:19])
    assert (a[25] != b[25]).any()


@pytest.mark.parametrize("size", [(1, 1), (33, 21), (21, 900), (700, 20), (1440, 2560)])
def test_odd_and_large_pictures_come_out_even_and_readable(clip_of: Clips, size: tuple[int, int]) -> None:
    frames = np.zeros((2, *size, 3), np.uint8)
    drawn = np.stack(list(overlay_frames(frames, np.array([0.0, 0.1]), scores_of(stored_clip(frames, fps=10)))))
    assert drawn.shape[1] % 2 == drawn.shape[2] % 2 == 0
    assert 240 <= drawn.shape[2] <= 1280
    assert drawn.shape[1] <= 2100


def test_a_long_video_becomes_a_time_lapse(tmp_path: Path, clip_of: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbm.scoring.overlay.MAX_FRAMES", 30)  # 1800 in earnest
    source, target = tmp_path / "in.mp4", tmp_path / "out.mp4"
    encode_video(source, clip_of(0, 95), fps=20)
    video = VideoFile(source)
    assert write_overlay(target, video, scores_of(stored_clip(video))) == 30
    assert (VideoFile(target).n_frames, VideoFile(target).fps) == (30, 20)


def test_a_long_instruction_is_cut(clip_of: Clips) -> None:
    frames = clip_of(0, 2)
    scores = scores_of(stored_clip(frames, fps=10), task="öffne die Schublade " * 60)
    assert len(list(overlay_frames(frames, np.array([0.0, 0.1]), scores))) == 2


def test_a_damaged_source_leaves_no_video_behind(tmp_path: Path, clip_of: Clips) -> None:
    source, target = tmp_path / "in.mp4", tmp_path / "out.mp4"
    encode_video(source, clip_of(0, 60), fps=20)
    data = bytearray(source.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 3
    data[middle : middle + 3000] = bytes(3000)
    source.write_bytes(data)
    video = VideoFile(source)
    times = np.zeros(1, np.float32)
    scores = Scores(times, times, times, np.zeros(1, np.int32), times, "push", video.fps, video.n_frames)
    with pytest.raises(UserError, match="cannot be decoded; the file is damaged"):
        write_overlay(target, video, scores)
    assert list(tmp_path.iterdir()) == [source]
