"""Pictures from a bucket, through the gateway: passed on, or by a redirect to a url of the bucket."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from app.client import Client
from app.main import create_app
from app.settings import GatewaySettings
from tests.app.conftest import BASE_URL, client_of
from tests.app.fake_worker import FakeWorker
from tests.app.test_generations import finished
from tests.bucket import BUCKET, S3Server

Served = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def site(redis_url: str, bucket: S3Server) -> Served:
    """A client of a gateway whose pictures are in the bucket, with a worker; settings: others than the usual ones."""

    @asynccontextmanager
    async def serve(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
        asked = GatewaySettings(redis_url=redis_url, **bucket.settings(**settings))  # type: ignore[arg-type]
        app = create_app(asked)
        with FakeWorker(asked):
            async with app.router.lifespan_context(app), client_of(app) as client:
                yield client

    return serve


async def test_bytes_are_passed_on_unless_told_otherwise(site: Served, bucket: S3Server) -> None:
    async with site(s3_prefix="passed") as client:
        generation = await finished(client)
        answer = await client.get(generation["images"][0]["url"])
        assert answer.status_code == 200
        assert answer.content.startswith(b"png of ")
        assert answer.headers["content-type"] == "image/png"
        assert bucket.keys(f"passed/{generation['id']}")
        assert (await client.delete(generation["urls"]["self"])).status_code == 204
        assert not bucket.keys(f"passed/{generation['id']}")


async def test_presigned_picture_is_a_short_lived_url_of_the_bucket(site: Served, bucket: S3Server) -> None:
    async with site(s3_presign=True) as client:
        generation = await finished(client, output_format="webp")
        answer = await client.get(generation["images"][0]["url"])
        assert (answer.status_code, answer.content) == (307, b"")
        assert answer.headers["cache-control"] == "private, max-age=150"
        link = answer.headers["location"]
        assert link.startswith(f"{bucket.url}/{BUCKET}/{generation['id']}/")
        assert parse_qs(urlsplit(link).query)["X-Amz-Expires"] == ["300"]
        async with httpx.AsyncClient() as anybody:
            picture = await anybody.get(link)
            assert picture.content.startswith(b"webp of ")
            assert picture.headers["content-type"] == "image/webp"
            assert (await anybody.get(link[:-1] + ("1" if link[-1] != "1" else "2"))).status_code == 403


async def test_head_of_a_presigned_picture_is_answered_here_for_the_url_is_signed_for_get(site: Served) -> None:
    async with site(s3_presign=True) as client:
        url = (await finished(client))["images"][0]["url"]
        answer = await client.head(url)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        async with httpx.AsyncClient() as anybody:
            link = (await client.get(url)).headers["location"]
            assert int(answer.headers["content-length"]) == len((await anybody.get(link)).content)
            assert (await anybody.head(link)).status_code == 403


async def test_presigned_url_lives_no_longer_than_the_picture(site: Served) -> None:
    async with site(s3_presign=True) as client:
        generation = await finished(client, expires_in_s=60)
        answer = await client.get(generation["images"][0]["url"])
        assert int(parse_qs(urlsplit(answer.headers["location"]).query)["X-Amz-Expires"][0]) <= 60


async def test_client_that_has_the_picture_is_not_sent_to_the_bucket(site: Served) -> None:
    async with site(s3_presign=True) as client:
        url = (await finished(client))["images"][0]["url"]
        assert (await client.get(url, headers={"if-none-match": "*"})).status_code == 304


@pytest.mark.parametrize("presign", [False, True])
async def test_picture_that_the_bucket_dropped_early_is_410_with_when_and_why(
    site: Served, bucket: S3Server, presign: bool
) -> None:
    async with site(s3_presign=presign, s3_prefix="early") as client:
        generation = await finished(client)
        bucket.empty("early")
        answer = await client.get(generation["images"][0]["url"])
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (410, "picture_lost")
        assert f"was to be kept until {generation['expires_at'][:19]}" in error["message"]
        assert "lifecycle rule" in error["message"]


async def test_vendors_answers_that_hold_the_picture_hold_it_also_where_urls_are_presigned(site: Served) -> None:
    async with site(s3_presign=True) as client:
        body = {"model": "tiny", "prompt": "a red circle", "response_format": "b64_json", "size": "64x64"}
        answer = await client.post("/openai/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text
        assert base64.b64decode(answer.json()["data"][0]["b64_json"]).startswith(b"png of ")


async def test_bucket_that_is_away_is_503_and_said_by_readyz(site: Served, bucket: S3Server) -> None:
    async with site(s3_prefix="away") as client:
        url = (await finished(client))["images"][0]["url"]
        assert (await client.get("/readyz")).json()["store"] == "ok"
        bucket.stop()
        try:
            answer, ready = await client.get(url), await client.get("/readyz")
        finally:
            bucket.start()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
        assert answer.headers["retry-after"] == "2"
        assert str(bucket.port) not in answer.text
        assert (ready.status_code, "not reachable" in ready.json()["store"]) == (503, True)
        assert (await client.get(url)).status_code == 200


async def test_page_may_show_pictures_of_the_bucket_and_of_nobody_else(site: Served, bucket: S3Server) -> None:
    async with site(s3_presign=True) as client:
        assert f"img-src 'self' data: {bucket.url};" in (await client.get("/")).headers["content-security-policy"]
    async with site() as client:
        assert "img-src 'self' data:;" in (await client.get("/")).headers["content-security-policy"]


def test_command_line_follows_to_the_bucket_and_leaves_its_key_at_the_gateway() -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if request.url.host == "bucket.test":
            return httpx.Response(200, content=b"picture")
        return httpx.Response(307, headers={"location": "https://bucket.test/picture?signature=x"})

    with Client(BASE_URL, transport=httpx.MockTransport(answer), key="dr_key") as client:
        assert client.picture("gen_1", 0) == b"picture"
    assert ["authorization" in request.headers for request in asked] == [True, False]
