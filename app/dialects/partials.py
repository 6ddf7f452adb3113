"""Pictures in the making: which previews of a running job a client sees that asks for so many."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from app.deps import Gateway
from app.errors import ShuttingDown
from worker.contract.events import Event
from worker.contract.job import JobView
from worker.contract.link import end

WATCH_EVERY_S = 5.0
"""A watch lasts three times as long."""

SIZE_MARKERS = frozenset({0xC0, 0xC1, 0xC2})


async def partial_pictures(view: JobView, gateway: Gateway, most: int) -> AsyncGenerator[bytes, None]:
    """Previews of the job's first picture as JPEG, at most so many, spread evenly over its steps; ends with the job.

    Where steps are faster than previews, fewer come. ShuttingDown, QueueUnavailable.
    """
    job_id, steps, seen_step, watched_at = view.job.id, view.job.steps, 0, float("-inf")
    due = [steps * (n + 1) / (most + 1) for n in range(most)]
    async with aclosing(_until_drained(job_id, gateway)) as events:
        async for event in events:
            if due and time.monotonic() - watched_at > WATCH_EVERY_S:
                await gateway.queue.watch(job_id)
                watched_at = time.monotonic()
            if event.name != "preview" or not due or (step := int(event.data["step"])) < due[0] or step <= seen_step:
                continue
            if picture := await gateway.queue.preview(job_id):
                seen_step, due = step, [later for later in due if later > step]
                yield picture


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height of a baseline or progressive JPEG in pixels. ValueError."""
    at = 2
    while at + 9 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker in SIZE_MARKERS:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        at += 2 + length
    raise ValueError("no size in this JPEG")


async def _until_drained(job_id: str, gateway: Gateway) -> AsyncGenerator[Event, None]:
    """The events of a job from the first on, until it has ended. ShuttingDown when the gateway drains."""
    source = gateway.queue.events(job_id)
    draining = asyncio.ensure_future(gateway.draining.wait())
    try:
        async with aclosing(source):
            while True:
                upcoming = asyncio.ensure_future(anext(source, None))
                try:
                    await asyncio.wait({upcoming, draining}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await end(upcoming)
                if upcoming.cancelled():
                    raise ShuttingDown
                if (event := upcoming.result()) is None:
                    return
                yield event
    finally:
        await end(draining)
