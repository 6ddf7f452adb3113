"""Long queues and idle workers: what a claim costs, who gets one, and how little an idle worker asks of Redis."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import redis

from tests.torture.ledger import audit
from tests.torture.report import Check, at_most, equal, told
from tests.torture.site import Site, in_time
from tests.worker.jobs import make_job
from worker.contract.job import Job, Result
from worker.intake import Claim, Intake

CLAIM_MS, COMMANDS_A_SECOND = 5.0, 5.0
IDLE_S = 20.0


@dataclass
class Rival:
    """A client of its own that only measures."""

    url: str
    lines: Counter[str]

    def listen(self, seconds: float) -> None:
        """Count for a while what Redis is told, with MONITOR: by clients, and by scripts."""
        with redis.Redis.from_url(self.url, socket_timeout=seconds) as client, client.monitor() as monitor:
            end = time.monotonic() + seconds
            try:
                while time.monotonic() < end:
                    said = monitor.next_command()
                    self.lines["script" if said["client_type"] == "lua" else said["command"].split()[0].lower()] += 1
            except redis.TimeoutError:
                pass


def timed(do: Callable[[], list[Claim]]) -> tuple[list[Claim], float]:
    """Its answer, and the milliseconds that it took."""
    started = time.perf_counter()
    found = do()
    return found, 1000 * (time.perf_counter() - started)


def claim_all(intake: Intake, models: list[str], want: int, times: int) -> list[float]:
    """Claims, each job ended before the next claim; milliseconds of each claim."""
    found = []
    for _ in range(times):
        claims, milliseconds = timed(lambda: intake.claim(models, want))
        found.append(milliseconds)
        for claim in claims:
            intake.commit(claim, "succeeded", Result())
    return found


def figures(what: str, milliseconds: list[float], must: bool) -> list[Check]:
    """Median and p99, as the worker sees them: on the same few cores as all else."""
    p99 = statistics.quantiles(milliseconds, n=100)[98]
    return [
        at_most(f"{what}, median of {len(milliseconds)}", statistics.median(milliseconds), CLAIM_MS, " ms"),
        at_most(f"{what}, p99", p99, CLAIM_MS, " ms") if must else told(f"{what}, p99", f"{p99:.2f} ms"),
    ]


def slowest_scripts(client: redis.Redis) -> list[float]:
    """Milliseconds inside Redis of the slowest claims since the log was reset, the slowest last."""
    return sorted(entry["duration"] / 1000 for entry in client.slowlog_get(1000) if b"EVALSHA" in entry["command"])


def long_queue(folder: Path, bundle: Path, seed: int, size: float) -> list[Check]:
    """10,000 queued jobs of one model: the claims' times, and a worker of another model that does not wait for them."""
    count = round(10_000 * size)
    crowd = [make_job(model="crowd", deadline_s=3600, seed=n) for n in range(count)]
    rare = [make_job(model="rare", deadline_s=3600, seed=n) for n in range(3)]
    with Site(folder, f"rare={bundle}") as site:
        started = time.perf_counter()
        site.submit(*crowd)
        submit_ms = 1000 * (time.perf_counter() - started) / count
        site.submit(*rare)
        both = Intake.connect(site.settings, "both")
        shared = [claim.job.model for claim in both.claim(["crowd", "rare"], 2)]
        both.retire()
        intake = Intake.connect(site.settings, "measuring")
        site.client.config_set("slowlog-log-slower-than", round(1000 * CLAIM_MS))
        one, eight = claim_all(intake, ["crowd"], 1, 300), claim_all(intake, ["crowd"], 8, 300)
        slow = slowest_scripts(site.client)
        renew = [timed(lambda: intake.renew(["crowd"]) or [])[1] for _ in range(100)]
        for client in (both, intake):
            client.close()
        waiting = site.client.llen("rq:queue:darkroom.crowd.normal")
        (crew,) = site.start_crews(1)
        idle = not in_time(lambda: all_ended(site, rare), 30)
        crew.end()
        return [
            told(f"a submit, of {count}", f"{submit_ms:.2f} ms"),
            told("jobs still queued after all claims", waiting),
            *figures("a claim of one job", one, must=True),
            *figures("a claim of eight jobs at once", eight, must=False),
            told(
                f"of {len(one) + len(eight)} claims and their commits, kept Redis for {CLAIM_MS:g} ms or more",
                len(slow),
            ),
            told("a renewal, median", f"{statistics.median(renew):.2f} ms"),
            equal("a worker of both models claims one of each", sorted(shared), ["crowd", "rare"]),
            equal("jobs of the other model, beside them", audit(site.client, rare, site.pictures).ends["succeeded"], 3),
            equal("the other model's worker had to wait", idle, False),
        ]


def all_ended(site: Site, jobs: list[Job]) -> bool:
    """Whether Redis has an end for each."""
    return all(site.client.hexists(f"rq:job:{job.id}", "outcome") for job in jobs)


def idle_worker(folder: Path, bundle: Path, seed: int, size: float) -> list[Check]:
    """What one idle worker and its supervisor ask of Redis."""
    seconds = max(8.0, IDLE_S * size)
    with Site(folder, f"tiny={bundle}") as site:
        site.start_crews(1)
        job = make_job()
        site.submit(job)
        site.drained(60)
        before = site.client.info("commandstats")
        rival = Rival(site.valkey.url, Counter())
        listener = threading.Thread(target=rival.listen, args=(seconds,))
        listener.start()
        listener.join()
        after = site.client.info("commandstats")
        by_script = rival.lines.pop("script", 0)
        said = rival.lines - Counter({"monitor": 1, "client": rival.lines["client"]})
        grown = {name: calls["calls"] - before.get(name, {"calls": 0})["calls"] for name, calls in after.items()}
        stats = {name.removeprefix("cmdstat_"): calls for name, calls in grown.items() if calls}
        return [
            at_most("commands of an idle worker", said.total() / seconds, COMMANDS_A_SECOND, " a second"),
            told("these were", ", ".join(f"{name} {calls}" for name, calls in said.most_common())),
            told("commands inside its scripts", f"{by_script / seconds:.1f} a second"),
            told("INFO commandstats, both together", ", ".join(f"{name} {calls}" for name, calls in stats.items())),
        ]
