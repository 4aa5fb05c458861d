"""Minari data sets, and a copy with other rewards.

An episode of T steps has T+1 observations. Pictures are observations, or stand in a dict of them (`pixels`,
`camera/front`), uint8 (H, W, 3) or (3, H, W), or are infos (`infos/render`), uint8 (H, W, 3). The copy is the data
set's own files with `rewards` replaced; its infos have `env_rewards`, `progress`, `progress_std` and
`success_probability`, T+1 rows each as infos have them: row t+1 came with step t, row 0 with the reset
(`env_rewards[0]` is 0). Episodes that cannot be read are not in the copy, and those after them are numbered on.

The instruction is `task`, `instruction`, `language_instruction` or `mission` among the observations, the infos, the
metadata of an episode or of the data set.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from policies.relabel.offline_labels import INSTRUCTIONS, Episode, Flat, Labelling, Labels, check_folder, whole_folder
from policies.relabel.offline_scores import Unusable
from rbm.errors import UserError

MARK = "relabelled"
OBSERVATION = "observation"
"""Name of the camera where an observation is one picture."""

INFOS = "infos"

_METADATA = "metadata.json"
_HDF5 = "main_data.hdf5"
_SUCCESS = ("success", "is_success")
_MISREAD = (KeyError, ValueError, RuntimeError, TypeError, IndexError, AssertionError, AttributeError)
_DAMAGED = (OSError, pa.ArrowException, *_MISREAD)


def minari_folder(name: str) -> Path | None:
    """Where the data of a data set lies: in a folder, or under MINARI_DATASETS_PATH (~/.minari/datasets) by its id."""
    root = os.environ.get("MINARI_DATASETS_PATH") or str(Path.home() / ".minari" / "datasets")
    places = [Path(name), Path(name, "data")] if Path(name).exists() else [Path(root, name, "data")]
    return next((place for place in places if "data_format" in _metadata(place)), None)


def _metadata(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class MinariData:
    """Episodes of a data set on this computer.

    Args:
        folder: that with `metadata.json`.
        task: the instruction of all; none: what the data says.
        by_id: whether it was asked for by its id; then `--out` is one too.
    """

    kind = "Minari"
    transitions = True

    def __init__(self, folder: Path, task: str | None = None, by_id: bool = False) -> None:
        for space in ("observation_space", "action_space"):
            if space not in _metadata(folder):  # Minari would make the environment: run what the data names
                raise UserError(
                    f"Minari data set {folder}: its metadata does not say its {space}, and the environment that it may "
                    "name is not run to find out: add it to metadata.json (minari.serialization.serialize_space)"
                )
        try:
            from minari.dataset.minari_storage import MinariStorage

            self._storage = MinariStorage.read(folder)
            self._count = self._storage.total_episodes
        except ImportError as error:
            raise UserError(f"reading Minari data sets needs more ({error}): pip install 'robot-rbm[rl]'") from error
        except (*_DAMAGED, NotImplementedError) as error:
            raise UserError(f"Minari data set {folder}: cannot be read: {_short(error)}") from error
        self.folder = folder
        self._by_id = by_id
        self._task, self._camera = task, ""
        self._read: tuple[int, dict[str, Any]] | None = None
        self._spaces = dict(_leaves(self._storage.observation_space, ""))
        self._again = MARK in _metadata(folder)

    @property
    def cameras(self) -> Sequence[str]:
        observed = [path or OBSERVATION for path, space in self._spaces.items() if _is_picture(space)]
        return observed + [f"{INFOS}/{name}" for name in self._filmed()]

    def __len__(self) -> int:
        return self._count

    def facts(self) -> dict[str, Any]:
        main = self.folder / _HDF5
        stat = (main if main.exists() else self.folder / _METADATA).stat()
        return {"kind": self.kind, "size": stat.st_size, "time": stat.st_mtime_ns, "task": self._task}

    def show(self, camera: str) -> None:
        self._camera = "" if camera == OBSERVATION and "" in self._spaces else camera

    def name(self, number: int) -> str:
        return f"episode {number}"

    def episode(self, number: int) -> Episode:
        found = self._episode(number)
        try:
            rewards, infos = np.asarray(found["rewards"]), found.get("infos") or {}
            pictures = self._pictures(found)
            own = np.asarray(infos["env_rewards"])[1:] if "env_rewards" in infos else None if self._again else rewards
            if len(pictures) != len(rewards) + 1 or (own is not None and own.shape != rewards.shape):
                raise Unusable(f"it has {len(rewards)} rewards and {len(pictures)} pictures, not one more")
            return Episode(
                name=self.name(number),
                task=self._task or self._instruction(number, found),
                steps=len(rewards),
                pictures=partial(_frames, pictures),
                moments=np.arange(len(pictures)),
                terminated=bool(len(rewards) and found["terminations"][-1]),
                env_rewards=None if own is None else own.astype(np.float32),
                success=next((bool(np.any(infos[name])) for name in _SUCCESS if name in infos), None),
            )
        except _DAMAGED as error:
            raise Unusable(_short(error)) from error

    def target(self, out: str) -> Path:
        if not self._by_id or Path(out).is_absolute() or out.startswith("."):
            return check_folder(Path(out), self.folder)
        from minari.dataset.minari_dataset import parse_dataset_id
        from minari.namespace import create_namespace, list_local_namespaces
        from minari.storage.datasets_root_dir import get_dataset_path

        try:
            namespace = parse_dataset_id(out)[0]
        except (ValueError, TypeError) as error:
            raise UserError(f"--out {out!r} is no id of a Minari data set: give one such as 'mine/lift-v0'") from error
        if namespace is not None and namespace not in list_local_namespaces():
            create_namespace(namespace)
        return check_folder(get_dataset_path(out), self.folder)

    def write(self, target: Path, labels: Mapping[int, Labels], labelling: Labelling) -> None:
        with whole_folder(target) as folder:
            data = folder / "data"
            shutil.copytree(self.folder, data)
            try:
                if self._storage.FORMAT == "hdf5":
                    _write_hdf5(data / _HDF5, labels, self._count)
                else:
                    _write_arrow(data, self._storage.FORMAT, labels, self._count)
            except (KeyError, ValueError, RuntimeError, TypeError, pa.ArrowException) as error:
                raise UserError(f"cannot write {target}: {_short(error)}") from error
            sizes = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
            said = {
                **_metadata(data),
                "dataset_id": self._id(target),
                "total_episodes": len(labels),
                "total_steps": sum(len(given) for given in labels.values()),
                "dataset_size": round(sizes / 1e6, 1),
                MARK: labelling.to_json(),
            }
            (data / _METADATA).write_text(json.dumps(said), encoding="utf-8")

    def flat(self, number: int) -> Flat:
        from gymnasium import spaces

        found = self._episode(number)
        paths = [path for path, space in sorted(self._spaces.items()) if _is_row(space)]
        if not paths or not isinstance(self._storage.action_space, spaces.Box):
            raise UserError(f"{self.folder}: there are no flat states, or no flat actions: leave out --transitions")
        states = [np.asarray(_at(found["observations"], path), np.float32) for path in paths]
        actions = np.asarray(found["actions"], np.float32)
        return Flat(np.concatenate(states, axis=1), actions.reshape(len(actions), -1))

    def _id(self, target: Path) -> str:
        """Its place under MINARI_DATASETS_PATH, or else the folder's name, with a version."""
        root = os.environ.get("MINARI_DATASETS_PATH")
        inside = root is not None and target.resolve().is_relative_to(Path(root).resolve())
        name = str(target.resolve().relative_to(Path(root).resolve())) if inside and root else target.name
        safe = "".join(c if c.isalnum() or c in "-_/" else "_" for c in name)
        return safe if safe.rpartition("-v")[2].isdigit() else f"{safe}-v0"

    def _filmed(self) -> list[str]:
        """Names of the infos that are pictures, in the first episode that can be read."""
        for number in range(len(self)):
            try:
                infos = self._episode(number).get("infos") or {}
            except Unusable:
                continue
            arrays = {name: rows for name, rows in infos.items() if isinstance(rows, np.ndarray)}
            return [name for name, x in arrays.items() if x.dtype == np.uint8 and x.ndim == 4 and x.shape[-1] == 3]
        return []

    def _pictures(self, found: Mapping[str, Any]) -> NDArray[Any]:
        inside = self._camera.partition("/")[2]
        if self._camera not in self._spaces and self._camera == f"{INFOS}/{inside}":
            return np.asarray(found["infos"][inside])
        return np.asarray(_at(found["observations"], self._camera))

    def _episode(self, number: int) -> dict[str, Any]:
        if self._read is None or self._read[0] != number:
            self._read = None
            try:
                self._read = number, next(iter(self._storage.get_episodes([number])))
            except (*_DAMAGED, StopIteration) as error:
                raise Unusable(_short(error)) from error
        return self._read[1]

    def _instruction(self, number: int, found: Mapping[str, Any]) -> str | None:
        metadata = next(iter(self._storage.get_episode_metadata([number])))
        options = metadata.get("options")
        observations = found["observations"] if isinstance(found["observations"], dict) else {}
        for place in (observations, found.get("infos") or {}, metadata, options or {}, _metadata(self.folder)):
            for key in INSTRUCTIONS:
                value = place.get(key)
                if isinstance(value, list | np.ndarray) and len(value):
                    value = value[0]
                value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                if isinstance(value, str) and value.strip():
                    return str(value)
        return None


def _frames(pictures: NDArray[Any], positions: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    for position in positions.tolist():
        frame = pictures[position]
        yield np.ascontiguousarray(np.moveaxis(frame, 0, -1)) if frame.shape[-1] != 3 else frame


def _leaves(space: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Spaces by the names that lead to them, "" for one that is not in a dict."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        for name, inner in space.spaces.items():
            yield from _leaves(inner, f"{path}/{name}" if path else name)
    else:
        yield path, space


def _at(observations: Any, path: str) -> Any:
    for name in path.split("/") if path else ():
        observations = observations[name]
    return observations


def _is_picture(space: Any) -> bool:
    shape = getattr(space, "shape", None)
    return space.dtype == np.uint8 and shape is not None and len(shape) == 3 and 3 in (shape[-1], shape[0])


def _is_row(space: Any) -> bool:
    from gymnasium import spaces

    return isinstance(space, spaces.Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating)


def _infos(given: Labels) -> dict[str, NDArray[np.float32]]:
    return {
        "env_rewards": np.concatenate([np.zeros(1, np.float32), given.env_rewards]),
        "progress": given.progress,
        "progress_std": given.progress_std,
        "success_probability": given.success,
    }


def _write_hdf5(path: Path, labels: Mapping[int, Labels], count: int) -> None:
    import h5py

    with h5py.File(path, "r+") as file:
        new = {number: place for place, number in enumerate(labels)}
        for number in range(count):
            if number not in new:
                file.pop(f"episode_{number}", None)
                continue
            if new[number] != number:
                file.move(f"episode_{number}", f"episode_{new[number]}")
            group, given = file[f"episode_{new[number]}"], labels[number]
            group.attrs["id"] = new[number]
            kind = group["rewards"].dtype if np.issubdtype(group["rewards"].dtype, np.floating) else np.float32
            del group["rewards"]
            group.create_dataset("rewards", data=given.rewards.astype(kind), chunks=True, maxshape=(None,))
            infos = group.require_group("infos")
            for name, values in _infos(given).items():
                if name in infos:
                    del infos[name]
                infos.create_dataset(name, data=values, chunks=True, maxshape=(None,))


def _write_arrow(folder: Path, format: str, labels: Mapping[int, Labels], count: int) -> None:
    """An episode is a folder of its own; its rows are T+1, of which the last has no reward."""
    from pyarrow import dataset

    new = {number: place for place, number in enumerate(labels)}
    for number in range(count):
        place = folder / str(number)
        if number not in new:
            shutil.rmtree(place, ignore_errors=True)
            continue
        if new[number] != number:
            place = place.rename(folder / str(new[number]))
        given = labels[number]
        read = dataset.dataset(place, format=format, ignore_prefixes=["_", ".", _METADATA])
        table = read.to_table().combine_chunks()
        rewards = pa.array(np.append(given.rewards, 0), table.schema.field("rewards").type)
        table = table.set_column(table.schema.get_field_index("rewards"), "rewards", rewards)
        fields, arrays = [], []
        if "infos" in table.column_names:
            old = table["infos"].combine_chunks()
            for i, known in enumerate(old.type):
                if known.name not in _infos(given):
                    fields.append(known)
                    arrays.append(old.field(i))
            table = table.drop_columns(["infos"])
        for name, values in _infos(given).items():
            fields.append(pa.field(name, pa.float32()))
            arrays.append(pa.array(values))
        table = table.append_column("infos", pa.StructArray.from_arrays(arrays, fields=fields))
        for path in read.files:
            Path(path).unlink()
        dataset.write_dataset(table, place, format=format, existing_data_behavior="overwrite_or_ignore")
        facts = _metadata(place)
        (place / _METADATA).write_text(json.dumps({**facts, "id": new[number]}), encoding="utf-8")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
