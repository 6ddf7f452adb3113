"""Webhooks: what they are signed with."""

from __future__ import annotations

from fastapi import APIRouter

from app.deps import CallerDep, GatewayDep
from app.schemas import PROBLEM, WebhookSecret
from app.webhook_signature import signing_secret

router = APIRouter(tags=["webhooks"])


@router.get(
    "/v1/webhooks/default/secret",
    summary="What your webhooks are signed with",
    responses=dict.fromkeys((401, 429, 503, "default"), PROBLEM),
)
async def webhook_secret(gateway: GatewayDep, caller: CallerDep) -> WebhookSecret:
    """The secret of this API key (where there are none: of all), for any library for Standard Webhooks.

    Replicate's clients ask for theirs here too, so refusals are in that shape.
    """
    return WebhookSecret(key=signing_secret(await gateway.queue.secret(), caller.id))
