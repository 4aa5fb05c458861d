"""A LeRobot data set, v2.0 to v3.0, and its copy with columns `reward`, `progress` and `success` (float32, a row a
frame).

Row t of an episode of T rows has the picture before action t: `reward[t]` is of the step from row t to row t+1,
`progress[t]` and `success[t]` (a probability) are of the picture in row t. What the last action led to is in no row:
its value is that of the last picture. The environment's own reward is the column `next.reward`, or else `reward`; a
column of one of the three names is kept as `env_reward`, … Rows of episodes that cannot be read have NaN.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from policies.relabel.offline_labels import Episode, Flat, Labelling, Labels, check_folder, whole_folder
from policies.relabel.offline_scores import Unusable
from rbm.errors import UserError
from rbm.evaluation.lerobot import INFO, LeRobotDataset
from rbm.evaluation.lerobot import Episode as Rows

COLUMNS = ("reward", "progress", "success")
MARK = "relabelled"
"""Key of meta/info.json that says how rewards were made."""

_OLD = "env_"
_DAMAGED = (OSError, UnicodeDecodeError, pa.ArrowException)


class LeRobotData:
    """Episodes of a data set in a local folder.

    Args:
        folder: of the data set.
        task: the instruction of all; none: that of each episode's first frame.
    """

    kind = "LeRobot"
    transitions = False

    def __init__(self, folder: Path, task: str | None = None) -> None:
        self.folder = folder
        self.dataset = LeRobotDataset(folder)
        self.dataset.check()
        self._task, self._camera = task, ""
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        self._features = info.get("features") or {}
        self._again = MARK in info
        names = (_OLD + "reward", "next.reward", *(() if self._again else ("reward",)))
        self._own = next((name for name in names if name in self._features), None)
        self._tables: dict[str, dict[int, NDArray[Any]]] = {}

    @property
    def cameras(self) -> Sequence[str]:
        return self.dataset.cameras

    def __len__(self) -> int:
        return len(self.dataset)

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "content": self.dataset.fingerprint, "task": self._task}

    def show(self, camera: str) -> None:
        self._camera = camera

    def name(self, number: int) -> str:
        return self.dataset.name(number)

    def episode(self, number: int) -> Episode:
        rows = self._rows(number)
        own = None if self._own is None else self._column(self._own).get(rows.index)
        ended = self._column("next.terminated").get(rows.index) if "next.terminated" in self._features else None
        if self._own is not None and own is None:
            raise Unusable(f"its column {self._own} cannot be read")
        if own is not None and len(own) != len(rows):
            raise Unusable(f"its column {self._own} has {len(own)} rows, not {len(rows)}")
        return Episode(
            name=self.name(number),
            task=self._task or rows.task,
            steps=len(rows),
            pictures=partial(self._frames, rows),
            moments=np.arange(len(rows)),
            terminated=ended is not None and bool(ended[-1]),
            env_rewards=None if own is None else own.astype(np.float32),
        )

    def target(self, out: str) -> Path:
        return check_folder(Path(out), self.folder)

    def write(self, target: Path, labels: Mapping[int, Labels], labelling: Labelling) -> None:
        episodes = {rows.index: (rows.start, labels[number]) for number in labels if (rows := self._rows(number))}
        kept = () if self._again else tuple(name for name in COLUMNS if name in self._features)
        with whole_folder(target) as folder:
            shutil.copytree(self.folder, folder)
            for path in sorted((folder / "data").rglob("*.parquet")):
                _write_columns(path, episodes, kept)
            _write_info(folder / INFO, kept, labelling)

    def flat(self, number: int) -> Flat:
        raise UserError("transitions cannot be made of LeRobot data")

    def _rows(self, number: int) -> Rows:
        try:
            return self.dataset.episode(number)
        except UserError as error:
            raise Unusable(str(error)) from error

    def _frames(self, rows: Rows, positions: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        try:
            yield from self.dataset.frames(rows, self._camera, positions)
        except UserError as error:
            raise Unusable(str(error)) from error

    def _column(self, name: str) -> dict[int, NDArray[Any]]:
        """A column of the data files by `episode_index`; files that cannot be read are named where they are needed."""
        if name not in self._tables:
            found: dict[int, NDArray[Any]] = {}
            for path in sorted((self.folder / "data").rglob("*.parquet")):
                try:
                    table = pq.read_table(path, columns=["episode_index", name])
                    numbers, values = table["episode_index"].to_numpy(), _scalars(table[name])
                except (*_DAMAGED, KeyError, ValueError, TypeError):
                    continue
                found |= {int(number): values[numbers == number] for number in np.unique(numbers)}
            self._tables[name] = found
        return self._tables[name]


def _scalars(column: pa.ChunkedArray) -> NDArray[Any]:
    """Float64 of a column of numbers, or of lists of one number each."""
    values = np.asarray([np.nan if value is None else value for value in column.to_pylist()], np.float64)
    return values.reshape(len(values), -1)[:, 0] if len(values) else values


def _write_columns(path: Path, episodes: Mapping[int, tuple[int, Labels]], kept: Sequence[str]) -> None:
    """The file again, row group by row group; one that is damaged stays as it is: its episodes could not be read."""
    fresh = path.with_name(path.name + ".new")
    try:
        with pq.ParquetFile(path) as file:
            compression = file.metadata.row_group(0).column(0).compression.lower() if file.num_row_groups else "snappy"
            schema = _with_columns(file.schema_arrow.empty_table(), {}, kept).schema
            with pq.ParquetWriter(
                fresh, schema, compression="none" if compression == "uncompressed" else compression
            ) as writer:
                for group in range(file.num_row_groups):
                    writer.write_table(_with_columns(file.read_row_group(group), episodes, kept))
    except _DAMAGED as error:
        fresh.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return
    fresh.replace(path)


def _with_columns(table: pa.Table, episodes: Mapping[int, tuple[int, Labels]], kept: Sequence[str]) -> pa.Table:
    renamed = [_OLD + name if name in kept else name for name in table.column_names]
    metadata = table.schema.metadata
    table = table.rename_columns(renamed)
    columns = {name: np.full(len(table), np.nan, np.float32) for name in COLUMNS}
    numbers, index = table["episode_index"].to_numpy(), table["index"].to_numpy()
    for number in np.unique(numbers).tolist():
        if number in episodes:
            start, given = episodes[number]
            here = numbers == number
            for name, values in zip(COLUMNS, (given.rewards, given.progress, given.success), strict=True):
                columns[name][here] = values[index[here] - start]
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, pa.array(values, pa.float32()))
    return table.replace_schema_metadata(_described(metadata, kept))


def _described(metadata: dict[bytes, bytes] | None, kept: Sequence[str]) -> dict[bytes, bytes] | None:
    """The list of features that the `datasets` library keeps in a file of its own, with the new ones."""
    if not metadata or b"huggingface" not in metadata:
        return metadata
    found = json.loads(metadata[b"huggingface"])
    features = found.get("info", {}).get("features")
    if isinstance(features, dict):
        features |= {_OLD + name: features[name] for name in kept if name in features}
        features |= {name: {"dtype": "float32", "_type": "Value"} for name in COLUMNS}
    return {**metadata, b"huggingface": json.dumps(found).encode()}


def _write_info(path: Path, kept: Sequence[str], labelling: Labelling) -> None:
    info = json.loads(path.read_text(encoding="utf-8"))
    features = info["features"]
    features |= {_OLD + name: features[name] for name in kept}
    features |= {name: {"dtype": "float32", "shape": [1], "names": None} for name in COLUMNS}
    path.write_text(json.dumps({**info, MARK: labelling.to_json()}, indent=4), encoding="utf-8")
