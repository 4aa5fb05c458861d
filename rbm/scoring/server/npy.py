"""Frames in an .npy file that anybody may have sent.

The header is read here rather than by numpy, which allocates what it says, warns of old forms, and opens pickles if it
is told to. What is accepted is what `numpy.save` writes for an array of uint8.
"""

from __future__ import annotations

import ast
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbm.scoring.server.refusal import Refusal

Frames = NDArray[np.uint8]
Buffer = bytes | bytearray

MAGIC = b"\x93NUMPY"

MAX_HEADER = 4096
"""Bytes; numpy.save writes 128 for an array of frames."""


def read_npy(data: Buffer, what: str) -> Frames:
    """The frames in an .npy file: uint8 (T, H, W, C), not copied. Its header is believed only where it fits the file.

    Raises:
        Refusal: it is no .npy file, holds something else, or is shorter or longer than its header says.
    """
    descr, fortran, shape, start = _header(data, what)
    if descr not in ("|u1", "<u1", ">u1"):
        raise Refusal(f"{what} holds {_name(descr)}; send uint8, 0 to 255")
    if len(shape) != 4:
        raise Refusal(f"{what} has {len(shape)} dimensions; send (T, H, W, C)")
    size = len(data) - start
    if math.prod(shape) != size:
        raise Refusal(f"{what} has {size} bytes of pixels, but its header says {str(shape)[:80]}; send it whole")
    flat = np.frombuffer(data, np.uint8, offset=start)
    return flat.reshape(shape[::-1]).transpose() if fortran else flat.reshape(shape)


def _header(data: Buffer, what: str) -> tuple[Any, bool, tuple[int, ...], int]:
    """(type of the items, whether the first index runs fastest, shape, where the items start) of an .npy file."""
    refusal = Refusal(f"{what} is no .npy file of one array of numbers; write it with numpy.save")
    if data[:6] != MAGIC or len(data) < 12 or not 1 <= data[6] <= 3:
        raise refusal
    start = 10 if data[6] == 1 else 12
    end = start + int.from_bytes(data[8:start], "little")
    if end > min(len(data), MAX_HEADER):
        raise refusal
    try:
        header = ast.literal_eval(data[start:end].decode("latin-1").strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise refusal from error
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise refusal
    shape = header["shape"]
    if not isinstance(shape, tuple) or not all(type(length) is int and length >= 0 for length in shape):
        raise refusal
    return header["descr"], header["fortran_order"] is True, shape, end


def _name(descr: Any) -> str:
    return repr(descr[:20]) if isinstance(descr, str) else "several fields"
