"""Buffers on disk: one .npz, without pickle."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.output import check_target, whole_file

VERSION = 1

Arrays = dict[str, NDArray[Any]]


def check_file(path: str | Path) -> Path:
    """Raises UserError for a file that could not be written."""
    check_target(Path(path), (".npz",))
    return Path(path)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], filled: int, position: int) -> None:
    """A whole file, or none.

    Args:
        arrays: the columns of a ring; the first `filled` rows of each are written.
        position: the row that is written next.

    Raises:
        UserError: it cannot be written, or its name does not end in .npz.
    """
    with whole_file(check_file(path)) as temporary:
        columns = {name: array[:filled] for name, array in arrays.items()}
        np.savez(temporary, version=np.array(VERSION), position=np.array(position), **columns)  # type: ignore[arg-type]


def read_arrays(path: str | Path, arrays: Mapping[str, NDArray[Any]]) -> tuple[int, int]:
    """Put what `write_arrays` wrote into the columns of a ring that is as large or larger.

    Returns:
        Rows that are filled now, and the row that is written next.

    Raises:
        UserError: there is no such file, or it is of another buffer.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            version = int(file["version"])
            if version != VERSION:
                raise UserError(f"{path} is of version {version}; this release reads version {VERSION}")
            position = int(file["position"])
            found: Arrays = {name: file[name] for name in arrays}
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is no saved buffer, or it is damaged ({error})") from error
    for name, own in arrays.items():
        there = found[name]
        if there.dtype != own.dtype or there.ndim != own.ndim or there.shape[1:] != own.shape[1:]:
            raise UserError(
                f"{path} is of another buffer: {name} is {there.dtype} {there.shape[1:]} there and {own.dtype} "
                f"{own.shape[1:]} here"
            )
    rows, counts = len(next(iter(arrays.values()))), {len(there) for there in found.values()}
    count = max(counts)
    if count > rows:
        raise UserError(f"{path} holds {count} rows, and this buffer {rows}: make it at least as large")
    if len(counts) > 1 or not 0 <= position <= count:
        raise UserError(f"{path} is no saved buffer, or it is damaged (its columns differ in length)")
    for name, there in found.items():
        arrays[name][:count] = there
    return count, position % rows if count == rows else count
