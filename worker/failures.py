"""What the owner of a job is told of an error."""

from __future__ import annotations

import structlog
import torch

from model.work import NonFiniteLatents
from worker.contract.job import Failure, Job
from worker.logs import about

log = structlog.get_logger()


ALLOCATIONS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""How libraries say that there is no memory left, beside torch's own error."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether less at once might have fitted."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATIONS)


def explain(job: Job, error: Exception, largest: tuple[int, int] = (0, 0)) -> Failure:
    """The failure of an error, in words that give nothing away; the log gets the rest.

    largest : width and height of the largest picture that did fit into memory so far
    """
    if isinstance(error, NonFiniteLatents):
        return Failure(code="non_finite", message=str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return Failure(code="out_of_memory", message=_too_large(job, *largest))
    log.error("job failed", **about(job), exc_info=error)
    return Failure(
        code="internal_error", message=f"the worker failed on this job; its log has the details under {job.id}"
    )


def _too_large(job: Job, width: int, height: int) -> str:
    asked = f"{job.params.width}x{job.params.height} does not fit this worker's GPU memory"
    if not width:
        return f"{asked}; try a smaller picture"
    if width * height >= job.params.width * job.params.height:
        return f"{asked} now; {width}x{height} did fit beside less other work: try again, or a smaller picture"
    return f"{asked}; the largest picture that did fit so far is {width}x{height}"
