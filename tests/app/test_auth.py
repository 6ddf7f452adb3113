"""Who is let in, with which key, to do what; and when nobody needs one."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.datastructures import Headers

from app.auth import ANONYMOUS, Doorkeeper, presented
from app.errors import Unauthorized
from app.main import create_app
from app.settings import GatewaySettings, is_loopback
from app.stack import StackSettings
from tests.app.conftest import client_of, key_of, until
from tests.app.fake_worker import FakeWorker
from tests.conftest import Valkey
from worker.contract.keys import Keyring, Keys
from worker.contract.settings import complaints

TINY = {"model": "tiny", "prompt": "a red circle"}
OPEN = {"/openapi.json", "/healthz", "/readyz", "/metrics"}
NAMED = {"id": "gen_" + "0" * 31, "n": "0"}
"""Parameters of paths that must have a form."""


@pytest.fixture
def settings(settings: GatewaySettings) -> GatewaySettings:
    """Keys are on."""
    return settings.model_copy(update={"auth": "on"})


def settings_of(**given: Any) -> GatewaySettings:
    return GatewaySettings(**given)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_keys_are_off_where_only_this_machine_can_ask(host: str) -> None:
    assert is_loopback(host)
    assert not settings_of(host=host).keys_on
    assert settings_of(host=host, auth="on").keys_on


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.7", "gateway.internal", "::ffff:10.0.0.7"])
def test_keys_are_on_where_others_can_ask(host: str) -> None:
    assert settings_of(host=host).keys_on


def test_keys_are_off_on_a_public_address_only_if_said_twice() -> None:
    with pytest.raises(ValidationError) as refused:
        settings_of(host="0.0.0.0", auth="off")
    told = complaints(refused.value)
    assert "DARKROOM_AUTH is off and DARKROOM_HOST is 0.0.0.0" in told
    assert "DARKROOM_AUTH_OFF_ON_PUBLIC=yes" in told
    assert not settings_of(host="0.0.0.0", auth="off", auth_off_on_public="yes").keys_on


def test_said_twice_alone_turns_nothing_off() -> None:
    assert settings_of(host="0.0.0.0", auth_off_on_public=True).keys_on


def test_a_default_rate_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="such as 120/minute"):
        settings_of(key_rate="often")


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ({"authorization": "Bearer dr_1"}, "dr_1"),
        ({"authorization": "bearer   dr_1 "}, "dr_1"),
        ({"authorization": "TOKEN dr_1"}, "dr_1"),
        ({"x-api-key": "dr_1"}, "dr_1"),
        ({"authorization": "Basic dXNlcjpwYXNz", "x-api-key": "dr_1"}, "dr_1"),
        ({"authorization": "Bearer dr_1", "x-api-key": "dr_2"}, "dr_1"),
        ({"authorization": "Basic dXNlcjpwYXNz"}, None),
        ({"authorization": "Bearer"}, None),
        ({"x-api-key": ""}, None),
        ({}, None),
    ],
)
def test_a_key_is_found_where_clients_put_it(headers: dict[str, str], text: str | None) -> None:
    assert presented(Headers(headers)) == text


async def test_where_keys_are_off_everybody_is_anonymous_and_may_do_all() -> None:
    door = Doorkeeper.connect(settings_of())
    assert await door.caller(Headers({"authorization": "Bearer nonsense"})) == ANONYMOUS
    assert await door.spend(ANONYMOUS) is None
    await door.close()


@pytest.mark.parametrize(
    "path", ["/v1/generations", "/v1/generations/gen_0/images/0", "/v1/generations/gen_0/events", "/v1/models"]
)
async def test_who_has_no_key_is_told_that_before_what_is_wrong_with_a_query(
    client: httpx.AsyncClient, path: str
) -> None:
    assert (await client.get(f"{path}?status=failed")).status_code == 401


async def test_a_key_may_have_any_number_of_jobs_though_others_may_not(settings: GatewaySettings) -> None:
    door = Doorkeeper.connect(settings.model_copy(update={"key_max_active": 5}))
    free = await door.caller(Headers(key_of(settings, "free", max_active=0)))
    await door.close()
    assert free.max_active is None


async def test_a_caller_is_what_its_key_says_and_the_settings_where_it_says_nothing(settings: GatewaySettings) -> None:
    door = Doorkeeper.connect(settings.model_copy(update={"key_rate": "7/minute", "key_max_active": 5}))
    plain = await door.caller(Headers(key_of(settings, "plain")))
    own = await door.caller(Headers(key_of(settings, "own", rate="none", max_active=2, scopes=("read",))))
    root = await door.caller(Headers(key_of(settings, "root", scopes=("admin",))))
    await door.close()
    assert (plain.name, plain.rate, plain.max_active, plain.scopes) == ("plain", "7/minute", 5, {"generate", "read"})
    assert (own.rate, own.max_active, own.scopes) == (None, 2, {"read"})
    assert root.scopes == ANONYMOUS.scopes


async def test_unknown_ids_cost_a_comparison_like_known_ones(settings: GatewaySettings) -> None:
    compared: list[bool] = []

    def same(one: str, other: str) -> bool:
        compared.append(one == other)
        return one == other

    keys = Keys.connect(settings)
    door = Doorkeeper(settings, keys, same)
    headers = key_of(settings, "ci")
    await door.caller(Headers(headers))
    text = headers["authorization"]
    for wrong in (text[:-43] + "x" * 43, text.replace(text[10:22], "0" * 12)):
        with pytest.raises(Unauthorized, match="the API key is not known here"):
            await door.caller(Headers({"authorization": wrong}))
    await door.close()
    assert compared == [True, False, False]


def test_the_gateway_compares_in_constant_time_unless_told_otherwise() -> None:
    assert Doorkeeper.__init__.__defaults__ == (hmac.compare_digest,)


async def test_no_route_but_the_open_ones_answers_without_a_key(app: FastAPI, client: httpx.AsyncClient) -> None:
    """Every route that there is: those of dialects, and those that somebody adds tomorrow."""
    asked = 0
    for path, method in operations(app):
        if path in OPEN or is_page(path):
            continue
        url = re.sub(r"\{(\w+)[^}]*\}", lambda match: NAMED.get(match[1], "x"), path)
        answer = await client.request(method, url, json={} if method in ("POST", "PUT") else None)
        assert answer.status_code == 401, (method, path, answer.text)
        assert answer.headers["www-authenticate"].startswith("Bearer")
        asked += 1
    assert asked > 20


@pytest.mark.parametrize("path", sorted(OPEN))
async def test_health_and_the_document_need_no_key(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 200


async def test_a_missing_key_is_told_how_to_be_sent(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/generations")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (401, "unauthorized")
    assert "Authorization: Bearer dr_..." in error["message"]


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
async def test_a_wrong_key_is_refused_and_not_repeated(client: httpx.AsyncClient, header: str) -> None:
    for text in ("dr_short", "sk-" + "a" * 40, "dr_0123456789ab_" + "q" * 43):
        answer = await client.get("/v1/models", headers={header: text if header == "x-api-key" else f"Bearer {text}"})
        assert answer.status_code == 401
        assert text not in answer.text


async def test_a_revoked_key_is_refused(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    headers = key_of(settings, "ci")
    assert (await client.get("/v1/models", headers=headers)).status_code == 200
    with Keyring.connect(settings) as keyring:
        keyring.revoke("ci")

    async def refused() -> str:
        answer = await client.get("/v1/models", headers=headers)
        return answer.json()["error"]["message"] if answer.status_code == 401 else ""

    assert await until(refused, 5) == "the API key was revoked"


@pytest.mark.parametrize(
    ("scopes", "method", "path", "status"),
    [
        (("read",), "POST", "/v1/generations", 403),
        (("generate",), "POST", "/v1/generations", 202),
        (("read",), "GET", "/v1/generations", 200),
        (("high-priority",), "GET", "/v1/generations", 403),
        (("admin",), "POST", "/v1/generations", 202),
    ],
)
async def test_a_key_may_do_what_its_scopes_say(
    client: httpx.AsyncClient,
    settings: GatewaySettings,
    worker: FakeWorker,
    scopes: tuple[str, ...],
    method: str,
    path: str,
    status: int,
) -> None:
    body = TINY if method == "POST" else None
    answer = await client.request(method, path, json=body, headers=key_of(settings, "x", scopes=scopes))
    assert answer.status_code == status, answer.text
    if status == 403:
        assert "the API key has" in answer.json()["error"]["message"]


async def test_high_priority_needs_its_scope(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    body = TINY | {"priority": "high"}
    usual, first = key_of(settings, "usual"), key_of(settings, "first", scopes=("generate", "high-priority"))
    assert (await client.post("/v1/generations", json=body, headers=usual)).status_code == 403
    assert (await client.post("/v1/generations", json=body, headers=first)).status_code == 202


async def test_a_key_has_so_many_jobs_at_once_and_others_are_not_held_up(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    worker.go_on.clear()
    two, other = key_of(settings, "two", max_active=2), key_of(settings, "other")
    answers = [await client.post("/v1/generations", json=TINY, headers=two) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert (await client.post("/v1/generations", json=TINY, headers=other)).status_code == 202
    worker.go_on.set()

    async def again() -> bool:
        return (await client.post("/v1/generations", json=TINY, headers=two)).status_code == 202

    await until(again)


async def test_nobody_passes_while_redis_is_away(own_valkey: Valkey, tmp_path: Path) -> None:
    settings = GatewaySettings(redis_url=own_valkey.url, store_dir=tmp_path, auth="on")  # type: ignore[arg-type]
    headers = key_of(settings, "ci")
    app = create_app(settings)
    async with app.router.lifespan_context(app), client_of(app) as client:
        own_valkey.stop()
        for given in (headers, {"x-api-key": "dr_0123456789ab_" + "q" * 43}):
            answer = await client.get("/v1/models", headers=given)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_unavailable")
        assert (await client.get("/v1/models")).status_code == 401


async def test_the_document_tells_of_keys_where_they_are_asked_for(app: FastAPI, settings: GatewaySettings) -> None:
    document = app.openapi()
    assert document["components"]["securitySchemes"]["API key"]["scheme"] == "bearer"
    for path, item in document["paths"].items():
        for operation in item.values():
            assert bool(operation.get("security")) == (path not in OPEN), path
    off = create_app(settings.model_copy(update={"auth": "off"}))
    assert "securitySchemes" not in off.openapi()["components"]


def test_up_on_a_public_address_asks_for_keys_and_its_embedded_sibling_does_not() -> None:
    assert StackSettings(host="0.0.0.0").keys_on
    assert not StackSettings(host="127.0.0.1").keys_on


def operations(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Path and method of every route, those that the document leaves out among them."""
    for route in flat(app.routes):
        for method in sorted((route.methods or set()) - {"HEAD"}):
            yield route.path, method


def flat(routes: list[Any]) -> Iterator[Any]:
    for route in routes:
        if hasattr(route, "original_router"):
            yield from flat(route.original_router.routes)
        else:
            yield route


def is_page(path: str) -> bool:
    """Of the playground, which asks for a key by itself."""
    return path == "/" or path.startswith("/playground")
