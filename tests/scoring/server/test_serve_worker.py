"""A worker's answers to what waits for it: one failure does not spread, and each session keeps its order."""

from __future__ import annotations

import socket
from collections import deque

import numpy as np
import pytest

from rbm.scoring.server.pipes import Pipe
from rbm.scoring.server.worker import Request, Worker, device_of

TASK = "open the drawer"


@pytest.fixture
def worker(own):
    ours, theirs = socket.socketpair()
    with ours:
        yield Worker(Pipe(theirs.detach()), own, batch=64, wait=0.0, session_bytes=1 << 30)


def request(number: int, op: str, frames: np.ndarray | None = None, **fields: object) -> Request:
    parts = [] if frames is None else [bytearray(frames.tobytes())]
    if op == "push":
        fields["shape"] = frames.shape
    elif frames is not None:
        fields |= {"clips": [{"shape": frames.shape, "decoded": None}], "every": fields.get("every")}
    return Request({"id": number, "op": op, **fields}, parts)


def answers(found: list[dict]) -> dict[int, dict]:
    assert len({answer["id"] for answer in found}) == len(found)
    return {answer["id"]: answer for answer in found}


def test_one_push_that_fails_leaves_the_others_alone(worker, own, clip_of):
    frames = clip_of(1, 12)
    opened = answers(worker._advance([request(n, "open", session=n, task=TASK) for n in (1, 2)]))
    assert not any("error" in answer for answer in opened.values())
    found = answers(
        worker._advance(
            [
                request(3, "push", frames[:1], session=1),
                request(4, "push", frames[:1], session=99),
                request(5, "push", np.zeros((1, 8, 8, 2), np.uint8), session=2),
                request(6, "push", frames[:2], session=2),
                request(7, "push", frames[1:3], session=1),
            ]
        )
    )
    assert found[4]["code"] == "unknown_session"
    assert "shape" in found[5]["error"]
    alone = own.stream(TASK)
    expected = [score.progress for score in alone.push_many(frames[:3])]
    assert found[3]["progress"] + found[7]["progress"] == pytest.approx(expected, abs=1e-5)
    assert found[6]["progress"] == pytest.approx(expected[:2], abs=1e-5)
    assert found[7]["context"] == [0, 1, 2]


def test_a_long_clip_holds_up_no_session(worker, own, clip_of):
    frames = clip_of(1, 200)
    written = []
    worker.pipe.write = lambda message: written.extend(message["answers"])

    def turn(*requests: Request) -> dict[int, dict]:
        written.clear()
        for waiting in requests:
            worker._come.put(waiting)
        worker.turn()
        return answers(written)

    turn(request(1, "open", session=1, task=TASK), request(2, "score", frames, task=TASK, every=1))
    for number in (3, 4, 5):  # 200 frames are four pieces of at most 64: a turn of the session after each
        assert turn(request(number, "push", frames[:1], session=1)).keys() == {number}
    scores = turn()[2]["scores"][0]
    np.testing.assert_allclose(scores["progress"], own.score(frames, TASK, every=1).progress, atol=1e-5)


def test_what_a_session_is_told_between_pushes_stands_between_them(worker, own, clip_of):
    frames = clip_of(2, 10)
    found = answers(
        worker._advance(
            [
                request(1, "open", session=1, task=TASK),
                request(2, "push", frames[:3], session=1),
                request(3, "fork", session=2, **{"from": 1}),
                request(4, "push", frames[3:5], session=1),
                request(5, "push", frames[5:7], session=2),
                request(6, "reset", session=1, task="close the drawer"),
                request(7, "push", frames[:2], session=1),
                request(8, "close", session=1),
                request(9, "push", frames[:1], session=1),
            ]
        )
    )
    one, two = own.stream(TASK), own.stream(TASK)
    one.push_many(frames[:3])
    two.push_many(frames[:3])
    assert found[4]["progress"] == pytest.approx([s.progress for s in one.push_many(frames[3:5])], abs=1e-5)
    assert found[5]["progress"] == pytest.approx([s.progress for s in two.push_many(frames[5:7])], abs=1e-5)
    other = own.stream("close the drawer")
    assert found[7]["progress"] == pytest.approx([s.progress for s in other.push_many(frames[:2])], abs=1e-5)
    assert found[9]["code"] == "unknown_session"
    assert len(worker.pool) == 1


def test_one_clip_that_fails_leaves_the_others_alone(worker, own, clip_of):
    good = clip_of(1, 9)
    found = answers(
        worker._look(
            [
                request(1, "score", good, task=TASK),
                request(2, "score", np.zeros((2, 8, 8, 2), np.uint8), task=TASK),
                request(3, "score", good, task="   "),
            ]
        )
    )
    assert found[1]["scores"][0]["progress"] == pytest.approx(own.score(good, TASK).progress.tolist(), abs=1e-5)
    for number in (2, 3):
        assert found[number]["error"]
        assert found[number]["status"] == 400


def test_long_clips_take_turns_and_hold_nobody_up(worker, own, clip_of):
    long, short = clip_of(3, 150), clip_of(4, 9)
    for number, clip, task in ((1, long, TASK), (2, short, TASK), (3, short, "  "), (4, long, TASK)):
        worker._sort(request(number, "score", clip, task=task, every=2))
    written = []
    worker.pipe.write = lambda message: written.append([answer["id"] for answer in message["answers"]])
    for _ in range(20):
        worker._go_on()
    # 150 frames are three pieces of at most 64, and one more call says that there is no other
    order = [number for ids in written for number in ids]
    assert order == [3, 2, 1, 4]
    assert not worker._long


def test_a_batch_is_bounded_in_requests_and_frames(worker):
    waiting = deque(request(n, "push", np.zeros((400, 1, 1, 3), np.uint8), session=1) for n in range(10))
    assert len(worker._take(waiting)) == 3
    worker.batch = 2
    assert len(worker._take(waiting)) == 2
    assert len(waiting) == 5


def test_without_a_gpu_the_device_is_as_told():
    assert device_of("cpu", 3) == "cpu"
