"""Output files that are there whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rbm.errors import UserError


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` to write into; it takes its name when the block ends without an error.

    Raises:
        UserError: it cannot be written: the disk is full, the folder is missing or read-only.
    """
    check_target(target)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as scratch:
            temporary = Path(scratch, target.name)
            yield temporary
            os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


def check_target(target: Path, suffixes: Sequence[str] = (), inputs: Sequence[str | os.PathLike[str]] = ()) -> None:
    """Refuses, before any work is done, a file that could not be written at its end.

    Raises:
        UserError: its folder does not exist, it is a folder, one of `inputs`, or ends in none of `suffixes`.
    """
    if not target.parent.is_dir():
        raise UserError(f"cannot write {target}: the folder {target.parent} does not exist; make it first")
    if target.is_dir():
        raise UserError(f"cannot write {target}: it is a folder; give a file name")
    if suffixes and target.suffix.lower() not in suffixes:
        raise UserError(f"cannot write {target}: the name must end in {' or '.join(suffixes)}")
    if target.exists() and any(os.path.exists(path) and target.samefile(path) for path in inputs):
        raise UserError(f"cannot write {target}: it is an input; choose another name")
