"""Video files of many kinds, good and bad, through `rbm.video`. Every file is real and made here with PyAV."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbm.errors import UserError
from rbm.video import VideoFile, decode_clip, encode_video, resize_frames, stored_clip

HEIGHT, WIDTH, COUNT = 48, 128, 64


def picture(i: int, height: int = HEIGHT, width: int = WIDTH, count: int = COUNT) -> np.ndarray:
    """Frame i of `count`: a white bar on textured grey, i + 1 parts wide, so that a frame tells its number."""
    frame = np.random.default_rng(0).integers(20, 50, (height, width, 3), dtype=np.uint8)
    frame[:, : width * (i + 1) // count] = 250
    return frame


def number(frame: np.ndarray, count: int = COUNT) -> int:
    """Which frame this is: reads the bar back."""
    return round((frame[..., 0] > 140).mean(0).sum() / frame.shape[1] * count) - 1


def write(
    path: Path,
    count: int = COUNT,
    height: int = HEIGHT,
    width: int = WIDTH,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    gop: int = 16,
    options: dict[str, str] | None = None,
    times_ms: Sequence[int] | None = None,
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        stream.codec_context.gop_size = gop
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, height, width, max(count, 1)), format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(source: Path, target: Path, skip: int = 0, shift: int = 0, **options: str) -> Path:
    """The same packets in another container: without the first `skip`, moved in time by `shift` ticks."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in [packet for packet in old.demux(video=0) if packet.dts is not None][skip:]:
            packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
            new.mux(packet)
    return target


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 44100), np.float32), format="fltp", layout="stereo")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(source: Path, target: Path, matrix: tuple[int, int, int, int]) -> Path:
    """A copy whose track header says that players turn the picture, as phones write it."""
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    a, b, c, d = (65536 * value for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


BFRAMES = {"bf": "3", "x264-params": "b-adapt=0:scenecut=0"}


def _trimmed(folder: Path) -> Path:
    source = write(folder / "untrimmed.mp4", options=BFRAMES)
    return remux(source, folder / "trimmed.mp4", shift=-512 * 26 * 30 // 25)


# name: (how it is made, numbers of the frames that are shown)
GOOD: dict[str, tuple[Callable[[Path], Path], list[int]]] = {
    "plain": (lambda d: write(d / "plain.mp4"), list(range(64))),
    "b-frames": (lambda d: write(d / "b.mp4", options=BFRAMES), list(range(64))),
    "index first": (lambda d: remux(write(d / "x.mp4"), d / "fast.mp4", movflags="faststart"), list(range(64))),
    "fragments": (
        lambda d: remux(write(d / "x.mp4", options=BFRAMES), d / "f.mp4", movflags="frag_keyframe+empty_moov"),
        list(range(64)),
    ),
    "mov": (lambda d: write(d / "a.mov"), list(range(64))),
    "matroska": (lambda d: write(d / "a.mkv"), list(range(64))),
    "webm": (lambda d: write(d / "a.webm", codec="libvpx-vp9"), list(range(64))),
    "avi": (lambda d: write(d / "a.avi", codec="mpeg4"), list(range(64))),
    "gif": (lambda d: write(d / "a.gif", codec="gif", pixels="rgb8"), list(range(64))),
    "av1": (lambda d: write(d / "av1.mp4", codec="libsvtav1", options={"svtav1-params": "preset=10"}), list(range(64))),
    "transport stream": (lambda d: remux(write(d / "x.mp4", options=BFRAMES), d / "a.ts"), list(range(64))),
    "grey": (lambda d: write(d / "grey.mp4", pixels="gray"), list(range(64))),
    "4:4:4 odd": (lambda d: write(d / "odd.mp4", height=51, width=131, pixels="yuv444p"), list(range(64))),
    "one frame": (lambda d: write(d / "one.mp4", count=1), [63]),
    "starts late": (
        lambda d: remux(write(d / "x.mp4", options=BFRAMES), d / "late.mp4", skip=5),
        list(range(16, 64)),
    ),
    "spaces, other letters": (lambda d: write(d / "Schrank öffnen 抽屉.mp4"), list(range(64))),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp("good")) for name, (make, _) in GOOD.items()}


@pytest.mark.parametrize("name", GOOD)
def test_every_frame_is_the_right_one(good: dict[str, Path], name: str, capfd: pytest.CaptureFixture[str]) -> None:
    expected = GOOD[name][1]
    video = VideoFile(good[name])
    frames = video.read(np.arange(video.n_frames))
    assert [number(frame) for frame in frames] == expected
    assert frames.shape == (len(expected), video.height, video.width, 3)
    assert len(video.timestamps) == video.n_frames == len(expected)
    np.testing.assert_allclose(video.timestamps, np.arange(len(expected)) / 25, atol=6e-3)
    assert [number(frame) for frame in video.stream()] == expected
    some = np.random.default_rng(1).integers(0, video.n_frames, 9)  # any order, some twice
    np.testing.assert_array_equal(video.read(some), frames[some])
    assert capfd.readouterr().err == ""


def test_a_trimmed_phone_video_shows_what_a_player_shows(tmp_path: Path) -> None:
    path = _trimmed(tmp_path)
    video = VideoFile(path)
    with av.open(str(path)) as container:
        shown = [number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert shown[0] > 0
    assert [number(frame) for frame in video.stream()] == shown


WITHOUT_DECORD = """
import json, sys, zlib
sys.modules["decord"] = None  # importing it now fails, as on a machine without a wheel
from rbm.video import decode_clip, stored_clip
paths, clip = json.load(sys.stdin)
for path in paths:
    kept = stored_clip(path)
    print(kept.n_frames, kept.timestamp.sum(), zlib.crc32(kept.frames.tobytes()))
data = open(clip, "rb").read()
print(zlib.crc32(decode_clip(data).tobytes()), zlib.crc32(decode_clip(data, [7, 0, 7]).tobytes()))
"""


def test_without_decord_the_same_frames_come_out(good: dict[str, Path], tmp_path: Path) -> None:
    paths = [*good.values(), _trimmed(tmp_path)]
    clip = tmp_path / "clip.mp4"
    encode_video(clip, [picture(i, 51, 131) for i in range(64)], fps=10)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DECORD],
        input=json.dumps([[str(path) for path in paths], str(clip)]),
        capture_output=True,
        text=True,
        check=True,
    )
    *files, clips = done.stdout.splitlines()
    for line, path in zip(files, paths, strict=True):
        kept = stored_clip(path)
        n_frames, times, crc = line.split()
        assert (int(n_frames), int(crc)) == (kept.n_frames, zlib.crc32(kept.frames.tobytes())), path
        assert float(times) == pytest.approx(float(kept.timestamp.sum()), rel=1e-4)
    data = clip.read_bytes()
    assert [int(crc) for crc in clips.split()] == [
        zlib.crc32(decode_clip(data, wanted).tobytes()) for wanted in (None, [7, 0, 7])
    ]


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_rotated_phone_videos_stand_upright(tmp_path: Path, matrix: tuple[int, int, int, int], turns: int) -> None:
    lying = write(tmp_path / "lying.mp4", count=3)
    upright = np.rot90(stored_clip(lying).frames, turns, axes=(1, 2))
    video = VideoFile(turn(lying, tmp_path / "turned.mp4", matrix))
    assert (video.height, video.width) == upright.shape[1:3]
    np.testing.assert_array_equal(video.read([0, 1, 2]), upright)
    decoded = np.stack(list(video._stream_pyav(np.arange(3))))
    np.testing.assert_array_equal(decoded, upright)


def test_times_of_a_variable_frame_rate_come_from_the_container(tmp_path: Path) -> None:
    times = np.cumsum([0, *[40, 120] * 10])
    clip = stored_clip(write(tmp_path / "vfr.mkv", count=21, times_ms=times.tolist()))
    np.testing.assert_allclose(clip.timestamp, times / 1000, atol=2e-3)


def test_a_name_with_a_colon_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "10:30.mp4", count=2)
    monkeypatch.chdir(tmp_path)
    assert VideoFile("10:30.mp4").n_frames == 2


# Bad files


def _bad(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    whole = write(folder / "whole.mp4")
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a video\n" * 100)
    elif kind == "zeros":
        path.write_bytes(bytes(5000))
    elif kind == "folder":
        path.mkdir()
    elif kind == "sound":
        write_sound(path)
    elif kind == "no frames":
        write(path, count=0)
    elif kind == "damaged":
        data = bytearray(whole.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
        path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such file"),
        ("empty", "the file is empty"),
        ("text", "is it a video"),
        ("zeros", "is it a video"),
        ("folder", "this is a folder"),
        ("sound", "no picture (only audio)"),
        ("no frames", "no "),
        ("damaged", "damaged"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, kind: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = _bad(tmp_path, kind)
    with pytest.raises(UserError) as caught:
        stored_clip(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert "\n" not in message
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["plain", "index first", "fragments", "mov", "matroska", "webm", "avi", "gif"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(good: dict[str, Path], tmp_path: Path, name: str, share: float) -> None:
    data = good[name].read_bytes()
    path = tmp_path / f"cut{good[name].suffix}"
    path.write_bytes(data[: max(1, min(int(len(data) * share), len(data) - 1))])
    with pytest.raises(UserError, match=r"truncated|is it a video"):
        stored_clip(path)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(["plain", "fragments", "matroska", "avi", "transport stream"]))
def test_random_damage_gives_frames_or_a_user_error(
    good: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, seed: int, name: str
) -> None:
    rng = np.random.default_rng(seed)
    data = np.frombuffer(good[name].read_bytes(), np.uint8).copy()
    data[rng.integers(0, len(data), rng.integers(1, 40))] = rng.integers(0, 256)
    path = tmp_path_factory.mktemp("damage") / f"damaged{good[name].suffix}"
    path.write_bytes(data.tobytes())
    try:
        count = len(stored_clip(path).frames)
    except UserError as error:
        count = 64 if "\n" not in str(error) else 0
    assert 1 <= count <= 64


# Large files

_PEAK = """
import sys
from pathlib import Path
from rbm.video import stored_clip
clip = stored_clip(sys.argv[1])
status = Path("/proc/self/status")  # getrusage counts memory of the parent before exec too, but is all that others have
if status.exists():
    peak = next(int(line.split()[1]) // 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
else:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 ** (2 if sys.platform == "darwin" else 1)
print(clip.n_frames, *clip.frames.shape, clip.timestamp[-1], peak)
"""


def _measured(path: Path) -> list[float]:
    done = subprocess.run([sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True)
    return [float(value) for value in done.stdout.split()]


def test_8k_video_needs_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "8k.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "crf": "40", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = 4320, 7680, "yuv420p"
        for i in range(8):
            frame = av.VideoFrame(7680, 4320, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([20 * i + 16]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    n_frames, stored, height, width, _, _, megabytes = _measured(path)
    assert (n_frames, stored, height, width) == (8, 8, 240, 427)
    assert megabytes < 1200  # a frame is 100 MB, while it is shrunk there are three of it; decord ahead takes 3,800


def test_an_hour_of_video_needs_bounded_memory(tmp_path: Path) -> None:
    path, part = tmp_path / "hour.mp4", write(tmp_path / "part.mp4", count=250, gop=250, options={"bf": "0"})
    with av.open(str(part)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [
            (bytes(p), p.pts, p.dts, p.time_base, p.is_keyframe) for p in old.demux(video=0) if p.dts is not None
        ]
        length = packets[1][2] - packets[0][2]
        for turn_number in range(360):
            for data, pts, dts, base, key in packets:
                packet = av.Packet(data)
                packet.pts, packet.dts = (t + turn_number * 250 * length for t in (pts, dts))
                packet.time_base, packet.is_keyframe, packet.stream = base, key, stream
                new.mux(packet)
    n_frames, stored, _, _, _, end, megabytes = _measured(path)
    assert (n_frames, stored) == (90_000, 64)
    assert end == pytest.approx(89_999 / 25, abs=0.01)
    assert megabytes < 400


# Clips


@settings(max_examples=60)
@given(
    count=st.integers(1, 200),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    channels=st.sampled_from([0, 1, 3, 4]),
)
def test_a_stored_clip_keeps_both_ends(count: int, height: int, width: int, channels: int) -> None:
    if channels == 0 and width in (3, 4):
        width = 5  # taken for one picture in colour
    shape = (count, height, width, channels) if channels else (count, height, width)
    frames = np.broadcast_to((np.arange(count) % 251).astype(np.uint8).reshape(count, *[1] * (len(shape) - 1)), shape)
    clip = stored_clip(frames, fps=10)
    assert clip.frames.shape == (min(count, 64), height, width, 3)
    assert clip.frame_index[0] == 0
    assert clip.frame_index[-1] == count - 1 == clip.n_frames - 1
    assert (np.diff(clip.frame_index) > 0).all()
    np.testing.assert_array_equal(clip.frames[:, 0, 0, 0], clip.frame_index % 251)
    np.testing.assert_allclose(clip.timestamp, clip.frame_index / 10, rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "stored"),
    [((480, 640), (240, 320)), ((640, 481), (319, 240)), ((100, 2000), (100, 2000)), ((241, 241), (240, 240))],
)
def test_only_large_frames_shrink(size: tuple[int, int], stored: tuple[int, int]) -> None:
    assert stored_clip(np.zeros((2, *size, 3), np.uint8)).frames.shape[1:3] == stored


def test_times_can_be_given() -> None:
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    clip = stored_clip(frames, timestamps=[5.0, 5.5, 7.0])
    np.testing.assert_allclose(clip.timestamp, [0, 0.5, 2])
    assert clip.fps == 1.0
    for bad in ([0, 1], [0, 1, 1], [0, 1, float("nan")]):
        with pytest.raises(UserError, match="timestamps must be 3 rising finite seconds"):
            stored_clip(frames, timestamps=bad)
    with pytest.raises(UserError, match="positive"):
        stored_clip(frames, fps=0)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "give uint8"),
        (np.zeros((8, 8, 3), np.uint8), "one picture"),
        (np.zeros((2, 8, 8, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no frame"),
        (np.zeros((8,), np.uint8), "give"),
    ],
)
def test_arrays_that_are_no_video(frames: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        stored_clip(frames)


def test_resizing_is_antialiased() -> None:
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 200  # one pixel wide: picking pixels would give all or nothing
    small = resize_frames(stripes, 16, 16)
    assert np.abs(small.astype(int) - 100).max() < 30
    assert resize_frames(stripes, 64, 64) is stripes


# Encoding


@pytest.mark.parametrize("size", [(48, 64), (51, 33), (1, 1)])
def test_clips_come_back(size: tuple[int, int]) -> None:
    frames = np.stack([np.full((*size, 3), 10 + 9 * i, np.uint8) for i in range(25)])
    data = io.BytesIO()
    encode_video(data, frames, fps=12.5)
    back = decode_clip(data.getvalue(), size=size)
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).max() <= 4
    np.testing.assert_array_equal(decode_clip(data.getvalue(), [24, 0, 7, 7], size), back[[24, 0, 7, 7]])
    if size == (48, 64):
        again = io.BytesIO()
        encode_video(again, iter(frames), fps=12.5)
        assert again.getvalue() == data.getvalue()


def test_clips_have_short_gops_and_no_b_frames(tmp_path: Path) -> None:
    encode_video(tmp_path / "a.mp4", [picture(i) for i in range(25)], fps=10, gop=10)
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [i for i, packet in enumerate(packets) if packet.is_keyframe] == [0, 10, 20]
    assert all(packet.pts == packet.dts for packet in packets)


def test_a_clip_with_changed_bytes_is_an_error_or_a_clip() -> None:
    data = io.BytesIO()
    encode_video(data, [picture(i) for i in range(12)], fps=10)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        bad = bytearray(data.getvalue())
        for place in rng.integers(0, len(bad), 5):
            bad[place] = rng.integers(256)
        try:
            assert decode_clip(bytes(bad), [3, 11]).ndim == 4
        except UserError:
            refused += 1
    assert 20 < refused < 380


def test_what_cannot_be_decoded_or_encoded(tmp_path: Path) -> None:
    data = io.BytesIO()
    encode_video(data, [picture(i) for i in range(5)], fps=10)
    for bad in (b"", b"junk", data.getvalue()[:400]):
        with pytest.raises(UserError, match="cannot decode the clip"):
            decode_clip(bad)
    with pytest.raises(UserError, match="there is no frame 5"):
        decode_clip(data.getvalue(), [5])
    with pytest.raises(UserError, match="no frames"):
        encode_video(tmp_path / "none.mp4", [], fps=10)
    with pytest.raises(UserError, match="does not exist"):
        encode_video(tmp_path / "nowhere" / "a.mp4", [picture(0)], fps=10)
    assert list(tmp_path.iterdir()) == []
