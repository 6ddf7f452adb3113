"""What was done for whom, by day and model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

USAGE_DAYS = 90
"""How long it is kept."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """One day of one owner and model. A job counts on the day that it ended."""

    day: str  # YYYY-MM-DD, UTC
    owner: str
    model: str
    jobs: int  # all that ended, however that was
    pictures: int  # of those that succeeded; so the next
    megapixel_steps: float
    gpu_seconds: float  # as the workers said at the jobs' ends


def read_usage(day: str, counters: Mapping[bytes, bytes]) -> Iterator[Usage]:
    """The rows of the hash that Redis keeps of a day, by owner and model."""
    rows: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, value in counters.items():
        owner, model, counter = json.loads(name)
        rows[owner, model][counter] = int(value)
    for (owner, model), row in sorted(rows.items()):
        yield Usage(
            day=day,
            owner=owner,
            model=model,
            jobs=row["jobs"],
            pictures=row["pictures"],
            megapixel_steps=row["pixel_steps"] / 1e6,
            gpu_seconds=row["gpu_ms"] / 1e3,
        )
