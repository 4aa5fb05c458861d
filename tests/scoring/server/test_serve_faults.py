"""What goes wrong while a server runs: processes that die or hang, and being told to end."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from signal import SIGABRT, SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM

import httpx
import numpy as np
import pytest
import watch
from running import Running, ask, command, hello, serving, until

from rbm.scoring import wire

TASK = "open the drawer"
FRAME = np.zeros((8, 8, 3), np.uint8)
CLIP = {"clips": [{"frames": FRAME[None], "task": TASK}]}


def healthy(server: Running, workers: int = 1) -> bool:
    return bool(server.get("/health").json()["workers_ready"] == workers)


def test_a_worker_that_is_killed(tiny, tmp_path, own, clip_of):
    """Its clients are told to come again and can; those of the other worker notice nothing."""
    frames = clip_of(1, 12)
    alone = [float(score.progress) for score in own.stream(TASK).push_many(frames)]
    with serving(tmp_path / "log", "workers=2", checkpoint=tiny) as server, server.stream() as stream:
        hello(stream)
        opened = [ask(stream, "open", task=TASK)["session"] for _ in range(4)]
        for session in opened:
            ask(stream, "push", session=session, frames=frames[:6])
        snapshot = ask(stream, "snapshot", session=opened[0])["snapshot"]
        victim = server.child("worker")
        os.kill(victim, SIGSTOP)
        for number, session in enumerate(opened):
            stream.send(wire.pack({"id": number, "op": "push", "session": session, "frames": frames[6]}))
        answers = [wire.unpack(stream.recv(timeout=20)) for _ in range(2)]  # of the worker that runs
        os.kill(victim, SIGKILL)
        answers += [wire.unpack(stream.recv(timeout=20)) for _ in range(2)]
        lost = [opened[answer["id"]] for answer in answers if "error" in answer]
        kept = [opened[answer["id"]] for answer in answers if "error" not in answer]
        assert (len(lost), len(kept)) == (2, 2)
        for answer in answers:
            if "error" in answer:
                assert (answer["code"], answer["retry"]) == ("session_lost", True)
            else:
                assert float(answer["progress"][0]) == pytest.approx(alone[6], abs=1e-5)
        # while it starts again, and after
        for n, frame in enumerate(frames[7:9]):
            for session in kept:
                answer = ask(stream, "push", session=session, frames=frame)
                assert float(answer["progress"][0]) == pytest.approx(alone[7 + n], abs=1e-5)
            until(lambda: healthy(server, 2))
        for session in lost:
            answer = ask(stream, "push", session=session, frames=FRAME)
            assert (answer["code"], answer["retry"]) == ("session_lost", True)
            assert "error" not in ask(stream, "close", session=session)
        again = ask(stream, "restore", snapshot=snapshot)["session"]
        answer = ask(stream, "push", session=again, frames=frames[6])
        assert float(answer["progress"][0]) == pytest.approx(alone[6], abs=1e-5)
        assert server.child("worker") != victim
        assert (
            server.number('rbm_restarts_total{process="worker 0"}')
            + server.number('rbm_restarts_total{process="worker 1"}')
            == 1
        )


def test_a_request_whose_worker_is_killed(tiny, tmp_path):
    with serving(tmp_path / "log", checkpoint=tiny) as server, ThreadPoolExecutor(1) as pool:
        victim = server.child("worker")
        os.kill(victim, SIGSTOP)
        waiting = pool.submit(server.post, "/v1/score", CLIP)
        until(lambda: server.number("rbm_waiting_requests") == 1)
        os.kill(victim, SIGKILL)
        done = waiting.result()
        assert done.status_code == 503
        assert done.headers["retry-after"]
        assert wire.unpack(done.content)["retry"] is True
        while not healthy(server):  # nobody answers yet, and that is said
            done = server.post("/v1/score", CLIP)
            assert done.status_code in (200, 503)
        assert server.post("/v1/score", CLIP).status_code == 200


def test_a_worker_that_hangs_is_started_again(tiny, tmp_path):
    with serving(tmp_path / "log", "limits.stuck_seconds=1", checkpoint=tiny) as server:
        os.kill(server.child("worker"), SIGSTOP)
        assert server.post("/v1/score", CLIP).status_code == 503
        until(lambda: healthy(server))
        assert server.post("/v1/score", CLIP).status_code == 200


def test_an_answer_that_takes_too_long(tiny, tmp_path):
    with serving(tmp_path / "log", "limits.request_seconds=1", checkpoint=tiny) as server, server.stream() as stream:
        hello(stream)
        worker = server.child("worker")
        os.kill(worker, SIGSTOP)
        done = server.post("/v1/score", CLIP)
        assert (done.status_code, wire.unpack(done.content)["retry"]) == (503, True)
        assert ask(stream, "open", task=TASK)["retry"] is True
        os.kill(worker, SIGCONT)
        assert server.post("/v1/score", CLIP).status_code == 200
        (device,) = server.get("/gpu_status").json()["workers"]
        assert device["sessions"]["sessions"] == 0, "the session that nobody was told of is still there"


def test_a_decoder_that_hangs_or_dies(tiny, tmp_path, video_path):
    video = {"files": {"video": video_path.read_bytes()}, "data": {"task": TASK}}
    with serving(tmp_path / "log", "limits.decode_seconds=1", checkpoint=tiny) as server:
        first = server.child("decoder")
        os.kill(first, SIGSTOP)
        done = server.post("/v1/score", **video)
        assert (done.status_code, "longer than 1 s" in done.json()["error"]) == (413, True)
        assert server.post("/v1/score", **video).status_code == 200
        assert server.child("decoder") != first
        for number, status in ((SIGKILL, 503), (SIGABRT, 400)):
            with ThreadPoolExecutor(2) as pool:
                victim = server.child("decoder")
                os.kill(victim, SIGSTOP)
                waiting = [pool.submit(server.post, "/v1/score", **video) for _ in range(2)]
                until(lambda: server.number("rbm_waiting_requests") == 2)
                os.kill(victim, number)
                if number != SIGKILL:
                    os.kill(victim, SIGCONT)
                found = sorted(done.result().status_code for done in waiting)
            assert found == [200, status], "the one that was being decoded fails, the next does not"
        assert server.number('rbm_restarts_total{process="decoder"}') == 3


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_being_told_to_end_answers_what_was_let_in(tiny, tmp_path, number):
    with serving(tmp_path / "log", checkpoint=tiny) as server, server.stream() as stream:
        hello(stream)
        session = ask(stream, "open", task=TASK)["session"]
        children = watch.tree(server.pid)[1:]
        worker = server.child("worker")
        with ThreadPoolExecutor(1) as pool:
            os.kill(worker, SIGSTOP)
            waiting: Future[httpx.Response] = pool.submit(server.post, "/v1/score", CLIP)
            stream.send(wire.pack({"id": 5, "op": "push", "session": session, "frames": FRAME}))
            until(lambda: server.number("rbm_waiting_requests") == 2)
            server.process.send_signal(number)
            until(lambda: server.get("/health").json()["status"] == "draining")
            health = server.get("/health")
            assert health.status_code == 503
            done = server.post("/v1/score", CLIP)
            assert (done.status_code, wire.unpack(done.content)["retry"]) == (503, True)
            answer = ask(stream, "push", session=session, frames=FRAME)
            assert (answer["code"], answer["retry"]) == ("draining", True)
            time.sleep(0.2)
            assert server.process.poll() is None
            os.kill(worker, SIGCONT)
            assert waiting.result().status_code == 200
        assert "error" not in wire.unpack(stream.recv(timeout=10))
        assert server.process.wait(20) == 0
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children))
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_draining_ends_in_time_and_at_once_when_told_twice(tiny, tmp_path):
    for overrides, signals in ((["drain_seconds=0.5"], 1), (["drain_seconds=600"], 2)):
        with serving(tmp_path / "log", *overrides, checkpoint=tiny) as server, ThreadPoolExecutor(1) as pool:
            os.kill(server.child("worker"), SIGSTOP)
            waiting = pool.submit(server.post, "/v1/score", CLIP)
            until(lambda: server.number("rbm_waiting_requests") == 1)
            for _ in range(signals):
                server.process.send_signal(SIGTERM)
                time.sleep(0.3)
            assert server.process.wait(20) == 0
            done = waiting.result()
            assert (done.status_code, wire.unpack(done.content)["retry"]) == (503, True)


def test_children_end_with_a_front_that_is_killed(tiny, tmp_path):
    with serving(tmp_path / "log", checkpoint=tiny) as server:
        children = watch.tree(server.pid)[1:]
        assert len(children) == 2
        server.stop(SIGKILL)
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children))


def fails(*overrides: str, says: str, code: int = 2, **more: object) -> None:
    checkpoint = more.pop("checkpoint", None)
    quoted = {} if checkpoint is None else {"checkpoint": checkpoint}
    done = subprocess.run(command(*overrides, **quoted), capture_output=True, text=True, timeout=60, **more)
    assert done.returncode == code, done
    assert says in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1
    assert done.stdout == ""


def test_a_checkpoint_that_is_not_there(tmp_path):
    fails(checkpoint=tmp_path / "nothing here", says="nothing here")


def test_a_worker_that_cannot_start(tiny):
    """A machine without the memory that torch wants: three tries, then a sentence."""

    def little_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))

    fails(checkpoint=tiny, says="the worker 0 died 3 times before it was ready", preexec_fn=little_memory)


def test_a_port_that_is_taken(tiny, server):
    port = server.url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "rbm.cli", "serve", f"port={port}"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert f"port={int(port) + 1}" in done.stderr
    fails("host=no.such.host.invalid", says="no address of this machine")
    fails("host=203.0.113.7", says="no address of this machine")
