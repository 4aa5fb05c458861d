"""What the scoring server takes: many live sessions at once, with its batching and without, and for minutes on end.

Servers are real ones, `rbm serve` in processes of their own. Clients are as many websockets in this process, each of
which waits for the answer before it sends the next frame. Both servers are loaded in turns, so that a busy machine hits
both alike.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from rbm.bench.measure import machine
from rbm.bench.synthetic import scene
from rbm.errors import UserError
from rbm.scoring import wire

TASK = "open the drawer"
START_SECONDS = 120
SAMPLE_SECONDS = 5.0
"""Between two looks at a server's memory."""


@dataclass
class Running:
    """A server that was started here."""

    process: subprocess.Popen[str]
    url: str

    @property
    def stream(self) -> str:
        return f"ws{self.url[4:]}/v1/stream"

    def megabytes(self) -> float:
        """Resident memory of the server and its children."""
        total = 0
        for pid in _tree(self.process.pid):
            try:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            except OSError:
                continue  # it ended in between
        return total / 1e6

    def metric(self, name: str) -> float:
        """Sum over the labels of a number at `/metrics`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


@dataclass(frozen=True)
class Load:
    """What clients saw: when each push was answered and how long that took, both float64 (n,), in seconds."""

    answered: np.ndarray
    latency: np.ndarray
    seconds: float

    def facts(self) -> dict[str, float]:
        p50, p99 = np.percentile(self.latency, [50, 99]) * 1e3
        return {"pushes_per_s": len(self.latency) / self.seconds, "p50_ms": float(p50), "p99_ms": float(p99)}


def run(
    overrides: Sequence[str] = (),
    clients: int = 64,
    seconds: float = 10.0,
    rounds: int = 3,
    side: int = 96,
    sessions: int = 1000,
    session_bytes: int = 128 << 20,
    soak: float = 0.0,
) -> dict[str, Any]:
    """All figures of `rbm bench serve`.

    Args:
        overrides: of `rbm serve`, for both servers.
        clients: websockets with one session each. seconds, rounds: of each measurement.
        side: pixels of the square frames.
        sessions: open at once, under a budget of `session_bytes`.
        soak: seconds of load at the end, while memory is watched; 0: none.

    Raises:
        UserError: a server does not start.
    """
    frames = scene(np.random.default_rng(0), side, side, noise=1.0)[::4]
    facts: dict[str, Any] = {"machine": machine(), "clients": clients, "frame": [side, side], "overrides": [*overrides]}
    with _server(*overrides) as batched, _server(*overrides, "batch=1") as single:
        loads: dict[str, list[dict[str, float]]] = {"batched": [], "batch=1": []}
        for server in (batched, single):
            asyncio.run(_load(server, clients, 1.0, frames))  # a warm-up
        for _ in range(rounds):
            for name, server in (("batched", batched), ("batch=1", single)):
                loads[name].append(asyncio.run(_load(server, clients, seconds, frames)).facts())
        one = asyncio.run(_load(batched, 1, min(seconds, 5.0), frames)).facts()
    facts["pushes"] = {name: {key: _median(load, key) for key in load[0]} for name, load in loads.items()}
    facts["batching_gain"] = facts["pushes"]["batched"]["pushes_per_s"] / facts["pushes"]["batch=1"]["pushes_per_s"]
    facts["one_client"] = one
    with _server(*overrides, f"limits.session_bytes={session_bytes}", f"limits.sessions={2 * sessions}") as server:
        facts["many_sessions"] = asyncio.run(_many(server, sessions, clients, session_bytes, frames))
        if soak:
            facts["soak"] = asyncio.run(_soak(server, clients, soak, frames))
    return facts


def _median(loads: list[dict[str, float]], key: str) -> float:
    return float(np.median([load[key] for load in loads]))


@contextmanager
def _server(*overrides: str) -> Iterator[Running]:
    command = [sys.executable, "-m", "rbm.cli", "serve", "port=0", *overrides]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            signal.alarm(START_SECONDS)  # ends this program if the server never says a word
            line = process.stdout.readline()
            signal.alarm(0)
            found = re.search(r"at (https?://\S+)", line)
            if not found:
                log.seek(0)
                raise UserError(f"the server did not start: {log.read().strip() or line.strip()}")
            yield Running(process, found[1])
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


async def _connected(server: Running) -> ClientConnection:
    socket = await connect(server.stream, compression=None, max_size=None)
    await socket.recv()  # hello
    return socket


async def _ask(socket: ClientConnection, message: dict[str, Any]) -> dict[str, Any]:
    """The answer to a message, while nothing else is under way on this websocket."""
    await socket.send(wire.pack({"id": 0, **message}))
    answer: dict[str, Any] = wire.unpack(await socket.recv())  # type: ignore[arg-type]
    if "error" in answer:
        raise UserError(f"the server said: {answer['error']}")
    return answer


async def _load(server: Running, clients: int, seconds: float, frames: np.ndarray) -> Load:
    """Every client pushes one frame after another, for so many seconds."""
    sockets = await asyncio.gather(*(_connected(server) for _ in range(clients)))
    opened = [(await _ask(socket, {"op": "open", "task": TASK}))["session"] for socket in sockets]
    answered: list[float] = []
    latency: list[float] = []
    begin = time.perf_counter()
    end = begin + seconds

    async def client(number: int) -> None:
        socket, session = sockets[number], opened[number]
        messages = [wire.pack({"id": 1, "op": "push", "session": session, "frames": frame}) for frame in frames]
        at = number
        while (sent := time.perf_counter()) < end:
            await socket.send(messages[at % len(messages)])
            answer = await socket.recv()
            done = time.perf_counter()
            if b"error" in answer:
                raise UserError(f"the server said: {wire.unpack(answer)}")  # type: ignore[arg-type]
            answered.append(done - begin)
            latency.append(done - sent)
            at += 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    spent = time.perf_counter() - begin
    await asyncio.gather(*(socket.close() for socket in sockets))
    return Load(np.array(answered), np.array(latency), spent)


async def _many(
    server: Running, sessions: int, clients: int, budget: int, frames: np.ndarray, rounds: int = 20
) -> dict[str, Any]:
    """So many open sessions, each pushed in turn; what the server holds stays within its budget."""
    sockets = await asyncio.gather(*(_connected(server) for _ in range(clients)))
    most, spent = 0.0, []

    async def client(number: int) -> None:
        socket = sockets[number]
        mine = [(await _ask(socket, {"op": "open", "task": TASK}))["session"] for _ in range(number, sessions, clients)]
        for at in range(rounds):
            for session in mine:
                start = time.perf_counter()
                await _ask(socket, {"op": "push", "session": session, "frames": frames[at % len(frames)]})
                spent.append(time.perf_counter() - start)

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, await asyncio.to_thread(server.metric, "rbm_session_bytes"))
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    begin = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    seconds = time.perf_counter() - begin
    watching.cancel()
    most = max(most, await asyncio.to_thread(server.metric, "rbm_session_bytes"))
    held = await asyncio.to_thread(server.metric, "rbm_sessions")
    evicted = await asyncio.to_thread(server.metric, "rbm_session_evictions")
    await asyncio.gather(*(socket.close() for socket in sockets))
    return {
        "sessions": int(held),
        "pushes_each": rounds,
        "budget_bytes": budget,
        "most_bytes": most,
        "evictions": int(evicted),
        "pushes_per_s": len(spent) / seconds,
        "p99_ms": float(np.percentile(spent, 99) * 1e3),
    }


async def _soak(server: Running, clients: int, seconds: float, frames: np.ndarray) -> dict[str, Any]:
    """Load for minutes: does memory grow, does the rate fall?"""
    samples: list[float] = []

    async def watch() -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            samples.append(await asyncio.to_thread(server.megabytes))

    watching = asyncio.create_task(watch())
    load = await _load(server, clients, seconds, frames)
    watching.cancel()
    fifth = seconds / 5
    rates = [float(((load.answered >= i * fifth) & (load.answered < (i + 1) * fifth)).sum() / fifth) for i in range(5)]
    parts = [float(np.median(part)) for part in np.array_split(samples, 5) if len(part)]
    return {"seconds": seconds, **load.facts(), "pushes_per_s_by_fifth": rates, "megabytes_by_fifth": parts}


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it ended in between
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found
