"""A tiny reward model with random weights whose scores differ from frame to frame, and the helpers of server tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rbm.model import RewardModel
from rbm.model.backbones import NanoBackbone
from rbm.scoring import Scorer

sys.path.append(str(Path(__file__).resolve().parents[1] / "scoring" / "server"))  # `running`: real servers

CONTEXT = 6


def judge_model() -> RewardModel:
    torch.manual_seed(0)
    backbone = NanoBackbone(image_size=32, width=8, hidden=32, layers=2, heads=2, words=64)
    model = RewardModel(backbone, context_frames=CONTEXT)
    with torch.no_grad():  # random heads hardly differ between frames; a test of equality needs that they do
        for head in (model.progress_head, model.success_head):
            for parameter in head.parameters():
                parameter.mul_(4)
    return model


@pytest.fixture(scope="session")
def judge_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a saved folder."""
    folder = tmp_path_factory.mktemp("judge") / "tiny"
    judge_model().save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def judge_scorer(judge_checkpoint: Path) -> Scorer:
    return Scorer.from_pretrained(judge_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def blind_scorer() -> Scorer:
    """A model whose weights are spoiled: its scores are NaN."""
    model = judge_model()
    with torch.no_grad():
        for parameter in model.progress_head.parameters():
            parameter.fill_(float("nan"))
    return Scorer(model, device="cpu")
