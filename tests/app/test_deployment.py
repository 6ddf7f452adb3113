"""`darkroom doctor --deployment`, against a gateway on a port: whole, and broken in every way that it names."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import AnyHttpUrl
from typer.testing import CliRunner

from app import deployment
from app.cli import cli
from app.deployment import FEW_REQUESTS, Visit, checked_url, examine_deployment
from app.finding import Finding
from app.remote import Remote
from app.settings import GatewaySettings
from app.trial import pauses, png_size, smallest_side
from tests.app.conftest import key_of
from tests.app.dialects.conftest import Live
from tests.app.dialects.painter import Painter, picture_of
from tests.app.fake_worker import NAMES, FakeWorker
from tests.bucket import S3Server
from tests.conftest import Valkey
from tests.processes import wait_until
from worker.contract.job import Failure


@pytest.fixture
def with_keys(settings: GatewaySettings) -> GatewaySettings:
    return settings.model_copy(update={"auth": "on"})


class Quick(Live):
    """Its OpenAPI, which takes a while to make, has its version alone."""

    def __init__(self, settings: GatewaySettings) -> None:
        super().__init__(settings)
        self.app.openapi_schema = {"info": {"version": self.app.version}}


def look(url: str, **visit: Any) -> dict[str, Finding]:
    given: dict[str, Any] = {"models": ("tiny",), "patience_s": 20} | visit
    return {one.what: one for one in examine_deployment(Visit(url, **given))}


def states(findings: dict[str, Finding], *whats: str) -> dict[str, str]:
    return {what: findings[what].state for what in whats}


def text_of(key: dict[str, str]) -> str:
    return key["authorization"].removeprefix("Bearer ")


def test_a_whole_deployment_is_well_and_nothing_is_left_there(with_keys: GatewaySettings) -> None:
    key = key_of(with_keys, "doctor", rate="500/minute")
    with Painter(with_keys), Live(with_keys) as live:
        findings = look(live.url, key=text_of(key), models=())
        left = httpx.get(f"{live.url}/v1/generations", headers=key, trust_env=False).json()["generations"]
    assert {one.state for one in findings.values()} == {"ok"}, findings
    assert findings["this API key"].found == "taken; it may generate, read"
    assert "of 500 requests left in 60 s" in findings["rate limit"].found
    assert findings["metrics"].found.startswith("queue")
    for name in NAMES:
        assert findings[f"model {name}"].found == "1 live worker"
        assert findings[f"model {name}: repeated request"].found == "same id again"
        assert findings[f"model {name}: events"].found.endswith("the last one succeeded")
        assert findings[f"model {name}: deleting"].found == "nothing is left of it"
    assert findings["model tiny: picture"].found.startswith("64x64, one step, in ")
    assert findings["model sd3.5-large: picture"].found.startswith("512x512, one step, in ")
    assert left == []
    assert not list(with_keys.store_dir.rglob("*.png"))


def test_exit_code_and_json_say_whether_all_is_well(settings: GatewaySettings) -> None:
    with Painter(settings), Quick(settings) as live:
        arguments = ["doctor", "--deployment", live.url, "--model", "tiny", "--json"]
        good = CliRunner().invoke(cli, arguments)
        bad = CliRunner().invoke(cli, [*arguments, "--model", "huge"])
    report = json.loads(good.stdout)
    assert (good.exit_code, report["well"]) == (0, True), good.stdout
    assert report["findings"][0] == {"what": "gateway", "state": "ok", "found": f"{live.url} answers", "mend": ""}
    assert bad.exit_code == 1
    unknown = next(one for one in json.loads(bad.stdout)["findings"] if one["what"] == "model huge")
    assert (unknown["state"], unknown["mend"]) == ("wrong", "known: sd3.5-large, sd3.5-large-turbo, tiny")


def test_people_are_told_finding_by_finding(settings: GatewaySettings) -> None:
    with Quick(settings) as live:
        result = CliRunner().invoke(cli, ["doctor", "--deployment", f"{live.url}/"])
    assert result.exit_code == 1
    assert f"ok     gateway: {live.url} answers\n" in result.stdout
    assert "wrong  models: none is known: no worker has started\n       start a worker" in result.stdout


def test_nothing_that_answers_is_told(unused_port: int) -> None:
    findings = look(f"http://127.0.0.1:{unused_port}")
    assert list(findings) == ["gateway"]
    assert findings["gateway"].state == "wrong"
    assert f"nothing answers at http://127.0.0.1:{unused_port} (" in findings["gateway"].found


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_wrong_key_is_told_and_no_key_is_too(with_keys: GatewaySettings) -> None:
    with Quick(with_keys) as live:
        wrong = look(live.url, key=f"dr_{'0' * 12}_{'x' * 43}")
        none = look(live.url)
    assert (wrong["this API key"].state, wrong["this API key"].found) == (
        "wrong",
        "the API key is not known here (unauthorized)",
    )
    assert none["this API key"].state == "wrong"
    assert "--key or DARKROOM_API_KEY" in none["this API key"].mend
    assert not [what for what in (*wrong, *none) if what.startswith("model")]


def test_a_key_that_may_only_read_is_not_asked_to_generate(with_keys: GatewaySettings) -> None:
    key = key_of(with_keys, "reader", scopes=("read",), rate="10/minute")
    with Painter(with_keys), Quick(with_keys) as live:
        findings = look(live.url, key=text_of(key))
    assert (findings["this API key"].state, findings["this API key"].found) == ("warning", "taken; it may read")
    assert findings["rate limit"].state == "warning"
    assert findings["model tiny"].state == "ok"
    assert "model tiny: picture" not in findings


def test_a_key_without_room_is_waited_for(with_keys: GatewaySettings) -> None:
    key = key_of(with_keys, "slow", rate="2/second")
    with Painter(with_keys), Quick(with_keys) as live:
        findings = look(live.url, key=text_of(key))
    assert {one.state for what, one in findings.items() if what != "rate limit"} == {"ok"}, findings


def test_a_slow_picture_is_looked_at_seldom_enough_for_the_rate_of_a_key() -> None:
    looks = list(accumulate(islice(pauses(), 30)))
    assert looks[0] <= 1
    assert sum(at <= 60 for at in looks) <= FEW_REQUESTS


@contextmanager
def refusing(times: int, code: str, retry_after: str = "30") -> Iterator[tuple[Remote, list[float]]]:
    """A server that answers 429 so many times, then 200; and how long was slept for it."""

    class Handler(BaseHTTPRequestHandler):
        left = times

        def do_GET(self) -> None:
            refused, Handler.left = Handler.left > 0, Handler.left - 1
            body = json.dumps({"error": {"code": code, "message": "later"}}).encode() if refused else b"{}"
            self.send_response(429 if refused else 200)
            self.send_header("retry-after", retry_after)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    slept: list[float] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with Remote(f"http://127.0.0.1:{http.server_address[1]}", sleep=slept.append) as server:
                yield server, slept
        finally:
            http.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("times", "code", "retry_after", "status", "waits"),
    [
        (2, "rate_limited", "30", 200, [30, 30]),
        (9, "rate_limited", "50", 429, [50, 50]),
        (1, "rate_limited", "3600", 429, []),
        (1, "rate_limited", "soon", 429, []),
        (1, "too_many_jobs", "30", 429, []),
    ],
)
def test_a_request_waits_for_its_keys_rate_alone_and_not_for_ever(
    times: int, code: str, retry_after: str, status: int, waits: list[float]
) -> None:
    with refusing(times, code, retry_after) as (server, slept):
        assert server.ask("GET", "/").status_code == status
    assert slept == waits


def test_scopes_are_found_without_making_anything(with_keys: GatewaySettings) -> None:
    key = key_of(with_keys, "all", scopes=("generate", "read", "high-priority"), rate="none")
    with Quick(with_keys) as live:
        findings = look(live.url, key=text_of(key), models=())
    assert findings["this API key"].found == "taken; it may generate, high-priority, read"
    assert findings["rate limit"].found == "none for this key"


def test_a_model_without_a_worker_is_noted_and_not_tried_and_the_deployment_is_well(settings: GatewaySettings) -> None:
    with FakeWorker(settings):
        pass  # its cards stay
    with Quick(settings) as live:
        findings = look(live.url, models=())
        jobs = live.jobs()
        result = CliRunner().invoke(cli, ["doctor", "--deployment", live.url])
    assert states(findings, *(f"model {name}" for name in NAMES)) == {f"model {name}": "warning" for name in NAMES}
    assert "--model tiny waits for one" in findings["model tiny"].mend
    assert "darkroom queue forget tiny" in findings["model tiny"].mend
    assert jobs == []
    assert result.exit_code == 0, result.stdout


def test_a_model_for_which_a_job_waits_longer_than_patience_is_wrong_without_a_worker(
    settings: GatewaySettings,
) -> None:
    with FakeWorker(settings):
        pass
    with Quick(settings) as live:
        asked = {"model": "tiny", "prompt": "a red circle"}
        httpx.post(f"{live.url}/v1/generations", json=asked, trust_env=False).raise_for_status()
        soon = look(live.url, models=(), patience_s=60)
        wait_until(lambda: look(live.url, models=(), patience_s=0)["model tiny"].state == "wrong")
        late = look(live.url, models=(), patience_s=0)
    assert soon["model tiny"].state == "warning"
    assert late["model tiny"].found.startswith("no live worker, and a job has waited for ")
    assert late["model sd3.5-large"].state == "warning"


def test_a_model_that_was_named_is_waited_for_and_its_job_taken_back(settings: GatewaySettings) -> None:
    with FakeWorker(settings):
        pass
    with Quick(settings) as live:
        findings = look(live.url, patience_s=1)
        jobs = live.jobs()
    assert findings["model tiny"].state == "warning"
    assert findings["model tiny: picture"].found == "still queued after 1 s, 0 ahead"
    assert findings["model tiny: deleting"].state == "ok"
    assert jobs == []


def test_a_job_that_fails_is_told_with_its_reason(settings: GatewaySettings) -> None:
    with Painter(settings, Failure(code="out_of_memory", message="too large")), Quick(settings) as live:
        findings = look(live.url)
        jobs = live.jobs()
    assert findings["model tiny: picture"].found == "failed: too large (out_of_memory)"
    assert findings["model tiny: deleting"].state == "ok"
    assert jobs == []


def test_a_store_that_is_gone_is_told(settings: GatewaySettings) -> None:
    with Painter(settings), Quick(settings) as live:
        look(live.url)
        for path in settings.store_dir.iterdir():
            path.unlink() if path.is_file() else path.rmdir()
        settings.store_dir.rmdir()
        settings.store_dir.touch()
        findings = look(live.url, models=("none",))
    assert findings["picture store"].state == "wrong"
    assert "DARKROOM_STORE_DIR" in findings["picture store"].mend


def test_a_redis_that_is_gone_is_told(own_valkey: Valkey, tmp_path: Path) -> None:
    settings = GatewaySettings(redis_url=own_valkey.url, store_dir=tmp_path / "pictures")  # type: ignore[arg-type]
    with Quick(settings) as live:
        own_valkey.stop()
        findings = look(live.url)
    assert states(findings, "gateway", "Redis", "picture store", "API keys") == {
        "gateway": "ok",
        "Redis": "wrong",
        "picture store": "ok",
        "API keys": "wrong",
    }
    assert findings["metrics"].state == "wrong"
    assert findings["metrics"].found.startswith("queue")


def test_urls_that_lead_nowhere_are_told(settings: GatewaySettings, unused_port: int) -> None:
    elsewhere = settings.model_copy(update={"public_url": AnyHttpUrl(f"http://127.0.0.1:{unused_port}")})
    with Painter(elsewhere), Quick(elsewhere) as live:
        findings = look(live.url)
        jobs = live.jobs()
    assert findings["model tiny: url of the picture"].state == "wrong"
    assert f"http://127.0.0.1:{unused_port}: " in findings["model tiny: url of the picture"].found
    assert "DARKROOM_PUBLIC_URL" in findings["model tiny: url of the picture"].mend
    assert jobs == []


def test_a_url_of_the_store_itself_is_followed(redis_url: str, tmp_path: Path) -> None:
    server = S3Server(tmp_path)
    bucket = server.settings(s3_presign=True)
    settings = GatewaySettings(redis_url=redis_url, **bucket)  # type: ignore[arg-type]
    server.start()
    try:
        with Painter(settings), Quick(settings) as live:
            findings = look(live.url)
    finally:
        server.stop()
    found = findings["model tiny: url of the picture"]
    assert (found.state, found.found.partition(" sent ")[0]) == ("ok", f"127.0.0.1:{server.port}")
    assert findings["model tiny: deleting"].state == "ok"


def test_what_is_no_picture_is_told(settings: GatewaySettings) -> None:
    with FakeWorker(settings), Quick(settings) as live:
        findings = look(live.url)
    assert findings["model tiny: url of the picture"].state == "wrong"
    assert findings["model tiny: url of the picture"].found.endswith("of image/png: no PNG")


@contextmanager
def between(live: Live, *, hold: bool = True, drop: str = "", tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A proxy before the gateway; not hold: held answers are cut off; drop: a header that it takes away."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"] or 0))
            headers = {name: value for name, value in self.headers.items() if name.lower() != drop}
            answer = httpx.request(
                self.command, live.url + self.path, headers=headers, content=body, trust_env=False, timeout=30
            )
            if "prefer" in headers and not hold:
                return  # as if the connection had broken
            self.send_response(answer.status_code)
            for name in ("content-type", "date", "idempotency-replayed"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            self.wfile.write(answer.content)

        do_POST = do_DELETE = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        if tls:
            http.socket = tls.wrap_socket(http.socket, server_side=True)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{http.server_address[1]}"
        finally:
            http.shutdown()
            thread.join()


def test_a_proxy_that_cuts_held_answers_leaves_no_job_behind(settings: GatewaySettings) -> None:
    with Painter(settings), Quick(settings) as live:
        with between(live, hold=False) as url:
            findings = look(url)
        jobs = live.jobs()
    assert states(findings, "model tiny: picture", "model tiny: deleting") == {
        "model tiny: picture": "ok",
        "model tiny: deleting": "ok",
    }
    assert jobs == []


def test_a_proxy_that_drops_the_idempotency_key_is_told(settings: GatewaySettings) -> None:
    with Painter(settings), Quick(settings) as live:
        with between(live, drop="idempotency-key") as url:
            findings = look(url)
        jobs = live.jobs()
    assert findings["model tiny: repeated request"].found == "made another generation"
    assert findings["model tiny: deleting"].state == "ok"
    assert jobs == []


def test_a_visit_that_is_broken_off_takes_its_job_back(settings: GatewaySettings) -> None:
    with Painter(settings) as worker, Quick(settings) as live:
        worker.go_on.clear()
        visit = examine_deployment(Visit(live.url, models=("tiny",), patience_s=1))
        assert next(one for one in visit if one.what == "model tiny: picture").found.startswith("still running after")
        assert [job["status"] for job in live.jobs()] == ["running"]
        visit.close()
        assert live.jobs() == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_is_verified_by_the_authorities_that_are_known(
    settings: GatewaySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=x"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with Quick(settings) as live, between(live, tls=tls) as url:
        unknown = look(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        known = look(url)
    assert list(unknown) == ["TLS"]
    assert unknown["TLS"].state == "wrong"
    assert "SSL_CERT_FILE" in unknown["TLS"].mend
    assert known["gateway"].state == "ok"
    assert known["TLS"].found == "the certificate is good for 30 days"


def test_another_server_is_told() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        findings = look(f"http://127.0.0.1:{http.server_address[1]}")
        http.shutdown()
        thread.join()
    assert findings["gateway"].state == "wrong"
    assert findings["gateway"].found.endswith("answered 200: no Darkroom")


@pytest.mark.parametrize(
    ("url", "addresses", "warned"),
    [
        ("http://pictures.example", ["93.184.216.34"], True),
        ("http://pictures.example", ["10.0.0.7"], False),
        ("https://pictures.example", ["93.184.216.34"], False),
        ("http://127.0.0.1:8000", ["93.184.216.34"], False),
    ],
)
def test_plain_http_to_a_public_address_is_warned_about(url: str, addresses: list[str], warned: bool) -> None:
    findings = list(deployment.check_transport(url, lambda host: addresses))
    assert [one.state for one in findings] == ["warning"] * warned


@pytest.mark.parametrize(("offset_s", "state"), [(0, "ok"), (60, "warning"), (-60, "warning")])
def test_clocks_that_disagree_are_told(offset_s: int, state: str) -> None:
    now = 1_700_000_000.5
    answer = httpx.Response(200, headers={"date": formatdate(now + offset_s, usegmt=True)})
    (found,) = deployment.check_clock(answer, now)
    assert found.state == state
    if offset_s:
        assert found.found == f"60 s {'ahead' if offset_s > 0 else 'behind'} of this machine's"


@pytest.mark.parametrize(("days", "state"), [(80, "ok"), (3, "warning")])
def test_a_certificate_that_ends_soon_is_told(days: int, state: str) -> None:
    (found,) = deployment.check_certificate(time.time() + days * 86_400)
    assert (found.state, found.found) == (state, f"the certificate is good for {days} days")


@pytest.mark.parametrize("url", ["", "pictures.example", "ftp://x", "https://", "https://a:b@x", "https://x?a=b"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="allowed: a url such as") as refused:
        checked_url(url)
    assert "a:b" not in str(refused.value)
    result = CliRunner().invoke(cli, ["doctor", "--deployment", url])
    assert (result.exit_code, "error: --deployment: " in result.stderr) == (1, True)


@pytest.mark.parametrize(("pixels", "side"), [(4096, 64), (262_144, 512), (262_145, 528), (1, 16)])
def test_the_smallest_picture_is_within_the_limits(pixels: int, side: int) -> None:
    assert smallest_side({"limits": {"min_pixels": pixels, "min_side": 16, "side_multiple": 16}}) == side


def test_a_png_is_read_to_its_end() -> None:
    whole = picture_of(64, 48, "png")
    assert png_size(whole) == (64, 48)
    for broken in (whole[:-5], whole[:40], whole[:50] + b"x" + whole[51:], picture_of(64, 48, "jpeg"), b"", whole[:8]):
        with pytest.raises(ValueError, match="PNG"):
            png_size(broken)
