"""Many workers on one queue, on a clock of their own: who claims what and when, and what Redis is asked meanwhile."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from tests.benchmarks.workload import Request
from tests.simulation.broker import Broker
from tests.simulation.gpu import USUAL, Choose, Gpu, Limits, SimJob, profiles
from tests.simulation.pace import Pace
from worker.contract.job import Priority
from worker.main import IDLE_S, PROGRESS_S, SPARE_AFTER_S
from worker.scheduler import pick

ARRIVES, ENDS, DELIVERED, TURN, SPARE = range(5)


@dataclass(frozen=True)
class Coming:
    """A request on its way."""

    at: float
    request: Request
    owner: str = ""
    priority: Priority = "normal"


@dataclass(frozen=True)
class Site:
    """How the fleet is set up. hop_s: from a submit until a worker's engine has the job, if a worker waits for it.
    delivery_s: from the last batch to the commit. spare_after_s: how long workers that have jobs leave new ones to
    those that have none; 0: they do not."""

    gpus: int
    pace: Pace
    limits: Limits = USUAL
    hop_s: float = 0.002
    delivery_s: float = 0.15
    spare_after_s: float = SPARE_AFTER_S
    skip_alone: bool = True
    choose: Choose = pick


class Set:
    """Workers, one of which can be drawn at random."""

    def __init__(self) -> None:
        self.members: list[Station] = []
        self._places: dict[Station, int] = {}

    def put(self, member: Station, belongs: bool) -> None:
        """In or out."""
        place = self._places.get(member)
        if belongs == (place is not None):
            return
        if place is None:
            self._places[member] = len(self.members)
            self.members.append(member)
            return
        last = self.members.pop()
        del self._places[member]
        if last is not member:
            self.members[place], self._places[last] = last, place


@dataclass(eq=False)
class Station:
    """A worker: its GPU, and the control loop that claims for it."""

    gpu: Gpu
    running: int = 0  # claimed and not yet committed
    first: int = 0  # the model whose turn it is
    looked: float = 0.0  # when its control loop last came round
    turn_at: float = -1.0
    version: int = 0  # of the batch that runs
    open: bool = False
    busy: bool = False


@dataclass
class Asked:
    """What happened beside the jobs, from `since` on."""

    since: float = 0.0
    until: float = 0.0
    claims: int = 0  # that gave jobs
    progress_events: int = 0
    open_busy_s: float = 0.0  # worker-seconds with room and with jobs
    open_idle_s: float = 0.0  # worker-seconds with room and nothing to do
    busy_s: float = 0.0  # worker-seconds with jobs
    open_busy: int = 0
    open_idle: int = 0
    busy: int = 0


@dataclass
class Run:
    """A fleet over some arrivals."""

    jobs: list[SimJob]
    asked: Asked
    batches: int
    gpu_busy_s: float
    ended: float = 0.0


@dataclass
class Fleet:
    """The simulation itself: a heap of what happens next."""

    site: Site
    mix: Sequence[Request]
    seed: int = 1
    _events: list[tuple[float, int, int, object, int]] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self._models = list(dict.fromkeys(request.model for request in self.mix))
        self._profiles = profiles(self.mix, self.site.pace)
        self._broker: Broker[SimJob] = Broker(self._models)
        self._chance = random.Random(f"{self.seed} claims")
        site = self.site
        self.stations = [
            Station(Gpu(self._models, site.pace, site.limits, choose=site.choose, skip_alone=site.skip_alone))
            for _ in range(site.gpus)
        ]
        self._idle, self._some = ({model: Set() for model in self._models} for _ in range(2))
        self.asked, self._noted = Asked(), 0.0
        for station in self.stations:
            self._refresh(station, 0.0)

    def run(self, arrivals: Iterable[Coming], warm: float = 0.0) -> Run:
        """All arrivals, to their end. warm: from which second on what Redis is asked is counted."""
        jobs: list[SimJob] = []
        now, warming, counted = 0.0, True, self.asked
        coming = iter(arrivals)
        self._arrive(next(coming, None))
        while self._events:
            now, _, what, who, version = heapq.heappop(self._events)
            if warming and now >= warm:
                self._note(now)
                self.asked, warming = self._restarted(now), False
            if what == ARRIVES:
                assert isinstance(who, Coming)
                job = SimJob(self._profiles[who.request], who.at, who.owner, who.priority)
                jobs.append(job)
                self._submit(job, now)
                if (later := next(coming, None)) is None:
                    self._note(now)
                    counted = replace(self.asked, until=now)
                self._arrive(later)
                continue
            if what == SPARE:
                assert isinstance(who, SimJob)
                self._wake(who.model, (self._idle[who.model], self._some[who.model]), now)
                continue
            assert isinstance(who, Station)
            if what == ENDS and version == who.version:
                self._batch_over(who, now)
            elif what == DELIVERED:
                who.running -= 1
                self._turn(who, now)
            elif what == TURN and who.turn_at == now:
                who.turn_at = -1.0
                self._turn(who, now)
        gpus = [station.gpu for station in self.stations]
        return Run(jobs, counted, sum(gpu.batches for gpu in gpus), sum(gpu.busy_s for gpu in gpus), now)

    def _arrive(self, one: Coming | None) -> None:
        if one is not None:
            self._push(one.at, ARRIVES, one)

    def _push(self, at: float, what: int, who: object, version: int = 0) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, what, who, version))

    def _submit(self, job: SimJob, now: float) -> None:
        """All who have room hear of it and claim, in any order; most come too late."""
        self._broker.submit(job, now)
        for model in self._models:
            idle, some = self._idle[model], self._some[model]
            self._wake(model, (idle,) if self.site.spare_after_s else (idle, some), now)
        if self.site.spare_after_s and self._broker.waiting[job.model]:
            self._push(now + self.site.spare_after_s, SPARE, job)

    def _wake(self, model: str, groups: Sequence[Set], now: float) -> None:
        told: set[Station] = set()
        spare_after_s = self.site.spare_after_s if len(groups) > 1 else 0.0
        while count := self._broker.offered(model, now, spare_after_s):
            many = sum(len(group.members) for group in groups)
            few = many <= 8 * (count + len(told))
            if not few:
                chosen = [self._drawn(groups, many)]
            else:
                chosen = [one for group in groups for one in group.members]
                self._chance.shuffle(chosen)
            fresh = [one for one in chosen if one not in told]
            if few and not fresh:
                return
            for one in fresh:
                told.add(one)
                self._turn(one, now)
                if not self._broker.waiting[model]:
                    return

    def _drawn(self, groups: Sequence[Set], many: int) -> Station:
        n = int(self._chance.random() * many)
        for group in groups:
            if n < len(group.members):
                return group.members[n]
            n -= len(group.members)
        raise IndexError(n)

    def _turn(self, station: Station, now: float) -> None:
        """One turn of a worker's control loop: claims what there is room for."""
        station.looked = now
        gpu = station.gpu
        room = min(gpu.room(), self.site.limits.max_jobs - station.running)
        if room > 0:
            models = [model for model in self._models if gpu.room(model)]
            turn = station.first % len(models) if models else 0
            spare_after_s = self.site.spare_after_s if gpu.held else 0.0
            found = self._broker.claim([*models[turn:], *models[:turn]], room, now, spare_after_s) if models else []
            if found:
                station.first = models.index(found[-1].model) + 1
                station.running += len(found)
                self.asked.claims += 1
                for job in found:
                    job.claimed = now
                    gpu.submit(job)
                self._hurry(station, now)
        self._refresh(station, now)

    def _hurry(self, station: Station, now: float) -> None:
        """An idle GPU begins; one that was to make several steps stops after this one."""
        gpu = station.gpu
        if not gpu.running:
            self._begin(station, now + self.site.hop_s)
        elif (at := gpu.cut(now)) is not None:
            station.version += 1
            self._push(at, ENDS, station, station.version)

    def _begin(self, station: Station, now: float) -> None:
        at = station.gpu.begin(now)
        if at is not None:
            station.version += 1
            self._push(at, ENDS, station, station.version)

    def _batch_over(self, station: Station, now: float) -> None:
        gpu = station.gpu
        self._report(*gpu.steps_of_batch(), now)
        ended = gpu.finish(now)
        for _job in ended:
            _job.delivered = now + self.site.delivery_s
            self._push(_job.delivered, DELIVERED, station)
        self._begin(station, now)
        if ended:
            self._refresh(station, now)

    def _report(self, jobs: list[SimJob], began: float, steps: int, now: float) -> None:
        """Counts the reports of progress that say something new."""
        window, first = int(now / PROGRESS_S), int(began / PROGRESS_S)
        for job in jobs:
            if steps > 1:
                self.asked.progress_events += max(1, min(steps, window - first))
            elif window != job.window:
                self.asked.progress_events += 1
            job.window = window

    def _refresh(self, station: Station, now: float) -> None:
        """Notes for which models a worker has room; while something waits that it would take, it looks again."""
        self._note(now)
        gpu, asked = station.gpu, self.asked
        some, holding = station.running < self.site.limits.max_jobs and gpu.room() > 0, station.running > 0
        wanted = False
        for model in self._models:
            is_open = some and gpu.room(model) > 0
            self._idle[model].put(station, is_open and not gpu.held)
            self._some[model].put(station, is_open and bool(gpu.held))
            wanted = wanted or (is_open and self._broker.waiting[model] > 0)
        asked.open_busy += (some and holding) - (station.open and station.busy)
        asked.open_idle += (some and not holding) - (station.open and not station.busy)
        asked.busy += holding - station.busy
        station.open, station.busy = some, holding
        if wanted and station.turn_at < 0:
            every = PROGRESS_S if holding else IDLE_S
            station.turn_at = station.looked + every * (int((now - station.looked) / every) + 1)
            self._push(station.turn_at, TURN, station)

    def _note(self, now: float) -> None:
        asked, seconds = self.asked, now - self._noted
        if seconds > 0:
            asked.open_busy_s += asked.open_busy * seconds
            asked.open_idle_s += asked.open_idle * seconds
            asked.busy_s += asked.busy * seconds
            self._noted = now

    def _restarted(self, now: float) -> Asked:
        old = self.asked
        return Asked(since=now, open_busy=old.open_busy, open_idle=old.open_idle, busy=old.busy)
