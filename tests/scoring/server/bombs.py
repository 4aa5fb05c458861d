"""Small files that claim to be large ones, and files that lie: what a hostile client uploads."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image


class Touch:
    """Unpickled, it makes the file `path`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_that_says(shape: str, descr: str = "|u1", pixels: bytes = bytes(72)) -> bytes:
    """An .npy file with this text as its shape, whatever it holds."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pixels


def npz(megabytes: int) -> bytes:
    """A zip archive of an .npy file of zeros, a thousandth of its size."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        side = 1024
        with archive.open("frames.npy", "w") as member:
            member.write(npy_that_says(f"({megabytes}, {side}, {side // 1}, 1)", pixels=b""))
            for _ in range(megabytes):
                member.write(bytes(1 << 20))
    return file.getvalue()


def gzipped(megabytes: int) -> bytes:
    return b"".join(gzip.compress(bytes(1 << 20), 1) for _ in range(megabytes))


def png(width: int, height: int, filled: bool = False) -> bytes:
    """A PNG that claims this size; `filled`, it also has the pixels (a bit each)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = bytes((width // 8 + 1) * height) if filled else bytes(100)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg(width: int, height: int, says: tuple[int, int] | None = None) -> bytes:
    """A grey picture; `says` is what its header claims to be its (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 150)).save(file, "JPEG", quality=50)
    data = bytearray(file.getvalue())
    if says is not None:
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", says[1], says[0])
    return bytes(data)


def mp4(
    picture: bytes,
    width: int,
    height: int,
    count: int,
    offsets: int | None = None,
    length: int | None = None,
    elsewhere: str | None = None,
) -> bytes:
    """A Motion JPEG video of `count` frames at 25 a second, which are all the same `picture`: 4 bytes a frame.

    Args:
        picture: a JPEG file.
        width, height: what the container claims.
        offsets: frames whose place in the file it tells, if not all; the others follow one another behind the last.
        length: what the container claims as the size of a frame, if not that of the picture.
        elsewhere: a file that the container says to hold the frames.
    """
    offsets = count if offsets is None else offsets
    where = len(_box(b"ftyp", b"isom", _u32(512), b"isomiso2mp41")) + 8
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    entry = (
        bytes(6) + struct.pack(">H", 1) + bytes(16) + struct.pack(">HHIIIH", width, height, 72 << 16, 72 << 16, 0, 1)
    )
    entry += bytes(32) + struct.pack(">Hh", 24, -1)
    chunks = [_u32(1, 1, 1)] + ([] if offsets == count else [_u32(offsets, count - offsets + 1, 1)])
    table = _box(
        b"stbl",
        _box(b"stsd", _u32(0, 1), _box(b"jpeg", entry)),
        _box(b"stts", _u32(0, 1, count, 1)),
        _box(b"stsc", _u32(0, len(chunks)), *chunks),
        _box(b"stsz", _u32(0, len(picture) if length is None else length, count)),
        _box(b"stco", _u32(0, offsets), np.full(offsets, where, ">u4").tobytes()),
    )
    place = _box(b"dinf", _box(b"dref", _u32(0, 1), _place(elsewhere)))
    media = _box(
        b"mdia",
        _box(b"mdhd", _u32(0, 0, 0, 25, count), struct.pack(">HH", 0x55C4, 0)),
        _box(b"hdlr", _u32(0, 0), b"vide", bytes(12), b"\0"),
        _box(b"minf", _box(b"vmhd", _u32(1), bytes(8)), place, table),
    )
    track = _box(
        b"trak",
        _box(
            b"tkhd",
            _u32(3, 0, 0, 1, 0, min(40 * count, 1 << 31)),
            bytes(16),
            matrix,
            struct.pack(">II", width << 16, height << 16),
        ),
        media,
    )
    movie = _box(
        b"mvhd",
        _u32(0, 0, 0, 1000, min(40 * count, 1 << 31), 1 << 16),
        struct.pack(">H", 256),
        bytes(10),
        matrix,
        bytes(24),
        _u32(2),
    )
    return b"".join(
        [_box(b"ftyp", b"isom", _u32(512), b"isomiso2mp41"), _box(b"mdat", picture), _box(b"moov", movie, track)]
    )


def _u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def _box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", len(body) + 8) + kind + body


def _place(elsewhere: str | None) -> bytes:
    """Where the frames are: in this file, or in another that a QuickTime alias names."""
    if elsewhere is None:
        return _box(b"url ", _u32(1))
    path = b"disk" + elsewhere.encode().replace(b"/", b":")
    name = path.rpartition(b":")[2][:63]
    alias = bytes(10) + b"\x04disk".ljust(28, b"\0") + bytes(12) + bytes([len(name)]) + name.ljust(63, b"\0")
    alias += bytes(16) + struct.pack(">HH", 1, 1) + bytes(16)
    alias += struct.pack(">HH", 2, len(path)) + path + bytes(len(path) % 2) + struct.pack(">hH", -1, 0)
    return _box(b"alis", _u32(0), alias)
