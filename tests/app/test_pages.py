"""Web pages of others, where no API key is asked for."""

from __future__ import annotations

import httpx
import pytest

from app.main import create_app
from app.settings import GatewaySettings
from tests.app.conftest import BASE_URL, client_of
from tests.app.fake_worker import FakeWorker

FORM = {"prompt": (None, "a red circle")}
STABILITY = "/v2beta/stable-image/generate/sd3"
CREATE = "/v1/generations"
TINY = {"model": "tiny", "prompt": "a red circle"}
FOREIGN = ["https://evil.example", "http://127.0.0.1:9999", "null", "http://", "://", "evil"]


@pytest.mark.parametrize("origin", FOREIGN)
async def test_form_of_a_foreign_page_is_refused(client: httpx.AsyncClient, worker: FakeWorker, origin: str) -> None:
    answer = await client.post(STABILITY, files=FORM, headers={"origin": origin})
    assert answer.status_code == 403
    assert f'origin is "{origin}"' in answer.text.replace("\\", "")
    assert (await client.get(CREATE)).json()["generations"] == []


async def test_pages_of_ones_own_and_programs_may_call(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    for headers in ({}, {"origin": BASE_URL}):
        assert (await client.post(CREATE, json=TINY, headers=headers)).status_code == 202


async def test_pages_behind_a_proxy_may_call_by_the_public_url(settings: GatewaySettings, worker: FakeWorker) -> None:
    public = GatewaySettings(**(settings.model_dump() | {"public_url": "https://images.example/"}))
    app = create_app(public)
    async with app.router.lifespan_context(app), client_of(app) as client:
        for host in ("127.0.0.1:8000", "images.example"):
            headers = {"origin": "https://images.example", "host": host}
            assert (await client.post(CREATE, json=TINY, headers=headers)).status_code == 202


@pytest.mark.parametrize("path", ["/v1/models", CREATE, "/healthz"])
async def test_name_that_somebody_else_lets_stand_for_us_is_refused(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path, headers={"host": "rebound.example:8000"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_page")
    assert "use localhost or an address" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "10.0.0.7:8000", "a.localhost"])
async def test_names_that_are_nobody_elses_are_answered(client: httpx.AsyncClient, host: str) -> None:
    assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


async def test_with_keys_on_foreign_pages_meet_the_key_alone(settings: GatewaySettings) -> None:
    keys_on = settings.model_copy(update={"auth": "on"})
    app = create_app(keys_on)
    async with app.router.lifespan_context(app), client_of(app) as client:
        headers = {"host": "images.example", "origin": "https://evil.example"}
        assert (await client.post(CREATE, json=TINY, headers=headers)).status_code == 401
