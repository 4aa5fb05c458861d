"""What one client cannot do to a server: fill its memory, its queue or its time."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from signal import SIGCONT, SIGSTOP

import httpx
import numpy as np
import pytest
import watch
from running import Running, ask, hello, serving, until

from rbm.errors import UserError
from rbm.scoring import wire
from rbm.scoring.server.limits import Limits
from rbm.scoring.server.settings import Settings

TASK = "open the drawer"
LIMITS = {
    "body_bytes": 1_000_000,
    "pending_bytes": 2_500_000,
    "upload_seconds": 1.5,
    "queue": 4,
    "clips": 3,
    "frames": 50,
    "side": 500,
    "pixels": 40_000,
    "video_frames": 80,
    "task_chars": 30,
}


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    overrides = [f"limits.{name}={value}" for name, value in LIMITS.items()]
    with serving(tmp_path_factory.mktemp("server") / "log", *overrides, checkpoint=tiny) as running:
        yield running
        assert "Traceback" not in running.log.read_text()


@contextmanager
def halted(pid: int) -> Iterator[None]:
    """A process that does nothing for a while."""
    os.kill(pid, SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, SIGCONT)


def connected(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answer_to(raw: bytes, server: Running) -> bytes:
    """All that the server says to these bytes until it hangs up."""
    with connected(server) as plain:
        plain.sendall(raw)
        said = b""
        while chunk := plain.recv(65536):
            said += chunk
        return said


def clip(*shape: int) -> dict[str, object]:
    return {"clips": [{"frames": np.zeros(shape, np.uint8), "task": TASK}]}


def test_bodies_that_are_too_long(server):
    done = server.post("/v1/score", content=bytes(1_000_001), headers={"content-type": "application/msgpack"})
    assert done.status_code == 413
    assert "1000000 bytes" in wire.unpack(done.content)["error"]

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(100_000)

    done = server.post("/v1/score", content=chunks(), headers={"content-type": "application/msgpack"})
    assert done.status_code == 413, done.text  # no Content-Length: it is counted
    assert wire.unpack(done.content)["retry"] is False
    until(lambda: server.number("rbm_pending_bytes") == 0)


def test_a_content_length_that_lies(server):
    head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/msgpack\r\nContent-Length: "
    assert b" 413 " in answer_to(head + b"9999999999999999999\r\n\r\n", server)
    assert b" 400 " in answer_to(head + b"99999999999999999999999\r\n\r\n", server)
    assert b'"error": "this is no HTTP' in answer_to(head + b"-5\r\n\r\n", server)
    assert b" 400 " in answer_to(head + b"5, 6\r\n\r\nhello", server)
    shorter = answer_to(head + b"1\r\n\r\n\x80this is more than one byte\r\n\r\n", server)
    assert shorter.startswith(b"HTTP/1.1 400 ")  # of the map {}, and of what follows it
    assert shorter.count(b"HTTP/1.1 400 ") == 2


def test_half_sent_uploads(server):
    head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: "
    began = time.monotonic()
    answer = answer_to(head + b'500\r\n\r\n--x\r\nContent-Disposition: form-data; name="video"', server)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 1.5 s" in answer
    assert time.monotonic() - began < 5


def test_uploads_by_the_drop_take_no_longer(server):
    with connected(server) as plain:
        plain.sendall(
            b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/msgpack\r\nContent-Length: 900000\r\n\r\n"
        )
        began = time.monotonic()
        plain.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() - began < 10:
            plain.sendall(b"\x00")
            try:
                answer = plain.recv(65536)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < 4


def test_vanished_uploads_leave_nothing(server):
    for _ in range(10):
        with connected(server) as plain:
            plain.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/msgpack\r\n")
            plain.sendall(b"Content-Length: 900000\r\n\r\n" + bytes(100_000))
    until(lambda: server.number("rbm_pending_bytes") == 0)


def test_a_request_that_does_not_end_its_head(server):
    """The first of a connection, and one after a good one; a websocket that says nothing lives on."""
    began = time.monotonic()
    with connected(server) as first, connected(server) as second, server.stream() as quiet:
        first.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        second.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert second.recv(65536).startswith(b"HTTP/1.1 200 ")
        second.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        for one in (first, second):
            while one.recv(65536):
                pass
        assert 5 < time.monotonic() - began < 15
        time.sleep(0.5)
        hello(quiet)
        assert "session" in ask(quiet, "open", task=TASK)


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        (clip(51, 4, 4, 3), 413, "51 frames"),
        (clip(1, 501, 4, 3), 413, "sides of 500"),
        (clip(1, 300, 200, 3), 413, "40000 pixels"),
        ({"clips": clip(1, 4, 4, 3)["clips"] * 4}, 413, "4 clips"),
        ({"clips": [{"frames": np.zeros((1, 4, 4, 3), np.uint8), "task": "x" * 31}]}, 400, "31 characters"),
    ],
)
def test_clips_that_are_too_large(server, fields, status, says):
    done = server.post("/v1/score", fields)
    assert done.status_code == status
    assert says in wire.unpack(done.content)["error"]


def test_videos_that_are_too_long(server, video_path):
    done = server.post("/v1/score", files={"video": video_path.read_bytes()}, data={"task": TASK})
    assert done.status_code == 413
    assert "90 frames" in done.json()["error"]
    held = io.BytesIO()
    np.save(held, np.zeros((51, 4, 4, 3), np.uint8))
    done = server.post("/v1/score", files={"video": held.getvalue()}, data={"task": TASK})
    assert (done.status_code, "51 frames" in done.json()["error"]) == (413, True)


def test_a_full_queue(server):
    """Whoever comes when four requests wait is told when to come back; those that wait are answered."""
    with ThreadPoolExecutor(4) as pool, server.stream() as stream:
        hello(stream)
        session = ask(stream, "open", task=TASK)["session"]
        with halted(server.child("worker")):
            waiting = [pool.submit(server.post, "/v1/score", clip(1, 8, 8, 3)) for _ in range(4)]
            until(lambda: queue_is_full(server))
            done = server.post("/v1/score", clip(1, 8, 8, 3))
            assert done.status_code == 503
            assert int(done.headers["retry-after"]) >= 1
            assert wire.unpack(done.content)["retry"] is True
            answer = ask(stream, "push", session=session, frames=np.zeros((8, 8, 3), np.uint8))
            assert (answer["code"], answer["retry"]) == ("queue_full", True)
            assert answer["retry_after"] > 0
            assert server.get("/health").status_code == 200
        assert [done.result().status_code for done in waiting] == [200] * 4
        assert "error" not in ask(stream, "push", session=session, frames=np.zeros((8, 8, 3), np.uint8))


def queue_is_full(server: Running) -> bool:
    return server.number("rbm_waiting_requests") == 4


def test_bytes_of_all_requests_together(server):
    body = {"clips": [{"frames": np.zeros((40, 80, 95, 3), np.uint8), "task": TASK}]}
    with ThreadPoolExecutor(3) as pool, halted(server.child("worker")):
        first = [pool.submit(server.post, "/v1/score", body) for _ in range(2)]
        until(lambda: server.number("rbm_waiting_requests") == 2)
        done = server.post("/v1/score", body)
        assert done.status_code == 503
        assert done.headers["retry-after"]
    assert [done.result().status_code for done in first] == [200, 200]


def test_a_million_tiny_requests_leave_nothing_behind(server):
    """Not quite a million."""

    def some(count: int) -> None:
        with httpx.Client(base_url=server.url) as client:
            for _ in range(count):
                assert client.post("/v1/score", content=b"\x80", headers={"content-type": "application/msgpack"})
                assert client.get("/v1/x").status_code == 404

    some(200)
    before = watch.held(server.pid)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(some, [200] * 4))
    time.sleep(0.2)
    after = watch.held(server.pid)
    assert after.memory - before.memory < 8 << 20
    assert after.files <= before.files + 2
    assert after.processes == before.processes


def test_more_websockets_than_allowed(tiny, tmp_path):
    with serving(tmp_path / "log", "limits.connections=2", checkpoint=tiny) as server:
        with server.stream() as one, server.stream() as two:
            hello(one), hello(two)
            with pytest.raises(Exception, match="503"):
                server.stream()
        until(lambda: server.number("rbm_websockets") == 0)
        with server.stream() as again:
            hello(again)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"port": 70_000}, "port"),
        ({"workers": 0}, "workers"),
        ({"batch": 1.5}, "batch"),
        ({"wait_ms": -1}, "wait_ms"),
        ({"token": ""}, "token"),
        ({"token": "ü"}, "token"),
        ({"tls_cert": "a.pem"}, "tls_key"),
    ],
)
def test_settings_that_make_no_sense(values, says):
    with pytest.raises(UserError, match=says):
        Settings(**values)


def test_limits_that_make_no_sense():
    for values in ({"queue": 0}, {"queue": True}, {"queue": "8"}, {"upload_seconds": 0}, {"body_bytes": 1 << 70}):
        with pytest.raises(UserError, match=next(iter(values))):
            Limits(**values)
