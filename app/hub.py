"""The Hugging Face Hub: what a repository holds, and its bytes.

huggingface_hub knows names, urls and tokens. The bytes are ours: it keeps no half of a file from one run to the next,
and compares no sums, and a file here may have ten gigabytes.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

PUBLIC = "https://huggingface.co"
TRIES = 8
FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 60.0
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another try may not meet again."""

_TIMEOUT = httpx.Timeout(20.0, connect=10.0)
_SHOWN = 240
_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")

T = TypeVar("T")


class FetchFailed(Exception):
    """The model was not fetched; says why, and what to do."""

    exit_code = 1


class NotAllowed(FetchFailed):
    """The hub wants a token, another one, or its licence accepted."""

    exit_code = 3


class NotThere(FetchFailed):
    """No such repository, revision or file."""

    exit_code = 4


class HubAway(FetchFailed):
    """The hub cannot be reached, or broke off too often."""

    exit_code = 5


class DiskFailed(FetchFailed):
    """The folder cannot be read or written to, or its disk is full."""

    exit_code = 6


class WrongSum(FetchFailed):
    """Bytes that are not those of the hub's listing."""

    exit_code = 7


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit, and what its bytes must add up to."""

    path: str  # in the repository
    size: int  # bytes
    sum: str  # in hex: SHA-256 of what the hub keeps outside git, else git's own SHA-1

    def hasher(self) -> Any:
        """What to feed the bytes to; its hexdigest must be `sum`."""
        if len(self.sum) == 64:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit."""

    commit: str
    files: tuple[RemoteFile, ...]


class Stopped(Exception):
    """The hub is not asked any more."""


class _Passing(Exception):
    """Another try may do better."""

    def __init__(self, why: str, pause_s: float | None = None) -> None:
        self.pause_s = pause_s
        super().__init__(why)


class Hub:
    """One endpoint, asked with one token. A context manager; its methods may run in several threads."""

    def __init__(
        self,
        endpoint: str = PUBLIC,
        token: str | None = None,
        say: Callable[[str], None] = lambda _: None,  # told of longer pauses
        *,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        from huggingface_hub.utils import build_hf_headers

        self.endpoint, self._has_token = endpoint.rstrip("/"), token is not None
        self._headers: dict[str, str] = build_hf_headers(token=token or False, library_name="darkroom")
        # Redirects lead to a CDN; httpx takes the token along to no other host.
        self._http = httpx.Client(follow_redirects=True, timeout=_TIMEOUT)
        self._say, self._first_pause_s, self._stopped = say, first_pause_s, threading.Event()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def stop(self) -> None:
        """Ends all that is under way with Stopped, within a chunk or a pause."""
        self._stopped.set()

    def listing(self, repo: str, revision: str) -> Listing:
        """The files of a revision, with sizes and sums. NotAllowed, NotThere, HubAway."""
        url = f"{self.endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}"

        def ask() -> Listing:
            with self._translated():
                response = self._http.get(url, params={"blobs": "true"}, headers=self._headers)
            self._require_success(response, repo, revision)
            return self._read(response)

        return self.patiently(ask)

    @contextmanager
    def open(self, repo: str, commit: str, file: RemoteFile, start: int) -> Iterator[Iterator[bytes]]:
        """The bytes of a file from byte `start` on; a connection that breaks raises what `patiently` tries again."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(repo, file.path, revision=commit, endpoint=self.endpoint)
        # Of compressed bytes neither place nor number would be the file's.
        headers = self._headers | {"accept-encoding": "identity"} | ({"range": f"bytes={start}-"} if start else {})
        with self._translated(), self._http.stream("GET", url, headers=headers) as response:
            if not response.is_success:
                response.read()
            self._require_success(response, repo, commit, file.path)
            # Who answers 200 to a range sends the whole file.
            yield self._chunks(response, start if response.status_code == 200 else 0, file.size - start)

    def _chunks(self, response: httpx.Response, skipped: int, expected: int) -> Iterator[bytes]:
        """The body without so many first bytes; ends soon after it has given more than expected."""
        given = 0
        for chunk in response.iter_raw():  # as they come: larger ones would be lost with the connection
            if self._stopped.is_set():
                raise Stopped
            if len(chunk) > skipped:
                yield chunk[skipped:]
                given += len(chunk) - skipped
            if given > expected:
                return
            skipped = max(0, skipped - len(chunk))
        if given < expected:
            raise _Passing(f"{response.url.host} sent {given} bytes of {expected}")

    def patiently(self, work: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """What the work gives, tried again while the network fails it: for ever, as long as `progress` grows."""
        tries, seen = 0, progress()
        while True:
            try:
                return work()
            except _Passing as error:
                tries, seen = (1, progress()) if progress() > seen else (tries + 1, seen)
                if tries >= TRIES:
                    raise HubAway(f"{error}; what is here stays, and the same command goes on from there") from None
                pause_s = min(MAX_PAUSE_S, error.pause_s or self._first_pause_s * 2 ** (tries - 1))
                if pause_s >= 1:
                    self._say(f"{error}; trying again in {pause_s:.0f} s")
                if self._stopped.wait(pause_s):
                    raise Stopped from None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            why = str(error) or type(error).__name__
            raise _Passing(f"{self.endpoint} cannot be reached, or broke off ({why})") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise HubAway(f"{self.endpoint} cannot be asked ({error}); HF_ENDPOINT names another hub") from None

    def _require_success(self, response: httpx.Response, repo: str, revision: str, path: str = "") -> None:
        if response.is_success:
            return
        status, code = response.status_code, response.headers.get("x-error-code", "")
        said = _said(response)
        elsewhere = response.url.host != httpx.URL(self.endpoint).host  # a CDN, by a url that is good for a while
        if status in PASSING or (elsewhere and status in (401, 403) and not code):
            raise _Passing(f"{response.url.host} answered {status}{said}", _retry_after(response))
        if code == "GatedRepo":
            raise NotAllowed(self._gated(repo) + said)
        if code == "RevisionNotFound":
            raise NotThere(f"{repo} has no revision {revision!r}; allowed: one of its branches, tags or commits")
        if status == 401 and "Invalid credentials" in said:
            raise NotAllowed(f"{self.endpoint} does not know this token{said}; make one at {self._tokens}")
        if code == "RepoNotFound" or (not path and status in (401, 404)):
            hint = "or this token may not see it" if self._has_token else "or it is private and needs a token"
            raise NotThere(f"there is no model {repo!r} at {self.endpoint}, {hint}{said}")
        if status in (401, 403):
            raise NotAllowed(f"{self.endpoint} refuses {repo} ({status}{said}); {self._scope}")
        if status == 404:
            raise NotThere(f"{repo} lists {path}, but {self.endpoint} does not have it")
        raise HubAway(f"{response.url.host} answered {status} {response.reason_phrase}{said}")

    @property
    def _tokens(self) -> str:
        return f"{self.endpoint}/settings/tokens"

    @property
    def _scope(self) -> str:
        return "a fine-grained token needs the right to read public gated repositories"

    def _gated(self, repo: str) -> str:
        accept = f"accept its licence at {self.endpoint}/{repo}"
        if not self._has_token:
            return (
                f"{repo} is gated: {accept}, make a token that may read at {self._tokens}, and give it by --token-file,"
                " DARKROOM_HF_TOKEN_FILE or HF_TOKEN"
            )
        return f"{repo} is gated, and this token's account is not let in: {accept} with that account; {self._scope}"

    def _read(self, response: httpx.Response) -> Listing:
        try:
            said = response.json()
            return Listing(_hex(_SHA1, said["sha"]), tuple(_remote_file(sibling) for sibling in said["siblings"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise HubAway(f"what answers at {self.endpoint} is no Hugging Face Hub; HF_ENDPOINT names one") from None


def _remote_file(sibling: dict[str, Any]) -> RemoteFile:
    size, lfs = sibling["size"], sibling.get("lfs")
    if not isinstance(size, int) or size < 0:
        raise ValueError
    return RemoteFile(
        str(sibling["rfilename"]), size, _hex(_SHA256, lfs["sha256"]) if lfs else _hex(_SHA1, sibling["blobId"])
    )


def _hex(form: re.Pattern[str], text: object) -> str:
    if not isinstance(text, str) or not form.fullmatch(text):
        raise ValueError
    return text


def _said(response: httpx.Response) -> str:
    """The hub's own words, in brackets; it is a stranger's text on a terminal."""
    words = "".join(c for c in response.headers.get("x-error-message", "") if c.isprintable())
    return f" (it says: {words[:_SHOWN]})" if words else ""


def _retry_after(response: httpx.Response) -> float | None:
    said = response.headers.get("retry-after", "")
    return float(said) if re.fullmatch(r"\d{1,6}", said) else None
