"""Prometheus as the tests use it: our rules and dashboard, the names in their queries, promtool, and a server."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from app.metrics import Metrics
from app.webhooks import SenderMetrics
from tests.processes import wait_until
from worker.contract.settings import ContractSettings
from worker.metrics import WorkerMetrics
from worker.probes import Processes
from worker.supervisor import Supervisor

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
CONFIG, ALERTS, TESTS = FOLDER / "prometheus.yml", FOLDER / "alerts.yml", FOLDER / "tests.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "darkroom.json"

NOT_ON_A_CPU = {"darkroom_gpu_memory_bytes", "darkroom_out_of_memory_total"}
"""Metrics that only a worker with a GPU has: it alone has such memory, and runs out of it."""

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
FROM_PROMETHEUS = {"up", "ALERTS"}


@cache
def read_yaml(file: Path) -> Any:
    return yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def alert_rules() -> dict[str, dict[str, Any]]:
    """The rules of alerts.yml, by name."""
    groups = read_yaml(ALERTS)["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def panels() -> list[dict[str, Any]]:
    """The panels of the dashboard, rows left out."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def panel_queries(interval: str = "1m") -> Iterator[tuple[str, str]]:
    """Title and query of every target of every panel, its variables filled in."""
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", interval).replace("$model", ".*")
            assert "$" not in query, query
            yield panel["title"], query


def names_in(query: str) -> set[str]:
    """The names of metrics in a query."""
    return set(re.findall(r"\b(?:darkroom_\w+|process_\w+|ALERTS|up)\b", re.sub(r'"[^"]*"', '""', query)))


@cache
def exported_names() -> set[str]:
    """What gateway, worker and sender of webhooks may export, and what Prometheus adds."""
    supervisor = Supervisor(ContractSettings(), [], 1)
    collectors: list[Collector] = [Metrics().registry, WorkerMetrics().registry, SenderMetrics().registry]
    return {name for each in [*collectors, Processes(supervisor)] for name in _names_of(each)} | FROM_PROMETHEUS


def _names_of(collector: Collector) -> Iterator[str]:
    metric: Metric
    for metric in collector.collect():
        yield from (metric.name + suffix for suffix in SUFFIXES[metric.type])


def tool(name: str) -> str:
    """Where `prometheus` or `promtool` is."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing; on Debian: apt-get install -y --no-install-recommends prometheus")
    return found


def promtool(*arguments: object) -> None:
    """Runs it; its complaint is the test's."""
    argv = [tool("promtool"), *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A server that runs, asked through its API."""

    def __init__(self, port: int) -> None:
        self._api = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=10)

    def is_ready(self) -> bool:
        try:
            return bool(self._api.get("/status/runtimeinfo").status_code == 200)
        except httpx.TransportError:
            return False

    def query(self, query: str) -> list[dict[str, Any]]:
        """The samples of an instant query, now."""
        return list(self._get("/query", query=query)["result"])

    def values(self, query: str) -> list[float]:
        return [float(sample["value"][1]) for sample in self.query(query)]

    def rules(self) -> list[dict[str, Any]]:
        """Every alert rule, with its state and health."""
        return [rule for group in self._get("/rules")["groups"] for rule in group["rules"]]

    def targets(self) -> dict[str, str]:
        """The health of each job's target."""
        return {target["labels"]["job"]: target["health"] for target in self._get("/targets")["activeTargets"]}

    def _get(self, path: str, **params: str) -> Any:
        answer = self._api.get(path, params=params).json()
        assert answer["status"] == "success", f"{params}: {answer}"
        return answer["data"]

    def close(self) -> None:
        self._api.close()


@contextmanager
def running_prometheus(folder: Path, targets: Mapping[str, str]) -> Iterator[Prometheus]:
    """A server with our own configuration, but each job at another place, and scraped every second."""
    config = deepcopy(read_yaml(CONFIG))
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ALERTS)]
    assert {job["job_name"] for job in config["scrape_configs"]} == set(targets)
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    file, port = folder / "prometheus.yml", free_port()
    file.write_text(yaml.safe_dump(config))
    options = {"config.file": file, "storage.tsdb.path": folder / "data", "web.listen-address": f"127.0.0.1:{port}"}
    argv = [tool("prometheus"), *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "prometheus.log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        prometheus = Prometheus(port)
        try:
            wait_until(lambda: prometheus.is_ready() or process.poll() is not None, 30)
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            yield prometheus
        finally:
            prometheus.close()
            process.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
