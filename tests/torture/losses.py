"""Workers that are killed, told to stop, frozen or poisoned, and a Redis that dies: no job is lost, none ends twice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx

from tests.processes import wait_until
from tests.torture import POISON
from tests.torture.hostile import FREEZE
from tests.torture.ledger import Audit, Injury, Recovery, audit, events, recoveries
from tests.torture.report import Check, at_least, at_most, equal, told
from tests.torture.site import Crew, Site, in_time, status_of
from tests.worker.jobs import make_job
from worker.contract.job import Job

REQUEUED_S, RERUN_S, PAUSE_S = 10.0, 15.0, 30.0
PATIENCE_S = 600.0  # for all jobs of a scenario to end
WAVE = 50  # jobs
HOSTILE = ("-m", "tests.torture.hostile")


def some_jobs(chance: random.Random, count: int) -> list[Job]:
    """Short and longer ones, some of two pictures, at three sizes."""
    return [
        make_job(
            deadline_s=3600,
            num_images=chance.choice((1, 1, 1, 2)),
            width=chance.choice((64, 64, 128)),
            steps=chance.choice((2, 4, 8)),
            seed=seed,
        )
        for seed in range(count)
    ]


def books(found: Audit, jobs: Sequence[Job]) -> list[Check]:
    """What must hold whatever was done."""
    return [
        equal("jobs lost", found.lost, 0),
        equal("jobs that succeeded", found.ends["succeeded"], len(jobs)),
        equal("jobs with other than one end and one result", len(found.not_once), 0),
        told("times that jobs were started", f"{found.executions} for {len(jobs)} jobs"),
        told("pictures of executions that were not committed", found.orphans),
    ]


def speed(found: Sequence[Recovery], injured: str) -> list[Check]:
    """How fast jobs came back, at worst."""
    if not found:
        return [Check(f"{injured} that held jobs", "0", ">= 1", ok=False)]
    return [
        told(f"{injured} that held jobs", len(found)),
        at_most("longest until a lost job is queued again", max(r.requeued_s for r in found), REQUEUED_S, " s"),
        at_most("longest until the first of them runs again", max(r.rerun_s for r in found), RERUN_S, " s"),
    ]


def victim(site: Site, chance: random.Random) -> tuple[Crew, str] | None:
    """A crew whose worker holds jobs, and the worker's name."""
    crews = list(site.crews)
    chance.shuffle(crews)
    for crew in crews:
        for name in crew.workers() if crew.popen.poll() is None else {}:
            if site.held(name):
                return crew, name
    return None


def next_victim(site: Site, chance: random.Random, deadline: float) -> tuple[Crew, str] | None:
    """A victim as soon as there is one; None if all jobs ended before, or the time is up."""
    while time.monotonic() < deadline and site.open_jobs():
        if found := victim(site, chance):
            return found
        time.sleep(0.05)
    return None


def kill_worker(site: Site, crew: Crew, name: str) -> Injury | None:
    """`kill -9` of a worker process; None if it is gone already."""
    pid = crew.workers().get(name)
    if pid is None:
        return None
    held = frozenset(site.held(name))
    injury = Injury(time.time(), "kill", held)
    os.kill(pid, signal.SIGKILL)
    return injury


def kill_and_term(folder: Path, bundle: Path, seed: int, size: float) -> list[Check]:
    """Random `kill -9` of workers and SIGTERM of crews, spread evenly over the jobs."""
    chance, count, each = random.Random(seed), round(1000 * size), max(1, round(25 * size))
    jobs, kinds = some_jobs(chance, count), ["kill", "term"] * each
    chance.shuffle(kinds)
    injuries: list[Injury] = []
    terms = 0
    with Site(folder, f"tiny={bundle}", env={"DARKROOM_DEATH_LIMIT": "1000", "DARKROOM_GRACE_S": "2"}) as site:
        site.start_gateway()
        site.start_crews(2)
        site.submit(*jobs)
        deadline = time.monotonic() + PATIENCE_S
        for n, kind in enumerate(kinds):
            due = count - count * (n + 1) // (len(kinds) + 1)  # jobs still open when it happens
            in_time(lambda due=due: site.open_jobs() <= due, deadline - time.monotonic())
            time.sleep(chance.uniform(0, 0.5))
            injury = None
            while injury is None and (found := next_victim(site, chance, deadline)):
                crew, name = found
                if kind == "kill":
                    injury = kill_worker(site, crew, name)
                    injuries += [injury] if injury else []
                else:
                    site.crews.remove(crew)
                    crew.end()
                    site.start_crew()
                    terms += 1
                    break
        site.drained(max(60.0, deadline - time.monotonic()))
        found_books = audit(site.client, jobs, site.pictures)
        return [
            equal("kill -9 and SIGTERM done", (len(injuries), terms), (each, each)),
            *books(found_books, jobs),
            *speed(recoveries(site.client, injuries), "killed workers"),
        ]


def kill_supervisor(folder: Path, bundle: Path, seed: int, size: float) -> list[Check]:
    """`kill -9` of supervisors: nobody tells Redis, so the leases lapse."""
    chance = random.Random(seed)
    times, jobs, injuries = max(2, round(4 * size)), [], []
    with Site(folder, f"tiny={bundle}") as site:
        site.start_gateway()
        site.start_crews(2)
        deadline = time.monotonic() + PATIENCE_S
        for _ in range(times):
            wave = some_jobs(chance, WAVE)
            site.submit(*wave)
            jobs += wave
            in_time(lambda: site.open_jobs() < WAVE, deadline - time.monotonic())
            found = next_victim(site, chance, deadline)
            if found is None:
                break
            crew, name = found
            held = frozenset(site.held(name))
            injuries.append(Injury(time.time(), "supervisor", held))
            site.crews.remove(crew)
            crew.kill()
            site.wait_serving(site.start_crew())
        site.drained(max(60.0, deadline - time.monotonic()))
        return [
            equal("supervisors killed", len(injuries), times),
            *books(audit(site.client, jobs, site.pictures), jobs),
            *speed(recoveries(site.client, injuries), "killed supervisors"),
        ]


def stop_and_continue(folder: Path, bundle: Path, seed: int, size: float) -> list[Check]:
    """SIGSTOP of a worker process until others have its jobs, then SIGCONT: what it still does is fenced."""
    chance = random.Random(seed)
    times, jobs, stopped = max(1, round(3 * size)), [], 0
    with Site(folder, f"tiny={bundle}") as site:
        site.start_gateway()
        site.start_crews(2)
        deadline = time.monotonic() + PATIENCE_S
        for _ in range(times):
            wave = some_jobs(chance, WAVE)
            site.submit(*wave)
            jobs += wave
            in_time(lambda: site.open_jobs() < WAVE, deadline - time.monotonic())
            found = next_victim(site, chance, deadline)
            if found is None:
                break
            crew, name = found
            pid = crew.workers()[name]
            os.kill(pid, signal.SIGSTOP)
            stopped += in_time(lambda name=name: site.client.zscore("darkroom:leases", name) is None, 20)
            time.sleep(chance.uniform(0, 1.0))
            os.kill(pid, signal.SIGCONT)
        site.drained(max(60.0, deadline - time.monotonic()))
        late = sum(crew.text().count('"outcome": "lost"') for crew in site.crews)
        return [
            equal("workers that lost their lease", stopped, times),
            *books(audit(site.client, jobs, site.pictures), jobs),
            told("late results that the fence turned away", late),
        ]


def hung_gpu(folder: Path, bundle: Path, seed: int, size: float) -> list[Check]:
    """A GPU thread that hangs loses the leases of all that its worker holds; what comes late is fenced."""
    calm, frozen = [make_job(steps=2, seed=n) for n in range(10)], make_job(steps=2, seed=FREEZE)
    beside = [make_job(steps=2, seed=100 + n) for n in range(10)]
    env = {"DARKROOM_TEST_FROZEN": str(folder / "frozen")}
    with Site(folder, f"tiny={bundle}", crew=HOSTILE, env=env) as site:
        site.start_gateway()
        (first,) = site.start_crews(1)
        site.submit(*calm)  # so that it knows how long decoding takes
        site.drained(60)
        site.submit(frozen, *beside)
        hung = in_time(lambda: (folder / "frozen").exists(), 60)
        (name,) = first.workers()
        site.start_crews(1)
        lapsed = in_time(lambda: site.client.zscore("darkroom:leases", name) is None, 14)
        site.drained(90)
        jobs = [*calm, frozen, *beside]
        late = in_time(lambda: f'"job": "{frozen.id}", "outcome": "lost"' in first.text(), 30)
        return [
            equal("the GPU hung, and its worker lost the lease", (hung, lapsed), (True, True)),
            *books(audit(site.client, jobs, site.pictures), jobs),
            equal("its late result was turned away", late, True),
        ]


def redis_killed(folder: Path, bundle: Path, seed: int, size: float) -> list[Check]:
    """`kill -9` of a Redis with an append-only file, 200 jobs queued over HTTP, some running; then its restart."""
    chance, count, times = random.Random(seed), max(40, round(200 * size)), max(1, round(3 * size))
    away: list[int] = []
    retry_after = ""
    with Site(folder, f"tiny={bundle}") as site:
        url = site.start_gateway()
        site.start_crews(2)
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
            asked = {"model": "tiny", "prompt": "a red circle", "width": 64, "height": 64, "deadline_s": 3600}
            ids = []
            for n in range(count):
                answer = http.post("/v1/generations", json=asked | {"seed": n, "steps": chance.choice((4, 8, 16))})
                assert answer.status_code == 202, answer.text
                ids.append(answer.json()["id"])
            running_then = []
            for n in range(times):
                due = count - count * (n + 1) // (times + 2)
                in_time(lambda due=due: site.open_jobs() <= due, 120)
                running_then.append(sum(len(site.held(name)) for crew in site.crews for name in crew.workers()))
                site.valkey.stop()
                refused = http.post("/v1/generations", json=asked)
                away += [refused.status_code, status_of(f"{url}/readyz")]
                retry_after = refused.headers.get("retry-after", "")
                time.sleep(chance.uniform(0.5, 8.0))
                site.valkey.start()
            site.drained(PATIENCE_S)
        jobs = [replace(make_job(), id=found) for found in ids]
        return [
            told("jobs running when Redis was killed", running_then),
            *books(audit(site.client, jobs, site.pictures), jobs),
            equal("meanwhile, status of a POST and of /readyz", sorted(set(away)), [503]),
            Check("and its Retry-After", retry_after, "seconds", retry_after.isdigit()),
        ]


def poisoned(folder: Path, bundle: Path, seed: int, size: float) -> list[Check]:
    """A job that kills its worker's process, among others, at the default limit."""
    count = max(8, round(50 * size))
    place = random.Random(seed).randrange(count)
    jobs = [make_job(seed=n, prompt=POISON if n == place else "a red circle", deadline_s=3600) for n in range(count)]
    env = {"DARKROOM_TEST_FROZEN": str(folder / "frozen")}
    with Site(folder, f"tiny={bundle}", crew=HOSTILE, env=env) as site:
        site.start_crews(2)
        site.submit(*jobs)
        started = time.monotonic()
        site.drained(PATIENCE_S)
        seconds = time.monotonic() - started
        found = audit(site.client, jobs, site.pictures)
        failed = [job.id for job in jobs if site.status(job) == "failed"]
        code = site.client.hget(f"rq:job:{jobs[place].id}", "outcome") or b""
        deaths = sum(crew.text().count("SIGKILL") for crew in site.crews)
        return [
            equal("jobs that failed: the poisoned one alone", failed, [jobs[place].id]),
            equal("with the code worker_lost", b'"code":"worker_lost"' in code, True),
            equal("jobs that succeeded", found.ends["succeeded"], count - 1),
            equal("jobs with other than one end and one result", len(found.not_once), 0),
            told("processes that died, and seconds for all", f"{deaths}, {seconds:.0f} s"),
        ]


def paused(folder: Path, bundle: Path, seed: int, size: float) -> list[Check]:
    """A large low-priority job beside a stream of short high-priority ones: it waits long, and keeps its lease.

    Its patience is 32 times its step, which must be a second at least, on fast machines too.
    """
    large = make_job(model="roomy", priority="low", width=1536, height=1344, steps=4, deadline_s=3600)
    roomy, chance = bundle.with_name("roomy"), random.Random(seed)
    with Site(folder, f"roomy={roomy}") as site:
        site.start_crews(1)
        site.submit(large)
        wait_until(lambda: bool(steps_at(site, large)), 120)
        stream: list[Job] = []
        began = time.monotonic()
        while time.time() - last_step_at(site, large) < PAUSE_S + 1 and time.monotonic() - began < 90:
            if site.open_jobs() < 24:  # that end one by one, so that there is always one at work
                more = [make_job(model="roomy", priority="high", steps=chance.randint(10, 40)) for _ in range(24)]
                site.submit(*more)
                stream += more
            site.reap()
            time.sleep(0.1)
        site.drained(120)
        found = audit(site.client, [large, *stream], site.pictures)
        return [
            at_least("the job was paused between two steps for", longest_pause(site, large), PAUSE_S, " s"),
            equal("times that it was started", audit(site.client, [large], site.pictures).executions, 1),
            equal("all succeeded, each started once", found.executions, len(stream) + 1),
            equal("jobs that succeeded", found.ends["succeeded"], len(stream) + 1),
        ]


def steps_at(site: Site, job: Job) -> list[float]:
    """When Redis heard of a step of the job, Unix seconds."""
    return [event.at for event in events(site.client, job.id) if event.name == "progress"]


def last_step_at(site: Site, job: Job) -> float:
    """When Redis last heard of a step of the job, Unix seconds."""
    return steps_at(site, job)[-1]


def longest_pause(site: Site, job: Job) -> float:
    """The longest time between two steps of the job, as Redis heard of them, in seconds."""
    return max((later - earlier for earlier, later in pairwise(steps_at(site, job))), default=0.0)
