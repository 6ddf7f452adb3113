"""What the owner of a job is told of an error."""

from __future__ import annotations

import structlog
import torch

from model.work import NonFiniteLatents
from worker.contract.errors import StoreUnavailable
from worker.contract.job import Failure, Job

log = structlog.get_logger()


ALLOCATIONS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""How libraries say that there is no memory left, beside torch's own error."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether less at once might have fitted."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATIONS)


def explain(job: Job, error: Exception, advice: str = "try a smaller picture") -> Failure:
    """The failure of an error, in words that give nothing away; the log gets the rest.

    advice : what would have fitted into memory
    """
    if isinstance(error, NonFiniteLatents):
        return Failure(code="non_finite", message=str(error))
    if isinstance(error, StoreUnavailable):
        return Failure(code=error.code, message=str(error))
    if isinstance(error, torch.OutOfMemoryError):
        size = f"{job.params.width}x{job.params.height}"
        return Failure(code="out_of_memory", message=f"{size} does not fit this worker's GPU memory; {advice}")
    log.error("job failed", job=job.id, exc_info=error)
    return Failure(
        code="internal_error", message=f"the worker failed on this job; its log has the details under {job.id}"
    )
