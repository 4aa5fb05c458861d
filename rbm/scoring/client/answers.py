"""Reads what the server answers over HTTP: scores, or why there are none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from rbm.errors import UserError
from rbm.scoring.client.errors import ClientError, RequestRefused, ServerUnavailable
from rbm.scoring.scores import Scores
from rbm.scoring.wire import unpack

MSGPACK = "application/msgpack"
UNAVAILABLE = 503
_FLOATS = ("progress", "progress_std", "success", "timestamp")


def decoded(url: str, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """A good answer, from JSON or msgpack.

    Raises:
        ClientError: it is neither; no scoring server stands at this address.
    """
    try:
        kind = headers.get("content-type", "")
        value = unpack(body) if kind.startswith(MSGPACK) else json.loads(body)
    except (UserError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise ClientError(f"{url} does not answer as a scoring server does; check the address")
    return value


def refusal(url: str, status: int, headers: Mapping[str, str], body: bytes) -> ClientError:
    """The exception for an answer that is none of 200 to 299."""
    try:
        answer = decoded(url, headers, body)
    except ClientError:
        answer = {}
    sentence = str(answer.get("error") or f"{url} answered with status {status}")
    if status == UNAVAILABLE and answer.get("retry", True):
        return ServerUnavailable(sentence, _seconds(headers.get("retry-after")))
    if 400 <= status < 500:
        return RequestRefused(sentence, status)
    return ClientError(sentence)


def field(answer: dict[str, Any], name: str) -> Any:
    """What stands under this name.

    Raises:
        ClientError: nothing does.
    """
    if name not in answer:
        raise ClientError(f"the server's answer lacks {name!r}; are client and server of the same version?")
    return answer[name]


def as_scores(answer: Any) -> Scores:
    """Scores as they were before they were sent.

    Raises:
        ClientError: something is missing.
    """
    try:
        floats = {
            name: np.array(answer[name], np.float32) for name in ("progress", "progress_std", "success", "timestamp")
        }
        remaining = answer.get("remaining")
        return Scores(
            **floats,
            frame_index=np.array(answer["frame_index"], np.int32),
            task=str(answer["task"]),
            fps=float(answer["fps"]),
            n_frames=int(answer["n_frames"]),
            remaining=None if remaining is None else np.array(remaining, np.float32),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ClientError("the server's scores cannot be read; are client and server of the same version?") from error


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:  # a date, which this server never sends
        return None
