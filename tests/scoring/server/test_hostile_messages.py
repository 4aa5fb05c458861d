"""Messages that mean harm, over HTTP and the websocket: malformed, mutated, of the wrong kind, of other clients."""

from __future__ import annotations

import json
import struct
from typing import Any

import httpx
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import ask, hello
from siege import TASK, TOKEN, MiB, Siege, named, sentence
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection

from rbm.scoring import wire

FRAMES = np.full((2, 8, 8, 3), 90, np.uint8)
CLIPS = {"clips": [{"frames": FRAMES, "task": TASK}], "every": None, "dense": False}
BOUNDED = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def extension(payload: bytes, code: int = wire.ARRAY) -> bytes:
    return struct.pack(">BIb", 0xC9, len(payload), code) + payload


def array(name: str, shape: Any, raw: bytes) -> bytes:
    """An array as it may be claimed to be."""
    return extension(msgpack.packb([name, shape, raw]))


def clips(frames: bytes) -> bytes:
    """A request whose frames are these bytes of msgpack."""
    return b"\x81\xa5clips\x91\x82\xa6frames" + frames + b"\xa4task" + msgpack.packb(TASK)


ARRAYS = {
    "objects": array("O", [1, 8, 8, 3], bytes(192)),
    "objects by another name": array("object", [1, 8, 8, 3], bytes(192)),
    "a structure": array("u1,u1", [1, 8, 8, 3], bytes(384)),
    "text": array("<U8", [1], bytes(32)),
    "dates": array("datetime64[s]", [1], bytes(8)),
    "a dtype that is code": array("__import__('os')", [1, 8, 8, 3], bytes(192)),
    "floats": array("float32", [1, 8, 8, 3], bytes(768)),
    "shorter than its shape": array("uint8", [1, 8, 8, 3], bytes(191)),
    "longer than its shape": array("uint8", [1, 8, 8, 3], bytes(193)),
    "60000 × 60000": array("uint8", [1, 60000, 60000, 3], bytes(192)),
    "more than there can be": array("uint8", [1 << 62, 1 << 62, 1 << 62, 3], bytes(192)),
    "nothing, very wide": array("uint8", [0, 1 << 62, 1 << 62, 3], b""),
    "minus one": array("uint8", [-1, 8, 8, 3], bytes(192)),
    "a fraction": array("uint8", [1.0, 8, 8, 3], bytes(192)),
    "true": array("uint8", [True, 8, 8, 3], bytes(192)),
    "a shape of words": array("uint8", ["1", "8", "8", "3"], bytes(192)),
    "40 dimensions": array("uint8", [1] * 40, bytes(1)),
    "no shape": array("uint8", None, bytes(192)),
    "one picture": array("uint8", [8, 8, 3], bytes(192)),
    "no pixel": array("uint8", [1, 0, 8, 3], b""),
    "two colours": array("uint8", [1, 8, 8, 2], bytes(128)),
    "257 frames": array("uint8", [257, 1, 1, 3], bytes(771)),
    "1025 wide": array("uint8", [1, 1, 1025, 3], bytes(3075)),
    "another extension": extension(bytes(192), 7),
    "a pickle": extension(b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "an extension that ends too late": struct.pack(">BIb", 0xC9, 1 << 30, wire.ARRAY) + bytes(100),
    "nil": b"\xc0",
    "text in place of pixels": msgpack.packb("/etc/passwd"),
}
MESSAGES = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "JSON": json.dumps({"clips": []}).encode(),
    "a map that ends too soon": b"\x81",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "a list of 4 billion": b"\xdd\xff\xff\xff\xff",
    "a text of 4 GB": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 GB": b"\xc6\xff\xff\xff\xff",
    "lists in lists": b"\x91" * 100_000 + b"\xc0",
    "maps in maps": b"\x81\xa1a" * 100_000 + b"\xc0",
    "a million nils": b"\xdd" + struct.pack(">I", 1_000_000) + b"\xc0" * 1_000_000,
    "a million empty maps": b"\x81\xa5clips\xdd" + struct.pack(">I", 1_000_000) + b"\x80" * 1_000_000,
    "keys that are numbers": b"\x81\x01\x01",
    "a key twice": b"\x82\xa5clips\x90\xa5clips\x90",
    "more after the end": wire.pack(CLIPS) + b"\xc0",
    "a text that is no text": b"\x81\xa5clips\xa2\xff\xfe",
    "a field too much": wire.pack(CLIPS | {"path": "/etc/passwd"}),
    "clips that are text": wire.pack({"clips": "abc"}),
    "nine clips": wire.pack({"clips": CLIPS["clips"] * 9}),
    "a task that is a number": wire.pack({"clips": [{"frames": FRAMES, "task": 3}]}),
    "a task of a megabyte": wire.pack({"clips": [{"frames": FRAMES, "task": "x" * MiB}]}),
    "an endless every": wire.pack(CLIPS | {"every": 1 << 63}),
    "every none of the frames": wire.pack(CLIPS | {"every": 0}),
    "every that is true": wire.pack(CLIPS | {"every": True}),
} | {f"frames: {name}": clips(raw) for name, raw in ARRAYS.items()}


def test_messages_that_are_no_requests(siege: Siege) -> None:
    with siege.unharmed():
        for name, message in MESSAGES.items():
            for path in ("/v1/score", "/v1/compare", "/v1/rank"):
                with named(f"{name}, {path}"):
                    sentence(siege.msgpack(path, message), 400, 413)


def test_messages_that_are_none_of_a_session(siege: Siege) -> None:
    with siege.unharmed(), siege.stream() as socket:
        hello(socket)
        for name, message in MESSAGES.items():
            with named(name):
                socket.send(message)
                refused(wire.unpack(socket.recv(timeout=20)))
                still_serves(socket)


def test_a_push_of_something_else(siege: Siege) -> None:
    with siege.unharmed(), siege.stream() as socket:
        hello(socket)
        session = ask(socket, "open", task=TASK)["session"]
        push = b"\x84\xa2id\x07\xa2op\xa4push\xa7session" + msgpack.packb(session) + b"\xa6frames"
        for name, raw in ARRAYS.items():
            if name == "one picture":  # a push may be that
                continue
            with named(name):
                socket.send(push + raw)
                refused(wire.unpack(socket.recv(timeout=20)))
                assert len(ask(socket, "push", session=session, frames=FRAMES)["progress"]) == 2


def refused(answer: dict[str, Any]) -> None:
    """The answer to a message on a websocket is an error, and says what to do."""
    assert set(answer) == {"id", "error", "code", "retry"}, answer
    assert answer["error"]
    assert answer["code"] in ("bad_request", "unknown_session")
    assert answer["retry"] is False


def still_serves(socket: ClientConnection) -> None:
    session = ask(socket, "open", 11, task=TASK)["session"]
    assert len(ask(socket, "push", 12, session=session, frames=FRAMES)["progress"]) == 2
    ask(socket, "close", 13, session=session)


OPS: dict[str, dict[str, Any]] = {
    "no id": {"op": "open", "task": TASK},
    "an id that is text": {"id": "a", "op": "open", "task": TASK},
    "an id that is true": {"id": True, "op": "open", "task": TASK},
    "no op": {"id": 1, "task": TASK},
    "an op that there is not": {"id": 1, "op": "__class__"},
    "an op that is a list": {"id": 1, "op": ["open"]},
    "no task": {"id": 1, "op": "open"},
    "a task of spaces": {"id": 1, "op": "open", "task": "  "},
    "a task that is too long": {"id": 1, "op": "open", "task": "x" * 2001},
    "a field too much": {"id": 1, "op": "open", "task": TASK, "path": "/etc/passwd"},
    "a push to nobody": {"id": 1, "op": "push", "session": 1 << 40, "frames": FRAMES},
    "a push to minus one": {"id": 1, "op": "push", "session": -1, "frames": FRAMES},
    "a push to a text": {"id": 1, "op": "push", "session": "1", "frames": FRAMES},
    "a push to a list": {"id": 1, "op": "push", "session": [1], "frames": FRAMES},
    "a push without frames": {"id": 1, "op": "push", "session": 1},
    "a fork of nobody": {"id": 1, "op": "fork", "session": 1 << 40},
    "a reset of nobody": {"id": 1, "op": "reset", "session": 1 << 40},
    "a close of nobody": {"id": 1, "op": "close", "session": 1 << 40},
    "a snapshot of nobody": {"id": 1, "op": "snapshot", "session": 1 << 40},
    "no snapshot": {"id": 1, "op": "restore"},
    "a snapshot that is text": {"id": 1, "op": "restore", "snapshot": "/etc/passwd"},
    "a snapshot that is empty": {"id": 1, "op": "restore", "snapshot": b""},
    "a snapshot that is noise": {"id": 1, "op": "restore", "snapshot": bytes(range(256)) * 40},
    "a snapshot that is a pickle": {"id": 1, "op": "restore", "snapshot": b"\x80\x04cos\nsystem\n(S'true'\ntR."},
}


def test_ops_that_cannot_be(siege: Siege) -> None:
    with siege.unharmed(), siege.stream() as socket:
        hello(socket)
        for name, fields in OPS.items():
            with named(name):
                socket.send(wire.pack(fields))
                refused(wire.unpack(socket.recv(timeout=20)))
                socket.send(json.dumps({"id": 1, "op": "open", "task": TASK}))  # text, which is no msgpack
                refused(wire.unpack(socket.recv(timeout=20)))
        still_serves(socket)


def test_sessions_of_another_client(siege: Siege) -> None:
    """They are there, but not for this one, whatever it asks for."""
    with siege.unharmed(), siege.stream() as owner, siege.stream() as thief:
        hello(owner), hello(thief)
        session = ask(owner, "open", task=TASK)["session"]
        before = ask(owner, "push", session=session, frames=siege.frames[:3])["progress"]
        for op, more in (
            ("push", {"frames": FRAMES}),
            ("fork", {}),
            ("reset", {}),
            ("reset", {"task": "another"}),
            ("snapshot", {}),
            ("close", {}),
        ):
            answer = ask(thief, op, session=session, **more)
            assert answer["code"] == "unknown_session"
            refused(answer)
        after = ask(owner, "push", session=session, frames=siege.frames[3:])["progress"]
        np.testing.assert_allclose([*before, *after], siege.progress, atol=1e-5)


def test_a_session_that_is_closed_is_gone(siege: Siege) -> None:
    with siege.unharmed(), siege.stream() as socket:
        hello(socket)
        session = ask(socket, "open", task=TASK)["session"]
        ask(socket, "close", session=session)
        for op in ("close", "fork", "snapshot"):
            assert ask(socket, op, session=session)["code"] == "unknown_session"


def test_a_wrong_token(siege: Siege) -> None:
    url, body, kind = siege.server.url, wire.pack(CLIPS), {"content-type": "application/msgpack"}
    with siege.unharmed():
        for given in ("", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN):
            headers = {"authorization": given} if given else {}
            for answer in (
                httpx.post(f"{url}/v1/score", headers=headers | kind, content=body),
                httpx.post(f"{url}/v1/score", headers=headers, files={"video": b"x"}, data={"task": TASK}),
                httpx.post(f"{url}/evaluate_batch", headers=headers, json={"samples": []}),
                httpx.post(f"{url}/evaluate_batch_npy", headers=headers, files={"f": b"x"}),
                *(httpx.get(url + path, headers=headers) for path in ("/metrics", "/model_info", "/gpu_status")),
            ):
                assert "Authorization: Bearer" in sentence(answer, 401)
                assert ("wants another token" in sentence(answer, 401)) == (" " in given)
                assert answer.headers["www-authenticate"] == "Bearer"
            assert httpx.get(f"{url}/health", headers=headers).status_code == 200
            with pytest.raises(InvalidStatus) as caught, siege.server.stream(additional_headers=headers):
                pass
            assert caught.value.response.status_code == 401


def test_a_message_larger_than_allowed_ends_the_connection(siege: Siege) -> None:
    with siege.unharmed(), siege.stream() as socket:
        hello(socket)
        session = ask(socket, "open", task=TASK)["session"]
        frames = np.zeros((2, 1000, 1000, 3), np.uint8)
        with pytest.raises(ConnectionClosed):
            ask(socket, "push", session=session, frames=frames)


def mutated(message: bytes) -> st.SearchStrategy[bytes]:
    """The message with bytes changed, left out, put in, repeated."""
    place = st.integers(0, len(message) - 1)
    edit = st.one_of(
        st.tuples(st.just("set"), place, st.integers(0, 255)),
        st.tuples(st.just("cut"), place, st.integers(1, 40)),
        st.tuples(st.just("put"), place, st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("end"), place, st.none()),
    )

    def apply(edits: list[tuple[str, int, Any]]) -> bytes:
        data = bytearray(message)
        for kind, at, value in edits:
            if kind == "set" and at < len(data):
                data[at] = value
            elif kind == "cut":
                del data[at : at + value]
            elif kind == "put":
                data[at:at] = value
            else:
                del data[at:]
        return bytes(data)

    return st.lists(edit, min_size=1, max_size=4).map(apply)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.just(FRAMES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def fields(*names: str) -> st.SearchStrategy[bytes]:
    """Maps with these fields, or not, and anything in them."""
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, VALUES)).map(wire.pack)


def test_mutated_requests(siege: Siege) -> None:
    small = wire.pack({"clips": [{"frames": FRAMES[:, :2, :2], "task": "go"}], "every": 1, "dense": True})
    pair = wire.pack({"a": FRAMES[:, :2, :2], "b": FRAMES[:1, :2, :2], "task": "go"})
    rank = wire.pack({"videos": [FRAMES[:, :2, :2]] * 2, "task": "go"})
    requests = st.one_of(
        st.tuples(st.just("/v1/score"), mutated(small) | fields("clips", "every", "dense")),
        st.tuples(st.just("/v1/compare"), mutated(pair) | fields("a", "b", "task")),
        st.tuples(st.just("/v1/rank"), mutated(rank) | fields("videos", "task")),
    )
    headers = siege.token | {"content-type": "application/msgpack"}
    with siege.unharmed(), httpx.Client(base_url=siege.server.url, headers=headers, timeout=20) as client:

        @BOUNDED
        @given(requests)
        def send(request: tuple[str, bytes]) -> None:
            answer = client.post(request[0], content=request[1])
            if answer.status_code != 200:
                sentence(answer, 400, 413)

        send()


def test_mutated_json(siege: Siege) -> None:
    sample = {"sample_type": "progress", "trajectory": {"frames": FRAMES[:1, :1, :2].tolist(), "task": "go"}}
    body = json.dumps({"samples": [sample], "use_frame_steps": False}).encode()
    with siege.unharmed(), httpx.Client(base_url=siege.server.url, headers=siege.token, timeout=20) as client:

        @BOUNDED
        @given(mutated(body))
        def send(content: bytes) -> None:
            answer = client.post("/evaluate_batch", content=content, headers={"content-type": "application/json"})
            if answer.status_code != 200:
                sentence(answer, 400, 413)

        send()


JSON = [
    b"",
    b"{",
    b"[" * 100_000,
    b'{"samples":' * 50_000,
    b'{"samples": [' + b"[]," * 1_000_000 + b"[]]}",
    b'{"samples": ' + b"9" * 100_000 + b"}",
    b'{"samples": [NaN]}',
    b'\xff\xfe{"samples": []}',
    b'{"samples": "\xff"}',
    b'{"samples": [{"sample_type": "progress", "trajectory": {"frames": [[[[1e999]]]], "task": "x"}}]}',
    b'{"samples": [{"sample_type": "progress", "trajectory": {"frames": [[[[0,0,0]]]], "task": "\\ud800"}}]}',
]


def test_json_that_is_no_request(siege: Siege) -> None:
    with siege.unharmed():
        for number, body in enumerate(JSON):
            with named(f"{number}: {body[:40]!r}"):
                sentence(siege.post("/evaluate_batch", {"content-type": "application/json"}, content=body), 400, 413)
                sentence(siege.post("/evaluate_batch_npy", files={"sample_0": (None, body)}), 400, 413)


def test_mutated_messages_of_sessions(siege: Siege) -> None:
    """Whatever comes, the connection stays and the next message is served."""
    with siege.unharmed(), siege.stream() as socket:
        hello(socket)
        session = ask(socket, "open", task=TASK)["session"]
        ask(socket, "push", session=session, frames=FRAMES)
        push = wire.pack({"id": 5, "op": "push", "session": session, "frames": FRAMES[:, :2, :2]})
        snapshot = ask(socket, "snapshot", session=session)["snapshot"]
        restore = wire.pack({"id": 6, "op": "restore", "snapshot": snapshot})
        others = st.sampled_from(["open", "push", "fork", "reset", "close", "snapshot", "restore"])
        free = st.fixed_dictionaries(
            {"id": VALUES, "op": others},
            optional={"session": st.just(session) | VALUES, "task": VALUES, "frames": VALUES, "snapshot": VALUES},
        )

        @BOUNDED
        @given(mutated(push) | mutated(restore) | free.map(wire.pack))
        def send(message: bytes) -> None:
            socket.send(message)
            answer = wire.unpack(socket.recv(timeout=20))
            if "error" in answer:
                assert answer["code"] in ("bad_request", "unknown_session", "pool_full"), answer
            if "session" in answer:
                ask(socket, "close", 9, session=answer["session"])

        send()
        still_serves(socket)


def test_damaged_snapshots(siege: Siege) -> None:
    """A snapshot comes back from a client: it is as little to be trusted as a video."""
    random = np.random.default_rng(0)
    with siege.unharmed(), siege.stream() as socket:
        hello(socket)
        session = ask(socket, "open", task=TASK)["session"]
        ask(socket, "push", session=session, frames=siege.frames)
        snapshot = ask(socket, "snapshot", session=session)["snapshot"]
        for _ in range(200):
            damaged = bytearray(snapshot)
            for place in random.integers(0, len(snapshot), 1 + int(random.integers(4))):
                damaged[place] = random.integers(256)
            if random.random() < 0.2:
                damaged = damaged[: int(random.integers(len(damaged)))]
            answer = ask(socket, "restore", 7, snapshot=bytes(damaged))
            if "error" in answer:
                assert answer["code"] == "bad_request", answer
            else:
                said = ask(socket, "push", 8, session=answer["session"], frames=FRAMES)
                assert "progress" in said or said["code"] == "bad_request", said
                ask(socket, "close", 9, session=answer["session"])
