"""Messages between a training process and the process that scores for it, over a pair of sockets.

A message is its length (8 bytes) and a value of `rbm.scoring.wire`.
"""

from __future__ import annotations

import selectors
import socket
import struct
from collections import deque
from io import BufferedReader
from typing import Any

from rbm.errors import UserError
from rbm.scoring import wire

_LENGTH = struct.Struct(">Q")
_CHUNK = 1 << 18


class Cut(Exception):
    """The other process is gone."""


class Line:
    """The training process's end: it never waits but in `wait`."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._outgoing: deque[memoryview] = deque()
        self._incoming = bytearray()

    def send(self, value: Any) -> None:
        """The message goes out now, or with the next calls of `flush` and `wait`.

        Raises:
            Cut: as it says.
        """
        message = wire.pack(value)
        self._outgoing += [memoryview(_LENGTH.pack(len(message))), memoryview(message)]
        self.flush()

    def flush(self) -> None:
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing[0])
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise Cut from error
            self._outgoing[0] = self._outgoing[0][sent:]
            if not self._outgoing[0]:
                self._outgoing.popleft()

    def receive(self) -> list[Any]:
        """What has come.

        Raises:
            Cut: as it says; everything that it said before was received.
        """
        while True:
            try:
                data = self._socket.recv(_CHUNK)
            except (BlockingIOError, InterruptedError):
                return self._messages()
            except OSError:
                data = b""
            if not data:
                found = self._messages()
                if not found:
                    raise Cut
                return found
            self._incoming += data

    def wait(self, seconds: float) -> None:
        """Until something came or can go out, at most so long."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, events)
            selector.select(seconds)

    def close(self) -> None:
        self._socket.close()

    def _messages(self) -> list[Any]:
        found: list[Any] = []
        while len(self._incoming) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._incoming)[0]
            if len(self._incoming) < end:
                break
            try:
                found.append(wire.unpack(bytes(self._incoming[_LENGTH.size : end])))
            except UserError as error:
                raise Cut from error
            del self._incoming[:end]
        return found


class End:
    """The scoring process's end, which waits."""

    def __init__(self, number: int) -> None:
        self._socket = socket.socket(fileno=number)
        self._file = BufferedReader(socket.SocketIO(self._socket, "r"), _CHUNK)

    def read(self) -> Any:
        """The next message; none where the training process is gone."""
        length = self._file.read(_LENGTH.size)
        if len(length) < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack(length)
        message = self._file.read(size)
        return wire.unpack(message) if len(message) == size else None

    def write(self, value: Any) -> None:
        """Raises OSError where the training process is gone."""
        message = wire.pack(value)
        self._socket.sendall(_LENGTH.pack(len(message)) + message)
