"""Shared fixtures: a tiny real corpus, a tiny real model."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import moving_dot
import pytest
import torch
from hypothesis import settings

from rbm.corpus import Corpus
from rbm.model import RewardModel
from rbm.model.backbones import NanoBackbone

torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, derandomize=True)  # a busy machine is slow; a commit passes or fails
settings.load_profile("tests")

if threading.current_thread() is threading.main_thread():
    # a shell starts what runs in its background deaf to Ctrl-C, and what tests start would be so too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes are mapped from a cache of this run, also in the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RBM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def dot_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """4 tasks × 3 outcomes × 4 attempts of a moving dot, jpeg, with dense labels."""
    return moving_dot.write_corpus(tmp_path_factory.mktemp("dot") / "corpus")


@pytest.fixture(scope="session")
def tiny_model() -> RewardModel:
    """A small `nano` with random weights, in eval mode."""
    torch.manual_seed(0)
    return RewardModel(NanoBackbone(image_size=32, width=8, hidden=32, layers=2, heads=2), context_frames=8).eval()


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model: RewardModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` as a saved folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.save_pretrained(str(folder))
    return folder
