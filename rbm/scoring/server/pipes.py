"""Messages between the front and its children, over a pair of sockets.

A message is the length of its head (4 bytes), the head (a msgpack map) and the parts, which are raw bytes (frames of a
clip): the head's "parts" says how long each is. Both ends are ours, so that nothing here is checked as a client's
message is.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from io import BufferedReader
from typing import Any

import msgpack
import numpy as np

Buffer = bytes | bytearray | memoryview
Part = Buffer | np.ndarray
"""Bytes of a part; an array must lie in C order and have at least one item."""
Fields = dict[str, Any]

_LENGTH = struct.Struct(">I")
_CHUNK = 1 << 18
_MOST_BUFFERS = 256  # in one system call; the kernel takes 1024


def framed(fields: Fields, parts: Sequence[Part] = ()) -> list[Buffer]:
    """A message as buffers to be written one after another; the parts are not copied."""
    views = [memoryview(part).cast("B") for part in parts]  # type: ignore[arg-type]
    head = msgpack.packb({**fields, "parts": [view.nbytes for view in views]})
    return [_LENGTH.pack(len(head)) + head, *views]


class Pipe:
    """A child's end: it waits for what comes, and until what it sends is taken."""

    def __init__(self, number: int) -> None:
        self._socket = socket.socket(fileno=number)
        self._file = BufferedReader(socket.SocketIO(self._socket, "r"), _CHUNK)

    def read(self) -> tuple[Fields, list[bytearray]] | None:
        """The next message, none where the front is gone."""
        length = self._file.read(_LENGTH.size)
        if len(length) < _LENGTH.size:
            return None
        head = msgpack.unpackb(self._file.read(*_LENGTH.unpack(length)))
        parts = [bytearray(size) for size in head.pop("parts")]
        for part in parts:
            if self._file.readinto(part) < len(part):
                return None
        return head, parts

    def write(self, fields: Fields, parts: Sequence[Part] = ()) -> None:
        """Raises OSError where the front is gone."""
        for buffer in framed(fields, parts):
            self._socket.sendall(buffer)


class Channel:
    """The front's end: never waits; calls `received` for each message, and `closed` once when the child is gone."""

    def __init__(
        self,
        connected: socket.socket,
        received: Callable[[Fields, list[bytes]], None],
        closed: Callable[[], None],
    ) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._received, self._closed = received, closed
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[memoryview] = deque()
        self._buffer = bytearray()
        self._needed = _LENGTH.size
        self._open = True
        self._loop.add_reader(connected, self._readable)

    def send(self, fields: Fields, parts: Sequence[Part] = ()) -> None:
        """The message goes out now, or as soon as the child takes it; parts must not change until then."""
        if not self._open:
            return
        idle = not self._waiting
        self._waiting.extend(memoryview(buffer) for buffer in framed(fields, parts))
        if idle:
            self._flush()
            if self._waiting and self._open:
                self._loop.add_writer(self._socket, self._writable)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._waiting.clear()
            self._closed()

    def _writable(self) -> None:
        self._flush()
        if not self._waiting and self._open:
            self._loop.remove_writer(self._socket)

    def _flush(self) -> None:
        while self._waiting:
            buffers = [self._waiting[i] for i in range(min(len(self._waiting), _MOST_BUFFERS))]
            try:
                sent = self._socket.sendmsg(buffers)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.close()
                return
            while self._waiting and sent >= self._waiting[0].nbytes:
                sent -= self._waiting.popleft().nbytes
            if sent:
                self._waiting[0] = self._waiting[0][sent:]

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._buffer += data
        while self._open and len(self._buffer) >= self._needed:
            self._take()

    def _take(self) -> None:
        """A message, if it is there; else what is needed for one."""
        head_end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
        if len(self._buffer) < head_end:
            self._needed = head_end
            return
        head = msgpack.unpackb(self._buffer[_LENGTH.size : head_end])
        sizes = head.pop("parts")
        end = head_end + sum(sizes)
        if len(self._buffer) < end:
            self._needed = end
            return
        parts, at = [], head_end
        for size in sizes:
            parts.append(bytes(memoryview(self._buffer)[at : at + size]))
            at += size
        del self._buffer[:end]
        self._needed = _LENGTH.size
        self._received(head, parts)
