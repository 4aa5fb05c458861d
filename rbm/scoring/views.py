"""Several views of one attempt, brought to the same moments."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.video import DEFAULT_FPS, Frames, StoredClip, VideoFile, stored_clip, stored_frames

Recording = str | os.PathLike[str] | VideoFile | Frames | StoredClip
"""One camera's video: a file, an opened file, uint8 frames (T, H, W[, C]), or a clip made by `stored_clip`."""

Video = Recording | Mapping[str, Recording]
"""What can be scored: a video of the model's first view, or one for each of several views, by name."""

Clips = dict[str, StoredClip]
"""Clips of views at the same moments, in the model's order."""


def nearest_in_time(times: NDArray[np.floating], wanted: NDArray[np.floating]) -> NDArray[np.int64]:
    """Of rising `times` (A,) the one nearest to each `wanted` (B,), the earlier of two as near: int64 (B,)."""
    after = np.searchsorted(times, wanted)
    before = np.maximum(after - 1, 0)
    after = np.minimum(after, len(times) - 1)
    return np.where(wanted - times[before] <= times[after] - wanted, before, after).astype(np.int64)


def clips_of(video: Video, views: tuple[str, ...]) -> Clips:
    """The clip of the first view that is there, and of the others the frames nearest to its moments.

    A view that ends earlier goes on showing its last frame. Frames given as an array have no times of their own: they
    count as filmed at the first view's frame rate.

    Raises:
        UserError: a view that the model does not read, none at all, or a video that cannot be read.
    """
    if not isinstance(video, Mapping):
        return {views[0] if views else "": _clip(video)}
    check_views(video, views)
    first, *others = [name for name in views if name in video]
    clips = {first: _clip(video[first])}
    for name in others:
        clips[name] = _at(video[name], clips[first])
    return clips


@dataclass(frozen=True)
class Footage:
    """All frames of a video, in all its views, read one after another.

    Attributes:
        frame_index: int32 (T,), of each frame in the original video.
        timestamp: float32 (T,), seconds.
        fps, n_frames: of the original video.
        views: names of the views that are there ("" where the model has none).
    """

    frame_index: NDArray[np.int32]
    timestamp: NDArray[np.float32]
    fps: float
    n_frames: int
    _shown: Mapping[str, tuple[VideoFile | StoredClip | Frames, NDArray[np.int64]]]

    @classmethod
    def of(cls, video: Video, views: tuple[str, ...]) -> Footage:
        """Of a clip that `stored_clip` made the frames that it has; of anything else every frame.

        Raises:
            UserError: as `clips_of`.
        """
        if isinstance(video, Mapping):
            check_views(video, views)
            named = {name: _opened(video[name]) for name in views if name in video}
        else:
            named = {views[0] if views else "": _opened(video)}
        first, *others = named
        recording = named[first]
        if isinstance(recording, StoredClip):
            index, fps, n_frames = recording.frame_index, recording.fps, recording.n_frames
            times = recording.timestamp
        else:
            fps = recording.fps if isinstance(recording, VideoFile) else DEFAULT_FPS
            times = _times(recording, fps)
            n_frames = len(times)
            index = np.arange(n_frames, dtype=np.int32)
        shown = {first: (recording, np.arange(len(index)))}
        for name in others:
            shown[name] = (named[name], nearest_in_time(_times(named[name], fps), times))
        return cls(index, times.astype(np.float32), fps, n_frames, shown)

    def stream(self, picked: NDArray[np.int64]) -> Iterator[dict[str, Frames]]:
        """Frames at rising positions, uint8 (H, W, 3) by view, in the size in which they are stored."""
        readers = {name: _frames_at(recording, place[picked]) for name, (recording, place) in self._shown.items()}
        for _ in picked:
            yield {name: next(reader) for name, reader in readers.items()}


def _opened(recording: Recording) -> VideoFile | StoredClip | Frames:
    if isinstance(recording, np.ndarray):
        stored_frames(recording[:1])  # says what is wrong with it
    return recording if isinstance(recording, VideoFile | StoredClip | np.ndarray) else VideoFile(recording)


def _times(recording: VideoFile | StoredClip | Frames, fps: float) -> NDArray[np.floating]:
    if isinstance(recording, np.ndarray):
        return np.arange(len(recording)) / fps
    return recording.timestamps if isinstance(recording, VideoFile) else recording.timestamp


def _frames_at(recording: VideoFile | StoredClip | Frames, places: NDArray[np.int64]) -> Iterator[Frames]:
    """Stored-size frames at places that never fall."""
    if isinstance(recording, StoredClip):
        yield from recording.frames[places]
    elif isinstance(recording, np.ndarray):
        for place in places:
            yield stored_frames(recording[place : place + 1])[0]
    else:
        rising, counts = np.unique(places, return_counts=True)
        for frame, count in zip(recording.stream(rising), counts.tolist(), strict=True):
            yield from repeat(stored_frames(frame[None])[0], count)


def check_views(named: Mapping[str, object], views: tuple[str, ...]) -> None:
    """Raises UserError for a name that is no view of the model's, or for none."""
    if not views:
        raise UserError("this model reads one view: give it one video, without names of views")
    unknown = [str(name) for name in named if name not in views]
    if unknown:
        raise UserError(f"this model has no view {', '.join(unknown)}; it reads {', '.join(views)}")
    if not named:
        raise UserError(f"no view was given; this model reads {', '.join(views)}")


def _clip(recording: Recording) -> StoredClip:
    return recording if isinstance(recording, StoredClip) else stored_clip(recording)


def _at(recording: Recording, first: StoredClip) -> StoredClip:
    """What this recording shows at the moments of another view's clip."""
    moments = first.timestamp
    if isinstance(recording, StoredClip):
        clip, place = recording, nearest_in_time(recording.timestamp, moments)
        frames, index = clip.frames[place], clip.frame_index[place]
        return StoredClip(frames, index, moments, clip.fps, clip.n_frames)
    if isinstance(recording, np.ndarray):
        if 0 in recording.shape[:1] or recording.ndim < 3:
            return _clip(recording)  # which says what is wrong
        place = nearest_in_time(np.arange(len(recording)) / first.fps, moments)
        distinct, back = np.unique(place, return_inverse=True)  # at most 64: the clip keeps them all
        frames = stored_clip(recording[distinct]).frames[back]
        return StoredClip(frames, place.astype(np.int32), moments, first.fps, len(recording))
    video = recording if isinstance(recording, VideoFile) else VideoFile(recording)
    place = nearest_in_time(video.timestamps, moments)
    return StoredClip(video.read(place), place.astype(np.int32), moments, video.fps, video.n_frames)
