"""The variables that anything of ours reads, so that a misspelt one is noticed."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

from worker.contract.settings import IN_FILE, PREFIX

SETTINGS = frozenset({
    "AUTH", "AUTH_OFF_ON_PUBLIC", "BODY_TIMEOUT_S", "CORS_ORIGINS", "DATA_DIR", "DEATH_LIMIT", "DEFAULT_MODEL",
    "DEVICE", "DRAIN_S", "DTYPE", "EMBEDDING_CACHE_MB", "ENV", "GPUS", "GRACE_S", "HOLD_S", "HOST", "KEY_MAX_ACTIVE",
    "KEY_RATE", "LOG_FORMAT", "MAX_BATCH_ROWS", "MAX_BODY_BYTES", "MAX_JOBS", "MAX_MULTIPART_BYTES", "METRICS_HOST",
    "METRICS_PORT", "MODELS", "PICTURE_LIFETIME_S", "POD_NAME", "POD_NAMESPACE", "PORT", "PRECISION", "PUBLIC_URL",
    "QUEUE_BOUND", "RECORD_LIFETIME_S", "REDIS_URL", "S3_ACCESS_KEY_ID", "S3_BUCKET", "S3_ENDPOINT", "S3_PATH_STYLE",
    "S3_PREFIX", "S3_PRESIGN", "S3_PUBLIC_ENDPOINT", "S3_REGION", "S3_SECRET_ACCESS_KEY", "S3_SWEEP", "SAFETY",
    "SAFETY_THRESHOLD", "STORE_DIR", "STORE_PATIENCE_S", "SWEEP_EVERY_S", "T5", "T5_LENGTH", "TEXT_ENCODERS",
    "TOKENIZERS", "TOKEN_BUDGET", "TRUSTED_PROXIES", "WEBHOOKS_AT_ONCE", "WEBHOOK_ALLOW", "WEBHOOK_ATTEMPTS",
    "WEBHOOK_METRICS_PORT", "WEBHOOK_RETRY_S", "WEBHOOK_TIMEOUT_S", "WORKER_NAME", "WORKER_STATUS",
})  # fmt: skip
"""Of all processes: each reads its own, and ignores those of the others."""

OPTIONS = frozenset({"API_KEY", "HF_TOKEN_FILE", "URL"})
"""Of the `darkroom` command."""

AROUND = frozenset({
    "GPU_COUNT", "MODELS_DIR", "STOP_GRACE_PERIOD", "TEST_ALL", "TEST_FROZEN", "VERSION", "WORKER_CPUS",
    "WORKER_MEMORY",
})  # fmt: skip
"""Of compose and of the tests."""


def unread(env: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each variable that is named as ours are, and that nothing reads."""
    ours = sorted(name for name in env if name.upper().startswith(PREFIX))
    return [f"nothing reads {name}{_meant(name)}" for name in ours if not _is_read(name.upper().removeprefix(PREFIX))]


def _is_read(name: str) -> bool:
    return name in SETTINGS | OPTIONS | AROUND or name.removesuffix(IN_FILE) in SETTINGS


def _meant(name: str) -> str:
    name = name.upper().removeprefix(PREFIX)
    end = IN_FILE if name.endswith(IN_FILE) else ""
    near = difflib.get_close_matches(name.removesuffix(end), SETTINGS, 1)
    return f"; did you mean {PREFIX}{near[0]}{end}?" if near else ""
