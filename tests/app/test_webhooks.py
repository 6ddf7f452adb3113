"""Webhooks are called by a process of their own: signed, in time, again if need be, and once more rather than never."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpcore
import httpx
import pytest
from replicate.webhook import InvalidSignatureError, Webhooks, WebhookSigningSecret

from app.logs import make_log
from app.main import create_app
from app.networks import Allowed
from app.settings import GatewaySettings
from app.webhook_target import Targets
from app.webhooks import Answer, Courier, Sender, WebhookSettings
from tests.app.conftest import BASE_URL, client_of, until
from tests.app.fake_worker import FakeWorker
from tests.conftest import Valkey
from tests.processes import wait_until
from worker.contract.errors import SchemaUnknown
from worker.contract.job import JobView
from worker.contract.outbox import Entry, Outbox
from worker.contract.queue import JobQueue

LOOPBACK = "127.0.0.0/8"
ANSWER_S = 2.0


class Receiver:
    """A server that takes webhooks: answers with `statuses`, one after the other, then 200; `held`: not yet."""

    def __init__(self) -> None:
        self.taken: list[tuple[dict[str, str], str]] = []
        self.statuses: list[int] = []
        self.headers: dict[str, str] = {}
        self.held = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                receiver.taken.append(({name.lower(): value for name, value in self.headers.items()}, body))
                while receiver.held.is_set():
                    time.sleep(0.01)
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.held.clear()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def said(self) -> list[dict[str, Any]]:
        """The bodies so far."""
        return [json.loads(body) for _, body in self.taken]

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.taken]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def settings(settings: GatewaySettings) -> WebhookSettings:
    """Of gateway and sender: webhooks may go to this machine, and are tried again soon."""
    return WebhookSettings(
        redis_url=settings.redis_url,
        store_dir=settings.store_dir,
        webhook_allow=LOOPBACK,
        webhook_attempts=3,
        webhook_retry_s=0.02,
        webhook_timeout_s=ANSWER_S,
        grace_s=5,
    )


@pytest.fixture
def sender_log() -> io.StringIO:
    return io.StringIO()


@asynccontextmanager
async def sending(
    settings: WebhookSettings, log: io.StringIO, allow: str = LOOPBACK, queue: JobQueue | None = None
) -> AsyncIterator[Sender]:
    """A sender at work in this process."""
    outbox, queue = Outbox.connect(settings), queue or JobQueue.connect(settings)
    courier = Courier(Targets(Allowed.parse(allow)), settings.webhook_timeout_s)
    sender, stopping = Sender(settings, outbox, queue, courier, make_log("json", log)), asyncio.Event()
    running = asyncio.create_task(sender.run(stopping))
    try:
        yield sender
    finally:
        stopping.set()
        await running
        for held in (courier, outbox, queue):
            await held.close()


@pytest.fixture
async def sender(settings: WebhookSettings, sender_log: io.StringIO) -> AsyncIterator[Sender]:
    async with sending(settings, sender_log) as sender:
        yield sender


async def ask(client: httpx.AsyncClient, receiver: Receiver, *events: str, request_id: str = "") -> str:
    """A generation that the receiver is told of."""
    webhook = {"url": receiver.url} | ({"events": events} if events else {})
    body = {"model": "tiny", "prompt": "a secret wish", "webhook": webhook}
    asked = await client.post("/v1/generations", json=body, headers={"x-request-id": request_id})
    assert asked.status_code == 202, asked.text
    return str(asked.json()["id"])


async def log_of(client: httpx.AsyncClient, job_id: str, entries: int) -> list[dict[str, Any]]:
    """The log of deliveries, once it has so many."""

    async def whole() -> list[dict[str, Any]] | None:
        webhook = (await client.get(f"/v1/generations/{job_id}")).json()["webhook"]
        return webhook["deliveries"] if len(webhook["deliveries"]) >= entries else None

    return list(await until(whole))


async def arrived(receiver: Receiver, count: int) -> None:
    async def all_there() -> bool:
        return len(receiver.taken) >= count

    await until(all_there)


async def secret_of(client: httpx.AsyncClient) -> WebhookSigningSecret:
    return WebhookSigningSecret(**(await client.get("/v1/webhooks/default/secret")).json())


async def test_end_is_told_with_the_generation_and_signed(
    served: httpx.AsyncClient, receiver: Receiver, sender: Sender
) -> None:
    job_id = await ask(served, receiver)
    await arrived(receiver, 1)
    ((headers, body),) = receiver.taken
    said = json.loads(body)
    assert (said["type"], said["data"]["id"], said["data"]["status"]) == ("generation.completed", job_id, "succeeded")
    Webhooks.validate(headers=headers, body=body, secret=await secret_of(served), tolerance=60)
    with pytest.raises(InvalidSignatureError):
        Webhooks.validate(headers=headers, body=body + " ", secret=await secret_of(served))
    (delivery,) = await log_of(served, job_id, 1)
    assert (delivery["event"], delivery["attempt"], delivery["status"]) == ("completed", 1, 200)
    assert (delivery["outcome"], delivery["next_at"]) == ("delivered", None)
    labels = {"event": "completed", "outcome": "delivered"}
    assert sender.metrics.registry.get_sample_value("darkroom_webhook_attempts_total", labels) == 1


async def test_pictures_are_fetched_by_the_urls_told(
    served: httpx.AsyncClient, receiver: Receiver, sender: Sender
) -> None:
    await ask(served, receiver)
    await arrived(receiver, 1)
    url = receiver.said[0]["data"]["images"][0]["url"]
    assert url.startswith(f"{BASE_URL}/v1/generations/")
    assert "signature=" in url
    assert (await served.get(url)).status_code == 200


async def test_start_progress_and_end_are_told_as_they_were(
    served: httpx.AsyncClient, worker: FakeWorker, receiver: Receiver, sender: Sender
) -> None:
    worker.go_on.clear()
    await ask(served, receiver, "started", "progress", "completed")
    await arrived(receiver, 2)
    worker.go_on.set()
    await arrived(receiver, 3)
    told = {said["type"]: said["data"] for said in receiver.said}
    assert list(told)[-1] == "generation.completed"
    assert (told["generation.started"]["status"], told["generation.started"]["images"]) == ("running", [])
    assert told["generation.progress"]["progress"] == {"step": 1, "steps": 2}
    assert len(set(receiver.ids)) == 3


async def test_late_word_of_the_start_does_not_tell_the_end(
    served: httpx.AsyncClient, receiver: Receiver, settings: WebhookSettings, sender_log: io.StringIO
) -> None:
    job_id = await ask(served, receiver, "started")
    await until(lambda: succeeded(served, job_id))
    async with sending(settings, sender_log):
        await arrived(receiver, 1)
    (said,) = receiver.said
    assert (said["data"]["status"], said["data"]["images"], said["data"]["ended_at"]) == ("running", [], None)


async def succeeded(client: httpx.AsyncClient, job_id: str) -> bool:
    return bool((await client.get(f"/v1/generations/{job_id}")).json()["status"] == "succeeded")


async def test_replicates_webhook_is_told_the_prediction(
    served: httpx.AsyncClient, receiver: Receiver, sender: Sender
) -> None:
    asked = {"input": {"prompt": "x"}, "webhook": receiver.url, "webhook_events_filter": ["start", "completed"]}
    made = (await served.post("/v1/models/darkroom/tiny/predictions", json=asked)).json()
    await arrived(receiver, 2)
    by_status = {said["status"]: said for said in receiver.said}
    assert by_status.keys() == {"processing", "succeeded"}
    assert by_status["processing"]["output"] is None
    done = by_status["succeeded"]
    assert (done["id"], done["webhook"], done["webhook_events_filter"]) == (
        made["id"],
        receiver.url,
        ["start", "completed"],
    )
    assert (await served.get(done["output"])).status_code == 200
    for headers, body in receiver.taken:
        Webhooks.validate(headers=headers, body=body, secret=await secret_of(served), tolerance=60)


async def test_deepinfras_webhook_is_told_its_result(
    served: httpx.AsyncClient, receiver: Receiver, sender: Sender
) -> None:
    await served.post("/v1/inference/tiny", json={"prompt": "x", "webhook": receiver.url})
    await arrived(receiver, 1)
    (said,) = receiver.said
    assert said["inference_status"]["status"] == "succeeded"
    assert (await served.get(said["images"][0])).status_code == 200


async def test_message_that_was_not_taken_is_sent_again_under_its_id(
    served: httpx.AsyncClient, receiver: Receiver, sender: Sender
) -> None:
    receiver.statuses = [500, 307]
    job_id = await ask(served, receiver)
    log = await log_of(served, job_id, 3)
    assert [(one["attempt"], one["status"]) for one in log] == [(1, 500), (2, 307), (3, 200)]
    assert [one["outcome"] for one in log] == ["retry", "retry", "delivered"]
    assert len(set(receiver.ids)) == 1


async def test_log_says_when_a_message_is_sent_again(
    served: httpx.AsyncClient, receiver: Receiver, sender: Sender
) -> None:
    receiver.statuses, receiver.headers = [503], {"retry-after": "600"}
    (delivery,) = await log_of(served, await ask(served, receiver), 1)
    assert delivery["outcome"] == "retry"
    at, next_at = (datetime.fromisoformat(delivery[name]) for name in ("at", "next_at"))
    assert 600 <= (next_at - at).total_seconds() < 600 + ANSWER_S


async def test_message_is_given_up_after_the_last_attempt(
    served: httpx.AsyncClient, receiver: Receiver, sender: Sender, settings: WebhookSettings
) -> None:
    receiver.statuses = [500] * 9
    job_id = await ask(served, receiver)
    log = await log_of(served, job_id, 3)
    assert [one["outcome"] for one in log] == ["retry", "retry", "dead"]
    assert log[-1]["next_at"] is None
    assert await nothing_waits(settings)
    assert len(receiver.taken) == 3


async def test_receiver_that_is_gone_is_not_asked_again(
    served: httpx.AsyncClient, receiver: Receiver, sender: Sender, settings: WebhookSettings
) -> None:
    receiver.statuses = [410]
    (delivery,) = await log_of(served, await ask(served, receiver), 1)
    assert (delivery["outcome"], delivery["next_at"]) == ("dead", None)
    assert await nothing_waits(settings)


async def nothing_waits(settings: WebhookSettings) -> bool:
    outbox = Outbox.connect(settings)
    try:
        return await outbox.waiting() == 0
    finally:
        await outbox.close()


async def test_log_says_why_there_was_no_answer(
    served: httpx.AsyncClient, settings: WebhookSettings, sender_log: io.StringIO
) -> None:
    unheard = Receiver()
    unheard.__enter__()
    unheard.__exit__()
    unheard_of = await ask(served, unheard)
    async with sending(settings, sender_log):
        assert (await log_of(served, unheard_of, 1))[0]["error"].startswith("no answer: ")


async def test_sender_checks_for_itself_where_webhooks_may_go(
    served: httpx.AsyncClient, receiver: Receiver, settings: WebhookSettings, sender_log: io.StringIO
) -> None:
    job_id = await ask(served, receiver)
    async with sending(settings, sender_log, allow=""):
        log = await log_of(served, job_id, 1)
    assert log[0]["error"].startswith("not sent: webhooks go to a host with public addresses only")
    assert receiver.taken == []


async def test_slow_receiver_is_left_and_asked_again(
    served: httpx.AsyncClient, receiver: Receiver, settings: WebhookSettings, sender_log: io.StringIO
) -> None:
    receiver.held.set()
    async with sending(settings.model_copy(update={"webhook_timeout_s": 0.2}), sender_log):
        job_id = await ask(served, receiver)
        assert (await log_of(served, job_id, 1))[0]["error"] == "no answer within 0.2 s"
        receiver.held.clear()
        assert (await log_of(served, job_id, 2))[-1]["status"] == 200


class Stalling(httpcore.AnyIOBackend):
    """A network on which no connection to port 9 comes about."""

    waiting = 0

    async def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        if port == 9:
            self.waiting += 1
            await asyncio.Event().wait()
        return await super().connect_tcp(host, port, *args, **options)


async def test_receivers_that_hang_hold_up_no_other(receiver: Receiver) -> None:
    network = Stalling()
    courier = Courier(Targets(Allowed.parse(LOOPBACK)), timeout_s=60, network=network)
    hanging = [asyncio.create_task(courier.post("http://127.0.0.1:9/", {}, b"{}")) for _ in range(20)]

    async def all_hang() -> bool:
        return network.waiting == len(hanging)

    await until(all_hang)
    assert (await courier.post(receiver.url, {}, b"{}")).arrived
    for post in hanging:
        post.cancel()
    await asyncio.gather(*hanging, return_exceptions=True)
    await courier.close()


async def test_progress_is_told_at_most_twice_a_second(
    served: httpx.AsyncClient, worker: FakeWorker, receiver: Receiver, sender: Sender, settings: WebhookSettings
) -> None:
    worker.go_on.clear()
    await ask(served, receiver, "progress")
    await arrived(receiver, 1)
    assert not await nothing_waits(settings)  # it is kept, so that there is no other for a while
    await until(lambda: nothing_waits(settings))


async def test_sender_goes_on_when_redis_comes_back(
    own_valkey: Valkey, settings: WebhookSettings, receiver: Receiver, sender_log: io.StringIO
) -> None:
    own = settings.model_copy(update={"redis_url": own_valkey.url})
    own_valkey.stop()
    async with sending(own, sender_log):
        await until(lambda: logged(sender_log, "redis_away"))
        own_valkey.start()
        gateway = create_app(own, log=make_log("json", io.StringIO()))
        with FakeWorker(own):
            async with gateway.router.lifespan_context(gateway), client_of(gateway) as client:
                await ask(client, receiver)
                await arrived(receiver, 1)


async def logged(log: io.StringIO, event: str) -> bool:
    return event in log.getvalue()


async def test_sender_logs_neither_prompt_nor_url(
    served: httpx.AsyncClient, receiver: Receiver, sender: Sender, sender_log: io.StringIO
) -> None:
    job_id = await ask(served, receiver)
    await log_of(served, job_id, 1)
    await until(lambda: logged(sender_log, "delivered"))
    assert job_id in sender_log.getvalue()
    assert "secret wish" not in sender_log.getvalue()
    assert receiver.url not in sender_log.getvalue()


async def test_line_about_a_message_has_the_id_of_the_request_that_made_its_job(
    served: httpx.AsyncClient, receiver: Receiver, sender: Sender, sender_log: io.StringIO
) -> None:
    job_id = await ask(served, receiver, request_id="r-1")
    await until(lambda: logged(sender_log, "delivered"))
    line = next(line for line in map(json.loads, sender_log.getvalue().splitlines()) if line["event"] == "webhook")
    assert (line["request_id"], line["generation"], line["outcome"]) == ("r-1", job_id, "delivered")


class Older(JobQueue):
    """A queue as a sender sees it that cannot read the jobs."""

    failure: Exception = SchemaUnknown(99, 1)

    async def view(self, job_id: str) -> JobView:
        raise self.failure


@pytest.mark.parametrize("failure", [SchemaUnknown(99, 1), RuntimeError("a surprise")])
async def test_message_that_a_sender_cannot_read_is_left_to_others_with_all_its_attempts(
    served: httpx.AsyncClient,
    receiver: Receiver,
    settings: WebhookSettings,
    sender_log: io.StringIO,
    failure: Exception,
) -> None:
    job_id = await ask(served, receiver)
    older = Older.connect(settings)
    older.failure = failure

    async def often() -> bool:
        return sender_log.getvalue().count("webhook_unread") > settings.webhook_attempts

    async with sending(settings, sender_log, queue=older):
        await until(often)
    assert "webhook_unsettled" not in sender_log.getvalue()
    receiver.statuses = [500]
    async with sending(settings, sender_log):
        log = await log_of(served, job_id, 2)
    assert [(one["attempt"], one["outcome"]) for one in log] == [(1, "retry"), (2, "delivered")]


class Replaced(JobQueue):
    """A queue in which other jobs, that tell nobody, took the place of those with webhooks."""

    async def view(self, job_id: str) -> JobView:
        view = await super().view(job_id)
        return replace(view, job=replace(view.job, webhook=None))


async def test_message_whose_job_has_no_webhook_now_is_given_up(
    served: httpx.AsyncClient, receiver: Receiver, settings: WebhookSettings, sender_log: io.StringIO
) -> None:
    job_id = await ask(served, receiver)
    await until(lambda: succeeded(served, job_id))
    assert not await nothing_waits(settings)
    async with sending(settings, sender_log, queue=Replaced.connect(settings)):
        await until(lambda: nothing_waits(settings))
    assert receiver.taken == []


class Broken:
    """A courier that fails as nobody expects."""

    async def post(self, *_: object) -> Answer:
        raise RuntimeError("a surprise")


async def test_surprise_while_sending_counts_as_an_attempt(
    served: httpx.AsyncClient, receiver: Receiver, sender: Sender, sender_log: io.StringIO
) -> None:
    sender._courier = Broken()  # type: ignore[assignment]
    log = await log_of(served, await ask(served, receiver), 3)
    assert [(one["attempt"], one["outcome"]) for one in log] == [(1, "retry"), (2, "retry"), (3, "dead")]
    assert log[0]["error"] == "not sent: something failed on our side"
    assert "a surprise" in sender_log.getvalue()


class Shelf:
    """An outbox that notes how long messages are put off."""

    def __init__(self) -> None:
        self.delays: list[float] = []

    async def retry(self, entry: Entry, delivery: dict[str, Any], delay_s: float) -> None:
        self.delays.append(delay_s)


@pytest.mark.parametrize(
    ("attempt", "asked_s", "delay_s"),
    [(1, 0, 5), (2, 0, 20), (3, 0, 80), (5, 0, 1280), (6, 0, 3600), (7, 0, 3600), (1, 90, 90), (1, 1e9, 3600)],
)
async def test_waits_grow_and_follow_the_receivers_wish(attempt: int, asked_s: float, delay_s: float) -> None:
    shelf = Shelf()
    log = make_log("json", io.StringIO())
    sender = Sender(WebhookSettings(), shelf, None, None, log, jitter=lambda: 1.0)  # type: ignore[arg-type]
    await sender._settle(Entry("m", "gen_1", "completed", attempt, 1.0), Answer(0.1, 503, retry_after_s=asked_s), "")
    assert shelf.delays == [delay_s]


Start = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def start(settings: WebhookSettings) -> Iterator[Start]:
    """Starts `darkroom webhooks`."""
    env = os.environ | {
        "DARKROOM_REDIS_URL": str(settings.redis_url),
        "DARKROOM_WEBHOOK_ALLOW": LOOPBACK,
        "DARKROOM_WEBHOOK_TIMEOUT_S": str(ANSWER_S),
        "DARKROOM_WEBHOOK_RETRY_S": "0.05",
    }
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        processes.append(
            subprocess.Popen([sys.executable, "-m", "app.cli", "webhooks"], env=env, stderr=subprocess.PIPE)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.e2e
async def test_killed_sender_loses_nothing_and_repeats_under_the_same_id(
    served: httpx.AsyncClient, receiver: Receiver, start: Start
) -> None:
    receiver.held.set()
    job_id = await ask(served, receiver)
    first = start()
    await asyncio.to_thread(wait_until, lambda: len(receiver.taken) == 1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    receiver.held.clear()
    start()
    (delivery,) = await log_of_process(served, job_id)
    assert (delivery["attempt"], delivery["status"]) == (2, 200)
    assert len(receiver.taken) == 2
    assert len(set(receiver.ids)) == 1


async def log_of_process(client: httpx.AsyncClient, job_id: str) -> list[dict[str, Any]]:
    async def told() -> list[dict[str, Any]]:
        return list((await client.get(f"/v1/generations/{job_id}")).json()["webhook"]["deliveries"])

    return list(await until(told, 60))


@pytest.mark.e2e
async def test_sender_told_to_stop_ends_what_it_sends_first(
    served: httpx.AsyncClient, receiver: Receiver, start: Start
) -> None:
    receiver.held.set()
    job_id = await ask(served, receiver)
    process = start()
    await asyncio.to_thread(wait_until, lambda: len(receiver.taken) == 1)
    process.send_signal(signal.SIGTERM)
    receiver.held.clear()
    assert await asyncio.to_thread(process.wait, 30) == 0
    (delivery,) = await log_of_process(served, job_id)
    assert (delivery["attempt"], delivery["status"]) == (1, 200)
