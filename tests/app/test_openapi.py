"""The OpenAPI document, and the settings as they are documented."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from app import examples
from app.limits import resolve
from app.schemas import Generation, GenerationCreate, Model, Readiness
from app.settings import GatewaySettings
from model.params import MAX_SEED
from tests.app.fake_worker import LARGE
from worker.contract.cards import Limits
from worker.contract.errors import InvalidField
from worker.contract.settings import ContractSettings


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    return dict((await client.get("/openapi.json")).json())


async def test_document_lists_every_route_with_summary_and_tag(document: dict[str, Any]) -> None:
    assert set(document["paths"]) == {
        "/v1/generations",
        "/v1/generations/{id}",
        "/v1/generations/{id}/images/{n}",
        "/v1/generations/{id}/cancel",
        "/v1/generations/{id}/events",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/webhooks/default/secret",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    assert not any("head" in path for path in document["paths"].values())
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert all(operation["summary"] and operation["description"] for operation in operations)
    assert {tag for operation in operations for tag in operation["tags"]} == {t["name"] for t in document["tags"]}


async def test_document_knows_one_shape_of_refusals(document: dict[str, Any]) -> None:
    assert "HTTPValidationError" not in document["components"]["schemas"]
    create = document["paths"]["/v1/generations"]["post"]["responses"]
    assert {"200", "202", "400", "404", "408", "413", "415", "422", "429", "503"} <= create.keys()
    for status in ("400", "422", "429", "503", "default"):
        schema = create[status]["content"]["application/json"]["schema"]
        assert schema["$ref"] == "#/components/schemas/ErrorBody"


async def test_refusals_of_the_path_that_is_replicates_too_are_documented_in_its_shape(
    document: dict[str, Any],
) -> None:
    answers = document["paths"]["/v1/webhooks/default/secret"]["get"]["responses"]
    refused = {status: one["content"].keys() for status, one in answers.items() if status != "200"}
    assert refused == dict.fromkeys(("401", "429", "503", "default"), {"application/problem+json": None}.keys())
    assert answers["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/WebhookSecret")


async def test_document_describes_every_field_of_a_request(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["GenerationCreate"]["properties"]
    assert fields.keys() == GenerationCreate.model_fields.keys()
    assert all("description" in field for field in fields.values())


async def test_images_are_documented_by_their_media_types(document: dict[str, Any]) -> None:
    content = document["paths"]["/v1/generations/{id}/images/{n}"]["get"]["responses"]["200"]["content"]
    assert content.keys() == {"image/png", "image/jpeg", "image/webp"}


def test_examples_are_what_they_say() -> None:
    for request in examples.REQUESTS:
        GenerationCreate.model_validate(request)
    for answer in (examples.QUEUED, examples.SUCCEEDED):
        assert Generation.model_validate(answer).model_dump(mode="json", by_alias=True) == answer
    Model.model_validate(examples.MODEL)
    Readiness.model_validate(examples.READY)


def test_example_of_a_wrong_field_is_what_is_said_of_it() -> None:
    _, code, message, field = examples.REFUSALS[422]
    with pytest.raises(InvalidField) as caught:
        resolve(GenerationCreate(model="sd3.5-large", prompt="x", width=1000), LARGE, ContractSettings(), request_id="")
    assert (caught.value.code, str(caught.value), caught.value.field) == (code, message, field)


def test_prose_tells_the_default_limits() -> None:
    limits, fields = Limits(), GenerationCreate.model_fields
    assert f"({limits.max_steps})" in str(fields["steps"].description)
    assert f"({limits.max_guidance_scale:g})" in str(fields["guidance_scale"].description)
    assert f"({limits.max_num_images})" in str(fields["num_images"].description)
    assert f"{limits.max_prompt_chars:,} characters" in str(fields["prompt"].description)


def test_largest_public_seed_leaves_room_for_all_pictures() -> None:
    largest = GenerationCreate(model="m", prompt="x", seed=2**53 - 5).seed
    assert largest is not None
    assert largest + Limits().max_num_images - 1 <= MAX_SEED


def test_every_setting_is_described() -> None:
    assert [name for name, field in GatewaySettings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    "wrong",
    [{"port": 70_000}, {"max_body_bytes": 1}, {"body_timeout_s": 0}, {"log_format": "xml"}, {"public_url": "ftp://x"}],
)
def test_wrong_setting_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        GatewaySettings(**wrong)


def test_settings_listen_on_loopback_by_default() -> None:
    assert GatewaySettings.model_fields["host"].default == "127.0.0.1"
