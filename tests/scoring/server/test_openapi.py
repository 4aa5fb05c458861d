"""The server keeps to what its `/openapi.json` says, whatever is sent."""

from __future__ import annotations

import numpy as np
import pytest
import requests
import schemathesis
from bombs import jpeg, mp4, npy
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case
from schemathesis.specs.openapi import checks
from siege import MiB, Siege, sentence

from rbm.scoring import wire

OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/model_info"),
    ("GET", "/gpu_status"),
    ("GET", "/metrics"),
    ("POST", "/v1/score"),
    ("POST", "/v1/compare"),
    ("POST", "/v1/rank"),
    ("POST", "/evaluate_batch_npy"),
    ("POST", "/evaluate_batch"),
]
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]


@pytest.fixture(scope="module")
def schema(siege: Siege) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{siege.server.url}/openapi.json", headers=siege.token)


def test_every_operation_is_tried(siege: Siege) -> None:
    paths = siege.get("/openapi.json").json()["paths"]
    assert sorted((method.upper(), path) for path, methods in paths.items() for method in methods) == sorted(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_documented(siege: Siege, schema: schemathesis.BaseSchema, method: str, path: str) -> None:
    operation = schema[path][method]
    seen: dict[int, int] = {}
    count = 10 if method == "GET" else 40

    @settings(
        max_examples=count,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=operation.as_strategy())
    def send(case: Case) -> None:
        answer = case.call_and_validate(headers=siege.token, checks=CHECKS, timeout=30)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        assert answer.status_code < 500 or answer.status_code == 503

    with siege.unharmed(growth=64 * MiB):
        send()
    assert sum(seen.values()) >= min(count, 5) or method == "GET", seen


@pytest.mark.parametrize(("method", "path"), [operation for operation in OPERATIONS if operation[0] == "POST"])
def test_what_is_against_the_document_is_refused(
    siege: Siege, schema: schemathesis.BaseSchema, method: str, path: str
) -> None:
    operation = schema[path][method]

    @settings(
        max_examples=30,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
    def send(case: Case) -> None:
        answer = case.call_and_validate(headers=siege.token, checks=CHECKS, timeout=30)
        assert 400 <= answer.status_code < 500

    with siege.unharmed(growth=64 * MiB):
        send()


def test_good_answers_fit_the_document_too(siege: Siege, schema: schemathesis.BaseSchema) -> None:
    """Random files are hardly ever clips, so that the checks above see few good answers."""
    files = {"video": mp4(jpeg(32, 24), 32, 24, 9), "a": npy(siege.frames), "b": npy(siege.frames[:1])}
    sample = {"sample_type": "progress", "trajectory": {"frames": [[[[1, 2, 3]]]], "task": "go"}}
    good = [
        ("/v1/score", {"files": {"video": files["video"]}, "data": {"task": "go", "dense": "true"}}),
        ("/v1/compare", {"files": {"a": files["a"], "b": files["b"]}, "data": {"task": "go"}}),
        ("/v1/rank", {"files": [("video", files["a"]), ("video", files["b"])], "data": {"task": "go"}}),
        (
            "/evaluate_batch",
            {"json": {"samples": [sample]}},
        ),
    ]
    for path, request in good:
        answer = requests.post(siege.server.url + path, headers=siege.token, timeout=30, **request)
        assert answer.status_code == 200, answer.text
        schema[path]["POST"].validate_response(answer)
        with pytest.raises(checks.JsonSchemaError):  # the check is one
            schema["/health"]["GET"].validate_response(answer)
    for path in ("/health", "/model_info", "/gpu_status", "/metrics"):
        answer = requests.get(siege.server.url + path, headers=siege.token, timeout=30)
        schema[path]["GET"].validate_response(answer)
    answer = siege.msgpack("/v1/rank", wire.pack({"videos": [np.zeros((1, 8, 8, 3), np.uint8)], "task": "go"}))
    assert answer.headers["content-type"] == "application/msgpack"
    sentence(siege.post("/v1/rank", {"content-type": "text/plain"}, content=b"x"), 415)
