"""What webhooks are to be told: put there by the transitions, taken out by whoever sends it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import redis.asyncio
from redis.commands.core import AsyncScript

from worker.contract.job import WebhookEvent
from worker.contract.link import connect_async, reaching_redis
from worker.contract.settings import ContractSettings
from worker.contract.transitions import script

OUTBOX = "darkroom:outbox"

KEPT = 20
"""Deliveries that a job's log keeps."""

MAX_CONNECTIONS = 16


@dataclass(frozen=True)
class Entry:
    """One message to a job's webhook, given to one sender for one attempt."""

    id: str  # of the message, the same in every attempt
    job_id: str
    event: WebhookEvent
    attempt: int  # from 1
    at: float  # Unix seconds of the event


class Outbox:
    """The messages that wait to be sent. Every method raises QueueUnavailable when Redis is away.

    At least once: a message whose sender dies, or says nothing until its lease is over, is given to another.
    """

    def __init__(self, redis: redis.asyncio.Redis) -> None:
        self._redis = redis
        self._scripts: dict[str, AsyncScript] = {name: redis.register_script(script(name)) for name in ("send", "sent")}

    @classmethod
    def connect(cls, settings: ContractSettings) -> Self:
        """On the Redis of the settings; nothing is sent yet."""
        return cls(connect_async(settings, MAX_CONNECTIONS))

    async def close(self) -> None:
        """Closes all connections."""
        await self._redis.aclose()

    async def due(self, worker: str, most: int, lease_s: float) -> list[Entry]:
        """At most so many messages that are to be sent now, the longest due first, for `worker` alone for `lease_s`."""
        flat = await self._run("send", worker, most, lease_s)
        return [_entry(*row) for row in zip(*[iter(flat)] * 3, strict=True)]

    async def done(self, entry: Entry, delivery: dict[str, Any]) -> None:
        """It arrived. `delivery` is appended to the job's log."""
        await self._settle(entry, "done", delivery)

    async def retry(self, entry: Entry, delivery: dict[str, Any], delay_s: float) -> None:
        """It did not arrive; it is due again in `delay_s` seconds."""
        await self._settle(entry, "retry", delivery, delay_s)

    async def dead(self, entry: Entry, delivery: dict[str, Any]) -> None:
        """It did not arrive, and is given up."""
        await self._settle(entry, "dead", delivery)

    async def leave(self, entry: Entry, delay_s: float) -> None:
        """Nothing was sent, for another sender may do better: it is due again in `delay_s` seconds, as this attempt."""
        await self._settle(entry, "left", {}, delay_s)

    async def waiting(self) -> int:
        """How many messages are not delivered yet."""
        with reaching_redis():
            return int(await cast(Any, self._redis.zcard(OUTBOX)))

    async def overdue_s(self) -> float:
        """How long the most overdue message has waited for a sender, in seconds; 0: none is overdue."""
        with reaching_redis():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.time()
                pipe.zrange(OUTBOX, 0, 0, withscores=True)
                (seconds, micros), first = await pipe.execute()
        now = float(seconds) + float(micros) / 1e6
        return max(0.0, now - float(first[0][1])) if first else 0.0

    async def _settle(
        self,
        entry: Entry,
        outcome: Literal["done", "retry", "dead", "left"],
        delivery: dict[str, Any],
        delay_s: float = 0.0,
    ) -> None:
        name, at = f"{entry.job_id}:{entry.event}", f"{entry.at:.6f}"
        line = json.dumps(delivery, separators=(",", ":"))
        await self._run("sent", name, at, entry.attempt, outcome, line, delay_s, KEPT)

    async def _run(self, transition: str, *args: str | float) -> Any:
        with reaching_redis():
            return await cast(Any, self._scripts[transition](args=args))


def _entry(name: bytes, attempt: int, at: bytes) -> Entry:
    job_id, event = name.decode().rsplit(":", 1)
    moment = at.decode()
    return Entry(
        id=f"{job_id}:{event}:{moment.replace('.', '')}",
        job_id=job_id,
        event=cast(WebhookEvent, event),
        attempt=int(attempt),
        at=float(moment),
    )
