"""A process that turns what clients uploaded into frames: video files, and .npy files of uint8.

Files of strangers go through large decoders written in C. So they are looked at in a process that holds nothing, may
take only so much memory, and is killed when it takes too long. Before anything is decoded:

- the first bytes must be those of a container that names no other file (a playlist may name any path or URL);
- the size of the pictures, how many there are, and the bytes that they come to must be within the limits.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np

from rbm.errors import UserError
from rbm.scoring.server.limits import Limits
from rbm.scoring.server.npy import MAGIC, read_npy
from rbm.scoring.server.pipes import Pipe
from rbm.scoring.server.refusal import Refusal, internal
from rbm.video import DEFAULT_FPS, Frames, StoredClip, VideoFile, stored_clip, stored_frames

log = logging.getLogger(__name__)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the front decides when to end
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    pipe = Pipe(int(sys.argv[1]))
    first = pipe.read()
    if first is None:
        return
    limits = Limits(**first[0]["limits"])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    allowed = limits.decoder_bytes if most == resource.RLIM_INFINITY else min(limits.decoder_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, most))
    pipe.write({"event": "ready", "facts": {}})
    while (message := pipe.read()) is not None:
        fields, parts = message
        try:
            clip = decoded(parts[0], fields["shape"], bool(fields["every"]), limits)
        except Refusal as refusal:
            pipe.write({"answers": [{"id": fields["id"], **refusal.fields()}]})
        except UserError as error:
            pipe.write({"answers": [{"id": fields["id"], **Refusal(str(error)).fields()}]})
        except MemoryError:
            too_large = Refusal("decoding the upload takes more memory than this server gives to it", 413)
            pipe.write({"answers": [{"id": fields["id"], **too_large.fields()}]})
        except Exception:
            log.exception("decoding failed")
            pipe.write({"answers": [{"id": fields["id"], **internal().fields()}]})
        else:
            said = [clip.frame_index.tolist(), clip.timestamp.tolist(), clip.fps, clip.n_frames]
            answer = {"id": fields["id"], "shape": list(clip.frames.shape), "decoded": said}
            pipe.write({"answers": [answer]}, [np.ascontiguousarray(clip.frames)])


def decoded(data: bytearray, shape: list[int] | None, every: bool, limits: Limits) -> StoredClip:
    """The stored clip of an upload: raw frames of a `shape`, an .npy file, or a video; with `every` all its frames.

    Raises:
        UserError: it is none, damaged, or beyond the limits.
    """
    if shape is not None:
        return _of_frames(np.frombuffer(data, np.uint8).reshape(shape), every)
    if data.startswith(MAGIC):
        return _of_frames(limits.check_frames(read_npy(data, "the upload")), every)
    check_container(data)
    with _file(data) as path:
        try:
            return _of_video(path, every, limits)
        except UserError as error:
            if isinstance(error, Refusal):
                raise
            raise Refusal(str(error).replace(str(path), "the upload")) from error


def _of_frames(frames: Frames, every: bool) -> StoredClip:
    if not every:
        return stored_clip(frames)
    times = np.arange(len(frames)) / DEFAULT_FPS
    index = np.arange(len(frames), dtype=np.int32)
    return StoredClip(stored_frames(frames), index, times.astype(np.float32), DEFAULT_FPS, len(frames))


def check_container(data: bytearray) -> None:
    """Raises Refusal (415) for what does not begin as a video file that holds its own pictures."""
    begins = bytes(data[:200])
    known = (
        begins[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")  # mp4, mov
        or begins.startswith(b"\x1a\x45\xdf\xa3")  # mkv, webm
        or (begins.startswith(b"RIFF") and begins[8:12] == b"AVI ")
        or begins.startswith((b"GIF87a", b"GIF89a"))
        or begins.startswith((b"FLV\x01", b"OggS\x00"))
        or begins.startswith(b"\x00\x00\x01\xba")  # mpeg
        or (len(begins) >= 189 and begins[0] == begins[188] == 0x47)  # ts
    )
    if not known:
        raise Refusal(
            "the upload is no video of a kind that this server reads (mp4, mov, mkv, webm, avi, gif, flv, ogg, mpeg, "
            "ts), nor an .npy file of uint8 frames (T, H, W, 3)",
            415,
        )


@contextmanager
def _file(data: bytearray) -> Iterator[Path]:
    """A file of these bytes that does not stay when this process is killed, where the system allows that."""
    if os.path.isdir("/proc/self/fd"):
        with tempfile.TemporaryFile() as unnamed:
            unnamed.write(data)
            unnamed.flush()
            yield Path(f"/proc/self/fd/{unnamed.fileno()}")
    else:
        with tempfile.NamedTemporaryFile(prefix="rbm-upload-") as named:
            named.write(data)
            named.flush()
            yield Path(named.name)


def _of_video(path: Path, every: bool, limits: Limits) -> StoredClip:
    announced, height, width = _announced(path)
    limits.check_picture(height, width)
    _check_length(announced, height, width, limits)
    video = VideoFile(path)
    limits.check_picture(video.height, video.width)
    _check_length(video.n_frames, video.height, video.width, limits)
    if not every:
        return stored_clip(video)
    limits.check_size(video.n_frames, video.height, video.width)
    first = video.read([0])
    if first.nbytes * video.n_frames > limits.body_bytes:
        raise Refusal(
            f"every frame of this video comes to {first.nbytes * video.n_frames} bytes, this server takes "
            f"{limits.body_bytes}; leave out `every`, or send a part of the video",
            413,
        )
    frames = video.read(np.arange(video.n_frames))
    index = np.arange(video.n_frames, dtype=np.int32)
    return StoredClip(frames, index, video.timestamps.astype(np.float32), video.fps, video.n_frames)


def _announced(path: Path) -> tuple[int, int, int]:
    """Frames, height and width of a video as its container says, 0 where it does not."""
    try:
        with av.open(str(path), "r", metadata_errors="replace") as container:
            stream: Any = container.streams.best("video")
            if stream is None:
                return 0, 0, 0
            return int(stream.frames or 0), int(stream.height or 0), int(stream.width or 0)
    except (av.error.FFmpegError, AttributeError, IndexError, ValueError) as error:  # no attributes: no known codec
        raise Refusal("no frame of the upload can be decoded; is it a video, and whole?") from error


def _check_length(count: int, height: int, width: int, limits: Limits) -> None:
    if count > limits.video_frames or count * height * width > limits.video_pixels:
        raise Refusal(
            f"the video has {count} frames of {width} × {height} pixels, this server takes {limits.video_frames} "
            f"frames and {limits.video_pixels} pixels in all; send a part of it",
            413,
        )


if __name__ == "__main__":
    main()
