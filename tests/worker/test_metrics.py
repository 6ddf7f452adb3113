"""What a worker counts, in memory and in its supervisor's files."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from tests.worker.jobs import make_job
from worker.metrics import Counted, WorkerMetrics, forget_gauges

COUNT = """
import os, signal
from tests.worker.jobs import make_job
from worker.metrics import WorkerMetrics, count_for_supervisor
count_for_supervisor()
metrics = WorkerMetrics()
metrics.loaded("tiny", 2.0)
metrics.claimed(make_job(), 0.3)
metrics.store_retried()
metrics.batch(make_job(), "denoise", rows=2, tokens=40, seconds=0.02)
os.kill(os.getpid(), signal.SIGKILL)
"""


def count_and_die(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    assert subprocess.run([sys.executable, "-c", COUNT], env=env, check=False).returncode == -9


def counted(*folders: Path) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(Counted(folders))
    return registry


def test_what_a_killed_process_counted_is_kept_and_the_next_goes_on_from_there(tmp_path: Path) -> None:
    registry, folder = counted(tmp_path / "0"), tmp_path / "0"
    for deaths in (1, 2, 3):
        count_and_die(folder)
        files = {file.name: file.stat().st_size for file in folder.iterdir()}
        assert registry.get_sample_value("darkroom_batch_size_sum", {"model": "tiny"}) == 2 * deaths
        assert registry.get_sample_value("darkroom_request_queue_seconds_count", {"model": "tiny"}) == deaths
        assert registry.get_sample_value(
            "darkroom_request_queue_seconds_bucket", {"model": "tiny", "le": "0.5"}
        ) == deaths  # fmt: skip
        assert registry.get_sample_value("darkroom_store_retries_total") == deaths
        assert registry.get_sample_value("darkroom_requests_running") == 1
        forget_gauges(folder)
        assert registry.get_sample_value("darkroom_requests_running") is None
        assert registry.get_sample_value("darkroom_models_loaded", {"model": "tiny"}) is None
    count_and_die(folder)
    assert {file.name: file.stat().st_size for file in folder.iterdir()} == files  # deaths leave nothing behind


def test_what_several_processes_counted_is_added_up(tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        count_and_die(folder)
    registry = counted(*folders, tmp_path / "2")  # the last has not started
    assert registry.get_sample_value("darkroom_models_loaded", {"model": "tiny"}) == 2
    assert registry.get_sample_value("darkroom_requests_running") == 2
    assert (
        registry.get_sample_value("darkroom_denoise_step_seconds_count", {"model": "tiny", "megapixels": "0.0039"}) == 2
    )
    forget_gauges(folders[0])
    assert registry.get_sample_value("darkroom_models_loaded", {"model": "tiny"}) == 1


def test_a_file_that_is_being_made_breaks_nothing(tmp_path: Path) -> None:
    count_and_die(tmp_path)
    (tmp_path / "counter_x.db").touch()
    assert counted(tmp_path).get_sample_value("darkroom_store_retries_total") == 1


def test_what_is_watched_is_counted_once_however_often_it_is_read() -> None:
    lookups: Any = SimpleNamespace()
    metrics, rows = WorkerMetrics(), {"tiny": 4}
    metrics.watch(lambda: rows, {"tiny": lookups})
    value = metrics.registry.get_sample_value
    for hits, misses, waiting in ((3, 1, 4), (3, 1, 2), (5, 1, 0)):
        lookups.hits, lookups.misses, rows["tiny"] = hits, misses, waiting
        metrics.refresh()
        assert value("darkroom_embedding_cache_hits_total", {"model": "tiny"}) == hits
        assert value("darkroom_embedding_cache_misses_total", {"model": "tiny"}) == misses
        assert value("darkroom_pending_rows", {"model": "tiny"}) == waiting


def test_no_label_names_a_job_a_prompt_or_who_asked() -> None:
    metrics, job = WorkerMetrics(), replace(make_job(prompt="my secret wish"), owner="somebody")
    metrics.claimed(job, 0.1)
    metrics.batch(job, "denoise", rows=2, tokens=40, seconds=0.02)
    metrics.gpu_memory(0, {"allocated": 1, "reserved": 2, "total": 3})
    metrics.ended(job, "succeeded", 1.0)
    labels = {pair for family in metrics.registry.collect() for s in family.samples for pair in s.labels.items()}
    assert {name for name, _ in labels} == {"model", "outcome", "stage", "megapixels", "gpu", "kind", "le"}
    assert not {"my secret wish", "somebody", job.id} & {value for _, value in labels}
