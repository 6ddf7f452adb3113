"""The job as it crosses Redis: frozen dataclasses, JSON, versioned."""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, get_args

from model.params import GenerationParams
from worker.contract.errors import SchemaUnknown

SCHEMA = 2
READ_SCHEMAS = (1, SCHEMA)
"""What this build reads: a job that waits over an upgrade is done."""

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)

OutputFormat = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

Metadata = Literal["full", "none"]

WebhookEvent = Literal["started", "progress", "completed"]

Status = Literal["queued", "running", "succeeded", "failed", "canceled"]
Outcome = Literal["succeeded", "failed", "canceled"]
TERMINAL: frozenset[Status] = frozenset(get_args(Outcome))
"""How a job may end; it stays so."""

JOB_ID = re.compile(r"gen_[0-9a-f]{31}")
"""The form of the ids that we give."""


def new_job_id() -> str:
    """A fresh job id: time-ordered to the millisecond, 80 random bits, safe in urls and Redis keys."""
    return f"gen_{time.time_ns() // 1_000_000:011x}{secrets.token_hex(10)}"


@dataclass(frozen=True, kw_only=True)
class Output:
    """How the pictures are written."""

    format: OutputFormat = "png"
    quality: int = 90  # 1-100; JPEG and WebP
    metadata: Metadata = "full"  # "none": no text about what made the picture


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """Where a job's owner wants to be told of it, and of what."""

    url: str
    events: tuple[WebhookEvent, ...] = ("completed",)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One accepted generation, every default resolved."""

    id: str
    model: str
    revision: str  # of the model's card at submission
    params: GenerationParams  # of picture 0; picture n has seed + n
    num_images: int = 1
    deterministic: bool = False  # the same bytes again, whatever else runs, for one fingerprint of the result
    output: Output = field(default_factory=Output)
    priority: Priority = "normal"
    created_at: float  # Unix seconds
    deadline: float  # Unix seconds; past it the job fails
    request_id: str = ""  # of the HTTP request that made it, for the logs
    trace: str = ""  # W3C traceparent of that request
    owner: str = ""  # id of the API key that asked; "" where keys are off
    dialect: str = "native"  # in whose words its owner is answered: native, stability, replicate, openai, ...
    echo: dict[str, Any] = field(default_factory=dict, hash=False)  # what a dialect's answers repeat of the request
    picture_lifetime_s: int | None = None  # None: the server's
    warnings: tuple[str, ...] = ()  # found when it was accepted
    webhook: Webhook | None = None
    schema: int = SCHEMA

    @property
    def queue(self) -> str:
        """The name of the RQ queue where this job waits."""
        return queue_name(self.model, self.priority)

    @property
    def seeds(self) -> list[int]:
        """The seed of each picture."""
        return [self.params.seed + n for n in range(self.num_images)]

    @property
    def steps(self) -> int:
        """Denoising steps of all pictures together."""
        return self.params.steps * self.num_images

    @property
    def pixel_steps(self) -> int:
        """Its work: pixels, times forward passes of the network over each."""
        return self.params.width * self.params.height * self.steps * self.params.rows

    def to_payload(self) -> dict[str, Any]:
        """The job as JSON-ready data."""
        payload = asdict(self) | {"warnings": list(self.warnings)}
        if self.webhook:
            payload["webhook"]["events"] = list(self.webhook.events)
        return payload

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        """The job of a payload; SchemaUnknown if another Darkroom wrote it."""
        if payload.get("schema") not in READ_SCHEMAS:
            raise SchemaUnknown(payload.get("schema"), SCHEMA)
        known = dict(payload)
        webhook = known.pop("webhook", None)
        return cls(
            params=GenerationParams(**known.pop("params")),
            output=Output(**known.pop("output")),
            warnings=tuple(known.pop("warnings", ())),
            webhook=Webhook(url=webhook["url"], events=tuple(webhook["events"])) if webhook else None,
            **known,
        )


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One stored picture of a finished job."""

    key: str  # in the picture store
    seed: int
    width: int
    height: int
    format: OutputFormat
    bytes: int
    filtered: bool | None = None  # by the safety filter: blurred; None: nothing was checked


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a job failed, in words for its owner; never a traceback."""

    code: str
    message: str


DEADLINE_EXCEEDED = "deadline_exceeded"
"""Code of a failure: the job's deadline passed, or could not be met."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a job ended."""

    pictures: tuple[Picture, ...] = ()
    failure: Failure | None = None
    warnings: tuple[str, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage: text_encode, noise, denoise, vae_decode
    expires_at: float | None = None  # Unix seconds; when the pictures go
    fingerprint: str | None = None  # of all that the pictures' bytes depend on beside the job
    gpu_seconds: float = 0.0  # its share of the time of the batches that it rode in

    def has_expired(self, now: float) -> bool:
        """Whether its pictures are past their time. `now`: Unix seconds."""
        return self.expires_at is not None and self.expires_at <= now

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The result of its JSON."""
        data = json.loads(text)
        failure = data.pop("failure")
        pictures = tuple(Picture(**p) for p in data.pop("pictures"))
        return cls(
            pictures=pictures,
            failure=Failure(**failure) if failure else None,
            warnings=tuple(data.pop("warnings")),
            **data,
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a running job is, over all its pictures."""

    step: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class JobView:
    """A job as its owner may see it at one moment."""

    job: Job
    status: Status
    position: int | None = None  # 0 = next; only while queued
    progress: Progress | None = None  # while running, and at the end of a success
    started_at: float | None = None
    ended_at: float | None = None
    cancel_requested: bool = False
    result: Result | None = None  # once ended
    deliveries: tuple[dict[str, Any], ...] = ()  # of its webhooks, newest last: event, at, attempt, status, ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was accepted but not followed to the letter: of the request, then of what became of it."""
        return tuple(dict.fromkeys((*self.job.warnings, *(self.result.warnings if self.result else ()))))


def queue_name(model: str, priority: Priority) -> str:
    """The RQ queue of a model and priority."""
    return f"darkroom.{model}.{priority}"


def execute(payload: dict[str, Any]) -> None:
    """What a stock RQ worker would call; fails, for only a Darkroom worker can run a job."""
    raise RuntimeError(f"job {payload.get('id')} needs a Darkroom worker (`darkroom worker`), not one of RQ's own")
