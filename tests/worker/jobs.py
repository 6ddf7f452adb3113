"""Jobs for tests."""

import time
from typing import Any

from model.params import GenerationParams
from worker.contract.job import Job, Output, Priority, new_job_id


def make_job(
    *,
    output: Output | None = None,
    deadline_s: float = 600,
    num_images: int = 1,
    model: str = "tiny",
    priority: Priority = "normal",
    deterministic: bool = False,
    request_id: str = "",
    **params: Any,
) -> Job:
    """A job of the tiny model; keyword arguments change its params."""
    now = time.time()
    asked = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 2, "guidance_scale": 3.0, "seed": 1} | params
    return Job(
        id=new_job_id(),
        model=model,
        revision="r1",
        params=GenerationParams(**asked),
        num_images=num_images,
        output=output or Output(),
        priority=priority,
        deterministic=deterministic,
        created_at=now,
        request_id=request_id,
        deadline=now + deadline_s,
    )
