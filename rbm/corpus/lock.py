"""One writer at a time: Icechunk notices a second committer only when it commits, after hours of work."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Self

from rbm.errors import UserError


class WriterLock:
    """An exclusive lock on a corpus directory, held by a file beside it. A dead writer's lock is free at once.

    Beside, since Icechunk makes a repository in an empty directory only; a file, since network file
    systems do not lock directories.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder.with_name(f".{folder.name}.writer.lock")
        self._file: int | None = None

    def acquire(self) -> None:
        """Raises UserError: another writer holds it."""
        path = self._path
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(file, 32, 0).decode("ascii", "replace").strip() or "unknown"
                os.close(file)
                raise UserError(
                    f"corpus {self._folder}: another process (pid {holder}) is writing to it: wait for it, or stop it"
                ) from None
            if self._is_current(path, file):
                break
            os.close(file)  # its last holder removed it between our open and our lock
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @staticmethod
    def _is_current(path: Path, file: int) -> bool:
        try:
            there = path.stat()
        except FileNotFoundError:
            return False
        ours = os.fstat(file)
        return (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev)
