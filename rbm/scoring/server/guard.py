"""What every request passes before the application sees it: the token, the size and time of its body, a sane end.

Plain ASGI, around the whole application, so that nothing that goes wrong inside leaves without a sentence.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rbm.scoring import wire
from rbm.scoring.server.engine import Engine
from rbm.scoring.server.refusal import DRAINING, Refusal, busy, internal

log = logging.getLogger(__name__)

MSGPACK = b"application/msgpack"
OPEN_PATHS = {"/", "/health"}
"""What needs no token: the page, which holds nothing, and what load balancers ask."""
QUIET_PATHS = OPEN_PATHS | {"/metrics"}
"""What is answered while the server drains."""


@dataclass(slots=True)
class _State:
    """How far a request has come: bytes held, time of its start, status of its answer, whether its body is there."""

    held: int = 0
    began: float = 0.0
    status: int = 0
    whole: bool = False
    gone: bool = False


class Guard:
    """ASGI middleware. `active` says how many requests it has let in that are not answered."""

    def __init__(self, app: ASGIApp, engine: Engine, paths: set[str]) -> None:
        self.app, self.engine, self.limits = app, engine, engine.limits
        self._paths = paths
        self._token = None if engine.settings.token is None else engine.settings.token.encode()
        self.active = 0
        self.pending_bytes = 0
        self.sockets = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        state = _State(began=time.monotonic(), whole=not has_body)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                state.status = message["status"]
                if not state.whole:  # what else the client sends is not read
                    message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        quiet = scope["path"] in QUIET_PATHS
        self.active += not quiet
        try:
            try:
                self._check_token(scope["path"], headers)
                if self.engine.draining and not quiet:
                    raise _ending()
                self._check_announced(headers)
                await self.app(scope, self._limited(receive, state), sending)
            except ClientDisconnect:
                state.status = state.status or 499
            except Exception as error:
                refusal = error if isinstance(error, Refusal) else internal()
                if not isinstance(error, Refusal) and not state.gone:
                    log.exception("%s %s failed", scope["method"], scope["path"])
                if state.status == 0 and not state.gone:
                    await _refuse(sending, refusal, headers)
            except asyncio.CancelledError:  # the server ends and waits no longer
                if state.status == 0:
                    await _refuse(sending, _ending(), headers)
        finally:
            self.active -= not quiet
            self._hold(state, 0)
            kind = scope["path"] if scope["path"] in self._paths else "other"
            self.engine.metrics.answered(kind, str(state.status or 499), time.monotonic() - state.began)

    def _limited(self, receive: Receive, state: _State) -> Receive:
        """`receive` that refuses a body that is too long or too slow."""

        async def receiving() -> Message:
            left = state.began + self.limits.upload_seconds - time.monotonic()
            if state.status:  # the answer has begun; only the end of the connection is waited for
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.001))
            except TimeoutError:
                raise Refusal(
                    f"the body did not arrive within {self.limits.upload_seconds:g} s; send it whole, or less of it",
                    408,
                ) from None
            if message["type"] == "http.disconnect":
                state.gone = True
            else:
                state.whole = not message.get("more_body", False)
                self._hold(state, state.held + len(message.get("body", b"")))
                if state.held > self.limits.body_bytes:
                    raise self._too_long()
                if self.pending_bytes > self.limits.pending_bytes:
                    raise busy(f"{self.pending_bytes} bytes of other requests are held already; try again in a moment")
            return message

        return receiving

    def _hold(self, state: _State, size: int) -> None:
        self.pending_bytes += size - state.held
        state.held = size
        self.engine.metrics.pending.set(self.pending_bytes)

    def _check_announced(self, headers: dict[bytes, bytes]) -> None:
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced[:20]) > self.limits.body_bytes:
            raise self._too_long()

    def _too_long(self) -> Refusal:
        return Refusal(f"the body is longer than the {self.limits.body_bytes} bytes that this server takes", 413)

    def _check_token(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._token is None or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        right = hmac.compare_digest(given.strip(), self._token)
        if scheme.lower() != b"bearer" or not right:
            what = "another token" if given.strip() else "a token"
            raise Refusal(f"this server wants {what}: send the header `Authorization: Bearer TOKEN`", 401)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        began = False

        async def sending(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        self.sockets += 1
        self.engine.metrics.connections.set(self.sockets)
        try:
            self._check_token(scope["path"], headers)
            self._check_origin(headers)
            if self.engine.draining:
                raise _ending()
            if self.sockets > self.limits.connections:
                raise busy(f"all {self.limits.connections} websockets of this server are open; try again later")
            await self.app(scope, receive, sending)
        except Refusal as refusal:
            if not began:
                await _refuse(send, refusal, headers, prefix="websocket.http.response")
        except Exception:
            log.exception("websocket %s failed", scope["path"])
            if began:
                await send({"type": "websocket.close", "code": 1011})
            else:
                await _refuse(send, internal(), headers, prefix="websocket.http.response")
        finally:
            self.sockets -= 1
            self.engine.metrics.connections.set(self.sockets)

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """A page of another site, open in a browser here, must not speak with this server."""
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != headers.get(b"host", b""):
            raise Refusal("pages of other sites may not open a websocket here", 403)


def _ending() -> Refusal:
    return busy("the server is shutting down; try again later", DRAINING, 5.0)


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return dict(scope["headers"])


def wants_msgpack(headers: dict[bytes, bytes]) -> bool:
    """Who sends msgpack gets msgpack."""
    return headers.get(b"content-type", b"").partition(b";")[0].strip().lower() == MSGPACK


def refusal_headers(refusal: Refusal) -> dict[str, str]:
    """What an answer has beside its body."""
    headers = {}
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refusal.status == 503:
        headers["retry-after"] = str(max(1, round(refusal.retry_after or 1)))
    return headers


async def _refuse(send: Send, refusal: Refusal, headers: dict[bytes, bytes], prefix: str = "http.response") -> None:
    body, content_type = refusal_body(refusal, wants_msgpack(headers))
    answer = {"content-type": content_type, "content-length": str(len(body)), **refusal_headers(refusal)}
    named = [(name.encode(), value.encode()) for name, value in answer.items()]
    await send({"type": f"{prefix}.start", "status": refusal.status, "headers": named})
    await send({"type": f"{prefix}.body", "body": body})


def refusal_body(refusal: Refusal, msgpack: bool) -> tuple[bytes, str]:
    """Body and content type of a refusal."""
    fields: dict[str, Any] = {"error": str(refusal), "retry": refusal.retry}
    if msgpack:
        return wire.pack(fields), MSGPACK.decode()
    return json.dumps(fields, ensure_ascii=False).encode(), "application/json"
