"""What checks webhooks."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class WebhookSecret(BaseModel):
    """What the webhooks of an API key are signed with."""

    key: str = Field(
        description="The secret: `whsec_` and base64.", examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
    )


PROBLEM: dict[str, Any] = {
    "description": "A refusal in Replicate's shape, whose path this is too.",
    "content": {
        "application/problem+json": {
            "schema": {
                "type": "object",
                "properties": {
                    "type": {"type": "string"},
                    "title": {"type": "string"},
                    "status": {"type": "integer"},
                    "detail": {"type": "string"},
                    "code": {"type": "string"},
                    "request_id": {"type": "string"},
                },
                "required": ["type", "title", "status", "detail", "code", "request_id"],
            }
        }
    },
}
"""A problem of RFC 7807, as an OpenAPI response."""
