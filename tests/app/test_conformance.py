"""Whatever a client sends: no answer is a failure of ours, each is as the OpenAPI document says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from app.settings import GatewaySettings
from tests.app.dialects.conftest import Live
from tests.app.fake_worker import FakeWorker
from tests.conftest import Valkey

OPERATIONS = (
    "POST /v1/generations",
    "GET /v1/generations",
    "GET /v1/generations/{id}",
    "DELETE /v1/generations/{id}",
    "POST /v1/generations/{id}/cancel",
    "GET /v1/generations/{id}/events",
    "GET /v1/generations/{id}/images/{n}",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /v1/webhooks/default/secret",
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
)

# A document cannot say what a model's card says: which sizes and numbers of steps it takes.
UNCHECKED = [positive_data_acceptance]


@dataclass(frozen=True)
class Api:
    """A gateway on a port, and what its document says of it."""

    url: str
    schema: Any

    def finished(self) -> str:
        """The id of a generation that has pictures."""
        body = {"model": "tiny", "prompt": "a red circle"}
        answer = httpx.post(f"{self.url}/v1/generations", json=body, headers={"prefer": "wait=10"}, trust_env=False)
        return str(answer.raise_for_status().json()["id"])

    def operation(self, label: str) -> Any:
        method, path = label.split()
        return self.schema[path][method]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("conformance")
    server = Valkey(folder)
    server.start()
    settings = GatewaySettings(redis_url=server.url, store_dir=folder / "pictures")  # type: ignore[arg-type]
    try:
        with FakeWorker(settings), Live(settings) as live:
            yield Api(live.url, schemathesis.openapi.from_url(f"{live.url}/openapi.json"))
    finally:
        server.stop()


def conforms(api: Api, label: str, examples: int, *, derandomize: bool) -> int:
    """Sends so many requests, those that the document allows and others, half of them about a known generation."""
    sent = 0

    @given(case=api.operation(label).as_strategy(generation_mode=GenerationMode.POSITIVE))
    @given_settings(examples, derandomize)
    def allowed(case: Any) -> None:
        send(case)

    @given(case=api.operation(label).as_strategy(generation_mode=GenerationMode.NEGATIVE))
    @given_settings(examples, derandomize)
    def not_allowed(case: Any) -> None:
        send(case)

    def send(case: Any) -> None:
        nonlocal sent
        sent += 1
        if "id" in (case.path_parameters or {}) and sent % 2:
            case.path_parameters = {**case.path_parameters, "id": api.finished()}
        case.call_and_validate(excluded_checks=UNCHECKED)

    allowed()
    with suppress(Unsatisfiable):  # there is nothing about it that could be wrong
        not_allowed()
    return sent


def given_settings(examples: int, derandomize: bool) -> Any:
    return hypothesis_settings(
        max_examples=examples,
        deadline=None,
        derandomize=derandomize,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # an HTTP exchange says enough as it is
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_as_documented(api: Api, label: str) -> None:
    assert conforms(api, label, 15, derandomize=True) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_answers_are_as_documented_at_length(api: Api, subtests: pytest.Subtests) -> None:
    sent = {}
    for label in OPERATIONS:
        with subtests.test(label):
            sent[label] = conforms(api, label, 200, derandomize=False)
    assert sum(sent.values()) >= 2_000, sent


def test_all_operations_are_tried(api: Api) -> None:
    assert {operation.ok().label for operation in api.schema.get_all_operations()} == set(OPERATIONS)
