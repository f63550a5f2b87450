"""Schemathesis against a real server: no server error, no answer that /openapi.json does not describe.

MLXD_OPENAPI_CASES=200 pytest tests/e2e/test_openapi.py tries that many cases for each operation and each of
the two modes (bodies that fit the schema, and bodies that do not), other ones every time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from bench.server import ServerProcess
from mlxd.api.app import ROUTES
from mlxd.api.openapi import OPERATIONS
from tests.e2e.conftest import assert_empty

CASES = int(os.environ.get("MLXD_OPENAPI_CASES", "0"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
CONFIG = {
    "worker": {"backend": "playback"},
    # Small, so that what asks for as much as it can get is soon over.
    "model": {"max_model_len": 256},
    "limits": {"max_choices": 4, "max_prompts": 4, "timeout_seconds": 10.0},
}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(CONFIG) as server:
        yield server
        assert_empty(server)


@pytest.fixture(scope="module")
def schema(server: ServerProcess) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def modes(method: str, path: str) -> list[GenerationMode]:
    """What can be tried: without a body there is nothing to get wrong, as any text may be an id."""
    known = OPERATIONS.get((method, path))
    has_body = known is not None and known.request is not None
    return list(GenerationMode) if has_body else [GenerationMode.POSITIVE]


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(method, path, mode) for method, path, _ in ROUTES for mode in modes(method, path)],
)
def test_answers_are_as_described(schema: Any, method: str, path: str, mode: GenerationMode) -> None:
    operation = schema[path][method]

    @settings(
        max_examples=CASES or 12,
        derandomize=not CASES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Case) -> None:
        if isinstance(case.body, dict):
            case.body.pop("timeout", None)  # the client's own wish for a 504
            if mode is GenerationMode.POSITIVE and "model" in case.body:
                case.body["model"] = "default"  # else nearly every case ends with a 404
        case.call_and_validate(checks=CHECKS)

    call()
