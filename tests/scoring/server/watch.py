"""What a server's processes hold, as /proc says it: memory, open files, how many they are."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Held:
    """Of a process and all that it started.

    Attributes:
        memory: private bytes in memory.
        files: open file descriptors.
        processes: how many.
    """

    memory: int
    files: int
    processes: int


def tree(pid: int) -> list[int]:
    """A process and all that it started, and they started."""
    found = [pid]
    for parent in found:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it has just ended
            continue
    return found


def held(pid: int) -> Held:
    memory = files = processes = 0
    for process in tree(pid):
        try:
            status = Path(f"/proc/{process}/status").read_text()
            opened = len(list(Path(f"/proc/{process}/fd").iterdir()))
        except OSError:
            continue
        if "RssAnon" in status:  # else it is dead and not yet buried
            memory += 1024 * int(status.split("RssAnon:")[1].split()[0])
            files, processes = files + opened, processes + 1
    return Held(memory, files, processes)


@contextmanager
def most_memory(pid: int) -> Iterator[Callable[[], int]]:
    """Looks every 20 ms; the function says the most that was seen, in bytes."""
    most, over = [held(pid).memory], threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], held(pid).memory)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        over.set()
        thread.join()


@contextmanager
def opened(path: Path) -> Iterator[Callable[[], int]]:
    """The function says how often anybody has opened or read a file since the block began (Linux)."""
    library = ctypes.CDLL(None, use_errno=True)
    notify = library.inotify_init1(os.O_NONBLOCK)
    assert library.inotify_add_watch(notify, os.fsencode(path), _ACCESS | _OPEN) >= 0
    found = 0

    def times() -> int:
        nonlocal found
        with suppress(BlockingIOError):
            while data := os.read(notify, 1 << 16):
                found += len(data) // 16
        return found

    try:
        yield times
    finally:
        os.close(notify)


_ACCESS, _OPEN = 0x1, 0x20
