"""Workers that die, freeze or leave, and a Redis that dies: real processes, on tiny random weights.

`make torture` does the same at large.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import wait_until
from tests.torture import POISON
from tests.torture.ledger import audit, events
from tests.torture.site import Crew, Site
from tests.worker.jobs import make_job
from worker.contract.job import Job

pytestmark = pytest.mark.e2e

LONG = 2000  # steps


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site"), f"tiny={tiny_bundle}") as site:
        yield site


def serving(site: Site, count: int) -> list[Crew]:
    """So many crews whose workers serve; those that ended are replaced."""
    site.crews = [crew for crew in site.crews if crew.popen.poll() is None]
    while len(site.crews) < count:
        site.start_crew()
    for crew in site.crews:
        site.wait_serving(crew)
    return site.crews


def holder(site: Site, job: Job) -> tuple[Crew, str]:
    """The crew that runs the job, and its worker's name, once there is one."""
    found: list[tuple[Crew, str]] = []

    def runs() -> bool:
        for crew in site.crews:
            for name in crew.workers():
                if any(pair.startswith(job.id) for pair in site.held(name)):
                    found.append((crew, name))
        return bool(found)

    wait_until(runs)
    return found[0]


def all_ended_well(site: Site, *jobs: Job) -> bool:
    """Each succeeded, with one end, one result, and its pictures and no others on disk."""
    books = audit(site.client, jobs, site.pictures)
    return books.ends == {"succeeded": len(jobs)} and (books.lost, books.not_once, books.orphans) == (0, [], 0)


def starts(site: Site, job: Job) -> int:
    return audit(site.client, [job], site.pictures).executions


def test_what_a_frozen_worker_did_is_refused_when_it_wakes(site: Site) -> None:
    serving(site, 2)
    job = make_job(steps=100)
    site.submit(job)
    crew, name = holder(site, job)
    pid = crew.workers()[name]
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: site.open_jobs() == 0)
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: f'"job": "{job.id}", "outcome": "' in crew.text())
    assert f'"job": "{job.id}", "outcome": "succeeded"' not in crew.text()
    assert starts(site, job) == 2
    assert all_ended_well(site, job)


def test_no_job_is_lost_when_redis_is_killed_and_started_again(site: Site) -> None:
    serving(site, 2)
    jobs = [make_job(steps=20, seed=n) for n in range(20)]
    site.submit(*jobs)
    wait_until(lambda: site.open_jobs() < len(jobs) and site.is_on_file())
    assert site.open_jobs() > 0
    site.valkey.stop()
    site.valkey.start()
    wait_until(lambda: site.open_jobs() == 0)
    books = audit(site.client, jobs, site.pictures)
    assert (books.ends, books.lost, books.not_once) == ({"succeeded": len(jobs)}, 0, [])


def test_jobs_of_a_killed_supervisor_are_run_by_others(site: Site) -> None:
    serving(site, 2)
    job = make_job(steps=100)
    site.submit(job)
    crew, _ = holder(site, job)
    crew.kill()
    wait_until(lambda: site.open_jobs() == 0)
    assert starts(site, job) == 2
    assert all_ended_well(site, job)


def test_sigterm_hands_back_at_once_what_does_not_fit_into_the_grace_period(site: Site) -> None:
    while site.crews:
        site.crews.pop().kill()
    (crew,) = site.start_crews(1, DARKROOM_GRACE_S="0.5")
    job = make_job(steps=LONG)
    site.submit(job)
    wait_until(lambda: (site.client.hget(f"rq:job:{job.id}", "step") or b"0") != b"0")
    assert crew.end() == 0
    assert [event.name for event in events(site.client, job.id) if event.name != "progress"] == [
        "queued",
        "running",
        "queued",
    ]
    assert site.status(job) == "queued"
    site.cancel(job)


def test_a_second_sigterm_hands_back_everything_now(site: Site) -> None:
    (crew,) = site.start_crews(1, DARKROOM_GRACE_S="3600")
    job = make_job(steps=LONG)
    site.submit(job)
    wait_until(lambda: (site.client.hget(f"rq:job:{job.id}", "step") or b"0") != b"0")
    crew.send(signal.SIGTERM)
    wait_until(lambda: '"stopping' in crew.text())
    assert site.status(job) == "started"
    assert crew.end() == 0
    assert site.status(job) == "queued"
    assert starts(site, job) == 1
    site.cancel(job)


def test_only_the_poisoned_of_eight_jobs_fails(tmp_path: Path) -> None:
    jobs = [make_job(seed=n, prompt=POISON if n == 5 else "a red circle") for n in range(8)]
    with Site(tmp_path, "tiny=unused", crew=("-m", "tests.torture.plain")) as site:
        site.submit(*jobs)
        site.start_crew()
        wait_until(lambda: site.open_jobs() == 0)
        assert [site.status(job) for job in jobs] == ["failed" if n == 5 else "finished" for n in range(8)]
        assert b'"code":"worker_lost"' in (site.client.hget(f"rq:job:{jobs[5].id}", "outcome") or b"")
        assert starts(site, jobs[5]) == 6  # among 8, 4 and 2, and 3 times alone
