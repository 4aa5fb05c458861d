"""The client with real servers: equal to scoring in one's own process, also while the server fails."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from running import Running, serving, until

from rbm.errors import UserError
from rbm.scoring import FrameScore, Scorer, Scores
from rbm.scoring.client import (
    AsyncClient,
    Client,
    ClientError,
    RequestRefused,
    SessionLost,
)

TASK = "open the drawer"
TOKEN = "a-secret"


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with Client(server.url) as connected:
        yield connected


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    made = ["-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-days", "2", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    subprocess.run([*command, *made, *names], check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def strict(tiny: Path, certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with TLS and a token, that takes little."""
    limits = ["limits.queue=4", "limits.ws_in_flight=3", "limits.body_bytes=300000", "limits.ws_message_bytes=100000"]
    files = {"checkpoint": tiny, "tls_cert": certificate[0], "tls_key": certificate[1]}
    log, env = tmp_path_factory.mktemp("strict") / "log", os.environ | {"RBM_TOKEN": TOKEN}
    with serving(log, "batch=2", *limits, env=env, **files) as running:
        yield running
        assert "Traceback" not in log.read_text()


def assert_same(found: Scores, expected: Scores) -> None:
    for name in ("progress", "progress_std", "success", "timestamp"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-5)
        assert getattr(found, name).dtype == np.float32
    assert found.frame_index.tolist() == expected.frame_index.tolist()
    assert found.frame_index.dtype == np.int32
    assert (found.task, found.n_frames) == (expected.task, expected.n_frames)
    assert found.fps == pytest.approx(expected.fps)


def assert_pushed(found: list[FrameScore], expected: list[FrameScore]) -> None:
    numbers = [[(s.progress, s.progress_std, s.success) for s in scores] for scores in (found, expected)]
    np.testing.assert_allclose(*numbers, atol=1e-5)


def pushed(own: Scorer, task: str, frames: np.ndarray) -> list[FrameScore]:
    return own.stream(task).push_many(frames)


def test_what_the_server_says_of_itself(client, own):
    assert client.health()["status"] == "healthy"
    assert client.info()["context_frames"] == own.context_frames
    assert client.info()["weights"] == own.fingerprint()


def test_videos_score_as_in_this_process(client, own, video_path, clip_of, tmp_path):
    frames = clip_of(4, 30)
    np.save(tmp_path / "frames.npy", frames)
    for video, here in (
        (video_path, video_path),
        (str(video_path), video_path),
        (frames, frames),
        (tmp_path / "frames.npy", frames),
    ):
        assert_same(client.score(video, TASK), own.score(here, TASK))
        assert_same(client.score(video, TASK, every=7), own.score(here, TASK, every=7))
        dense = client.score(video, TASK, dense=True)
        assert_same(dense, own.score(here, TASK).dense())
        assert len(dense) == dense.n_frames


def test_a_batch_keeps_its_order(client, own, video_path, clip_of):
    videos = [(clip_of(seed, 5 + seed), f"task {seed}") for seed in range(12)] + [(video_path, TASK)]
    for found, (video, task) in zip(client.score_batch(videos), videos, strict=True):
        assert_same(found, own.score(video, task))
    assert client.score_batch([]) == []


def test_attempts_compare_as_in_this_process(client, own, video_path, clip_of):
    a, b = clip_of(1), clip_of(2)
    for first, second in ((a, b), (b, a), (video_path, a), (a, video_path)):
        assert client.compare(first, second, TASK) == pytest.approx(own.compare(first, second, TASK), abs=1e-4)
    assert client.rank([a, b, clip_of(3)], TASK) == own.rank([a, b, clip_of(3)], TASK)
    assert client.rank([a, video_path, b], TASK) == own.rank([a, video_path, b], TASK)


def test_a_session_is_as_one_in_this_process(client, own, clip_of):
    frames = clip_of(1, 30)
    here = own.stream(TASK)
    with client.stream(TASK) as session:
        assert session.context.tolist() == []
        for frame in frames[:9]:
            assert_pushed([session.push(frame)], [here.push(frame)])
            assert session.context.tolist() == here.context.tolist()
        fork, fork_here = session.fork(), here.fork()
        assert fork.context.tolist() == here.context.tolist()
        kept = session.snapshot()
        assert_pushed(fork.push_many(frames[20:]), fork_here.push_many(frames[20:]))
        assert_pushed(session.push_many(frames[9:]), here.push_many(frames[9:]))
        assert session.context.tolist() == here.context.tolist()
        fork.close()
        fork.close()
        with pytest.raises(SessionLost, match="closed"):
            fork.push(frames[0])
        restored = client.restore(kept)
        assert_pushed(restored.push_many(frames[9:]), pushed(own, TASK, frames)[9:])
        session.reset("close the drawer")
        assert session.task == "close the drawer"
        assert session.context.tolist() == []
        assert_pushed(session.push_many(frames), pushed(own, "close the drawer", frames))


def test_eight_threads_push_at_once(client, own, clip_of):
    clips = [clip_of(seed, 25) for seed in range(8)]
    start = threading.Barrier(8)

    def watch(number: int) -> list[FrameScore]:
        with client.stream(f"task {number}") as session:
            start.wait(20)
            return [session.push(frame) for frame in clips[number]]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(watch, range(8)))
    for number, scores in enumerate(found):
        assert_pushed(scores, pushed(own, f"task {number}", clips[number]))


def test_32_sessions_on_one_event_loop(server, own, clip_of):
    clips = [clip_of(seed, 8) for seed in range(32)]

    async def watch(client: AsyncClient, number: int) -> list[FrameScore]:
        async with await client.stream(f"task {number}") as session:
            return [await session.push(frame) for frame in clips[number]]

    async def run() -> tuple[list[list[FrameScore]], Scores, float]:
        async with AsyncClient(server.url) as client:
            watching = asyncio.gather(*[watch(client, number) for number in range(32)])
            scores = (await client.score_batch([(clips[0], TASK)] * 3))[2]
            p = await client.compare(clips[0], clips[1], TASK)
            assert sorted(await client.rank(clips[:3], TASK)) == [0, 1, 2]
            assert (await client.health())["ready"]
            assert (await client.info())["model"]
            return await watching, scores, p

    found, scores, p = asyncio.run(run())
    for number, of_one in enumerate(found):
        assert_pushed(of_one, pushed(own, f"task {number}", clips[number]))
    assert_same(scores, own.score(clips[0], TASK))
    assert p == pytest.approx(own.compare(clips[0], clips[1], TASK), abs=1e-4)


def test_it_needs_four_packages(server):
    """On a robot's computer there is no torch: every other package that is installed here is blocked."""
    code = f"""
import sys
before = set(sys.modules)
from importlib.abc import MetaPathFinder
from importlib.metadata import packages_distributions

allowed = set("numpy msgpack websockets httpx httpcore h11 anyio certifi idna sniffio typing_extensions rbm".split())
blocked = {{name for name in packages_distributions() if not name.startswith("__")}} - allowed
assert {{"torch", "rich", "PIL", "fastapi", "click", "scipy"}} <= blocked

class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Block())
import numpy as np
from rbm.scoring.client import AsyncClient, Client

frames = np.zeros((3, 40, 40, 3), np.uint8)
with Client({server.url!r}) as client:
    assert client.score(frames, "go", dense=True).progress.shape == (3,)
    with client.stream("go") as session:
        assert len(session.push_many(frames)) == 3
assert not blocked & (set(sys.modules) - before)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_damaged_video_is_refused_once_and_a_missing_one_never_sent(client, tmp_path):
    (tmp_path / "damaged.mp4").write_bytes(b"no video at all")
    with pytest.raises(RequestRefused) as refused:
        client.score(tmp_path / "damaged.mp4", TASK)
    assert 400 <= refused.value.status < 500
    with pytest.raises(UserError, match=r"missing\.mp4"):
        client.score(tmp_path / "missing.mp4", TASK)
    with pytest.raises(RequestRefused, match="empty"):
        client.stream("")
    with pytest.raises(RequestRefused):
        client.restore(b"no snapshot")


def test_tokens_and_tls(strict, certificate, clip_of, own):
    frames = clip_of(1)
    with Client(strict.url, token=TOKEN, verify=certificate[0]) as client:
        assert_same(client.score(frames, TASK), own.score(frames, TASK))
        with client.stream(TASK) as session:
            assert_pushed(session.push_many(frames), pushed(own, TASK, frames))
    for token in (None, "another"):
        with Client(strict.url, token=token, verify=certificate[0]) as client:
            assert client.health()["ready"]
            for call in (client.info, lambda: client.score(frames, TASK), lambda: client.stream(TASK)):
                with pytest.raises(RequestRefused, match="token") as refused:
                    call()
                assert refused.value.status == 401
    with Client(strict.url, token=TOKEN) as client:
        for call in (client.info, lambda: client.stream(TASK)):
            with pytest.raises(ClientError, match="does not prove who it is"):
                call()
    with Client(strict.url, token=TOKEN, verify=False) as client:
        assert client.info()["model"]


def test_more_than_the_server_takes(strict, certificate, clip_of, own):
    with Client(strict.url, token=TOKEN, verify=certificate[0]) as client:
        for count in (50, 300, 5000):  # of the larger ones the server does not read the end
            with pytest.raises(RequestRefused, match="server takes") as refused:
                client.score(clip_of(1, count), TASK)
            assert refused.value.status == 413
        with client.stream(TASK) as session:
            frames = clip_of(2, 40)  # 270 kB in messages of 100 kB
            assert_pushed(session.push_many(frames), pushed(own, TASK, frames))


def test_a_queue_of_four_serves_twelve_clients(strict, certificate, clip_of, own):
    clips = [clip_of(seed, 10) for seed in range(12)]
    start = threading.Barrier(12)

    def watch(number: int) -> list[FrameScore]:
        with Client(strict.url, token=TOKEN, verify=certificate[0]) as client, client.stream(TASK) as session:
            start.wait(30)
            return [session.push(frame) for frame in clips[number]]

    with ThreadPoolExecutor(12) as threads:
        for frames, scores in zip(clips, threads.map(watch, range(12)), strict=True):
            assert_pushed(scores, pushed(own, TASK, frames))


def while_it_runs(work: Callable[[], object], most: int) -> tuple[threading.Thread, list[object]]:
    """A thread that works so many times, and what it has got so far: results, or the error that ended it."""
    results: list[object] = []

    def run() -> None:
        try:
            while len(results) < most:
                results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_a_worker_that_is_killed(tiny, tmp_path, clip_of, own):
    frames = clip_of(1)
    expected = own.score(frames, TASK)
    with serving(tmp_path / "log", checkpoint=tiny) as server, Client(server.url, retries=8) as client:
        session = client.stream(TASK)
        session.push_many(frames[:10])
        kept = session.snapshot()
        pushing, pushes = while_it_runs(lambda: session.push(frames[0]), 10_000)
        until(lambda: len(pushes) > 3)
        os.kill(server.child("worker"), signal.SIGKILL)
        pushing.join(30)
        assert isinstance(pushes[-1], SessionLost)
        assert "open a new" in str(pushes[-1])
        assert_same(client.score(frames, TASK), expected)  # waits until there is a worker again
        with pytest.raises(SessionLost):
            session.push(frames[0])
        session.close()
        restored = client.restore(kept)
        assert_pushed(restored.push_many(frames[10:]), pushed(own, TASK, frames)[10:])


def test_clips_in_flight_survive_a_worker_that_is_killed(tiny, tmp_path, clip_of, own):
    frames = clip_of(1)
    expected = own.score(frames, TASK)
    with serving(tmp_path / "log", checkpoint=tiny) as server, Client(server.url, retries=8) as client:
        scoring, scores = while_it_runs(lambda: client.score(frames, TASK), 40)
        until(lambda: len(scores) > 3)
        os.kill(server.child("worker"), signal.SIGKILL)
        scoring.join(60)
        assert len(scores) == 40
        for found in scores:
            assert isinstance(found, Scores), found
        assert_same(scores[-1], expected)


def test_a_server_that_is_restarted(tiny, tmp_path, clip_of, own):
    frames = clip_of(1)
    with serving(tmp_path / "first", checkpoint=tiny) as first, Client(first.url, retries=10) as client:
        port = first.url.rpartition(":")[2]
        session = client.stream(TASK)
        session.push_many(frames[:10])
        kept = session.snapshot()
        assert first.stop() == 0
        with pytest.raises(SessionLost, match="open a new"):
            session.push(frames[10])
        scoring, scores = while_it_runs(lambda: client.score(frames, TASK), 1)
        time.sleep(0.3)
        assert scores == []  # it waits
        with serving(tmp_path / "second", f"port={port}", checkpoint=tiny):
            scoring.join(60)
            assert_same(scores[0], own.score(frames, TASK))
            restored = client.restore(kept)
            assert_pushed(restored.push_many(frames[10:]), pushed(own, TASK, frames)[10:])
            restored.close()
