"""How a receiver knows that a webhook is ours: the signature of Standard Webhooks, by a secret of its owner's own."""

from __future__ import annotations

import hmac
from base64 import b64decode, b64encode

SECRET_PREFIX = "whsec_"


def signing_secret(server_secret: bytes, owner: str) -> str:
    """The secret that an owner's webhooks are signed with: `whsec_` and 32 bytes in base64, for the owner's eyes only.

    owner: id of an API key; "" where keys are off
    """
    key = hmac.digest(server_secret, f"darkroom webhooks of {owner}".encode(), "sha256")
    return SECRET_PREFIX + b64encode(key).decode()


def signature_headers(secret: str, id: str, at: int, body: bytes) -> dict[str, str]:
    """The headers of one message. The same id each time that it is sent; `at` in Unix seconds, of this time."""
    key = b64decode(secret.removeprefix(SECRET_PREFIX))
    digest = hmac.digest(key, f"{id}.{at}.".encode() + body, "sha256")
    return {
        "webhook-id": id,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{b64encode(digest).decode()}",
    }
