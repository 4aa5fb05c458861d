"""What clients send over HTTP, and what they get: msgpack or forms in, msgpack or JSON out."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response

from rbm.errors import UserError
from rbm.scoring import wire
from rbm.scoring.scores import Scores
from rbm.scoring.server.engine import Upload, Video
from rbm.scoring.server.guard import MSGPACK, refusal_body, refusal_headers, wants_msgpack
from rbm.scoring.server.limits import Limits
from rbm.scoring.server.refusal import Refusal

_ARRAYS = ("progress", "progress_std", "success", "frame_index", "timestamp", "remaining")
_TRUE, _FALSE = ("true", "1"), ("false", "0", "")


@dataclass(frozen=True)
class Ask:
    """A request for scores: `videos` in the order in which they came, each under its task."""

    videos: Sequence[Video]
    tasks: Sequence[str]
    every: int | None = None
    dense: bool = False


async def read_score(request: Request, limits: Limits) -> Ask:
    """Raises Refusal for anything else than a clip or several to score."""
    if (fields := await _msgpack(request, limits, "clips", "every", "dense")) is not None:
        clips = fields.get("clips")
        if not isinstance(clips, list) or not all(isinstance(clip, dict) for clip in clips):
            raise Refusal("clips must be a list of maps: {'clips': [{'frames': …, 'task': '…'}]}")
        for clip in clips:
            _only(clip, "frames", "task")
        frames = [limits.check_frames(clip.get("frames")) for clip in clips]
        tasks = [limits.check_task(clip.get("task")) for clip in clips]
        dense = fields.get("dense")
        if dense is not None and not isinstance(dense, bool):
            raise Refusal("dense must be true or false")
        return Ask(frames, tasks, fields.get("every"), bool(dense))
    async with _form(request, limits, "video", "task", "every", "dense") as form:
        videos = await _uploads(form, "video")
        if len(videos) != 1:
            raise Refusal(f"send one video, not {len(videos)}; several go as msgpack, or one by one")
        every, dense_text = _text(form, "every"), _text(form, "dense").lower()
        if every and not (every.isascii() and every.isdigit() and len(every) < 10):
            raise Refusal("every must be a whole number: 1 for every frame, 2 for every second, …")
        if dense_text not in _TRUE + _FALSE:
            raise Refusal("dense must be true or false")
        task = limits.check_task(_text(form, "task"))
        return Ask(videos, [task], int(every) if every else None, dense_text in _TRUE)


async def read_compare(request: Request, limits: Limits) -> Ask:
    """Raises Refusal for anything else than two attempts at a task."""
    if (fields := await _msgpack(request, limits, "a", "b", "task")) is not None:
        return Ask(
            [limits.check_frames(fields.get(name)) for name in ("a", "b")], [limits.check_task(fields.get("task"))]
        )
    async with _form(request, limits, "a", "b", "task") as form:
        found = [await _uploads(form, name) for name in ("a", "b")]
        if any(len(one) != 1 for one in found):
            raise Refusal("send two videos, one as the field a and one as the field b")
        return Ask([one[0] for one in found], [limits.check_task(_text(form, "task"))])


async def read_rank(request: Request, limits: Limits) -> Ask:
    """Raises Refusal for anything else than attempts at a task."""
    if (fields := await _msgpack(request, limits, "videos", "task")) is not None:
        videos = fields.get("videos")
        if not isinstance(videos, list):
            raise Refusal("videos must be a list of arrays: {'videos': [frames, …], 'task': '…'}")
        return Ask([limits.check_frames(frames) for frames in videos], [limits.check_task(fields.get("task"))])
    async with _form(request, limits, "video", "task") as form:
        return Ask(await _uploads(form, "video"), [limits.check_task(_text(form, "task"))])


def answer(request: Request, fields: dict[str, Any]) -> Response:
    """The answer in the format that the client speaks; `Scores` in it become maps."""
    msgpack = _speaks_msgpack(request)
    plain = {name: _plain(value, msgpack) for name, value in fields.items()}
    if msgpack:
        return Response(wire.pack(plain), media_type=MSGPACK.decode())
    return Response(json.dumps(plain, ensure_ascii=False, allow_nan=False), media_type="application/json")


def refused(request: Request, refusal: Refusal, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that is not served."""
    body, content_type = refusal_body(refusal, _speaks_msgpack(request))
    return Response(body, refusal.status, {**refusal_headers(refusal), **(headers or {})}, content_type)


def _plain(value: Any, msgpack: bool) -> Any:
    if isinstance(value, list):
        return [_plain(item, msgpack) for item in value]
    if not isinstance(value, Scores):
        return value
    if not msgpack:
        return value.to_json()
    arrays = {name: getattr(value, name) for name in _ARRAYS if getattr(value, name) is not None}
    return {"task": value.task, "fps": value.fps, "n_frames": value.n_frames, **arrays}


def _speaks_msgpack(request: Request) -> bool:
    return wants_msgpack(dict(request.scope["headers"]))


async def _msgpack(request: Request, limits: Limits, *names: str) -> dict[str, Any] | None:
    """The map that was sent, none where it is no msgpack."""
    if not _speaks_msgpack(request):
        return None
    fields = wire.unpack(await request.body(), limits.body_bytes)
    if not isinstance(fields, dict):
        raise Refusal(f"send a map with {', '.join(names)}")
    _only(fields, *names)
    return fields


def _only(fields: dict[str, Any], *names: str) -> None:
    """Raises Refusal for a field that is not known: a slip of the pen would go unnoticed."""
    unknown = [name for name in fields if name not in names]
    if unknown:
        raise Refusal(f"the request has the field {unknown[0][:40]!r}; there are {', '.join(names)}")


@asynccontextmanager
async def open_form(request: Request, max_files: int, max_fields: int, max_part: int) -> AsyncIterator[FormData]:
    """A multipart form; its files are closed at the end.

    Args:
        max_files, max_fields: how many parts there may be, with and without a file name.
        max_part: bytes of a part without a file name.

    Raises:
        Refusal: it is something else, or malformed.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Refusal("send multipart/form-data with files, or application/msgpack with arrays", 415)
    try:
        form = await request.form(max_files=max_files, max_fields=max_fields, max_part_size=max_part)
    except UserError:
        raise
    except (ValueError, LookupError, UnicodeError) as error:  # of the parser, at headers that make no sense
        raise Refusal("the form cannot be read: it is malformed") from error
    try:
        yield form
    finally:
        await form.close()


@asynccontextmanager
async def _form(request: Request, limits: Limits, *names: str) -> AsyncIterator[FormData]:
    async with open_form(request, limits.clips, 16, 1 << 16) as form:
        _only(dict.fromkeys(form), *names)
        yield form


async def _uploads(form: FormData, name: str) -> list[Video]:
    files = form.getlist(name)
    if not all(isinstance(file, UploadFile) for file in files):
        raise Refusal(f"{name} must be a file: the bytes of a video, or of an .npy with uint8 frames (T, H, W, 3)")
    videos: list[Video] = []
    for file in files:
        assert isinstance(file, UploadFile)
        data = await file.read()
        if not data:
            raise Refusal(f"the file sent as {name} is empty")
        videos.append(Upload(data))
    return videos


def _text(form: FormData, name: str) -> str:
    values = form.getlist(name)
    if len(values) > 1 or any(not isinstance(value, str) for value in values):
        raise Refusal(f"{name} must be one text")
    return str(values[0]) if values else ""
