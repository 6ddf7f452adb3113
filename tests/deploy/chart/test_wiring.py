"""Whether the parts of the chart belong together, and who reaches whom."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from app.main import create_app
from app.settings import GatewaySettings
from tests.deploy.chart.manifests import (
    KEDA,
    VALUES,
    Manifest,
    component,
    containers,
    env_of,
    named,
    of_kind,
    render,
    selects,
    set_values,
    templates,
)

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(700)]


def test_selectors_select_their_own_pods_and_no_others(manifests: list[Manifest]) -> None:
    labels = {where: one["metadata"]["labels"] for where, one in templates(manifests).items()}
    for workload in of_kind(manifests, "Deployment", "StatefulSet"):
        where = f"{workload['kind']}/{workload['metadata']['name']}"
        assert [one for one in labels if selects(workload["spec"]["selector"], labels[one])] == [where]
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert [one for one in labels if selects(budget["spec"]["selector"], labels[one])] == [
            f"Deployment/{budget['metadata']['name']}"
        ]


def test_services_and_monitors_find_ports_of_pods(manifests: list[Manifest]) -> None:
    for service in of_kind(manifests, "Service"):
        found = [
            one
            for one in templates(manifests).values()
            if selects({"matchLabels": service["spec"]["selector"]}, one["metadata"]["labels"])
        ]
        ports = {port["name"] for one in found for port in one["spec"]["containers"][0]["ports"]}
        assert ports == {port["targetPort"] for port in service["spec"]["ports"]}
    for monitor in of_kind(manifests, "PodMonitor"):
        found = [
            one
            for one in templates(manifests).values()
            if selects(monitor["spec"]["selector"], one["metadata"]["labels"])
        ]
        ports = {port["name"] for one in found for port in one["spec"]["containers"][0]["ports"]}
        assert ports == {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for monitor in of_kind(manifests, "ServiceMonitor"):
        found = [
            one
            for one in of_kind(manifests, "Service")
            if selects(monitor["spec"]["selector"], one["metadata"]["labels"])
        ]
        assert [one["metadata"]["name"] for one in found] == ["darkroom-gateway"]
        assert {port["name"] for port in found[0]["spec"]["ports"]} == {e["port"] for e in monitor["spec"]["endpoints"]}


def test_autoscalers_have_targets_that_name_no_replicas_themselves(manifests: list[Manifest]) -> None:
    targets = [
        one["spec"]["scaleTargetRef"]["name"] for one in of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject")
    ]
    assert len(set(targets)) == len(targets)
    for deployment in of_kind(manifests, "Deployment"):
        assert ("replicas" in deployment["spec"]) is (deployment["metadata"]["name"] not in targets)
    assert set(targets) <= {one["metadata"]["name"] for one in of_kind(manifests, "Deployment")}


def test_utilization_is_of_cpu_that_is_requested(manifests: list[Manifest]) -> None:
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        deployment = named(manifests, "Deployment", scaler["spec"]["scaleTargetRef"]["name"])
        assert all(
            "cpu" in one["resources"]["requests"] for one in deployment["spec"]["template"]["spec"]["containers"]
        )


def test_gpus_are_asked_for_as_limits_and_each_has_a_process(fleet: list[Manifest]) -> None:
    asked = {}
    for name in ("large", "medium"):
        (container,) = templates(fleet)[f"Deployment/darkroom-worker-{name}"]["spec"]["containers"]
        assert container["image"] == "registry.example/darkroom/darkroom-worker:0.1.0"
        env = env_of(container)
        asked[name] = (
            container["resources"]["limits"]["nvidia.com/gpu"],
            env["DARKROOM_DEVICE"],
            env.get("DARKROOM_GPUS"),
        )
    assert asked == {"large": (1, "cuda", None), "medium": (2, "cuda", "all")}


def test_volume_for_one_node_keeps_all_that_mount_it_together(demo: list[Manifest], folder: list[Manifest]) -> None:
    for manifests, together in ((demo, True), (folder, False)):
        for template in templates(manifests).values():
            volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
            terms = (
                template["spec"]
                .get("affinity", {})
                .get("podAffinity", {})
                .get("requiredDuringSchedulingIgnoredDuringExecution", [])
            )
            assert bool(terms) is (together and "pictures" in volumes)
            for term in terms:
                mates = [
                    one
                    for one in templates(manifests).values()
                    if selects(term["labelSelector"], one["metadata"]["labels"])
                ]
                assert len(mates) == 2
                assert template in mates


def test_weights_are_read_only_for_workers_and_written_by_what_fetches_them(folder: list[Manifest]) -> None:
    (name,) = [where for where, one in templates(folder).items() if component(one) == "worker"]
    fetch, worker = containers(templates(folder)[name])
    assert fetch["args"] == ["fetch", "sd3.5-medium", "--to", "/models/sd3.5-medium"]
    writes = {
        c["name"]: [m.get("readOnly", False) for m in c["volumeMounts"] if m["name"] == "weights"]
        for c in (fetch, worker)
    }
    assert writes == {"fetch-0": [False], "worker": [True]}
    assert env_of(fetch)["DARKROOM_HF_TOKEN_FILE"] == "/run/secrets/hub/token"
    assert "hub-token" not in {mount["name"] for mount in worker["volumeMounts"]}


def test_what_fetches_weights_has_the_variables_and_mounts_of_its_worker_set() -> None:
    mount = {"name": "certificates", "mountPath": "/certificates", "readOnly": "true"}
    values = {
        "env[0].name": "HTTPS_PROXY",
        "env[0].value": "http://proxy:3128",
        "extraVolumes[0].name": "certificates",
        "extraVolumes[0].configMap.name": "certificates",
    } | {f"extraVolumeMounts[0].{name}": value for name, value in mount.items()}
    options = set_values(**{f"workers.medium.{name}": value for name, value in values.items()}, **KEDA)
    fetching = [
        one
        for template in templates(render("-f", VALUES / "folder.yaml", *options)).values()
        for one in template["spec"].get("initContainers", [])
    ]
    assert len(fetching) == 2, "of the worker and of the job that announces its models"
    for container in fetching:
        assert env_of(container)["HTTPS_PROXY"] == "http://proxy:3128"
        assert mount | {"readOnly": True} in container["volumeMounts"]


def test_a_worker_set_says_only_what_differs_also_where_that_is_nothing() -> None:
    values = set_values(workerDefaults__replicas=3, workers__demo__replicas=0, workerDefaults__autoscaling__min=2)
    demo = templates_of(render("-f", VALUES / "demo.yaml", *values))
    assert demo["spec"]["replicas"] == 0
    scaled = [*values, *set_values(workers__demo__autoscaling__min=0, **KEDA)]
    spec = named(render("-f", VALUES / "demo.yaml", *scaled), "ScaledObject", "darkroom-worker-demo")["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 4)


def templates_of(manifests: list[Manifest]) -> Manifest:
    return named(manifests, "Deployment", "darkroom-worker-demo")


def allowed(manifests: list[Manifest], source: Manifest, target: Manifest) -> set[str]:
    """Names of the target's ports that NetworkPolicies let the source reach, both ends asked."""
    ports = {port["name"]: port["containerPort"] for port in target["spec"]["containers"][0].get("ports", [])}

    def open_at(pod: Manifest, direction: str, peer: Manifest, key: str) -> set[str]:
        opened: set[str] = set()
        for policy in of_kind(manifests, "NetworkPolicy"):
            spec = policy["spec"]
            if direction.title() not in spec["policyTypes"] or not selects(
                spec["podSelector"], pod["metadata"]["labels"]
            ):
                continue
            for rule in spec.get(direction) or []:
                peers = rule.get(key)
                if peers and not any(
                    "podSelector" in p and selects(p["podSelector"], peer["metadata"]["labels"]) for p in peers
                ):
                    continue
                wanted = {port["port"] for port in rule.get("ports", [])}
                opened |= {name for name, number in ports.items() if not wanted or {name, number} & wanted}
        return opened

    return open_at(source, "egress", target, "to") & open_at(target, "ingress", source, "from")


def test_every_pod_is_closed_in_both_directions_but_for_what_is_opened(manifests: list[Manifest]) -> None:
    policies = [one["spec"] for one in of_kind(manifests, "NetworkPolicy")]
    for where, template in templates(manifests).items():
        mine = [spec for spec in policies if selects(spec["podSelector"], template["metadata"]["labels"])]
        assert {"Ingress", "Egress"} <= {kind for spec in mine for kind in spec["policyTypes"]}, where


def test_redis_is_reached_by_ours_that_use_it_and_by_nobody_else(demo: list[Manifest]) -> None:
    pods = {component(one): one for one in templates(demo).values()}
    reach = {name: allowed(demo, pod, pods["redis"]) for name, pod in pods.items() if name != "redis"}
    assert reach == {"gateway": {"redis"}, "webhooks": {"redis"}, "worker": {"redis"}}
    stranger = {"metadata": {"labels": {"app": "other"}}}
    (policy,) = [
        one
        for one in of_kind(demo, "NetworkPolicy")
        if one["metadata"]["name"].endswith("-redis") and "to" not in one["metadata"]["name"]
    ]
    peers = [peer for rule in policy["spec"]["ingress"] for peer in rule["from"]]
    assert not any(selects(peer["podSelector"], stranger["metadata"]["labels"]) for peer in peers)


def test_ours_do_not_reach_each_other_but_through_redis(demo: list[Manifest]) -> None:
    pods = {component(one): one for one in templates(demo).values()}
    for source, target in product(pods, pods):
        if target != "redis" and source != target:
            assert allowed(demo, pods[source], pods[target]) == set(), (source, target)


def test_gateway_is_reached_by_ingress_and_monitoring_and_metrics_by_monitoring_only(demo: list[Manifest]) -> None:
    def spaces(name: str) -> list[str]:
        rules = named(demo, "NetworkPolicy", name)["spec"]["ingress"]
        return [p["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for r in rules for p in r["from"]]

    assert spaces("darkroom-gateway") == ["ingress-nginx", "monitoring"]
    assert spaces("darkroom-metrics") == ["monitoring"]


@pytest.mark.parametrize(
    ("endpoint", "said", "port"),
    [
        ("", 0, 443),
        ("https://s3.example", 0, 443),
        ("http://minio.storage", 0, 80),
        ("http://minio.storage:9000", 0, 9000),
        ("https://[fd00::1]:9000/s3", 0, 9000),
        ("https://[fd00::1]", 0, 443),
        ("http://minio.storage:9000", 9001, 9001),
    ],
)
def test_s3_is_reached_on_the_port_of_its_url_unless_another_is_said(endpoint: str, said: int, port: int) -> None:
    values = {"bucket": "pictures", "endpoint": endpoint}
    options = set_values(networkPolicy__s3To__port=said, **{f"store__s3__{k}": v for k, v in values.items()})
    (rule,) = named(render("-f", VALUES / "demo.yaml", *options), "NetworkPolicy", "darkroom-to-s3")["spec"]["egress"]
    assert rule == {"ports": [{"port": port}]}


def flat(routes: list[Any]) -> Iterator[str]:
    """The path of every route of the gateway, those that its document leaves out among them."""
    for route in routes:
        if hasattr(route, "original_router"):
            yield from flat(route.original_router.routes)
        else:
            yield route.path


def test_ingress_passes_on_every_route_but_metrics(fleet: list[Manifest], tmp_path: Path) -> None:
    (rule,) = named(fleet, "Ingress", "darkroom-gateway")["spec"]["rules"]
    paths = {(one["pathType"], one["path"]) for one in rule["http"]["paths"]}

    def passes(route: str) -> bool:
        parts = route.split("/")
        starts = {("Prefix", "/".join(parts[:length]) or "/") for length in range(1, len(parts) + 1)}
        return bool(paths & {("Exact", route), *starts})

    routes = set(flat(create_app(GatewaySettings(store_dir=tmp_path)).routes))
    assert {"/", "/v1/generations", "/healthz", "/playground/{name}", "/openapi.json"} <= routes
    assert {route for route in routes if not passes(route)} == {"/metrics"}


def test_webhooks_leave_for_public_addresses_only(manifests: list[Manifest]) -> None:
    from ipaddress import ip_address, ip_network

    from app.networks import is_public

    (rule,) = named(manifests, "NetworkPolicy", "darkroom-webhooks")["spec"]["egress"]
    assert {port["port"] for port in rule["ports"]} == {443, 8443}
    blocks = [(ip_network(p["ipBlock"]["cidr"]), [ip_network(e) for e in p["ipBlock"]["except"]]) for p in rule["to"]]
    inside = [
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "127.0.0.1",
        "100.64.0.1",
        "168.63.129.16",
        "224.0.0.1",
        "fd00::1",
        "fe80::1",
        "2002:a00::1",
    ]
    outside = ["93.184.216.34", "8.8.8.8", "2606:4700::1111"]
    for text in inside + outside:
        address = ip_address(text)
        opened = any(
            address in block and not any(address in left_out for left_out in without) for block, without in blocks
        )
        assert opened is (text in outside), text
        assert is_public(address) is (text in outside), text
