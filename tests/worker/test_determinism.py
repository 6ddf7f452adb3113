"""A deterministic job gives the same bytes whatever runs beside it, and its fingerprint says under what conditions."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.embeddings import EmbeddingCache
from model.fp8 import use_fp8
from model.pipeline import Pipeline, run
from model.work import generate
from tests.worker.jobs import make_job
from worker.contract.job import Job
from worker.engine import Engine
from worker.fingerprint import fingerprint, parts
from worker.metrics import WorkerMetrics
from worker.models import Loader, Model
from worker.pictures import encode
from worker.settings import ModelSource, WorkerSettings
from worker.task import Task

PROMPTS = ["a red circle", "a dog", "", "the cat on the red mat, and more words than that"]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Nets this small lose more to waiting threads than they gain, most of all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loaded(tiny_bundle: Path, one_thread: None) -> Model:
    return Loader(WorkerSettings(device="cpu", dtype="fp32")).load(ModelSource("tiny", tiny_bundle))


@pytest.fixture(scope="module")
def pipeline(loaded: Model) -> Pipeline:
    return loaded.pipeline


class Bits(torch.nn.Module):
    """Stands for a VAE: its pictures show every bit of the latents, where 8 bits of colour would hide most."""

    def to_pixels(self, latents: Tensor) -> Tensor:
        """(1, 16, h, w) -> (1, 8 * h, 8 * w, 3)."""
        grey = latents.contiguous().view(torch.uint8).reshape(1, 8 * latents.shape[2], 8 * latents.shape[3], 1)
        return grey.expand(-1, -1, -1, 3).contiguous()


@pytest.fixture(scope="module")
def exact(pipeline: Pipeline) -> Pipeline:
    return Pipeline(pipeline.mmdit, Bits(), pipeline.text, shift=pipeline.shift, t5_length=32)  # type: ignore[arg-type]


JOBS = st.builds(
    make_job,
    prompt=st.sampled_from(PROMPTS[:2]),
    negative_prompt=st.sampled_from(PROMPTS[2:]),
    steps=st.integers(1, 3),
    seed=st.integers(0, 3),
    guidance_scale=st.sampled_from([1.0, 3.0]),
    sampler=st.sampled_from(["euler", "dpmpp_2m"]),
    num_images=st.integers(1, 2),
    deterministic=st.booleans(),
    priority=st.sampled_from(["high", "normal", "low"]),
)


def alone(job: Job, pipeline: Pipeline) -> list[bytes]:
    """The files of a job that nothing runs beside, with nothing in the cache."""
    pipeline.text.cache = EmbeddingCache()
    renderings = [
        run(generate(job.params.nth(n), pipeline.shift, deterministic=True), pipeline) for n in range(job.num_images)
    ]
    return [encode(rendering.pixels, job, n) for n, rendering in enumerate(renderings)]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(job=JOBS, others=st.lists(JOBS, max_size=4), moments=st.lists(st.integers(0, 8), min_size=5), warm=st.booleans())
def test_a_deterministic_job_gives_the_same_bytes_under_load_cancels_and_cache_hits(
    job: Job, others: list[Job], moments: list[int], warm: bool, exact: Pipeline
) -> None:
    """Others come at their moments, counted in turns of the engine; every second one of them is cancelled later."""
    job = replace(job, deterministic=True)
    expected = alone(job, exact)
    if not warm:
        exact.text.cache = EmbeddingCache()
    engine = Engine({"tiny": exact}, settings=WorkerSettings(), metrics=WorkerMetrics(), ended=lambda task: None)
    task, rivals = Task(job), [Task(other) for other in others]
    engine.submit(task)
    for turn in range(100):
        for n, rival in enumerate(rivals):
            if moments[n] == turn:
                engine.submit(rival)
            if n % 2 and moments[n] + 3 == turn:
                rival.cancel()
        engine.step()
        if task.outcome:
            break
    assert task.outcome == "succeeded"
    assert [encode(rendering.pixels, job, n) for n, rendering in enumerate(task.renderings)] == expected
    for rival in rivals:
        rival.cancel()
    engine.stop()
    engine.run()


def test_a_deterministic_picture_is_the_same_file_again(pipeline: Pipeline) -> None:
    job = make_job(deterministic=True)
    assert alone(job, pipeline) == alone(job, pipeline)


def test_fingerprint_is_the_same_again_and_short(loaded: Model, pipeline: Pipeline) -> None:
    assert fingerprint(pipeline, loaded.card.revision) == loaded.fingerprint
    assert len(loaded.fingerprint) == 19
    assert loaded.fingerprint.startswith("fp_")


def test_fingerprint_tells_revisions_threads_text_lengths_and_precisions_apart(pipeline: Pipeline) -> None:
    seen = {fingerprint(pipeline, "r1"), fingerprint(pipeline, "r2")}
    shorter = Pipeline(pipeline.mmdit, pipeline.vae, pipeline.text, t5_length=16)
    seen.add(fingerprint(shorter, "r1"))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        seen.add(fingerprint(pipeline, "r1"))
    finally:
        torch.set_num_threads(threads)
    low = deepcopy(pipeline.mmdit)
    use_fp8(low)
    seen.add(fingerprint(Pipeline(low, pipeline.vae, pipeline.text, t5_length=pipeline.t5_length), "r1"))
    assert len(seen) == 5


def test_parts_of_a_fingerprint_name_torch_build_and_dtype(pipeline: Pipeline) -> None:
    told = parts(pipeline, "r1")
    assert told["torch"] == torch.__version__
    assert told["texts"] == pipeline.text.digest
    assert told["dtype"] == "torch.float32"
    assert str(told["build"]).startswith("0.")
    assert told["revision"] == "r1"
