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
from huggingface_hub.errors import StrictDataclassError

from rbm.errors import UserError
from rbm.model.reward_model import RewardModel
from rbm.model.weights import WEIGHTS, fill, read_folder, read_json, read_text, write_folder

FORMAT = "rbm-reward-model"
VERSION = 1
CONFIG = "config.json"
SHARDED = ".metadata"
"""What the folder of a sharded checkpoint has."""


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
    source = found(place)
    try:
        return _loaded(source)
    except UserError:
        raise
    except _DAMAGE as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"checkpoint {source} cannot be loaded: its configuration or weights are damaged, or of a kind that is not "
            f"known here ({why})"
        ) from error


_DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, StrictDataclassError)
"""What libraries raise at values that make no sense to them."""


def found(place: str | os.PathLike[str]) -> Path:
    """The file or folder of a checkpoint: fetched from the hub if it is not here; of a run's folder its model.

    Raises:
        UserError: nothing is there, and it is no id on the hub; or it cannot be fetched.
    """
    source = Path(place)
    if not source.exists():
        from rbm.model.hub import fetch, is_hub_id

        if not is_hub_id(os.fspath(place)):
            raise UserError(f"checkpoint {place} is neither a file or folder nor an id on the hub such as org/name")
        source = fetch(os.fspath(place))
    if source.is_dir() and not (source / CONFIG).exists() and (source / "model" / CONFIG).exists():
        source = source / "model"
    return source


def _loaded(source: Path) -> RewardModel:
    if source.is_file():
        from rbm.model.lightning_file import load_lightning

        return load_lightning(source)
    if (source / SHARDED).exists():
        from rbm.model.lightning_file import load_sharded

        return load_sharded(source)
    config = read_json(source / CONFIG)
    if config.get("format") != FORMAT:
        from rbm.model.published import is_published, load_published

        if is_published(config):
            return load_published(source, config)
    elif "adapter" in config:
        from rbm.model.adapter import load_adapter

        return load_adapter(source)
    return load_own(source)


def load_own(source: Path) -> RewardModel:
    """Read what `save` wrote."""
    description = describe(source)
    files = {path.name: read_text(path) for path in sorted(source.glob("*.json")) if path.name != CONFIG}
    model = empty(description["model"], files)
    fill(model, read_folder(source), str(source / WEIGHTS))
    return model


def calibrates_later(place: str | os.PathLike[str]) -> bool:
    """Whether this is a checkpoint out of a run: calibration comes after the last of them."""
    source = found(place)
    return source.is_file() or (source / SHARDED).exists()


def facts_of(place: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts that a checkpoint of ours carries (corpus, snapshot, tasks, …); none of anything else."""
    source = found(place)
    if source.is_file() or (source / SHARDED).exists():
        from rbm.model.lightning_file import read_rest

        return {name: value for name, value in read_rest(source)["rbm"].items() if name not in ("model", "files")}
    config = read_json(source / CONFIG)
    return dict(config.get("facts") or {}) if config.get("format") == FORMAT else {}


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
        UserError: no or broken config.json, another format, or a newer version.
    """
    source = Path(folder)
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
