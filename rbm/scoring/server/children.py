"""Processes that the front starts, asks, and starts again when they die."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rbm.scoring.server.pipes import Channel, Fields, Part
from rbm.scoring.server.refusal import SESSION_LOST, Refusal, busy

log = logging.getLogger(__name__)

MOST_FAILURES = 3
"""Deaths in a row before a child was ready; then the server gives up."""

Done = Callable[[Fields, list[bytes]], None]
"""What takes an answer; one with the key "error" is a refusal."""


@dataclass(slots=True)
class _Asked:
    done: Done
    at: float


class Child:
    """A process of ours that answers requests, many at a time.

    Args:
        name: for the log.
        module: what it runs; its `main` reads `settings` as the first message.
        settings: anything msgpack takes.
        ready: called with the facts that it tells when it can answer, each time that it was started.
        lost: called when it died.
        failed: called with a sentence when it cannot be started; it is not tried again.

    Attributes:
        generation: how often it was started.
        ready: whether it takes requests.
        answered: time (monotonic) of its last sign of life.
        exit_code: of its last death, negative for a signal.
    """

    def __init__(
        self,
        name: str,
        module: str,
        settings: dict[str, Any],
        ready: Callable[[Fields], None] = lambda facts: None,
        lost: Callable[[], None] = lambda: None,
        failed: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.name, self.module, self.settings = name, module, settings
        self._on_ready, self._on_lost, self._on_failed = ready, lost, failed
        self.generation = 0
        self.ready = False
        self.answered = time.monotonic()
        self.exit_code: int | None = None
        self.observed: Callable[[Fields], None] = lambda message: None
        self._ids = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._failures = 0
        self._refused: str | None = None
        self._served = False
        self._stopping = False
        self._revival: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Requests that it has not answered."""
        return len(self._asked)

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.generation += 1
        self._served = False
        # a session of its own: Ctrl-C is for the front alone, which lets it finish
        environment = {name: value for name, value in os.environ.items() if name != "RBM_TOKEN"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
            env=environment | self._environment(),
        )
        theirs.close()
        self.answered = time.monotonic()
        self._channel = Channel(ours, self._received, self._gone)
        self._channel.send(self.settings)

    def _environment(self) -> dict[str, str]:
        """Threads are set before torch is imported; they must not spin while they wait for each other."""
        threads = str(self.settings.get("threads", 1))
        return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}

    def send(self, fields: Fields, parts: Sequence[Part], done: Done) -> None:
        """Ask; `done` takes the answer, or a refusal where the child dies before it answered.

        Raises:
            Refusal: it is not ready.
        """
        if not self.ready:
            raise busy(f"the {self.name} is starting; try again in a moment")
        number = next(self._ids)
        now = time.monotonic()
        if not self._asked:
            self.answered = now
        self._asked[number] = _Asked(done, now)
        self._channel.send({"id": number, **fields}, parts)

    async def ask(self, fields: Fields, parts: Sequence[Part] = ()) -> tuple[Fields, list[bytes]]:
        """As `send`, waiting for the answer.

        Raises:
            Refusal: it refused, died, or is not ready.
        """
        answer: asyncio.Future[tuple[Fields, list[bytes]]] = asyncio.get_running_loop().create_future()

        def done(fields: Fields, parts: list[bytes]) -> None:
            if answer.done():
                return
            if "error" in fields:
                answer.set_exception(Refusal.from_fields(fields))
            else:
                answer.set_result((fields, parts))

        self.send(fields, parts, done)
        return await answer

    async def until_ready(self, seconds: float) -> None:
        """Raises Refusal where it does not become ready in that time."""
        try:
            async with asyncio.timeout(seconds):
                while not self.ready:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise busy(f"the {self.name} is starting; try again in a moment") from None

    def kill(self) -> None:
        """It is started again; until then it takes no requests."""
        self.ready = False
        self._process.kill()

    async def stop(self) -> None:
        self._stopping = True
        if self._revival is not None:
            self._revival.cancel()
        self._process.kill()
        await asyncio.to_thread(self._process.wait)
        self._channel.close()
        self._fail(busy("the server is shutting down; try again later", SESSION_LOST))

    def _received(self, message: Fields, parts: list[bytes]) -> None:
        self.answered = time.monotonic()
        event = message.get("event")
        if event == "ready":
            self._served = self.ready = True
            self._changed.set()
            self._on_ready(message["facts"])
        elif event == "refused":
            self._refused = message["error"]
        else:
            self.observed(message)
            for answer in message["answers"]:
                asked = self._asked.pop(answer["id"], None)
                if asked is not None:
                    asked.done(answer, parts)

    def _gone(self) -> None:
        self.ready = False
        if not self._stopping:
            self._revival = asyncio.create_task(self._revive())

    async def _revive(self) -> None:
        self._process.kill()  # it may have closed its end only
        code = await asyncio.to_thread(self._process.wait)
        self._on_lost()
        self.exit_code = code
        self._fail(busy(f"the {self.name} died while it worked on this; try again in a moment", SESSION_LOST))
        if self._refused is not None:
            self._on_failed(self._refused)
            return
        self._failures = 0 if self._served else self._failures + 1
        if self._failures == MOST_FAILURES:
            self._on_failed(
                f"the {self.name} died {MOST_FAILURES} times before it was ready (exit code {code}); see what it "
                "wrote above"
            )
            return
        log.warning("the %s died (exit code %s); it is started again", self.name, code)
        await asyncio.sleep(0.2 * self._failures)
        self.start()

    def _fail(self, refusal: Refusal) -> None:
        failed, self._asked = list(self._asked.values()), {}
        for asked in failed:
            asked.done(refusal.fields(), [])
