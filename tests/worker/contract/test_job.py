"""The job and its result as JSON, and as an older Darkroom wrote them."""

import json
from dataclasses import replace

from tests.worker.jobs import make_job
from worker.contract.job import Job, Result, Webhook


def test_job_comes_back_from_its_payload() -> None:
    job = replace(make_job(deterministic=True, num_images=2), request_id="req_1")
    assert Job.from_payload(json.loads(json.dumps(job.to_payload()))) == job


def test_job_with_all_that_its_request_said_comes_back_and_is_hashable() -> None:
    job = replace(
        make_job(),
        owner="k1",
        dialect="replicate",
        echo={"input": {"seed": None, "tags": [1, "x"]}},
        picture_lifetime_s=60,
        warnings=("above what it was trained on",),
        webhook=Webhook(url="https://example.com/", events=("started", "completed")),
        trace="00-1-2-01",
    )
    again = Job.from_payload(json.loads(json.dumps(job.to_payload())))
    assert (again, hash(again)) == (job, hash(job))
    assert json.loads(json.dumps(job.to_payload())) == job.to_payload()


def test_payload_of_the_first_schema_is_read() -> None:
    payload = make_job().to_payload() | {"schema": 1}
    for name in ("trace", "owner", "dialect", "echo", "picture_lifetime_s", "warnings", "webhook"):
        del payload[name]
    job = Job.from_payload(payload)
    assert (job.owner, job.dialect, job.webhook, job.warnings, job.echo) == ("", "native", None, (), {})


def test_work_of_a_guided_job_is_two_rows_a_step() -> None:
    one, guided = make_job(guidance_scale=1.0, steps=5), make_job(guidance_scale=4.5, steps=5, num_images=3)
    assert (one.pixel_steps, guided.pixel_steps) == (64 * 64 * 5, 64 * 64 * 5 * 2 * 3)


def test_payload_from_before_there_were_deterministic_jobs_is_read() -> None:
    payload = make_job().to_payload()
    del payload["deterministic"]
    assert not Job.from_payload(payload).deterministic


def test_result_from_before_there_were_fingerprints_is_read() -> None:
    data = json.loads(Result(warnings=("w",), fingerprint="fp_1").to_json())
    assert Result.from_json(json.dumps(data)).fingerprint == "fp_1"
    del data["fingerprint"]
    assert Result.from_json(json.dumps(data)) == Result(warnings=("w",))
