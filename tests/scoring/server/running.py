"""Real servers for tests: `rbm serve` in a process of its own, on a port that is free."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import watch
from websockets.sync.client import ClientConnection, connect

from rbm.config import override
from rbm.scoring import wire

READY_SECONDS = 60


@dataclass
class Running:
    """A server that takes requests.

    Attributes:
        url: its address.
        log: where it writes what goes wrong.
    """

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def child(self, module: str, number: int = 0) -> int:
        """Process id of the n-th child that runs a module: `worker` or `decoder`."""
        found = [pid for pid in watch.tree(self.pid)[1:] if f"server.{module}" in _command(pid)]
        return found[number]

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **more)

    def post(self, path: str, fields: Mapping[str, Any] | None = None, **more: Any) -> httpx.Response:
        """A POST, of msgpack where there are `fields`."""
        if fields is not None:
            more |= {"content": wire.pack(fields), "headers": {"content-type": "application/msgpack"}}
        return httpx.post(self.url + path, timeout=60, **more)

    def stream(self, **more: Any) -> ClientConnection:
        """A websocket to the sessions."""
        return connect("ws" + self.url[4:] + "/v1/stream", compression=None, max_size=None, **more)

    def number(self, name: str) -> float:
        """What `/metrics` says of a counter or gauge, with its labels as they stand there; 0 where it is not there."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)


def command(*overrides: str, **quoted: object) -> list[str]:
    """The command line of a server; values of `quoted` may be paths."""
    named = [override(key, value) for key, value in quoted.items()]
    return [sys.executable, "-m", "rbm.cli", "serve", "port=0", "threads=1", "device=cpu", *overrides, *named]


@contextmanager
def serving(log: Path, *overrides: str, env: Mapping[str, str] | None = None, **quoted: object) -> Iterator[Running]:
    """A server, from when it is ready until the block ends."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command(*overrides, **quoted), stdout=subprocess.PIPE, stderr=file, text=True, env=env
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # it says when it is ready, or ends
            found = re.search(r"at (https?://\S+)", line)
            assert found, f"the server said {line!r}: {log.read_text()}"
            yield Running(process, found[1], log)
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()


def ask(socket: ClientConnection, op: str, number: int = 1, **fields: Any) -> dict[str, Any]:
    """The answer to a message."""
    socket.send(wire.pack({"id": number, "op": op, **fields}))
    answer = wire.unpack(socket.recv(timeout=30))
    assert answer["id"] == number
    return dict(answer)


def hello(socket: ClientConnection) -> dict[str, Any]:
    """What the server says first."""
    return dict(wire.unpack(socket.recv(timeout=30))["hello"])


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Fails where it does not become true in that time."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.05)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]
