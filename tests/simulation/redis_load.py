"""What a fleet asks of Redis, and at how many GPUs one core of it has no more to give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from worker.main import IDLE_S, PROGRESS_S, REAP_S, RENEW_S, SPARE_AFTER_S

SCRAPE_S: Final = 15.0
VIEWS: Final = 5
"""Times that a client looks at its job: assumed."""

SUBMITS_S, VIEWS_S = 429.0, 759.0
"""A second of one gateway on one core: RESULTS.md, "The gateway on one core"."""


@dataclass(frozen=True)
class Costs:
    """Microseconds of Redis' one core: `python -m tests.simulation --measure`, two Zen 3 cores, Valkey 9, three models.

    `..._worker`: more, for each worker alive.
    """

    request: float = 31.0  # reading and answering one, beside its script
    submit: float = 300.0
    claim_empty: float = 120.0
    claim_job: float = 325.0
    commit: float = 275.0
    view: float = 135.0
    progress: float = 72.0
    progress_event: float = 32.0
    renew: float = 289.0
    renew_worker: float = 3.56
    reap: float = 100.0
    load: float = 121.0
    load_worker: float = 17.4
    told: float = 11.5  # one that listens, of one message
    heard: float = 25.0  # of a gateway's core: an event of a job that nobody follows there


MEASURED: Final = Costs()


@dataclass(frozen=True)
class Habits:
    """How workers ask: as it is; without what they have learnt; and what would move the wall."""

    name: str
    costs: Costs = MEASURED
    woken: str = "all"  # by a submitted job: all with room; those that are idle; or one
    progress_s: float = PROGRESS_S
    spare_after_s: float = SPARE_AFTER_S  # after it was submitted, a worker that has jobs asks for one


AS_IS: Final = Habits("as it is")
UNSCANNED: Final = replace(MEASURED, renew_worker=0.0, load_worker=0.8)
CHANGES: Final = (
    Habits("if workers that hold jobs asked at once", spare_after_s=0.0),
    AS_IS,
    Habits("renewals and scrapes that pass over no other worker", UNSCANNED),
    Habits("and workers that hold jobs are told of none", UNSCANNED, woken="idle"),
    Habits("and of the others one is told, not all", UNSCANNED, woken="one"),
    Habits("and progress once a second", UNSCANNED, woken="one", progress_s=1.0),
)


@dataclass(frozen=True)
class Use:
    """One kind of request."""

    name: str
    each_second: float
    cores: float


@dataclass(frozen=True)
class Shape:
    """What a simulated fleet did, for each GPU: it does not depend on how many there are."""

    jobs_s: float  # a second
    claims_s: float  # that gave jobs
    events_s: float  # reports of progress that said something new
    busy: float  # share of workers that hold jobs
    open_busy: float  # that hold some and have room
    open_idle: float


def gateways(jobs_s: float) -> int:
    """As many as are half busy; two at least."""
    return max(2, math.ceil(2 * jobs_s * (1 / SUBMITS_S + VIEWS / VIEWS_S)))


def turns_s(news_s: float, every_s: float, after_s: float = 0.0) -> float:
    """Turns a second of a control loop that waits for news and then `after_s`, and no longer than `every_s` in all."""
    left_s = every_s - after_s
    if news_s * left_s < 1e-6:
        return 1 / every_s
    return 1 / (after_s - math.expm1(-news_s * left_s) / news_s)


def demand(shape: Shape, gpus: float, habits: Habits = AS_IS) -> list[Use]:
    """What a fleet of so many asks of Redis, costliest first."""
    costs, jobs_s = habits.costs, shape.jobs_s * gpus
    idle = shape.open_idle * gpus
    news = {"all": (jobs_s, jobs_s), "idle": (0.0, jobs_s), "one": (0.0, jobs_s / max(1.0, idle))}[habits.woken]
    busy_turns, idle_turns = turns_s(news[0], PROGRESS_S, habits.spare_after_s), turns_s(news[1], IDLE_S)
    claims = gpus * (shape.open_busy * busy_turns + shape.open_idle * idle_turns)
    renewals = gpus * (shape.busy / RENEW_S + (1 - shape.busy) * min(1 / RENEW_S, idle_turns))
    reaps = gpus * (shape.busy / REAP_S + (1 - shape.busy) * min(1 / REAP_S, idle_turns))
    doors = gateways(jobs_s)
    told = jobs_s * {"all": gpus, "idle": idle, "one": 1.0}[habits.woken]
    progress = gpus * shape.busy / habits.progress_s
    events = gpus * min(shape.events_s, shape.busy / habits.progress_s if habits.progress_s > PROGRESS_S else math.inf)
    said = (events + 3 * jobs_s) * doors
    scrapes = doors / SCRAPE_S

    def use(name: str, each_second: float, script: float, request: float = costs.request) -> Use:
        return Use(name, each_second, each_second * (script + request) / 1e6)

    found = [
        use("submit", jobs_s, costs.submit),
        use("a submit told to workers", told, costs.told, 0.0),
        use("claim that gives jobs", shape.claims_s * gpus, costs.claim_job * shape.jobs_s / max(1e-9, shape.claims_s)),
        use("claim that comes too late", max(0.0, claims - shape.claims_s * gpus), costs.claim_empty),
        use("commit", jobs_s, costs.commit),
        use("progress", progress, costs.progress + costs.progress_event * events / max(1e-9, progress)),
        use("events told to gateways", said, costs.told, 0.0),
        use("renew", renewals, costs.renew + costs.renew_worker * gpus),
        use("reap", reaps + doors / REAP_S, costs.reap),
        use("view", VIEWS * jobs_s, costs.view),
        use("scrape of a gateway", scrapes, costs.load + costs.load_worker * gpus),
    ]
    return sorted(found, key=lambda one: -one.cores)


def cores(shape: Shape, gpus: float, habits: Habits = AS_IS) -> float:
    """Redis' cores in all; beyond 1, it cannot."""
    return sum(one.cores for one in demand(shape, gpus, habits))


def wall(enough: Callable[[float], float]) -> float:
    """How many GPUs take one core, by bisection."""
    low, high = 1.0, 1e6
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if enough(middle) < 1 else (low, middle)
    return low


def gateway_cores(shape: Shape, gpus: float, costs: Costs = MEASURED) -> float:
    """Of each gateway's core: what it spends on hearing of jobs that nobody follows there."""
    return gpus * (shape.events_s + 3 * shape.jobs_s) * costs.heard / 1e6
