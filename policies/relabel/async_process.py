"""A process that ends with this one, and the line to it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

from policies.relabel.async_line import Cut, Line

_BUFFER_BYTES = 1 << 20


class Process:
    """Runs a module, whose `main` takes the number of its end of the line.

    Args:
        module: of this package.
        settings: the first message; `threads` says with how many it computes.

    Attributes:
        line: to it.
    """

    def __init__(self, module: str, settings: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        threads = str(settings["threads"])  # set before torch is imported; they must not spin while they wait
        search = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        # a session of its own: Ctrl-C is for this process alone
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
            env=os.environ
            | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
            | {"PYTHONPATH": os.pathsep.join(search)},
        )
        theirs.close()
        self.line = Line(ours)
        self._end = weakref.finalize(self, _end, self._process, self.line, os.getpid())
        with contextlib.suppress(Cut):  # it is noticed when something is read
            self.line.send(settings)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Negative for a signal; none while it runs."""
        return self._process.returncode

    def kill(self) -> None:
        """It is gone when this returns."""
        self._end()


def _end(process: subprocess.Popen[bytes], line: Line, parent: int) -> None:
    if os.getpid() == parent:  # not in a fork of this process
        line.close()
        process.kill()
        process.wait()
