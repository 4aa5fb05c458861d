"""Live sessions over a websocket: msgpack maps in, msgpack maps out, many sessions and requests at a time.

A push costs the front little: the message is taken apart without copying the pixels, checked, and handed to the
worker; the answer is written into the socket in the order in which answers come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import numpy as np
from starlette.types import Receive, Scope, Send

from rbm.errors import UserError
from rbm.scoring import wire
from rbm.scoring.server.engine import Engine, LiveSession
from rbm.scoring.server.pipes import Fields
from rbm.scoring.server.refusal import UNKNOWN_SESSION, Refusal, internal

OPS = ("open", "push", "fork", "reset", "close", "snapshot", "restore")


class Stream:
    """One websocket and the sessions that belong to it; they are closed with it."""

    def __init__(self, engine: Engine, receive: Receive, send: Send) -> None:
        self.engine, self.limits = engine, engine.limits
        self._receive, self._send = receive, send
        self._sessions: dict[int, LiveSession] = {}
        self._answers: asyncio.Queue[bytes] = asyncio.Queue()
        self._room = asyncio.Semaphore(self.limits.ws_in_flight)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ops: dict[str, Callable[[Fields], Awaitable[Fields]]] = {
            name: getattr(self, f"_{name}") for name in OPS if name != "push"
        }

    async def run(self) -> None:
        """Serves until the client is gone."""
        await self._receive()  # websocket.connect
        await self._send({"type": "websocket.accept"})
        await self._send({"type": "websocket.send", "bytes": wire.pack({"hello": self._hello()})})
        writing = asyncio.create_task(self._write())
        try:
            while (message := await self._receive())["type"] == "websocket.receive":
                await self._room.acquire()  # a client that does not read its answers is not read either
                self._take(message)
                if self._tasks:
                    await asyncio.sleep(0)  # a task just made asks the worker before the next message does
        finally:
            writing.cancel()
            for task in self._tasks:
                task.cancel()
            for session in self._sessions.values():
                self.engine.close(session)

    def _hello(self) -> Fields:
        info = self.engine.info
        known = {name: info.get(name) for name in ("model", "context_frames", "views")}
        return {**known, "limits": self.limits.public()}

    async def _write(self) -> None:
        there = True
        while True:
            answer = await self._answers.get()
            if there:
                try:
                    await self._send({"type": "websocket.send", "bytes": answer})
                except OSError:  # the client is gone; `run` will hear of it
                    there = False
            self._room.release()

    def _take(self, message: Any) -> None:
        began, number, op = time.monotonic(), None, "other"
        try:
            if message.get("bytes") is None:
                raise Refusal("send binary messages: msgpack maps such as {'id': 1, 'op': 'open', 'task': '…'}")
            fields = wire.unpack(message["bytes"])
            if not isinstance(fields, dict):
                raise Refusal("a message must be a msgpack map such as {'id': 1, 'op': 'open', 'task': '…'}")
            number = fields.get("id")
            if isinstance(number, bool) or not isinstance(number, int):
                number = None
                raise Refusal("a message needs an id, a whole number, which its answer repeats")
            op = _op(fields)
            if op == "push":
                self._push(fields, number, began)
            else:
                task = asyncio.create_task(self._manage(op, fields, number, began))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        except UserError as error:
            self._refuse(number, op, began, error)

    def _push(self, fields: Fields, number: int, began: float) -> None:
        _only(fields, "session", "frames")
        session, frames = self._session(fields), fields.get("frames")
        if isinstance(frames, np.ndarray) and frames.ndim == 3:
            frames = frames[None]

        def done(answer: Fields, parts: list[bytes]) -> None:
            if "error" in answer:
                self._refuse(number, "push", began, Refusal.from_fields(answer))
            else:
                self._answer(_pushed(number, answer), "push", "ok", began)

        self.engine.push(session, frames, done)  # type: ignore[arg-type]

    async def _manage(self, op: str, fields: Fields, number: int, began: float) -> None:
        try:
            answer = await self._ops[op](fields)
        except UserError as error:
            self._refuse(number, op, began, error)
        except Exception:
            self._refuse(number, op, began, internal())
            raise
        else:
            self._answer(wire.pack({"id": number, **answer}), op, "ok", began)

    async def _open(self, fields: Fields) -> Fields:
        _only(fields, "task")
        return self._keep(await self.engine.open(fields.get("task")))  # type: ignore[arg-type]

    async def _fork(self, fields: Fields) -> Fields:
        _only(fields, "session")
        return self._keep(await self.engine.fork(self._session(fields)))

    async def _restore(self, fields: Fields) -> Fields:
        _only(fields, "snapshot")
        snapshot = fields.get("snapshot")
        if not isinstance(snapshot, bytes):
            raise Refusal("a snapshot must be bytes, as the op `snapshot` gave them")
        return self._keep(await self.engine.restore(snapshot))

    async def _reset(self, fields: Fields) -> Fields:
        _only(fields, "session", "task")
        await self.engine.reset(self._session(fields), fields.get("task"))
        return {}

    async def _snapshot(self, fields: Fields) -> Fields:
        _only(fields, "session")
        return {"snapshot": await self.engine.snapshot(self._session(fields))}

    async def _close(self, fields: Fields) -> Fields:
        _only(fields, "session")
        session = self._session(fields)
        del self._sessions[session.number]
        self.engine.close(session)
        return {}

    def _keep(self, session: LiveSession) -> Fields:
        if len(self._sessions) > self.limits.sessions:  # most of them gone, and never closed by the client
            self._sessions = {n: held for n, held in self._sessions.items() if held.gone is None}
        self._sessions[session.number] = session
        return {"session": session.number}

    def _session(self, fields: Fields) -> LiveSession:
        number = fields.get("session")
        session = self._sessions.get(number) if isinstance(number, int) else None
        if session is None:
            raise Refusal("there is no such session on this connection; open one", 404, UNKNOWN_SESSION)
        return session

    def _answer(self, message: bytes, op: str, status: str, began: float) -> None:
        self._answers.put_nowait(message)
        self.engine.metrics.answered(f"ws:{op}", status, time.monotonic() - began)

    def _refuse(self, number: int | None, op: str, began: float, error: UserError) -> None:
        refusal = error if isinstance(error, Refusal) else Refusal(str(error))
        fields: Fields = {"id": number, "error": str(refusal), "code": refusal.code, "retry": refusal.retry}
        if refusal.retry_after:
            fields["retry_after"] = refusal.retry_after
        self._answer(wire.pack(fields), op, refusal.code, began)


def _op(fields: Fields) -> str:
    op = fields.get("op")
    if not isinstance(op, str) or op not in OPS:
        raise Refusal(f"op must be one of {', '.join(OPS)}")
    return op


def _only(fields: Fields, *names: str) -> None:
    """Raises Refusal for a field that the op does not know: a slip of the pen would go unnoticed."""
    unknown = [name for name in fields if name not in ("id", "op", *names)]
    if unknown:
        raise Refusal(f"this op takes {', '.join(names)}, not {unknown[0][:40]!r}")


def _pushed(number: int, answer: Fields) -> bytes:
    """The answer to a push. By hand: `wire.pack` takes 40 µs for it, this 8."""
    fields: dict[str, Any] = {"id": number}
    for name in ("progress", "progress_std", "success", "remaining"):
        if answer[name] is not None:
            fields[name] = _array(np.array(answer[name], "<f4"), "float32")
    fields["context"] = _array(np.array(answer["context"], "<i8"), "int64")
    return bytes(msgpack.packb(fields))


def _array(values: np.ndarray, name: str) -> msgpack.ExtType:
    return msgpack.ExtType(wire.ARRAY, msgpack.packb([name, values.shape, values.tobytes()]))


async def serve(engine: Engine, scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application of the websocket."""
    await Stream(engine, receive, send).run()
