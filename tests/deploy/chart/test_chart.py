"""The Helm chart as a whole: valid, refusing, complete. `make test-deploy`; needs npm for helm, no cluster."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import GatewaySettings
from app.webhooks import WebhookSettings
from tests.deploy.chart.manifests import CHART, EXAMPLES, KEDA, VALUES, Manifest, of_kind, refusal, render, set_values
from tests.deploy.tools import ROOT, checkov, helm, run
from worker.settings import WorkerSettings

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(700)]

CUSTOM = {"ScaledObject", "ServiceMonitor", "PodMonitor", "PrometheusRule"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_chart_lints_without_a_warning(name: str) -> None:
    said = run(helm(), "lint", "--strict", CHART, "-f", VALUES / f"{name}.yaml")
    assert "[WARNING]" not in said
    assert "[ERROR]" not in said


def test_manifests_are_valid_for_kubernetes(manifests: list[Manifest]) -> None:
    from kubernetes_validate import latest_version, validate

    core = [manifest for manifest in manifests if manifest["kind"] not in CUSTOM]
    for manifest, version in product(core, ("1.27", latest_version())):
        validate(manifest, version, strict=True)


def test_custom_kinds_are_the_known_ones(manifests: list[Manifest]) -> None:
    custom = [m for m in manifests if m["apiVersion"].split("/")[0] in ("keda.sh", "monitoring.coreos.com")]
    assert {m["kind"] for m in custom} <= CUSTOM
    assert {m["apiVersion"] for m in custom} <= {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}


def test_names_are_unique_short_and_in_the_release_namespace(manifests: list[Manifest]) -> None:
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(set(names)) == len(names)
    assert {m["metadata"]["namespace"] for m in manifests} == {"pictures"}
    assert all(len(name) <= 63 for _, name in names)


def test_names_stay_short_for_the_longest_release_and_worker_set() -> None:
    long = set_values(
        keda__enabled="true",
        keda__prometheus__serverAddress="http://p:9090",
        **{f"workers__{'w' * 16}__models[0]__name": "demo"},
    )
    for manifest in render("-f", VALUES / "demo.yaml", *long, release="r" * 53):
        assert len(manifest["metadata"]["name"]) <= 63 - len("keda-hpa-") * (manifest["kind"] == "ScaledObject")


def test_names_of_digits_stay_texts() -> None:
    values = set_values(monitoring__enabled="true", **{"workers.4090.models[0].name": "demo"}, **KEDA)
    digits = ("--set-string", "nameOverride=1,fullnameOverride=2", *values)

    def numbers(value: Any, path: str) -> Iterator[str]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from numbers(inner, f"{path}.{name}")
        elif isinstance(value, list):
            for inner in value:
                yield from numbers(inner, path)
        elif not isinstance(value, str):
            yield path

    for manifest in render("-f", VALUES / "demo.yaml", *digits, release="123"):
        where = f"{manifest['kind']} {manifest['metadata']['name']}"
        found = list(numbers(manifest, ""))
        assert [one for one in found if one.endswith(".name") or "abels." in one or ".selector." in one] == [], where


def test_checkov_finds_nothing_that_was_not_thought_about(rendered: dict[str, list[Manifest]], tmp_path: Path) -> None:
    for name, manifests in rendered.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(manifests))
    config = CHART.parent / "checkov.yaml"
    argv = [str(checkov()), "--config-file", str(config), "-d", str(tmp_path), "-o", "json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    report = json.loads(done.stdout)
    findings = [
        f"{one['check_id']} {one['check_name']}: {one['resource']}" for one in report["results"]["failed_checks"]
    ]
    assert findings == []
    assert report["summary"]["passed"] > 500


def test_package_carries_alerts_and_dashboards(tmp_path: Path) -> None:
    run(helm(), "package", CHART, "-d", tmp_path)
    with tarfile.open(next(tmp_path.glob("*.tgz"))) as package:
        names = package.getnames()
        alerts = package.extractfile("darkroom/files/alerts.yml")
        assert alerts is not None
        assert alerts.read() == (ROOT / "deploy" / "prometheus" / "alerts.yml").read_bytes()
    dashboards = {path.name for path in (ROOT / "deploy" / "grafana" / "dashboards").glob("*.json")}
    assert dashboards == {Path(name).name for name in names if "/files/dashboards/" in name}


def test_notes_tell_how_to_get_a_key_and_reach_it_by_names_that_exist(demo: list[Manifest]) -> None:
    options = ("--namespace", "pictures", "-f", VALUES / "demo.yaml", "--dry-run=client")
    notes = run(helm(), "install", "darkroom", CHART, *options).partition("NOTES:")[2]
    assert "exec deploy/darkroom-gateway -- darkroom keys add first" in notes
    assert "port-forward svc/darkroom-gateway 8000" in notes
    assert {"Deployment", "Service"} <= {one["kind"] for one in demo if one["metadata"]["name"] == "darkroom-gateway"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"gatway__replicas": 3}, "additional properties 'gatway' not allowed"),
        ({"redis__enabled": "false"}, "redis.existingSecret is empty"),
        ({"settings__DARKROOM_MODELS": "demo"}, "set it by models of worker sets"),
        ({"settings__DARKROOM_S3_BUCKET": "b"}, "set it by store.s3"),
        ({"settings__PATH": "x"}, "invalid propertyName 'PATH'"),
        ({"settings__DARKROOM_QUEUE_BUOND": 5}, "invalid propertyName 'DARKROOM_QUEUE_BUOND'"),
        (
            {"gateway__autoscaling__min": 20},
            "gateway.autoscaling.max is 10; allowed: gateway.autoscaling.min, which is 20",
        ),
        (
            {"workers__demo__autoscaling__min": 9} | KEDA,
            "workers.demo.autoscaling.max is 4; allowed: its autoscaling.min",
        ),
        ({"store__volume__accessMode": "ReadOnlyMany"}, "must be one of 'ReadWriteOnce', 'ReadWriteOncePod'"),
        ({"redis__maxMemory": "2gb"}, "redis.resources.limits.memory is 1536Mi; allowed: 1.5 times redis.maxMemory"),
        ({"redis__resources__limits__memory": "1.1G"}, "redis.resources.limits.memory is 1.1G; allowed: 1.5 times"),
        ({"workers__demo__longestJobSeconds": 3600}, "maximum: got 3,600, want 3,585"),
        ({"workers__other__gpus": 1}, "workers.other.models is empty"),
        ({"workers__demo__models[0]__name": "Large"}, "'Large' does not match"),
        (
            {"workers__demo__models[0]__name": "m", "workers__demo__models[0]__path": "/models/m"},
            "weights.existingClaim",
        ),
        ({"monitoring__runbookUrl": "deploy/RUNBOOK.md"}, "'deploy/RUNBOOK.md' does not match"),
        ({"keda__enabled": "true"}, "keda.prometheus.serverAddress is empty"),
        ({"ingress__enabled": "true"}, "ingress.host is empty"),
    ],
)
def test_wrong_values_are_refused_with_what_to_do(values: dict[str, object], says: str) -> None:
    assert says in refusal("-f", VALUES / "demo.yaml", *set_values(**values))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"redis__maxMemory": "2gb", "redis__resources__limits__memory": "3Gi"}, "StatefulSet"),
        ({"redis__maxMemory": "2gb", "redis__resources__limits": "null"}, "StatefulSet"),
        ({"gateway__autoscaling__min": 20, "gateway__autoscaling__max": 20}, "HorizontalPodAutoscaler"),
        ({"settings__OTEL_TRACES_SAMPLER": "always_on", "settings__DARKROOM_QUEUE_BOUND": 5}, "ConfigMap"),
    ],
)
def test_values_at_the_edge_are_taken(values: dict[str, object], kind: str) -> None:
    assert of_kind(render("-f", VALUES / "demo.yaml", *set_values(**values)), kind)


def test_settings_are_those_that_the_code_reads() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    named = schema["properties"]["settings"]["propertyNames"]["else"]["enum"]
    classes = (GatewaySettings, WebhookSettings, WorkerSettings)
    assert named == sorted({f"DARKROOM_{name.upper()}" for one in classes for name in one.model_fields})


def test_every_value_of_the_file_is_known_to_the_schema_and_the_other_way_round() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def unknown(value: Any, part: dict[str, Any], path: str) -> Iterator[str]:
        part = schema["definitions"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        if not isinstance(value, dict) or "properties" not in part:
            return
        for name, inner in value.items():
            if name not in part["properties"]:
                yield f"{path}{name}"
            else:
                yield from unknown(inner, part["properties"][name], f"{path}{name}.")

        for name in set(part["properties"]) - set(value) - {"global", "claims", "requests", "limits"}:
            yield f"{path}{name} has no default"

    assert list(unknown(values, schema, "")) == []
