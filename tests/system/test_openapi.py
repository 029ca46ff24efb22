"""The document at /openapi.json is true: what it allows and what it does not never ends in a fault, and every answer is
as it says. Bounded in time; TRAMONTANE_TEST_OPENAPI_EXAMPLES asks for more."""

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

EXAMPLES = int(os.environ.get("TRAMONTANE_TEST_OPENAPI_EXAMPLES", "100"))
SECONDS_MAX = 45 if EXAMPLES <= 100 else 3600
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# What makes answers long, with what keeps them short.
SMALL = {"max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2, "n": 2, "best_of": 2}


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


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_every_answer_is_as_the_document_says(server, mode):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    began, num_calls = time.monotonic(), 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing that could be wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case):
            nonlocal num_calls
            if time.monotonic() - began > SECONDS_MAX:
                return
            case.body = keep_small(case.body)
            case.call_and_validate(checks=CHECKS, timeout=60)
            num_calls += 1

        ask()
    assert num_calls >= 100, "the document was not tried"
    assert server.alive()
