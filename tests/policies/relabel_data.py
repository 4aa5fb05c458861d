"""Small real data sets of each format to relabel, and their rewards by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rbm.corpus import CorpusWriter
from rbm.scoring import Scorer
from rbm.trajectory import Quality, Task, Trajectory

sys.path.append(str(Path(__file__).resolve().parents[1] / "evaluation"))
from lerobot_dataset import Filmed, write_lerobot

TASK = "move the square right"
SIZE = 40


def film(count: int, seed: int, size: int = SIZE) -> NDArray[np.uint8]:
    """uint8 (count, size, size, 3): a square that goes right over a plate, at a pace and height of its seed."""
    frames = np.full((count, size, size, 3), 40 + 20 * seed, np.uint8)
    for i, frame in enumerate(frames):
        x, y = int((i * (1 + seed)) % (size - 10)), 4 + 5 * seed
        frame[y : y + 10, x : x + 10] = (250, 30 * seed, 5 * i)
    return frames


def by_hand(
    scorer: Scorer,
    frames: NDArray[np.uint8],
    every: int,
    moments: Sequence[int] | None = None,
    last: int | None = None,
    task: str = TASK,
) -> NDArray[np.float64]:
    """Progress of moments 0 to `last`: on the line between scored frames, the last one's after them."""
    scores = scorer.score(frames, task, every=every)
    at = np.arange(len(frames)) if moments is None else np.asarray(moments)
    wanted = np.arange((at[-1] if last is None else last) + 1)
    return np.interp(wanted, at[scores.frame_index], scores.progress)


def write_hdf5(path: Path, lengths: Sequence[int] = (9, 5, 7), after: bool = True, task: str | None = TASK) -> Path:
    """robomimic's layout: two cameras, two flat observations, sparse rewards, masks."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for k, steps in enumerate(lengths):
            demo = data.create_group(f"demo_{k}")
            shown = film(steps + 1, k)
            states = np.random.default_rng(k).normal(size=(steps + 1, 3))
            for group, rows in (("obs", slice(0, -1)), *((("next_obs", slice(1, None)),) if after else ())):
                demo[f"{group}/agentview_image"] = shown[rows]
                demo[f"{group}/wrist_image"] = 255 - shown[rows]
                demo[f"{group}/eef_pos"] = states[rows]
                demo[f"{group}/object"] = states[rows, :2] * 2
            demo["actions"] = np.linspace(-1, 1, steps * 2).reshape(steps, 2)
            demo["rewards"] = np.eye(steps)[-1]
            demo["dones"] = np.eye(steps)[-1].astype(int)
            demo.attrs["num_samples"] = steps
        data.attrs["total"] = sum(lengths)
        if task is not None:
            data.attrs["task"] = task
        file["mask/train"] = np.array([f"demo_{k}" for k in range(len(lengths))], "S")
    return path


def write_minari(
    name: str, format: str = "hdf5", plain: bool = False, task: str | None = TASK, jpeg: bool = False
) -> list[NDArray[np.uint8]]:
    """A data set of three episodes under MINARI_DATASETS_PATH; the pictures of each."""
    picture = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    state = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    space: Any = picture if plain else gymnasium.spaces.Dict({"camera": picture, "state": state})
    films, buffers = [], []
    for k, steps in enumerate((6, 4, 8)):
        films.append(film(steps + 1, k))
        states = np.arange(2 * (steps + 1), dtype=np.float32).reshape(-1, 2) + k
        infos: dict[str, Any] = {"time": [0.1 * i for i in range(steps + 1)]}
        if task is not None:
            infos["task"] = [task] * (steps + 1)
        buffers.append(
            minari.data_collector.EpisodeBuffer(
                observations=films[-1] if plain else {"camera": films[-1], "state": states},
                actions=np.full((steps, 2), 0.1 * k, np.float32),
                rewards=list(np.arange(steps) / 10),
                terminations=[False] * (steps - 1) + [k == 0],
                truncations=[False] * (steps - 1) + [k != 0],
                infos=infos,
            )
        )
    made = minari.create_dataset_from_buffers(
        name,
        buffers,
        observation_space=space,
        action_space=gymnasium.spaces.Box(-1, 1, (2,), np.float32),
        data_format=format,
        jpeg_encoding=jpeg,
    )
    return [shown["camera"] if isinstance(shown, Mapping) else shown for shown in (e.observations for e in made)]


def write_corpus(folder: Path, arrays: bool = True) -> Path:
    """Three attempts of 13 moments, of which every third is a stored frame; the last without states if not `arrays`."""
    with CorpusWriter(folder) as writer:
        writer.add_task(Task(TASK))
        writer.add_source("squares")
        for k in range(3):
            rng = np.random.default_rng(k)
            side = {
                "state": rng.normal(size=(13, 4)).astype(np.float32),
                "action": rng.uniform(-1, 1, (13, 2)).astype(np.float32),
                "env_reward": np.arange(13, dtype=np.float32),
                "success": np.arange(13) >= (8 if k == 1 else 99),
            }
            record = Trajectory(
                id=f"square-{k}",
                task=TASK,
                source="squares",
                quality=Quality.SUCCESSFUL if k == 1 else Quality.FAILURE,
                frame_index=np.arange(0, 13, 3),
                timestamp=np.arange(0, 13, 3) * 0.1,
                fps=10.0,
                height=SIZE,
                width=SIZE,
                done_index=8 if k == 1 else None,
            )
            writer.add(record, {"main": film(5, k)}, arrays=side if arrays or k < 2 else {})
    return folder


def lerobot(folder: Path, version: str = "v3.0") -> Path:
    """Four episodes of 6, 4, 12 and 1 frames at two tasks."""
    episodes = [Filmed("push the cube", 6), Filmed("pull the cube", 4), Filmed("push the cube", 12)]
    return write_lerobot(folder, version, episodes=[*episodes, Filmed("pull the cube", 1)])


def add_column(folder: Path, name: str, values: Callable[[Any], Any]) -> None:
    """A float column in every data file, as the `datasets` library writes one, and in meta/info.json."""
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"][name] = {"dtype": "float32", "shape": [1], "names": None}
    (folder / "meta/info.json").write_text(json.dumps(info))
    for path in (folder / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        table = table.append_column(name, pa.array(values(table["index"].to_numpy()), pa.float32()))
        described = {"info": {"features": {name: {"dtype": "float32", "_type": "Value"}}}}
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(described)}), path)
