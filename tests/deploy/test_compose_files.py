"""What docker-compose.yml and its overrides promise, read from the files."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from app.settings import GatewaySettings
from app.webhooks import WebhookSettings
from tests.deploy.engine import ROOT
from worker.contract.cards import Limits
from worker.settings import WorkerSettings

MAIN, S3, GPU = "docker-compose.yml", "deploy/compose.s3.yml", "deploy/compose.gpu.yml"
DEFAULT = re.compile(r"\$\{[A-Z0-9_]+:-([^}]*)\}")
ONCE = {"credentials", "first-key", "bucket"}


def services(*files: str) -> dict[str, dict[str, Any]]:
    """Each service, with the defaults of the variables."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, service in yaml.safe_load(DEFAULT.sub(r"\1", (ROOT / file).read_text()))["services"].items():
            found.setdefault(name, {}).update(service)
    return found


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


def test_no_secret_is_in_the_environment_of_a_service() -> None:
    for name, service in services(MAIN, S3).items():
        for variable in service.get("environment") or {}:
            secret = re.search("PASSWORD|SECRET|ACCESS_KEY|REDIS_URL", variable)
            assert not secret or variable.endswith("_FILE"), f"{name}: {variable}"


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


def test_what_an_operator_sets_reaches_the_gateway_and_traces_the_worker_too() -> None:
    passed_on = {name: service.get("environment", {}) for name, service in services(MAIN).items()}
    for variable in ("CORS_ORIGINS", "KEY_RATE", "KEY_MAX_ACTIVE", "HOLD_S", "PUBLIC_URL", "TRUSTED_PROXIES"):
        assert passed_on["gateway"][f"DARKROOM_{variable}"] is None, "unset stays unset"
    for name in ("gateway", "worker"):
        assert passed_on[name]["OTEL_EXPORTER_OTLP_ENDPOINT"] is None


def test_everything_waits_until_what_it_needs_is_healthy() -> None:
    found = services(MAIN, S3)
    for name in ("first-key", "gateway", "webhooks", "worker"):
        assert services(MAIN)[name]["depends_on"]["redis"] == {"condition": "service_healthy"}
    assert {name: found[name]["depends_on"]["s3"] for name in ("gateway", "worker")} == {
        name: {"condition": "service_healthy"} for name in ("gateway", "worker")
    }
