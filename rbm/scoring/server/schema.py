"""What `/openapi.json` says of requests and answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class ScoresBody(BaseModel):
    """Scores of one video, one number for each frame that was looked at."""

    task: str = Field(description="The instruction.")
    fps: float = Field(description="Frames a second of the video.")
    n_frames: int = Field(description="Frames of the video.")
    frame_index: list[int] = Field(description="Which frame of the video each number is for.")
    timestamp: list[float] = Field(description="Its time, in seconds from the first frame.")
    progress: list[float] = Field(description="How far along the task is, 0 to 1.")
    progress_std: list[float] = Field(description="The spread that the model gives to it.")
    success: list[float] = Field(description="Probability that the task is done.")
    remaining: list[float] | None = Field(None, description="Seconds until it is done, where the model says them.")


class ScoreAnswer(BaseModel):
    scores: list[ScoresBody]


class CompareAnswer(BaseModel):
    p_a_better: float = Field(ge=0, le=1, description="Probability that attempt a is the better one.")
    a: ScoresBody
    b: ScoresBody


class RankAnswer(BaseModel):
    order: list[int] = Field(description="Positions of the videos, best attempt first.")
    scores: list[ScoresBody] = Field(description="In the order in which the videos came.")


class Health(BaseModel):
    status: str = Field(description="healthy, starting or draining; it is 200 for healthy alone.")
    ready: bool = Field(description="Whether every worker takes requests.")
    workers: int
    workers_ready: int
    available_gpus: int = Field(description="As workers_ready, under the name that the published server gives it.")
    total_gpus: int = Field(description="As workers.")
    version: str
    error: str | None = None
    retry: bool | None = None


class Problem(BaseModel):
    """Why a request is not served."""

    error: str = Field(description="A sentence that says what to do.")
    retry: bool = Field(description="Whether the same request may work later (see Retry-After).")


_SENTENCES = {
    400: "The request is not what it should be.",
    401: "The token is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "More than this server takes.",
    415: "A kind of body or of file that this server does not read.",
    503: "Busy, starting or shutting down: try again after Retry-After seconds.",
}
_PROBLEM = {"schema": {"$ref": "#/components/schemas/Problem"}}
_FRAMES = "array of uint8 (T, H, W, 3), RGB: extension 1 with the msgpack list [dtype, shape, bytes]"


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Answers other than the good one."""
    return {
        status: {
            "model": Problem,
            "description": _SENTENCES[status],
            "content": {"application/msgpack": _PROBLEM},
        }
        for status in statuses
    }


def good(name: str) -> dict[int | str, dict[str, Any]]:
    """That a request sent as msgpack is answered as msgpack."""
    schema = {"schema": {"$ref": f"#/components/schemas/{name}"}}
    return {200: {"description": "The scores.", "content": {"application/msgpack": schema}}}


def body(form: dict[str, Any], required: list[str], msgpack: str) -> dict[str, Any]:
    """A request's body: a form, or msgpack, which a schema cannot describe."""
    fields = {"type": "object", "properties": form, "required": required, "additionalProperties": False}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": fields},
                "application/msgpack": {"schema": {"type": "string", "format": "binary", "description": msgpack}},
            },
        }
    }


FILE = {
    "type": "string",
    "format": "binary",
    "description": "The bytes of a video file, or of an .npy file of uint8 (T, H, W, 3).",
}
TASK = {"type": "string", "minLength": 1, "maxLength": 2000, "pattern": r"\S", "description": "The instruction."}
SCORE = body(
    {
        "video": FILE,
        "task": TASK,
        "every": {
            "type": "integer",
            "minimum": 1,
            "maximum": 999_999_999,
            "description": "Score every so many frames, each from what came before; left out, the model looks once.",
        },
        "dense": {"type": "boolean", "description": "Interpolate to every frame of the video."},
    },
    ["video", "task"],
    f"{{clips: [{{frames: {_FRAMES}, task}}], every: int or null, dense: bool}}",
)
COMPARE = body({"a": FILE, "b": FILE, "task": TASK}, ["a", "b", "task"], f"{{a: {_FRAMES}, b, task}}")
RANK = body(
    {"video": {"type": "array", "items": FILE, "minItems": 1}, "task": TASK},
    ["video", "task"],
    f"{{videos: list of {_FRAMES}, task}}",
)


class ProgressOutputs(BaseModel):
    progress_pred: list[list[float]] = Field(description="Of each progress sample, one number for each frame, 0 to 1.")


class SuccessOutputs(BaseModel):
    success_probs: list[list[float]] = Field(description="As `progress_pred`: probability that the task is done.")


class PreferenceOutputs(BaseModel):
    predictions: list[int] = Field(description="Of each preference sample: 1 where the chosen one is the better.")
    prediction_probs: list[float] = Field(description="Probability that it is.")
    preference_labels: list[float] = Field(description="1 always: the chosen one is read as the first.")


class Outputs(BaseModel):
    outputs_preference: PreferenceOutputs | None
    outputs_progress: ProgressOutputs | None
    outputs_success: SuccessOutputs | None


EVALUATE_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["sample_0"],
                    "properties": {
                        "sample_0": {
                            "type": "string",
                            "description": "JSON of a sample; further ones are sample_1, sample_2, … "
                            '{"sample_type": "progress", "trajectory": {"frames": {"__numpy_file__": "NAME"}, "task": '
                            '"…"}}, or "preference" with chosen_trajectory and rejected_trajectory. NAME is another '
                            "part of the form: a file that numpy.save wrote, uint8 (T, H, W, C).",
                        },
                        "use_frame_steps": {"type": "string", "description": "Changes nothing."},
                    },
                    "additionalProperties": {"type": "string", "format": "binary"},
                }
            }
        },
    }
}
EVALUATE_JSON = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["samples"],
                    "properties": {
                        "samples": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "object"},
                            "description": "As in /evaluate_batch_npy, frames as nested lists (T, H, W, C).",
                        },
                        "use_frame_steps": {"type": "boolean", "description": "Changes nothing."},
                    },
                }
            }
        },
    }
}
