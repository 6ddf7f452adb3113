"""RQ's own command line and registries beside us: they read our jobs, and break nothing."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import redis
from rq import Queue
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from tests.torture.ledger import audit
from tests.torture.losses import some_jobs
from tests.torture.report import Check, equal, told
from tests.torture.site import ROOT, Site
from tests.worker.jobs import make_job

RQ = str(Path(sys.executable).with_name("rq"))
QUEUE = "darkroom.tiny.normal"


def rq(site: Site, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run RQ's command line on our Redis."""
    command = [RQ, arguments[0], "--url", site.valkey.url, *arguments[1:]]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def rq_beside(folder: Path, bundle: Path, seed: int, size: float) -> list[Check]:
    """`rq info`, `rq requeue`, a registry's cleanup and a burst worker of another queue, while jobs run."""
    jobs = some_jobs(random.Random(seed), max(60, round(150 * size)))
    bad = make_job(width=16 * 40, height=64, deadline_s=3600)  # beyond the tiny model's table of positions
    said = []
    with Site(folder, f"tiny={bundle}") as site:
        site.start_gateway()
        site.start_crews(1)
        site.submit(bad, *jobs)
        connection = redis.Redis.from_url(site.valkey.url)
        other = Queue("other", connection=connection, serializer=JSONSerializer)
        other.enqueue("time.time")
        rounds = 0
        while site.open_jobs() > len(jobs) // 3:
            rounds += 1
            said += [rq(site, "info"), rq(site, "info", "--by-queue", QUEUE)]
            for queue in Queue.all(connection=connection, serializer=JSONSerializer):
                StartedJobRegistry(queue=queue).cleanup()
            said.append(rq(site, "worker", "--burst", "--serializer", "json", "other"))
        said.append(rq(site, "requeue", "--serializer", "json", "--queue", QUEUE, bad.id))
        ended = site.drained(120)
        running = StartedJobRegistry(QUEUE, connection=connection, serializer=JSONSerializer)
        left = running.count
        connection.close()
        found = audit(site.client, jobs, site.pictures)
        again = audit(site.client, [bad], site.pictures)
        wrong = [one.stderr[-300:] for one in said if one.returncode]
        return [
            told("rounds of rq info, cleanup and rq worker --burst", rounds),
            equal("commands of rq that failed", wrong, []),
            equal("jobs lost", (found.lost, ended), (0, True)),
            equal(
                "jobs that succeeded, each started once", (found.ends["succeeded"], found.executions), (len(jobs),) * 2
            ),
            equal("jobs with other than one end and one result", len(found.not_once), 0),
            equal("times that the requeued job was started", again.executions, 2),
            equal("jobs that RQ still takes for running", left, 0),
        ]
