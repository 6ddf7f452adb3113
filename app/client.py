"""A small client of the HTTP surface, for the command line."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import httpx

from app.settings import is_loopback

Generation = dict[str, Any]
"""A generation as `GET /v1/generations/{id}` shows it."""


class Refused(Exception):
    """The server answered, and said no; the message is its own."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        super().__init__(_message(response))


class Unreachable(Exception):
    """Nothing usable answered."""


class Client:
    """One server, by its base url. A context manager; not for use by several threads."""

    def __init__(
        self,
        url: str,
        timeout_s: float = 10.0,
        transport: httpx.BaseTransport | None = None,
        *,
        key: str | None = None,  # where the server asks for API keys
    ) -> None:
        self.url = url.rstrip("/")
        # A proxy from the environment is for the world outside, not for this machine.
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else None,
            timeout=timeout_s,
            transport=transport,
            trust_env=not is_loopback(httpx.URL(self.url).host),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def workers(self) -> dict[str, int]:
        """How many live workers hold each model, as `GET /readyz` says; asks for no API key."""
        response = self._send("GET", "/readyz")
        if response.status_code not in (200, 503):
            raise Refused(response)
        workers: dict[str, int] = self._object(response, "workers")["workers"]
        return workers

    def models(self) -> list[dict[str, Any]]:
        """What `GET /v1/models` lists."""
        models: list[dict[str, Any]] = self._answer("models", "GET", "/v1/models")["models"]
        return models

    def submit(self, request: dict[str, Any]) -> Generation:
        """Posts a generation."""
        return self._answer("id", "POST", "/v1/generations", json=request)

    def view(self, job_id: str) -> Generation:
        """The generation now."""
        return self._answer("id", "GET", f"/v1/generations/{job_id}")

    def cancel(self, job_id: str) -> Generation:
        """Cancels it, now or at its next step."""
        return self._answer("id", "POST", f"/v1/generations/{job_id}/cancel")

    def picture(self, job_id: str, n: int) -> bytes:
        """The bytes of its picture `n`, wherever the store is that the server names."""
        return self._call("GET", f"/v1/generations/{job_id}/images/{n}", follow_redirects=True).content

    def _answer(self, has: str, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The JSON object of an answer, which has this key."""
        return self._object(self._call(method, path, **options), has)

    def _object(self, response: httpx.Response, has: str) -> dict[str, Any]:
        with suppress(ValueError):
            answer = response.json()
            if isinstance(answer, dict) and has in answer:
                return answer
        raise Unreachable(f"what answers at {self.url} is no Darkroom server")

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        response = self._send(method, path, **options)
        if response.is_success:
            return response
        raise Refused(response)

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **options)
        except httpx.TimeoutException:
            raise Unreachable(f"{self.url} did not answer in time") from None
        except httpx.HTTPError as error:
            raise Unreachable(f"nothing answers at {self.url} ({error})") from None


def _message(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return f"{error['message']} ({error['code']}, request {error['request_id']})"
    except (ValueError, KeyError, TypeError):  # not one of ours: a proxy, another server
        return f"{response.url} answered {response.status_code} {response.reason_phrase}; is that a Darkroom server?"
