"""A small real LeRobot data set on disk, v3.0 or v2.1: parquet files, and videos whose every frame says which it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rbm.video import encode_video

SIZE, BITS = 64, 16
FPS = 10
CAMERAS = ("observation.images.top", "observation.images.wrist")
V3 = {
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
V2 = {
    "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}


@dataclass(frozen=True)
class Filmed:
    """An episode: its instruction (for each frame, where they differ), and how many frames it has."""

    tasks: str | Sequence[str]
    length: int

    def task(self, frame: int) -> str:
        return self.tasks if isinstance(self.tasks, str) else self.tasks[frame]


EPISODES = (
    Filmed("push the cube", 23),
    Filmed("pull the cube", 9),
    Filmed("push the cube", 70),
    Filmed("push the cube", 1),
    Filmed("lift the cube", 31),
)


def picture(episode: int, frame: int, camera: int) -> NDArray[np.uint8]:
    """uint8 (SIZE, SIZE, 3): 16 fields, light or dark, whose pattern is the number of episode, frame and camera."""
    number = episode << 9 | frame << 2 | camera
    fields = np.array([number >> bit & 1 for bit in range(BITS)], np.uint8).reshape(4, 4)
    grey = np.repeat(np.repeat(fields * 190 + 30, SIZE // 4, 0), SIZE // 4, 1)
    return np.repeat(grey[:, :, None], 3, 2)


def read_picture(shown: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Episode, frame and camera of a picture, also after compression."""
    side = SIZE // 4
    light = shown[..., 0].reshape(4, side, 4, side).mean((1, 3)).reshape(-1) > 125
    number = sum(1 << bit for bit in range(BITS) if light[bit])
    return number >> 9, number >> 2 & 127, number & 3


def film(episode: int, filmed: Filmed, camera: int = 0) -> NDArray[np.uint8]:
    return np.stack([picture(episode, frame, camera) for frame in range(filmed.length)])


def write_lerobot(
    folder: Path,
    version: str = "v3.0",
    codec: str = "h264",
    episodes: Sequence[Filmed] = EPISODES,
    cameras: Sequence[str] = CAMERAS,
    per_file: int = 3,
    info: Mapping[str, object] | None = None,
) -> Path:
    """Write a data set; in v3.0 `per_file` episodes lie end to end in one data file and one video file."""
    tasks = list(dict.fromkeys(one.task(frame) for one in episodes for frame in range(one.length)))
    features: dict[str, object] = {"action": {"dtype": "float32", "shape": [2]}}
    features["depth"] = {"dtype": "video", "shape": [SIZE, SIZE, 3], "info": {"is_depth_map": True}}
    features |= {name: {"dtype": "video", "shape": [SIZE, SIZE, 3], "info": {"video.fps": FPS}} for name in cameras}
    facts = {"codebase_version": version, "fps": FPS, "features": features, "chunks_size": 1000}
    facts |= {"total_episodes": len(episodes), "total_tasks": len(tasks)} | (V3 if version == "v3.0" else V2)
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(facts | dict(info or {})))
    (_write_v3 if version == "v3.0" else _write_v2)(folder, codec, episodes, cameras, tasks, per_file)
    return folder


def _write_v3(
    folder: Path, codec: str, episodes: Sequence[Filmed], cameras: Sequence[str], tasks: list[str], per_file: int
) -> None:
    texts = {"task_index": np.arange(len(tasks)), "__index_level_0__": pa.array(tasks, pa.string())}
    pq.write_table(pa.table(texts), folder / "meta" / "tasks.parquet")
    rows: list[dict[str, object]] = []
    first = 0
    for file in range(-(-len(episodes) // per_file)):
        numbers = range(file * per_file, min(len(episodes), (file + 1) * per_file))
        place = {"chunk_index": 0, "file_index": file}
        seconds = 0.0
        data = []
        for number in numbers:
            length = episodes[number].length
            row: dict[str, object] = {"episode_index": number, "length": length, "tasks": [episodes[number].task(0)]}
            row |= {"dataset_from_index": first, "dataset_to_index": first + length}
            row |= {f"data/{name}": value for name, value in place.items()}
            for camera in cameras:
                row |= {f"videos/{camera}/{name}": value for name, value in place.items()}
                row |= {
                    f"videos/{camera}/from_timestamp": seconds,
                    f"videos/{camera}/to_timestamp": seconds + length / FPS,
                }
            rows.append(row)
            data.append(_frames_table(number, episodes[number], first, tasks))
            first += length
            seconds += length / FPS
        path = _made(folder / V3["data_path"].format(**place))
        with pq.ParquetWriter(path, data[0].schema) as writer:
            for table in data:
                writer.write_table(table)
        for place_of, camera in enumerate(cameras):
            shown = np.concatenate([film(number, episodes[number], place_of) for number in numbers])
            _write_video(_made(folder / V3["video_path"].format(**place, video_key=camera)), shown, codec)
    pq.write_table(pa.Table.from_pylist(rows), _made(folder / "meta/episodes/chunk-000/file-000.parquet"))


def _write_v2(
    folder: Path, codec: str, episodes: Sequence[Filmed], cameras: Sequence[str], tasks: list[str], per_file: int
) -> None:
    (folder / "meta" / "tasks.jsonl").write_text(
        "".join(json.dumps({"task_index": i, "task": task}) + "\n" for i, task in enumerate(tasks))
    )
    listed = [{"episode_index": i, "tasks": [one.task(0)], "length": one.length} for i, one in enumerate(episodes)]
    (folder / "meta" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in listed))
    first = 0
    for number, filmed in enumerate(episodes):
        place = {"episode_chunk": 0, "episode_index": number}
        pq.write_table(_frames_table(number, filmed, first, tasks), _made(folder / V2["data_path"].format(**place)))
        first += filmed.length
        for place_of, camera in enumerate(cameras):
            path = _made(folder / V2["video_path"].format(**place, video_key=camera))
            _write_video(path, film(number, filmed, place_of), codec)


def _frames_table(number: int, filmed: Filmed, first: int, tasks: list[str]) -> pa.Table:
    length = filmed.length
    return pa.table(
        {
            "action": pa.array([[0.0, 1.0]] * length, pa.list_(pa.float32())),
            "timestamp": pa.array(np.arange(length) / FPS, pa.float32()),
            "frame_index": pa.array(np.arange(length), pa.int64()),
            "episode_index": pa.array(np.full(length, number), pa.int64()),
            "index": pa.array(first + np.arange(length), pa.int64()),
            "task_index": pa.array([tasks.index(filmed.task(frame)) for frame in range(length)], pa.int64()),
        }
    )


def _write_video(path: Path, frames: NDArray[np.uint8], codec: str) -> None:
    if codec == "h264":
        encode_video(path, frames, FPS)
        return
    os.environ.setdefault("SVT_LOG", "1")  # or it writes what it is set to
    options = {"crf": "20", "preset": "6", "svtav1-params": "lp=1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1", rate=FPS, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.gop_size = "yuv420p", 2
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
