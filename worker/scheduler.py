"""Which work next: first come, first served; whatever can share the batch of the first rides along."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar


class Pending(Protocol):
    """Something that waits for the GPU."""

    @property
    def key(self) -> Hashable:
        """Equal keys can share a batch."""
        ...

    @property
    def rows(self) -> int:
        """Rows of the batch that it takes."""
        ...


P = TypeVar("P", bound=Pending)


def pick(pending: Sequence[P], max_rows: int) -> list[P]:
    """The first of `pending` and, in order, all that share its key and still fit `max_rows`; the first always runs."""
    batch: list[P] = []
    rows = 0
    for one in pending:
        if batch and (one.key != batch[0].key or rows + one.rows > max_rows):
            continue
        batch.append(one)
        rows += one.rows
    return batch
