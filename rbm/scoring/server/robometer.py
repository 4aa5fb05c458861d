"""The HTTP interface of the published Robometer server, so that clients written for it work unchanged.

A request is a batch of samples: *progress* (one clip, one instruction) or *preference* (two clips, of which the client
calls one chosen and one rejected). Pixels come as .npy files beside the JSON of the samples (`/evaluate_batch_npy`), or
as nested lists within it (`/evaluate_batch`). The answer has one list for each kind of output, in the order in which
the samples of that kind were sent; an output of which there is none is null.

What differs from that server, on purpose:

- Clips of one request may differ in length and size, and kinds may be mixed.
- A mistake in the request is a 4xx with a sentence. A path to frames is never read.
- Each frame is scored from what came before it, whether `use_frame_steps` is set or not. So the flag changes no score,
  and no clip is too long: beyond the model's context a clip is scored as a live session would.
- An answer has as many numbers as the clip has frames, also where that is one.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from numpy.typing import NDArray
from starlette.responses import JSONResponse, Response

from rbm import __version__
from rbm.scoring.server import schema
from rbm.scoring.server.bodies import open_form
from rbm.scoring.server.engine import STORED_FRAMES, Engine, all_of
from rbm.scoring.server.limits import Limits
from rbm.scoring.server.npy import read_npy
from rbm.scoring.server.refusal import Refusal, busy

Frames = NDArray[np.uint8]
Floats = NDArray[np.float32]

CHOSEN_FIRST = 1.0
"""The label of every pair: the chosen trajectory is read as the first, so that 1 is the answer the client expects."""

MAX_FIELD = 1 << 20
"""Bytes of the JSON of a sample, beside its pixels."""

MAX_JSON = 8 << 20
"""Bytes of a JSON text: what it becomes in memory may be twenty times as large."""


@dataclass(frozen=True)
class ProgressSample:
    """One clip to score. frames: uint8 (T, H, W, 3), RGB."""

    frames: Frames
    task: str


@dataclass(frozen=True)
class PreferenceSample:
    """Two clips to compare, as attempts at `task`. chosen, rejected: uint8 (T, H, W, 3), RGB, of any lengths."""

    chosen: Frames
    rejected: Frames
    task: str


Sample = ProgressSample | PreferenceSample


def samples_of_form(fields: Mapping[str, str], files: Mapping[str, bytes], limits: Limits) -> list[Sample]:
    """The samples of a multipart form: `sample_0`, `sample_1`, … are JSON, files are .npy by the name of their part.

    Files that no clip refers to are not looked at, nor are fields of other names.

    Raises:
        Refusal: there is no sample, one is missing in the row, or one is not what it should be.
    """
    names = {name for name in fields if name.startswith("sample_")}
    row = [f"sample_{i}" for i in range(len(names))]
    if not row or names != set(row):
        found = ", ".join(sorted(names)[:8]) or "none"
        raise Refusal(f"samples must come as the form fields sample_0, sample_1, … without a gap; found {found[:80]}")
    _check_count(len(row), limits)
    return [_sample(parse_json(fields[name], name), name, files, limits) for name in row]


def samples_of_json(body: Any, limits: Limits) -> list[Sample]:
    """The samples of a JSON object: {"samples": [...], "use_frame_steps": bool}, or as the values of any other keys.

    Raises:
        Refusal: there is no sample, or one is not what it should be.
    """
    if not isinstance(body, dict):
        raise Refusal('the request must be a JSON object, {"samples": [...]}')
    others = [value for key, value in body.items() if key != "use_frame_steps"]
    if "samples" in body:
        samples = body["samples"]
    else:
        samples = others[0] if len(others) == 1 and isinstance(others[0], list) else others
    if not isinstance(samples, list) or not samples:
        raise Refusal('there are no samples; send {"samples": [{"sample_type": "progress", "trajectory": {…}}]}')
    _check_count(len(samples), limits)
    return [_sample(sample, f"samples[{i}]", {}, limits) for i, sample in enumerate(samples)]


def parse_json(text: str | bytes, what: str) -> Any:
    """The value of a JSON text.

    Raises:
        Refusal: it is malformed, or nested too deep to be read.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        raise Refusal(f"{what} is not JSON: {reason}") from error


def outputs(scored: Sequence[tuple[Floats, Floats]], preferred: Sequence[float]) -> dict[str, Any]:
    """The answer: `scored` has (progress, success) of every progress sample, `preferred` P(the chosen is better) of
    every pair.
    """
    pairs = {
        "predictions": [int(p > 0.5) for p in preferred],
        "prediction_probs": [float(p) for p in preferred],
        "preference_labels": [CHOSEN_FIRST] * len(preferred),
    }
    return {
        "outputs_preference": pairs if preferred else None,
        "outputs_progress": {"progress_pred": [progress.tolist() for progress, _ in scored]} if scored else None,
        "outputs_success": {"success_probs": [success.tolist() for _, success in scored]} if scored else None,
    }


async def evaluate(engine: Engine, samples: Sequence[Sample]) -> dict[str, Any]:
    """The answer to a batch, scored by the workers in as few forwards as they can.

    Raises:
        Refusal: as `Engine.score`.
    """
    clips = [(sample.frames, sample.task) for sample in samples if isinstance(sample, ProgressSample)]
    pairs = [sample for sample in samples if isinstance(sample, PreferenceSample)]
    whole = min(engine.info.get("context_frames", STORED_FRAMES), STORED_FRAMES)
    long = [len(frames) > whole for frames, _ in clips]
    asked: list[Awaitable[Any]] = [
        engine.score([clip for clip, is_long in zip(clips, long, strict=True) if is_long == kind], 1 if kind else None)
        for kind in (False, True)
        if kind in long
    ]
    asked += [engine.compare(pair.chosen, pair.rejected, pair.task) for pair in pairs]
    answers = await all_of(asked)
    scores = {kind: iter(answers.pop(0)) for kind in (False, True) if kind in long}
    scored = [next(scores[kind]) for kind in long]
    return outputs([(one.progress, one.success) for one in scored], [p for p, _, _ in answers])


def add_routes(app: FastAPI, engine: Engine) -> None:
    """`/evaluate_batch_npy`, `/evaluate_batch`, `/gpu_status` and `/model_info`."""
    limits = engine.limits

    @app.post(
        "/evaluate_batch_npy",
        response_model=schema.Outputs,
        responses=schema.problems(400, 401, 408, 413, 415, 503),
        openapi_extra=schema.EVALUATE_FORM,
    )
    async def evaluate_batch_npy(request: Request) -> Response:
        """Samples as the published server takes them, the pixels in .npy files."""
        # a trajectory may come with three more arrays, which are not looked at
        async with open_form(request, 8 * limits.clips, limits.clips + 8, MAX_FIELD) as form:
            fields: dict[str, str] = {}
            files: dict[str, bytes] = {}
            for name, value in form.multi_items():
                if name in fields or name in files:
                    raise Refusal(f"two parts of the form are named {name[:80]!r}; send one")
                if isinstance(value, str):
                    fields[name] = value
                else:
                    files[name] = await value.read()
        return JSONResponse(await evaluate(engine, samples_of_form(fields, files, limits)))

    @app.post(
        "/evaluate_batch",
        response_model=schema.Outputs,
        responses=schema.problems(400, 401, 408, 413, 415, 503),
        openapi_extra=schema.EVALUATE_JSON,
    )
    async def evaluate_batch(request: Request) -> Response:
        """Samples as the published server takes them, the pixels as nested lists."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal("send application/json, or .npy files to /evaluate_batch_npy", 415)
        text = await request.body()
        if len(text) > MAX_JSON:
            raise Refusal(f"the JSON has {len(text)} bytes; more than {MAX_JSON} go to /evaluate_batch_npy", 413)
        return JSONResponse(await evaluate(engine, samples_of_json(parse_json(text, "the request"), limits)))

    @app.get("/gpu_status", responses=schema.problems(401))
    async def gpu_status() -> dict[str, Any]:
        """How busy each worker is, and its memory and sessions."""
        stats = {
            str(i): {"status": "starting" if not worker.ready else "processing" if worker.in_flight else "ready"}
            for i, worker in enumerate(engine.workers)
        }
        free = sum(stat["status"] == "ready" for stat in stats.values())
        total = len(engine.workers)
        counts = {"total_gpus": total, "available_gpus": free, "max_workers": total, "pool_size": total}
        return {**counts, "gpu_stats": stats, "workers": await engine.devices()}

    @app.get("/model_info", responses=schema.problems(401, 503))
    async def model_info() -> dict[str, Any]:
        """What the model is."""
        info = engine.info
        if not info:
            raise busy("no worker is ready; try again in a moment", retry_after=2.0)
        published = {
            "model_path": info["checkpoint"],
            "num_gpus": len(engine.workers),
            "experiment_config": {
                "data": {"max_frames": info["context_frames"]},
                "model": {"base_model_id": info["model"], "model_type": "default"},
            },
            "model_architecture": {"model_class": info["model"], "total_parameters": info["parameters"]},
        }
        return {**info, "version": __version__, "limits": limits.public(), **published}


def _sample(value: Any, what: str, files: Mapping[str, bytes], limits: Limits) -> Sample:
    if not isinstance(value, dict):
        raise Refusal(f"{what} must be a JSON object with a sample_type")
    kind = value.get("sample_type")
    if kind == "progress":
        frames, task = _trajectory(value, "trajectory", what, files, limits)
        return ProgressSample(frames, limits.check_task(task))
    if kind == "preference":
        chosen, task = _trajectory(value, "chosen_trajectory", what, files, limits)
        rejected, _ = _trajectory(value, "rejected_trajectory", what, files, limits)
        return PreferenceSample(chosen, rejected, limits.check_task(task))
    raise Refusal(f'{what}.sample_type is {_shown(kind)}; it must be "progress" or "preference"')


def _trajectory(
    sample: dict[str, Any], key: str, what: str, files: Mapping[str, bytes], limits: Limits
) -> tuple[Frames, Any]:
    """Frames, uint8 (T, H, W, 3) in C order, and the instruction as it stands there."""
    trajectory = sample.get(key)
    if not isinstance(trajectory, dict):
        raise Refusal(f"{what}.{key} must be a JSON object with frames and a task")
    frames = _frames(trajectory.get("frames"), f"{what}.{key}.frames", files)
    limits.check_size(*frames.shape[:3])
    return limits.check_frames(_rgb(frames)), trajectory.get("task")


def _frames(value: Any, what: str, files: Mapping[str, bytes]) -> Frames:
    if isinstance(value, dict) and isinstance(value.get("__numpy_file__"), str):
        name = value["__numpy_file__"]
        if name not in files:
            raise Refusal(f"{what} refers to the file {_shown(name)}, which was not sent; send it as a part so named")
        return read_npy(files[name], f"the file {_shown(name)}")
    if isinstance(value, str) or (isinstance(value, list) and any(isinstance(item, str) for item in value)):
        raise Refusal(f"{what} names paths, which this server never reads; send the pixels")
    if isinstance(value, list):
        return _from_lists(value, what)
    raise Refusal(
        f'{what} must be {{"__numpy_file__": the name of a file part}}, or nested lists (T, H, W, C) of 0 to 255'
    )


def _from_lists(value: list[Any], what: str) -> Frames:
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, RecursionError) as error:  # lists of unequal lengths
        raise Refusal(f"{what} is no regular array; send nested lists (T, H, W, C) of 0 to 255") from error
    if array.dtype.kind not in "iu" or array.ndim != 4 or (array.size and not 0 <= array.min() <= array.max() <= 255):
        raise Refusal(f"{what} must be nested lists (T, H, W, C) of whole numbers from 0 to 255")
    return array.astype(np.uint8)


def _rgb(frames: Frames) -> Frames:
    """(T, H, W, C) as (T, H, W, 3) in C order: alpha is dropped, grey becomes colour."""
    if frames.shape[3] not in (1, 3, 4):
        raise Refusal(f"frames have the shape {frames.shape}; send (T, H, W, C) with 1, 3 or 4 channels")
    return np.repeat(frames, 3, axis=3) if frames.shape[3] == 1 else np.ascontiguousarray(frames[..., :3])


def _check_count(samples: int, limits: Limits) -> None:
    if samples > limits.clips:
        raise Refusal(f"{samples} samples, this server takes {limits.clips} in a request; send fewer", 413)


def _shown(value: Any) -> str:
    """What the client sent, as far as it is fit to be repeated: texts, shortened."""
    return repr(value[:80]) if isinstance(value, str) else f"a {type(value).__name__}"
