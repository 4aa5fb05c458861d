"""A reward model on disk: a folder with `config.json` and `model.safetensors`. Never pickle."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rbm.errors import UserError
from rbm.model.reward_model import RewardModel

FORMAT = "rbm-reward-model"
VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: RewardModel, folder: str | os.PathLike[str], facts: dict[str, Any] | None = None) -> None:
    """Write the model; each file appears whole or not at all."""
    target = Path(folder)
    description = {"format": FORMAT, "version": VERSION, "model": model.config(), "facts": facts or {}}
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as scratch:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
            save_file(state, Path(scratch, WEIGHTS))
            Path(scratch, CONFIG).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
            shutil.copymode(Path(scratch, CONFIG), Path(scratch, WEIGHTS))  # safetensors makes it private
            for name in (WEIGHTS, CONFIG):
                os.replace(Path(scratch, name), target / name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the model to {target}: {error}") from error


def load(folder: str | os.PathLike[str]) -> RewardModel:
    """Read a model that `save` wrote, in eval mode, on the CPU."""
    source = Path(folder)
    model = RewardModel.from_config(describe(source)["model"])
    weights = source / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{source}: {WEIGHTS} is missing, the checkpoint is not complete")
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} cannot be read ({error}): it is truncated or not a safetensors file") from error
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise UserError(f"{weights} does not fit its {CONFIG}: missing keys {missing}, unknown keys {unknown}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, the configuration says {tuple(expected[name].shape)}"
            raise UserError(f"{weights}: {name} has shape {shapes}")
    model.load_state_dict(state)
    return model.eval()


def describe(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`config.json` of a checkpoint, checked: keys format, version, model, facts.

    Raises:
        UserError: no such folder, no or broken config.json, another format, or a newer version.
    """
    source = Path(folder)
    if not source.is_dir():
        hint = "a Lightning file resumes training; score with the folder beside it" if source.is_file() else ""
        raise UserError(
            f"checkpoint {source} is not a folder with {CONFIG} and {WEIGHTS}" + (f": {hint}" if hint else "")
        )
    path = source / CONFIG
    if not path.is_file():
        raise UserError(f"{source}: {CONFIG} is missing, this is not a reward model's folder")
    try:
        description = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{path} does not describe a reward model (format {FORMAT!r})")
    if description.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {description.get('version')}, this package reads version {VERSION}: "
            "install the package version that wrote it, or a newer one"
        )
    if not isinstance(description.get("model"), dict):
        raise UserError(f"{path}: the entry 'model' is missing")
    return description
