"""Runs the server: binds, starts the children, serves until it is told to stop, and drains."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rbm.errors import UserError
from rbm.scoring.server.app import create_app
from rbm.scoring.server.engine import Engine
from rbm.scoring.server.guard import Guard
from rbm.scoring.server.settings import Settings

HEADER_SECONDS = 10.0
"""For the head of a request; who takes longer is cut off."""

log = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        UserError: it cannot start, or cannot go on.
    """
    check_tls(settings)
    _raise_open_files()
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every form that is malformed
    logging.getLogger("uvicorn.error").addFilter(_is_worth_a_line)
    with bind(settings.host, settings.port) as listening:
        if settings.token is None and not _is_loopback(listening):
            print(
                f"warning: everybody who reaches {settings.host} can use this server; RBM_TOKEN=… asks for a token",
                file=sys.stderr,
            )
        asyncio.run(_serve(settings, listening))


async def _serve(settings: Settings, listening: socket.socket) -> None:
    problems: list[str] = []
    server: Server | None = None

    def failed(sentence: str) -> None:
        problems.append(sentence)
        if server is not None:
            server.stop_now()

    engine = Engine(settings, failed)
    server = Server(_config(settings, create_app(engine)), engine, settings.drain_seconds)
    engine.start()
    announcing = asyncio.create_task(_announce(engine, _url(settings, listening)))
    try:
        await server.serve(sockets=[listening])
    finally:
        announcing.cancel()
        await engine.stop()
    if problems:
        raise UserError(problems[0])


async def _announce(engine: Engine, url: str) -> None:
    await engine.ready_once.wait()
    model = engine.info
    print(f"serving {model['model']} on {model['device']} at {url} (Ctrl-C ends it)", flush=True)


def _config(settings: Settings, guard: Guard) -> uvicorn.Config:
    return uvicorn.Config(
        guard,
        http=Protocol,
        ws="websockets-sansio",
        ws_max_size=settings.limits.ws_message_bytes,
        ws_per_message_deflate=False,  # pixels hardly shrink, and what grows when it is unpacked is a bomb
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """A client's text that is no text would else be a traceback in the log, as often as the client likes."""
    return not (record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError))


class Server(uvicorn.Server):
    """A uvicorn server that answers what it has let in before it ends."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_seconds: float) -> None:
        super().__init__(config)
        self.engine, self.guard, self.drain_seconds = engine, config.app, drain_seconds
        self._signals = 0

    def stop_now(self) -> None:
        """Nobody is waited for."""
        self.drain_seconds = 0.0
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, which raises the signal again at its end: a server that was told to end has not failed."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # the second time it is meant
            self.stop_now()
        self.should_exit = True

    async def main_loop(self) -> None:
        await super().main_loop()
        self.engine.draining = True
        began = time.monotonic()
        while self._busy() and time.monotonic() - began < self.drain_seconds:
            await asyncio.sleep(0.02)
        if self._busy() and self.drain_seconds:
            log.warning("%s requests were not answered in time", self.engine.waiting)
        await self.engine.stop()  # whoever still waits is told to come again

    def _busy(self) -> bool:
        assert isinstance(self.guard, Guard)
        return self.engine.waiting > 0 or self.guard.active > 0


class Protocol(H11Protocol):
    """HTTP with a bound on the time that the head of a request may take."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._before is not self.scope:  # the head is there
            self._overdue.cancel()
        if self.cycle is not None and self.cycle.response_complete and self._overdue.cancelled():
            self._await_head()

    def _await_head(self) -> None:
        self._before = self.scope
        self._overdue = self.loop.call_later(HEADER_SECONDS, self._no_head)

    def _no_head(self) -> None:
        if self._before is self.scope and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP at all: a sentence as everywhere."""
        body = json.dumps({"error": "this is no HTTP request that can be read; see its head", "retry": False}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._overdue.cancel()
        super().connection_lost(exc)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the port is in use or not allowed, or the host is none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        # asyncio sends at once (TCP_NODELAY) only where it sees that the protocol is TCP
        with ExitStack() as on_error:
            listening = on_error.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen(2048)
            on_error.pop_all()
            return listening
    except PermissionError as error:
        raise UserError(f"port {port} needs more rights than this user has; take one above 1023: port=8000") from error
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise UserError(
                f"host {host!r} is no address of this machine; try host=127.0.0.1 or host=0.0.0.0"
            ) from error
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror}); is another server running? choose another: "
            f"port={port + 1}"
        ) from error


def check_tls(settings: Settings) -> None:
    """Raises UserError for files that no TLS server can be made of."""
    if settings.tls_cert is None or settings.tls_key is None:
        return
    for path in (settings.tls_cert, settings.tls_key):
        try:
            open(path, "rb").close()
        except OSError as error:
            raise UserError(f"TLS file {path}: {error.strerror}") from error
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        raise UserError(
            f"{settings.tls_cert} and {settings.tls_key} are no certificate and its private key (PEM, without a "
            f"password): {error.strerror or error}"
        ) from error


def _url(settings: Settings, listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"{'https' if settings.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _is_loopback(listening: socket.socket) -> bool:
    host = str(listening.getsockname()[0])
    return host.startswith("127.") or host == "::1"


def _raise_open_files() -> None:
    """Every client takes an open file; the default is often 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
