"""What can go wrong between a client and its server, and which of it is tried again."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Awaitable, Callable
from typing import TypeVar

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0
LONGEST_RETRY_AFTER_S = 60.0
"""A server may ask for a longer pause than the client would make by itself, up to this."""

T = TypeVar("T")


class ClientError(Exception):
    """The server, or the way to it, gave no answer that can be used. The message is a sentence that says why."""


class RequestRefused(ClientError):
    """The server refused what was sent; the same again will be refused again.

    Attributes:
        status: the HTTP status; none where the refusal came over a websocket.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerUnavailable(ClientError):
    """The server cannot be reached, is full or goes down, and was so through every retry.

    Attributes:
        retry_after: seconds after which the server asks to be tried again; none if it did not say.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(ServerUnavailable):
    """More waits at the server than it takes. Nothing was done; it passes as the queue moves."""


class ConnectionCut(ServerUnavailable):
    """The websocket ended before an answer came."""


class ServerTimeout(ClientError, TimeoutError):
    """No answer within the client's `timeout`."""


class SessionLost(ClientError):
    """The session is no more, or nobody knows which frames it holds: the connection was cut, its worker process died,
    or the answer to a push never came. Open a new session, or restore one from a snapshot."""


def unreachable(url: str, error: BaseException) -> ClientError:
    """The exception for a connection that failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ClientError(
                f"{url} does not prove who it is ({cause.verify_message}); verify=CA.pem names whom to trust"
            )
        cause = cause.__cause__ or cause.__context__
    return ServerUnavailable(
        f"cannot reach {url} ({error or type(error).__name__}); is the server running? `rbm serve` starts one"
    )


async def retried(attempt: Callable[[], Awaitable[T]], retries: int, patience: float) -> T:
    """The result of `attempt`, tried again while the server is unavailable: after 0.5, 1, 2, 4, 8, 8, ... seconds,
    less up to half at random so that many clients do not come back at once, or later if the server says so.

    Args:
        attempt: nothing may have been done when it raises ServerUnavailable.
        retries: tries after the first; a full queue is no failure and is not counted, but ends after `patience` s.
    """
    loop = asyncio.get_running_loop()
    begin, failures, waits = loop.time(), 0, 0
    while True:
        try:
            return await attempt()
        except ServerUnavailable as error:
            if not isinstance(error, QueueFull):
                failures += 1
            if failures > retries or (isinstance(error, QueueFull) and loop.time() - begin > patience):
                raise
            await asyncio.sleep(_pause(waits, error))
            waits += 1


def _pause(waits: int, error: ServerUnavailable) -> float:
    jitter = random.uniform(0.5, 1.0)
    if error.retry_after is None:
        return jitter * min(FIRST_WAIT_S * 2**waits, LONGEST_WAIT_S)
    asked = min(error.retry_after, LONGEST_RETRY_AFTER_S)
    if isinstance(error, QueueFull):
        return asked * 2 * jitter  # not before `retry_after`, and spread out, but no back-off: the queue moves
    return max(asked * 2 * jitter, jitter * min(FIRST_WAIT_S * 2**waits, LONGEST_WAIT_S))
