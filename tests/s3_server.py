"""A real S3 server on loopback, and a proxy in front of it that can be told to fail."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.request import Request, urlopen

BUCKET = "robots"
START_SECONDS = 60.0

Fault = Callable[[socket.socket], int | None]
"""What happens to a request: how many bytes of its answer get through, or None: it is not even passed on."""


class FaultyProxy:
    """Passes TCP on to a port of this host, one thread a direction; faults strike the next requests.

    A request starts where a client sends after the server has answered (HTTP/1.1 without pipelining), so a
    fault meets a connection that is kept alive as well as a new one. Each fault strikes once.

    Attributes:
        port: where it listens. requests: how many have come.
    """

    def __init__(self, upstream: int) -> None:
        self.requests = 0
        self._upstream = upstream
        self._faults: deque[Fault] = deque()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._accept()

    def drop(self, times: int) -> None:
        """The next requests are not passed on; their connection is closed."""
        self._faults.extend([lambda client: None] * times)

    def cut(self, times: int, after: int = 0) -> None:
        """The next requests are carried out; of each answer come so many bytes, then the connection is closed."""
        self._faults.extend([lambda client: after] * times)

    def stall(self, times: int, seconds: float) -> None:
        """The next requests are passed on so much later."""

        def wait(client: socket.socket) -> int:
            time.sleep(seconds)
            return sys.maxsize

        self._faults.extend([wait] * times)

    def answer(self, times: int, status: int, code: str) -> None:
        """The next requests get S3's error document for `code` (`SlowDown`, `AccessDenied`, ...)."""
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>as told</Message></Error>'
        text = f"HTTP/1.1 {status} Told\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n{body}"

        def send(client: socket.socket) -> None:
            client.sendall(text.encode())

        self._faults.extend([send] * times)

    def skip(self, times: int) -> None:
        """The next requests are served as they should, before the faults told after this."""
        self._faults.extend([lambda client: sys.maxsize] * times)

    def forget(self) -> None:
        """No more faults."""
        self._faults.clear()

    def refuse(self) -> None:
        """Connections are refused, open ones end, until `listen`."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self._thread.join()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            _close(connection)

    def listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._accept()

    close = refuse

    def _accept(self) -> None:
        self._thread = threading.Thread(target=self._serve, args=(self._listener,), daemon=True)
        self._thread.start()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._upstream))
            except OSError:
                return
            with self._lock:
                self._open |= {client, server}
            turn = _Turn()
            threading.Thread(target=self._pass_on, args=(client, server, turn, True), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client, turn, False), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, turn: _Turn, asking: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if asking and turn.answered:
                    left = self._admit(source)
                    if left is None:
                        break
                    turn.left, turn.answered = left, False
                elif not asking:
                    turn.answered = True
                    data = data[: turn.left]
                    turn.left -= len(data)
                target.sendall(data)
                if not turn.left:
                    break
        for connection in (source, target):
            _close(connection)
        with self._lock:
            self._open -= {source, target}

    def _admit(self, client: socket.socket) -> int | None:
        with self._lock:
            self.requests += 1
            fault = self._faults.popleft() if self._faults else None
        return fault(client) if fault else sys.maxsize


@dataclass
class _Turn:
    """Where a connection stands: whether the last request has an answer, and how much of that may still pass."""

    answered: bool = True
    left: int = sys.maxsize


@dataclass(frozen=True)
class S3:
    """A running server. `url` goes through the proxy, `direct` does not."""

    url: str
    direct: str
    proxy: FaultyProxy
    process: subprocess.Popen[bytes]

    def place(self) -> str:
        """A location that no other test uses."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex}/corpus"

    def check_credentials(self, check: bool) -> None:
        """Whether the server looks at keys and signatures (it knows none, so all are refused) or lets all in."""
        count = b"0" if check else b"inf"
        url, kind = f"{self.direct}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urlopen(Request(url, data=count, headers=kind, method="POST"), timeout=10).read()

    def create_bucket(self, name: str) -> None:
        urlopen(Request(f"{self.direct}/{name}", method="PUT"), timeout=10).read()


@contextmanager
def serve_s3() -> Iterator[S3]:
    """Runs `moto_server` on a free port, with one empty bucket; ends it whatever happens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        proxy = FaultyProxy(port)
        try:
            s3 = S3(f"http://127.0.0.1:{proxy.port}", f"http://127.0.0.1:{port}", proxy, process)
            s3.create_bucket(BUCKET)
            yield s3
        finally:
            proxy.close()
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.05)
    raise RuntimeError(f"moto_server did not start (exit code {process.poll()})")


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
