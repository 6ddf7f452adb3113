"""The errors that cross the contract.

DarkroomError
├── InvalidField            a value that is not allowed: field, value, allowed
├── UnknownModel            no worker ever published a card of that name
├── UnknownGeneration       no such job (any more)
├── PicturesExpired         the job is known, its pictures are gone
├── QueueFull               the model's queue is at its bound
├── ModelDraining           an operator lets the model's queue run empty
├── TooManyJobs             the owner has as many jobs as it may have at once
├── IdempotencyKeyReused    the key was used before, with another request
├── QueueUnavailable        Redis does not answer
├── StoreUnavailable        the picture store does not answer
├── SchemaUnknown           a payload written by a newer or older Darkroom
└── CannotStart             a process whose environment asks for what is not there
"""

from __future__ import annotations


class DarkroomError(Exception):
    """Base of all errors that a caller of the contract can meet."""

    code = "internal_error"
    field: str | None = None


class InvalidField(DarkroomError):
    """A field whose value is not allowed."""

    code = "invalid_field"

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} is {value!r}; allowed: {allowed}")
        self.field = field


class UnknownModel(DarkroomError):
    """A model that no worker has ever offered."""

    code = "unknown_model"
    field = "model"

    def __init__(self, model: str, known: list[str]) -> None:
        allowed = ", ".join(sorted(known)) or "none yet: no worker has started against this Redis"
        super().__init__(f"model is {model!r}; known models: {allowed}")


class UnknownGeneration(DarkroomError):
    """No job of that id: never accepted, or older than its record's lifetime."""

    code = "not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no generation {job_id!r}: it was never accepted here, or its record has expired")


class PicturesExpired(DarkroomError):
    """The pictures of a finished job are past their lifetime."""

    code = "expired"

    def __init__(self, job_id: str, when: str, why: str) -> None:
        super().__init__(f"the pictures of generation {job_id!r} expired at {when} and were deleted: {why}")


class QueueFull(DarkroomError):
    """The queue of this model and priority is at its bound."""

    code = "queue_full"

    def __init__(self, model: str, bound: int, retry_after_s: int) -> None:
        super().__init__(f"{bound} jobs already wait for {model!r}; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ModelDraining(DarkroomError):
    """Nothing new is accepted for this model until its operator resumes it."""

    code = "draining"

    def __init__(self, model: str, retry_after_s: int) -> None:
        super().__init__(f"{model!r} is being drained and takes no new jobs for now; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class TooManyJobs(DarkroomError):
    """The owner has as many jobs that have not ended as it may have."""

    code = "too_many_jobs"

    def __init__(self, bound: int, retry_after_s: int) -> None:
        jobs = "1 job is" if bound == 1 else f"{bound} jobs are"
        super().__init__(
            f"{jobs} queued or running for this key, which may have no more at once; try again in {retry_after_s} s"
        )
        self.retry_after_s = retry_after_s


class IdempotencyKeyReused(DarkroomError):
    """An idempotency key that came before with another request."""

    code = "idempotency_key_reused"
    field = "Idempotency-Key"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"Idempotency-Key is {key!r}, which was used with another request; allowed: a new key for each request"
        )


class QueueUnavailable(DarkroomError):
    """Redis did not answer in time; nothing was accepted, or it cannot be known."""

    code = "queue_unavailable"
    retry_after_s = 2

    def __init__(self) -> None:
        super().__init__("the queue is not reachable right now; try again in a moment")


class StoreUnavailable(DarkroomError):
    """The picture store failed to read or write."""

    code = "store_unavailable"
    retry_after_s = 2

    def __init__(self, reason: str) -> None:
        super().__init__(f"the picture store is not reachable right now ({reason}); try again in a moment")


class SchemaUnknown(DarkroomError):
    """A payload of a schema that this build does not read."""

    code = "schema_unknown"

    def __init__(self, found: object, known: int) -> None:
        super().__init__(f"payload schema {found!r}; this build reads schema {known}")


class CannotStart(DarkroomError):
    """What the environment asks for is not there; another try would not help."""

    code = "cannot_start"
