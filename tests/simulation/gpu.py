"""One GPU: the engine's turn without tensors. The worker's own scheduler, budget and forecast decide."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.benchmarks.workload import Request
from tests.simulation.pace import TEXT_TOKENS, Pace, tokens_of
from worker.budget import TOKENS, Budget
from worker.contract.job import Priority
from worker.forecast import Forecast, Kind
from worker.scheduler import Room, pick
from worker.settings import WorkerSettings

Choose = Callable[["Sequence[Piece]", float, "Callable[[Piece], Room]"], "list[Piece]"]

ENCODE, NOISE, DENOISE, DECODE = STAGES = ("text_encode", "noise", "denoise", "vae_decode")


@dataclass(frozen=True)
class Limits:
    """What a worker holds and batches, unless told otherwise."""

    max_jobs: int = WorkerSettings.model_fields["max_jobs"].default
    max_batch_rows: int = WorkerSettings.model_fields["max_batch_rows"].default
    tokens: int = TOKENS["cuda"]


USUAL: Final = Limits()


@dataclass(frozen=True)
class Stage:
    """One stage of a kind of request, as the scheduler sees it."""

    kind: Kind
    rows: int
    tokens: int
    own_s: float


@dataclass(frozen=True)
class Profile:
    """A kind of request and what is known of it once a worker is warm."""

    request: Request
    stages: Mapping[str, Stage]

    @property
    def step_s(self) -> float:
        return self.stages[DENOISE].own_s

    @property
    def decode_s(self) -> float:
        return self.stages[DECODE].own_s

    @property
    def solo_s(self) -> float:
        """Seconds with nothing beside it."""
        opening = self.stages[ENCODE].own_s + self.stages[NOISE].own_s
        return opening + self.request.steps * self.step_s + self.decode_s

    @property
    def step_tokens(self) -> int:
        return self.stages[DENOISE].tokens


def profiles(mix: Iterable[Request], pace: Pace) -> dict[Request, Profile]:
    """Of every kind of request. Times do not change, so a forecast learns all from the first two batches."""
    forecast, found = Forecast(), {}
    for request in mix:
        shapes = stage_shapes(request, pace.text_tokens)
        for stage, (kind, rows, tokens) in shapes.items():
            for _ in range(2):
                forecast.observe(kind, rows, tokens, pace.seconds(request.model, request.side, stage, rows))
        stages = {
            stage: Stage(kind, rows, tokens, forecast.expected(kind, rows, tokens))
            for stage, (kind, rows, tokens) in shapes.items()
        }
        found[request] = Profile(request, stages)
    return found


def stage_shapes(request: Request, text_tokens: int) -> dict[str, tuple[Kind, int, int]]:
    """Kind, rows and tokens of each stage, as the works of one picture have them."""
    rows, cells = (2 if request.guidance_scale > 1 else 1), (request.side // 8,) * 2
    joint = tokens_of(request.side, text_tokens)
    found = {ENCODE: (rows, rows * TEXT_TOKENS), NOISE: (1, 0), DENOISE: (rows, rows * joint)}
    found[DECODE] = 1, joint - text_tokens
    return {
        stage: (Kind(request.model, stage, () if stage == ENCODE else cells), *size) for stage, size in found.items()
    }


@dataclass(eq=False, slots=True)
class SimJob:
    """One job, of one picture; times in seconds from the start."""

    profile: Profile
    at: float
    owner: str = ""
    priority: Priority = "normal"
    claimed: float = -1.0
    ended: float = -1.0  # its last batch is over
    delivered: float = -1.0  # committed
    window: int = -1  # of progress reports: the last in which it had made a step

    @property
    def model(self) -> str:
        return self.profile.request.model


@dataclass(eq=False, slots=True)
class Piece:
    """What a job waits for: a `worker.scheduler.Pending`."""

    job: SimJob
    stage: str
    key: Hashable
    kind: Kind
    rows: int
    tokens: int
    priority: Priority
    opening: bool
    since: float
    own_s: float
    left_s: float
    steps_left: int


class Gpu:
    """Holds jobs and runs their batches one after the other. Whoever owns the clock asks for the next."""

    def __init__(
        self,
        models: Sequence[str],
        pace: Pace,
        limits: Limits = USUAL,
        *,
        choose: Choose = pick,
        skip_alone: bool = True,
    ) -> None:
        self._models, self._pace, self._limits = list(models), pace, limits
        self._choose, self._skip_alone = choose, skip_alone
        self.budget = Budget(limits.max_batch_rows, dict.fromkeys(models, limits.tokens))
        self.held: dict[SimJob, int] = {}
        self.batches = 0
        self.busy_s = 0.0
        self._rooms: dict[str, int] = {}  # by model; empty: what is held has changed
        self._inbox: list[SimJob] = []
        self._pending: list[Piece] = []
        self._batch: list[Piece] = []
        self._steps, self._step_s, self._began = 1, 0.0, 0.0  # of the batch that runs: more than one if it is alone

    @property
    def running(self) -> bool:
        """Whether a batch runs."""
        return bool(self._batch)

    def room(self, model: str | None = None) -> int:
        """As `Engine.room`."""
        if not self._rooms:
            self._rooms = {name: max(0, self.budget.wanted(name, self._tokens(name))) for name in self._models}
        rooms = sum(self._rooms.values()) if model is None else self._rooms[model]
        return max(0, min(self._limits.max_jobs - len(self.held), rooms))

    def submit(self, job: SimJob) -> None:
        """Takes a job; it is looked at when the batch that runs is over."""
        self.held[job] = job.profile.step_tokens
        self._rooms.clear()
        self._inbox.append(job)

    def cut(self, now: float) -> float | None:
        """When the step that runs now is over, if more steps were meant to follow without looking; else None."""
        if self._steps == 1 or not self._batch:
            return None
        done = min(self._steps, int((now - self._began) / self._step_s) + 1)
        if done == self._steps:
            return None
        self._steps = done
        return self._began + done * self._step_s

    def begin(self, now: float) -> float | None:
        """Starts the next batch; gives when it will be over, or None: there is nothing to do."""
        for job in self._inbox:
            self._pending.append(self._piece(job, now))
        self._inbox.clear()
        batch = self._choose(self._pending, now, lambda piece: self.budget.room(piece.kind))
        if not batch:
            return None
        first, self._steps = batch[0], 1
        if len(self._pending) == 1:
            self._pending = []
            if first.stage == DENOISE and self._skip_alone:
                self._steps = first.steps_left
        else:
            self._pending = [piece for piece in self._pending if piece not in batch]
        request = first.job.profile.request
        rows = sum(piece.rows for piece in batch)
        self._step_s = self._pace.seconds(request.model, request.side, first.stage, rows)
        self._batch, self._began = batch, now
        return now + self._steps * self._step_s

    def finish(self, now: float) -> list[SimJob]:
        """The batch that runs is over; gives the jobs that ended with it."""
        batch, self._batch = self._batch, []
        self.batches += self._steps
        self.busy_s += self._steps * self._step_s
        ended = []
        for piece in batch:
            if piece.stage == DECODE:
                piece.job.ended = now
                del self.held[piece.job]
                self._rooms.clear()
                ended.append(piece.job)
            else:
                self._advance(piece, now)
                self._pending.append(piece)
        return ended

    def steps_of_batch(self) -> tuple[list[SimJob], float, int]:
        """The jobs that make steps in the batch that runs, when it began, how many steps; no jobs in other stages."""
        jobs = [piece.job for piece in self._batch] if self._batch and self._batch[0].stage == DENOISE else []
        return jobs, self._began, self._steps

    def _tokens(self, model: str) -> list[int]:
        return [tokens for job, tokens in self.held.items() if job.model == model]

    def _piece(self, job: SimJob, now: float) -> Piece:
        stage, profile = job.profile.stages[ENCODE], job.profile
        left_s = profile.request.steps * profile.step_s + profile.decode_s
        return Piece(
            job, ENCODE, (job.model, ENCODE), stage.kind, stage.rows, stage.tokens, job.priority, True, now,
            stage.own_s, left_s, profile.request.steps,
        )  # fmt: skip

    def _advance(self, piece: Piece, now: float) -> None:
        """From one work to the next, as a picture's generator yields them."""
        profile = piece.job.profile
        piece.since = now
        match piece.stage:
            case "text_encode":
                self._enter(piece, NOISE, (piece.job.model, NOISE))
            case "noise":
                self._enter(piece, DENOISE, piece.kind)
                piece.opening, piece.key = False, piece.kind
            case _:
                piece.steps_left -= self._steps
                piece.left_s = piece.steps_left * profile.step_s + profile.decode_s
                if not piece.steps_left:
                    self._enter(piece, DECODE, piece)

    def _enter(self, piece: Piece, name: str, key: Hashable) -> None:
        stage = piece.job.profile.stages[name]
        piece.stage, piece.key, piece.kind = name, key, stage.kind
        piece.rows, piece.tokens, piece.own_s = stage.rows, stage.tokens, stage.own_s
