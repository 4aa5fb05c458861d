"""Attempts to write: small real pictures, every field of the record in use, the same at every call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbm.corpus import Corpus, CorpusWriter
from rbm.trajectory import Quality, Trajectory

TASKS = ("open the drawer", "close the drawer", "öffne die Tür")


def picture(number: int, n_frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """A square that moves over a slope: uint8 (T, H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    slope = np.stack([x * 200 // width, y * 200 // height, (x + y + number * 7) % 200], -1).astype(np.uint8)
    frames = np.repeat(slope[None], n_frames, axis=0)
    for t, frame in enumerate(frames):
        left = t * (width - 4) // max(1, n_frames - 1)
        frame[height // 3 : height // 3 + 4, left : left + 4] = (250, 240, 30)
    return frames


def attempt(
    number: int, n_frames: int = 6, height: int = 24, width: int = 32, **changes: Any
) -> tuple[Trajectory, dict[str, NDArray[np.uint8]]]:
    """Record and frames number `number`."""
    facts: dict[str, Any] = {
        "id": f"tests/{number:04d}-é",
        "task": TASKS[number % 3],
        "source": "tests",
        "quality": list(Quality)[number // 3 % 3],
        "frame_index": np.arange(n_frames) * 3 + 1,
        "timestamp": (np.arange(n_frames) * 3 + 1) / 30,
        "fps": 30.0,
        "height": height,
        "width": width,
    }
    record = Trajectory(**(facts | changes))
    clips = {view: picture(number + place, n_frames, height, width) for place, view in enumerate(record.views)}
    return record, clips


def write(path: Any, numbers: range, **options: Any) -> Corpus:
    """A corpus with the attempts `numbers`."""
    with CorpusWriter(path, **options) as writer:
        for number in numbers:
            writer.add(*attempt(number))
    return Corpus.open(path)


def same_record(a: Trajectory, b: Trajectory) -> bool:
    """Every field equal, arrays by value and dtype, readers aside."""
    for name in Trajectory.__dataclass_fields__:
        if name == "reader":
            continue
        left, right = getattr(a, name), getattr(b, name)
        if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
            if left.dtype != right.dtype or not np.array_equal(left, right):
                return False
        elif left != right:
            return False
    return True


def payload_bytes(corpus: Corpus) -> dict[str, bytes]:
    """Every payload by id, in the order of the corpus."""
    return {id: corpus.payload(row).data.tobytes() for row, id in enumerate(corpus.ids)}
