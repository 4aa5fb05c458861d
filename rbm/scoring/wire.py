"""The wire format: msgpack with numpy arrays, between client and server and between the server's own processes.

`pack` turns numbers, strings, bytes, lists, dicts with str keys and numpy arrays into bytes; `unpack` turns bytes that
anybody may have sent back into such a value, or raises `UserError`. An array is the msgpack extension of code 1 whose
payload is the msgpack list [name of the dtype, shape, bytes in C order, little endian].

The reader is written out here rather than taken from the msgpack package: no length is believed before that many bytes
are there, nesting and the number of values are bounded, and an array's bytes are not copied on the way in (a message
of 32 frames of 640 × 480 has 30 MB). The cost is some microseconds for each small value, of which a message has few:
what is long travels as an array.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import msgpack
import numpy as np

from rbm.errors import UserError

ARRAY = 1
"""The msgpack extension code of an array."""
DTYPES = {
    np.dtype(name).name: np.dtype(name).newbyteorder("<")
    for name in ("bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
}
"""What an array may hold, by the name that stands on the wire ("bool", "uint8", ..., "float64")."""
MAX_DEPTH = 16
"""Lists and dicts in each other."""
MAX_VALUES = 100_000
"""Numbers, strings, lists, ... in one message, an array counting as five and its dimensions."""
MAX_DIMS = 8
MAX_EMPTY_BYTES = 1 << 30
"""What an array without items may claim as the size of its other dimensions: (0, 480, 640, 3) is meant well."""

Buffer = bytes | bytearray | memoryview


def pack(value: Any) -> bytes:
    """The message for a value; numpy scalars become plain numbers, tuples become lists.

    Raises:
        UserError: it holds something that cannot be sent (an object array, a key that is no str, a number beyond
            64 bits), or is nested deeper than MAX_DEPTH.
    """
    parts: list[Buffer] = []
    _write(parts, value, 0)
    return b"".join(parts)


def unpack(data: Buffer, max_bytes: int | None = None) -> Any:
    """The value of a message. Its arrays are read-only, and those of one byte an item keep the message's memory.

    Raises:
        UserError: it is longer than `max_bytes`, malformed, cut short or goes on after its end, nested deeper than
            MAX_DEPTH, of more than MAX_VALUES values, or holds an array that is not what it claims to be.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise UserError(f"the message has {len(data)} bytes, but {max_bytes} are allowed; send less at once")
    reader = _Reader(data)
    value = reader.value(0)
    if reader.at != len(reader.data):
        raise UserError("malformed message: bytes follow after its end; send one msgpack value a message")
    return value


def _write(parts: list[Buffer], value: Any, depth: int) -> None:
    if isinstance(value, np.ndarray):
        _write_array(parts, value)
    elif isinstance(value, list | tuple | dict):
        if depth == MAX_DEPTH:
            raise UserError(f"cannot send a value nested deeper than {MAX_DEPTH} levels; make it flatter")
        if isinstance(value, dict):
            parts.append(struct.pack(">BI", 0xDF, len(value)))
            for key, item in value.items():
                if not isinstance(key, str):
                    raise UserError(f"cannot send a dict with the key {key!r}; keys must be of type str")
                _write(parts, key, depth + 1)
                _write(parts, item, depth + 1)
        else:
            parts.append(struct.pack(">BI", 0xDD, len(value)))
            for item in value:
                _write(parts, item, depth + 1)
    else:
        plain = value.item() if isinstance(value, np.generic) else value
        if not isinstance(plain, bool | int | float | str | bytes | None):
            raise UserError(
                f"cannot send a {type(value).__name__}; send numbers, str, bytes, lists, dicts and numpy arrays"
            )
        try:
            parts.append(msgpack.packb(plain))
        except (OverflowError, ValueError) as error:  # beyond 64 bits, half a surrogate pair, beyond 4 GiB
            raise UserError(f"cannot send this {type(value).__name__}: {error}") from error


def _write_array(parts: list[Buffer], array: np.ndarray) -> None:
    if array.dtype.name not in DTYPES:
        raise UserError(f"cannot send an array of dtype {array.dtype}; use one of {', '.join(DTYPES)}")
    if array.ndim > MAX_DIMS or array.nbytes > 0xFFFF0000:
        raise UserError(f"cannot send an array of shape {array.shape}; {MAX_DIMS} dimensions and 4 GiB are allowed")
    raw = np.asarray(array).astype(DTYPES[array.dtype.name], order="C", copy=False)
    head = b"\x93" + msgpack.packb(array.dtype.name) + msgpack.packb(array.shape) + struct.pack(">BI", 0xC6, raw.nbytes)
    parts.append(struct.pack(">BIb", 0xC9, len(head) + raw.nbytes, ARRAY) + head)
    parts.append(raw.reshape(-1).view(np.uint8).data)


_NUMBERS = {
    tag: struct.Struct(code)
    for tag, code in zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True)
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_SIZES = {size: struct.Struct(code) for size, code in ((1, ">B"), (2, ">H"), (4, ">I"))}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_STR = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_EXTENSION = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSION = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_LIST = {0xDC: 2, 0xDD: 4}
_DICT = {0xDE: 2, 0xDF: 4}


class _Reader:
    """Reads values from the front of a message; `at` is how far it has come."""

    def __init__(self, data: Buffer) -> None:
        self.data = memoryview(data).cast("B")
        self.at = 0
        self.values = 0

    def value(self, depth: int) -> Any:
        self.values += 1
        tag = self.take(1)[0]
        if tag < 0x80:
            return tag
        if tag >= 0xE0:
            return tag - 0x100
        if tag < 0x90:
            return self.map(tag & 0x0F, depth)
        if tag < 0xA0:
            return self.items(tag & 0x0F, depth)
        if tag < 0xC0:
            return self.string(tag & 0x1F)
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag in _NUMBERS:
            return self.number(_NUMBERS[tag])
        if tag in _STR:
            return self.string(self.number(_SIZES[_STR[tag]]))
        if tag in _BYTES:
            return bytes(self.take(self.number(_SIZES[_BYTES[tag]])))
        if tag in _LIST:
            return self.items(self.number(_SIZES[_LIST[tag]]), depth)
        if tag in _DICT:
            return self.map(self.number(_SIZES[_DICT[tag]]), depth)
        if tag in _EXTENSION:
            return self.array(self.number(_SIZES[_EXTENSION[tag]]), depth)
        if tag in _FIXED_EXTENSION:
            return self.array(_FIXED_EXTENSION[tag], depth)
        raise UserError(f"malformed message: the byte {tag:#x} begins no msgpack value")

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise UserError("malformed message: it ends in the middle of a value; send it whole")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: struct.Struct) -> Any:
        return kind.unpack(self.take(kind.size))[0]

    def string(self, count: int) -> str:
        try:
            return str(self.take(count), "utf-8")
        except UnicodeDecodeError as error:
            raise UserError("malformed message: a string is not UTF-8") from error

    def enter(self, count: int, depth: int) -> None:
        """Before `count` values in a list or dict: each has a byte at least."""
        if depth == MAX_DEPTH:
            raise UserError(f"malformed message: nested deeper than {MAX_DEPTH} levels")
        if count > len(self.data) - self.at:
            raise UserError("malformed message: it ends in the middle of a list or dict; send it whole")
        if self.values + count > MAX_VALUES:
            raise UserError(f"the message has more than {MAX_VALUES} values; send long lists as numpy arrays")

    def items(self, count: int, depth: int) -> list[Any]:
        self.enter(count, depth)
        return [self.value(depth + 1) for _ in range(count)]

    def map(self, count: int, depth: int) -> dict[str, Any]:
        self.enter(2 * count, depth)
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise UserError("malformed message: a key is no string")
            if key in found:
                raise UserError(f"malformed message: the key {key[:40]!r} stands twice in one dict")
            found[key] = self.value(depth + 1)
        return found

    def array(self, count: int, depth: int) -> np.ndarray:
        code = self.number(_NUMBERS[0xD0])
        end = self.at + count
        if code != ARRAY:
            raise UserError(f"malformed message: unknown extension {code}; only {ARRAY} (an array) is known")
        self.enter(3, depth)
        if self.take(1)[0] != 0x93:
            raise UserError("malformed array: it must be the list [dtype, shape, bytes]")
        name, shape = self.value(depth + 1), self.value(depth + 1)
        self.values += 1
        tag = self.take(1)[0]
        if tag not in _BYTES:
            raise UserError("malformed array: it must be the list [dtype, shape, bytes]")
        raw = self.take(self.number(_SIZES[_BYTES[tag]]))
        if self.at != end:
            raise UserError("malformed array: its length and its contents differ")
        return _array(name, shape, raw)


def _array(name: Any, shape: Any, raw: memoryview) -> np.ndarray:
    if not isinstance(name, str) or name not in DTYPES:
        raise UserError(f"malformed array: its dtype must be one of {', '.join(DTYPES)}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMS
        or not all(type(size) is int and size >= 0 for size in shape)
    ):
        raise UserError(f"malformed array: its shape must be a list of at most {MAX_DIMS} whole numbers, none negative")
    dtype = DTYPES[name]
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise UserError(f"malformed array: {len(raw)} bytes, which is not what shape {shape[:8]} of {name} takes")
    if math.prod(size or 1 for size in shape) * dtype.itemsize > max(len(raw), MAX_EMPTY_BYTES):
        raise UserError(f"malformed array: the shape {shape[:8]} is too large")
    flat = np.frombuffer(raw, np.uint8)
    if dtype.kind == "b" and flat.size and flat.max() > 1:
        raise UserError("malformed array: a bool must be 0 or 1")
    if dtype.itemsize > 1:
        flat = flat.copy()  # in the message its items may lie across word boundaries
    array = flat.view(dtype).reshape(shape)
    array.flags.writeable = False
    return array
