"""One call of a vendor's client, and the job that it becomes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request

from app.dialects.body import checked, in_their_words
from app.idempotency import HEADER as IDEMPOTENCY_KEY
from app.idempotency import idempotency
from app.jobs import Jobs
from app.schemas import GenerationCreate
from worker.contract.errors import InvalidField
from worker.contract.job import JobView, Webhook
from worker.contract.queue import Idempotency

MOST_HEADER = 2048
"""Characters of warnings in a header: all headers of an answer must fit into a proxy's buffer, which is 4 KiB."""


@dataclass(frozen=True)
class Call:
    """What a vendor's client asks for, in our words and in its own."""

    dialect: str
    sent: Any  # the body as it was read, with what else decides on the job; JSON-ready
    asked: BaseModel
    create: dict[str, Any]  # fields of GenerationCreate; None: not said
    names: Mapping[str, str] = field(default_factory=dict)  # our field names to theirs, where they differ
    echo: dict[str, Any] = field(default_factory=dict)


async def accept(
    call: Call, jobs: Jobs, request: Request, *, hold_s: float | None = None, webhook: Webhook | None = None
) -> JobView:
    """The accepted job. With `hold_s`: WaitTooLong if it would start later than that, and late after that time.

    request: the same `Idempotency-Key` with the same body asks for nothing new.
    All that Jobs.accept raises; a wrong field under the name that the client knows.
    """
    fields = {name: value for name, value in call.create.items() if value is not None}
    if hold_s is not None and not comes_back(request):
        fields.setdefault("deadline_s", math.ceil(hold_s))  # should this gateway die, nobody waits any longer
    try:
        create = checked(GenerationCreate, fields)
        return await jobs.accept(
            create,
            dialect=call.dialect,
            echo=call.echo,
            webhook=webhook,
            idempotency=_once(call, jobs, request),
            hold_s=hold_s,
        )
    except InvalidField as error:
        raise in_their_words(error, call.names, call.asked) from error


def warnings_header(view: JobView) -> dict[str, str]:
    """The first warnings of a job as a JSON list, for answers that have no other place for them."""
    warnings = list(view.warnings)
    while len(said := json.dumps(warnings)) > MOST_HEADER:
        del warnings[-1]
    return {"x-warnings": said} if warnings else {}


def comes_back(request: Request) -> bool:
    """Whether a client can ask for the same job again, by its key: the job goes on when it stops waiting."""
    return IDEMPOTENCY_KEY in request.headers


def _once(call: Call, jobs: Jobs, request: Request) -> Idempotency | None:
    """What the key stands for: what was sent, not what it came to, which changes with the models that are held."""
    key = request.headers.get(IDEMPOTENCY_KEY)
    if key is None:
        return None
    return idempotency(key, owner=jobs.caller.id, route=f"POST {request.url.path}", request=call.sent)
