"""What the ways to store a clip cost, beside one compressed .npz a trajectory: bytes, picture, milliseconds.

Times are processor time in one process, the ways and the baseline in turns, so that ratios hold on a busy machine too.
`generated` frames need nothing; those of a simulator come from a file, as they are and with camera noise
(tests/benchmarks/render_frames.py writes one).
"""

from __future__ import annotations

import importlib
import io
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from rbm.bench.synthetic import load_clips, scene
from rbm.corpus.codecs import Bytes, ClipCodec, H264Codec, JpegCodec, Subsampling
from rbm.video import resize_frames

Frames = NDArray[np.uint8]
Read = Callable[[NDArray[np.int64]], Frames]
N_READ = 8
NOISE = 3.0
"""Standard deviation of the camera noise, in grey levels."""
MODEL_SIDE = 112
"""Short side of what a model sees, in pixels."""
SIZES = ((240, 320), (96, 96))
QUALITIES = (80, 85, 90, 95)


def run(frames: Path | None = None, clips: int = 2, rounds: int = 9) -> dict[str, Any]:
    """Measure every way on every content; see `measure` for the fields.

    Args:
        frames: a .npy file, uint8 (N, T, H, W, 3), T >= 8: clips to measure, as they are and with noise of σ = 3.
            None: `clips` generated clips of each size, with and without that noise.
        rounds: how often each read is timed; the figures are medians.

    Raises:
        UserError: the file holds no such array.
    """
    rng = np.random.default_rng(0)
    if frames is None:
        sources = {f"generated {h}x{w}": np.stack([scene(rng, h, w, 0.0) for _ in range(clips)]) for h, w in SIZES}
    else:
        sources = {frames.stem: load_clips(frames, N_READ)}
    contents: dict[str, dict[str, Any]] = {}
    for name, clean in sources.items():
        contents[name] = measure(clean, rounds)
        noisy = np.rint(clean + rng.normal(0, NOISE, clean.shape)).clip(0, 255).astype(np.uint8)
        contents[f"{name}, noise {NOISE:g}"] = measure(noisy, rounds)
    return {"frames_read": N_READ, "model_side": MODEL_SIDE, "rounds": rounds, "contents": contents}


def measure(clips: Frames, rounds: int) -> dict[str, Any]:
    """`clips` is uint8 (N, T, H, W, 3). Bytes and milliseconds are those of one trajectory, a read is 8 random frames.

    Gives `npz` (bytes, write_ms, read_ms), `ways` (for each codec the same, `psnr` of the RGB in dB, and with
    `reduced_` in front what `min_side=112` gives; `bytes_ratio` and `speed_ratio` are npz / way; both `model_psnr` are
    taken at the model's size), and `decoders` (read_ms and psnr of the default codec's JPEGs by other libraries).
    """
    whole = np.arange(clips.shape[1])
    size = clips.shape[2], clips.shape[3]
    seen = [_as_seen(clip) for clip in clips]
    packed = [_timed(_npz, clip) for clip in clips]
    npz = {"bytes": _mean(len(data) for data, _ in packed), "write_ms": _mean(ms for _, ms in packed)}
    written: dict[str, dict[str, float]] = {}
    reads: dict[str, list[Read]] = {"npz": [partial(_read_npz, data) for data, _ in packed]}
    for name, codec in _ways().items():
        encoded = [_timed(codec.encode, clip, 20.0) for clip in clips]
        parts = [[np.frombuffer(part, np.uint8) for part in made] for made, _ in encoded]
        reads[name] = [partial(_read, codec, part, size, None) for part in parts]
        reads[f"reduced {name}"] = [partial(_read, codec, part, size, MODEL_SIDE) for part in parts]
        full = [read(whole) for read in reads[name]]
        small = [read(whole) for read in reads[f"reduced {name}"]]
        written[name] = {
            "bytes": _mean(sum(map(len, part)) for part in parts),
            "write_ms": _mean(ms for _, ms in encoded),
            "psnr": _mean(map(psnr, full, clips)),
            "model_psnr": _mean(map(psnr, map(_as_seen, full), seen)),
            "reduced_model_psnr": _mean(map(psnr, map(_as_seen, small), seen)),
        }
    jpegs = [JpegCodec().encode(clip, 20.0) for clip in clips]
    others: dict[str, dict[str, float]] = {}
    for name, decode in _decoders().items():
        reads[name] = [partial(_decode_each, decode, jpeg) for jpeg in jpegs]
        others[name] = {"psnr": _mean(map(psnr, (read(whole) for read in reads[name]), clips))}
    spent = _interleaved(reads, len(whole), rounds)

    npz["read_ms"] = spent["npz"]
    for name, way in written.items():
        way |= {"read_ms": spent[name], "reduced_read_ms": spent[f"reduced {name}"]}
        way |= {"bytes_ratio": npz["bytes"] / way["bytes"], "speed_ratio": npz["read_ms"] / way["read_ms"]}
        way["reduced_speed_ratio"] = npz["read_ms"] / way["reduced_read_ms"]
    for name, other in others.items():
        other["read_ms"] = spent[name]
    return {
        "clips": len(clips),
        "size": f"{size[0]}x{size[1]}",
        "npz": _rounded(npz),
        "ways": {name: _rounded(way) for name, way in written.items()},
        "decoders": {name: _rounded(other) for name, other in others.items()},
    }


def psnr(frames: Frames, truth: Frames) -> float:
    """Peak signal-to-noise ratio over all of RGB: 10 log10(255² / mean squared error), dB; inf if they are equal."""
    error = float(np.mean((frames.astype(np.float32) - truth) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")


def _ways() -> dict[str, ClipCodec]:
    ways: dict[str, ClipCodec] = {"jpeg (default)": JpegCodec(), "h264 (default)": H264Codec()}
    for quality in QUALITIES:
        for subsampling in get_args(Subsampling):
            ways[f"jpeg {quality} {subsampling}"] = JpegCodec(quality, subsampling)
    return ways


def _decoders() -> dict[str, Callable[[bytes], Frames]]:
    """JPEG to RGB: our way (fast colour), the ways beside it, and every other library that is installed."""
    found: dict[str, Callable[[bytes], Frames]] = {
        "simplejpeg, exact": lambda data: simplejpeg.decode_jpeg(data, "RGB"),
        "simplejpeg, fast colour": lambda data: simplejpeg.decode_jpeg(data, "RGB", fastupsample=True),
        "simplejpeg, fast colour and DCT": lambda data: simplejpeg.decode_jpeg(
            data, "RGB", fastdct=True, fastupsample=True
        ),
        "pillow": lambda data: np.asarray(Image.open(io.BytesIO(data))),
    }
    if find_spec("cv2") is not None:
        cv2 = importlib.import_module("cv2")
        cv2.setNumThreads(1)
        found["opencv"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if find_spec("imagecodecs") is not None:
        found["imagecodecs"] = importlib.import_module("imagecodecs").jpeg8_decode
    return found


def _read(
    codec: ClipCodec, parts: list[Bytes], size: tuple[int, int], min_side: int | None, indices: NDArray[np.int64]
) -> Frames:
    return codec.decode(parts.__getitem__, indices, *size, min_side)


def _read_npz(data: bytes, indices: NDArray[np.int64]) -> Frames:
    """The baseline: the whole array is loaded, then indexed."""
    return np.load(io.BytesIO(data))["frames"][indices]


def _decode_each(decode: Callable[[bytes], Frames], jpegs: list[bytes], indices: NDArray[np.int64]) -> Frames:
    return np.stack([decode(jpegs[i]) for i in indices.tolist()])


def _interleaved(reads: dict[str, list[Read]], n_frames: int, rounds: int) -> dict[str, float]:
    """Milliseconds of each read: the median over the rounds for each clip, then the mean of the clips."""
    rng = np.random.default_rng(1)
    spent: dict[str, list[list[float]]] = {name: [[] for _ in calls] for name, calls in reads.items()}
    for _ in range(rounds):
        indices = np.sort(rng.choice(n_frames, N_READ, replace=False))
        for name, calls in reads.items():
            for clip, call in enumerate(calls):
                spent[name][clip].append(_timed(call, indices)[1])
    return {name: _mean(float(np.median(times)) for times in clips) for name, clips in spent.items()}


def _timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What the call gives, and its milliseconds of processor time, all threads together."""
    start = time.process_time()
    result = call(*arguments)
    return result, 1e3 * (time.process_time() - start)


def _npz(clip: Frames) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, frames=clip)
    return file.getvalue()


def _as_seen(clip: Frames) -> Frames:
    """Scaled to the model's short side; smaller ones stay as they are."""
    height, width = clip.shape[1:3]
    scale = min(1.0, MODEL_SIDE / min(height, width))
    return resize_frames(clip, round(height * scale), round(width * scale))


def _mean(numbers: Iterable[float]) -> float:
    return float(np.mean(list(numbers)))


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value) if name == "bytes" else round(value, 2) for name, value in figures.items()}
