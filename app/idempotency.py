"""Idempotency keys: the same request sent again makes no second job."""

from __future__ import annotations

import hashlib
import json
import re

from app.errors import Shown
from worker.contract.errors import InvalidField
from worker.contract.queue import Idempotency

HEADER = "Idempotency-Key"
KEY = re.compile(r"[\x21-\x7e]{1,255}")


def idempotency(key: str, *, owner: str, route: str, request: object) -> Idempotency:
    """What a key stands for, for this owner and route. InvalidField.

    request: what was asked, as JSON-ready data: all that the answer depends on, and nothing that we may change.
    """
    key = key.strip()
    if not KEY.fullmatch(key):
        raise InvalidField(HEADER, Shown(key), "1 to 255 visible ASCII characters")
    canonical = json.dumps(request, sort_keys=True, separators=(",", ":"))
    return Idempotency(scope=f"{owner} {route}", key=key, fingerprint=hashlib.sha256(canonical.encode()).hexdigest())
