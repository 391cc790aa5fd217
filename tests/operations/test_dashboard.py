"""The Grafana dashboard, as far as that can be told without Grafana: nothing is misspelt, and nothing is missing."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from partial_fc.metrics import TrainingMetrics
from tests.monitoring import DASHBOARD, ROOT, alerts, panels, recorded, rules

# Of Prometheus, and of every process that prometheus_client serves.
FOREIGN = ("up", "ALERTS", "process_start_time_seconds", "process_resident_memory_bytes")
FOREIGN += ("process_cpu_seconds_total", "process_open_fds")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return content


def lost(source: Any, result: Any, path: str = "") -> Iterator[str]:
    """What of the source isn't in the result, or is another value there."""
    if isinstance(source, dict) and isinstance(result, dict):
        for key, value in source.items():
            if key in result:
                yield from lost(value, result[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(source, list) and isinstance(result, list) and len(source) == len(result):
        for number, (one, other) in enumerate(zip(source, result, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif source != result:
        yield f"{path}: {source!r} became {result!r}"


def unknown(content: dict[str, Any]) -> list[str]:
    """Keys that Grafana's own model of a dashboard doesn't know."""
    plugins.register_default_plugins()
    return list(lost(content, json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(content))))))


def test_grafanas_model_knows_every_key(dashboard: dict[str, Any]) -> None:
    assert unknown(dashboard) == []


def test_a_misspelt_key_would_be_found(dashboard: dict[str, Any]) -> None:
    for path in (("timezone",), ("panels", 10, "gridPos"), ("panels", 10, "targets", 0, "legendFormat")):
        changed = copy.deepcopy(dashboard)
        inner: Any = changed
        for step in path[:-1]:
            inner = inner[step]
        inner[f"{path[-1]}s"] = inner.pop(path[-1])
        assert unknown(changed), path


def test_the_file_is_in_the_form_that_grafana_exports(dashboard: dict[str, Any]) -> None:
    assert DASHBOARD.read_text(encoding="utf-8") == json.dumps(dashboard, indent=2, ensure_ascii=False) + "\n"
    assert dashboard["uid"] == "partial_fc" and dashboard["schemaVersion"] == 41
    assert "id" not in dashboard, "an id is that of one Grafana's database"


def test_every_panel_says_what_it_shows() -> None:
    known = {getattr(units, name) for name in dir(units) if not name.startswith("_")}
    for panel in panels():
        assert len(panel["description"]) >= 8 and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in known, panel["title"]
        several = len(panel["targets"]) > 1 or panel["type"] == "timeseries"
        assert all(target["legendFormat"] for target in panel["targets"]) or not several, panel["title"]
        # Colours by threshold need thresholds, and no panel is drawn without a query.
        assert panel["targets"] and panel["fieldConfig"]["defaults"].get("color", {}).get("mode") != "none"
    titles = [panel["title"] for panel in panels() if panel["type"] == "timeseries"]
    assert len(titles) == len(set(titles)) > 20


def test_panels_lie_beside_each_other(dashboard: dict[str, Any]) -> None:
    everything = dashboard["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        cells = set(
            itertools.product(
                range(place["x"], place["x"] + place["w"]),
                range(place["y"], place["y"] + place["h"]),
            )
        )
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    rows = {panel["gridPos"]["y"] for panel in everything if panel["type"] == "row"}
    assert all(panel["gridPos"]["w"] == 24 for panel in everything if panel["gridPos"]["y"] in rows)


def test_the_data_source_is_the_provisioned_one(dashboard: dict[str, Any]) -> None:
    folder = ROOT / "docker" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text(encoding="utf-8"))["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "partial_fc.yml").read_text(encoding="utf-8"))["providers"]
    assert provider["type"] == "file"
    named = [panel["datasource"] for panel in panels()]
    named += [target["datasource"] for panel in panels() for target in panel["targets"]]
    named += [variable["datasource"] for variable in dashboard["templating"]["list"]]
    assert {(name["type"], name["uid"]) for name in named} == {(source["type"], source["uid"])}
    scrapes = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text(encoding="utf-8"))["global"]
    assert source["jsonData"]["timeInterval"] == scrapes["scrape_interval"]


def test_red_lines_are_where_the_alerts_begin() -> None:
    drawn = {}
    for panel in panels():
        if found := re.search(r"Red is where the alert (\w+) begins\.", panel["description"]):
            steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
            drawn[found[1]] = [step["value"] for step in steps if step["color"] == "red"]
            assert alerts()[found[1]].series in panel["targets"][0]["expr"]
    assert len(drawn) >= 5
    assert drawn == {name: [alerts()[name].threshold] for name in drawn}


def test_rules_and_dashboard_name_metrics_that_there_are() -> None:
    metrics = TrainingMetrics()
    metrics.record_evaluation({"lfw": 0.5}, 1.0)
    served = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    there = served | set(recorded()) | set(FOREIGN)
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    asked += [rule["expr"] for file in ("recording.yml", "alerts.yml") for rule in rules(file)]
    named = set()
    for expression in asked:
        # Label values aren't names; nor are labels, functions and keywords, which have no colon and another beginning.
        bare = re.sub(r'"[^"]*"', "", expression)
        named |= set(
            re.findall(r"\b(?:run|rank|host):\w+(?::\w+)?|\bpartial_fc_\w+|\bprocess_\w+|\bup\b|\bALERTS\b", bare)
        )
    assert named <= there, named - there
    # What is served is drawn or watched, but for these, which tell what others do, too.
    drawn = {re.sub(r"_(bucket|sum|count)$", "", name) for name in named if name.startswith("partial_fc_")}
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in served if name.startswith("partial_fc_")}
    rest = {"rank", "evaluations_total", "commits_total", "resumed_step"}
    totals = {name for name in families if f"{name}_total" in families}
    assert families - drawn - totals == {f"partial_fc_{name}" for name in rest}
