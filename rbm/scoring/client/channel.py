"""One websocket to the server: questions with numbers go out, answers come back in any order."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from rbm.errors import UserError
from rbm.scoring.client.answers import refusal
from rbm.scoring.client.errors import (
    ClientError,
    ConnectionCut,
    QueueFull,
    RequestRefused,
    ServerTimeout,
    ServerUnavailable,
    SessionLost,
    unreachable,
)
from rbm.scoring.wire import pack, unpack

MAX_ANSWER_BYTES = 1 << 30
"""The largest answers are snapshots."""
SLOWEST_PONG_S = 20.0
CLOSE_S = 2.0
IN_FLIGHT, MESSAGE_BYTES, FRAMES = 16, 16 << 20, 1024
"""Questions at once, bytes of a message and frames in it, where the server does not announce a limit."""
HEAD_BYTES = 1024
"""More than what stands around the frames in a push."""
REFUSED = 1008
"""The websocket close code by which a server turns a client away for good (a wrong token)."""


class Channel:
    """A websocket that is open, or was (`cut`).

    Attributes:
        slots: as many as the server takes questions at once; held around each `ask`.
        cut: the connection has ended; why.
    """

    def __init__(self, socket: ClientConnection, hello: dict[str, Any], timeout: float) -> None:
        limits: Mapping[str, Any] = hello.get("limits") or {}
        self.slots = asyncio.Semaphore(int(limits.get("ws_in_flight", IN_FLIGHT)))
        self._message_bytes = int(limits.get("ws_message_bytes", MESSAGE_BYTES))
        self._frames = int(limits.get("frames", FRAMES))
        self.cut: str | None = None
        self._socket, self._timeout = socket, timeout
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._reader = asyncio.create_task(self._read())
        self._given_up: set[int] = set()
        """Questions that open a session and whose asker no longer waits."""
        self._closing: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, url: str, headers: dict[str, str], tls: ssl.SSLContext | None, timeout: float) -> Channel:
        """Connect and take the server's greeting.

        Raises:
            ServerUnavailable, ServerTimeout, RequestRefused, ClientError: as they say; a wrong token is refused.
        """
        try:
            async with asyncio.timeout(timeout):
                socket = await connect(
                    url,
                    additional_headers=headers,
                    ssl=tls,
                    compression=None,  # frames and floats: costs much, saves little
                    max_size=MAX_ANSWER_BYTES,
                    open_timeout=None,
                    ping_timeout=max(SLOWEST_PONG_S, timeout),
                    close_timeout=CLOSE_S,
                )
                try:
                    hello = unpack(await socket.recv(decode=False))["hello"]
                    return cls(socket, dict(hello), timeout)
                except BaseException:
                    socket.transport.abort()
                    raise
        except TimeoutError as error:
            raise ServerTimeout(f"{url} did not open a connection within {timeout:g} s") from error
        except InvalidStatus as error:
            response = error.response
            raise refusal(url, response.status_code, response.headers, bytes(response.body or b"")) from error
        except ConnectionClosed as error:
            if error.rcvd and error.rcvd.code == REFUSED:
                raise RequestRefused(error.rcvd.reason or f"{url} refused the connection") from error
            raise ServerUnavailable(f"{url} closed the connection at once; is it going down?") from error
        except (OSError, WebSocketException) as error:
            raise unreachable(url, error) from error
        except (UserError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ClientError(f"{url} does not speak as a scoring server does; check the address") from error

    def frames_at_once(self, frame_bytes: int) -> int:
        """Frames of this size that one message may hold."""
        return max(1, min(self._frames, (self._message_bytes - HEAD_BYTES) // frame_bytes))

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message, which may say that there was an error (`checked`). Holds no slot by itself.

        Raises:
            ConnectionCut: the connection ended before the answer came.
            ServerTimeout: no answer came in time. What was asked may be done nevertheless.
            RequestRefused, UserError: it is larger than the server takes, or cannot be packed; it was not sent.
        """
        if self.cut:
            raise ConnectionCut(self.cut)
        self._number += 1
        number = self._number
        data = pack(message | {"id": number})
        if len(data) > self._message_bytes:  # the server would end the connection, and all sessions with it
            raise RequestRefused(
                f"a {message['op']} of {len(data)} bytes, but the server takes {self._message_bytes} in a message; "
                "send smaller frames (a model looks at a few hundred pixels a side)"
            )
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._timeout):
                await self._socket.send(data)
                return await answer
        except ConnectionClosed as error:
            raise ConnectionCut(_why(error)) from error
        except TimeoutError as error:
            raise ServerTimeout(f"the server did not answer {message['op']!r} within {self._timeout:g} s") from error
        finally:
            del self._waiting[number]
            if not (answer.done() and not answer.cancelled()) and message["op"] in ("open", "fork", "restore"):
                self._given_up.add(number)

    async def close(self) -> None:
        """Ends the connection, and with it every session on it."""
        await self._socket.close()
        await self._reader

    async def _read(self) -> None:
        why = "the connection to the server was closed"
        try:
            async for data in self._socket:
                answer = unpack(data) if isinstance(data, bytes) else None
                number = answer.get("id") if isinstance(answer, dict) else None
                if not isinstance(answer, dict) or not isinstance(number, int):
                    raise UserError("it is no msgpack map with an id")
                if number in self._waiting and not self._waiting[number].done():
                    self._waiting[number].set_result(answer)
                elif number in self._given_up:
                    self._given_up.remove(number)
                    if "session" in answer:
                        self._abandon(answer["session"])
        except ConnectionClosed as error:
            why = _why(error)
        except UserError as error:
            why = f"the server sent something that cannot be read: {error}"
            self._socket.transport.abort()
        finally:
            self.cut = why
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(ConnectionCut(why))

    def _abandon(self, session: int) -> None:
        async def close() -> None:
            try:
                await self._socket.send(pack({"id": 0, "op": "close", "session": session}))
            except ConnectionClosed:
                return  # and the session with it

        task = asyncio.create_task(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, unless it says that there was an error.

    Raises:
        SessionLost, QueueFull, ServerUnavailable, RequestRefused, ClientError: by the code of the error.
    """
    if "error" not in answer:
        return answer
    sentence, code = str(answer["error"]), answer.get("code")
    if code in ("session_lost", "unknown_session"):
        raise SessionLost(sentence if "open" in sentence else f"{sentence}; open a new one, or restore a snapshot")
    if answer.get("retry"):
        after = answer.get("retry_after")
        kind = QueueFull if code == "queue_full" else ServerUnavailable
        raise kind(sentence, float(after) if isinstance(after, int | float) else None)
    raise ClientError(sentence) if code == "internal" else RequestRefused(sentence)


def _why(error: ConnectionClosed) -> str:
    reason = error.rcvd.reason if error.rcvd and error.rcvd.reason else "the server is gone"
    return f"the connection to the server was cut: {reason}"
