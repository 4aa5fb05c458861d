"""The client for programs that wait: `AsyncClient` on an event loop in a thread of its own.

Any number of threads may use one client, and sessions of it, at once; their pushes share one websocket.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rbm.scoring.client.asynchronous import AsyncClient
from rbm.scoring.client.errors import ClientError
from rbm.scoring.client.sessions import AsyncRemoteSession
from rbm.scoring.client.videos import Frames, Video
from rbm.scoring.scores import FrameScore, Scores

T = TypeVar("T")


class Client:
    """A scoring server, as seen from afar; arguments and errors as of `AsyncClient`.

    Make one in each process: a client does not live through a fork.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        verify: bool | str | os.PathLike[str] = True,
    ) -> None:
        self._async = AsyncClient(url, token, timeout, retries, verify)
        self._loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._submitting = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="rbm client", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return self._async.url

    def score(self, video: Video, task: str, every: int | None = None, dense: bool = False) -> Scores:
        """Scores of one video under one instruction, as `rbm.Scorer.score` gives them.

        Args:
            video: a video file (or .npy) on this computer, whose bytes are sent, or uint8 (T, H, W, 3), RGB.
            every: score every so many frames; left out, the server looks at as many as the model takes at once.
            dense: interpolate to every frame of the video.
        """
        return self._wait(self._async.score(video, task, every, dense))

    def score_batch(
        self, videos: Sequence[tuple[Video, str]], every: int | None = None, dense: bool = False
    ) -> list[Scores]:
        """`score` of several videos, each with its task; the server mixes those that are under way together."""
        return self._wait(self._async.score_batch(videos, every, dense))

    def compare(self, a: Video, b: Video, task: str) -> float:
        """The probability that `a` is the better attempt at the task."""
        return self._wait(self._async.compare(a, b, task))

    def rank(self, videos: Sequence[Video], task: str) -> list[int]:
        """Positions of the videos, the best attempt first."""
        return self._wait(self._async.rank(videos, task))

    def info(self) -> dict[str, Any]:
        """What model the server runs."""
        return self._wait(self._async.info())

    def health(self) -> dict[str, Any]:
        """How the server is, also while it starts or drains ("status", "ready"): asks once, without retries."""
        return self._wait(self._async.health())

    def stream(self, task: str) -> RemoteSession:
        """A live session. All sessions of a client share one websocket, and end with it."""
        return RemoteSession(self, self._wait(self._async.stream(task)))

    def restore(self, snapshot: bytes) -> RemoteSession:
        """A session that goes on from `RemoteSession.snapshot`, on this server or another of the same model."""
        return RemoteSession(self, self._wait(self._async.restore(snapshot)))

    def close(self) -> None:
        """Ends all sessions and connections; calls that other threads wait for end with an error."""
        with self._submitting:
            if self._closed or os.getpid() != self._process:
                return
            self._closed = True
            ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        ending.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def _end(self) -> None:
        await self._async.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        with self._submitting:
            if self._closed or os.getpid() != self._process:
                work.close()
                why = "was closed" if self._closed else "belongs to another process"
                raise ClientError(f"the client {why}; make a new one")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except CancelledError as error:
            raise ClientError("the client was closed by another thread; make a new one") from error
        except BaseException:  # an interrupt from the keyboard leaves the work running
            future.cancel()
            raise


class RemoteSession:
    """One attempt that is being watched by the server; as `AsyncRemoteSession`. Made by `Client.stream`."""

    def __init__(self, client: Client, session: AsyncRemoteSession) -> None:
        self._client, self._session = client, session

    @property
    def task(self) -> str | None:
        """The instruction; none after `restore`, as the snapshot holds it."""
        return self._session.task

    @property
    def context(self) -> NDArray[np.int64]:
        """int64 (n,), numbers of the frames that the last score stands on, that frame itself last."""
        return self._session.context

    def push(self, frame: Frames) -> FrameScore:
        """Score the next frame, uint8 (H, W, 3), RGB."""
        return self._client._wait(self._session.push(frame))

    def push_many(self, frames: Frames) -> list[FrameScore]:
        """Score the next frames, uint8 (T, H, W, 3), in as few messages as the server's limits allow."""
        return self._client._wait(self._session.push_many(frames))

    def fork(self) -> RemoteSession:
        """A session that has seen the same, and goes its own way from here."""
        return RemoteSession(self._client, self._client._wait(self._session.fork()))

    def reset(self, task: str | None = None) -> None:
        """Forget all frames, to watch another attempt, at another task if one is given."""
        self._client._wait(self._session.reset(task))

    def snapshot(self) -> bytes:
        """All that `Client.restore` needs to go on from here, for as long as you keep it."""
        return self._client._wait(self._session.snapshot())

    def close(self) -> None:
        """Give up what the server holds for this session. A session that is lost or closed can be closed as well."""
        if not self._client._closed:
            self._client._wait(self._session.close())

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
