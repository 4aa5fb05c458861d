"""Where benchmarks of models run."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rbm.bench import dims as sizes
from rbm.errors import UserError
from rbm.model import RewardModel
from rbm.model.backbones.qwen3_vl import Qwen3VLBackbone


def device_named(name: str, dims: str) -> torch.device:
    """One of torch's devices; `auto` is a GPU where there is one.

    Raises:
        UserError: it is not there, or too small for the dimensions.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(name)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not there: use --device auto or cpu") from error
    if dims == "4b" and place.type == "cpu":
        raise UserError("4b dimensions need an accelerator with 40 GB or more: use --dims small on the CPU")
    return place


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """PyTorch computes with so many threads; none: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def now(device: torch.device) -> float:
    """Seconds, when all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def random_model(dims: str, device: torch.device, dtype: torch.dtype, context_frames: int = 8) -> RewardModel:
    """A Qwen3-VL utility model with random weights, its tower frozen."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # buffers that must stay float32 say so themselves
    try:
        with device:
            backbone = Qwen3VLBackbone(sizes.architecture(dims), sizes.tokenizer())
            model = RewardModel(backbone, context_frames, dropout=0.0)
    finally:
        torch.set_default_dtype(before)
    backbone.tower.requires_grad_(False)
    return model


def versions() -> dict[str, str]:
    """Of what was measured."""
    import transformers

    from rbm.training.run import git_revision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "revision": git_revision(),
    }
