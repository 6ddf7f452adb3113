"""`darkroom queue`, run against a real Valkey; and what a drained model means to clients."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis
from rq import Queue as RQQueue
from rq.serializers import JSONSerializer
from typer.testing import CliRunner, Result

from app.cli import cli
from app.embedded import EmbeddedValkey
from app.operator import parse_duration
from app.settings import GatewaySettings
from tests.app.fake_worker import FakeWorker
from tests.worker.jobs import make_job
from worker.contract.job import Failure, Job, JobView
from worker.contract.job import Result as Ending
from worker.contract.operations import Operations
from worker.contract.queue import JobQueue
from worker.contract.settings import ContractSettings
from worker.intake import Intake

ROOT = Path(__file__).parents[2]
PROMPT = "a very secret circle"
BROKEN = Ending(failure=Failure(code="out_of_memory", message="too large"))


class Deployment:
    """A Redis, and what a gateway and a worker do to it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.settings = ContractSettings(redis_url=url)  # type: ignore[arg-type]
        self.redis = redis.Redis.from_url(url)
        self.intake = Intake.connect(self.settings, "w1")

    def queue(self, *arguments: str, answer: str | None = None) -> Result:
        """Runs `darkroom queue ...`."""
        return CliRunner(env={"DARKROOM_REDIS_URL": self.url}).invoke(cli, ["queue", *arguments], input=answer)

    def submit(self, *jobs: Job) -> None:
        async def all_of_them(queue: JobQueue) -> None:
            for job in jobs:
                await queue.submit(job)

        self._with_queue(all_of_them)

    def view(self, job: Job) -> JobView:
        found: list[JobView] = []

        async def look(queue: JobQueue) -> None:
            found.append(await queue.view(job.id))

        self._with_queue(look)
        return found[0]

    def fail(self, *jobs: Job) -> None:
        self.submit(*jobs)
        for claim in self.intake.claim(sorted({job.model for job in jobs}), len(jobs)):
            assert self.intake.commit(claim, "failed", BROKEN)

    def rq_queue(self, name: str = "darkroom.tiny.normal") -> RQQueue:
        return RQQueue(name, connection=self.redis, serializer=JSONSerializer)

    def close(self) -> None:
        self.intake.close()
        self.redis.close()

    def _with_queue(self, action: Callable[[JobQueue], object]) -> None:
        async def run() -> None:
            queue = JobQueue.connect(self.settings)
            try:
                await action(queue)  # type: ignore[misc]
            finally:
                await queue.close()

        asyncio.run(run())


@pytest.fixture
def deployment(redis_url: str) -> Iterator[Deployment]:
    deployment = Deployment(redis_url)
    yield deployment
    deployment.close()


def rows(result: Result) -> list[list[str]]:
    return [line.split() for line in result.stdout.splitlines() if line]


# status


def test_status_of_an_empty_redis_says_so(deployment: Deployment) -> None:
    result = deployment.queue("status")
    assert result.exit_code == 0
    assert result.stdout == "no model is known yet: no worker has started against this Redis\n"


def test_status_shows_jobs_by_priority_and_workers_but_no_prompt(deployment: Deployment) -> None:
    deployment.fail(make_job(prompt=PROMPT))
    deployment.submit(make_job(prompt=PROMPT), make_job(prompt=PROMPT), make_job(prompt=PROMPT, priority="low"))
    deployment.intake.renew(["tiny"])
    deployment.intake.claim(["tiny"], 1)
    result = deployment.queue("status")
    assert result.exit_code == 0, result.output
    assert rows(result) == [
        ["model", "priority", "waiting", "oldest", "apart", "running", "succeeded", "failed", "canceled"],
        ["tiny", "high", "0", "-", "0", "0", "0", "0", "0"],
        ["normal", "1", "0s", "0", "1", "0", "1", "0"],
        ["low", "1", "0s", "0", "0", "0", "0", "0"],
        ["worker", "models", "jobs", "lease", "ends", "in", "heard", "of"],
        ["w1", "tiny", "1", rows(result)[-1][3], "s", "0s", "ago"],
    ]
    assert "secret" not in deployment.queue("status", "--json").stdout


def test_status_marks_models_that_are_paused_or_drained(deployment: Deployment) -> None:
    deployment.submit(make_job(model="a"), make_job(model="b"))
    deployment.queue("pause", "a")
    deployment.queue("drain", "b")
    assert {"a (paused)", "b (draining)"} <= {
        line[:12].strip() for line in deployment.queue("status").stdout.splitlines()
    }


def test_status_for_programs_is_json(deployment: Deployment) -> None:
    deployment.submit(make_job())
    deployment.intake.renew(["tiny"])
    status = json.loads(deployment.queue("status", "--json").stdout)
    (model,) = status["models"]
    assert (model["model"], model["paused"], model["draining"]) == ("tiny", False, False)
    assert [(queue["priority"], queue["waiting"]) for queue in model["queues"]] == [
        ("high", 0),
        ("normal", 1),
        ("low", 0),
    ]
    assert [(worker["worker"], worker["models"]) for worker in status["workers"]] == [("w1", ["tiny"])]


# pause, resume, drain


def test_pause_and_resume_of_one_model(deployment: Deployment) -> None:
    deployment.submit(make_job(model="a"), make_job(model="b"))
    assert deployment.queue("pause", "a").stdout == "paused: a\n"
    assert [claim.job.model for claim in deployment.intake.claim(["a", "b"], 5)] == ["b"]
    assert deployment.queue("resume", "a").stdout == "resumed: a\n"
    assert [claim.job.model for claim in deployment.intake.claim(["a", "b"], 5)] == ["a"]


def test_pause_of_all_models(deployment: Deployment) -> None:
    deployment.submit(make_job(model="a"), make_job(model="b"))
    assert deployment.queue("pause", "--all").stdout == "paused: a, b\n"
    assert deployment.intake.claim(["a", "b"], 5) == []


@pytest.mark.parametrize("verb", ["pause", "resume", "drain"])
def test_unknown_model_is_named_with_the_known_ones(deployment: Deployment, verb: str) -> None:
    deployment.submit(make_job(model="a"))
    result = deployment.queue(verb, "x")
    assert (result.exit_code, result.stderr) == (1, "error: model is 'x'; known models: a\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pause"], "name models, or say --all"),
        (["resume", "--all", "a"], "not both"),
        (["drain", "--all"], "no model is known yet"),
        (["drain", "a", "--timeout", "3"], "--timeout is for --wait"),
        (["retry"], "name jobs by their ids, or say --failed"),
        (["retry", "gen_1", "--since", "1h"], "--since is for --failed"),
        (["retry", "--failed", "--since", "soon"], "--since: 'soon' is no length of time; allowed: "),
        (["purge"], "name models, or say --all-waiting or --failed"),
        (["purge", "--failed", "--all-waiting"], "say one"),
        (["purge", "a", "--all-waiting"], "not both"),
    ],
)
def test_unclear_command_is_refused_in_words(deployment: Deployment, arguments: list[str], message: str) -> None:
    result = deployment.queue(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr


def test_drain_waits_until_what_waits_is_done(settings: GatewaySettings, deployment: Deployment) -> None:
    with FakeWorker(settings) as worker:
        worker.go_on.clear()
        jobs = [make_job() for _ in range(3)]
        deployment.submit(*jobs)
        refused = deployment.queue("drain", "tiny", "--wait", "--timeout", "0")
        assert refused.exit_code == 1
        assert "not empty after 0 s, and still draining: tiny: " in refused.stderr
        worker.go_on.set()
        result = deployment.queue("drain", "tiny", "--wait", "--timeout", "30")
    assert (result.exit_code, result.stdout) == (0, "draining: tiny\nempty\n")
    assert {deployment.view(job).status for job in jobs} == {"succeeded"}


def test_drain_says_when_no_worker_has_the_model(deployment: Deployment) -> None:
    deployment.submit(make_job())
    result = deployment.queue("drain", "tiny", "--wait", "--timeout", "0")
    assert "tiny: 1 waiting, 0 running, and no worker has the model" in result.stderr


def test_drain_ends_jobs_past_their_deadline_though_nobody_else_is_there(deployment: Deployment) -> None:
    job = make_job(deadline_s=0.2)
    deployment.submit(job)
    result = deployment.queue("drain", "--all", "--wait", "--timeout", "30")
    assert result.stdout == "draining: tiny\nempty\n"
    assert deployment.view(job).status == "failed"


def test_interrupted_drain_says_that_it_goes_on(deployment: Deployment) -> None:
    deployment.submit(make_job())
    argv = [sys.executable, "-m", "app.cli", "queue", "drain", "tiny", "--wait"]
    env = {**os.environ, "DARKROOM_REDIS_URL": deployment.url}
    with subprocess.Popen(
        argv, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 30
        while not deployment.redis.exists("darkroom:reaped_at"):  # it waits
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "not waiting any more; still draining\n")
    assert deployment.redis.sismember("darkroom:draining", "tiny")


async def test_drained_model_is_503_with_retry_after_until_resumed(
    settings: GatewaySettings, served: httpx.AsyncClient
) -> None:
    asked = {"model": "tiny", "prompt": "x"}
    with Operations.connect(settings) as operations:
        operations.drain(["tiny"])
        answer = await served.post("/v1/generations", json=asked)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert "'tiny' is being drained" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) > 0
        operations.resume(["tiny"])
    assert (await served.post("/v1/generations", json=asked)).status_code == 202


# retry


def test_retry_queues_failed_jobs_again_and_says_what_it_did_not(deployment: Deployment) -> None:
    failed, waiting = make_job(), make_job()
    deployment.fail(failed)
    deployment.submit(waiting)
    result = deployment.queue("retry", failed.id, waiting.id, failed.id, "gen_0")
    assert result.exit_code == 1
    assert result.stdout == f"{failed.id} is queued, 1 before it\n1 queued again, 2 not\n"
    assert result.stderr.splitlines() == [
        f"{waiting.id} stays as it is: it waits already",
        "gen_0 stays as it is: it was never accepted here, or its record has expired",
    ]
    assert deployment.rq_queue().get_job_ids() == [waiting.id, failed.id]


def test_retry_of_all_failed_jobs_or_those_of_a_model(deployment: Deployment) -> None:
    a, b = [make_job(model="a") for _ in range(3)], make_job(model="b")
    deployment.fail(*a, b)
    result = deployment.queue("retry", "--failed", "b")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "1 queued again")
    assert [deployment.view(job).status for job in (*a, b)] == ["failed"] * 3 + ["queued"]
    assert deployment.queue("retry", "--failed").stdout.splitlines()[-1] == "3 queued again"
    assert sorted(deployment.rq_queue("darkroom.a.normal").get_job_ids()) == sorted(job.id for job in a)
    assert deployment.rq_queue("darkroom.a.normal").failed_job_registry.get_job_ids(cleanup=False) == []


def test_retry_of_those_that_failed_lately(deployment: Deployment) -> None:
    old, young = make_job(), make_job()
    deployment.fail(old, young)
    deployment.redis.hset(f"rq:job:{old.id}", "ended_at", "2020-01-01T00:00:00.000000Z")
    assert deployment.queue("retry", "--failed", "--since", "1h").stdout.splitlines()[-1] == "1 queued again"
    assert [deployment.view(job).status for job in (old, young)] == ["failed", "queued"]


def test_retry_of_the_failed_jobs_of_an_unknown_model_is_refused(deployment: Deployment) -> None:
    deployment.fail(make_job(model="a"))
    result = deployment.queue("retry", "--failed", "x")
    assert (result.exit_code, result.stderr) == (1, "error: model is 'x'; known models: a\n")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5d", 129_600)])
def test_length_of_time_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "h", "-1h", "1 h", "1e3s", "nand", "9" * 400 + "d"])
def test_other_lengths_of_time_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: a number with s, m, h or d"):
        parse_duration(text)


# purge


def test_purge_asks_and_cancels_what_waits(deployment: Deployment) -> None:
    jobs, other = [make_job(prompt=PROMPT) for _ in range(2)], make_job(model="other")
    deployment.submit(*jobs, other)
    result = deployment.queue("purge", "tiny", answer="y\n")
    assert "Cancel 2 waiting job(s) of tiny?" in result.stderr
    assert result.stdout.splitlines()[-1] == "2 waiting job(s) canceled"
    assert [deployment.view(job).status for job in (*jobs, other)] == ["canceled", "canceled", "queued"]
    registry = deployment.rq_queue().canceled_job_registry
    assert sorted(registry.get_job_ids(cleanup=False)) == sorted(job.id for job in jobs)
    assert "secret" not in result.output


@pytest.mark.parametrize("answer", ["n\n", ""])
def test_purge_does_nothing_without_a_yes(deployment: Deployment, answer: str) -> None:
    job = make_job()
    deployment.submit(job)
    result = deployment.queue("purge", "tiny", answer=answer)
    assert result.exit_code == 1
    assert "nothing was purged; --yes does not ask" in result.stderr
    assert deployment.view(job).status == "queued"


def test_purge_of_all_that_waits_without_asking(deployment: Deployment) -> None:
    jobs = [make_job(model="a"), make_job(model="b", priority="high")]
    deployment.submit(*jobs)
    assert deployment.queue("purge", "--all-waiting", "--yes").stdout == "2 waiting job(s) canceled\n"
    assert {deployment.view(job).status for job in jobs} == {"canceled"}


def test_purge_of_failed_jobs_forgets_them(deployment: Deployment) -> None:
    failed, waiting = [make_job(model="a"), make_job(model="b")], make_job(model="a")
    deployment.fail(*failed)
    deployment.submit(waiting)
    assert deployment.queue("purge", "a", "--failed", "--yes").stdout == "1 failed job(s) forgotten\n"
    assert deployment.queue("purge", "--failed", "--yes").stdout == "1 failed job(s) forgotten\n"
    assert [key for key in deployment.redis.scan_iter() if any(job.id.encode() in key for job in failed)] == []
    assert deployment.view(waiting).status == "queued"


# where Redis is


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["pause", "a"], ["resume", "--all"], ["drain", "a", "--wait"], ["retry", "gen_1"], ["purge", "a"]],
)
def test_redis_that_is_away_is_named_with_what_was_tried(arguments: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        port = taken.getsockname()[1]
        env = {"DARKROOM_REDIS_URL": f"redis://:hidden@127.0.0.1:{port}/0"}
        result = CliRunner(env=env).invoke(cli, ["queue", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith(
        f"error: queue {arguments[0]} did not succeed: Redis at 127.0.0.1:{port} gave no answer"
    )
    assert "DARKROOM_REDIS_URL" in result.stderr
    assert "hidden" not in result.output


def test_embedded_valkey_of_the_same_folder_is_found_while_it_runs(tmp_path: Path) -> None:
    env = {"DARKROOM_DATA_DIR": str(tmp_path), "DARKROOM_REDIS_URL": None}
    valkey = EmbeddedValkey(tmp_path / "valkey")
    valkey.start()
    try:
        told = tmp_path / "valkey" / "url"
        assert told.stat().st_mode & 0o777 == 0o600
        result = CliRunner(env=env).invoke(cli, ["queue", "status"])
        assert (result.exit_code, result.stdout.split(":")[0]) == (0, "no model is known yet")
    finally:
        valkey.stop()
    assert not told.exists()


# worker --gpus


def test_worker_passes_its_gpus_on() -> None:
    argv = [sys.executable, "-m", "app.cli", "worker", "--gpus", "nonsense"]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "DARKROOM_GPUS is 'nonsense'" in result.stderr


# forget


def test_forget_takes_models_out_that_nobody_uses_and_says_why_it_leaves_others(deployment: Deployment) -> None:
    deployment.fail(make_job(model="old"))
    deployment.submit(make_job(model="busy"))
    result = deployment.queue("forget", "old", "busy")
    assert (result.exit_code, result.stdout) == (1, "forgotten: old\n")
    assert result.stderr == "busy stays known: 1 job of it waits or runs\n"
    assert deployment.queue("forget", "old").stderr.startswith("error: model is 'old'; known models: busy")
