"""Reading a LeRobot data set (v3.0, v2.1) for scoring: its episodes, their tasks, their frames.

What is read, and nothing else:

    meta/info.json      codebase_version, fps, features (which are videos), data_path, video_path, chunks_size
    v3.0                meta/tasks.parquet, meta/episodes/chunk-…/file-….parquet: where each episode lies; several
                        episodes stand in one data file, and end to end in one video file
    v2.1                meta/tasks.jsonl, meta/episodes.jsonl; a data file and a video file an episode
    data files          index (of the frame in the data set), episode_index, frame_index, timestamp, task_index

The frame of a video at `timestamp` is round((from_timestamp + timestamp) · fps), from_timestamp being 0 in v2.1; the
video must show a frame within half a frame of that time, else the episode is not readable.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.video import Frames, VideoFile, stored_frames

INFO = Path("meta", "info.json")
VERSIONS = ("v2.0", "v2.1", "v3.0")
"""v2.0 differs from v2.1 in what is not read here."""

_DATA_PATH = {
    2: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    3: "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
_VIDEO_PATH = {
    2: "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    3: "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
"""Where files are by the version before the dot, if meta/info.json does not say."""

_IN_VIDEOS = ("chunk_index", "file_index", "from_timestamp")
_FRAME_COLUMNS = ("index", "episode_index", "frame_index", "timestamp", "task_index")


@dataclass(frozen=True)
class Episode:
    """One episode of L frames.

    Attributes:
        number: its place in the data set's list of episodes. index: its `episode_index`.
        start: number of its first frame among all frames of the data set; the others follow it.
        frame_index: int64 (L,), as the data set has it. timestamp: float64 (L,), seconds from the episode's start.
        task: the instruction of its first frame.
        n_tasks: how many instructions its frames have.
    """

    number: int
    index: int
    start: int
    frame_index: NDArray[np.int64]
    timestamp: NDArray[np.float64]
    task: str
    n_tasks: int

    def __len__(self) -> int:
        return len(self.timestamp)


def is_lerobot(place: str | os.PathLike[str]) -> bool:
    """Whether a data set of LeRobot's lies there."""
    return "://" not in os.fspath(place) and Path(place, INFO).is_file()


class LeRobotDataset:
    """A data set in a local folder. Pickled as its folder.

    Attributes:
        folder, version, fps.
        cameras: names of the features that are videos, as the data set lists them, depth maps left out.
        tasks: instruction by task_index.

    Raises:
        UserError: there is none, it is of another version, or a file or column that is needed is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.abspath(os.path.expanduser(folder)))
        info = self._json(INFO)
        self.version = info.get("codebase_version")
        if self.version not in VERSIONS:
            raise UserError(
                f"LeRobot data set {self.folder}: its codebase_version is {self.version!r}, read are "
                f"{', '.join(VERSIONS)}: convert it with LeRobot's own tools"
            )
        self._major = 3 if self.version == "v3.0" else 2
        self.fps = self._positive(info, "fps")
        self._chunk = int(self._positive(info, "chunks_size", 1000))
        self._data_path = str(info.get("data_path") or _DATA_PATH[self._major])
        self._video_path = str(info.get("video_path") or _VIDEO_PATH[self._major])
        self.cameras = tuple(_cameras(info.get("features")))
        if not self.cameras:
            raise UserError(
                f"LeRobot data set {self.folder}: none of its features is a video (pictures stored one by one are not "
                "read): convert it with LeRobot's own tools"
            )
        self.tasks = self._read_tasks()
        self._episodes = self._read_episodes()
        self._rows: tuple[Path, dict[str, NDArray[Any]]] | None = None
        self._videos: dict[str, VideoFile] = {}

    def __reduce__(self) -> tuple[type[LeRobotDataset], tuple[Path]]:
        return LeRobotDataset, (self.folder,)

    def __len__(self) -> int:
        return len(self._episodes["episode_index"])

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; another one where episodes, tasks or their places differ."""
        found = hashlib.sha256(json.dumps([self.version, self.fps, self.cameras, sorted(self.tasks.items())]).encode())
        for name in sorted(self._episodes):
            found.update(name.encode() + self._episodes[name].tobytes())
        return found.hexdigest()

    def name(self, number: int) -> str:
        """What an episode is called in messages."""
        return f"episode {self._episodes['episode_index'][number]}"

    def camera(self, name: str | None) -> str:
        """The camera of a name, or of the last part of one (`top` for `observation.images.top`); default the first.

        Raises:
            UserError: there is none, or several end so.
        """
        if name is None:
            return self.cameras[0]
        found = [key for key in self.cameras if key == name] or [key for key in self.cameras if _short(key) == name]
        if len(found) != 1:
            raise UserError(
                f"LeRobot data set {self.folder}: {'no' if not found else 'more than one'} camera {name!r}; there are "
                f"{', '.join(self.cameras)}"
            )
        return found[0]

    def check(self) -> None:
        """Raises UserError where the first data file lacks a column: then all do."""
        if len(self):
            path = self._data_file(0)
            if path.is_file():
                self._columns(path, _FRAME_COLUMNS)

    def episode(self, number: int) -> Episode:
        """Times and instruction of one episode.

        Raises:
            UserError: its data file is missing or damaged, or does not hold what the list of episodes says.
        """
        index, length = (int(self._episodes[name][number]) for name in ("episode_index", "length"))
        path = self._data_file(number)
        if self._rows is None or self._rows[0] != path:
            self._rows = path, self._columns(path, _FRAME_COLUMNS)
        rows = self._rows[1]
        here = np.flatnonzero(rows["episode_index"] == index)
        if len(here) != length or not length:
            raise UserError(f"{path} has {len(here)} frames of episode {index}, the list of episodes says {length}")
        start = int(rows["index"][here[0]])
        if not np.array_equal(rows["index"][here], np.arange(start, start + length)):
            raise UserError(f"{path}: the frames of episode {index} do not follow one another in the column index")
        numbers = rows["task_index"][here]
        if (task := self.tasks.get(int(numbers[0]))) is None:
            raise UserError(f"{path}: episode {index} has task_index {numbers[0]}, which is not in the list of tasks")
        times = rows["timestamp"][here]
        if not np.isfinite(times).all() or (np.diff(times) <= 0).any() or times[0] < 0:
            raise UserError(f"{path}: the timestamps of episode {index} are not rising seconds")
        return Episode(number, index, start, rows["frame_index"][here], times, task, len(np.unique(numbers)))

    def frames(self, episode: Episode, camera: str, positions: NDArray[np.int64]) -> Iterator[Frames]:
        """What a camera shows at rising positions of an episode: uint8 (H, W, 3) each, short side at most 240.

        Raises:
            UserError: the video is missing or damaged, or shows no frame at that time.
        """
        video, start = self._video(episode, camera)
        times = start + episode.timestamp[positions]
        wanted = np.rint(times * self.fps).astype(np.int64)
        if wanted[-1] >= video.n_frames:
            raise UserError(f"{video.path} has {video.n_frames} frames, episode {episode.index} needs {wanted[-1] + 1}")
        off = np.abs(video.timestamps[wanted] - times)
        worst = int(off.argmax())
        if off[worst] > 0.5 / self.fps:
            raise UserError(
                f"{video.path} shows frame {wanted[worst]} at {video.timestamps[wanted[worst]]:.3f} s, in episode "
                f"{episode.index} that is {times[worst]:.3f} s: its frame rate is not {self.fps:g}"
            )
        for frame in video.stream(wanted):
            yield stored_frames(frame[None])[0]

    # where things lie

    def _data_file(self, number: int) -> Path:
        if self._major == 3:
            values = {name: int(self._episodes[f"data/{name}"][number]) for name in ("chunk_index", "file_index")}
        else:
            values = self._of_episode(number)
        return self.folder / self._filled(self._data_path, values)

    def _video(self, episode: Episode, camera: str) -> tuple[VideoFile, float]:
        start = 0.0
        if self._major == 3:
            chunk, file, start = (self._episodes[f"videos/{camera}/{name}"][episode.number] for name in _IN_VIDEOS)
            values = {"chunk_index": int(chunk), "file_index": int(file)}
        else:
            values = self._of_episode(episode.number)
        path = self.folder / self._filled(self._video_path, {**values, "video_key": camera})
        if camera not in self._videos or self._videos[camera].path != path:
            self._videos[camera] = VideoFile(path)
        return self._videos[camera], float(start)

    def _of_episode(self, number: int) -> dict[str, int]:
        index = int(self._episodes["episode_index"][number])
        return {"episode_index": index, "episode_chunk": index // self._chunk}

    def _filled(self, pattern: str, values: dict[str, Any]) -> str:
        try:
            return pattern.format(**values)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UserError(
                f"LeRobot data set {self.folder}: meta/info.json names its files {pattern!r}, which is not of "
                f"{self.version}"
            ) from error

    # the files of meta/

    def _read_tasks(self) -> dict[int, str]:
        if self._major == 2:
            lines = self._lines(Path("meta", "tasks.jsonl"), task_index=int, task=str)
            return {line["task_index"]: line["task"] for line in lines}
        path = self.folder / "meta" / "tasks.parquet"
        table = _parquet(path, lambda file: file.read())
        texts = [field.name for field in table.schema if field.type in (pa.string(), pa.large_string())]
        if "task_index" not in table.column_names or len(texts) != 1:
            raise UserError(f"{path} has the columns {', '.join(table.column_names)}; needed are task_index and a text")
        return dict(zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist(), strict=True))

    def _read_episodes(self) -> dict[str, NDArray[Any]]:
        """Columns of the list of episodes, in the order of their frames."""
        if self._major == 2:
            lines = self._lines(Path("meta", "episodes.jsonl"), episode_index=int, length=int)
            found = {name: np.array([line[name] for line in lines], np.int64) for name in ("episode_index", "length")}
            order = found["episode_index"].argsort(kind="stable")
        else:
            files = sorted((self.folder / "meta" / "episodes").rglob("*.parquet"))
            if not files:
                raise UserError(f"LeRobot data set {self.folder}: meta/episodes holds no parquet file")
            names = ["episode_index", "length", "dataset_from_index", "data/chunk_index", "data/file_index"]
            names += [f"videos/{camera}/{name}" for camera in self.cameras for name in _IN_VIDEOS]
            parts = [self._columns(path, names) for path in files]
            found = {name: np.concatenate([part[name] for part in parts]) for name in names}
            order = found["dataset_from_index"].argsort(kind="stable")
        if len(np.unique(found["episode_index"])) < len(order):
            raise UserError(f"LeRobot data set {self.folder}: its list names an episode twice")
        return {name: column[order] for name, column in found.items()}

    def _columns(self, path: Path, names: tuple[str, ...] | list[str]) -> dict[str, NDArray[Any]]:
        """Columns of a parquet file: float64 where the name says seconds, else int64."""

        def read(file: pq.ParquetFile) -> dict[str, NDArray[Any]]:
            there = set(file.schema_arrow.names)
            if missing := [name for name in names if name not in there]:
                raise UserError(
                    f"{path} lacks the column {', '.join(missing)}: it is no file of LeRobot {self.version}"
                )
            table = file.read(columns=list(names))
            found = {}
            for name in names:
                column = table[name]
                if column.null_count:
                    raise UserError(f"{path}: the column {name} has gaps")
                kind = pa.float64() if name.endswith("timestamp") else pa.int64()
                found[name] = column.cast(kind).to_numpy()
            return found

        return _parquet(path, read)

    def _json(self, name: Path) -> dict[str, Any]:
        path = self.folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"LeRobot data set {self.folder}: {name} is missing") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(found, dict):
            raise UserError(f"{path} holds no JSON object")
        return found

    def _lines(self, name: Path, **kinds: type) -> list[dict[str, Any]]:
        """Objects of a file with one a line; each has these keys, with values of these types."""
        path = self.folder / name
        try:
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except FileNotFoundError as error:
            raise UserError(f"LeRobot data set {self.folder}: {name} is missing") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON, an object a line: {error}") from error
        for number, line in enumerate(found, 1):
            if not isinstance(line, dict) or any(not isinstance(line.get(key), kind) for key, kind in kinds.items()):
                raise UserError(f"{path}: line {number} lacks {' or '.join(kinds)}, or one is of another type")
        return found

    def _positive(self, info: dict[str, Any], key: str, default: float | None = None) -> float:
        value = info.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
            raise UserError(f"LeRobot data set {self.folder}: {key} in meta/info.json is {value!r}, no positive number")
        return float(value)


def _cameras(features: Any) -> Iterator[str]:
    """Names of the features that are videos; depth maps are none."""
    for name, feature in (features if isinstance(features, dict) else {}).items():
        if isinstance(feature, dict) and feature.get("dtype") == "video":
            facts = feature.get("info") or feature.get("video_info") or {}
            if not (facts.get("is_depth_map") or facts.get("video.is_depth_map")):
                yield name


def _short(camera: str) -> str:
    return camera.rpartition(".")[2]


def _parquet(path: Path, read: Any) -> Any:
    """What `read` makes of a parquet file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            return read(file)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
