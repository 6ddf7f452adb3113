"""Server-sent events of a generation, from a gateway on a port: streams that last need a real connection."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
import pytest

from app.settings import GatewaySettings
from app.sse import EventStream
from tests.app.conftest import until
from tests.app.dialects.conftest import Live
from tests.app.fake_worker import FakeWorker
from worker.intake import Intake

TINY = {"model": "tiny", "prompt": "a red circle"}


class Told:
    """One event of a stream."""

    def __init__(self, block: str) -> None:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        self.name, self.id = fields.get("event"), fields.get("id")
        self.data = json.loads(fields["data"]) if "data" in fields else None


class Stream:
    """What a client of server-sent events sees."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer, self._text = answer, answer.aiter_text()
        self.comments = 0

    async def events(self) -> AsyncGenerator[Told, None]:
        rest = ""
        async for text in self._text:
            *blocks, rest = (rest + text).split("\n\n")
            for block in blocks:
                if block.startswith(":"):
                    self.comments += 1
                else:
                    yield Told(block)

    async def next(self, name: str) -> Told:
        """The next event of that name."""
        async with asyncio.timeout(10):
            async for event in self.events():
                if event.name == name:
                    return event
        raise AssertionError(f"the stream ended without {name}")

    async def all(self) -> list[Told]:
        """All up to the end."""
        async with asyncio.timeout(10):
            return [event async for event in self.events()]


@pytest.fixture
async def live(settings: GatewaySettings) -> AsyncIterator[Live]:
    running = Live(settings)
    await asyncio.to_thread(running.__enter__)
    yield running
    await asyncio.to_thread(running.__exit__)


@pytest.fixture
async def client(live: Live) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=live.url, trust_env=False, timeout=10) as client:
        yield client


async def created(client: httpx.AsyncClient, **fields: Any) -> str:
    answer = await client.post("/v1/generations", json=TINY | fields)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["urls"]["events"])


async def finished(client: httpx.AsyncClient) -> str:
    answer = await client.post("/v1/generations", json=TINY, headers={"prefer": "wait=10"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["urls"]["events"])


@asynccontextmanager
async def following(client: httpx.AsyncClient, url: str, last: str | None = None) -> AsyncIterator[Stream]:
    headers = {"last-event-id": last} if last else {}
    async with client.stream("GET", url, headers=headers) as answer:
        assert answer.status_code == 200
        yield Stream(answer)


def followed_jobs(live: Live) -> int:
    """How many jobs have readers in this gateway."""
    return len(live.app.state.gateway.queue._events._following)


async def test_stream_tells_all_that_happens_and_ends_with_the_generation(
    client: httpx.AsyncClient, worker: FakeWorker
) -> None:
    worker.go_on.clear()
    url = await created(client)
    async with following(client, url) as stream:
        assert (await stream.next("progress")).data == {"step": 1, "steps": 2}
        worker.go_on.set()
        rest = await stream.all()
    assert stream.answer.headers["content-type"].startswith("text/event-stream")
    assert stream.answer.headers["cache-control"] == "no-store"
    assert rest[-1].name == "succeeded"
    assert rest[-1].data == (await client.get(url.removesuffix("/events"))).json()
    async with following(client, url) as again:
        events = await again.all()
    assert [event.name for event in events] == ["queued", "running", "progress", "progress", "succeeded"]
    assert events[0].data == {"queue_position": None}  # it waits no more


async def test_stream_of_a_queued_generation_tells_its_place(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    worker.stop()
    await created(client)
    async with following(client, await created(client)) as stream:
        assert (await stream.next("queued")).data == {"queue_position": 1}


async def test_stream_goes_on_after_the_last_event_that_the_client_saw(
    client: httpx.AsyncClient, worker: FakeWorker
) -> None:
    url = await finished(client)
    async with following(client, url) as stream:
        events = await stream.all()
    async with following(client, url, events[1].id) as rest:
        assert [event.id for event in await rest.all()] == [event.id for event in events[2:]]


async def test_stream_of_which_all_was_seen_is_204_so_that_nobody_comes_back(
    client: httpx.AsyncClient, worker: FakeWorker
) -> None:
    url = await finished(client)
    async with following(client, url) as stream:
        last = (await stream.all())[-1].id
    answer = await client.get(url, headers={"last-event-id": str(last)})
    assert (answer.status_code, answer.content) == (204, b"")


async def test_stream_after_an_id_that_is_none_is_refused(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    answer = await client.get(await finished(client), headers={"last-event-id": "yesterday"})
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (422, "Last-Event-ID")


async def test_stream_of_an_unknown_generation_is_404(client: httpx.AsyncClient) -> None:
    answer = await client.get(f"/v1/generations/gen_{'0' * 31}/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("wanted", [True, False])
async def test_previews_are_made_and_sent_to_who_asks_for_them(
    client: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker, wanted: bool
) -> None:
    worker.go_on.clear()
    url = await created(client)
    async with following(client, f"{url}?previews={str(wanted).lower()}") as stream:
        await stream.next("progress")

        async def claimed() -> bool:
            return bool(worker.running)

        await until(claimed)  # Redis tells of it before the worker has noted it
        (claim,) = worker.running
        with Intake.connect(settings, "fake")._redis as redis:

            async def watched() -> bool:
                return bool(redis.exists(f"darkroom:watch:{claim.job.id}"))

            if wanted:
                await until(watched)
            assert await watched() == wanted
        intake = Intake.connect(settings, "painter")
        intake.preview(claim, 1, b"a small jpeg")
        intake.close()
        worker.go_on.set()
        previews = [event.data for event in await stream.all() if event.name == "preview"]
    image = base64.b64encode(b"a small jpeg").decode()
    assert previews == ([{"step": 1, "media_type": "image/jpeg", "image": image}] if wanted else [])


async def test_client_that_goes_away_leaves_no_reader_and_its_job_goes_on(
    client: httpx.AsyncClient, live: Live, worker: FakeWorker
) -> None:
    worker.go_on.clear()
    url = await created(client)
    for _ in range(3):
        async with following(client, url) as stream:
            await stream.next("progress")
            assert followed_jobs(live) == 1

    async def none_left() -> bool:
        return followed_jobs(live) == 0

    await until(none_left)
    worker.go_on.set()
    async with following(client, url) as stream:
        assert (await stream.next("succeeded")).data["status"] == "succeeded"


async def test_stream_ends_when_the_gateway_drains_and_goes_on_elsewhere(
    client: httpx.AsyncClient, live: Live, worker: FakeWorker
) -> None:
    worker.go_on.clear()
    url = await created(client)
    async with following(client, url) as stream:
        last = await stream.next("progress")
        live.drain()
        assert await stream.all() == []
    worker.go_on.set()
    live.app.state.gateway.draining.clear()
    async with following(client, url, last.id) as rest:
        assert [event.name for event in await rest.all()] == ["progress", "succeeded"]


async def test_stream_of_a_forgotten_generation_ends(client: httpx.AsyncClient, worker: FakeWorker) -> None:
    worker.go_on.clear()
    url = await created(client)
    async with following(client, url) as stream:
        await stream.next("progress")
        assert (await client.delete(url.removesuffix("/events"))).status_code == 204
        assert [event.name for event in await stream.all()] in ([], ["canceled"])
    assert (await client.get(url)).status_code == 404


async def test_stream_in_which_nothing_happens_has_a_heart() -> None:
    async def silence() -> AsyncGenerator[bytes, None]:
        await asyncio.Event().wait()
        yield b""

    sent: list[bytes] = []
    enough = asyncio.Event()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if len(sent) > 4:
            enough.set()

    async def receive() -> Any:
        await enough.wait()
        return {"type": "http.disconnect"}

    source = silence()
    async with asyncio.timeout(10), aclosing(source):
        await EventStream(source, asyncio.Event(), beat_s=0.01)({"type": "http"}, receive, send)
    assert set(sent[1:]) == {b": ping\n\n"}
