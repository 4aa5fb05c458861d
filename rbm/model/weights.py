"""Files of weights: one `model.safetensors`, or shards with an index. Never pickle."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rbm.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "4GB"

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

State = dict[str, Tensor]


def write_folder(
    folder: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    texts: Mapping[str, str],
    shard: str = SHARD,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Weights and text files (name -> content) into a folder; each file appears whole or not at all, config.json last.

    Weights of an earlier model that are not overwritten are removed.

    Raises:
        UserError: the folder cannot be written.
    """
    target = Path(folder)
    plan = split_torch_state_dict_into_shards(
        dict(state), filename_pattern="model{suffix}.safetensors", max_shard_size=shard
    )
    described = {"format": "pt", **(metadata or {})}
    texts = dict(texts)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        texts[INDEX] = json.dumps(index, indent=2) + "\n"
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as scratch:
            for name, text in texts.items():
                Path(scratch, name).write_text(text)
            for name, keys in plan.filename_to_tensors.items():
                part = {key: state[key].detach().cpu().contiguous() for key in keys}
                save_file(part, Path(scratch, name), metadata=described)
                shutil.copymode(Path(scratch, next(iter(texts))), Path(scratch, name))  # safetensors makes it private
            names = [*plan.filename_to_tensors, *sorted(texts, key=lambda name: name == "config.json")]
            for name in names:
                os.replace(Path(scratch, name), target / name)
        for path in [*target.glob("model*.safetensors"), target / INDEX]:
            if path.name not in names:
                path.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the model to {target}: {error}") from error


def read_folder(folder: str | os.PathLike[str]) -> State:
    """All tensors of a folder, of one file or of the shards that its index names.

    Raises:
        UserError: a file is missing or truncated (it is named), or the index names what no shard has.
    """
    source = Path(folder)
    index = source / INDEX
    if not index.is_file():
        return read_file(source / WEIGHTS)
    try:
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(name, str) for name in places.values()):
            raise ValueError("weight_map does not name files")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{index} cannot be read: {error!r}") from error
    state: State = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which is no file of this folder")
        state |= read_file(source / name)
    missing = sorted(places.keys() - state.keys())
    if missing:
        raise UserError(f"{source}: its shards lack what {INDEX} names: {listed(missing)}")
    return state


def read_file(path: Path) -> State:
    """All tensors of one safetensors file.

    Raises:
        UserError: it is missing, truncated, or something else.
    """
    if not path.is_file():
        raise UserError(f"{path.parent}: {path.name} is missing, the checkpoint is not complete")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): it is truncated or not a safetensors file; fetch or write it again"
        ) from error


def fill(model: nn.Module, state: State, what: str) -> None:
    """Put `state` into a model, in the numbers' own precision.

    Raises:
        UserError: keys are missing or unknown, or shapes differ; the message lists them.
    """
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise UserError(
            f"{what} does not fit its configuration: missing keys {listed(missing)}, unknown keys {listed(unknown)}"
        )
    wrong = [
        f"{name} has shape {tuple(tensor.shape)}, the configuration says {tuple(expected[name].shape)}"
        for name, tensor in state.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise UserError(f"{what} does not fit its configuration: {'; '.join(wrong[:5])}")
    strange = [name for name in expected if expected[name].is_floating_point() and state[name].dtype not in PRECISIONS]
    if strange:
        raise UserError(
            f"{what} holds {listed(sorted(strange))} as {state[strange[0]].dtype}: only float32, bfloat16, float16 and "
            "float64 are read"
        )
    for name in expected:  # to where memory begins on a round address: sums are then the same at every load
        state[name] = state[name].clone()
    model.load_state_dict(state, assign=True)


def listed(names: list[str]) -> str:
    """At most twenty of them."""
    return f"[{', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}]"


def read_text(path: Path) -> str:
    """Raises UserError for a file that cannot be read as UTF-8."""
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error


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
