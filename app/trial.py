"""A tiny picture, asked of a deployment as a client would, looked at from all sides, and deleted again."""

from __future__ import annotations

import math
import secrets
import struct
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import httpx
from rich.console import Console

from app.client import Unreachable
from app.finding import Finding, State
from app.remote import Remote, object_of, refusal_of
from worker.contract.job import TERMINAL

HOLD_S = 20
"""Less than proxies usually wait for an answer."""

POLL_S, MAX_POLL_S = 0.5, 5.0
KEPT_S = 600
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Trial:
    """One tiny picture of one model."""

    def __init__(self, server: Remote, model: dict[str, Any], patience_s: int) -> None:
        self._server, self._patience_s = server, patience_s
        self._what = f"model {model['name']}"
        self._side = smallest_side(model)
        self._idempotency_key = f"darkroom-doctor-{secrets.token_hex(16)}"
        self._body = {
            "model": model["name"],
            "prompt": "a red circle, for the doctor",
            "width": self._side,
            "height": self._side,
            "steps": 1,
            "output_format": "png",
            "deadline_s": min(3600, patience_s + 60),  # should we be cut off, nothing stays for long
            "expires_in_s": KEPT_S,
        }
        self._id, self._posted = "", False

    def findings(self) -> Generator[Finding, None, None]:
        """What comes of it; whatever that is, nothing of it stays there."""
        try:
            yield from self._checks()
        finally:
            left = self._forget()
        if left:
            yield self._finding("deleting", "wrong", left, f"DELETE /v1/generations/{self._id} once it is well again")
        elif self._id:
            yield self._finding("deleting", "ok", "nothing is left of it")

    def _checks(self) -> Generator[Finding, None, None]:
        started = time.monotonic()
        try:
            with Console(stderr=True, markup=False).status(f"{self._what}: asking for a tiny picture") as spinner:
                generation = self._made(spinner.update)
        except (Unreachable, _Refused) as error:
            yield self._finding("picture", "wrong", f"asking for it failed: {error}", "the gateway's log has the cause")
            return
        status, took_s = generation["status"], time.monotonic() - started
        if status != "succeeded":
            yield self._not_made(generation, took_s)
            return
        yield self._finding("picture", "ok", f"{self._side}x{self._side}, one step, in {took_s:.1f} s")
        yield self._check_url(generation)
        yield self._check_events()
        yield self._check_repeat()

    def _made(self, show: Callable[[str], None]) -> dict[str, Any]:
        """The generation once it has ended or patience has. Unreachable, _Refused."""
        ends = time.monotonic() + self._patience_s
        generation, waits = self._post(hold_s=min(HOLD_S, self._patience_s)), pauses()
        while generation["status"] not in TERMINAL and time.monotonic() < ends:
            ahead = generation.get("queue_position")
            show(f"{self._what}: {generation['status']}" + (f", {ahead} ahead" if ahead else ""))
            time.sleep(min(next(waits), max(0.0, ends - time.monotonic())))
            generation = _generation(self._server.ask("GET", self._path))
        return generation

    def _post(self, hold_s: int = 0) -> dict[str, Any]:
        """Asks for the picture; again is the same, by its idempotency key. Unreachable, _Refused."""
        headers = {"idempotency-key": self._idempotency_key} | ({"prefer": f"wait={hold_s}"} if hold_s else {})
        self._posted = True
        try:
            answer = self._server.ask(
                "POST", "/v1/generations", json=self._body, headers=headers, timeout_s=hold_s + 15.0
            )
        except Unreachable:
            if not hold_s:
                raise
            return self._post()  # something on the way does not let answers wait
        generation = _generation(answer)
        self._id = str(generation["id"])
        return generation

    def _not_made(self, generation: dict[str, Any], took_s: float) -> Finding:
        status = generation["status"]
        if status == "queued":
            ahead = generation.get("queue_position") or 0
            mend = "is a worker of this model alive and free, and the model not paused? darkroom queue status tells"
            return self._finding("picture", "wrong", f"still queued after {took_s:.0f} s, {ahead} ahead", mend)
        if status == "running":
            mend = "--patience waits longer; the worker's log tells what it does"
            return self._finding("picture", "wrong", f"still running after {took_s:.0f} s", mend)
        error = generation.get("error") or {}
        why = f"{error.get('message', 'no reason was given')} ({error.get('code', status)})"
        return self._finding("picture", "wrong", f"{status}: {why}", "the worker's log has the cause")

    def _check_url(self, generation: dict[str, Any]) -> Finding:
        """Whether the url in the answer gives the picture to who has no key."""
        images = generation.get("images") or [{}]
        url = httpx.URL(str(images[0].get("url", "")))
        mend = "DARKROOM_PUBLIC_URL of the gateway must be what clients reach it by"
        try:
            answer = self._server.fetch(str(url))
        except Unreachable as error:
            return self._finding("url of the picture", "wrong", f"{url.scheme}://{url.netloc.decode()}: {error}", mend)
        host = answer.url.netloc.decode()
        if answer.history:
            mend = "DARKROOM_S3_PUBLIC_ENDPOINT must be what clients reach the store by"
        if not answer.is_success:
            return self._finding("url of the picture", "wrong", f"{host} answered {answer.status_code}", mend)
        try:
            width, height = png_size(answer.content)
        except ValueError as error:
            found = f"{host} sent {len(answer.content)} bytes of {answer.headers.get('content-type')}: {error}"
            return self._finding("url of the picture", "wrong", found, mend)
        if (width, height) != (self._side, self._side):
            found = f"a picture of {width}x{height}, {self._side}x{self._side} was asked for"
            return self._finding("url of the picture", "wrong", found, "the worker's log may have the cause")
        return self._finding("url of the picture", "ok", f"{host} sent a PNG of {len(answer.content)} bytes")

    def _check_events(self) -> Finding:
        mend = "something on the way may hold streams back or cut them: no buffering for text/event-stream"
        try:
            names = list(self._server.events(f"{self._path}/events"))
        except Unreachable as error:
            return self._finding("events", "wrong", str(error), mend)
        if not names or names[-1] != "succeeded":
            last = f"{names[-1]!r}, not with 'succeeded'" if names else "nothing"
            return self._finding("events", "wrong", f"they ended with {last}", mend)
        return self._finding("events", "ok", f"{len(names)}, the last one succeeded")

    def _check_repeat(self) -> Finding:
        """Whether the same request again is known again."""
        first = self._id
        try:
            again = str(self._post()["id"])
        except (Unreachable, _Refused) as error:
            return self._finding("repeated request", "wrong", str(error), "the gateway's log has the cause")
        if again != first:
            self._delete(first)  # `again` is deleted in the end
            mend = "something on the way drops the header Idempotency-Key"
            return self._finding("repeated request", "wrong", "made another generation", mend)
        return self._finding("repeated request", "ok", "same id again")

    def _forget(self) -> str:
        """Deletes it; what is left, in words."""
        if not self._posted:
            return ""
        try:
            if not self._id:  # no answer came: by its idempotency key the same request tells the id
                self._post()
            return self._delete(self._id)
        except _Refused:
            return ""  # it was never accepted
        except Unreachable as error:
            return f"{self._id or 'a generation'} may be left there for {KEPT_S} s: {error}"

    def _delete(self, job_id: str) -> str:
        answer = self._server.ask("DELETE", f"/v1/generations/{job_id}")
        if answer.status_code not in (204, 404):
            return f"{job_id} was not deleted: {answer.status_code} {answer.reason_phrase}"
        if (found := self._server.ask("GET", f"/v1/generations/{job_id}").status_code) != 404:
            return f"{job_id} was deleted, and is there: {found}"
        return ""

    @property
    def _path(self) -> str:
        return f"/v1/generations/{self._id}"

    def _finding(self, what: str, state: State, found: str, mend: str = "") -> Finding:
        return Finding(f"{self._what}: {what}", state, found, mend)


class _Refused(Exception):
    """It answered, and not with a generation."""


def _generation(answer: httpx.Response) -> dict[str, Any]:
    said = object_of(answer)
    if not answer.is_success or "id" not in said or "status" not in said:
        raise _Refused(refusal_of(answer))
    return said


def pauses() -> Iterator[float]:
    """Seconds before each look at a picture, ever more: a look counts against the rate of the key."""
    pause_s = POLL_S
    while True:
        yield pause_s
        pause_s = min(MAX_POLL_S, 1.5 * pause_s)


def smallest_side(model: dict[str, Any]) -> int:
    """Of the smallest square that the model's limits allow, in pixels."""
    limits = model["limits"]
    multiple = int(limits["side_multiple"])
    least = max(int(limits["min_side"]), math.isqrt(int(limits["min_pixels"]) - 1) + 1)
    return math.ceil(least / multiple) * multiple


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG whose every chunk is whole. ValueError."""
    if not data.startswith(_SIGNATURE):
        raise ValueError("no PNG")
    size, at = (0, 0), len(_SIGNATURE)
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at) if at + 8 <= len(data) else (len(data), b"")
        body, at = data[at + 4 : at + 8 + length], at + 12 + length
        if at > len(data) or zlib.crc32(body) != struct.unpack_from(">I", data, at - 4)[0]:
            raise ValueError("a PNG that is cut or damaged")
        if kind == b"IHDR":
            size = struct.unpack_from(">II", body, 4)
        if kind == b"IEND":
            return size
    raise ValueError("a PNG without an end")
