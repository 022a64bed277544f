"""The OpenAPI document describes the service: schemathesis generates valid and invalid requests from the document."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from served import Reasoner

# The first test includes the training of the model and the start of the service.
pytestmark = pytest.mark.timeout(900)


ASKING = ("/v1/reason", "/v1/chat/completions", "/v1/completions")
READING = ("/health", "/ready", "/v1/models", "/v1/models/{name}")


@pytest.fixture(scope="package")
def api(reasoner: Reasoner):
    return schemathesis.openapi.from_url(f"{reasoner.url}/openapi.json")


@pytest.mark.parametrize("path", ASKING)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_questions_are_answered_or_refused_as_the_document_promises(api, reasoner, path, mode):
    @settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(api[path]["POST"].as_strategy(generation_mode=mode))
    def holds(case):
        if isinstance(case.body, dict):
            affordable(case.body, reasoner.model)
        check(case, reasoner)

    holds()


@pytest.mark.parametrize("path", READING)
def test_what_can_be_read_is_as_the_document_promises(api, reasoner, path):
    @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(api[path]["GET"].as_strategy())
    def holds(case):
        check(case, reasoner)

    holds()


def check(case: schemathesis.Case, reasoner: Reasoner) -> None:
    case.call_and_validate(
        headers={"Authorization": f"Bearer {reasoner.key}"},
        timeout=120,
        # A schema cannot express all conditions, such as this service's limits and combinations of fields, so that the
        # service may reject requests that are valid by the schema.
        excluded_checks=[checks.positive_data_acceptance],
    )


def affordable(body: dict, model: str) -> None:
    """Makes the numbers small and the names valid, so that a question is answered, and soon."""
    for name, most in (("n", 3), ("best_of", 4), ("max_tokens", 4), ("max_completion_tokens", 4)):
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            body[name] = 1 + value % most
    if "model" in body and isinstance(body["model"], str):
        body["model"] = model
    if isinstance(body.get("task"), str):
        body["task"] = "arithmetic"
    if "max_tokens" not in body:
        body["max_tokens"] = 4


def test_every_reference_in_the_document_is_defined(reasoner):
    document = httpx.get(f"{reasoner.url}/openapi.json").json()

    def references(part):
        if isinstance(part, dict):
            yield from (value for key, value in part.items() if key == "$ref")
            for value in part.values():
                yield from references(value)
        elif isinstance(part, list):
            for value in part:
                yield from references(value)

    found = set(references(document))
    assert "#/components/schemas/Error" in found
    for reference in found:
        part = document
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]


def test_every_operation_says_what_it_answers(reasoner):
    document = httpx.get(f"{reasoner.url}/openapi.json").json()
    operations = [(path, how) for path, methods in document["paths"].items() for how in methods.values()]
    assert len(operations) == 7
    for path, operation in operations:
        assert operation["responses"]["200"]["content"]["application/json"]["schema"], path
        assert "422" not in operation["responses"], path
        assert operation["description"], path
        assert ("security" in operation) == path.startswith("/v1/"), path
