"""What the chart runs: as whom, with which variables, how it is probed and how it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from app.cli import cli
from app.settings import GatewaySettings
from app.webhooks import WebhookSettings
from tests.deploy.chart.manifests import (
    CHART,
    KEDA,
    PODS,
    VALUES,
    Manifest,
    announced,
    component,
    containers,
    env_of,
    of_kind,
    render,
    set_values,
    templates,
)
from worker.contract.cards import Limits
from worker.settings import WorkerSettings

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(700)]

SETTINGS = {"gateway": GatewaySettings, "webhooks": WebhookSettings, "worker": WorkerSettings}
STOP_S = 15
"""What a worker needs after its grace to hand back, store and say goodbye; an upper bound."""

MEASURED_LARGE = 28 * 2 * 1.048576 / 5.57
"""Megapixel-steps a second of Large on one H100, the slowest model: 28 guided steps of 1024x1024 in 5.57 s."""

SLOWER_AT_TWO_MEGAPIXELS = 0.75


def test_pods_are_nobodys_root_and_write_only_to_what_is_mounted(manifests: list[Manifest]) -> None:
    for where, template in templates(manifests).items():
        pod = template["spec"]["securityContext"]
        assert (pod["runAsNonRoot"], pod["runAsUser"], pod["seccompProfile"]) == (
            True,
            10001,
            {"type": "RuntimeDefault"},
        ), where
        for container in containers(template):
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] is True, where
            assert own["allowPrivilegeEscalation"] is False, where
            assert own["capabilities"] == {"drop": ["ALL"]}, where


def test_only_workers_have_a_token_and_it_patches_pods_only(manifests: list[Manifest]) -> None:
    with_token = {where for where, one in templates(manifests).items() if one["spec"]["automountServiceAccountToken"]}
    workers = {where for where, one in templates(manifests).items() if component(one) == "worker"}
    assert with_token == workers
    assert all(one["automountServiceAccountToken"] is False for one in of_kind(manifests, "ServiceAccount"))
    (role,) = of_kind(manifests, "Role")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["patch"]}]
    (binding,) = of_kind(manifests, "RoleBinding")
    (subject,) = binding["subjects"]
    accounts = {
        one["spec"]["serviceAccountName"] for one in templates(manifests).values() if component(one) == "worker"
    }
    assert accounts == {subject["name"]}
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_without_deletion_cost_nobody_has_a_token() -> None:
    manifests = render("-f", VALUES / "fleet.yaml", *set_values(deletionCost__enabled="false"))
    assert not any(one["spec"]["automountServiceAccountToken"] for one in templates(manifests).values())
    assert of_kind(manifests, "Role", "RoleBinding") == []
    assert not any("DARKROOM_POD_NAME" in env_of(c) for one in templates(manifests).values() for c in containers(one))


def test_service_accounts_of_pods_exist(manifests: list[Manifest]) -> None:
    accounts = {one["metadata"]["name"] for one in of_kind(manifests, "ServiceAccount")}
    assert {one["spec"]["serviceAccountName"] for one in templates(manifests).values()} <= accounts


def test_services_leave_no_variables_that_look_like_settings(manifests: list[Manifest]) -> None:
    assert all(one["spec"]["enableServiceLinks"] is False for one in templates(manifests).values())


def test_mounts_have_volumes_and_claims_exist_or_are_the_operators(manifests: list[Manifest]) -> None:
    made = {one["metadata"]["name"] for one in of_kind(manifests, "PersistentVolumeClaim")} | {"sd35-weights"}
    for workload in of_kind(manifests, *PODS):
        spec = workload["spec"]["template"]["spec"]
        claimed = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        mounted = {
            mount["name"] for one in containers(workload["spec"]["template"]) for mount in one.get("volumeMounts", [])
        }
        assert mounted == volumes | claimed
        claims = {
            v["persistentVolumeClaim"]["claimName"] for v in spec.get("volumes", []) if "persistentVolumeClaim" in v
        }
        assert claims <= made


def settings_of(manifests: list[Manifest], folder: Path) -> Iterator[GatewaySettings | WorkerSettings]:
    """The settings of each process of ours, read from its variables as it would; files hold what their Secret does."""
    contents = {"REDIS_URL": "redis://:secret@redis.example:6379/0"}
    shared = {name: value for one in of_kind(manifests, "ConfigMap") for name, value in one["data"].items()}
    for container in [container for template in templates(manifests).values() for container in containers(template)]:
        if (settings := SETTINGS.get(container.get("args", [""])[0])) is None:
            continue
        env = (shared if "envFrom" in container else {}) | env_of(container)
        env = {name: value for name, value in env.items() if name.startswith("DARKROOM_")}
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("DARKROOM_")]:
                patch.delenv(name)
            for name, value in env.items():
                plain = name.removeprefix("DARKROOM_").removesuffix("_FILE")
                assert plain.lower() in settings.model_fields, name
                if name.endswith("_FILE"):
                    (folder / plain).write_text(contents.get(plain, "secret"))
                    value = str(folder / plain)
                patch.setenv(name, value)
            yield settings()


def test_processes_take_their_variables(manifests: list[Manifest], tmp_path: Path) -> None:
    assert len(list(settings_of(manifests, tmp_path))) >= 3


def test_s3_of_ones_own_is_told_to_gateways_and_workers_but_not_to_webhooks(tmp_path: Path) -> None:
    own = {"bucket": "pictures", "endpoint": "http://minio:9000", "pathStyle": "yes", "existingSecret": "s3"}
    manifests = render("-f", VALUES / "demo.yaml", *set_values(**{f"store__s3__{k}": v for k, v in own.items()}))
    told = {type(one): one for one in settings_of(manifests, tmp_path)}
    assert told[WebhookSettings].s3_bucket is None
    for kind in (GatewaySettings, WorkerSettings):
        assert (told[kind].s3_bucket, str(told[kind].s3_endpoint)) == ("pictures", "http://minio:9000/")
        assert told[kind].s3_access_key_id == "secret"
        assert told[kind].s3_path_style is True
    assert not [one for one in of_kind(manifests, "PersistentVolumeClaim") if "pictures" in one["metadata"]["name"]]


def test_commands_are_those_of_darkroom(manifests: list[Manifest]) -> None:
    commands = typer.main.get_command(cli).commands  # type: ignore[attr-defined]
    ours = [c for one in templates(manifests).values() for c in containers(one) if "darkroom-" in c["image"]]
    assert ours
    for container in ours:
        name, *arguments = container["args"]
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= options, container["args"]


def test_settings_of_all_reach_every_process_and_change_its_pods(tmp_path: Path) -> None:
    def with_lifetime(seconds: int) -> list[Manifest]:
        (tmp_path / "own.yaml").write_text(yaml.safe_dump({"settings": {"DARKROOM_RECORD_LIFETIME_S": seconds}}))
        return render("-f", VALUES / "demo.yaml", "-f", tmp_path / "own.yaml", *set_values(**KEDA))

    before, after = with_lifetime(604_800), with_lifetime(1_209_600)
    for where, template in templates(after).items():
        if component(template) == "redis":
            continue
        for container in template["spec"]["containers"]:
            assert container["envFrom"] == [{"configMapRef": {"name": "darkroom-settings"}}], where
    (config,) = of_kind(after, "ConfigMap")
    assert config["data"] == {"DARKROOM_RECORD_LIFETIME_S": "1209600"}
    for where, template in templates(before).items():
        if where.startswith("Deployment/"):
            assert template != templates(after)[where], where
    assert announced(before) != announced(after)


def test_a_collector_of_traces_is_named_to_every_process_at_once(tmp_path: Path) -> None:
    own = {"settings": {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.tracing:4318"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    (config,) = of_kind(render("-f", VALUES / "demo.yaml", "-f", tmp_path / "own.yaml"), "ConfigMap")
    assert config["data"] == own["settings"]


def test_new_labels_of_a_new_chart_restart_nothing(manifests: list[Manifest]) -> None:
    for template in templates(manifests).values():
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(template["metadata"]["labels"])


def test_a_pod_lives_longer_than_its_longest_job(manifests: list[Manifest]) -> None:
    for where, template in templates(manifests).items():
        (container, *_), spec = template["spec"]["containers"], template["spec"]
        if component(template) in ("worker", "webhooks"):
            grace_s = int(env_of(container)["DARKROOM_GRACE_S"])
            assert spec["terminationGracePeriodSeconds"] >= grace_s + STOP_S, where
        if component(template) == "gateway":
            assert spec["terminationGracePeriodSeconds"] >= int(env_of(container)["DARKROOM_DRAIN_S"]) + STOP_S, where


def test_grace_of_a_gpu_worker_covers_the_longest_job_that_limits_allow(fleet: list[Manifest]) -> None:
    limits = Limits()
    work = limits.max_num_images * limits.max_steps * 2 * limits.max_pixels / 1e6
    longest_s = work / (MEASURED_LARGE * SLOWER_AT_TWO_MEGAPIXELS)
    for template in templates(fleet).values():
        if component(template) == "worker":
            assert int(env_of(template["spec"]["containers"][0])["DARKROOM_GRACE_S"]) > longest_s


def test_grace_follows_from_the_longest_job() -> None:
    manifests = render("-f", VALUES / "demo.yaml", *set_values(workers__demo__longestJobSeconds=1000))
    template = templates(manifests)["Deployment/darkroom-worker-demo"]
    assert env_of(template["spec"]["containers"][0])["DARKROOM_GRACE_S"] == "1015"
    assert template["spec"]["terminationGracePeriodSeconds"] == 1045


def test_probes_ask_what_they_mean_and_redis_or_the_store_take_no_gateway_out(manifests: list[Manifest]) -> None:
    asked = {"gateway": ("/readyz", "/healthz", "/healthz"), "worker": ("/readyz", "/healthz", "/readyz")}
    for template in templates(manifests).values():
        if paths := asked.get(component(template)):
            (container,) = template["spec"]["containers"]
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
            assert tuple(probe["path"] for probe in probes) == paths
            assert {ports[probe["port"]] for probe in probes} == {8000 if component(template) == "gateway" else 9464}


def test_everything_that_goes_on_running_has_all_three_probes(manifests: list[Manifest]) -> None:
    for workload in of_kind(manifests, "Deployment", "StatefulSet"):
        for container in workload["spec"]["template"]["spec"]["containers"]:
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container), workload["metadata"]["name"]


def test_models_have_their_time_to_load_before_anything_is_started_again(manifests: list[Manifest]) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for deployment in of_kind(manifests, "Deployment"):
        template = deployment["spec"]["template"]
        if component(template) != "worker":
            continue
        probe = template["spec"]["containers"][0]["startupProbe"]
        asked = values["workers"].get(template["metadata"]["labels"]["darkroom/worker-set"], {}).get("loadSeconds")
        load_s = asked or values["workerDefaults"]["loadSeconds"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= load_s
        assert deployment["spec"]["progressDeadlineSeconds"] > load_s
