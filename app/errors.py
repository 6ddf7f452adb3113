"""Why the gateway refuses, beside what the contract refuses.

DarkroomError (worker/contract/errors.py)
├── ... those of the contract
├── BrokenJson              a body that is not JSON
├── BrokenForm              a body that is not the form it says it is
├── UnsupportedMediaType    a body that does not say it is what the route takes
├── EncodedBody             a body that is compressed
├── BodyTooLarge            a body over the limit
├── BodyTooSlow             a body that did not arrive in time
├── TooManyLargeBodies      a large body, while as many as fit are being read
├── Unauthorized            no API key, or one that is not valid (any more)
├── Forbidden               an API key that may not do this
├── ForeignPage             a web page of somebody else's, where API keys are off
├── RateLimited             more requests than an API key may make
├── BadSignature            a signed url that we did not sign
├── LinkExpired             a signed url that is too old
├── WaitTooLong             a job that would start too late for who waits for it
├── NotFinished             pictures asked for before their job ended
├── NoPicture               a picture that does not exist
├── PictureLost             a picture that should still be in the store
├── ClientGone              nobody waits for the answer any more
├── NotServed               a vendor's call that Darkroom does not answer
├── GenerationFailed        a held answer's job failed
├── GenerationCanceled      a held answer's job was canceled by somebody else
├── NotInTime               a held answer's time was up before its job was done
├── NothingMade             any of the last three, to a client that would ask again
├── StillMaking             time is up, but the job goes on for who has a key to come back with
└── ShuttingDown            a held answer's gateway closes before the job is done
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime

from worker.contract.errors import DarkroomError

MAX_SHOWN = 80
"""Characters of a client's value that an error message repeats."""


class Shown:
    """A client's value as an error message shows it: JSON, shortened, always encodable."""

    def __init__(self, value: object) -> None:
        try:
            text = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            text = type(value).__name__
        self._text = shortened(text)

    def __repr__(self) -> str:
        return self._text


class Words(str):
    """Stands in a refusal for a value that is missing or too large to be shown: words, without quotes."""

    def __repr__(self) -> str:
        return str(self)


class BrokenJson(DarkroomError):
    """The body is not JSON."""

    code = "invalid_json"

    def __init__(self, reason: str) -> None:
        super().__init__(f"the body is not valid JSON: {reason}")


class BrokenForm(DarkroomError):
    """The body is not the form it says it is."""

    code = "invalid_form"

    def __init__(self, reason: str) -> None:
        super().__init__(f"the body is not a valid form: {reason}")


class UnsupportedMediaType(DarkroomError):
    """The body is not declared as what the route takes."""

    code = "unsupported_media_type"

    def __init__(self, found: str | None, allowed: str = "application/json") -> None:
        said = f"content-type is {Shown(found)!r}" if found else "the request has no content-type"
        super().__init__(f"{said}; allowed: {allowed}")


class EncodedBody(DarkroomError):
    """The body is compressed."""

    code = "unsupported_media_type"

    def __init__(self, encoding: str) -> None:
        super().__init__(f"content-encoding is {Shown(encoding)!r}; allowed: none; send the body as it is")


class BodyTooLarge(DarkroomError):
    """The body is over the limit."""

    code = "body_too_large"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the body is larger than the {max_bytes} bytes allowed; pictures as input are not served")


class BodyTooSlow(DarkroomError):
    """The body did not arrive in time."""

    code = "body_too_slow"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the body did not arrive within {timeout_s:g} s")


class TooManyLargeBodies(DarkroomError):
    """A large body came while as many as may be in memory were there."""

    code = "busy"
    retry_after_s = 1

    def __init__(self, most: int) -> None:
        super().__init__(f"{most} large bodies are being read, as many as may be at once; send it again")


class Unauthorized(DarkroomError):
    """No API key, or one that is not valid (any more)."""

    code = "unauthorized"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers = {"www-authenticate": 'Bearer realm="darkroom"'}


class Forbidden(DarkroomError):
    """An API key that may not do this."""

    code = "forbidden"

    def __init__(self, needed: str, held: Iterable[str]) -> None:
        super().__init__(f"this needs the scope {needed}; the API key has {', '.join(sorted(held)) or 'none'}")


class ForeignPage(DarkroomError):
    """A web page of somebody else's calls, and no API key is asked for."""

    code = "foreign_page"

    def __init__(self, header: str, value: str) -> None:
        mend = "DARKROOM_CORS_ORIGINS lets pages of other origins call"
        if header == "host":
            mend = "use localhost or an address; or name this server in DARKROOM_PUBLIC_URL, or switch API keys on"
        super().__init__(f"{header} is {Shown(value)!r}, which is not this server's; {mend}")


class RateLimited(DarkroomError):
    """More requests than an API key may make."""

    code = "rate_limited"

    def __init__(self, limit: str, retry_after_s: int) -> None:
        super().__init__(f"more than {limit} requests; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class BadSignature(DarkroomError):
    """A signed url that we did not sign."""

    code = "bad_signature"

    def __init__(self) -> None:
        super().__init__("the url's signature is not ours, or its path or `expires` was changed; ask for a fresh url")


class LinkExpired(DarkroomError):
    """A signed url that is too old."""

    code = "expired"

    def __init__(self, expires: int) -> None:
        super().__init__(f"the url expired at {utc(expires)}, when its picture was deleted")


class WaitTooLong(DarkroomError):
    """A job that would start too late for who waits for it; it was not accepted."""

    code = "wait_too_long"

    def __init__(self, expected_s: float, hold_s: float) -> None:
        self.retry_after_s = max(1, math.ceil(expected_s - hold_s))
        super().__init__(
            f"a job would start in about {expected_s:.0f} s, and this call waits {hold_s:g} s at most; "
            f"try again in {self.retry_after_s} s"
        )


class ClientGone(DarkroomError):
    """Nobody waits for the answer any more."""

    code = "client_gone"

    def __init__(self) -> None:
        super().__init__("the client went away before the answer")


class NotFinished(DarkroomError):
    """The pictures of a job that has not ended."""

    code = "not_finished"

    def __init__(self, job_id: str, status: str) -> None:
        super().__init__(f"generation '{job_id}' is {status}; its pictures exist once it has succeeded")


class NoPicture(DarkroomError):
    """A picture that does not exist."""

    code = "no_picture"


class PictureLost(DarkroomError):
    """A picture that somebody else deleted before its time."""

    code = "picture_lost"

    def __init__(self, job_id: str, n: int, kept_until: str) -> None:
        super().__init__(
            f"picture {n} of generation '{job_id}' was to be kept until {kept_until}, but is no longer in the store: "
            "somebody deleted it there, or a lifecycle rule did"
        )


class NotServed(DarkroomError):
    """A vendor's call that Darkroom does not answer."""

    code = "not_served"

    def __init__(self, what: str, served: str) -> None:
        super().__init__(f"{shortened(what)} is not served here; served: {served}")


class GenerationFailed(DarkroomError):
    """The job of a held answer failed."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class GenerationCanceled(DarkroomError):
    """The job of a held answer was canceled by somebody else."""

    code = "canceled"

    def __init__(self) -> None:
        super().__init__("the generation was canceled before it was done")


class NotInTime(DarkroomError):
    """The time of a held answer was up before its job was done."""

    code = "timeout"

    def __init__(self, hold_s: float, why: str = "") -> None:
        because = f": {why}" if why else ""
        super().__init__(f"the pictures were not ready within {hold_s:g} s{because}; the generation was canceled")


class NothingMade(DarkroomError):
    """An accepted job came to nothing, told to a client that would have it made again after any 5xx."""

    def __init__(self, error: DarkroomError) -> None:
        super().__init__(str(error))
        self.code = error.code


class StillMaking(DarkroomError):
    """The time of a held answer was up; its job goes on, for its client has a key to come back with."""

    code = "timeout"
    retry_after_s = 1

    def __init__(self, hold_s: float) -> None:
        super().__init__(
            f"the pictures were not ready within {hold_s:g} s; the generation goes on: "
            "ask again with the same Idempotency-Key"
        )


class ShuttingDown(DarkroomError):
    """The gateway of a held answer closes before its job is done."""

    code = "shutting_down"
    retry_after_s = 1

    def __init__(self) -> None:
        super().__init__("this gateway is shutting down; try again in a moment")


def shortened(text: str, limit: int = MAX_SHOWN) -> str:
    """The text, cut in the middle if long, without characters that UTF-8 cannot carry."""
    if len(text) > limit:
        text = f"{text[: limit - 20]}...{text[-12:]}"
    return text.encode("utf-8", "replace").decode("utf-8")


def utc(unix_s: float) -> str:
    """Unix seconds as a time in words."""
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%dT%H:%M:%SZ}"
