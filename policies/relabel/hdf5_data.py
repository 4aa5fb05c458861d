"""HDF5 files in robomimic's layout: data/demo_k/{obs/<camera>, actions, rewards, dones}, and a copy with other
rewards.

A demonstration of T steps has T pictures, that of row t before action t; where next_obs/<camera> is there, its last
row shows what the last action led to. In the copy `rewards` are new (float32 or as they were), the old ones stand in
`env_rewards`, and `progress` and `success` (float32 (T,)) are what the model says of the pictures of `obs`.
Demonstrations that cannot be read are not in the copy, nor in its masks.

The instruction is an attribute (`task`, `instruction`, `language_instruction`) of the demonstration, of data or of
the file, or stands in the JSON of `ep_meta` ("lang") or `problem_info` ("language_instruction").
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.relabel.offline_labels import INSTRUCTIONS, Episode, Flat, Labelling, Labels
from policies.relabel.offline_scores import Unusable
from rbm.errors import UserError
from rbm.output import check_target, whole_file

SUFFIXES = (".hdf5", ".h5", ".hdf")
MARK = "relabelled"
_MAGIC = b"\x89HDF\r\n\x1a\n"
_DAMAGED = (OSError, KeyError, ValueError, RuntimeError, TypeError)


def is_hdf5(path: Path) -> bool:
    """Whether a file says so by its name or its first bytes."""
    try:
        return path.is_file() and (path.suffix in SUFFIXES or path.open("rb").read(len(_MAGIC)) == _MAGIC)
    except OSError:
        return False


class HDF5Data:
    """Demonstrations of a file.

    Args:
        path: of the file.
        task: the instruction of all; none: what attributes say.

    Raises:
        UserError: it is damaged, or of another layout.
    """

    kind = "HDF5"
    transitions = True

    def __init__(self, path: Path, task: str | None = None) -> None:
        self.path = path
        self._task, self._camera = task, ""
        h5py = _h5py()
        try:
            self._file = h5py.File(path, "r")
            data = self._file.get("data")
            names = [name for name in (data or ()) if name.startswith("demo_")]
            self._names = sorted(names, key=lambda name: (len(name), name))
            self._again = MARK in self._file.attrs
        except _DAMAGED as error:
            raise UserError(f"{path} cannot be read as HDF5: {_short(error)}; copy it again from its source") from error
        if not self._names:
            raise UserError(
                f"{path} holds no data/demo_0 and so on: HDF5 is read in robomimic's layout, "
                "data/demo_k/{obs/<camera>, actions, rewards, dones}"
            )

    @property
    def cameras(self) -> Sequence[str]:
        why: list[str] = []
        for number in range(len(self)):
            try:
                with self._demo(number) as demo:
                    found = [x for x in demo["obs"] if demo["obs"][x].ndim == 4 and _is_picture(demo["obs"][x])]
            except Unusable as error:
                why.append(f"{self.name(number)}: {error}")
                continue
            if found:
                return found
        if len(why) == len(self):
            raise UserError(f"{self.path}: none of its {len(why)} demonstrations can be read; the first, {why[0]}")
        return []

    def __len__(self) -> int:
        return len(self._names)

    def facts(self) -> dict[str, Any]:
        stat = self.path.stat()
        return {"kind": self.kind, "size": stat.st_size, "time": stat.st_mtime_ns, "task": self._task}

    def show(self, camera: str) -> None:
        self._camera = camera

    def name(self, number: int) -> str:
        return self._names[number]

    def episode(self, number: int) -> Episode:
        with self._demo(number) as demo:
            steps = len(demo["actions"])
            known = ("env_rewards",) if self._again else ("env_rewards", "rewards")
            own = next((demo[name][()] for name in known if name in demo), None)
            dones = demo["dones"][()] if "dones" in demo else np.zeros(steps)
            shown = demo["obs"][self._camera]
            after = demo.get(f"next_obs/{self._camera}")
            if len(shown) != steps or len(dones) != steps or (own is not None and own.shape != (steps,)):
                raise Unusable(f"its {steps} actions, {len(shown)} pictures, rewards and dones are not of one length")
            count = steps + (after is not None and len(after) == steps)
            return Episode(
                name=self.name(number),
                task=self._task or self._instruction(demo),
                steps=steps,
                pictures=partial(self._frames, number, steps),
                moments=np.arange(count),
                terminated=bool(steps and dones[-1]),
                env_rewards=None if own is None else own.astype(np.float32),
            )

    def target(self, out: str) -> Path:
        target = Path(out)
        check_target(target, SUFFIXES, (self.path,))
        return target

    def write(self, target: Path, labels: Mapping[int, Labels], labelling: Labelling) -> None:
        with whole_file(target) as temporary:
            shutil.copyfile(self.path, temporary)
            try:
                with _h5py().File(temporary, "r+") as file:
                    self._relabel(file, labels, labelling)
            except (KeyError, ValueError, RuntimeError, TypeError) as error:
                raise UserError(f"cannot write {target}: {_short(error)}") from error

    def _relabel(self, file: Any, labels: Mapping[int, Labels], labelling: Labelling) -> None:
        data = file["data"]
        for number, name in enumerate(self._names):
            if number not in labels:
                del data[name]
                continue
            demo, given = data[name], labels[number]
            kind = np.float32
            if "rewards" in demo:
                kind = demo["rewards"].dtype if np.issubdtype(demo["rewards"].dtype, np.floating) else np.float32
                if self._again or "env_rewards" in demo:
                    del demo["rewards"]
                else:
                    demo.move("rewards", "env_rewards")
            for key, values in (("progress", given.progress), ("success", given.success)):
                if key in demo:
                    del demo[key]
                demo[key] = values[: len(given)].astype(np.float32)
            demo["rewards"] = given.rewards.astype(kind)
        left = {self._names[number] for number in labels}
        if "total" in data.attrs:
            data.attrs["total"] = sum(len(given) for given in labels.values())
        for key in list(file.get("mask", ())):
            named = [name for name in file["mask"][key][()] if _text(name) in left]
            if len(named) < len(file["mask"][key]):
                dtype = file["mask"][key].dtype
                del file["mask"][key]
                file["mask"].create_dataset(key, data=np.array(named, dtype))
        file.attrs[MARK] = json.dumps(labelling.to_json())

    def flat(self, number: int) -> Flat:
        with self._demo(number) as demo:
            states = self._states(demo, "obs")
            if "next_obs" in demo:
                states = np.concatenate([states, self._states(demo, "next_obs")[-1:]])
            return Flat(states, demo["actions"][()].astype(np.float32))

    def _states(self, demo: Any, group: str) -> NDArray[np.float32]:
        """Numbers of all keys with one row of floats a step, side by side in the order of their names."""
        parts = [demo[group][x][()] for x in sorted(demo[group]) if demo[group][x].ndim == 2]
        parts = [part for part in parts if np.issubdtype(part.dtype, np.floating)]
        if not parts:
            raise UserError(f"{self.path}: there are no flat states in {demo.name}/{group}: leave out --transitions")
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _frames(self, number: int, steps: int, positions: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        with self._demo(number) as demo:
            for position in positions.tolist():
                group, row = ("obs", position) if position < steps else ("next_obs", steps - 1)
                frame = demo[group][self._camera][row]
                yield np.ascontiguousarray(np.moveaxis(frame, 0, -1)) if frame.shape[-1] != 3 else frame

    def _instruction(self, demo: Any) -> str | None:
        for place in (demo, demo.parent, self._file):
            for key in INSTRUCTIONS:
                if isinstance(text := _text(place.attrs.get(key)), str) and text.strip():
                    return text
            for key, inner in (("ep_meta", "lang"), ("problem_info", "language_instruction")):
                try:
                    text = json.loads(_text(place.attrs.get(key)) or "{}").get(inner)
                except (ValueError, AttributeError):
                    continue
                if text := "".join(text) if isinstance(text, list) else text:
                    return str(text)
        return None

    @contextmanager
    def _demo(self, number: int) -> Iterator[Any]:
        """A demonstration's group; what is missing or damaged in it makes it unusable."""
        try:
            yield self._file["data"][self._names[number]]
        except _DAMAGED as error:
            raise Unusable(_short(error)) from error


def _is_picture(array: Any) -> bool:
    return array.dtype == np.uint8 and 3 in (array.shape[-1], array.shape[1])


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"reading HDF5 needs more ({error}): pip install 'robot-rbm[rl]'") from error
    return h5py
