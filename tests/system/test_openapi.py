"""The document at /openapi.json is true: what it allows and what it does not never ends in a fault, and every answer is
as it says. Each operation is bounded in time by itself; TRAMONTANE_TEST_OPENAPI_EXAMPLES asks for more."""

import os
import time

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from test_tools import talking

EXAMPLES = int(os.environ.get("TRAMONTANE_TEST_OPENAPI_EXAMPLES", "100"))
# For all operations; each has its share, and examples beyond it as long as it has few.
SECONDS_MAX = 45 if EXAMPLES <= 100 else 3600
EXAMPLES_MIN = min(20, EXAMPLES)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# What makes answers long, with what keeps them short.
SMALL = {"max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2, "n": 2, "best_of": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its model has tokens for calls: requests with tools go all the way too."""
    server = talking(tmp_path_factory.mktemp("talking"), "list")
    yield server
    server.stop()


def keep_small(body):
    """The model is small but not instant: answers are short and few."""
    if not isinstance(body, dict):
        return body
    limit = "max_output_tokens" if "input" in body else "max_tokens"
    body = {limit: 2, **body}
    for name, most in SMALL.items():
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            body[name] = most
    if body.get("min_tokens") and isinstance(body["min_tokens"], int):
        body["min_tokens"] = min(body["min_tokens"], 2)
    return body


def tried(operation, mode, seconds):
    """Calls it with examples until its time is over; returns their number."""
    began, num_calls = time.monotonic(), 0

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case):
        nonlocal num_calls
        if num_calls >= EXAMPLES_MIN and time.monotonic() - began > seconds:
            return
        case.body = keep_small(case.body)
        case.call_and_validate(checks=CHECKS, timeout=60)
        num_calls += 1

    ask()
    return num_calls


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_every_answer_is_as_the_document_says(server, mode):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    if mode is schemathesis.GenerationMode.NEGATIVE:
        operations = [operation for operation in operations if operation.body]  # else nothing could be wrong
    # The others have one example.
    with_input = [operation for operation in operations if operation.body or operation.path_parameters]
    counts = {operation.label: tried(operation, mode, SECONDS_MAX / len(with_input)) for operation in operations}
    print(", ".join(f"{label}: {count}" for label, count in counts.items()))
    for operation in operations:
        least = EXAMPLES_MIN if operation in with_input else 1
        assert counts[operation.label] >= least, f"{operation.label} was hardly tried: {counts}"
    assert server.alive()
