"""What callers may do: by the scopes of their keys, by their quotas, by how long they can wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request

from app.auth import ALL_SCOPES, ANONYMOUS, Scope
from app.deps import Gateway
from app.errors import ClientGone, Forbidden, WaitTooLong
from app.jobs import Jobs
from app.links import Links
from app.schemas import GenerationCreate
from app.settings import GatewaySettings
from model.params import GenerationParams
from tests.app.conftest import BASE_URL
from tests.app.fake_worker import FakeWorker
from worker.contract.cards import ModelCard
from worker.contract.errors import IdempotencyKeyReused, InvalidField, QueueUnavailable, UnknownModel
from worker.contract.job import Job, JobView
from worker.contract.keys import Keyring, new_key
from worker.contract.queue import Idempotency
from worker.intake import Intake

TINY = {"model": "tiny", "prompt": "a red circle"}
CREATE = GenerationCreate(**TINY)  # type: ignore[arg-type]
QUEUED = JobView(
    job=Job(
        id="gen_1",
        model="tiny",
        revision="r1",
        params=GenerationParams(prompt="x", width=64, height=64, steps=2, guidance_scale=3.0, seed=1),
        created_at=0,
        deadline=0,
    ),
    status="queued",
)
KEY = Idempotency("a route", "once", "f" * 64)
UNKNOWN = f"/v1/generations/gen_{'0' * 31}"


@pytest.fixture
def settings(settings: GatewaySettings) -> GatewaySettings:
    """Keys are on."""
    return settings.model_copy(update={"auth": "on"})


def key_of(settings: GatewaySettings, name: str, **options: Any) -> dict[str, str]:
    """Headers of a caller with a key of its own."""
    key, text = new_key(name, **options)
    with Keyring.connect(settings) as keyring:
        keyring.add(key)
    return {"x-api-key": text}


@pytest.mark.parametrize(
    ("scopes", "method", "path", "body", "needed"),
    [
        (("read",), "POST", "/v1/generations", TINY, "generate"),
        (("read",), "DELETE", UNKNOWN, None, "generate"),
        (("read",), "POST", f"{UNKNOWN}/cancel", None, "generate"),
        (("high-priority",), "GET", UNKNOWN, None, "generate or read"),
        (("high-priority",), "GET", "/v1/generations", None, "generate or read"),
        (("generate",), "POST", "/v1/generations", TINY | {"priority": "high"}, "high-priority"),
    ],
)
async def test_call_beyond_the_scopes_of_a_key_is_403_and_names_what_is_needed(
    served: httpx.AsyncClient,
    settings: GatewaySettings,
    scopes: tuple[str, ...],
    method: str,
    path: str,
    body: Any,
    needed: str,
) -> None:
    headers = key_of(settings, "studio", scopes=scopes)
    answer = await served.request(method, path, json=body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (403, "forbidden")
    assert f"this needs the scope {needed};" in error["message"]


async def test_owner_with_as_many_jobs_as_it_may_have_is_429_and_others_are_not(
    served: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    worker.go_on.clear()
    owner, other = key_of(settings, "owner", max_active=2), key_of(settings, "other")
    found = [(await served.post("/v1/generations", json=TINY, headers=owner)).status_code for _ in range(2)]
    refused = await served.post("/v1/generations", json=TINY, headers=owner)
    assert [*found, refused.status_code] == [202, 202, 429]
    assert refused.json()["error"]["code"] == "too_many_jobs"
    assert int(refused.headers["retry-after"]) > 0
    assert (await served.post("/v1/generations", json=TINY, headers=other)).status_code == 202


async def test_admin_sees_and_ends_jobs_of_others_but_lists_its_own(
    served: httpx.AsyncClient, settings: GatewaySettings, worker: FakeWorker
) -> None:
    worker.go_on.clear()
    owner, admin = key_of(settings, "owner"), key_of(settings, "chief", scopes=("admin",))
    url = (await served.post("/v1/generations", json=TINY, headers=owner)).json()["urls"]["self"]
    assert (await served.get(url, headers=admin)).status_code == 200
    assert (await served.get("/v1/generations", headers=admin)).json()["generations"] == []
    assert (await served.delete(url, headers=admin)).status_code == 204


@pytest.fixture
def slow_jobs(app: FastAPI, settings: GatewaySettings, worker: FakeWorker) -> Iterator[Jobs]:
    """Where one job makes a long wait for the next: the only worker that is left says that it is slow."""
    worker.stop()
    intake = Intake.connect(settings, "slow")
    intake.renew(["tiny"], {"tiny": 0.001})
    yield Jobs(app.state.gateway, ANONYMOUS, _request(app), Links(BASE_URL))
    intake.retire()
    intake.close()


async def test_caller_who_cannot_wait_so_long_is_told_when_to_come_back(slow_jobs: Jobs) -> None:
    await slow_jobs.accept(CREATE, hold_s=10)  # nothing waits yet
    with pytest.raises(WaitTooLong, match="this call waits 10 s at most") as refused:
        await slow_jobs.accept(CREATE, hold_s=10)
    assert refused.value.retry_after_s > 0
    assert len(await slow_jobs.page(100)) == 1


async def test_request_that_comes_again_under_its_key_is_answered_however_long_the_wait(slow_jobs: Jobs) -> None:
    first = await slow_jobs.accept(CREATE, idempotency=KEY, hold_s=10)
    again = await slow_jobs.accept(CREATE, idempotency=KEY, hold_s=10)
    assert again.job.id == first.job.id


class Gone:
    """A catalog without cards; or an address book that lets webhooks go nowhere."""

    async def card(self, name: str) -> ModelCard:
        raise UnknownModel(name, [])

    async def check(self, url: str, field: str) -> None:
        raise InvalidField(field, url, "none")


@pytest.fixture
def changed(app: FastAPI, worker: FakeWorker) -> Callable[..., Jobs]:
    """The jobs of a caller, who may have lost scopes, in a gateway of which something has changed."""
    worker.stop()

    def changed(scopes: Iterable[Scope] = ALL_SCOPES, **parts: Any) -> Jobs:
        caller = replace(ANONYMOUS, scopes=frozenset(scopes))
        return Jobs(replace(app.state.gateway, **parts), caller, _request(app), Links(BASE_URL))

    return changed


URGENT = GenerationCreate.model_validate(TINY | {"priority": "high", "webhook": {"url": "https://93.184.215.14/"}})


@pytest.mark.parametrize(
    "change",
    [{"catalog": Gone()}, {"targets": Gone()}, {"scopes": ("generate",)}, {"scopes": ("read",)}],
    ids=["card", "webhook", "priority", "scope"],
)
async def test_request_that_comes_again_under_its_key_is_answered_whatever_has_changed(
    changed: Callable[..., Jobs], change: dict[str, Any]
) -> None:
    first = await changed().accept(URGENT, idempotency=KEY)
    with pytest.raises((Forbidden, UnknownModel, InvalidField)):
        await changed(**change).accept(URGENT)
    assert await changed(**change).accept(URGENT, idempotency=KEY) == first


async def test_other_request_under_a_key_is_refused_as_such_before_its_fields_are(changed: Callable[..., Jobs]) -> None:
    await changed().accept(URGENT, idempotency=KEY)
    with pytest.raises(IdempotencyKeyReused):
        await changed(catalog=Gone()).accept(URGENT, idempotency=replace(KEY, fingerprint="0" * 64))


async def test_caller_who_may_see_no_jobs_learns_nothing_of_a_key(changed: Callable[..., Jobs]) -> None:
    await changed().accept(URGENT, idempotency=KEY)
    with pytest.raises(Forbidden):
        await changed(("high-priority",)).accept(URGENT, idempotency=KEY)


class Away:
    """A queue that is never there."""

    async def wait(self, *_: object) -> JobView:
        raise QueueUnavailable

    async def cancel(self, *_: object) -> JobView:
        raise QueueUnavailable


class Stubborn:
    """A queue whose waiter does not end when it is told to, but when it may."""

    def __init__(self) -> None:
        self.waits, self.told, self.may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def wait(self, *_: object) -> JobView:
        self.waits.set()
        while not self.may_end.is_set():
            try:
                await self.may_end.wait()
            except asyncio.CancelledError:
                self.told.set()
        raise QueueUnavailable


class Client:
    """The other end of a request."""

    def __init__(self) -> None:
        self.leaves, self.left_alone = asyncio.Event(), asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        try:
            await self.leaves.wait()
        finally:
            self.left_alone.set()
        return {"type": "http.disconnect"}


def jobs_of(queue: Any, client: Client) -> Jobs:
    """What a client may do with a queue; there is nothing else."""
    gateway = cast(Gateway, SimpleNamespace(queue=queue, draining=asyncio.Event()))
    return Jobs(gateway, ANONYMOUS, Request({"type": "http"}, client.receive), Links(BASE_URL))


async def test_hold_gives_the_job_as_it_was_when_redis_is_away_until_the_time_is_up() -> None:
    began = time.monotonic()
    assert await jobs_of(Away(), Client()).hold(QUEUED, 0.3) == QUEUED
    assert time.monotonic() - began >= 0.3


async def test_hold_ends_when_the_client_leaves_while_redis_is_away() -> None:
    client = Client()
    holding = asyncio.create_task(jobs_of(Away(), client).hold(QUEUED, 60, cancel_if_gone=True))
    client.leaves.set()
    with pytest.raises(ClientGone):
        await asyncio.wait_for(holding, 5)


async def test_hold_that_is_canceled_again_while_it_ends_leaves_nobody_listening() -> None:
    queue, client = Stubborn(), Client()
    holding = asyncio.create_task(jobs_of(queue, client).hold(QUEUED, 60))
    await queue.waits.wait()
    holding.cancel()
    await queue.told.wait()
    holding.cancel()
    await asyncio.wait([holding])
    try:
        await asyncio.wait_for(client.left_alone.wait(), 5)
    finally:
        queue.may_end.set()


def _request(app: FastAPI) -> Request:
    scope = {"type": "http", "app": app, "headers": [], "state": {"request_id": "r"}}
    return Request(scope)
