"""A job in the engine: its pictures, each a generator of GPU work; and what the engine is told and tells of them."""

from __future__ import annotations

from collections.abc import Generator, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from model.text import CLIP_LENGTH, T5_LENGTH
from model.work import Begin, Decode, Denoise, Encode, Rendering, Work, image_tokens
from worker.contract.job import Failure, Job, Outcome, Priority, Progress
from worker.forecast import Forecast, Kind
from worker.scheduler import Room

if TYPE_CHECKING:
    from worker.tracing import Timeline


@dataclass(eq=False)
class Child:
    """One picture of a task: its generator, the work it waits for, and in the end its rendering."""

    task: Task
    generator: Generator[Work, Any, Rendering]
    work: Work
    since: float  # when the work came up, by the engine's clock
    own_s: float = 0.0  # seconds that the work is expected to take
    rendering: Rendering | None = None

    @property
    def key(self) -> Hashable:
        """Equal keys can share a batch."""
        return self.task.job.model, self.work.key

    @property
    def kind(self) -> Kind:
        """Work of one kind takes equally long."""
        return Kind(self.task.job.model, self.work.stage, self.work.shape)

    @property
    def rows(self) -> int:
        """Rows of the batch that the work takes."""
        return self.work.rows

    @property
    def tokens(self) -> int:
        """Tokens of all its rows."""
        return self.work.tokens

    @property
    def priority(self) -> Priority:
        """Its job's class."""
        return self.task.job.priority

    @property
    def opening(self) -> bool:
        """Whether the work comes before the first step, and may ride with others."""
        return isinstance(self.work, Encode | Begin) and not self.work.deterministic

    @property
    def left_s(self) -> float:
        """Seconds of work that the whole job is expected to have left."""
        return self.task.left_s


@dataclass(eq=False)
class Task:
    """One job in the engine. Other threads read it, may call `cancel`, and set `watched`; all else is the engine's."""

    job: Job
    t5_length: int = T5_LENGTH  # of its model's texts
    children: list[Child] = field(default_factory=list)  # while it runs
    renderings: list[Rendering] = field(default_factory=list)  # once it has succeeded, in order
    steps_done: int = 0
    left_s: float = 0.0  # seconds of work that it is expected to have left
    least_s: float = 0.0  # seconds that it will need at the very least, as far as we can honestly say
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of the batches it rode in, by stage
    gpu_s: float = 0.0  # its share of those, by rows
    outcome: Outcome | None = None
    failure: Failure | None = None
    cancel_requested: bool = False
    watched: bool = False  # somebody wants previews
    preview: tuple[int, Tensor] | None = None  # steps done, and the first picture, (h, w, 3), uint8, on the CPU
    previewed_at: float = float("-inf")
    timeline: Timeline | None = None  # kept where traces are sent

    @property
    def progress(self) -> Progress:
        """Denoising steps done, over all pictures."""
        return Progress(step=self.steps_done, steps=self.job.steps)

    @property
    def rows(self) -> int:
        """Rows of one picture's step."""
        return self.job.params.rows

    @property
    def tokens(self) -> int:
        """Joint tokens of one picture's step."""
        return self.rows * (image_tokens(self.job.params.width, self.job.params.height) + CLIP_LENGTH + self.t5_length)

    def kind(self, stage: str) -> Kind:
        """The kind of its work at a stage."""
        return Kind(self.job.model, stage, (self.job.params.height // 8, self.job.params.width // 8))

    def cancel(self) -> None:
        """Ask the engine to drop this task before its next step."""
        self.cancel_requested = True

    def let_go(self) -> None:
        """Drop the generators and their work, and with them the latents."""
        for child in self.children:
            child.generator.close()
        self.children.clear()

    def expected_s(self, forecast: Forecast) -> float:
        """Seconds of steps and decoding that are left, about, if it had the GPU to itself."""
        step = forecast.expected(self.kind(Denoise.stage), self.rows, self.tokens)
        decode = forecast.expected(self.kind(Decode.stage), 1, self.tokens // self.rows)
        return self._steps_left * step + self._pictures_left * decode

    def surely_s(self, forecast: Forecast, room: Room) -> float:
        """Seconds that it will need at the very least, as far as we can honestly say.

        room : of a denoising batch, which its pictures share unless they are deterministic
        """
        together = min(self._pictures_left, room.rows // self.rows, room.tokens // self.tokens)
        at_once = max(1, 1 if self.job.deterministic else together)
        step = forecast.least(self.kind(Denoise.stage), at_once * self.rows)
        return self._steps_left / at_once * step + self._pictures_left * forecast.least(self.kind(Decode.stage), 1)

    @property
    def _steps_left(self) -> int:
        return self.job.steps - self.steps_done

    @property
    def _pictures_left(self) -> int:
        return sum(child.rendering is None for child in self.children)


@dataclass(frozen=True)
class Current:
    """The piece of work that the GPU thread is in."""

    started: float  # by the engine's clock: monotonic seconds
    predicted_s: float  # generous to the first of its kind
    stage: str
    job_ids: tuple[str, ...]


@dataclass(frozen=True)
class Withdraw:
    """A message to the engine: these jobs are no longer ours."""

    job_ids: frozenset[str]
