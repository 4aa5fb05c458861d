"""`Scorer`: the same numbers whatever the batch, contexts as a live session holds them, honest preferences."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from rbm.errors import UserError
from rbm.frames import pick_frames, session_context
from rbm.model import ClipBatch
from rbm.scoring import Scorer, Scores
from rbm.video import VideoFile, stored_clip

Clips = Callable[..., np.ndarray]
TASK = "push the square to the right"


def one_forward(scorer: Scorer, frames: np.ndarray, task: str) -> tuple[np.ndarray, ...]:
    """Progress, spread and success of one clip, straight from the model."""
    batch = ClipBatch.from_clips([(scorer.model.preprocess(frames), task)])
    with torch.inference_mode():
        return tuple(x.numpy() for x in scorer.model.decode(scorer.model(batch)))


def test_score_is_one_forward_over_even_frames(scorer: Scorer, video_path: Path) -> None:
    scores = scorer.score(video_path, TASK)
    clip = stored_clip(video_path)
    picked = pick_frames(64, scorer.context_frames)
    np.testing.assert_array_equal(scores.frame_index, clip.frame_index[picked])
    np.testing.assert_array_equal(scores.timestamp, clip.timestamp[picked])
    assert scores.frame_index[[0, -1]].tolist() == [0, 89]
    assert (scores.fps, scores.n_frames, scores.task) == (15, 90, TASK)
    for mine, expected in zip(
        (scores.progress, scores.progress_std, scores.success),
        one_forward(scorer, clip.frames[picked], TASK),
        strict=True,
    ):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, expected, atol=1e-5)


@pytest.mark.parametrize("every", [1, 3, 7, 100])
def test_every_scores_what_a_session_would_hold(scorer: Scorer, clip_of: Clips, every: int) -> None:
    frames = clip_of(2, 40)
    scores = scorer.score(frames, TASK, every=every)
    assert scores.frame_index.tolist() == sorted({*range(0, 40, every), 39})
    for i, t in enumerate(scores.frame_index.tolist()):
        context = frames[session_context(t, scorer.context_frames)]
        progress, spread, success = one_forward(scorer, context, TASK)
        assert scores.progress[i] == pytest.approx(progress[-1], abs=1e-5)
        assert scores.progress_std[i] == pytest.approx(spread[-1], abs=1e-5)
        assert scores.success[i] == pytest.approx(success[-1], abs=1e-5)
    assert np.ptp(scores.progress) > 1e-3, "the model tells frames apart, else equality means nothing"


def test_a_long_video_is_scored_at_its_own_frame_rate(scorer: Scorer, video_path: Path) -> None:
    frames = VideoFile(video_path).read(np.arange(90))
    scores = scorer.score(video_path, TASK, every=4)
    assert scores.frame_index.tolist() == [*range(0, 90, 4), 89]
    np.testing.assert_allclose(scores.timestamp, scores.frame_index / 15, atol=1e-4)
    for i in (0, 7, 23):
        context = frames[session_context(int(scores.frame_index[i]), scorer.context_frames)]
        assert scores.progress[i] == pytest.approx(one_forward(scorer, context, TASK)[0][-1], abs=1e-5)


def test_dense_scores_lie_on_the_line_between_two() -> None:
    given = np.array([0, 0.4, 0.2], np.float32)
    scores = Scores(given, given / 2, given * 2, np.array([0, 4, 6], np.int32), given, TASK, 10.0, 8, None)
    dense = scores.dense()
    np.testing.assert_allclose(dense.progress, [0, 0.1, 0.2, 0.3, 0.4, 0.3, 0.2, 0.2], atol=1e-6)
    np.testing.assert_allclose(dense.success, 2 * dense.progress, atol=1e-6)
    np.testing.assert_array_equal(dense.frame_index, range(8))
    assert dense.progress.dtype == np.float32
    assert (dense.n_frames, dense.remaining) == (8, None)


def test_the_future_does_not_change_a_score(scorer: Scorer, clip_of: Clips) -> None:
    frames = clip_of(3, 40)
    other_end = np.concatenate([frames[:20], clip_of(4, 20)])
    a, b = scorer.score(frames, TASK, every=1), scorer.score(other_end, TASK, every=1)
    np.testing.assert_allclose(a.progress[:20], b.progress[:20], atol=1e-5)
    assert np.abs(a.progress[20:] - b.progress[20:]).max() > 1e-3


def test_batch_composition_changes_nothing(scorer: Scorer, clip_of: Clips) -> None:
    clips = [(clip_of(seed, 1 + seed % scorer.context_frames), f"{TASK} {seed % 3}") for seed in range(11)]
    together = scorer.predict(clips, batch_size=64)
    for size in (1, 4):
        for a, b in zip(together, scorer.predict(clips, batch_size=size), strict=True):
            np.testing.assert_allclose(a.progress, b.progress, atol=1e-5)
            np.testing.assert_allclose(a.progress_std, b.progress_std, atol=1e-5)
            np.testing.assert_allclose(a.success, b.success, atol=1e-5)
            if scorer.model.preference == "utility":
                assert a.utility == pytest.approx(b.utility, abs=1e-4)
            else:
                assert np.isnan(a.utility)
    assert [len(scored.progress) for scored in together] == [len(frames) for frames, _ in clips]
    assert scorer.predict([]) == []


def test_one_array_under_many_instructions_is_encoded_once(scorer: Scorer, clip_of: Clips) -> None:
    frames = clip_of(5, 4)
    encoded = []
    hook = scorer.model.backbone.frame_encoder.register_forward_hook(
        lambda _, inputs, __: encoded.append(len(inputs[0]))
    )
    scorer.predict([(frames, f"task {i}") for i in range(5)])
    scorer.score(clip_of(6, 64), TASK, every=1)
    hook.remove()
    assert encoded[0] == 4
    assert sum(encoded[1:]) == 64  # in slices, on the CPU


def test_score_batch_equals_score(scorer: Scorer, clip_of: Clips, video_path: Path) -> None:
    items = [(video_path, TASK), (clip_of(7, 3), "another task"), (VideoFile(video_path), "a third task")]
    for batched, (video, task) in zip(scorer.score_batch(items), items, strict=True):
        alone = scorer.score(video, task)
        np.testing.assert_allclose(batched.progress, alone.progress, atol=1e-5)
        np.testing.assert_array_equal(batched.frame_index, alone.frame_index)
        assert batched.task == task


@pytest.mark.parametrize("channels", [0, 1, 4])
def test_grey_and_alpha_frames_work(scorer: Scorer, clip_of: Clips, channels: int) -> None:
    grey = clip_of(8, 5, 41, 57)[..., :1].repeat(3, 3)
    given_frames = {0: grey[..., 0], 1: grey[..., :1], 4: np.concatenate([grey, grey[..., :1]], -1)}[channels]
    np.testing.assert_array_equal(scorer.score(given_frames, TASK).progress, scorer.score(grey, TASK).progress)


def test_one_frame_gives_one_score(scorer: Scorer, clip_of: Clips) -> None:
    for every in (None, 1, 5):
        scores = scorer.score(clip_of(9, 1), TASK, every=every)
        assert len(scores) == 1
        assert 0 <= scores.progress[0] <= 1
        assert 0 <= scores.success[0] <= 1


def test_preferences_are_antisymmetric_and_rank(scorer: Scorer, clip_of: Clips) -> None:
    videos = [clip_of(seed, 12) for seed in range(5)]
    p = np.full((5, 5), 0.5)
    for a, b in combinations(range(5), 2):
        p[a, b], p[b, a] = scorer.compare(videos[a], videos[b], TASK), scorer.compare(videos[b], videos[a], TASK)
        assert p[a, b] + p[b, a] == pytest.approx(1, abs=1e-5)
    assert scorer.compare(videos[0], videos[0].copy(), TASK) == pytest.approx(0.5, abs=1e-5)
    order = scorer.rank(videos, TASK)
    assert order == np.argsort(-p.sum(1), kind="stable").tolist()
    assert np.ptp(p) > 1e-3, "the model tells clips apart"
    assert scorer.rank([], TASK) == []
    assert scorer.rank(videos[:1], TASK) == [0]


def test_prefer_in_small_batches_is_the_same(scorer: Scorer, clip_of: Clips) -> None:
    clips = [clip_of(seed, 4) for seed in range(4)]
    pairs = [(clips[a], clips[b], f"{TASK} {a}") for a, b in combinations(range(4), 2)]
    together = scorer.prefer(pairs)
    assert together.dtype == np.float32
    assert together.shape == (6,)
    np.testing.assert_allclose(scorer.prefer(pairs, batch_size=2), together, atol=1e-5)
    assert scorer.prefer([]).shape == (0,)


def test_what_cannot_be_scored(scorer: Scorer, clip_of: Clips) -> None:
    frames = clip_of(1, 5)
    for task in ("", "  \n"):
        for attempt in (
            lambda task=task: scorer.score(frames, task),
            lambda task=task: scorer.score(frames, task, every=1),
            lambda task=task: scorer.predict([(frames, task)]),
            lambda task=task: scorer.compare(frames, frames, task),
            lambda task=task: scorer.rank([frames], task),
        ):
            with pytest.raises(UserError, match=r"the task .* is empty"):
                attempt()
    with pytest.raises(UserError, match="every is 0"):
        scorer.score(frames, TASK, every=0)
    with pytest.raises(UserError, match="a clip has 7 frames, this model reads 1 to 6"):
        scorer.predict([(clip_of(1, 7), TASK)])
    with pytest.raises(UserError, match="a clip has 0 frames"):
        scorer.predict([(frames[:0], TASK)])
    for device in ("quantum", "cuda:99"):
        with pytest.raises(UserError, match=f"device '{device}' cannot be used here"):
            Scorer(scorer.model, device=device)


def test_scores_as_json_and_table(scorer: Scorer, clip_of: Clips) -> None:
    scores = scorer.score(clip_of(1, 64), TASK, every=1)
    data = scores.to_json()
    assert data["frame_index"] == list(range(64))
    np.testing.assert_allclose(data["progress"], scores.progress, atol=1e-6)
    assert {len(data[name]) for name in ("frame_index", "timestamp", "progress", "progress_std", "success")} == {64}
    assert scores.table(max_rows=10).row_count == 10
    assert scores.table(max_rows=100).row_count == 64
    assert isinstance(scores, Scores)


def test_scoring_runs_without_what_training_needs(checkpoints: dict[str, Path], video_path: Path) -> None:
    program = """
import sys
for name in ("lightning", "pytorch_lightning", "hydra", "omegaconf", "zarr", "icechunk", "metaworld", "mujoco",
             "gymnasium", "matplotlib", "scipy"):
    sys.modules[name] = None  # importing it now fails
from rbm.scoring import Scorer
scores = Scorer.from_pretrained(sys.argv[1], device="cpu").score(sys.argv[2], "push the square", every=4)
print(len(scores), scores.progress[-1])
"""
    command = [sys.executable, "-c", program, str(checkpoints["utility"]), str(video_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "24"
