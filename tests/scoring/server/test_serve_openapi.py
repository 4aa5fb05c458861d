"""Whatever schemathesis makes of `/openapi.json`: the answers are those that stand there, and none is a 5xx but 503."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]


def test_what_is_described_is_what_is_served(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/score", "/v1/compare", "/v1/rank", "/health", "/metrics"} <= {one.path for one in operations}
    for operation in operations:
        # a GET has nothing that could be wrong
        for mode in [GenerationMode.POSITIVE] + [GenerationMode.NEGATIVE] * (operation.method == "post"):
            statuses = _tried(operation.as_strategy(generation_mode=mode))
            assert statuses
            assert all(status < 500 for status in statuses), (operation.path, statuses)


def _tried(cases) -> set[int]:
    statuses = set()

    @given(cases)
    @settings(max_examples=25, database=None, suppress_health_check=list(HealthCheck))
    def tried(case: Case) -> None:
        response = case.call(timeout=30)
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    tried()
    return statuses
