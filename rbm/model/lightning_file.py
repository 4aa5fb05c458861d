"""Models out of Lightning's checkpoints: a `.ckpt` file, or the folder that a sharded run (FSDP) writes.

    last.ckpt               of one process or DDP: a file of torch.save
    last.ckpt/              of FSDP
      .metadata             which tensor stands where: a pickle
      __RANK_N.distcp       tensors, each a piece of torch.save
      meta.pt               all that is no tensor: a file of torch.save

Nothing is unpickled freely: files of torch.save are read with `weights_only`, and `.metadata` by an unpickler that
takes only the classes of which such metadata are made. Both kinds hold facts under the key `rbm`, among them what a
model is made from.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import is_zipfile

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from rbm.errors import UserError
from rbm.model.adapter import complete, uniform
from rbm.model.checkpoint import empty
from rbm.model.reward_model import RewardModel
from rbm.model.weights import fill

METADATA, REST = ".metadata", "meta.pt"
STATE = "state_dict"
MODULE = "model."
"""What the LightningModule, and with it every name in the checkpoint, calls the model."""

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
}  # fmt: skip
_UNREADABLE = (RuntimeError, LookupError, EOFError, ValueError, TypeError, AttributeError, ImportError, OSError,
               pickle.UnpicklingError)  # fmt: skip


class _Restricted(pickle.Unpickler):
    """Takes what the metadata of torch.distributed.checkpoint is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module.startswith("pathlib"):
            return PurePosixPath
        if (module, name) == ("torch.serialization", "_get_layout"):
            return lambda _: torch.strided
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a checkpoint")


class ShardReader(FileSystemReader):
    """Reads the shards of a folder; its `.metadata` without running what may stand in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises UserError: it is missing, no such metadata, or names shards that are missing or too short."""
        found = read_metadata(Path(self.path))
        if getattr(found, "storage_meta", None) is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return found


def read_metadata(folder: Path) -> Metadata:
    """`.metadata` of a folder of shards, all of which are there.

    Raises:
        UserError: it is missing, truncated or holds more than such metadata, or a shard is missing or too short.
    """
    path = folder / METADATA
    if not path.is_file():
        raise UserError(f"{folder}: {METADATA} is missing, the checkpoint is not complete")
    try:
        with path.open("rb") as file:
            found = _Restricted(file).load()
        if not isinstance(found, Metadata):
            raise TypeError(f"it is a {type(found).__name__}")
        ends: dict[str, int] = {}
        for place in found.storage_data.values():
            name = place.relative_path
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no file of this folder")
            ends[name] = max(ends.get(name, 0), place.offset + place.length)
    except _UNREADABLE as error:
        raise UserError(f"{path} is no metadata of a sharded checkpoint, or is truncated ({_line(error)})") from error
    for name, end in sorted(ends.items()):
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise UserError(f"{folder}: the shard {name} is missing, the checkpoint is not complete") from error
        if size < end:
            raise UserError(f"{folder / name} is truncated: it has {size} bytes of {end}")
    return found


def read_rest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint but for its tensors: a `.ckpt` file (whose tensors are mapped, not read), or a folder's `meta.pt`.

    Raises:
        UserError: it cannot be read, a shard is missing or truncated, or another program wrote it.
    """
    source = Path(path)
    if source.is_dir():
        read_metadata(source)
        source = source / REST
    if not source.is_file():
        raise UserError(f"{source} is missing, the checkpoint is not complete")
    if not is_zipfile(source):
        raise UserError(f"{source} cannot be read: it is truncated, or no checkpoint of Lightning's")
    try:
        found = torch.load(source, weights_only=True, map_location="cpu", mmap=True)
    except _UNREADABLE as error:
        raise UserError(
            f"{source} cannot be read: it is truncated, or holds more than numbers and plain values"
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("rbm"), dict):
        raise UserError(f"{source} is not a checkpoint of `rbm train`: the entry 'rbm' is missing")
    return found


def load_lightning(path: str | os.PathLike[str]) -> RewardModel:
    """The model in a `.ckpt` file, in eval mode; LoRA is merged.

    Raises:
        UserError: the file is truncated or something else, or keys are missing or unknown (they are listed).
    """
    found = read_rest(path)
    return _model(found, found.get(STATE, {}), str(path))


def load_sharded(folder: str | os.PathLike[str]) -> RewardModel:
    """The model in a folder of shards, in eval mode, in one process; LoRA is merged.

    Raises:
        UserError: a file is missing or truncated or something else, or keys are missing or unknown (they are listed).
    """
    source = Path(folder)
    rest = read_rest(source)
    described = read_metadata(source).state_dict_metadata
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if name.startswith(f"{STATE}.") and isinstance(entry, TensorStorageMetadata)
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process.*")
            load(wanted, storage_reader=ShardReader(source), no_dist=True)
    except (*_UNREADABLE, CheckpointException) as error:
        raise UserError(f"shards of {source} cannot be read: {_line(cause(error))}") from error
    return _model(rest, {name.removeprefix(f"{STATE}."): x for name, x in wanted.items()}, str(source))


def cause(error: BaseException) -> BaseException:
    """What went wrong first, of an error that stands for those of several processes."""
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error


def _model(rest: Mapping[str, Any], state: Mapping[str, Any], what: str) -> RewardModel:
    facts: dict[str, Any] = rest["rbm"]
    if not isinstance(facts.get("model"), dict):
        raise UserError(f"{what} does not say how its model is made: continue its run once with this version")
    named = {name.removeprefix(MODULE): tensor for name, tensor in state.items() if name.startswith(MODULE)}
    model = empty(facts["model"], facts.get("files", {}))
    if "left_out" in rest or any(".lora_" in name for name in named):
        alpha, dtype = float(facts.get("lora_alpha") or 0), facts.get("frozen_dtype")
        return complete(model, named, what, alpha, facts.get("base"), rest.get("left_out"), dtype).eval()
    fill(model, uniform(named), what)
    return model.eval()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
