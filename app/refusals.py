"""How errors become answers: the one table that decides the HTTP status, and the shape of the path that was asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import Scope

from app import errors
from app.errors import BrokenJson, shortened
from worker.contract import errors as contract
from worker.contract.errors import DarkroomError


@dataclass(frozen=True)
class Refusal:
    """What is said to a client whose request is refused, before it has a shape."""

    status: int
    code: str  # stable, for programs
    message: str  # one sentence for people
    field: str | None = None  # the field at fault, if it is one
    request_id: str = ""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)  # retry-after, www-authenticate and the like


ErrorShape = Callable[[Refusal], Response]
"""How a dialect words a refusal: its body, its status, its headers (the refusal's own among them)."""


STATUS: dict[type[DarkroomError], int] = {
    DarkroomError: 500,
    errors.BrokenJson: 400,
    errors.BrokenForm: 400,
    errors.NotServed: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.BadSignature: 403,
    errors.ForeignPage: 403,
    contract.UnknownModel: 404,
    contract.UnknownGeneration: 404,
    errors.NotFinished: 404,
    errors.NoPicture: 404,
    errors.BodyTooSlow: 408,
    errors.GenerationCanceled: 409,
    contract.PicturesExpired: 410,
    errors.LinkExpired: 410,
    errors.PictureLost: 410,
    errors.BodyTooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.EncodedBody: 415,
    contract.IdempotencyKeyReused: 422,
    contract.InvalidField: 422,
    errors.NothingMade: 424,
    contract.QueueFull: 429,
    contract.TooManyJobs: 429,
    errors.RateLimited: 429,
    errors.WaitTooLong: 429,
    errors.ClientGone: 499,
    contract.CannotStart: 500,
    errors.GenerationFailed: 502,
    contract.ModelDraining: 503,
    contract.QueueUnavailable: 503,
    contract.StoreUnavailable: 503,
    contract.SchemaUnknown: 503,
    errors.ShuttingDown: 503,
    errors.TooManyLargeBodies: 503,
    errors.NotInTime: 504,
    errors.StillMaking: 504,
}

HTTP_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}
"""Codes of what the framework itself refuses."""


def status_of(error: DarkroomError) -> int:
    """The HTTP status of an error: its own, or its nearest ancestor's."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def refusal(error: DarkroomError, scope: Scope) -> Response:
    """The response of an error."""
    status = status_of(error)
    if status >= 500 and error.__cause__:
        note_cause(error, scope)
    if status == 500:
        return internal_error(scope)
    headers: dict[str, str] = dict(getattr(error, "headers", {}))
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["retry-after"] = str(retry_after_s)
    return error_response(scope, status, error.code, str(error), error.field, headers)


def note_cause(error: DarkroomError, scope: Scope) -> None:
    """Leaves for the log what clients are not told: folders and hosts."""
    scope.setdefault("state", {})["cause"] = cause_of(error)


def cause_of(error: DarkroomError) -> str:
    """What lies behind an error, in words."""
    return str(error.__cause__) or type(error.__cause__).__name__


def internal_error(scope: Scope) -> Response:
    """The response of a failure that is ours: no detail, but the id that our log knows it by."""
    message = "something failed on our side; our log knows it by the request id"
    return error_response(scope, 500, "internal_error", message)


def error_response(
    scope: Scope, status: int, code: str, message: str, field: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """A refusal in the shape of its path; leaves the code in the request's state, for the log and the metrics."""
    state: dict[str, Any] = scope.setdefault("state", {})
    state["error_code"] = code
    said = Refusal(status, code, message, field, state.get("request_id", ""), headers or {})
    return _shape_of(scope)(said)


BASES = "/openai/v1, /v1/images, /v1/openai, /v1/inference, /huggingface, /v2beta, /v1/predictions, /v1/deployments"


def native(said: Refusal) -> Response:
    """Our own shape."""
    error = {"code": said.code, "message": said.message, "field": said.field, "request_id": said.request_id}
    return JSONResponse({"error": error}, said.status, said.headers)


def _shape_of(scope: Scope) -> ErrorShape:
    """The shape of the longest prefix of the path that has one; in a prefix, `*` stands for any one segment."""
    shapes: dict[str, ErrorShape] = scope["app"].state.shapes
    path = scope["path"].split("/")
    ours = [prefix for prefix in shapes if _begins(path, prefix.split("/"))]
    return shapes[max(ours, key=len)]


def _begins(path: list[str], prefix: list[str]) -> bool:
    """Whether the segments of a path begin with those of a prefix; "" is the prefix of all."""
    if prefix == [""]:
        return True
    return len(path) >= len(prefix) and all(want in ("*", found) for want, found in zip(prefix, path, strict=False))


async def on_darkroom_error(request: Request, error: Exception) -> Response:
    """Renders the errors of our own tree."""
    assert isinstance(error, DarkroomError)
    return refusal(error, request.scope)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Renders what the framework refuses: unknown paths, wrong methods, unreadable bodies."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    path = shortened(request.url.path)
    match error.status_code:
        case 400:
            return refusal(BrokenJson(_unreadable(error.__cause__)), request.scope)
        case 404:
            message = f"nothing at {path}; served: what /openapi.json lists, and vendors' paths below {BASES}"
        case 405:
            headers["Allow"] = ", ".join(_methods(request))
            message = f"{request.method} is not allowed at {path}; allowed: {headers['Allow']}"
        case _:
            message = str(error.detail)
    code = HTTP_CODES.get(error.status_code, "http_error")
    return error_response(request.scope, error.status_code, code, message, headers=headers)


def _methods(request: Request) -> list[str]:
    """The methods of all routes at the path; the framework tells those of the first one alone."""
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


def _unreadable(cause: BaseException | None) -> str:
    match cause:
        case UnicodeDecodeError():
            return f"not UTF-8 at byte {cause.start}"
        case RecursionError():
            return "nested too deeply"
        case _:
            return "a number in it is too long"
