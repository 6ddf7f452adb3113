"""The connection to Redis: short timeouts, one quick retry of a dropped connection, one error."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry

from worker.contract.errors import QueueUnavailable
from worker.contract.settings import ContractSettings

CONNECTION_WAIT_S = 5.0
"""A burst of requests waits so long for a connection; the client's plain pool would fail at once."""

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 2.0

END_EVERY_S = 0.1


def connect(settings: ContractSettings, *, again: bool) -> redis.Redis:
    """A client of the Redis of the settings; nothing is sent yet.

    again: a dropped connection is tried again at once; an operator's command rather says that Redis is away.
    """
    retry = _retry_once() if again else Retry(NoBackoff(), 0)
    return redis.Redis.from_url(str(settings.redis_url), retry=retry, **_link_options())


def connect_async(settings: ContractSettings, max_connections: int) -> redis.asyncio.Redis:
    """A client of the Redis of the settings with a pool of its own; nothing is sent yet."""
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        str(settings.redis_url),
        max_connections=max_connections,
        timeout=CONNECTION_WAIT_S,
        retry=_retry_once_async(),
        **_link_options(),
    )
    return redis.asyncio.Redis.from_pool(pool)


def _link_options() -> dict[str, Any]:
    """Options of both kinds of client."""
    return {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": ANSWER_TIMEOUT_S,
        "decode_responses": False,
        "socket_keepalive": True,  # a listener waits for ever on a host that vanished, otherwise
    }


def _retry_once() -> Retry:
    """A dropped connection is tried again at once; a silent Redis is not. All our scripts may run twice."""
    return Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))


def _retry_once_async() -> AsyncRetry:
    """As `_retry_once`, for asyncio."""
    return AsyncRetry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))


async def end(task: asyncio.Future[Any]) -> None:
    """Cancels a task and waits until it is over, whatever came of it."""
    while not task.done():  # once may not do: before Python 3.12 `wait_for`, with which redis-py sends, can swallow it
        task.cancel()
        await asyncio.wait([task], timeout=END_EVERY_S)
    if not task.cancelled():
        task.exception()  # else asyncio complains that nobody asked


@contextmanager
def reaching_redis() -> Iterator[None]:
    """Turns every error of the client into QueueUnavailable; its cause says which."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise QueueUnavailable from error
