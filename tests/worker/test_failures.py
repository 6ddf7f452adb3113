"""What is said of an error: little to the job's owner, all to the log."""

from __future__ import annotations

from structlog.testing import capture_logs

from tests.worker.jobs import make_job
from worker.failures import explain


def test_log_has_the_error_under_the_ids_of_job_and_request() -> None:
    job, error = make_job(request_id="r-1"), ValueError("a secret of ours")
    with capture_logs() as lines:
        failure = explain(job, error)
    assert (failure.code, "secret" in failure.message) == ("internal_error", False)
    (line,) = lines
    assert (line["job"], line["request_id"], line["exc_info"]) == (job.id, "r-1", error)
