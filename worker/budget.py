"""How much one batch may hold: rows and tokens, and what was learnt from running out of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Final

from worker.forecast import Kind
from worker.scheduler import Room

TOKENS: Final[dict[str, int]] = {"cuda": 9_000, "cpu": 1_600}
"""Joint tokens of a denoising batch from which on a device is busy: more rows only make each step longer.

An H100 is busy with two rows of 1024x1024 (8,858 tokens); two CPU cores with two of 320x320 and 256 text tokens.
"""

SPARE = 4
"""Jobs that are worth holding beyond those that fill a batch: a short one among them overtakes the long ones."""

RECOVERY = 200
"""Full batches that have to run before a size that ran out of memory grows by one row again."""


@dataclass
class Cap:
    """The most rows of one kind of work that fit, as far as we know."""

    rows: int
    ran: int = 0  # full batches since


class Budget:
    """What batches may hold, by kind of work.

    A size that ran out of memory is halved, and recovers slowly: memory also runs out because it is in pieces, or
    because another model was loading, and neither lasts.
    """

    def __init__(self, max_rows: int, tokens: Mapping[str, int]) -> None:
        self.max_rows, self.tokens = max_rows, tokens  # tokens by model
        self._caps: dict[Kind, Cap] = {}
        self._usual: dict[str, float] = {}  # tokens of one step of a job, by model

    def room(self, kind: Kind) -> Room:
        """What a batch of this kind may hold."""
        cap = self.fits(kind)
        return Room(min(self.max_rows, cap or self.max_rows), self.tokens[kind.model])

    def wanted(self, model: str, held: Sequence[int]) -> int:
        """How many more jobs of a model are worth holding; below 0 if there are too many.

        As many as fill one batch, if they are as large as those held on average, or held last; and SPARE more. The
        spare ones are asked for one at a time, so that workers with less to do have their chance.

        held : tokens of one step of each job that is held
        """
        if held:
            self._usual[model] = mean(held)
        fill = max(1, int(self.tokens[model] / self._usual.get(model, self.tokens[model])))
        return fill - len(held) if len(held) < fill else min(1, fill + SPARE - len(held))

    def fits(self, kind: Kind) -> int | None:
        """Rows that fit into memory at once; None where nothing ever failed."""
        cap = self._caps.get(kind)
        return cap.rows if cap else None

    def failed(self, kind: Kind, rows: int) -> None:
        """So many rows at once did not fit."""
        self._caps[kind] = Cap(max(1, rows // 2))

    def ran(self, kind: Kind, rows: int) -> None:
        """A batch fitted."""
        cap = self._caps.get(kind)
        if cap and rows >= cap.rows - 1:  # full: a guided picture has two rows
            cap.ran += 1
            if cap.ran >= RECOVERY:
                self._caps[kind] = Cap(cap.rows + 1)
