"""`darkroom worker --announce`: makes models known where no worker has run yet. No weights are read, no GPU is needed.

A gateway accepts jobs for the models whose cards it knows. Where workers are started by the work that waits for them,
somebody else must publish the cards first.
"""

from __future__ import annotations

import sys

import structlog

from model.weights import CheckpointError
from worker.contract.errors import QueueUnavailable
from worker.intake import Intake
from worker.models import card_of
from worker.settings import WorkerSettings
from worker.status import CANNOT_START

log = structlog.get_logger()

TRY_AGAIN = 1


def announce(settings: WorkerSettings) -> int:
    """Publish the cards of all models asked for, or none; the exit status."""
    try:
        cards = [card_of(source, settings) for source in settings.models]
    except (CheckpointError, OSError) as error:
        sys.stderr.write(f"darkroom worker: {error}\n")
        return CANNOT_START
    intake = Intake.connect(settings, settings.worker_name)
    try:
        intake.publish(cards)
    except QueueUnavailable as error:
        sys.stderr.write(f"darkroom worker: Redis does not answer: {error.__cause__}\n")
        return TRY_AGAIN
    finally:
        intake.close()
    for card in cards:
        log.info("announced", model=card.name, revision=card.revision)
    return 0
