"""A session that lives on the server."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError
from rbm.scoring.client.answers import field
from rbm.scoring.client.channel import Channel, checked
from rbm.scoring.client.errors import ClientError, ConnectionCut, RequestRefused, SessionLost, retried
from rbm.scoring.client.videos import Frames, check_frame, check_frames
from rbm.scoring.scores import FrameScore


class AsyncRemoteSession:
    """One attempt that is being watched by the server. Made by `AsyncClient.stream`.

    Calls of one session are done one after another, in the order in which they were made. Each raises, beside what
    every method of the client raises:
        SessionLost: the session is no more, or the answer to an earlier push never came, so that nobody knows whether
            it counts. Open a new session, or restore a snapshot; after a lost answer, `reset` does as well.

    Attributes:
        task: the instruction; none after `restore`, as the snapshot holds it.
        context: int64 (n,), numbers of the frames that the last score stands on, that frame itself last.
    """

    def __init__(
        self, channel: Channel, answer: dict[str, Any], task: str | None, retries: int, patience: float
    ) -> None:
        self.task = task
        self.context: NDArray[np.int64] = np.array(answer.get("context", ()), np.int64)
        self._channel, self._retries, self._patience = channel, retries, patience
        self._number = int(field(answer, "session"))
        self._turn = asyncio.Lock()
        self._in_doubt = False
        """A push or reset was sent, and its answer has not come."""
        self._end: str | None = None
        """Why the session can no longer be used."""

    async def push(self, frame: Frames) -> FrameScore:
        """Score the next frame, uint8 (H, W, 3), RGB."""
        check_frame(frame)
        return (await self._push(frame[None]))[0]

    async def push_many(self, frames: Frames) -> list[FrameScore]:
        """Score the next frames, uint8 (T, H, W, 3), in as few messages as the server's limits allow."""
        return await self._push(check_frames(frames)) if len(frames) else []

    async def _push(self, frames: Frames) -> list[FrameScore]:
        step = self._channel.frames_at_once(frames[0].nbytes)
        scores: list[FrameScore] = []
        async with self._turn:
            for first in range(0, len(frames), step):
                try:
                    answer = await self._ask("push", frames=frames[first : first + step])
                except BaseException:
                    self._in_doubt |= first > 0  # some frames are in, some are not
                    raise
                scores += _frame_scores(answer, len(frames[first : first + step]))
                self.context = np.array(field(answer, "context"), np.int64)
        return scores

    async def fork(self) -> AsyncRemoteSession:
        """A session that has seen the same, and goes its own way from here."""
        async with self._turn:
            answer = await self._ask("fork")
            fork = AsyncRemoteSession(self._channel, answer, self.task, self._retries, self._patience)
            fork.context = self.context.copy()
        return fork

    async def reset(self, task: str | None = None) -> None:
        """Forget all frames, to watch another attempt, at another task if one is given."""
        async with self._turn:
            await self._ask("reset", **({} if task is None else {"task": task}))
            self.task = self.task if task is None else task
            self.context = np.zeros(0, np.int64)

    async def snapshot(self) -> bytes:
        """All that `AsyncClient.restore` needs to go on from here, for as long as you keep it."""
        async with self._turn:
            return bytes(field(await self._ask("snapshot"), "snapshot"))

    async def close(self) -> None:
        """Give up what the server holds for this session. A session that is lost or closed can be closed as well."""
        async with self._turn:
            if self._end is None and not self._channel.cut:
                with contextlib.suppress(SessionLost):
                    await self._ask("close")
            self._end = self._end or "the session was closed; open a new one"

    async def __aenter__(self) -> AsyncRemoteSession:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """The answer; the caller holds the turn."""
        if self._end is not None:
            raise SessionLost(self._end)
        if self._in_doubt and op not in ("reset", "close"):
            raise SessionLost(
                "an earlier push was not answered in full, so that nobody knows which frames the session holds; "
                "reset it, open a new one, or restore a snapshot"
            )
        message = {"op": op, "session": self._number} | fields
        try:
            return await retried(lambda: self._attempt(message), self._retries, self._patience)
        except SessionLost as error:
            self._end = str(error)
            raise

    async def _attempt(self, message: dict[str, Any]) -> dict[str, Any]:
        changes, before = message["op"] in ("push", "reset"), self._in_doubt
        async with self._channel.slots:
            self._in_doubt |= changes
            try:
                answer = await self._channel.ask(message)
            except (RequestRefused, UserError):  # it was not sent
                self._in_doubt = before
                raise
            except ConnectionCut as error:
                raise SessionLost(f"{error}, and the session with it; open a new one, or restore a snapshot") from error
        if changes:
            self._in_doubt = before and "error" in answer
        return checked(answer)


def _frame_scores(answer: dict[str, Any], count: int) -> list[FrameScore]:
    try:
        numbers = [np.asarray(field(answer, name)).tolist() for name in ("progress", "progress_std", "success")]
        remaining = answer.get("remaining")
        numbers.append([None] * count if remaining is None else np.asarray(remaining).tolist())
        return [FrameScore(*score) for score in zip(*numbers, strict=True)]
    except (TypeError, ValueError) as error:
        raise ClientError("the server's scores cannot be read; are client and server of the same version?") from error
