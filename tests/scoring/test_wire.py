"""The wire format: what goes in comes out, and nothing that anybody sends does more than raise UserError."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from rbm.errors import UserError
from rbm.scoring import wire

ORDERS = st.sampled_from(["<", ">"])
ARRAYS = npst.arrays(
    dtype=st.one_of(
        npst.boolean_dtypes(),
        npst.integer_dtypes(endianness="="),
        npst.unsigned_integer_dtypes(endianness="="),
        npst.floating_dtypes(sizes=(16, 32, 64), endianness="="),
        st.sampled_from([np.dtype(">i4"), np.dtype(">f8"), np.dtype(">u2")]),
    ),
    shape=npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=40),
    st.binary(max_size=300),
)
VALUES = st.recursive(
    SCALARS | ARRAYS,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=8), inner, max_size=20),
    max_leaves=20,
)


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, np.ndarray):
        assert isinstance(b, np.ndarray)
        assert a.shape == b.shape
        assert a.dtype.newbyteorder("=") == b.dtype.newbyteorder("=")
        assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    elif isinstance(a, list):
        assert isinstance(b, list)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert type(a) is type(b)
        assert a == b or (a != a and b != b)


def array_message(name: Any, shape: Any, raw: Any, code: int = wire.ARRAY) -> bytes:
    """An array as anybody could write it with the msgpack package alone."""
    return msgpack.packb(msgpack.ExtType(code, msgpack.packb([name, shape, raw])))


@given(VALUES)
def test_what_is_packed_comes_back(value):
    assert_same(value, wire.unpack(wire.pack(value)))


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30))
def test_other_msgpack_writers_and_readers_agree(value):
    assert_same(value, wire.unpack(msgpack.packb(value)))
    assert_same(value, msgpack.unpackb(wire.pack(value)))


@given(ARRAYS)
def test_an_array_is_the_extension_that_was_promised(array):
    extension = msgpack.unpackb(wire.pack(array))
    assert extension.code == 1
    name, shape, raw = msgpack.unpackb(extension.data)
    little = array.astype(array.dtype.newbyteorder("<"))
    assert (name, shape, raw) == (array.dtype.name, list(array.shape), little.tobytes())
    assert_same(array, wire.unpack(array_message(name, shape, raw)))


def test_every_layout_of_memory_packs_the_same():
    frames = np.arange(2 * 6 * 4 * 3, dtype=np.uint8).reshape(2, 6, 4, 3)
    for other in (np.asfortranarray(frames), np.repeat(frames, 2, axis=1)[:, ::2], frames[::-1][::-1]):
        assert wire.pack(other) == wire.pack(frames)


def test_numpy_scalars_become_plain_numbers():
    sent = [np.float32(0.5), np.int64(-3), np.uint8(200), np.bool_(True), np.float64(1e300), (1, 2)]
    assert_same(wire.unpack(wire.pack(sent)), [0.5, -3, 200, True, 1e300, [1, 2]])


def test_arrays_are_aligned_and_read_only():
    for value in ("", "a", "ab", "abc"):
        array = wire.unpack(wire.pack([value, np.arange(5.0)]))[1]
        assert array.flags.aligned
        assert not array.flags.writeable


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.array(["text"]),
        np.array([1j]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.zeros(2, dtype=[("a", "i4")]),
        np.zeros((1,) * 9),
        {1: "a"},
        {b"key": "a"},
        2**64,
        -(2**63) - 1,
        "\ud800",
        object(),
        {1, 2},
        np.datetime64("2020-01-01"),
        1j,
    ],
)
def test_what_cannot_be_sent_is_refused_with_a_sentence(value):
    with pytest.raises(UserError, match="cannot send"):
        wire.pack([value])


def test_a_value_that_holds_itself_is_refused():
    value: list[Any] = []
    value.append(value)
    with pytest.raises(UserError, match="nested deeper"):
        wire.pack(value)


def held(data: bytes) -> Any:
    """unpack, held to its promise: a value or UserError, in memory that grows with what came, not with what is said."""
    tracemalloc.start()
    try:
        found = wire.unpack(data)
    except UserError as error:
        found = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 40_000 + 300 * len(data), f"{peak} bytes for a message of {len(data)}"
    if isinstance(found, UserError):
        assert 10 < len(str(found)) < 600
    return found


@given(st.binary(max_size=400))
@example(b"")
@example(b"\xc1")
def test_random_bytes(data):
    held(data)


@settings(max_examples=300)
@given(VALUES, st.data())
def test_good_messages_gone_wrong(value, data):
    message = bytearray(wire.pack(value))
    for _ in range(data.draw(st.integers(1, 4))):
        if message:
            at = data.draw(st.integers(0, len(message) - 1))
            match data.draw(st.sampled_from(["byte", "cut", "insert"])):
                case "byte":
                    message[at] = data.draw(st.integers(0, 255))
                case "cut":
                    del message[at:]
                case "insert":
                    message[at:at] = data.draw(st.binary(max_size=8))
    held(bytes(message))


@given(VALUES)
def test_a_message_cut_anywhere_is_refused(value):
    message = wire.pack(value)
    for end in range(len(message)) if len(message) < 200 else range(0, len(message), len(message) // 100):
        assert isinstance(held(message[:end]), UserError)
    assert "follow" in str(held(message + b"\xc0"))


LONG_HEADERS = {
    "list16": b"\xdc\xff\xff",
    "list32": b"\xdd\xff\xff\xff\xff",
    "dict16": b"\xde\xff\xff",
    "dict32": b"\xdf\xff\xff\xff\xff",
    "str32": b"\xdb\xff\xff\xff\xff",
    "bin32": b"\xc6\xff\xff\xff\xff",
    "ext32": b"\xc9\xff\xff\xff\xff\x01",
}


@pytest.mark.parametrize("header", LONG_HEADERS.values(), ids=LONG_HEADERS)
def test_lengths_that_lie(header):
    assert isinstance(held(header), UserError)
    assert isinstance(held(header + b"\xc0" * 1000), UserError)
    assert isinstance(held(header * 200), UserError)


def test_lists_that_each_claim_the_whole_message():
    """A reader that makes room as it is told would take 100,000 × 8 bytes for each of the 20,000 lists."""
    assert isinstance(held((b"\xdd" + struct.pack(">I", 90_000)) * 20_000), UserError)


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\x81\x91", b"\xc7\xff\x01\x93", b"\xd8\x01\x93"])
def test_deep_nesting(opening):
    assert isinstance(held(opening * 50_000), UserError)


def test_as_deep_as_allowed_and_no_deeper():
    value: Any = 1
    for _ in range(wire.MAX_DEPTH):
        value = [value]
    assert wire.unpack(wire.pack(value)) == value
    with pytest.raises(UserError, match="deeper"):
        wire.pack([value])
    with pytest.raises(UserError, match="deeper"):
        wire.unpack(msgpack.packb([value]))


def test_a_message_of_very_many_small_values():
    with pytest.raises(UserError, match="numpy arrays"):
        wire.unpack(msgpack.packb([0] * (wire.MAX_VALUES + 1)))
    with pytest.raises(UserError, match="numpy arrays"):
        wire.unpack(msgpack.packb([[[]] * 50_000, [[]] * 60_000]))
    assert len(wire.unpack(msgpack.packb([0] * (wire.MAX_VALUES - 1)))) == wire.MAX_VALUES - 1


@pytest.mark.parametrize(
    ("name", "shape", "raw"),
    [
        ("uint8", [4], b"abc"),
        ("uint8", [2], b"abc"),
        ("float32", [1], b"abc"),
        ("uint8", [-1], b"abc"),
        ("uint8", [-1, -3], b"abc"),
        ("uint8", [2**40], b"abc"),
        ("uint8", [2**32, 2**32], b""),
        ("uint8", [0, 2**62], b""),
        ("uint8", [0, 2**31, 2**31, 2**31], b""),
        ("uint8", [1] * 9, b"a"),
        ("uint8", [3.0], b"abc"),
        ("uint8", [True], b"a"),
        ("uint8", 3, b"abc"),
        ("uint8", None, b"abc"),
        ("uint8", {"0": 3}, b"abc"),
        ("uint8", [3], "abc"),
        ("uint8", [3], [1, 2, 3]),
        ("bool", [2], b"\x00\x02"),
        ("object", [1], b"\x00" * 8),
        ("O", [1], b"\x00" * 8),
        ("<U1", [1], b"\x00" * 4),
        ("float128", [1], b"\x00" * 16),
        ("complex64", [1], b"\x00" * 8),
        ("|u1", [3], b"abc"),
        ("i4,i4", [1], b"\x00" * 8),
        (["uint8"], [3], b"abc"),
        (None, [3], b"abc"),
    ],
)
def test_arrays_that_are_not_what_they_claim(name, shape, raw):
    assert "malformed array" in str(held(array_message(name, shape, raw)))


def test_an_array_whose_payload_is_something_else():
    for payload in (b"", b"\xc0", b"\x90", b"\x92\xa5uint8\x91\x01", msgpack.packb(["uint8", [1], b"a", 1])):
        assert isinstance(held(msgpack.packb(msgpack.ExtType(1, payload))), UserError)
    longer = msgpack.packb(["uint8", [1], b"a"]) + b"more"
    assert "differ" in str(held(msgpack.packb(msgpack.ExtType(1, longer))))


@given(st.integers(-128, 127).filter(lambda code: code != wire.ARRAY), st.binary(max_size=40))
@example(-1, b"\x00\x00\x00\x00")  # msgpack's own timestamp
def test_unknown_extensions(code, payload):
    message = b"\xc7" + struct.pack(">Bb", len(payload), code) + payload
    assert "unknown extension" in str(held(message))


@pytest.mark.parametrize("message", [b"\xa2\xff\xfe", b"\xd9\x03\xed\xa0\x80", b"\x81\xa1\xff\x01"])
def test_strings_that_are_not_utf8(message):
    assert "UTF-8" in str(held(message))


@pytest.mark.parametrize("message", [b"\x81\x01\x02", b"\x81\xc0\x02", b"\x81\xc4\x01a\x02", b"\x81\x90\x02"])
def test_keys_that_are_no_strings(message):
    assert "key" in str(held(message))


def test_a_key_that_stands_twice():
    assert "twice" in str(held(b"\x82\xa1a\x01\xa1a\x02"))


def test_numbers_that_are_none_arrive_as_such():
    """Whether NaN means anything is the receiver's to say."""
    value = wire.unpack(wire.pack({"x": float("nan"), "y": np.array([np.nan, np.inf], np.float16)}))
    assert np.isnan(value["x"])
    assert np.isinf(value["y"][1])


def test_more_bytes_than_allowed():
    message = wire.pack(np.zeros(1000, np.uint8))
    assert wire.unpack(message, max_bytes=len(message)).size == 1000
    with pytest.raises(UserError, match=f"{len(message)} bytes"):
        wire.unpack(message, max_bytes=len(message) - 1)


def test_large_frames_are_not_copied_on_the_way_in():
    message = wire.pack({"frames": np.zeros((32, 480, 640, 3), np.uint8)})
    tracemalloc.start()
    frames = wire.unpack(message)["frames"]
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert frames.shape == (32, 480, 640, 3)
