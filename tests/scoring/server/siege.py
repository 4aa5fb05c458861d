"""A server with narrow limits and a token, and what it must still be able to do after each attack."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from running import Running, until
from watch import Held, held, most_memory
from websockets.sync.client import ClientConnection

from rbm.scoring import wire

TOKEN = "the token of the tests"
TASK = "open the drawer"
MiB = 1 << 20
NARROW = {
    "body_bytes": 32 * MiB,
    "pending_bytes": 96 * MiB,
    "upload_seconds": 2,
    "request_seconds": 20,
    "queue": 64,
    "clips": 8,
    "frames": 256,
    "side": 1024,
    "pixels": 1 << 20,
    "video_frames": 20_000,
    "video_pixels": 1 << 31,
    "decode_seconds": 4,
    "decoder_bytes": 1536 * MiB,
    "sessions": 40,
    "session_bytes": 64 * MiB,
    "connections": 30,
    "ws_message_bytes": 4 * MiB,
    "ws_in_flight": 16,
}
OVERRIDES = [f"limits.{name}={value}" for name, value in NARROW.items()]


@dataclass(frozen=True)
class Siege:
    """A server that is attacked.

    Attributes:
        frames: uint8 (T, H, W, 3), a clip that does no harm.
        progress: what the model says of it under TASK.
        http: for requests of one connection each, so that none stays open.
    """

    server: Running
    frames: np.ndarray
    progress: list[float]
    http: httpx.Client

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.server.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    @property
    def token(self) -> dict[str, str]:
        return {"authorization": f"Bearer {TOKEN}"}

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path, headers=self.token)

    def post(self, path: str, headers: Mapping[str, str | bytes] | None = None, **more: Any) -> httpx.Response:
        return self.http.post(path, headers={**self.token, **(headers or {})}, **more)

    def msgpack(self, path: str, message: bytes) -> httpx.Response:
        return self.post(path, {"content-type": "application/msgpack"}, content=message)

    def upload(self, data: bytes, name: str = "clip.mp4", task: str = TASK, **fields: str) -> httpx.Response:
        return self.post("/v1/score", files={"video": (name, data)}, data={"task": task, **fields})

    def stream(self, **more: Any) -> ClientConnection:
        return self.server.stream(additional_headers=self.token, **more)

    def dial(self) -> socket.socket:
        connected = socket.create_connection(self.address, timeout=20)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing says nothing more
        return connected

    def said(self, *parts: bytes, pause: float = 0.0) -> bytes:
        """What comes back for these bytes, until the server closes the connection or says nothing for 15 s."""
        with closing(self.dial()) as connected:
            connected.settimeout(15)
            found = b""
            with suppress(ConnectionError):  # it may have said enough, and be gone
                for part in parts:
                    connected.sendall(part)
                    time.sleep(pause)
            try:
                while data := connected.recv(1 << 16):
                    found += data
            except (TimeoutError, ConnectionError):
                pass
            return found

    def head(self, path: str = "/v1/score", **fields: object) -> bytes:
        """The head of a POST."""
        known = {"host": "test", "authorization": f"Bearer {TOKEN}", "connection": "close"}
        known["content-type"] = "application/msgpack"
        given = {name.replace("_", "-"): value for name, value in fields.items()}
        return "\r\n".join(
            [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in {**known, **given}.items()), "", ""]
        ).encode()

    def sessions(self) -> int:
        (worker,) = self.get("/gpu_status").json()["workers"]
        return int(worker["sessions"]["sessions"])

    def number(self, name: str) -> float:
        """What /metrics says of a name without labels."""
        lines = self.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name + " ")).split()[1])

    def works(self) -> None:
        """It is healthy, and scores a good clip as it should."""
        assert self.get("/health").json()["ready"] is True
        answer = self.msgpack("/v1/score", wire.pack({"clips": [{"frames": self.frames, "task": TASK}]}))
        assert answer.status_code == 200, answer.text
        np.testing.assert_allclose(wire.unpack(answer.content)["scores"][0]["progress"], self.progress, atol=1e-5)

    @contextmanager
    def unharmed(self, growth: int = 48 * MiB, peak: int = 256 * MiB) -> Iterator[None]:
        """Afterwards it works, has not grown (bytes), not even for a moment by more than `peak`, and holds nothing."""
        before, log = self.at_rest(), len(self.server.log.read_text())
        with most_memory(self.server.pid) as most:
            yield
        until(lambda: self.holds_nothing(before))
        self.works()
        after = held(self.server.pid)
        assert after.memory - before.memory < growth, f"it grew by {(after.memory - before.memory) / MiB:.0f} MiB"
        assert most() - before.memory < peak, f"it took {(most() - before.memory) / MiB:.0f} MiB more for a while"
        written = self.server.log.read_text()[log:]
        assert "Traceback" not in written, written

    def at_rest(self) -> Held:
        until(lambda: self.number("rbm_websockets") == 0 and self.get("/health").json()["ready"])
        until(lambda: held(self.server.pid).processes == 3)  # the front, the worker, the decoder
        return held(self.server.pid)

    def holds_nothing(self, before: Held) -> bool:
        """Open files are as they were, and there is no session, no websocket, no request, no byte of a request."""
        now = held(self.server.pid)
        gauges = ("rbm_waiting_requests", "rbm_pending_bytes", "rbm_websockets")
        return (
            now.files <= before.files
            and now.processes == before.processes
            and self.sessions() == 0
            and all(self.number(gauge) == 0 for gauge in gauges)
        )


@contextmanager
def named(what: str) -> Iterator[None]:
    """A failure in the block says which of many it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"at: {what}")
        raise


def sentence(answer: httpx.Response, *statuses: int) -> str:
    """The error in an answer, which must be one of these statuses."""
    assert answer.status_code in statuses, f"{answer.status_code}: {answer.text[:500]}"
    kind = answer.headers["content-type"]
    body = wire.unpack(answer.content) if kind == "application/msgpack" else answer.json()
    assert set(body) == {"error", "retry"}
    assert body["error"]
    assert "Traceback" not in body["error"]
    return str(body["error"])
