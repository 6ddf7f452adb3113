"""What a worker process tells Prometheus. Labels stay bounded: model, stage, outcome; never a job or a prompt.

A process counts in files of its supervisor's, who reads and serves them: what it counted outlives it, and the process
that takes its place goes on from there. Without a supervisor it counts in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from worker.contract.job import Job

if TYPE_CHECKING:
    from model.pipeline import Lookups

QUEUE_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
RUN_SECONDS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 45, 60, 120, 300)
STAGE_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20)
STEP_SECONDS = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
BATCH_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
BATCH_TOKENS = (256, 512, 1024, 2048, 4096, 6144, 9000, 12_288, 16_384, 32_768)
LOAD_SECONDS = (1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)

PROCESS = "process"
"""What its files are called by: the processes of one folder come one after the other, and each goes on in the same."""


def count_for_supervisor() -> None:
    """Lets all metrics made from now on count in the files of the folder PROMETHEUS_MULTIPROC_DIR."""
    values.ValueClass = values.MultiProcessValue(lambda: PROCESS)  # type: ignore[no-untyped-call]


def forget_gauges(folder: Path) -> None:
    """Says that the process of a folder is gone: it has no memory, no rows and no jobs now."""
    mark_process_dead(PROCESS, str(folder))  # type: ignore[no-untyped-call]


class Counted(Collector):
    """What the processes of some folders counted, added up."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders

    def collect(self) -> Iterable[Metric]:
        """All metrics."""
        found: Iterable[Metric] = MultiProcessCollector.merge(list(self._files()))  # type: ignore[no-untyped-call]
        return found

    def _files(self) -> Iterator[str]:
        for folder in self._folders:
            for file in folder.glob("*.db"):
                with suppress(FileNotFoundError):  # that of gauges, of a process that has just gone
                    if file.stat().st_size:  # it is empty for a moment when it is made
                        yield str(file)


class WorkerMetrics:
    """The worker's collectors, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry, namespace="darkroom")
        gauge = partial(Gauge, registry=self.registry, namespace="darkroom", multiprocess_mode="livesum")
        histogram = partial(Histogram, registry=self.registry, namespace="darkroom")
        self._jobs = counter("jobs", "Jobs ended, by outcome", ["model", "outcome"])
        self._queue = histogram("request_queue_seconds", "From submission to claim", ["model"], buckets=QUEUE_SECONDS)
        self._run = histogram("request_inference_seconds", "From claim to commit", ["model"], buckets=RUN_SECONDS)
        self._stage = histogram("stage_seconds", "One batch of one stage", ["model", "stage"], buckets=STAGE_SECONDS)
        self._step = histogram(
            "denoise_step_seconds", "One denoising step", ["model", "megapixels"], buckets=STEP_SECONDS
        )
        self._rows = histogram("batch_size", "Rows of a denoising step", ["model"], buckets=BATCH_ROWS)
        self._tokens = histogram("batch_tokens", "Tokens of a denoising step", ["model"], buckets=BATCH_TOKENS)
        self._row_steps = counter("row_steps", "Rows denoised, summed over steps", ["model"])
        self._load = histogram("model_load_seconds", "Loading and warming up", ["model"], buckets=LOAD_SECONDS)
        self._loaded = gauge("models_loaded", "Models ready to serve", ["model"])
        self._running = gauge("requests_running", "Jobs that this worker holds")
        self._halved = counter("out_of_memory", "Batches that ran out of GPU memory", ["model", "stage"])
        self._previews = counter("previews", "Previews made", ["model"])
        self._checked = counter("pictures_checked", "Pictures that the safety filter saw", ["model", "outcome"])
        self._overhead = counter("engine_overhead_seconds", "Time of the GPU thread, at work but outside the models")
        self._store_retries = counter("store_retries", "Pictures put again because the store had not taken them")
        self._memory = gauge("gpu_memory_bytes", "GPU memory: allocated, reserved for that, in all", ["gpu", "kind"])
        self._pending = gauge("pending_rows", "Rows that wait for the GPU", ["model"])
        self._hits = counter("embedding_cache_hits", "Texts found in the cache", ["model"])
        self._misses = counter("embedding_cache_misses", "Texts that were encoded", ["model"])
        self._readings: list[Callable[[], None]] = []

    def loaded(self, model: str, seconds: float) -> None:
        """A model is ready."""
        self._load.labels(model).observe(seconds)
        self._loaded.labels(model).set(1)

    def claimed(self, job: Job, queued_s: float) -> None:
        """A job was taken from the queue."""
        self._queue.labels(job.model).observe(max(0.0, queued_s))
        self._running.inc()

    def ended(self, job: Job, outcome: str, run_s: float) -> None:
        """A job is over: succeeded, failed, canceled, or lost (another holds it now)."""
        self._jobs.labels(job.model, outcome).inc()
        self._run.labels(job.model).observe(run_s)

    def let_go(self) -> None:
        """A job that was claimed is not held any more: it is over, or was handed back."""
        self._running.dec()

    def stage(self, job: Job, stage: str, seconds: float) -> None:
        """A stage outside the engine: safety_check, encode_image, upload."""
        self._stage.labels(job.model, stage).observe(seconds)

    def watch(self, pending_rows: Callable[[], Mapping[str, int]], lookups: Mapping[str, Lookups]) -> None:
        """What `refresh` is to read, by model: the rows that wait, the cache's hits and misses."""
        seen = dict.fromkeys(lookups, (0, 0))

        def read() -> None:
            for model, rows in pending_rows().items():
                self._pending.labels(model).set(rows)
            for model, found in lookups.items():
                (hits, misses), seen[model] = seen[model], (found.hits, found.misses)
                self._hits.labels(model).inc(seen[model][0] - hits)
                self._misses.labels(model).inc(seen[model][1] - misses)

        self._readings.append(read)

    def refresh(self) -> None:
        """Reads what is watched. For one thread."""
        for read in self._readings:
            read()

    def gpu_memory(self, gpu: int, sizes: Mapping[str, int]) -> None:
        """How the memory of a GPU is used: bytes, by kind."""
        for kind, size in sizes.items():
            self._memory.labels(str(gpu), kind).set(size)

    def store_retried(self) -> None:
        """The store did not take a picture, and is asked again."""
        self._store_retries.inc()

    def halved(self, job: Job, stage: str) -> None:
        """A batch ran out of memory; `job` is one of those in it."""
        self._halved.labels(job.model, stage).inc()

    def previewed(self, job: Job) -> None:
        """A preview was made."""
        self._previews.labels(job.model).inc()

    def checked(self, job: Job, outcome: str) -> None:
        """The safety filter saw a picture: passed, or blurred."""
        self._checked.labels(job.model, outcome).inc()

    def overhead(self, seconds: float) -> None:
        """One turn of the engine, less its time in a model."""
        self._overhead.inc(max(0.0, seconds))

    def batch(self, job: Job, stage: str, *, rows: int, tokens: int, seconds: float) -> None:
        """The engine ran one batch; `job` is one of those in it."""
        self._stage.labels(job.model, stage).observe(seconds)
        if stage == "denoise":
            megapixels = f"{job.params.width * job.params.height / 2**20:.2g}"
            self._step.labels(job.model, megapixels).observe(seconds)
            self._rows.labels(job.model).observe(rows)
            self._tokens.labels(job.model).observe(tokens)
            self._row_steps.labels(job.model).inc(rows)
