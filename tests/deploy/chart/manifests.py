"""What the chart renders to, and how to ask about it."""

from __future__ import annotations

import subprocess
from typing import Any

import yaml

from tests.deploy.tools import ROOT, helm, run

CHART = ROOT / "deploy" / "chart" / "darkroom"
VALUES = ROOT / "deploy" / "chart" / "values"
EXAMPLES = ("demo", "fleet", "folder")
PODS = {"Deployment", "StatefulSet", "Job"}
KEDA: dict[str, object] = {"keda__enabled": "true", "keda__prometheus__serverAddress": "http://prometheus:9090"}

Manifest = dict[str, Any]


def render(*options: object, release: str = "darkroom") -> list[Manifest]:
    """The manifests of the chart in the namespace `pictures`, with values files and --set as helm takes them."""
    text = run(helm(), "template", release, CHART, "--namespace", "pictures", *options)
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]


def refusal(*options: object) -> str:
    """What helm says when it refuses these options."""
    argv = [helm(), "template", "darkroom", CHART, *options]
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0, f"{options} were taken"
    return done.stderr


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [one for one in of_kind(manifests, kind) if one["metadata"]["name"] == name]
    return found


def templates(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The pod templates, by kind and name."""
    return {f"{m['kind']}/{m['metadata']['name']}": m["spec"]["template"] for m in of_kind(manifests, *PODS)}


def containers(template: Manifest) -> list[Manifest]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def env_of(container: Manifest) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "from the pod") for entry in container.get("env", [])}


def component(template: Manifest) -> str:
    return str(template["metadata"]["labels"]["app.kubernetes.io/component"])


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    if any(labels.get(name) != value for name, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def set_values(**values: object) -> list[str]:
    """--set for each; a double underscore stands for a dot."""
    return [part for name, value in values.items() for part in ("--set", f"{name.replace('__', '.')}={value}")]


def announced(manifests: list[Manifest]) -> list[str]:
    """Names of the Jobs, which all announce models."""
    return [one["metadata"]["name"] for one in of_kind(manifests, "Job")]
