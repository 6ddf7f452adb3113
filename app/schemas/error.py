"""The one shape of every refusal."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from app import examples


class Error(BaseModel):
    """Why a request was refused."""

    code: str = Field(description="Stable, for programs.")
    message: str = Field(description="One sentence for people: the field, its value, and what is allowed.")
    field: str | None = Field(description="The field at fault, if it is one.")
    request_id: str = Field(description="The answer's `X-Request-ID`; our log knows the request by it.")


class ErrorBody(BaseModel):
    """The one shape of every refusal."""

    error: Error


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI responses of a route that may refuse with these statuses."""
    responses: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        description, code, message, field = examples.REFUSALS[status]
        example = {"error": {"code": code, "message": message, "field": field, "request_id": "req_5f1c0a9e4b7d2836"}}
        content = {"application/json": {"example": example}}
        responses[status] = {"model": ErrorBody, "description": description, "content": content}
    return responses


ANY_REFUSAL: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "Any other refusal, in the same shape."}
}
