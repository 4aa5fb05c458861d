"""A tiny reward model with random weights, on disk, and real video files to score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rbm.model import RewardModel
from rbm.model.backbones import NanoBackbone
from rbm.scoring import Scorer
from rbm.video import encode_video

CONTEXT = 6


def tiny_model(preference: str = "utility") -> RewardModel:
    torch.manual_seed(0)
    backbone = NanoBackbone(image_size=32, width=8, hidden=32, layers=2, heads=2, words=64)
    model = RewardModel(backbone, context_frames=CONTEXT, preference=preference)
    with torch.no_grad():  # random heads hardly differ between frames; a test of equality needs that they do
        for head in (model.progress_head, model.success_head, model.preference_head):
            for parameter in head.parameters():
                parameter.mul_(4)
    return model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by kind of preference."""
    folders = {}
    for preference in ("utility", "joint"):
        folders[preference] = tmp_path_factory.mktemp("models") / preference
        tiny_model(preference).save_pretrained(str(folders[preference]))
    return folders


@pytest.fixture(scope="session", params=["utility", "joint"])
def scorer(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Scorer:
    return Scorer.from_pretrained(checkpoints[request.param], device="cpu")


@pytest.fixture(scope="session")
def clip_of() -> Callable[..., np.ndarray]:
    def make(seed: int, count: int = 20, height: int = 40, width: int = 56) -> np.ndarray:
        """uint8 (count, height, width, 3): a square that wanders over a background, other for each seed."""
        rng = np.random.default_rng(seed)
        frames = np.empty((count, height, width, 3), np.uint8)
        coarse = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
        frames[:] = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
        y, x = rng.integers(0, height - 10), rng.integers(0, width - 10)
        for i in range(count):
            frames[i, y : y + 10, x : x + 10] = rng.integers(0, 256, 3)
            y, x = (y + rng.integers(-3, 4)) % (height - 10), (x + rng.integers(0, 5)) % (width - 10)
        return frames

    return make


@pytest.fixture(scope="session")
def video_path(tmp_path_factory: pytest.TempPathFactory, clip_of: Callable[..., np.ndarray]) -> Path:
    """A video of 90 frames at 15 a second, whose name has spaces and letters beyond ASCII."""
    path = tmp_path_factory.mktemp("videos with spaces") / "öffne die Schublade.mp4"
    encode_video(path, clip_of(1, 90), fps=15)
    return path
