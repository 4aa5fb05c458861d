"""Film strips: a few frames of a trajectory side by side, as one JPEG."""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from rbm.corpus import Corpus
from rbm.evaluation.gallery import shown_records, strip_places
from rbm.evaluation.results import Evaluation
from rbm.video import resize_frames

STRIP_HEIGHT = 128


def film_strip(frames: NDArray[np.uint8]) -> bytes:
    """JPEG of frames uint8 (k, H, W, 3) from left to right, white lines between, at most 128 pixels high."""
    height, width = frames.shape[1:3]
    if height > STRIP_HEIGHT:
        frames = resize_frames(frames, STRIP_HEIGHT, max(1, round(width * STRIP_HEIGHT / height)))
    line = np.full((frames.shape[1], 3, 3), 255, np.uint8)
    parts = [part for frame in frames for part in (frame, line)][:-1]
    return simplejpeg.encode_jpeg(np.ascontiguousarray(np.concatenate(parts, axis=1)), quality=85, colorspace="RGB")


def report_strips(evaluation: Evaluation, corpus: Corpus) -> dict[str, bytes]:
    """A strip, by id, of every trajectory that the report shows."""
    return {
        record.id: film_strip(corpus.by_id(record.id).frames(record.frames[strip_places(len(record.frames))]))
        for record in shown_records(evaluation)
    }
