"""The client for programs that run on asyncio. `blocking` wraps it for all others."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import httpx
import numpy as np

from rbm.errors import UserError
from rbm.scoring.client.answers import MSGPACK, UNAVAILABLE, as_scores, decoded, field, refusal
from rbm.scoring.client.channel import Channel, checked
from rbm.scoring.client.errors import (
    ClientError,
    RequestRefused,
    ServerTimeout,
    ServerUnavailable,
    SessionLost,
    retried,
    unreachable,
)
from rbm.scoring.client.sessions import AsyncRemoteSession
from rbm.scoring.client.videos import Video, check_frames, form
from rbm.scoring.scores import Scores
from rbm.scoring.wire import pack

BATCH = 8
"""Clips of one `score_batch` that are under way at once."""

SMALL_BODY_BYTES = 1 << 16
"""Such a body goes out whole, whatever becomes of it."""

T = TypeVar("T")


class AsyncClient:
    """A scoring server, as seen from afar.

    Args:
        url: where it listens, "http://..." or "https://...".
        token: what it asks of its clients, if anything.
        timeout: seconds for the server to take a connection, and for each answer once all was sent.
        retries: tries after the first where the server is away or full, with growing pauses. Only what is safe to
            do twice is tried again: a push whose answer was lost is not.
        verify: for https: True, the file of a certificate authority to trust, or False to trust anybody.

    Every method raises, beside what it names:
        ServerUnavailable: the server is away or full, and was through all retries.
        ServerTimeout: no answer in time.
        RequestRefused: the server says what is wrong with the request or the token.
        ClientError: all of these are; alone: what listens there is no scoring server, or one that cannot be trusted.
        UserError: no such file, or frames of another dtype or shape.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        verify: bool | str | os.PathLike[str] = True,
    ) -> None:
        self.url = url.rstrip("/")
        if not _is_address(self.url):
            raise UserError(f"the server's address must be like http://127.0.0.1:8000 or https://..., got {url!r}")
        if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
            raise UserError("the token must be of printable ASCII characters")
        self.timeout, self.retries = timeout, retries
        self._tls = _trust(verify) if self.url.startswith("https://") else None
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._http = httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(timeout, pool=None),
            verify=self._tls or False,
            limits=httpx.Limits(max_connections=None),
        )
        self._channel: Channel | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def score(self, video: Video, task: str, every: int | None = None, dense: bool = False) -> Scores:
        """Scores of one video under one instruction, as `rbm.Scorer.score` gives them.

        Args:
            every: score every so many frames; left out, the server looks at as many as the model takes at once.
            dense: interpolate to every frame of the video.
        """
        if isinstance(video, np.ndarray):
            body = _message({"clips": [{"frames": check_frames(video), "task": task}], "every": every})
        else:
            body = await form([("video", video)], task=task, **({} if every is None else {"every": str(every)}))
        answer = field(await self._post("/v1/score", body), "scores")
        if not isinstance(answer, list) or len(answer) != 1:
            raise ClientError("the server answered with other scores than were asked for")
        scores = as_scores(answer[0])
        return scores.dense() if dense else scores

    async def score_batch(
        self, videos: Sequence[tuple[Video, str]], every: int | None = None, dense: bool = False
    ) -> list[Scores]:
        """`score` of several videos, each with its task; the server mixes those that are under way together."""
        return await _at_once([partial(self.score, video, task, every, dense) for video, task in videos])

    async def compare(self, a: Video, b: Video, task: str) -> float:
        """The probability that `a` is the better attempt at the task."""
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            body = _message({"a": check_frames(a), "b": check_frames(b), "task": task})
        else:
            body = await form([("a", a), ("b", b)], task=task)
        return float(field(await self._post("/v1/compare", body), "p_a_better"))

    async def rank(self, videos: Sequence[Video], task: str) -> list[int]:
        """Positions of the videos, the best attempt first."""
        if all(isinstance(video, np.ndarray) for video in videos):
            body = _message({"videos": [check_frames(video) for video in videos], "task": task})
        else:
            body = await form([("video", video) for video in videos], task=task)
        return [int(i) for i in field(await self._post("/v1/rank", body), "order")]

    async def info(self) -> dict[str, Any]:
        """What model the server runs."""
        return await self._retried(lambda: self._request("GET", "/model_info", {}))

    async def health(self) -> dict[str, Any]:
        """How the server is, also while it starts or drains ("status", "ready"): asks once, without retries."""
        return await self._request("GET", "/health", {}, unwell=True)

    async def stream(self, task: str) -> AsyncRemoteSession:
        """A live session. All sessions of a client share one websocket, and end with it."""
        return await self._session({"op": "open", "task": task}, task)

    async def restore(self, snapshot: bytes) -> AsyncRemoteSession:
        """A session that goes on from `AsyncRemoteSession.snapshot`, on this server or another of the same model."""
        return await self._session({"op": "restore", "snapshot": snapshot}, None)

    async def close(self) -> None:
        """Ends all sessions and connections."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _retried(self, attempt: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        return retried(attempt, self.retries, self.timeout)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return await self._retried(lambda: self._request("POST", path, body))

    async def _request(self, method: str, path: str, body: dict[str, Any], unwell: bool = False) -> dict[str, Any]:
        """One try; `unwell`: that the server is unavailable is an answer."""
        url = self.url + path
        self._check_open()
        try:
            request = self._http.build_request(method, url, **body)
            response = await self._http.send(request)
        except httpx.TimeoutException as error:
            raise ServerTimeout(f"{url} did not answer within {self.timeout:g} s") from error
        except httpx.TransportError as error:
            await self._check_size(int(request.headers.get("content-length", 0)))
            raise unreachable(self.url, error) from error
        except httpx.HTTPError as error:
            raise ClientError(f"{url} gave no usable answer: {error}") from error
        if not response.is_success and not (unwell and response.status_code == UNAVAILABLE):
            raise refusal(url, response.status_code, response.headers, response.content)
        return decoded(url, response.headers, response.content)

    async def _check_size(self, size: int) -> None:
        """Raises RequestRefused for a body that is longer than the server takes: it may have hung up on such a one
        before the client could read why."""
        if size < SMALL_BODY_BYTES:
            return
        try:
            most = (await self._request("GET", "/model_info", {}))["limits"]["body_bytes"]
        except (ClientError, KeyError, TypeError):
            return  # it is away, or another server
        if size > most:
            raise RequestRefused(f"the body has {size} bytes, the server takes {most}; send shorter videos", 413)

    async def _session(self, message: dict[str, Any], task: str | None) -> AsyncRemoteSession:
        async def attempt() -> AsyncRemoteSession:
            channel = await self._connected()
            async with channel.slots:
                try:
                    answer = checked(await channel.ask(message))
                except SessionLost as error:  # it died while it was opened: nothing is lost
                    raise ServerUnavailable(str(error)) from error
            return AsyncRemoteSession(channel, answer, task, self.retries, self.timeout)

        return await self._retried(attempt)

    async def _connected(self) -> Channel:
        async with self._opening:
            self._check_open()
            if self._channel is None or self._channel.cut:
                url = f"ws{self.url.removeprefix('http')}/v1/stream"
                channel = await Channel.open(url, self._headers, self._tls, self.timeout)
                if self._closed:
                    await channel.close()
                    self._check_open()
                self._channel = channel
            return self._channel

    def _check_open(self) -> None:
        if self._closed:
            raise ClientError("the client was closed; make a new one")


async def _at_once(jobs: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """What all jobs give, in their order, BATCH of them under way at once; the first error ends the rest."""
    slots = asyncio.Semaphore(BATCH)

    async def run(job: Callable[[], Awaitable[T]]) -> T:
        async with slots:
            return await job()

    tasks = [asyncio.ensure_future(run(job)) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _trust(verify: bool | str | os.PathLike[str]) -> ssl.SSLContext:
    if isinstance(verify, bool):
        return httpx.create_ssl_context(verify=verify)
    try:
        return ssl.create_default_context(cafile=os.fspath(verify))
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"cannot read certificates from {os.fspath(verify)}: {error}") from error


def _is_address(url: str) -> bool:
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL:
        return False
    return url.startswith(("http://", "https://")) and bool(host) and "%" not in host  # % for what no host may have


def _message(value: dict[str, Any]) -> dict[str, Any]:
    """The body of a request in msgpack, as httpx takes it."""
    return {"content": pack(value), "headers": {"Content-Type": MSGPACK}}
