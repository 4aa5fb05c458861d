"""Clients that lie about lengths, send half, vanish, do not read, or ask too much: the others do not notice."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress

import httpx
import numpy as np
import pytest
from bombs import jpeg, mp4
from running import ask, hello, until
from siege import TASK, MiB, Siege, named, sentence
from websockets.exceptions import ConnectionClosed, InvalidStatus

from rbm.scoring import wire

FRAMES = np.full((4, 32, 32, 3), 90, np.uint8)
BODY = wire.pack({"clips": [{"frames": FRAMES, "task": TASK}]})


def status(answer: bytes) -> int:
    """Of an HTTP answer; 0 where there is none."""
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def test_bodies_of_another_length_than_announced(siege: Siege) -> None:
    refused = {
        "shorter, and it ends": (siege.head(content_length=len(BODY) + 9) + BODY, {0, 408}),
        "longer": (siege.head(content_length=len(BODY) - 9) + BODY, {400}),
        "no number": (siege.head(content_length="ten") + BODY, {400}),
        "minus one": (siege.head(content_length=-1) + BODY, {400}),
        "far too long": (siege.head(content_length=10**30) + BODY, {400, 413}),
        "too long": (siege.head(content_length=33 * MiB) + BODY, {413}),
        "two lengths": (siege.head(content_length="5\r\ncontent-length: 9") + BODY, {400}),
        "a length and chunks": (siege.head(content_length=5, transfer_encoding="chunked") + b"0\r\n\r\n", {400}),
        "chunks that are none": (siege.head(transfer_encoding="chunked") + b"zz\r\nabc\r\n", {400}),
        "a chunk of 16 EB": (siege.head(transfer_encoding="chunked") + b"ffffffffffffffff\r\nabc", {400, 408, 413}),
        "another encoding": (siege.head(transfer_encoding="gzip") + BODY, {400, 501}),
    }
    with siege.unharmed(), ThreadPoolExecutor(len(refused)) as pool:
        answers = pool.map(siege.said, [request for request, _ in refused.values()])
        for (name, (_, allowed)), answer in zip(refused.items(), answers, strict=True):
            with named(f"{name}: {answer[:400]!r}"):
                assert status(answer) in allowed


def test_an_endless_body(siege: Siege) -> None:
    """Without an announced length, and far more than is allowed."""
    chunk = b"%x\r\n" % MiB + bytes(MiB) + b"\r\n"
    with siege.unharmed(), closing(siege.dial()) as connected:
        connected.sendall(siege.head(transfer_encoding="chunked"))
        with suppress(OSError):  # it closes the connection while more is sent
            for _ in range(200):
                connected.sendall(chunk)
            pytest.fail("it took 200 MiB of 32")


def test_a_body_that_drips(siege: Siege) -> None:
    """A byte now and then keeps no connection alive."""
    with siege.unharmed():
        began = time.monotonic()
        answer = siege.said(siege.head(content_length=1000), *[b"x"] * 12, pause=0.2)
        assert status(answer) == 408
        assert time.monotonic() - began < 8


NOISE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    b"\x00" * 1000,
    b"GET / HTTP/0.9\r\n\r\n",
    b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * (1 << 20) + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + b"x: y\r\n" * 9000 + b"\r\n",
    b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n",
    b"G\xffT / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /\xff%zz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT example.com:443 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"GET http://example.com/ HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"GET /v1/stream HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    b"GET /v1/stream HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 99\r\nsec-websocket-key: eA==\r\n\r\n",
]


def test_what_is_no_request(siege: Siege) -> None:
    with siege.unharmed():
        for number, noise in enumerate(NOISE):
            with named(f"{number}: {noise[:40]!r}"):
                answer = siege.said(noise)
                assert b"root:" not in answer
                if answer:
                    assert 200 <= status(answer) < 500, answer[:300]


def test_forms_that_end_too_soon(siege: Siege) -> None:
    part = b'--b\r\ncontent-disposition: form-data; name="video"; filename="a"\r\n\r\n'
    bodies = [
        part,
        part + bytes(1000),
        part + b"\r\n--b",
        b"--b\r\n",
        b"--b\r\n\r\n\r\n--b--\r\n",
        b"--b\r\ncontent-disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\n" + b"x: y\r\n" * 5000 + b"\r\n\r\n--b--\r\n",
        b"--b\r\ncontent-disposition: form-data; name=" + b"n" * 100_000 + b"\r\n\r\nx\r\n--b--\r\n",
        (b'--b\r\ncontent-disposition: form-data; name="task"\r\n\r\nx\r\n') * 2000 + b"--b--\r\n",
        b'--b\r\ncontent-disposition: form-data; name="\xff\xfe"; filename="\x00"\r\n\r\nx\r\n--b--\r\n',
    ]
    with siege.unharmed():
        for path in ("/v1/score", "/v1/compare", "/v1/rank", "/evaluate_batch_npy"):
            for body in bodies:
                with named(f"{path} {body[:90]!r}"):
                    headers = {"content-type": "multipart/form-data; boundary=b"}
                    sentence(siege.post(path, headers, content=body), 400, 413)
        for boundary in ("", "; boundary=", "; boundary=" + "b" * 5000, '; boundary="', "; boundary=\xff; charset=zip"):
            headers = {"content-type": ("multipart/form-data" + boundary).encode("latin-1")}
            with named(boundary[:40]):
                sentence(siege.post("/v1/score", headers, content=bodies[1]), 400, 415)


def test_clients_that_vanish_in_an_upload(siege: Siege) -> None:
    with siege.unharmed():
        for i in range(40):
            with closing(siege.dial()) as connected:
                connected.sendall(siege.head(content_length=MiB) + bytes(i * 20_000))
        for i in range(20):  # in a form, of which a part is on disk by then
            with closing(siege.dial()) as connected:
                head = siege.head(content_type="multipart/form-data; boundary=b", content_length=9 * MiB)
                part = b'--b\r\ncontent-disposition: form-data; name="video"; filename="a"\r\n\r\n'
                connected.sendall(head + part + bytes(i * 200_000))


def test_clients_that_vanish_before_their_answer(siege: Siege) -> None:
    video = mp4(jpeg(320, 240), 320, 240, 140)  # takes a while with every frame
    form = httpx.Request("POST", "http://x", files={"video": video}, data={"task": TASK, "every": "1"})
    head = siege.head(content_type=form.headers["content-type"], content_length=form.headers["content-length"])
    with siege.unharmed():
        assert status(siege.said(head + form.read())) == 200
        for i in range(8):
            with closing(siege.dial()) as connected:
                connected.sendall(head + form.read())
                time.sleep(0.05 * i)
        for _ in range(50):
            with closing(siege.dial()) as connected:
                connected.sendall(siege.head(content_length=len(BODY)) + BODY)


def test_clients_that_vanish_from_a_websocket(siege: Siege) -> None:
    """In the middle of a frame, of a handshake, with sessions open, with pushes under way, without a farewell."""
    with siege.unharmed():
        for i in range(20):
            connected = siege.stream()
            hello(connected)
            session = ask(connected, "open", task=TASK)["session"]
            for _ in range(i):
                connected.send(wire.pack({"id": 3, "op": "push", "session": session, "frames": FRAMES}))
            raw = connected.socket
            if i % 2:
                raw.sendall(struct.pack(">BBQ", 0x82, 0xFF, 100_000) + bytes(500))  # a frame that never ends
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.shutdown(socket.SHUT_RDWR)
            connected.close_socket()
        for _ in range(20):
            with closing(siege.dial()) as connected:
                connected.sendall(handshake(siege)[: 20 * (_ + 1)])


def handshake(siege: Siege) -> bytes:
    token = siege.token["authorization"]
    return (
        f"GET /v1/stream HTTP/1.1\r\nhost: x\r\nauthorization: {token}\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
        "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ).encode()


def upgraded(siege: Siege) -> socket.socket:
    """A connection that is a websocket now; what the server said first is read."""
    connected = siege.dial()
    connected.sendall(handshake(siege))
    said = b""
    while b"ws_in_flight" not in said:
        said += connected.recv(4096)
    return connected


def frame(opcode: int, payload: bytes, final: bool = True, masked: bool = True, reserved: int = 0) -> bytes:
    """A websocket frame whose mask is zero."""
    head = struct.pack(">BBQ", final << 7 | reserved << 4 | opcode, masked << 7 | 127, len(payload))
    return head + bytes(4 * masked) + payload


def test_frames_against_the_protocol(siege: Siege) -> None:
    frames = {
        "not masked": frame(2, b"abc", masked=False),
        "compressed": frame(2, b"abc", reserved=4),
        "an opcode that there is not": frame(11, b"abc"),
        "a ping that is too long": frame(9, bytes(1000)),
        "a continuation of nothing": frame(0, b"abc"),
        "text that is no text": frame(1, b"\xff\xfe"),
        "a close with half a code": frame(8, b"\x03"),
        "a frame of 16 EB": struct.pack(">BBQ", 0x82, 0xFF, (1 << 63) - 1) + bytes(100),
        "a message without end": frame(2, bytes(MiB), final=False) + frame(0, bytes(MiB), final=False) * 5,
    }
    with siege.unharmed():
        for name, sent in frames.items():
            with named(name), closing(upgraded(siege)) as connected:
                connected.settimeout(10)
                with suppress(ConnectionError):
                    connected.sendall(sent)
                    while connected.recv(1 << 16):
                        pass
        with closing(upgraded(siege)) as connected:  # many pings, of which no answer is read
            connected.settimeout(1)
            with suppress(OSError):
                for _ in range(300):
                    connected.sendall(frame(9, bytes(100)) * 100)


def test_a_client_that_does_not_read_its_answers(siege: Siege) -> None:
    """It is not read either, takes no memory, and others are served meanwhile."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 200, 200, 3), np.uint8)
    with siege.unharmed(peak=96 * MiB), closing(upgraded(siege)) as connected:
        connected.sendall(frame(2, wire.pack({"id": 1, "op": "open", "task": TASK})))
        session = wire.unpack(connected.recv(4096)[2:])["session"]
        connected.sendall(frame(2, wire.pack({"id": 2, "op": "push", "session": session, "frames": noise})))
        connected.settimeout(2)
        asked = 0
        message = frame(2, wire.pack({"id": 3, "op": "snapshot", "session": session}))  # 30 kB for 50 bytes
        with suppress(TimeoutError):
            while asked < 200_000:
                connected.sendall(message * 100)
                asked += 100
        assert asked < 200_000, "it took 200000 messages whose answers nobody read"
        siege.works()


def test_a_client_that_does_not_read_a_page(siege: Siege) -> None:
    request = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\nauthorization: " + siege.token["authorization"].encode()
    with siege.unharmed(peak=64 * MiB), closing(siege.dial()) as connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connected.settimeout(2)
        with suppress(TimeoutError, ConnectionError):
            for _ in range(5000):
                connected.sendall((request + b"\r\n\r\n") * 20)
        siege.works()


def test_ten_thousand_small_requests_beside_some_that_are_never_made(siege: Siege) -> None:
    """Of which no two are alike: what is counted of each would grow. Heads that are begun and not ended are cut off."""
    with siege.unharmed(), ExitStack() as stack:
        waiting = [stack.enter_context(closing(siege.dial())) for _ in range(20)]
        began = time.monotonic()
        for connected in waiting:
            connected.sendall(b"POST /v1/score HTTP/1.1\r\nhost: x\r\n")
        lines = len(siege.get("/metrics").text.splitlines())
        with ThreadPoolExecutor(4) as pool:
            parts = [range(first, first + 2500) for first in range(0, 10_000, 2500)]
            answers = b"".join(pool.map(lambda numbers: pipelined(siege, numbers), parts))
        found = {code: answers.count(b"HTTP/1.1 %d " % code) for code in (200, 400, 404)}
        assert found == {200: 1000, 400: 1000, 404: 8000}
        assert len(siege.get("/metrics").text.splitlines()) < lines + 60
        for connected in waiting:
            connected.settimeout(max(0.1, began + 15 - time.monotonic()))
            assert connected.recv(100) == b"", "it waits for the rest of a head"


def pipelined(siege: Siege, numbers: range) -> bytes:
    """What is answered to small requests over one connection, a hundred at a time."""
    found = b""
    with closing(siege.dial()) as connected:
        for first in numbers[::100]:
            connected.sendall(b"".join(small(siege, number) for number in range(first, first + 100)))
            expected = found.count(b"HTTP/1.1 ") + 100
            while found.count(b"HTTP/1.1 ") < expected or not found.endswith(b"}"):
                said = connected.recv(1 << 16)
                assert said, found[-300:]
                found += said
    return found


def small(siege: Siege, number: int) -> bytes:
    kind = number % 10
    if kind == 0:
        return siege.head(connection="keep-alive", content_length=9) + b"%9d" % number
    token = siege.token["authorization"]
    path = "/health" if kind == 1 else f"/{number}"
    return f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: {token}\r\nx-{number}: y\r\n\r\n".encode()


def test_more_websockets_than_there_may_be(siege: Siege) -> None:
    with siege.unharmed():
        with ExitStack() as stack:
            for _ in range(30):
                hello(stack.enter_context(siege.stream()))
            with pytest.raises(InvalidStatus) as caught:
                stack.enter_context(siege.stream())
            assert caught.value.response.status_code == 503
            assert int(caught.value.response.headers["retry-after"]) >= 1
            siege.works()
        until(lambda: siege.number("rbm_websockets") == 0)
        with siege.stream() as again:
            hello(again)


def test_more_sessions_than_there_may_be(siege: Siege) -> None:
    with siege.unharmed(), siege.stream() as greedy, siege.stream() as other:
        hello(greedy), hello(other)
        sessions = [ask(greedy, "open", task=TASK)["session"] for _ in range(40)]
        for socket_, op, more in ((greedy, "open", {"task": TASK}), (other, "open", {"task": TASK})):
            answer = ask(socket_, op, **more)
            assert (answer["code"], answer["retry"]) == ("pool_full", True)
            assert answer["retry_after"] > 0
        assert ask(greedy, "fork", session=sessions[0])["code"] == "pool_full"
        ask(greedy, "close", session=sessions[0])
        assert "session" in ask(other, "open", task=TASK)


def test_more_requests_than_may_wait(siege: Siege) -> None:
    """While the worker is held up, those beyond the queue are told to come back; the others are served later."""
    worker = siege.server.child("worker")

    def held_up(connected: socket.socket) -> bytes:
        connected.sendall(siege.head(content_length=len(BODY)) + BODY)
        return connected.recv(1 << 16)

    with siege.unharmed(), ExitStack() as stack, ThreadPoolExecutor(100) as pool:
        dialled = [stack.enter_context(closing(siege.dial())) for _ in range(100)]
        os.kill(worker, signal.SIGSTOP)
        try:
            coming = [pool.submit(held_up, connected) for connected in dialled]
            until(lambda: sum(answer.done() for answer in coming) == 100 - 64)
            assert siege.get("/health").status_code == 200
        finally:
            os.kill(worker, signal.SIGCONT)
        answers = [answer.result() for answer in coming]
    assert [status(answer) for answer in answers].count(200) == 64
    refused = [answer.lower() for answer in answers if status(answer) != 200]
    assert all(status(answer.upper()) == 503 and b"retry-after: 1\r\n" in answer for answer in refused)


def test_more_bytes_than_may_be_held(siege: Siege) -> None:
    """Uploads that are begun and not ended, of which each is allowed and all are not."""
    # the allocator may keep for later what was held at once
    with siege.unharmed(growth=97 * MiB, peak=160 * MiB), ExitStack() as stack:
        dialled = [stack.enter_context(closing(siege.dial())) for _ in range(8)]
        for connected in dialled:
            connected.settimeout(1)
            with suppress(OSError):
                connected.sendall(siege.head(content_length=30 * MiB) + bytes(20 * MiB))
        assert siege.number("rbm_pending_bytes") <= 97 * MiB
        answers = []
        for connected in dialled:
            connected.settimeout(10)
            with suppress(ConnectionError):
                answers.append(status(connected.recv(4096)))
        assert set(answers) <= {408, 503}
        assert 503 in answers


def test_connections_that_say_nothing(siege: Siege) -> None:
    with siege.unharmed(), ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(closing(siege.dial()))
        siege.works()


def test_a_push_larger_than_the_server_takes_at_once(siege: Siege) -> None:
    """Many frames in one message are scored; more than allowed are refused and the session goes on."""
    with siege.unharmed(), siege.stream() as connected:
        hello(connected)
        session = ask(connected, "open", task=TASK)["session"]
        many = ask(connected, "push", session=session, frames=np.zeros((256, 8, 8, 3), np.uint8))
        assert len(many["progress"]) == 256
        assert ask(connected, "push", session=session, frames=np.zeros((257, 8, 8, 3), np.uint8))["retry"] is False
        assert ask(connected, "push", session=session, frames=np.zeros((8, 8, 3), np.uint8))["context"][-1] == 256
        with suppress(ConnectionClosed):
            connected.send("farewell")
