"""The client before servers that behave badly: plain HTTP and websocket servers that each do one thing wrong."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Response
from websockets.sync.server import ServerConnection, serve

from rbm.errors import UserError
from rbm.scoring.client import (
    AsyncClient,
    Client,
    ClientError,
    RequestRefused,
    ServerTimeout,
    ServerUnavailable,
    SessionLost,
)
from rbm.scoring.wire import pack, unpack

FRAME = np.zeros((8, 8, 3), np.uint8)
GONE = "http://127.0.0.1:9"
"""The discard port, where nobody listens."""

Answer = tuple[int, dict[str, str], bytes]


def plain(status: int, value: Any, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()


@contextmanager
def http_server(answers: list[Answer | None]) -> Iterator[tuple[str, list[str]]]:
    """The address of a server that gives these answers in turn, the last for ever (none: it hangs up), and the paths
    that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = answers[min(len(asked), len(answers)) - 1]
            if answer is None:
                self.close_connection = True
                return
            status, headers, body = answer
            time.sleep(float(headers.get("X-Late", 0)))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def peer(
    answer: Callable[[dict[str, Any], ServerConnection], Any],
    limits: dict[str, int] | None = None,
    hello: bytes | str | None = None,
    handshake: Callable[..., Response | None] | None = None,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a server of websockets, and the messages it got. It answers each with what `answer` gives, which
    may be bytes to send as they are, or none for no answer; `open` it answers by itself with the next session."""
    got: list[dict[str, Any]] = []
    greeting = pack({"hello": {"limits": limits or {}}}) if hello is None else hello

    def handle(socket: ServerConnection) -> None:
        try:
            socket.send(greeting)
            for data in socket:
                assert isinstance(data, bytes)
                message = unpack(data)
                got.append(message)
                if message["op"] == "open":
                    said: Any = {"session": sum(other["op"] == "open" for other in got)}
                else:
                    said = answer(message, socket)
                if said is not None:
                    socket.send(said if isinstance(said, bytes) else pack({"id": message["id"], **said}))
        except ConnectionClosed:
            pass

    with serve(handle, "127.0.0.1", 0, process_request=handshake, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.socket.getsockname()[1]}", got
        finally:
            server.shutdown()
            thread.join()


def scored(message: dict[str, Any]) -> dict[str, Any]:
    """The answer to a push; each frame's progress is its first pixel."""
    progress = message["frames"][:, 0, 0, 0].astype(np.float32)
    context = np.arange(len(progress))
    return {"progress": progress, "progress_std": progress * 0, "success": progress * 0, "context": context}


def good(message: dict[str, Any], socket: ServerConnection) -> dict[str, Any]:
    return scored(message) if message["op"] == "push" else {}


def test_nobody_listens():
    with Client(GONE, retries=1) as client:
        for call in (client.info, lambda: client.score(FRAME[None], "go"), lambda: client.stream("go")):
            begin = time.monotonic()
            with pytest.raises(ServerUnavailable, match=r"cannot reach .*rbm serve"):
                call()
            assert time.monotonic() - begin > 0.25
    with Client(GONE, retries=20) as client:  # which would take minutes
        begin = time.monotonic()
        with pytest.raises(ServerUnavailable):
            client.health()
        assert time.monotonic() - begin < 5


def test_a_server_that_is_full_is_tried_again_when_it_says():
    busy = plain(503, {"error": "the queue is full", "retry": True}, **{"Retry-After": "1"})
    with http_server([busy, plain(200, {"model": "tiny"})]) as (url, asked), Client(url) as client:
        begin = time.monotonic()
        assert client.info() == {"model": "tiny"}
        assert time.monotonic() - begin >= 1
        assert asked == ["/model_info"] * 2


def test_a_server_that_stays_full():
    busy = plain(503, {"error": "the queue is full", "retry": True})
    with http_server([busy]) as (url, asked), Client(url, retries=2) as client:
        with pytest.raises(ServerUnavailable, match="the queue is full"):
            client.info()
        assert len(asked) == 3


def test_a_server_that_hangs_up_is_tried_again():
    with http_server([None, plain(200, {"model": "tiny"})]) as (url, asked), Client(url) as client:
        assert client.info() == {"model": "tiny"}
        assert len(asked) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 415, 422, 429])
def test_what_is_refused_is_not_sent_again(status):
    with http_server([plain(status, {"error": "no, because", "retry": False})]) as (url, asked), Client(url) as client:
        with pytest.raises(RequestRefused, match="no, because") as refused:
            client.score(FRAME[None], "go")
        assert refused.value.status == status
        assert asked == ["/v1/score"]


def test_no_answer_in_time():
    with http_server([plain(200, {}, **{"X-Late": "1.5"})]) as (url, asked), Client(url, timeout=0.5) as client:
        with pytest.raises(ServerTimeout, match=r"within 0\.5 s") as late:
            client.info()
        assert isinstance(late.value, TimeoutError)
        assert len(asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"Content-Type": "text/html"}, b"<p>It works!</p>"),
        (200, {"Content-Type": "application/msgpack"}, b"\xdd\xff\xff\xff\xff"),
        plain(200, ["a", "list"]),
        plain(200, {"no": "scores"}),
        plain(200, {"scores": []}),
        plain(200, {"scores": [{"progress": [0.5]}]}),
        plain(200, {"scores": [None]}),
        plain(500, {"error": "it broke"}),
        (502, {}, b"bad gateway"),
    ],
)
def test_something_else_listens(answer):
    with http_server([answer]) as (url, asked), Client(url) as client:
        with pytest.raises(ClientError):
            client.score(FRAME[None], "go")
        assert len(asked) == 1


def test_a_token_goes_to_no_other_server():
    with http_server([plain(200, {})]) as (other, asked_there):
        moved = (307, {"Location": f"{other}/model_info"}, b"")
        with (
            http_server([moved]) as (url, _),
            Client(url, token="secret") as client,
            pytest.raises(ClientError, match="307"),
        ):
            client.info()
        assert asked_there == []


def test_a_full_queue_is_waited_for():
    tries = []

    def answer(message: dict[str, Any], socket: ServerConnection) -> dict[str, Any]:
        tries.append(time.monotonic())
        if len(tries) < 9:  # more often than the client retries what fails
            return {"error": "the queue is full", "code": "queue_full", "retry": True, "retry_after": 0.05}
        return good(message, socket)

    with peer(answer) as (url, got), Client(url, retries=2) as client:
        session = client.stream("go")
        assert session.push(FRAME + 7).progress == 7
        assert [message["op"] for message in got] == ["open"] + ["push"] * 9
        assert min(np.diff(tries)) >= 0.045


def test_a_queue_that_stays_full_and_an_error_that_may_be_retried():
    def answer(message: dict[str, Any], socket: ServerConnection) -> dict[str, Any]:
        code = "queue_full" if message["op"] == "push" else "draining"
        return {"error": f"no: {code}", "code": code, "retry": True, "retry_after": 0.05}

    with peer(answer) as (url, got), Client(url, retries=1, timeout=1) as client:
        session = client.stream("go")
        with pytest.raises(ServerUnavailable, match="queue_full"):
            session.push(FRAME)
        with pytest.raises(ServerUnavailable, match="queue_full"):  # nothing was done: it may be pushed again
            session.push(FRAME)
        with pytest.raises(ServerUnavailable, match="draining"):
            session.reset()
        assert [message["op"] for message in got].count("reset") == 2


def test_a_push_whose_answer_is_lost_is_not_sent_twice():
    def answer(message: dict[str, Any], socket: ServerConnection) -> None:
        socket.close()

    with peer(answer) as (url, got), Client(url) as client:
        session = client.stream("go")
        other = client.stream("go")
        with pytest.raises(SessionLost, match="open a new one"):
            session.push(FRAME)
        assert [message["op"] for message in got] == ["open", "open", "push"]
        for lost in (session, other):
            with pytest.raises(SessionLost, match="open a new one"):
                lost.push(FRAME)
            lost.close()
        client.stream("go")  # on a new connection
        assert [message["op"] for message in got] == ["open", "open", "push", "open"]


def test_a_push_that_is_not_answered_leaves_the_session_in_doubt():
    def answer(message: dict[str, Any], socket: ServerConnection) -> dict[str, Any] | None:
        return None if message["op"] == "push" and message["frames"].max() == 1 else good(message, socket)

    with peer(answer) as (url, got), Client(url, timeout=1) as client:
        session = client.stream("go")
        assert session.push(FRAME + 3).progress == 3
        with pytest.raises(ServerTimeout, match=r"'push' within 1 s"):
            session.push(FRAME + 1)
        for call in (lambda: session.push(FRAME), session.fork, session.snapshot):
            with pytest.raises(SessionLost, match="reset it"):
                call()
        assert [message["op"] for message in got] == ["open", "push", "push"]
        session.reset()
        assert session.push(FRAME + 5).progress == 5


def test_a_cancelled_push_leaves_the_session_in_doubt_and_a_cancelled_open_is_closed():
    async def run(url: str, got: list[dict[str, Any]]) -> None:
        async with AsyncClient(url) as client:
            session = await client.stream("go")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.push(FRAME), 0.1)
            with pytest.raises(SessionLost, match="nobody knows"):
                await session.push(FRAME)
            await session.reset()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.fork(), 0.1)
            end = time.monotonic() + 10
            while got[-1]["op"] != "close" and time.monotonic() < end:
                await asyncio.sleep(0.02)

    def answer(message: dict[str, Any], socket: ServerConnection) -> dict[str, Any] | None:
        if message["op"] == "fork":
            time.sleep(0.3)
            return {"session": 77}
        return None if message["op"] == "push" else {}

    with peer(answer) as (url, got):
        asyncio.run(run(url, got))
    assert [message["op"] for message in got] == ["open", "push", "reset", "fork", "close"]
    assert got[-1]["session"] == 77


def test_a_lost_session_is_lost_for_good():
    def answer(message: dict[str, Any], socket: ServerConnection) -> dict[str, Any]:
        return {"error": "its worker died", "code": "session_lost", "retry": True}

    with peer(answer) as (url, got), Client(url) as client:
        session = client.stream("go")
        for _ in range(2):
            with pytest.raises(SessionLost, match="its worker died; open a new one"):
                session.push(FRAME)
        session.close()
        assert [message["op"] for message in got] == ["open", "push"]


def test_a_worker_that_dies_while_a_session_is_opened():
    said = iter([{"error": "its worker died", "code": "session_lost", "retry": True}, {"session": 4}])

    with peer(lambda message, socket: next(said)) as (url, got), Client(url) as client:
        client.restore(b"snapshot")
        assert [message["op"] for message in got] == ["restore", "restore"]


def test_no_more_questions_at_once_than_the_server_takes():
    waiting: list[dict[str, Any]] = []
    most = []

    def answer(message: dict[str, Any], socket: ServerConnection) -> None:
        """Answers the newest first, when three wait or no more come."""
        waiting.append(message)
        most.append(len(waiting))

        def flush() -> None:
            while waiting:
                asked = waiting.pop()
                socket.send(pack({"id": asked["id"], **scored(asked)}))

        if len(waiting) == 3:
            flush()

    async def run(url: str) -> list[float]:
        async with AsyncClient(url) as client:
            sessions = [await client.stream("go") for _ in range(12)]
            scores = await asyncio.gather(*[s.push(FRAME + i) for i, s in enumerate(sessions)])
            return [score.progress for score in scores]

    with peer(answer, {"ws_in_flight": 3}) as (url, _):
        assert asyncio.run(run(url)) == list(range(12))
    assert max(most) == 3


def test_pushes_of_one_session_keep_their_order():
    refused = []

    def answer(message: dict[str, Any], socket: ServerConnection) -> dict[str, Any]:
        if message["op"] == "push" and len(refused) < 5 and message["frames"].max() % 2:
            refused.append(message)
            return {"error": "the queue is full", "code": "queue_full", "retry": True, "retry_after": 0.02}
        return good(message, socket)

    async def run(url: str) -> None:
        async with AsyncClient(url) as client:
            session = await client.stream("go")
            await asyncio.gather(*[session.push(FRAME + i) for i in range(1, 8)])

    with peer(answer) as (url, got):
        asyncio.run(run(url))
    taken = [m["frames"].max() for m in got if m["op"] == "push" and not any(m is r for r in refused)]
    assert taken == list(range(1, 8))
    assert len(refused) == 5


def test_many_frames_go_in_messages_that_the_server_takes():
    with peer(good, {"ws_message_bytes": 1024 + 1000, "frames": 100}) as (url, got), Client(url) as client:
        session = client.stream("go")
        frames = np.stack([FRAME + i for i in range(12)])
        scores = session.push_many(frames)
        assert [score.progress for score in scores] == list(range(12))
        assert [len(m["frames"]) for m in got if m["op"] == "push"] == [5, 5, 2]
        assert session.push_many(frames[:0]) == []
        with pytest.raises(RequestRefused, match="smaller frames"):
            session.push(np.zeros((30, 30, 3), np.uint8))
        assert session.push(FRAME + 9).progress == 9


def test_half_of_many_frames():
    def answer(message: dict[str, Any], socket: ServerConnection) -> dict[str, Any]:
        if message["op"] == "push" and message["frames"].max() > 6:
            return {"error": "no more", "code": "bad_request", "retry": False}
        return good(message, socket)

    with peer(answer, {"ws_message_bytes": 1024 + 1000}) as (url, _), Client(url) as client:
        session = client.stream("go")
        with pytest.raises(RequestRefused, match="no more"):
            session.push_many(np.stack([FRAME + i for i in range(12)]))
        with pytest.raises(SessionLost, match="nobody knows"):
            session.push(FRAME)
        session.reset()
        with pytest.raises(RequestRefused, match="no more"):
            session.push(FRAME + 7)
        assert session.push(FRAME).progress == 0  # the server said that it took nothing


@pytest.mark.parametrize(
    "said",
    [b"\xc1", b"\x90", b"\x80", b"\x81\xa2id\x90", {"progress": np.zeros(3)}, {"progress": 1}, {}],
    ids=repr,
)
def test_answers_that_make_no_sense(said):
    with peer(lambda message, socket: said) as (url, _), Client(url) as client:
        session = client.stream("go")
        with pytest.raises(ClientError, match=r"read|version"):
            session.push(FRAME)


@pytest.mark.parametrize("hello", ["hello", b"\xc1", b"\x80", pack({"hello": {"limits": {"ws_in_flight": "many"}}})])
def test_greetings_that_make_no_sense(hello):
    with (
        peer(good, hello=hello) as (url, _),
        Client(url) as client,
        pytest.raises(ClientError, match="check the address"),
    ):
        client.stream("go")


def test_a_connection_that_is_refused():
    def handshake(socket: ServerConnection, request: object) -> Response:
        body = json.dumps({"error": "the token is wrong"}).encode()
        return Response(401, "Unauthorized", Headers({"Content-Length": str(len(body))}), body)

    with peer(good, handshake=handshake) as (url, _), Client(url) as client:
        with pytest.raises(RequestRefused, match="the token is wrong") as refused:
            client.stream("go")
        assert refused.value.status == 401


def test_closing_while_others_wait():
    asked = threading.Event()

    def answer(message: dict[str, Any], socket: ServerConnection) -> None:
        asked.set()

    with peer(answer) as (url, _):
        client = Client(url)
        session = client.stream("go")
        errors: list[BaseException] = []

        def push() -> None:
            try:
                session.push(FRAME)
            except ClientError as error:
                errors.append(error)

        thread = threading.Thread(target=push)
        thread.start()
        assert asked.wait(5)
        client.close()
        thread.join(5)
        assert not thread.is_alive()
        assert len(errors) == 1
        client.close()
        session.close()
        for call in (client.info, client.health, lambda: client.stream("go"), lambda: session.push(FRAME)):
            with pytest.raises(ClientError, match="was closed"):
                call()


def test_closing_while_a_retry_waits():
    client = Client(GONE, retries=20)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            client.info()
        except ClientError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.1)
    client.close()
    thread.join(5)
    assert not thread.is_alive()
    assert "closed by another thread" in str(errors[0])


def test_a_client_does_not_live_through_a_fork():
    with Client(GONE) as client:
        child = os.fork()
        if not child:
            try:
                client.health()
            except ClientError as error:
                os._exit(0 if "another process" in str(error) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://[", "", "http://a b"])
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="address"):
        Client(url)


@pytest.mark.parametrize("token", ["", " ", "ä", "a\nb"])
def test_tokens_that_cannot_be_sent(token):
    with pytest.raises(UserError, match="token"):
        Client(token=token)


def test_certificates_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.pem", tmp_path / "wrong.pem"):
        with pytest.raises(UserError, match="cannot read certificates from"):
            Client("https://127.0.0.1", verify=path)
        (tmp_path / "wrong.pem").write_text("no certificate")


@pytest.mark.parametrize(
    "video",
    [
        "nowhere.mp4",
        "http://127.0.0.1/video.mp4",
        ".",
        FRAME,
        FRAME[None].astype(np.float32),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
    ],
)
def test_videos_that_are_none_never_leave_the_computer(video):
    with http_server([plain(200, {})]) as (url, asked), Client(url) as client:
        for call in (
            lambda: client.score(video, "go"),
            lambda: client.score_batch([(FRAME[None], "go")] * 0 + [(video, "go")]),
            lambda: client.compare(video, FRAME[None], "go"),
            lambda: client.rank([FRAME[None], video], "go"),
        ):
            with pytest.raises(UserError):
                call()
        assert asked == []


def test_frames_that_are_none():
    with peer(good) as (url, got), Client(url) as client:
        session = client.stream("go")
        for frame in (FRAME[None], FRAME * 0.5, FRAME[..., 0], [[1]], None, np.zeros((0, 8, 3), np.uint8)):
            with pytest.raises(UserError, match="frame"):
                session.push(frame)
        with pytest.raises(UserError, match="frame"):
            session.push_many(FRAME)
        assert session.push(FRAME).progress == 0
        assert [message["op"] for message in got] == ["open", "push"]
