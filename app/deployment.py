"""`darkroom doctor --deployment URL`: whether a Darkroom somewhere does its work, seen from a client's place."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from app.client import Unreachable
from app.finding import Finding
from app.remote import Remote, object_of, refusal_of
from app.settings import is_loopback
from app.trial import Trial

PATIENCE_S = 120
CLOCK_TOLERANCE_S = 5.0
LEAST_CERTIFICATE_S = 14 * 86_400
FEW_REQUESTS = 20
"""What the doctor itself needs, and a client who comes meanwhile."""

NO_SUCH_MODEL = "darkroom-doctor"

Resolve = Callable[[str], list[str]]
"""The addresses of a host."""


@dataclass(frozen=True)
class Visit:
    """What is asked of the doctor."""

    url: str
    key: str | None = None
    models: tuple[str, ...] = ()  # empty: all
    patience_s: int = PATIENCE_S  # that a picture may take


@dataclass(frozen=True)
class Access:
    """What the caller may do there."""

    models: list[dict[str, Any]]
    may_generate: bool


def checked_url(url: str) -> str:
    """The base url without its last slash. ValueError."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
        raise ValueError(f"{str(parsed.copy_with(userinfo=b''))!r}; allowed: a url such as https://pictures.example")
    return url.rstrip("/")


def examine_deployment(visit: Visit, resolve: Resolve | None = None) -> Generator[Finding, None, None]:
    """All that a client needs of it, each finding as soon as it is made; leaves nothing behind there."""
    with Remote(visit.url, visit.key) as server:
        yield from check_transport(visit.url, resolve or _addresses)
        sent = time.time()
        try:
            health = server.ask("GET", "/healthz", keyed=False)
        except Unreachable as error:
            yield _unreachable(visit.url, str(error))
            return
        if object_of(health).get("status") != "ok":
            found = f"{visit.url}/healthz answered {health.status_code}: no Darkroom"
            yield Finding("gateway", "wrong", found, "is the url that of the gateway, with its path if it has one?")
            return
        yield Finding("gateway", "ok", f"{visit.url} answers")
        yield from check_clock(health, (sent + time.time()) / 2)
        try:
            yield from check_certificate(server.certificate_end())
            yield from _check_service(server, visit)
        except Unreachable as error:
            yield _unreachable(visit.url, str(error))


def _check_service(server: Remote, visit: Visit) -> Generator[Finding, None, None]:
    yield from check_version(server)
    yield from check_readiness(server)
    waits_s = yield from check_metrics(server)
    access = yield from check_access(server, has_key=visit.key is not None)
    if access:
        yield from check_models(server, access, visit, waits_s)


def check_transport(url: str, resolve: Resolve) -> Iterator[Finding]:
    """Whether prompts, pictures and keys go in the clear through the world."""
    host = httpx.URL(url).host
    if not url.startswith("http://") or is_loopback(host):
        return
    with suppress(OSError, ValueError):
        public = [address for address in resolve(host) if ipaddress.ip_address(address).is_global]
        if public:
            found = f"plain http to {public[0]}, a public address: who is on the way reads prompts, pictures and keys"
            yield Finding("transport", "warning", found, "put TLS in front of the gateway, and ask by https")


def check_certificate(ends_at: float | None) -> Iterator[Finding]:
    """How long the certificate is good (Unix seconds; None: there is none); that it is was checked by asking."""
    if ends_at is not None:
        left_s = ends_at - time.time()
        few = left_s < LEAST_CERTIFICATE_S
        mend = "renew it; cert-manager and the like do so by themselves" if few else ""
        yield Finding(
            "TLS", "warning" if few else "ok", f"the certificate is good for {left_s / 86_400:.0f} days", mend
        )


def check_clock(health: httpx.Response, now: float) -> Iterator[Finding]:
    """Whether its clock and ours agree; `now`: Unix seconds when it answered."""
    with suppress(KeyError, ValueError):
        skew_s = parsedate_to_datetime(health.headers["date"]).timestamp() + 0.5 - now  # it tells whole seconds
        off = abs(skew_s) > CLOCK_TOLERANCE_S
        found = f"{abs(skew_s):.0f} s {'ahead' if skew_s > 0 else 'behind'} of this machine's" if off else "as here"
        mend = "set both by NTP: signed urls and webhooks carry times" if off else ""
        yield Finding("clock", "warning" if off else "ok", found, mend)


def check_version(server: Remote) -> Iterator[Finding]:
    """Whether it is the Darkroom that this command belongs to."""
    theirs, ours = (
        object_of(server.ask("GET", "/openapi.json", keyed=False)).get("info", {}).get("version"),
        version("darkroom"),
    )
    if theirs == ours:
        yield Finding("version", "ok", ours)
    else:
        yield Finding(
            "version", "warning", f"{theirs} there, {ours} here", "use the doctor of the version that runs there"
        )


def check_readiness(server: Remote) -> Iterator[Finding]:
    """Redis, store and gateway as `GET /readyz` tells of them."""
    ready = object_of(server.ask("GET", "/readyz", keyed=False))
    if "redis" not in ready:
        yield Finding("readiness", "wrong", "GET /readyz tells of no Redis", "let it through to the gateway")
        return
    for what, part, settings in (
        ("Redis", "redis", "DARKROOM_REDIS_URL"),
        ("picture store", "store", "DARKROOM_STORE_DIR or DARKROOM_S3_*"),
    ):
        ok = ready[part] == "ok"
        mend = "" if ok else f"the gateway's log has the cause; {settings} says where it is"
        yield Finding(what, "ok" if ok else "wrong", str(ready[part]), mend)
    if ready.get("draining"):
        yield Finding("gateway is ready", "wrong", "it is shutting down", "try again once another has taken its place")


def check_metrics(server: Remote) -> Generator[Finding, None, dict[str, float]]:
    """Whether Prometheus sees the gateway from here, and what it is told; for how long jobs wait, by model."""
    answer = server.ask("GET", "/metrics", keyed=False)
    try:
        samples = _samples(answer.text) if answer.is_success else []
    except ValueError:
        samples = []
    values = {sample.name: sample.value for sample in samples}
    if "darkroom_queue_up" not in values:
        found = f"GET /metrics answered {answer.status_code} without any of Darkroom"
        yield Finding(
            "metrics", "warning", found, "fine if it is kept from the outside; Prometheus must reach it inside"
        )
        return {}
    down = [part for part in ("queue", "store") if values.get(f"darkroom_{part}_up", 1.0) != 1.0]
    if down:
        found = f"{' and '.join(down)} not up"
        yield Finding("metrics", "wrong", found, "the gateway's log has the cause")
    else:
        told = " and ".join(part for part in ("queue", "store") if f"darkroom_{part}_up" in values)
        yield Finding("metrics", "ok", f"{told} up")
    return _longest_waits(samples)


def check_access(server: Remote, *, has_key: bool) -> Generator[Finding, None, Access | None]:
    """Who gets in, and what this key may; None if nothing more can be asked."""
    bare = server.ask("GET", "/v1/models", keyed=False)
    if bare.is_success:
        mend = "" if server.local else "DARKROOM_AUTH=on, unless something in front asks who they are"
        found = "off: whoever reaches it may use it"
        yield Finding("API keys", "ok" if server.local else "warning", found, mend)
        return Access(_models(bare), may_generate=True)
    if bare.status_code != 401:
        yield Finding("API keys", "wrong", refusal_of(bare), "the gateway's log has the cause")
        return None
    yield Finding("API keys", "ok", "asked for")
    if not has_key:
        mend = "--key or DARKROOM_API_KEY gives one; darkroom keys add NAME makes one"
        yield Finding("this API key", "wrong", "none was given, so nothing more can be tried", mend)
        return None
    answer = server.ask("GET", "/v1/models")
    if not answer.is_success:
        mend = "darkroom keys list shows which there are; keys add NAME makes one"
        yield Finding("this API key", "wrong", refusal_of(answer), mend)
        return None
    scopes = _scopes(server)
    few = "generate" not in scopes
    mend = "give one with the scope generate, and pictures will be tried as well" if few else ""
    yield Finding("this API key", "warning" if few else "ok", f"taken; it may {', '.join(scopes) or 'nothing'}", mend)
    yield check_rate(answer)
    return Access(_models(answer), may_generate=not few)


def check_rate(answer: httpx.Response) -> Finding:
    """Whether the key has requests left, as the headers of an answer tell."""
    policy, state = answer.headers.get("ratelimit-policy"), answer.headers.get("ratelimit")
    if not policy or not state:
        return Finding("rate limit", "ok", "none for this key")
    fields = dict(part.partition("=")[::2] for part in f"{policy};{state}".split(";") if "=" in part)
    found = f"{fields.get('r', '?')} of {fields.get('q', '?')} requests left in {fields.get('w', '?')} s"
    few = fields.get("r", "").isdecimal() and int(fields["r"]) < FEW_REQUESTS
    mend = "darkroom keys add NAME --rate gives another key more" if few else ""
    return Finding("rate limit", "warning" if few else "ok", found, mend)


def check_models(server: Remote, access: Access, visit: Visit, waits_s: Mapping[str, float]) -> Iterator[Finding]:
    """Each model: a live worker, and a tiny picture. One that was named is also tried while no worker has it."""
    known = {str(model["name"]): model for model in access.models}
    if not known:
        mend = "start a worker against the same Redis: darkroom worker"
        yield Finding("models", "wrong", "none is known: no worker has started", mend)
    for name in visit.models or sorted(known):
        model, what = known.get(name), f"model {name}"
        if model is None:
            yield Finding(what, "wrong", "not known there", f"known: {', '.join(sorted(known)) or 'none'}")
            continue
        workers = int(model["workers"])
        if not workers and name not in visit.models:
            yield _unserved(name, waits_s.get(name, 0.0), visit.patience_s)
            continue
        yield Finding(what, "ok" if workers else "warning", f"{workers} live {'worker' if workers == 1 else 'workers'}")
        if access.may_generate:
            yield from Trial(server, model, visit.patience_s).findings()


def _unserved(name: str, waits_s: float, patience_s: int) -> Finding:
    """No worker: as it should be where workers start on demand, unless there is demand and none starts."""
    what = f"model {name}"
    if waits_s > patience_s:
        found = f"no live worker, and a job has waited for {waits_s:.0f} s"
        return Finding(what, "wrong", found, "start a worker that has it, or find out why none starts")
    mend = (
        f"fine where workers start on demand: --model {name} waits for one; "
        f"if nothing is to serve it any more: darkroom queue forget {name}"
    )
    return Finding(what, "warning", "no live worker", mend)


def _scopes(server: Remote) -> list[str]:
    """What the key may: asked by requests that leave nothing behind, for a model that does not exist."""
    scopes = []
    for scope, priority in (("generate", "normal"), ("high-priority", "high")):
        body = {"model": NO_SUCH_MODEL, "prompt": "-", "priority": priority}
        if server.ask("POST", "/v1/generations", json=body).status_code == 404:
            scopes.append(scope)
    if server.ask("GET", "/v1/generations", params={"limit": 1}).is_success:
        scopes.append("read")
    return scopes


def _unreachable(url: str, why: str) -> Finding:
    if "CERTIFICATE" in why.upper():
        mend = "it needs a certificate for this name, of an authority that is known here; SSL_CERT_FILE names more"
        return Finding("TLS", "wrong", f"{url}: {why}", mend)
    return Finding("gateway", "wrong", f"nothing answers at {url} ({why})", "is it running, and reachable from here?")


def _samples(text: str) -> list[Sample]:
    """All that is told to Prometheus. ValueError."""
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def _longest_waits(samples: Iterable[Sample]) -> dict[str, float]:
    """Seconds that the job waits which has waited longest, by model."""
    found: dict[str, float] = {}
    for sample in samples:
        if sample.name == "darkroom_queue_oldest_age_seconds":
            model = sample.labels.get("model", "")
            found[model] = max(sample.value, found.get(model, 0.0))
    return found


def _models(answer: httpx.Response) -> list[dict[str, Any]]:
    return [model for model in object_of(answer).get("models", []) if isinstance(model, dict)]


def _addresses(host: str) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, None)]
