"""Live sessions over a websocket: equal to sessions in this process, whoever else pushes at the time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from running import Running, ask, hello, serving, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from rbm.scoring import Session, wire

TASK = "open the drawer"
NAMES = ("progress", "progress_std", "success")


def sessions(server: Running) -> int:
    (worker,) = server.get("/gpu_status").json()["workers"]
    return int(worker["sessions"]["sessions"])


def pushed(answer: dict, session: Session, frames: np.ndarray) -> None:
    """The answer is what the session in this process says."""
    assert "error" not in answer, answer
    scores = session.push_many(frames)
    for name in NAMES:
        assert answer[name].dtype == np.float32
        np.testing.assert_allclose(answer[name], [getattr(score, name) for score in scores], atol=2e-5)
    assert answer["context"].tolist() == session.context.tolist()


def test_pushes_equal_those_in_process_across_doublings(server, own, clip_of):
    frames, alone = clip_of(1, 30), own.stream(TASK)
    with server.stream() as socket:
        assert hello(socket)["context_frames"] == 6
        session = ask(socket, "open", task=TASK)["session"]
        for t, frame in enumerate(frames[:20]):
            pushed(ask(socket, "push", t, session=session, frames=frame), alone, frame[None])
        pushed(ask(socket, "push", session=session, frames=frames[20:]), alone, frames[20:])
        assert ask(socket, "close", session=session) == {"id": 1}
        until(lambda: sessions(server) == 0)


def test_sessions_and_a_long_clip_at_once(server, own, clip_of):
    frames = np.tile(clip_of(1, 40), (50, 1, 1, 1))  # 2,000 frames, each of which is scored
    alone = own.stream(TASK)
    with server.stream() as socket, ThreadPoolExecutor(1) as pool:
        hello(socket)
        session = ask(socket, "open", task=TASK)["session"]
        scoring = pool.submit(server.post, "/v1/score", {"clips": [{"frames": frames, "task": TASK}], "every": 1})
        for frame in frames:
            pushed(ask(socket, "push", session=session, frames=frame), alone, frame[None])
            if scoring.done():
                break
        (scores,) = wire.unpack(scoring.result().content)["scores"]
    np.testing.assert_allclose(scores["progress"], own.score(frames, TASK, every=1).progress, atol=2e-5)


def test_fork_reset_snapshot_restore(server, own, clip_of):
    frames, alone = clip_of(2, 24), own.stream(TASK)
    with server.stream() as socket:
        hello(socket)
        session = ask(socket, "open", task=TASK)["session"]
        pushed(ask(socket, "push", session=session, frames=frames[:10]), alone, frames[:10])
        fork = ask(socket, "fork", session=session)["session"]
        snapshot = ask(socket, "snapshot", session=session)["snapshot"]
        restored = ask(socket, "restore", snapshot=snapshot)["session"]
        assert len({session, fork, restored}) == 3
        ahead = alone.fork()
        pushed(ask(socket, "push", session=fork, frames=frames[15:20]), ahead, frames[15:20])
        again = alone.fork()
        pushed(ask(socket, "push", session=restored, frames=frames[10:13]), again, frames[10:13])
        pushed(ask(socket, "push", session=session, frames=frames[10:12]), alone, frames[10:12])
        ask(socket, "reset", session=session, task="close the drawer")
        other = own.stream("close the drawer")
        pushed(ask(socket, "push", session=session, frames=frames[:2]), other, frames[:2])
        ask(socket, "reset", session=session)
        other.reset()
        pushed(ask(socket, "push", session=session, frames=frames[3:5]), other, frames[3:5])


def test_requests_of_a_session_keep_their_order_without_waiting(server, own, clip_of):
    frames, alone = clip_of(3, 12), own.stream(TASK)
    with server.stream() as socket:
        hello(socket)
        session = ask(socket, "open", task=TASK)["session"]
        asked = [
            {"op": "push", "session": session, "frames": frames[:4]},
            {"op": "reset", "session": session, "task": "close the drawer"},
            {"op": "push", "session": session, "frames": frames[4:8]},
            {"op": "snapshot", "session": session},
            {"op": "push", "session": session, "frames": frames[8:]},
            {"op": "close", "session": session},
            {"op": "push", "session": session, "frames": frames[8:]},
        ]
        for number, message in enumerate(asked):
            socket.send(wire.pack({"id": number, **message}))
        answers = {answer["id"]: answer for answer in (wire.unpack(socket.recv(timeout=10)) for _ in asked)}
        pushed(answers[0], alone, frames[:4])
        other = own.stream("close the drawer")
        pushed(answers[2], other, frames[4:8])
        snapshot = other.snapshot()
        assert answers[3]["snapshot"] == snapshot
        pushed(answers[4], other, frames[8:])
        assert answers[6]["code"] == "unknown_session"


def test_many_clients_at_once_each_get_their_own(server, own, clip_of):
    """Pushed without waiting for answers, frames of other sizes and tasks besides."""

    def one(seed: int) -> None:
        frames = clip_of(seed, 15, 40 + 8 * (seed % 3), 56)
        task = f"task {seed % 4}"
        with server.stream() as socket:
            hello(socket)
            session = ask(socket, "open", task=task)["session"]
            for t, frame in enumerate(frames):
                socket.send(wire.pack({"id": t, "op": "push", "session": session, "frames": frame}))
            answers = [wire.unpack(socket.recv(timeout=30)) for _ in frames]
        assert [answer["id"] for answer in answers] == list(range(15)), "answers of a session in another order"
        scores = own.stream(task).push_many(frames)
        found = [float(answer["progress"][0]) for answer in answers]
        assert found == pytest.approx([score.progress for score in scores], abs=2e-5)

    before = server.number("rbm_batch_requests_count"), server.number("rbm_batch_requests_sum")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(32)))
    batches = server.number("rbm_batch_requests_count") - before[0]
    assert batches < (server.number("rbm_batch_requests_sum") - before[1]) / 2, "hardly anything was answered together"
    until(lambda: sessions(server) == 0)


def test_sessions_of_one_socket_are_no_others(server, clip_of):
    frame = clip_of(1, 1)[0]
    with server.stream() as one, server.stream() as two:
        hello(one), hello(two)
        session = ask(one, "open", task=TASK)["session"]
        for op, fields in (("push", {"frames": frame}), ("fork", {}), ("reset", {}), ("close", {}), ("snapshot", {})):
            answer = ask(two, op, session=session, **fields)
            assert (answer["code"], answer["retry"]) == ("unknown_session", False)
        assert "error" not in ask(one, "push", session=session, frames=frame)


@pytest.mark.parametrize("clean", [True, False])
def test_a_client_that_vanishes_leaves_no_session(server, clip_of, clean):
    before = sessions(server)
    socket = server.stream(max_queue=None)
    hello(socket)
    opened = [ask(socket, "open", task=TASK)["session"] for _ in range(5)]
    for frame in clip_of(1, 10):
        for session in opened:
            socket.send(wire.pack({"id": 1, "op": "push", "session": session, "frames": frame}))
    assert sessions(server) == before + 5
    if clean:
        socket.close()
    else:
        socket.socket.close()  # no closing handshake, answers unread
    until(lambda: sessions(server) == before)
    until(lambda: server.number("rbm_websockets") == 0)
    assert server.number("rbm_waiting_requests") == 0


FRAME = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "op must be one of"),
        ({"op": "explode"}, "op must be one of"),
        ({"op": np.zeros(3)}, "op must be one of"),
        ({"op": "open"}, "text"),
        ({"op": "open", "task": 3}, "text"),
        ({"op": "open", "task": "  "}, "empty"),
        ({"op": "open", "task": "x" * 2001}, "2001 characters"),
        ({"op": "open", "task": TASK, "path": "/etc/passwd"}, "'path'"),
        ({"op": "push", "session": 0, "frames": FRAME}, "no such session"),
        ({"op": "push", "session": "1", "frames": FRAME}, "no such session"),
        ({"op": "push", "session": np.zeros(1, np.int64), "frames": FRAME}, "no such session"),
        ({"op": "push", "session": None}, "uint8"),
        ({"op": "push", "session": None, "frames": [[1]]}, "uint8"),
        ({"op": "push", "session": None, "frames": FRAME.astype(np.float32)}, "float32"),
        ({"op": "push", "session": None, "frames": FRAME[..., :2]}, "(T, H, W, 3)"),
        ({"op": "push", "session": None, "frames": np.zeros((0, 8, 8, 3), np.uint8)}, "at least one"),
        ({"op": "push", "session": None, "frames": np.zeros((8, 0, 3), np.uint8)}, "at least one"),
        ({"op": "push", "session": None, "frames": np.zeros((1, 9000, 3), np.uint8)}, "sides of"),
        ({"op": "push", "session": None, "frames": np.zeros((5000, 1, 1, 3), np.uint8)}, "5000 frames"),
        ({"op": "reset", "session": None, "task": 3}, "text"),
        ({"op": "restore", "snapshot": "text"}, "bytes"),
        ({"op": "restore", "snapshot": b""}, "snapshot"),
        ({"op": "restore", "snapshot": b"\x80\x04K\x01."}, "snapshot"),
        ({"op": "restore", "snapshot": msgpack.packb({"snapshot": 1, "task": TASK})}, "snapshot"),
    ],
)
def test_what_is_wrong_with_a_message_is_said(server, fields, says):
    """`session: None` stands for a session that is there, which goes on unharmed."""
    with server.stream() as socket:
        hello(socket)
        session = ask(socket, "open", task=TASK)["session"]
        if "session" in fields and fields["session"] is None:
            fields = {**fields, "session": session}
        socket.send(wire.pack({"id": 7, **fields}))
        answer = wire.unpack(socket.recv(timeout=10))
        assert answer["id"] == 7
        assert says in answer["error"], answer
        assert answer["code"] in ("bad_request", "unknown_session")
        assert answer["retry"] is False
        assert ask(socket, "push", session=session, frames=FRAME)["context"].tolist() == [0]


def test_what_is_no_message_at_all(server):
    with server.stream() as socket:
        hello(socket)
        for data in (
            "text",
            b"",
            b"\xc1",
            wire.pack([1]),
            wire.pack({"op": "open"}),
            wire.pack({"id": "1"}),
            b"\x93\x01",
        ):
            socket.send(data)
            answer = wire.unpack(socket.recv(timeout=10))
            assert answer["id"] is None
            assert answer["code"] == "bad_request"
        assert "session" in ask(socket, "open", task=TASK)


def test_a_message_that_is_too_long_ends_the_connection(server):
    with server.stream(close_timeout=1) as socket:
        limit = hello(socket)["limits"]["ws_message_bytes"]
        with pytest.raises(ConnectionClosed) as closed:
            ask(socket, "restore", snapshot=bytes(limit))
        # the reason may be lost where the connection is cut in the middle of the message
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
    with server.stream() as socket:
        hello(socket)
        assert "session" in ask(socket, "open", task=TASK)


def test_a_page_of_another_site_gets_no_websocket(server):
    with pytest.raises(InvalidStatus) as refused:
        server.stream(origin="http://evil.example")
    assert refused.value.response.status_code == 403
    with server.stream(origin=server.url) as socket:
        hello(socket)
    with pytest.raises(InvalidStatus) as refused:
        connect("ws" + server.url[4:] + "/v1/nothing")
    assert refused.value.response.status_code in (403, 404)


def test_a_client_that_does_not_read_waits_alone(server, clip_of):
    """Its answers fill the socket and its requests are read no more; others are served, and nothing piles up."""
    frames = clip_of(1, 40, 64, 64)
    slow = server.stream()
    hello(slow)
    session = ask(slow, "open", task=TASK)["session"]
    sent = threading.Event()

    def flood() -> None:
        try:
            for n in range(20_000):
                slow.send(wire.pack({"id": n, "op": "snapshot", "session": session}))
        except ConnectionClosed:
            pass
        sent.set()

    ask(slow, "push", session=session, frames=frames)
    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    with server.stream() as socket:
        hello(socket)
        other = ask(socket, "open", task=TASK)["session"]
        for frame in frames[:10]:
            assert "error" not in ask(socket, "push", session=other, frames=frame)
    assert server.number("rbm_waiting_requests") <= 64
    slow.socket.close()
    assert sent.wait(20)
    until(lambda: sessions(server) == 0)


def test_idle_and_surplus_sessions(tiny, tmp_path, clip_of):
    frame = clip_of(1, 1)[0]
    overrides = "limits.session_seconds=1", "limits.sessions=3"
    with serving(tmp_path / "log", *overrides, checkpoint=tiny) as server, server.stream() as socket:
        hello(socket)
        first = ask(socket, "open", task=TASK)["session"]
        for _ in range(2):
            ask(socket, "open", task=TASK)
        answer = ask(socket, "open", task=TASK)
        assert (answer["code"], answer["retry"]) == ("pool_full", True)
        until(lambda: sessions(server) == 0)
        answer = ask(socket, "push", session=first, frames=frame)
        assert (answer["code"], answer["retry"]) == ("session_lost", True)
        assert "1 s without a request" in answer["error"]
        assert "session" in ask(socket, "open", task=TASK)


def test_a_pool_that_is_full_says_so(tiny, tmp_path, clip_of):
    frames = clip_of(1, 20, 240, 240)
    overrides = ("limits.session_bytes=30000",)
    with serving(tmp_path / "log", *overrides, checkpoint=tiny) as server, server.stream() as socket:
        hello(socket)
        for n in range(200):
            answer = ask(socket, "open", n, task=TASK)
            if "error" in answer:
                break
            ask(socket, "push", session=answer["session"], frames=frames)
        assert (answer["code"], answer["retry"]) == ("pool_full", True)
        assert answer["retry_after"] > 0
