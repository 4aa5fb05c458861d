from contextlib import suppress

import numpy as np
import pytest
import simplejpeg
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rbm.corpus.codecs import CODECS, BrokenPart, H264Codec, JpegCodec, make_codec
from rbm.errors import UserError
from rbm.video import resize_frames


def picture(height, width, count=3):
    """A coloured slope with a box that moves, uint8 (count, height, width, 3)."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    frames = np.repeat((40 + 160 * np.stack([x, y, 1 - x], -1))[None], count, axis=0)
    for i, frame in enumerate(frames):
        frame[height // 3 : height // 2, i * width // (count + 1) : (i + 1) * width // (count + 1)] = (200, 40, 30)
    return frames.astype(np.uint8)


def decode(codec, parts, indices, height, width, min_side=None):
    data = [np.frombuffer(part, np.uint8) for part in parts]
    return codec.decode(data.__getitem__, np.asarray(indices, np.int64), height, width, min_side)


def subsampling(part):
    return simplejpeg.decode_jpeg_header(part)[3]


def test_a_name_makes_the_codec_with_its_defaults():
    assert make_codec("jpeg") == JpegCodec()
    assert make_codec("h264") == H264Codec()
    assert make_codec(codec := JpegCodec(quality=95)) is codec
    assert all(made().name == name for name, made in CODECS.items())


def test_small_frames_are_kept_better():
    for size, good, colour in (
        ((240, 320), 80, "420"),
        ((320, 128), 80, "420"),
        ((127, 400), 90, "444"),
        ((96, 96), 90, "444"),
    ):
        frames = picture(*size)
        parts = JpegCodec().encode(frames, 20.0)
        assert {subsampling(part) for part in parts} == {colour}
        assert parts == JpegCodec(good, colour).encode(frames, 20.0)
        for given_one in ("444", "422", "420"):
            assert subsampling(JpegCodec(subsampling=given_one).encode(frames, 20.0)[0]) == given_one
        assert len(b"".join(JpegCodec(quality=50).encode(frames, 20.0))) < len(b"".join(parts))


def test_impossible_settings_are_refused():
    for quality in (0, 101):
        with pytest.raises(UserError, match="choose 1 to 100"):
            JpegCodec(quality=quality)
    with pytest.raises(UserError, match="choose 444, 422, 420"):
        JpegCodec(subsampling="411")


@pytest.mark.parametrize("codec", [JpegCodec(), JpegCodec(subsampling="444"), H264Codec()])
@pytest.mark.parametrize("size", [(240, 320), (97, 131), (18, 50)])
def test_frames_come_back_in_order(codec, size):
    frames = picture(*size, 12)
    parts = codec.encode(frames, 20.0)
    assert len(parts) == codec.n_parts(12)
    everything = decode(codec, parts, range(12), *size)
    assert np.abs(everything.astype(int) - frames).mean() < 4
    np.testing.assert_array_equal(decode(codec, parts, [1, 5, 11], *size), everything[[1, 5, 11]])
    assert decode(codec, parts, [], *size).shape == (0, *size, 3)


def test_full_colour_decodes_to_the_pixels_of_an_exact_decoder():
    for size in ((240, 320), (96, 96), (5, 3), (1, 1)):
        parts = JpegCodec(subsampling="444").encode(picture(*size), 20.0)
        plain = np.stack([simplejpeg.decode_jpeg(part, "RGB", fastdct=False, fastupsample=False) for part in parts])
        np.testing.assert_array_equal(decode(JpegCodec(), parts, range(3), *size), plain)


@pytest.mark.parametrize(
    ("size", "min_side", "expected"),
    [
        ((240, 320), 112, (120, 160)),
        ((240, 320), 120, (120, 160)),
        ((240, 320), 121, (240, 320)),
        ((240, 320), 60, (60, 80)),
        ((240, 320), 1, (30, 40)),
        ((320, 240), 112, (160, 120)),
        ((225, 301), 113, (113, 151)),
        ((96, 96), 112, (96, 96)),
        ((240, 320), 1000, (240, 320)),
    ],
)
def test_a_least_side_gives_the_smallest_cheap_size(size, min_side, expected):
    frames = picture(*size)
    parts = JpegCodec().encode(frames, 20.0)
    small = decode(JpegCodec(), parts, range(3), *size, min_side)
    assert small.shape == (3, *expected, 3)
    assert np.abs(small.astype(int) - resize_frames(frames, *expected)).mean() < 6
    np.testing.assert_array_equal(decode(JpegCodec(), parts, [2], *size, min_side), small[[2]])


@settings(max_examples=150)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    min_side=st.integers(1, 80),
    colour=st.sampled_from([None, "420"]),
)
def test_a_smaller_size_is_never_below_the_least_side_nor_above_the_stored_one(height, width, min_side, colour):
    codec = JpegCodec(subsampling=colour)
    small = decode(codec, codec.encode(picture(height, width, 2), 20.0), [0, 1], height, width, min_side)
    assert min(small.shape[1:3]) >= min(min_side, height, width)
    assert any(small.shape[1:3] == (-(-height // k), -(-width // k)) for k in (1, 2, 4, 8))


def test_h264_frames_come_as_they_are_stored():
    frames = picture(240, 320)
    parts = H264Codec().encode(frames, 20.0)
    assert decode(H264Codec(), parts, [0, 2], 240, 320, 60).shape == (2, 240, 320, 3)


@pytest.mark.parametrize("codec", [JpegCodec(), H264Codec()])
@pytest.mark.parametrize("min_side", [None, 24])
def test_a_clip_of_another_size_than_the_header_says_is_broken(codec, min_side):
    parts = codec.encode(picture(96, 128), 20.0)
    for size in ((96, 126), (48, 64), (192, 256), (128, 96), (12288, 1)):
        with pytest.raises(BrokenPart, match=f"the header says {size[0]}x{size[1]}"):
            decode(codec, parts, [0, 1], *size, min_side)


def test_the_broken_frame_is_the_one_named():
    parts = JpegCodec().encode(picture(96, 128, 6), 20.0)
    parts[4] = parts[4][:-200]
    assert decode(JpegCodec(), parts, [0, 3, 5], 96, 128).shape == (3, 96, 128, 3)
    with pytest.raises(BrokenPart, match="no JPEG") as caught:
        decode(JpegCodec(), parts, [0, 3, 4, 5], 96, 128)
    assert caught.value.part == 4


@settings(max_examples=200)
@given(
    junk=st.binary(max_size=400), codec=st.sampled_from([JpegCodec(), H264Codec()]), min_side=st.sampled_from([None, 9])
)
@example(b"", JpegCodec(), None)
@example(b"\xff\xd8", JpegCodec(), 9)
def test_junk_is_no_clip(junk, codec, min_side):
    with pytest.raises(BrokenPart):
        decode(codec, [junk], [0], 24, 32, min_side)


@settings(max_examples=60)
@given(data=st.data(), codec=st.sampled_from([JpegCodec(), H264Codec()]))
def test_a_clip_cut_short_is_broken(data, codec):
    part = codec.encode(picture(24, 32, 1), 20.0)[0]
    with pytest.raises(BrokenPart):
        decode(codec, [part[: data.draw(st.integers(0, len(part) * 3 // 4))]], [0], 24, 32)


@settings(max_examples=300)
@given(
    bytes_changed=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
    min_side=st.sampled_from([None, 9]),
)
def test_a_jpeg_with_changed_bytes_is_broken_or_a_picture(bytes_changed, min_side):
    part = bytearray(JpegCodec().encode(picture(24, 32, 1), 20.0)[0])
    for place, value in bytes_changed:
        part[place % len(part)] = value
    with suppress(BrokenPart):
        frames = decode(JpegCodec(), [bytes(part)], [0], 24, 32, min_side)
        assert frames.shape == ((1, 24, 32, 3) if min_side is None else (1, 12, 16, 3))
