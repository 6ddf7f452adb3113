"""Worker sets that follow the work: to zero, from zero, and on which numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from app.metrics import Metrics
from tests.deploy.chart.manifests import (
    VALUES,
    Manifest,
    announced,
    env_of,
    named,
    of_kind,
    render,
    set_values,
    templates,
)
from tests.deploy.prometheus import CONFIG, alert_rules, promtool, read_yaml
from tests.deploy.tools import ROOT

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(700)]


def queries(manifests: list[Manifest], name: str) -> tuple[str, str]:
    work, unknown = named(manifests, "ScaledObject", name)["spec"]["triggers"]
    return work["metadata"]["query"], unknown["metadata"]["query"]


def test_workers_scale_on_seconds_of_work_to_zero_and_slowly_down(fleet: list[Manifest]) -> None:
    spec = named(fleet, "ScaledObject", "darkroom-worker-large")["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"], spec["cooldownPeriod"]) == (0, 8, 600)
    assert spec["fallback"]["behavior"] == "currentReplicasIfHigher"
    down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] >= 600
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 60}]
    work, _ = spec["triggers"]
    assert (work["type"], work["metricType"], work["metadata"]["threshold"]) == ("prometheus", "AverageValue", "90")
    for trigger in spec["triggers"]:
        assert all(isinstance(value, str) for value in trigger["metadata"].values())
        assert trigger["metadata"]["activationThreshold"] == "0"
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert trigger["metadata"]["serverAddress"] == "http://prometheus-operated.monitoring.svc:9090"


def test_a_pod_with_two_gpus_is_given_twice_the_work(fleet: list[Manifest]) -> None:
    work, _ = named(fleet, "ScaledObject", "darkroom-worker-medium")["spec"]["triggers"]
    assert work["metadata"]["threshold"] == "120"


def test_queries_name_metrics_that_gateways_export(fleet: list[Manifest]) -> None:
    exported = {metric.name for metric in Metrics().registry.collect()}
    for scaled in of_kind(fleet, "ScaledObject"):
        for query in queries(fleet, scaled["metadata"]["name"]):
            assert set(re.findall(r"darkroom_[a-z_]+", query.replace("darkroom-gateway", ""))) <= exported


GATEWAY = 'namespace="pictures",service="darkroom-gateway"'
A, B = f'{GATEWAY},pod="a"', f'{GATEWAY},pod="b"'
LARGE, TURBO, OTHER = 'model="sd3.5-large"', 'model="sd3.5-large-turbo"', 'model="sd3.5-medium"'


def series(name: str, labels: str, value: float) -> dict[str, str]:
    return {"series": f"{name}{{{labels}}}", "values": f"{value}+0x5"}


def work_of(gateway: str, model: str, seconds: float) -> dict[str, str]:
    return series("darkroom_queue_seconds", f"{gateway},{model}", seconds)


def known(*labels: str) -> list[dict[str, str]]:
    return [series("darkroom_model_workers", label, 0) for label in labels]


UP = [series("darkroom_queue_up", A, 1), series("darkroom_queue_up", B, 1)]
BOTH_KNOWN = known(f"{A},{LARGE}", f"{A},{TURBO}", f"{B},{LARGE}", f"{B},{TURBO}")


@pytest.mark.parametrize(
    ("seen", "work", "unknown"),
    [
        # Two gateways tell the same queue, of which max counts; models of a set add up; others' work is not ours
        (
            [
                *UP, *BOTH_KNOWN,
                work_of(A, LARGE, 40), work_of(B, LARGE, 41), work_of(A, TURBO, 7),
                work_of(A, OTHER, 1000), work_of('namespace="other",service="darkroom-gateway"', LARGE, 5000),
            ], 48, 0,
        ),
        # What three workers need a minute for is three minutes of one: more workers must not look like less work
        (
            [
                *UP, *known(f"{A},{TURBO}"), series("darkroom_model_workers", f"{A},{LARGE}", 3), work_of(A, LARGE, 60),
                work_of(A, TURBO, 0),
            ], 180, 0,
        ),
        # Nothing to do
        ([*UP, *BOTH_KNOWN, work_of(A, LARGE, 0)], 0, 0),
        # One of two models is not known yet, or none: one worker
        ([*UP, *known(f"{A},{LARGE}"), work_of(A, LARGE, 0)], 0, 1),
        (UP, None, 1),
        # A gateway without Redis knows nothing, and says so: no worker would help
        ([series("darkroom_queue_up", A, 0)], None, 0),
        # No gateway is seen at all: an answer would be a guess, and the fallback counts
        ([], None, None),
    ],
    ids=["work of two gateways", "three workers", "idle", "one unknown", "none known", "redis away", "nothing scraped"],
)  # fmt: skip
def test_queries_mean_what_they_say(
    fleet: list[Manifest], seen: list[dict[str, str]], work: float | None, unknown: float | None, tmp_path: Path
) -> None:
    asked = dict(zip(("work", "unknown"), queries(fleet, "darkroom-worker-large"), strict=True))
    rules = {"groups": [{"name": "keda", "rules": [{"record": name, "expr": query} for name, query in asked.items()]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    expected = [
        {"expr": name, "eval_time": "2m", "exp_samples": [] if value is None else [{"labels": name, "value": value}]}
        for name, value in (("work", work), ("unknown", unknown))
    ]
    test = {
        "rule_files": ["rules.yml"],
        "tests": [{"interval": "1m", "input_series": seen, "promql_expr_test": expected}],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    promtool("test", "rules", tmp_path / "test.yml")


def test_models_of_sets_that_start_from_zero_are_announced_by_a_job(fleet: list[Manifest]) -> None:
    (job,) = of_kind(fleet, "Job")  # medium always has a worker
    (container,) = job["spec"]["template"]["spec"]["containers"]
    worker = templates(fleet)["Deployment/darkroom-worker-large"]["spec"]["containers"][0]
    assert container["args"] == ["worker", "--announce"]
    assert container["image"] == worker["image"]
    assert env_of(container)["DARKROOM_MODELS"] == env_of(worker)["DARKROOM_MODELS"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_sets_that_always_have_a_worker_need_no_announcement(demo: list[Manifest], folder: list[Manifest]) -> None:
    assert of_kind(demo, "Job") == of_kind(folder, "Job") == []


def test_a_set_without_replicas_is_announced_where_something_else_scales_it() -> None:
    assert announced(render("-f", VALUES / "demo.yaml", *set_values(workers__demo__replicas=0)))


def test_announcement_runs_again_when_what_it_says_changes_and_only_then() -> None:
    """A Job cannot be changed, so that one of the same name must be the same."""
    first = announced(render("-f", VALUES / "fleet.yaml"))
    assert first == announced(render("-f", VALUES / "fleet.yaml", *set_values(gateway__drainSeconds=99)))
    for changed in (
        {"workers__large__models[2]__name": "demo"},
        {"image__tag": "0.2.0"},
        {"weights__existingClaim": "others"},
        {"redis__existingSecret": "others"},
    ):
        assert first != announced(render("-f", VALUES / "fleet.yaml", *set_values(**changed)))


def test_alerts_are_those_of_the_repository(fleet: list[Manifest]) -> None:
    (rule,) = of_kind(fleet, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())


def test_alerts_link_to_the_runbook_where_people_read_it() -> None:
    values = set_values(monitoring__enabled="true", monitoring__runbookUrl="https://wiki.example.com/darkroom")
    (rule,) = of_kind(render("-f", VALUES / "demo.yaml", *values), "PrometheusRule")
    rules = [one for group in rule["spec"]["groups"] for one in group["rules"]]
    assert {one["alert"]: one["annotations"]["runbook_url"] for one in rules} == {
        name: f"https://wiki.example.com/darkroom#{name.lower()}" for name in alert_rules()
    }


def test_alerts_find_their_targets_whatever_the_release_is_called() -> None:
    values = set_values(monitoring__enabled="true", fullnameOverride="pictures")
    monitors = of_kind(render("-f", VALUES / "demo.yaml", *values), "ServiceMonitor", "PodMonitor")
    endpoints = [one for m in monitors for one in m["spec"].get("endpoints") or m["spec"]["podMetricsEndpoints"]]
    jobs = {relabeled["replacement"] for one in endpoints for relabeled in one["relabelings"]}
    assert jobs == {job["job_name"] for job in read_yaml(CONFIG)["scrape_configs"]}


def test_dashboards_are_those_of_the_repository(fleet: list[Manifest]) -> None:
    shown = {
        name: text
        for one in of_kind(fleet, "ConfigMap")
        for name, text in one["data"].items()
        if name.endswith(".json")
    }
    dashboards = {
        path.name: json.loads(path.read_text()) for path in (ROOT / "deploy" / "grafana" / "dashboards").glob("*.json")
    }
    assert {name: json.loads(text) for name, text in shown.items()} == dashboards
