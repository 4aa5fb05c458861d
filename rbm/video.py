"""Video in and out: any file to a stored clip, frames to H.264.

What is notable here:

- Every file is indexed from its packets (PyAV) before a pixel is decoded. The index says how many frames there
  are and when each is shown. decord decodes only where it sees that very index: on edit lists (trimmed phone
  videos), on files that start between key frames and on MPEG-TS it gives wrong frames without an error.
- PyAV decodes the rest, and everything where decord has no wheel (aarch64, Apple silicon). Both give equal frames.
- Clips of our own (`encode_video`) are decoded by PyAV alone, key frame to key frame: faster than decord, which
  also brings the process down on some damaged bytes.
- A truncated file is an error, never a shorter video: the score of its last frame would be read as the outcome.
- One full-size frame is held at a time (decord: some tens), whatever the length of the video.

Letters in shapes: T frames, H and W pixels. Frames are uint8 RGB.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from rbm.errors import UserError
from rbm.frames import pick_frames
from rbm.output import whole_file
from rbm.trajectory import MAX_SHORT_SIDE, MAX_STORED_FRAMES

try:
    import decord
except ImportError:  # no wheel for this machine
    decord = None
else:
    decord.logging.set_level(decord.logging.QUIET)  # its FFmpeg writes to stderr what we raise as errors

# RuntimeError is decord's, IndexError PyAV's for packets of a stream that the header does not name.
_DECODE_ERRORS: tuple[type[Exception], ...] = (av.error.FFmpegError, RuntimeError, EOFError, IndexError, StopIteration)
if decord is not None:
    _DECODE_ERRORS += (decord.DECORDError,)
_CLIP_ERRORS: tuple[type[Exception], ...] = (*_DECODE_ERRORS, ValueError, KeyError)
"""ValueError: frames of two sizes in one clip; KeyError: a frame of a time that no packet has."""

Frames = NDArray[np.uint8]

DEFAULT_FPS = 30.0
"""Assumed for frames that come as an array without times."""

_SEEKABLE = ("mp4", "matroska", "avi")  # containers in which seeks were found to be exact

_DECORD_PIXELS = 2048 * 1152
"""decord decodes ahead: 0.3 GB at 1080p, 3.8 GB at 8K. Larger pictures go to PyAV, which does not."""


@dataclass(frozen=True)
class StoredClip:
    """What is kept of a video: the frames that a corpus stores and that scoring looks at.

    Attributes:
        frames: uint8 (T, H, W, 3), T <= 64, short side at most 240.
        frame_index: int32 (T,), index of each frame in the original video; first and last are kept.
        timestamp: float32 (T,), seconds from the first frame of the original.
        fps: mean frames a second of the original.
        n_frames: how many frames the original has.
    """

    frames: Frames
    frame_index: NDArray[np.int32]
    timestamp: NDArray[np.float32]
    fps: float
    n_frames: int


def resize_frames(frames: Frames, height: int, width: int) -> Frames:
    """The one resize: uint8 (T, H, W, 3) -> (T, height, width, 3), bilinear, antialiased when it shrinks."""
    if frames.shape[1:3] == (height, width):
        return frames
    resized = np.empty((len(frames), height, width, 3), np.uint8)
    for i, frame in enumerate(frames):
        resized[i] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
    return resized


def encode_video(
    target: str | Path | BinaryIO,
    frames: Iterable[Frames],
    fps: float,
    gop: int = 10,
    crf: int = 23,
    threads: int = 1,
) -> None:
    """Writes frames, uint8 (H, W, 3) each, as H.264 in mp4: a key frame every `gop` frames, no B-frames.

    Frames may come one by one from a generator. Odd heights and widths grow by one edge row or column, which
    `decode_clip(…, size=…)` cuts off again. With one thread, sizes that are multiples of 16 give the same bytes
    every time; with others x264 now and then reads past the edge of the picture.

    Raises:
        UserError: there is no frame, or the file cannot be written (the disk is full, the folder is missing);
            nothing half-written stays behind.
    """
    if isinstance(target, str | Path):
        with whole_file(Path(target)) as temporary:
            _encode(os.path.abspath(temporary), frames, fps, gop, crf, threads)
    else:
        _encode(target, frames, fps, gop, crf, threads)


def _encode(place: str | BinaryIO, frames: Iterable[Frames], fps: float, gop: int, crf: int, threads: int) -> None:
    rest = iter(frames)
    first = next(rest, None)
    if first is None:
        raise UserError("cannot write a video: there are no frames")
    height, width = first.shape[0] + first.shape[0] % 2, first.shape[1] + first.shape[1] % 2
    options = {"crf": str(crf), "preset": "veryfast", "bf": "0", "threads": str(threads), "sc_threshold": "0"}
    try:
        with av.open(place, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.codec_context.gop_size = gop
            for frame in chain([first], rest):
                margin = ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0))
                padded = np.pad(frame, margin, mode="edge") if any(sum(margin, ())) else frame
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    except av.error.FFmpegError as error:
        raise OSError(error.errno, _reason(error)) from error


def decode_clip(data: bytes, indices: ArrayLike | None = None, size: tuple[int, int] | None = None) -> Frames:
    """Frames `indices` (default all) of a clip made by `encode_video`: uint8 (T, H, W, 3), cut to `size` (H, W).

    Only what stands between a frame asked for and the key frame before it is decoded, in this thread.

    Raises:
        UserError: the bytes are damaged, or have no frame of that index.
    """
    try:
        with av.open(io.BytesIO(data), "r", format="mp4", metadata_errors="replace") as container:
            stream = _picture(container)
            if stream is None or stream.codec_context is None:
                raise EOFError("no picture in it")
            packets = [packet for packet in container.demux(stream) if packet.size]
            wanted = list(range(len(packets))) if indices is None else np.asarray(indices, np.int64).tolist()
            if missing := [i for i in wanted if not 0 <= i < len(packets)]:
                raise EOFError(f"there is no frame {missing[0]}")
            frames = _decode_packets(stream, packets, set(wanted))
            shape = (0, stream.height, stream.width, 3)
        if missing := [i for i in wanted if i not in frames]:
            raise EOFError(f"frame {missing[0]} does not come out")
        clip = np.stack([frames[i] for i in wanted]) if wanted else np.empty(shape, np.uint8)
    except _CLIP_ERRORS as error:
        raise UserError(f"cannot decode the clip: {_reason(error)}") from error
    return clip if size is None else clip[:, : size[0], : size[1]]


def _decode_packets(stream: VideoStream, packets: list[av.Packet], wanted: set[int]) -> dict[int, Frames]:
    """Frames by number; packet i holds frame i, since there are no B-frames."""
    stream.thread_type = "NONE"
    number = {packet.pts: i for i, packet in enumerate(packets)}
    key = np.maximum.accumulate([i if packet.is_keyframe else 0 for i, packet in enumerate(packets)] or [0])
    needed = sorted({i for last in wanted for i in range(int(key[last]), last + 1)})
    to_rgb = VideoReformatter()
    frames: dict[int, Frames] = {}
    for packet in chain((packets[i] for i in needed), [None]):  # None: gives what the decoder still holds
        for frame in stream.codec_context.decode(packet):
            if number[frame.pts] in wanted:
                rgb = to_rgb.reformat(frame, format="rgb24", threads=1)
                frames[number[frame.pts]] = np.asarray(rgb.to_ndarray(), np.uint8)
    return frames


class _Packet(NamedTuple):
    pts: int | None
    key: bool
    discard: bool
    corrupt: bool


class VideoFile:
    """A video file, opened, indexed and known to start with a frame that decodes.

    Attributes:
        n_frames: how many frames are shown.
        fps: mean frames a second.
        height, width: pixels as shown (a phone's rotation applied).
        timestamps: float64 (n_frames,), seconds from the first frame, as the container says.

    Raises:
        UserError: the file is missing, empty, truncated, no video, or has no frame.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # FFmpeg takes "10:30.mp4" for a protocol; an absolute path is always a path.
        self._place = os.path.abspath(path)
        _check_whole(self.path)
        try:
            self._index()
            first = next(self._stream_pyav(np.zeros(1, np.int64)))
        except _DECODE_ERRORS as error:
            raise UserError(f"{self.path}: no frame of it can be decoded; is it a video, and whole?") from error
        self.height, self.width = first.shape[:2]
        self._decord = self._open_decord()

    def read(self, indices: ArrayLike, max_short_side: int | None = MAX_SHORT_SIDE) -> Frames:
        """Frames `indices`, in that order: uint8 (T, H, W, 3), short side at most `max_short_side` (None: as it is).

        Raises:
            UserError: a frame cannot be decoded.
            IndexError: an index outside 0 … n_frames - 1.
        """
        wanted = np.asarray(indices, np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.n_frames:
            raise IndexError(f"{self.path} has {self.n_frames} frames, asked for {wanted.min()} … {wanted.max()}")
        rising, back = np.unique(wanted, return_inverse=True)
        height, width = _fit(self.height, self.width, max_short_side)
        frames = np.empty((len(rising), height, width, 3), np.uint8)
        for i, frame in enumerate(self.stream(rising)):
            frames[i] = resize_frames(frame[None], height, width)[0]
        return frames if np.array_equal(rising, wanted) else frames[back]

    def stream(self, indices: NDArray[np.int64] | None = None) -> Iterator[Frames]:
        """Full-size frames (H, W, 3), one at a time, of strictly rising `indices` (default all).

        Raises:
            UserError: a frame cannot be decoded.
        """
        wanted = np.arange(self.n_frames) if indices is None else indices
        done = 0
        try:
            for frame in self._stream_decord(wanted) if self._decord is not None else self._stream_pyav(wanted):
                yield frame
                done += 1
        except _DECODE_ERRORS as error:
            raise UserError(f"{self.path}: frame {wanted[done]} cannot be decoded; the file is damaged") from error

    def _index(self) -> None:
        """Reads all packets, decodes none: which frames are shown, in order, and where decoding can start."""
        with av.open(self._place, "r", metadata_errors="replace") as container:
            stream = _picture(container)
            if stream is None:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                raise UserError(f"{self.path}: it has no picture (only {kinds}); give a video")
            exact = any(name in container.format.name for name in _SEEKABLE)
            base, rate = stream.time_base, stream.average_rate or stream.guessed_rate
            packets = [
                _Packet(p.pts, p.is_keyframe, p.is_discard, p.is_corrupt) for p in container.demux(stream) if p.size
            ]
            if packets and packets[-1].corrupt:
                raise UserError(f"{self.path}: the file is truncated; copy or download it again")
            # What precedes the first key frame, on disk or in time, cannot be decoded.
            key = next((i for i, packet in enumerate(packets) if packet.key), 0)
            start = packets[key].pts if packets else None
            shown = [
                (packet.pts, packet.key)
                for packet in packets[key:]
                if not packet.discard and (packet.pts is None or start is None or packet.pts >= start)
            ]
            self._sequential = any(pts is None for pts, _ in shown) or len({pts for pts, _ in shown}) < len(shown)
            if self._sequential:  # containers without times: only counting decoded frames tells
                container.seek(0)
                times = [frame.pts for frame in container.decode(stream)]
                self._pts = np.arange(len(times), dtype=np.int64)
                base = 1 / rate if rate else Fraction(1, round(DEFAULT_FPS))
            else:
                shown.sort()
                self._pts = np.array([pts for pts, _ in shown], np.int64)
                keys = [pts for pts, is_key in shown if is_key] if exact else []
                self._keys = np.union1d(self._pts[:1], np.array(keys, np.int64))
        self.n_frames = len(self._pts)
        if self.n_frames == 0:
            raise UserError(f"{self.path}: it has no frames")
        self.timestamps = (self._pts - self._pts[0]) * float(base or 1 / DEFAULT_FPS)
        span = float(self.timestamps[-1])
        self.fps = float(rate) if rate else (self.n_frames - 1) / span if span > 0 else DEFAULT_FPS
        self._plain = exact and key == 0 and not self._sequential

    def _open_decord(self) -> Any:
        """A decord reader where decord sees exactly our index, else None."""
        if decord is None or not self._plain or self.height * self.width > _DECORD_PIXELS:
            return None
        try:
            reader = decord.VideoReader(self._place, num_threads=1)
            if len(reader) != self.n_frames:
                return None
            start = reader.get_frame_timestamp(range(self.n_frames))[:, 0]
            agrees = np.allclose(start - start[0], self.timestamps, rtol=1e-6, atol=2e-3)
            shape = reader[0].shape
        except _DECODE_ERRORS:  # a codec or container that its FFmpeg does not know: AV1, GIF
            return None
        return reader if agrees and shape == (self.height, self.width, 3) else None

    def _stream_decord(self, indices: NDArray[np.int64]) -> Iterator[Frames]:
        for i in indices:
            yield self._decord[int(i)].asnumpy()

    def _stream_pyav(self, indices: NDArray[np.int64]) -> Iterator[Frames]:
        with av.open(self._place, "r", metadata_errors="replace") as container:
            stream = _picture(container)
            if stream is None:
                raise EOFError("no picture")
            if self._sequential:
                wanted = set(indices.tolist())
                for i, frame in enumerate(container.decode(stream)):
                    if i in wanted:
                        yield _upright(frame)
                return
            # Without a seek, decoding starts at the first key frame; `reached` is where it stands.
            decoded, reached = container.decode(stream), int(self._keys[0])
            for pts in self._pts[indices].tolist():
                # From the key frame before the target; if that is too late (open GOPs), from the one before it.
                for key in self._keys[self._keys <= pts][-1:-4:-1].tolist():
                    if not key <= reached <= pts:
                        container.seek(key, stream=stream)
                        decoded = container.decode(stream)
                    found = next((f for f in decoded if f.pts is not None and f.pts >= pts), None)
                    reached = int(self._pts[-1]) + 1 if found is None or found.pts is None else found.pts + 1
                    if found is not None and found.pts == pts:
                        yield _upright(found)
                        break
                else:
                    raise EOFError(f"no frame at {pts}")


def stored_clip(
    video: str | os.PathLike[str] | VideoFile | Frames,
    fps: float | None = None,
    timestamps: ArrayLike | None = None,
) -> StoredClip:
    """At most 64 frames of a video, even, both ends kept, short side at most 240: what corpora and scoring see.

    `video` is a path, an open file, or an array of frames: uint8 (T, H, W), (T, H, W, 1), (T, H, W, 3) or
    (T, H, W, 4), whose alpha is dropped. Times of an array come from `timestamps` (T,) in seconds, else from `fps`,
    else from 30 frames a second; those of a file from its container, unless given here.

    Raises:
        UserError: the file is no whole video, the array has another shape or type, or times do not fit.
    """
    if isinstance(video, np.ndarray):
        source, n_frames = "the array of frames", _check_array(video)[0]
        rate = fps
        times = None
    else:
        opened = video if isinstance(video, VideoFile) else VideoFile(video)
        source, n_frames = str(opened.path), opened.n_frames
        rate = opened.fps if fps is None else fps
        times = opened.timestamps if fps is None else None
    if timestamps is not None:
        times = np.asarray(timestamps, np.float64)
        if times.shape != (n_frames,) or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
            raise UserError(f"{source}: timestamps must be {n_frames} rising finite seconds, one a frame")
        times = times - times[0]
        if fps is None and n_frames > 1:
            rate = (n_frames - 1) / float(times[-1])
    rate = DEFAULT_FPS if rate is None else float(rate)
    if not (np.isfinite(rate) and rate > 0):
        raise UserError(f"{source}: fps is {rate}; give a positive number")
    picked = pick_frames(n_frames, MAX_STORED_FRAMES)
    frames = stored_frames(video[picked]) if isinstance(video, np.ndarray) else opened.read(picked)
    shown = picked / rate if times is None else times[picked]
    return StoredClip(frames, picked.astype(np.int32), shown.astype(np.float32), rate, n_frames)


def stored_frames(frames: Frames) -> Frames:
    """Every frame of an array as it is stored: uint8 (T, H, W[, C]) -> (T, h, w, 3), short side at most 240.

    Raises:
        UserError: the array has another shape or type.
    """
    _, height, width = _check_array(frames)
    return resize_frames(_as_rgb(frames), *_fit(height, width, MAX_SHORT_SIDE))


def _check_array(frames: NDArray) -> tuple[int, int, int]:
    """(T, H, W) of an array of frames that we can take."""
    shape = frames.shape
    if frames.dtype != np.uint8:
        raise UserError(f"frames are {frames.dtype}; give uint8, 0 to 255")
    if len(shape) == 3 and shape[2] in (3, 4):
        raise UserError(f"frames have shape {shape}, one picture; give (T, H, W, 3), for one frame frames[None]")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3, 4)):
        raise UserError(f"frames have shape {shape}; give (T, H, W), or (T, H, W, C) with 1, 3 or 4 channels")
    if 0 in shape:
        raise UserError(f"frames have shape {shape}: there is no frame or no pixel in it")
    return shape[0], shape[1], shape[2]


def _as_rgb(frames: Frames) -> Frames:
    if frames.ndim == 3:
        frames = frames[..., None]
    return np.repeat(frames, 3, axis=3) if frames.shape[3] == 1 else np.ascontiguousarray(frames[..., :3])


def _fit(height: int, width: int, max_short_side: int | None) -> tuple[int, int]:
    """The size with the same shape whose short side is at most `max_short_side`; never larger."""
    short = min(height, width)
    if max_short_side is None or short <= max_short_side:
        return height, width
    return round(height * max_short_side / short), round(width * max_short_side / short)


def _picture(container: InputContainer) -> VideoStream | None:
    """The moving picture; the cover of a music file is none."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or Disposition.attached_pic in stream.disposition:
        return None
    return stream


def _upright(frame: av.VideoFrame) -> Frames:
    """RGB pixels as shown: a phone stores them lying on their side, and how far to turn them."""
    pixels = _pixels(frame)
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _pixels(frame: av.VideoFrame) -> Frames:
    return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)


def _check_whole(path: Path) -> None:
    """Refuses what is no file, and files that end before their own headers say: decoders often do not notice."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    if not path.is_file():
        raise UserError(f"{path}: this is a folder, not a video file")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        with path.open("rb") as file:
            expected = _announced_size(file, size)
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {_reason(error)}") from error
    if expected > size:
        raise UserError(
            f"{path}: the file is truncated ({size} bytes of at least {expected}); copy or download it again"
        )


def _announced_size(file: BinaryIO, size: int) -> int:
    """How long the container says that the file is, in bytes; 0 where it does not say."""
    head = file.read(64)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == b"GIF8":
        file.seek(-1, os.SEEK_END)
        return 0 if file.read() == b";" else size + 1
    if head[:4] == b"\x1a\x45\xdf\xa3":  # Matroska, WebM: an EBML header, then one segment
        after_header, header_size = _ebml_size(head, 4)
        segment = after_header + header_size
        if head[segment : segment + 4] != b"\x18\x53\x80\x67":
            return 0
        start, length = _ebml_size(head, segment + 4)
        return start + length
    if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp"):
        return 0
    at, has_index = 0, False
    while at + 8 <= size:  # MP4, MOV: a row of boxes
        file.seek(at)
        box = file.read(16)
        length, kind = int.from_bytes(box[:4], "big"), box[4:8]
        if length == 1:
            length = int.from_bytes(box[8:16], "big")
        has_index |= kind == b"moov"
        if at + length > size and kind in (b"moov", b"mdat", b"moof", b"mfra"):
            return at + length
        if length < 8:  # 0: up to the end of the file
            break
        at += length
    return 0 if has_index else size + 8


def _ebml_size(head: bytes, at: int) -> tuple[int, int]:
    """(where the content starts, its length) for an EBML size at `at`; length 0 where it is unknown (live streams)."""
    if at >= len(head) or head[at] == 0:
        return at, 0
    n_bytes = 9 - head[at].bit_length()
    value = int.from_bytes(head[at : at + n_bytes], "big") & ((1 << 7 * n_bytes) - 1)
    return at + n_bytes, 0 if value == (1 << 7 * n_bytes) - 1 else value


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__
