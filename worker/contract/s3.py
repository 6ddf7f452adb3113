"""Pictures in a bucket of S3, or of a server that speaks as S3 does."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store as Bucket
from pydantic import SecretStr

from worker.contract.errors import StoreUnavailable
from worker.contract.job import MEDIA_TYPES
from worker.contract.settings import ContractSettings
from worker.contract.store import OURS, check_key

CONNECT_S, ANSWER_S, DOWNLOAD_S, UPLOAD_S = 2.0, 4.0, 30.0, 30.0
"""For a connection; between two signs of life; for a picture down; for one up, during which there is no such sign."""

RETRIES, RETRY_WITHIN_S = 1, 3.0
LONGEST_LINK_S = 7 * 86_400
"""Nobody signs urls for longer."""

PAGE = 1000
"""Keys in one answer, and in one deletion, at most."""

KINDS: Mapping[str, str] = {format: kind for format, kind in MEDIA_TYPES.items()}  # noqa: C416
NOWHERE = "gen_"
"""A folder that no key of ours is in."""


class S3Store:
    """A PictureStore in a bucket, of which it touches only the keys under its prefix that are pictures of ours.

    Keys are signed with, in that order: those of the settings; what AWS's chain finds (variables, web identity,
    container, instance).
    """

    def __init__(self, settings: ContractSettings) -> None:
        assert settings.s3_bucket is not None, "there is a bucket"
        self._prefix = f"{settings.s3_prefix}/" if settings.s3_prefix else ""
        self._sweeps = settings.s3_sweep
        endpoint = _text(settings.s3_endpoint)
        self._bucket = _bucket(settings, endpoint, timeout_s=DOWNLOAD_S, answer_s=ANSWER_S)
        self._uploads = _bucket(settings, endpoint, timeout_s=UPLOAD_S, answer_s=UPLOAD_S)
        public = _text(settings.s3_public_endpoint) or endpoint
        self._signer = _bucket(settings, public, ANSWER_S, ANSWER_S) if settings.s3_presign else None
        self.origin = _origin(settings, public) if settings.s3_presign else None

    def put(self, key: str, data: bytes) -> None:
        """One request, with the type and the name that browsers show."""
        job, n, kind = _named(check_key(key))
        attributes = {"Content-Type": KINDS.get(kind, "application/octet-stream")}
        if kind in KINDS:
            attributes["Content-Disposition"] = f'inline; filename="{job}-{n}.{kind}"'
        with _reaching_bucket():
            obstore.put(self._uploads, self._prefix + key, memoryview(data), attributes=attributes, use_multipart=False)

    def get(self, key: str) -> bytes | None:
        """The bytes of the object, or None."""
        with _reaching_bucket():
            try:
                return bytes(obstore.get(self._bucket, self._prefix + check_key(key)).bytes())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def link(self, key: str, expires_s: float) -> str | None:
        """A presigned url of the object, if the settings ask for such; it is looked for first."""
        if self._signer is None:
            return None
        path, expires = self._prefix + check_key(key), timedelta(seconds=min(max(1, int(expires_s)), LONGEST_LINK_S))
        with _reaching_bucket():
            try:
                obstore.head(self._bucket, path)
            except FileNotFoundError:  # or there is no such bucket: that says whoever asks for the bytes
                return None
            return obstore.sign(self._signer, "GET", path, expires)

    def delete_prefix(self, prefix: str) -> None:
        """Deletes the objects under the segments, a page at a time."""
        folder = self._prefix + check_key(prefix.removesuffix("/"))
        with _reaching_bucket():
            for page in self._pages(folder):
                self._delete(found["path"] for found in page)

    def sweep(self, older_than_s: float) -> int:
        """Deletes pictures last written longer ago than that, by the server's clock, and nothing else of the bucket.

        Nothing at all where a lifecycle rule does it.
        """
        if not self._sweeps:
            return 0
        limit, swept = time.time() - older_than_s, 0
        with _reaching_bucket():
            for page in self._pages(self._prefix.removesuffix("/") or None):
                old = [found["path"] for found in page if self._is_ours(found) and _time(found) < limit]
                self._delete(old)
                swept += len(old)
        return swept

    def check(self) -> None:
        """Lists a folder in which there is nothing: the bucket exists, and our key is good for it.

        Whether we may write shows when we do: a gateway, which only reads and deletes, needs no such right.
        """
        with _reaching_bucket():
            obstore.list_with_delimiter(self._bucket, self._prefix + NOWHERE)

    def _pages(self, folder: str | None) -> Iterable[Any]:
        return obstore.list(self._bucket, folder, chunk_size=PAGE)

    def _delete(self, paths: Iterable[str]) -> None:
        if keys := list(paths):
            obstore.delete(self._bucket, keys)

    def _is_ours(self, found: Any) -> bool:
        return OURS.fullmatch(found["path"].removeprefix(self._prefix)) is not None


def _bucket(settings: ContractSettings, endpoint: str | None, timeout_s: float, answer_s: float) -> Bucket:
    """A client of the bucket: its connections, and how long each may take."""
    assert settings.s3_bucket is not None, "there is a bucket"
    host_style = not (endpoint is not None if settings.s3_path_style is None else settings.s3_path_style)
    given: dict[str, Any] = {"virtual_hosted_style_request": host_style}
    if endpoint:
        scheme, host = urlsplit(endpoint)[:2]
        given["endpoint"] = f"{scheme}://{settings.s3_bucket}.{host}" if host_style else endpoint
    if settings.s3_region:
        given["region"] = settings.s3_region
    if settings.s3_access_key_id and settings.s3_secret_access_key:
        credential = {
            "access_key_id": settings.s3_access_key_id,
            "secret_access_key": settings.s3_secret_access_key.get_secret_value(),
            "token": None,  # not the one of the environment, which belongs to another key
            "expires_at": None,
        }
        given["credential_provider"] = lambda: credential
    return Bucket(
        settings.s3_bucket,
        client_options={
            "allow_http": (endpoint or "").startswith("http://"),
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "read_timeout": timedelta(seconds=answer_s),
            "timeout": timedelta(seconds=timeout_s),
        },
        retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_WITHIN_S)},
        **given,
    )


def _origin(settings: ContractSettings, endpoint: str | None) -> str:
    """Where signed urls lead: asked of one that a key signed which nobody has, so that nothing is sent for it."""
    nobody: Any = {"s3_access_key_id": "nobody", "s3_secret_access_key": SecretStr("nothing")}
    bucket = _bucket(settings.model_copy(update=nobody), endpoint, ANSWER_S, ANSWER_S)
    url = urlsplit(obstore.sign(bucket, "GET", "picture", timedelta(seconds=1)))
    return f"{url.scheme}://{url.netloc}"


def _text(url: object) -> str | None:
    return None if url is None else str(url).rstrip("/")


def _named(key: str) -> tuple[str, str, str]:
    """Of a picture's key its job, its number, and its format."""
    n, _, kind = key.rpartition("/")[2].rpartition(".")
    return key.partition("/")[0], n, kind


def _time(found: Any) -> float:
    seconds: float = found["last_modified"].timestamp()
    return seconds


@contextmanager
def _reaching_bucket() -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError) as error:
        said, _, _ = str(error).partition("\n\nDebug source")
        said = re.sub(r"\?\S+", "", said)  # what a query holds may be a secret
        raise StoreUnavailable(_reason(said)) from ConnectionError(said)


def _reason(said: str) -> str:
    """What may be told to clients: no address, no key."""
    if code := re.search(r"<Code>(\w{1,64})</Code>", said) or re.search(r"status code: (\d{3})", said):
        return f"it answered {code[1]}"
    return "no answer"
