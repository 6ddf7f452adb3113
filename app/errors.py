"""Every refusal in one shape, and the one table that decides its HTTP status.

DarkroomError (worker/contract/errors.py)
├── ... those of the contract
├── BrokenJson              a body that is not JSON
├── UnsupportedMediaType    a body that does not say it is JSON
├── BodyTooLarge            a body over the limit
├── BodyTooSlow             a body that did not arrive in time
├── NotFinished             pictures asked for before their job ended
└── NoPicture               a picture that does not exist
"""

from __future__ import annotations

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Scope

from worker.contract import errors as contract
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


class BrokenJson(DarkroomError):
    """The body is not JSON."""

    code = "invalid_json"

    def __init__(self, reason: str) -> None:
        super().__init__(f"the body is not valid JSON: {reason}")


class UnsupportedMediaType(DarkroomError):
    """The body is not declared as JSON."""

    code = "unsupported_media_type"

    def __init__(self, found: str | None) -> None:
        said = f"content-type is {Shown(found)!r}" if found else "the request has no content-type"
        super().__init__(f"{said}; allowed: application/json")


class BodyTooLarge(DarkroomError):
    """The body is over the limit."""

    code = "body_too_large"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the body is larger than the {max_bytes} bytes allowed")


class BodyTooSlow(DarkroomError):
    """The body did not arrive in time."""

    code = "body_too_slow"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the body did not arrive within {timeout_s:g} s")


class NotFinished(DarkroomError):
    """The pictures of a job that has not ended."""

    code = "not_finished"

    def __init__(self, job_id: str, status: str) -> None:
        super().__init__(f"generation '{job_id}' is {status}; its pictures exist once it has succeeded")


class NoPicture(DarkroomError):
    """A picture that does not exist."""

    code = "no_picture"


STATUS: dict[type[DarkroomError], int] = {
    DarkroomError: 500,
    BrokenJson: 400,
    contract.UnknownModel: 404,
    contract.UnknownGeneration: 404,
    NotFinished: 404,
    NoPicture: 404,
    BodyTooSlow: 408,
    contract.PicturesExpired: 410,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    contract.InvalidField: 422,
    contract.QueueFull: 429,
    contract.ModelDraining: 503,
    contract.QueueUnavailable: 503,
    contract.StoreUnavailable: 503,
    contract.SchemaUnknown: 503,
}

HTTP_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}
"""Codes of what the framework itself refuses."""


def status_of(error: DarkroomError) -> int:
    """The HTTP status of an error: its own, or its nearest ancestor's."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def shortened(text: str, limit: int = MAX_SHOWN) -> str:
    """The text, cut in the middle if long, without characters that UTF-8 cannot carry."""
    if len(text) > limit:
        text = f"{text[: limit - 20]}...{text[-12:]}"
    return text.encode("utf-8", "replace").decode("utf-8")


def refusal(error: DarkroomError, scope: Scope) -> JSONResponse:
    """The response of an error."""
    status = status_of(error)
    if status >= 500 and error.__cause__:
        note_cause(error, scope)
    if status == 500:
        return internal_error(scope)
    retry_after_s = getattr(error, "retry_after_s", None)
    headers = {} if retry_after_s is None else {"retry-after": str(retry_after_s)}
    return error_response(scope, status, error.code, str(error), error.field, headers)


def note_cause(error: DarkroomError, scope: Scope) -> None:
    """Leaves for the log what clients are not told: folders and hosts."""
    scope.setdefault("state", {})["cause"] = str(error.__cause__) or type(error.__cause__).__name__


def internal_error(scope: Scope) -> JSONResponse:
    """The response of a failure that is ours: no detail, but the id that our log knows it by."""
    message = "something failed on our side; our log knows it by the request id"
    return error_response(scope, 500, "internal_error", message)


def error_response(
    scope: Scope, status: int, code: str, message: str, field: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """The one error shape; leaves the code in the request's state, for the log and the metrics."""
    state: dict[str, Any] = scope.setdefault("state", {})
    state["error_code"] = code
    error = {"code": code, "message": message, "field": field, "request_id": state.get("request_id", "")}
    return JSONResponse({"error": error}, status, headers)


async def on_darkroom_error(request: Request, error: Exception) -> JSONResponse:
    """Renders the errors of our own tree."""
    assert isinstance(error, DarkroomError)
    return refusal(error, request.scope)


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Renders what the framework refuses: unknown paths, wrong methods, unreadable bodies."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    path = shortened(request.url.path)
    match error.status_code:
        case 400:
            return refusal(BrokenJson(_unreadable(error.__cause__)), request.scope)
        case 404:
            message = f"nothing at {path}; the paths served are listed in /openapi.json"
        case 405:
            message = f"{request.method} is not allowed at {path}; allowed: {headers.get('Allow', '')}"
        case _:
            message = str(error.detail)
    code = HTTP_CODES.get(error.status_code, "http_error")
    return error_response(request.scope, error.status_code, code, message, headers=headers)


def _unreadable(cause: BaseException | None) -> str:
    match cause:
        case UnicodeDecodeError():
            return f"not UTF-8 at byte {cause.start}"
        case RecursionError():
            return "nested too deeply"
        case _:
            return "a number in it is too long"
