"""The job and its result as JSON, and as an older Darkroom wrote them."""

import json
from dataclasses import replace

from tests.worker.jobs import make_job
from worker.contract.job import Job, Result


def test_job_comes_back_from_its_payload() -> None:
    job = replace(make_job(deterministic=True, num_images=2), request_id="req_1")
    assert Job.from_payload(json.loads(json.dumps(job.to_payload()))) == job


def test_payload_from_before_there_were_deterministic_jobs_is_read() -> None:
    payload = make_job().to_payload()
    del payload["deterministic"]
    assert not Job.from_payload(payload).deterministic


def test_result_from_before_there_were_fingerprints_is_read() -> None:
    data = json.loads(Result(warnings=("w",), fingerprint="fp_1").to_json())
    assert Result.from_json(json.dumps(data)).fingerprint == "fp_1"
    del data["fingerprint"]
    assert Result.from_json(json.dumps(data)) == Result(warnings=("w",))
