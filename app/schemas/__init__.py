"""The native vocabulary of the HTTP surface: requests, answers and errors, and all the prose of its OpenAPI."""

from app.schemas.creation import MAX_PUBLIC_SEED, GenerationCreate, WebhookCreate
from app.schemas.error import ANY_REFUSAL, Error, ErrorBody, refusals
from app.schemas.generation import (
    DeliveryOutcome,
    Generation,
    GenerationError,
    GenerationPage,
    GenerationProgress,
    Image,
    Params,
    Urls,
    timestamp,
)
from app.schemas.health import Alive, Readiness
from app.schemas.model import Model, ModelDefaults, ModelLimits, ModelList
from app.schemas.webhook import PROBLEM, WebhookSecret

__all__ = [
    "ANY_REFUSAL",
    "DESCRIPTION",
    "MAX_PAGE",
    "MAX_PUBLIC_SEED",
    "MAX_WAIT_S",
    "PROBLEM",
    "TAGS",
    "Alive",
    "DeliveryOutcome",
    "Error",
    "ErrorBody",
    "Generation",
    "GenerationCreate",
    "GenerationError",
    "GenerationPage",
    "GenerationProgress",
    "Image",
    "Model",
    "ModelDefaults",
    "ModelLimits",
    "ModelList",
    "Params",
    "Readiness",
    "Urls",
    "WebhookCreate",
    "WebhookSecret",
    "refusals",
    "timestamp",
]

DESCRIPTION = """
Pictures from prompts with Stable Diffusion 3.5.

`POST /v1/generations` accepts a job and answers at once with its id; `GET /v1/generations/{id}` tells how far it is
and, once it has succeeded, where its pictures are; `GET /v1/generations/{id}/events` tells as it happens. With the
header `Prefer: wait=30` the first call holds its answer until the job has ended, 30 seconds at most; with
`Idempotency-Key` it may be sent again without making a second job. Every refusal has one shape:
`{"error": {"code", "message", "field", "request_id"}}`.
"""

TAGS = [
    {"name": "generations", "description": "Ask for pictures, follow them, fetch them."},
    {"name": "models", "description": "What can be asked of which model."},
    {"name": "webhooks", "description": "How receivers know that a message is ours."},
    {"name": "health", "description": "For probes and Prometheus."},
]

MAX_WAIT_S = 60
MAX_PAGE = 100
