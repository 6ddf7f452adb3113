"""The alert rules: each complete, about metrics that exist, explained in the runbook, and shown to fire."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.deploy.prometheus import (
    ALERTS,
    CONFIG,
    ROOT,
    TESTS,
    alert_rules,
    exported_names,
    names_in,
    promtool,
    read_yaml,
)

RUNBOOK = "deploy/RUNBOOK.md"
RULES = alert_rules()


def unit_tests() -> list[dict[str, Any]]:
    return [test for group in read_yaml(TESTS)["tests"] for test in group.get("alert_rule_test", [])]


def runbook_sections() -> set[str]:
    """The alerts that the runbook has a section for."""
    return set(re.findall(r"^#+ (Darkroom\w+)$", (ROOT / RUNBOOK).read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", RULES)
def test_alert_says_how_bad_it_is_what_to_do_and_where_to_read_on(name: str) -> None:
    rule = RULES[name]
    assert rule["labels"] == {"severity": rule["labels"]["severity"]}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert re.fullmatch(r"[1-9]\d*m", rule["for"])
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"{RUNBOOK}#{name.lower()}"


def test_runbook_has_a_section_for_each_alert_and_no_other() -> None:
    assert runbook_sections() == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_alert_asks_for_metrics_that_exist(name: str) -> None:
    names = names_in(RULES[name]["expr"])
    assert names
    assert names <= exported_names()


def test_each_alert_is_seen_to_fire_and_to_be_silent() -> None:
    firing = {test["alertname"] for test in unit_tests() if test.get("exp_alerts")}
    silent = {test["alertname"] for test in unit_tests() if not test.get("exp_alerts")}
    assert firing == silent == set(RULES)


@pytest.mark.deploy
def test_prometheus_accepts_rules_and_configuration() -> None:
    promtool("check", "rules", ALERTS)
    promtool("check", "config", CONFIG)


@pytest.mark.deploy
def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", TESTS)
