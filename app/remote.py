"""A Darkroom somewhere, as its clients reach it."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any, Self

import httpx

from app.client import Unreachable
from app.settings import is_loopback

_TIMEOUT_S = 15.0
LONGEST_WAIT_S = 120.0
"""That one request waits in all for its key to have room: two windows of a rate by the minute."""


class Remote:
    """A deployment as its clients reach it. A context manager.

    Where a key has no room for a request it is made again once there is: that is no fault of the deployment.
    """

    def __init__(self, url: str, key: str | None = None, sleep: Callable[[float], None] = time.sleep) -> None:
        self.url, self._key, self._sleep = url, key, sleep
        self.local = is_loopback(httpx.URL(url).host)
        # A proxy from the environment is for the world outside; authorities that it adds are for all.
        known = httpx.create_ssl_context()
        self._http = httpx.Client(timeout=_TIMEOUT_S, verify=known, trust_env=not self.local)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def ask(
        self, method: str, path: str, *, keyed: bool = True, timeout_s: float = _TIMEOUT_S, **options: Any
    ) -> httpx.Response:
        """The answer, whatever its status. Unreachable."""
        headers = options.pop("headers", {}) | self._headers(keyed)
        return self._in_turn(lambda: self._send(method, self.url + path, headers=headers, timeout=timeout_s, **options))

    def fetch(self, url: str) -> httpx.Response:
        """What a browser gets that is given the url, and has no key. Unreachable."""
        return self._send("GET", url, follow_redirects=True)

    def events(self, path: str) -> Iterator[str]:
        """The names of the events of a stream, until it ends. Unreachable."""
        request = self._http.build_request("GET", self.url + path, headers=self._headers(True))
        with self._reaching(), closing(self._in_turn(lambda: self._http.send(request, stream=True))) as response:
            if response.headers.get("content-type", "").partition(";")[0] != "text/event-stream":
                raise Unreachable(f"{path} answered {response.status_code}, not with a stream of events")
            for line in response.iter_lines():
                if line.startswith("event:"):
                    yield line.removeprefix("event:").strip()

    def certificate_end(self) -> float | None:
        """Until when its certificate is good, in Unix seconds; None without TLS. Unreachable."""
        with self._reaching(), self._http.stream("GET", f"{self.url}/healthz") as response:
            stream = response.extensions.get("network_stream")
            tls = stream.get_extra_info("ssl_object") if stream else None
            ends = (tls.getpeercert() or {}).get("notAfter") if tls else None
        return ssl.cert_time_to_seconds(ends) if ends else None

    def _in_turn(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        """The answer once the key has room for the request; if that takes too long, the refusal."""
        waited_s = 0.0
        while (wait_s := _wait_s(answer := send())) and waited_s + wait_s <= LONGEST_WAIT_S:
            self._sleep(wait_s)
            waited_s += wait_s
        return answer

    def _headers(self, keyed: bool) -> dict[str, str]:
        return {"authorization": f"Bearer {self._key}"} if keyed and self._key else {}

    def _send(self, method: str, url: str, **options: Any) -> httpx.Response:
        with self._reaching():
            return self._http.request(method, url, **options)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException:
            raise Unreachable("no answer in time") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unreachable(str(error) or type(error).__name__) from None


def _wait_s(answer: httpx.Response) -> float:
    """The seconds after which the key has room for the request; 0 if its rate is not what is in the way."""
    if answer.status_code != 429:
        return 0.0
    answer.read()
    error, said = object_of(answer).get("error"), answer.headers.get("retry-after", "")
    limited = isinstance(error, dict) and error.get("code") == "rate_limited"
    return float(said) if limited and said.isdecimal() else 0.0


def refusal_of(answer: httpx.Response) -> str:
    """What it says of why not."""
    error = object_of(answer).get("error")
    if isinstance(error, dict) and "message" in error:
        return f"{error['message']} ({error.get('code')})"
    return f"{answer.status_code} {answer.reason_phrase}"


def object_of(answer: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer; empty if it has none."""
    try:
        found = json.loads(answer.content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
