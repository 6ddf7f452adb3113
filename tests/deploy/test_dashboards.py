"""The dashboard: one layout without overlaps, panels that explain themselves, queries that Prometheus can read."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.prometheus import (
    CONFIG,
    DASHBOARD,
    NOT_ON_A_CPU,
    ROOT,
    alert_rules,
    exported_names,
    names_in,
    panel_queries,
    panels,
    promtool,
    read_yaml,
)

COLUMNS = 24
PROVISIONING = ROOT / "deploy" / "grafana" / "provisioning"
UNITS = {"none", "s", "bytes", "percentunit", "ops", "reqps"}
ROWS = ("Health", "Load", "Latency", "GPU", "Gateway", "Webhooks and store")

FROM_A_GPU = {
    'darkroom_gpu_memory_bytes{instance="worker:9464", gpu="0", kind="allocated"}': "40e9x10",
    'darkroom_gpu_memory_bytes{instance="worker:9464", gpu="0", kind="total"}': "80e9x10",
    'darkroom_out_of_memory_total{instance="worker:9464", model="large", stage="denoise"}': "0+1x10",
}
"""What a worker on a GPU would have said."""


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return read


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    cells = [
        {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        for at in (panel["gridPos"] for panel in everything)
    ]
    assert all(0 <= x < COLUMNS for cell in cells for x, _ in cell)
    assert not any(one & other for one, other in combinations(cells, 2))


def test_rows_lead_from_health_to_the_ways_in_and_out() -> None:
    rows = [panel for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert tuple(row["title"] for row in sorted(rows, key=lambda row: row["gridPos"]["y"])) == ROWS
    assert rows[0]["gridPos"]["y"] == 0


def test_each_panel_says_what_it_shows_in_which_unit_and_from_the_chosen_prometheus() -> None:
    for panel in panels():
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]), panel["title"]
    titles = [panel["title"] for panel in panels() if panel["type"] == "timeseries"]
    assert len(set(titles)) == len(titles)


def test_panels_ask_for_metrics_that_exist() -> None:
    exported = exported_names()
    for title, query in panel_queries():
        assert names_in(query), title
        assert names_in(query) <= exported, title


def test_each_metric_that_alerts_is_on_a_panel() -> None:
    shown = {name for _, query in panel_queries() for name in names_in(query)}
    alerting = {name for rule in alert_rules().values() for name in names_in(rule["expr"])}
    assert alerting - shown == {"up"}  # which is what the alert says of itself


def test_dashboard_is_of_no_instance_in_particular() -> None:
    read = dashboard()
    assert "id" not in read
    assert [variable["name"] for variable in read["templating"]["list"]] == ["datasource", "model"]
    assert "localhost" not in DASHBOARD.read_text()


def test_grafana_looks_where_compose_puts_the_dashboards_and_prometheus() -> None:
    services = read_yaml(ROOT / "docker-compose.yml")["services"]
    (provider,) = read_yaml(PROVISIONING / "dashboards" / "darkroom.yml")["providers"]
    folders = [volume.split(":")[:2] for volume in services["grafana"]["volumes"]]
    assert ["./deploy/grafana/dashboards", provider["options"]["path"]] in folders
    (source,) = read_yaml(PROVISIONING / "datasources" / "prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services


def test_scraped_are_the_services_of_compose() -> None:
    services = read_yaml(ROOT / "docker-compose.yml")["services"]
    jobs = read_yaml(CONFIG)["scrape_configs"]
    hosts = {target.partition(":")[0] for job in jobs for at in job["static_configs"] for target in at["targets"]}
    assert hosts == {"gateway", "worker", "webhooks"}
    assert hosts <= set(services)


@pytest.mark.deploy
def test_prometheus_can_read_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{n}", "expr": query} for n, (_, query) in enumerate(panel_queries())]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", file)


@pytest.mark.deploy
def test_panels_of_the_gpu_show_what_a_gpu_would_say(tmp_path: Path) -> None:
    queries = [query for _, query in panel_queries("5m") if names_in(query) & NOT_ON_A_CPU]
    assert {name for query in queries for name in names_in(query)} == NOT_ON_A_CPU
    expected = [
        {"expr": f"count({query}) > bool 0", "eval_time": "10m", "exp_samples": [{"labels": "{}", "value": 1}]}
        for query in queries
    ]
    series = [{"series": name, "values": values} for name, values in FROM_A_GPU.items()]
    tests = [{"interval": "1m", "input_series": series, "promql_expr_test": expected}]
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", file)
