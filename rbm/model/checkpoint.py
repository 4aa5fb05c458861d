"""A reward model on disk, in the format of this package: `config.json`, safetensors, and the backbone's files.

`load` also takes what others write: see `rbm.model.published`, `rbm.model.adapter`, `rbm.model.lightning_file`,
`rbm.model.hub`. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from rbm.errors import UserError
from rbm.model.reward_model import RewardModel
from rbm.model.weights import WEIGHTS, fill, read_folder, write_folder

FORMAT = "rbm-reward-model"
VERSION = 1
CONFIG = "config.json"


def save(model: RewardModel, folder: str | os.PathLike[str], facts: dict[str, Any] | None = None) -> None:
    """Write the model; each file appears whole or not at all."""
    write_folder(folder, model.state_dict(), model.backbone.files() | {CONFIG: described(model, facts)})


def described(model: RewardModel, facts: dict[str, Any] | None = None) -> str:
    """Content of `config.json`."""
    description = {"format": FORMAT, "version": VERSION, "model": model.config(), "facts": facts or {}}
    return json.dumps(description, indent=2, ensure_ascii=False) + "\n"


def load(place: str | os.PathLike[str], dtype: str | torch.dtype | None = None) -> RewardModel:
    """Read a model of any kind that `RewardModel.from_pretrained` names, in eval mode, on the CPU."""
    model = _load(place)
    if dtype is not None:
        model = model.to(as_dtype(dtype))
    return model.eval()


def _load(place: str | os.PathLike[str]) -> RewardModel:
    source = Path(place)
    return load_own(source)


def load_own(source: Path) -> RewardModel:
    """Read what `save` wrote."""
    description = describe(source)
    files = {path.name: path.read_text() for path in sorted(source.glob("*.json")) if path.name != CONFIG}
    model = empty(description["model"], files)
    fill(model, read_folder(source), str(source / WEIGHTS))
    return model


def empty(config: dict[str, Any], files: dict[str, str]) -> RewardModel:
    """The architecture, its memory not yet filled."""
    if config.get("backbone", {}).get("type") == "nano":
        return RewardModel.from_config(config, files)
    from rbm.model.backbones.vlm import without_random_weights

    with without_random_weights():
        return RewardModel.from_config(config, files)


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    """Raises UserError for a name that is no floating type of torch's."""
    found = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype {name!r} does not exist: give float32, bfloat16 or float16")
    return found


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
    description = read_json(source / CONFIG)
    if description.get("format") != FORMAT:
        raise UserError(f"{source / CONFIG} does not describe a reward model (format {FORMAT!r})")
    if description.get("version") != VERSION:
        raise UserError(
            f"{source / CONFIG} is of version {description.get('version')}, this package reads version {VERSION}: "
            "install the package version that wrote it, or a newer one"
        )
    if not isinstance(description.get("model"), dict):
        raise UserError(f"{source / CONFIG}: the entry 'model' is missing")
    return description


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that is missing or no JSON object."""
    if not path.is_file():
        raise UserError(f"{path.parent}: {path.name} is missing, this is not a reward model's folder")
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} does not describe a reward model: it holds no JSON object")
    return found
