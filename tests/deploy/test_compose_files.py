"""What docker-compose.yml and its overrides promise, read from the files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_settings import BaseSettings

from app.settings import GatewaySettings
from app.stack import StackSettings
from app.webhooks import WebhookSettings
from tests.deploy.compose import merged
from tests.deploy.engine import ROOT
from worker.contract.cards import Limits
from worker.settings import WorkerSettings

MAIN, S3, GPU = "docker-compose.yml", "deploy/compose.s3.yml", "deploy/compose.gpu.yml"
DEFAULT = re.compile(r"\$\{[A-Z0-9_]+:-([^}]*)\}")
ONCE = {"credentials", "first-key", "bucket"}
NOT_SET_IN_COMPOSE = {
    "host": "the image's",
    "port": "the image's; DARKROOM_PORT is that of this machine",
    "drain_s": "no other gateway takes over",
    "device": "the image's",
    "gpus": "that of compose.gpu.yml",
    "metrics_host": "the image's",
    "metrics_port": "the image's",
    "worker_name": "the supervisor's",
    "worker_status": "the supervisor's",
    "pod_name": "of Kubernetes",
    "pod_namespace": "of Kubernetes",
}
STAGE = re.compile(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", re.MULTILINE | re.DOTALL)


def services(*files: str) -> dict[str, dict[str, Any]]:
    """Each service, with the defaults of the variables."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, service in yaml.safe_load(DEFAULT.sub(r"\1", (ROOT / file).read_text()))["services"].items():
            found.setdefault(name, {}).update(service)
    return found


def folders_made(target: str) -> set[str]:
    """What an image of ours has for user 10001: what its stage of the Dockerfile makes, and those below it."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    stages = {name: (base, body) for base, name, body in STAGE.findall(text)}
    made: set[str] = set()
    while target in stages:
        target, body = stages[target]
        for folders in re.findall(r"install -d -o 10001 -g 10001(?: -m \d+)?((?: +/\S+)+)", body):
            made |= set(folders.split())
    return made


def mounts(service: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each named volume of a service, and where it is mounted."""
    for volume in service.get("volumes", []):
        name, folder, *_ = volume.split(":")
        if re.fullmatch(r"\w+", name):
            yield name, folder


def longest_job_s(file: str) -> float:
    """Seconds of the longest job that the limits let in, at the speed that the file was written for."""
    speed = yaml.safe_load((ROOT / file).read_text())["x-longest-job"]
    return Limits().max_num_images * (Limits().max_steps * speed["step_s"] + speed["decode_s"])


@pytest.mark.parametrize("file", [MAIN, GPU])
def test_worker_has_time_to_end_the_longest_job(file: str) -> None:
    worker = services(file)["worker"]
    grace_s = float(worker["environment"]["DARKROOM_GRACE_S"])
    assert longest_job_s(file) < grace_s
    assert float(worker["stop_grace_period"].removesuffix("s")) >= grace_s + 30


def test_sender_of_webhooks_has_more_time_than_its_grace() -> None:
    sender = services(MAIN)["webhooks"]
    assert float(sender["stop_grace_period"].removesuffix("s")) >= float(sender["environment"]["DARKROOM_GRACE_S"]) + 5


@pytest.mark.parametrize("name", sorted(services(MAIN, S3)))
def test_service_is_locked_down_bounded_and_pinned(name: str) -> None:
    service = services(MAIN, S3)[name]
    if name in ("gateway", "worker"):  # the override replaces parts of them
        service = services(MAIN)[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == ("no" if name in ONCE else "unless-stopped")
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert re.search(r":v?\d+\.\d+\.\d+", service["image"])
    assert not str(service.get("user", "10001")).startswith(("0", "root"))


@pytest.mark.parametrize("name", sorted(set(services(MAIN, S3)) - ONCE))
def test_ports_are_published_to_this_machine_alone(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in services(MAIN, S3)[name].get("ports", []))


def test_no_secret_is_in_the_environment_of_a_service_but_the_operators_own() -> None:
    for name, service in services(MAIN, S3).items():
        for variable, value in (service.get("environment") or {}).items():
            secret = re.search("PASSWORD|SECRET|ACCESS_KEY|REDIS_URL", variable)
            assert not secret or variable.endswith("_FILE") or value is None, f"{name}: {variable}"


def test_variables_of_ours_are_settings_of_their_service() -> None:
    of = {
        "gateway": GatewaySettings,
        "webhooks": WebhookSettings,
        "worker": WorkerSettings,
        "first-key": GatewaySettings,
    }
    for name, settings in of.items():
        for variable in services(MAIN)[name]["environment"]:
            field = variable.removeprefix("DARKROOM_").removesuffix("_FILE").lower()
            assert not variable.startswith("DARKROOM_") or field in settings.model_fields, f"{name}: {variable}"


@pytest.mark.parametrize(
    ("service", "settings", "base"),
    [
        ("gateway", GatewaySettings, None),
        ("worker", WorkerSettings, None),
        ("webhooks", WebhookSettings, GatewaySettings),
    ],
)
def test_what_an_operator_sets_reaches_its_service(
    service: str, settings: type[BaseSettings], base: type[BaseSettings] | None
) -> None:
    passed_on = {variable.removesuffix("_FILE") for variable in services(MAIN)[service]["environment"]}
    own = set(settings.model_fields) - set(base.model_fields if base else ())
    assert {name for name in own if f"DARKROOM_{name.upper()}" not in passed_on} <= NOT_SET_IN_COMPOSE.keys()


def test_what_compose_does_not_pass_on_is_a_setting() -> None:
    known = {*GatewaySettings.model_fields, *WorkerSettings.model_fields, *WebhookSettings.model_fields}
    assert NOT_SET_IN_COMPOSE.keys() <= known


def test_what_is_listed_without_a_value_stays_unset() -> None:
    passed_on = {name: service.get("environment", {}) for name, service in services(MAIN).items()}
    for variable in ("CORS_ORIGINS", "KEY_RATE", "KEY_MAX_ACTIVE", "HOLD_S", "PUBLIC_URL", "TRUSTED_PROXIES"):
        assert passed_on["gateway"][f"DARKROOM_{variable}"] is None
    for name in ("gateway", "worker"):
        assert passed_on[name]["OTEL_EXPORTER_OTLP_ENDPOINT"] is None
        assert passed_on[name]["DARKROOM_S3_REGION"] is None


def test_keys_of_a_bucket_are_given_to_who_opens_it_alone() -> None:
    holders = {name for name, one in services(MAIN).items() if "DARKROOM_S3_BUCKET" in (one.get("environment") or {})}
    assert holders == {"gateway", "worker"}


def test_everything_waits_until_what_it_needs_is_healthy() -> None:
    found = services(MAIN, S3)
    for name in ("gateway", "webhooks", "worker"):
        assert services(MAIN)[name]["depends_on"]["redis"] == {"condition": "service_healthy"}
    assert "--wait" in services(MAIN)["first-key"]["command"]  # by itself
    assert {name: found[name]["depends_on"]["s3"] for name in ("gateway", "worker")} == {
        name: {"condition": "service_healthy"} for name in ("gateway", "worker")
    }


def test_a_new_volume_finds_its_folder_in_the_image_and_belongs_to_our_user() -> None:
    """Docker gives it the owner that the folder has in the image, and root's where there is none."""
    for name, service in services(MAIN, S3).items():
        if service["image"].startswith("darkroom-"):
            for volume, folder in mounts(service):
                assert folder in folders_made(service["build"]["target"]), f"{name}: {volume}"


def test_no_other_image_takes_over_a_volume_of_ours() -> None:
    """Docker does it for each container that mounts a volume which is still empty, if its image has the folder."""
    every = services(MAIN, S3)
    ours = {volume for one in every.values() if one["image"].startswith("darkroom-") for volume, _ in mounts(one)}
    others = [mount for one in every.values() if not one["image"].startswith("darkroom-") for mount in mounts(one)]
    assert {folder for volume, folder in others if volume in ours} <= {"/credentials", "/s3"}, "what no image has"


def test_who_waits_for_all_waits_for_the_end_of_what_runs_once() -> None:
    """Of `up --wait`, which has everything run on whose end no service waits for."""
    gates = [gate for one in merged(MAIN, S3).values() for gate in one["depends_on"].items()]
    assert {name for name, gate in gates if gate["condition"] == "service_completed_successfully"} == ONCE
    for name in ONCE:
        assert services(MAIN, S3)[name]["healthcheck"] == {"disable": True}


def test_worker_is_healthy_once_its_models_are_loaded_however_long_that_takes() -> None:
    for files in ((MAIN,), (MAIN, GPU)):
        check = services(*files)["worker"]["healthcheck"]
        assert "/readyz" in check["test"][-1]
        assert float(check["start_period"].removesuffix("s")) >= 1800


@pytest.mark.parametrize("files", [(MAIN,), (MAIN, S3), (MAIN, GPU)], ids=["cpu", "s3", "gpu"])
def test_commands_of_an_operator_take_the_environment_of_every_service(
    files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("redis://:secret@redis:6379/0")
    for name in ("gateway", "webhooks", "worker"):
        for variable in [variable for variable in os.environ if variable.startswith("DARKROOM_")]:
            monkeypatch.delenv(variable)
        for file in files:
            service = yaml.safe_load((ROOT / file).read_text())["services"].get(name, {})
            for variable, value in service.get("environment", {}).items():
                if variable.startswith("DARKROOM_") and value is not None:
                    is_file = variable.endswith("_FILE")
                    monkeypatch.setenv(variable, str(tmp_path / "secret") if is_file else DEFAULT.sub(r"\1", value))
        assert StackSettings().auth in ("auto", "on"), name
