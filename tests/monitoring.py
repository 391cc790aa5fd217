"""Prometheus in tests: its shipped configuration at a test's pace, a server, and what rules and dashboard ask of it."""

from __future__ import annotations

import json
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.jobs import Jobs

ROOT = Path(__file__).resolve().parents[1]
PROMETHEUS = ROOT / "docker" / "prometheus"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "partial_fc.json"
# A minute of the rules is a second of the test, an hour a minute; and a scrape's 15 seconds are a half.
_FASTER = {"d": "h", "h": "m", "m": "s"}
_INTERVALS = {"15s": "500ms", "10s": "500ms", "30s": "1s"}
# What Grafana puts there at four scrapes.
RATE_INTERVAL = "5s"


class Alert(NamedTuple):
    """An alert as the file has it: a recorded series, and a threshold."""

    name: str
    severity: str
    waits: str
    series: str
    comparison: str
    threshold: float
    annotations: dict[str, str]


def alerts() -> dict[str, Alert]:
    """All alerts by name.

    Raises:
        AssertionError: one isn't a recorded series and a threshold.
    """
    found = {}
    for rule in rules("alerts.yml"):
        parts = re.fullmatch(r"([\w:]+) (==|>|<) ([\d.]+)", rule["expr"])
        assert parts is not None, f"{rule['alert']}: expected a recorded series and a threshold, got {rule['expr']!r}"
        series, comparison, threshold = parts.groups()
        severity, waits = rule["labels"]["severity"], rule.get("for", "at once")
        found[rule["alert"]] = Alert(
            rule["alert"], severity, waits, series, comparison, float(threshold), rule["annotations"]
        )
    return found


def rules(file: str) -> list[dict[str, Any]]:
    """The rules of one of the shipped files."""
    content = yaml.safe_load((PROMETHEUS / "rules" / file).read_text(encoding="utf-8"))
    return [rule for group in content["groups"] for rule in group["rules"]]


def recorded() -> dict[str, str]:
    """Expressions of the recorded series, by name."""
    return {rule["record"]: " ".join(rule["expr"].split()) for rule in rules("recording.yml")}


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels, rows left out."""
    content = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [panel for panel in content["panels"] if panel["type"] != "row"]


def faster(text: str) -> str:
    """Rules whose windows and waits are a sixtieth: minutes become seconds."""
    return re.sub(r"(?<![\w.])(\d+)([mhd])(?=\b)", lambda found: found[1] + _FASTER[found[2]], text)


def write_faster(folder: Path, runs: Path) -> Path:
    """Copy the shipped configuration with other intervals and another folder of runs; return its path."""
    shutil.copytree(PROMETHEUS / "rules", folder / "rules")
    for file in (folder / "rules").iterdir():
        file.write_text(faster(file.read_text(encoding="utf-8")), encoding="utf-8")
    text = (PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8")
    assert text.count(" /runs/") == 1
    text = text.replace(" /runs/", f" {runs}/")
    for interval, other in _INTERVALS.items():
        text = text.replace(f": {interval}\n", f": {other}\n")
    file = folder / "prometheus.yml"
    file.write_text(text, encoding="utf-8")
    return file


class Server:
    """A Prometheus that ends with its jobs.

    Args:
        jobs: those that it belongs to.
        config: its configuration file.
    """

    def __init__(self, jobs: Jobs, config: Path) -> None:
        storage = config.parent / "data"
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={storage}"]
        job = jobs.start("prometheus", [*command, "--web.listen-address=127.0.0.1:0"])
        port = job.wait_for(r"Listening on.*address=127\.0\.0\.1:(\d+)", 60)[1]
        self.url = f"http://127.0.0.1:{port}"
        job.wait_for("Server is ready to receive web requests", 60)

    def ask(self, path: str, **parameters: str) -> Any:
        """What ``/api/v1/PATH`` answers.

        Raises:
            AssertionError: it's an error, with what the server says of it.
        """
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an expression as it is now: their labels and values, those that are numbers."""
        found = self.ask("query", query=expression)["result"]
        series = [{"labels": one["metric"], "value": float(one["value"][1])} for one in found]
        return [one for one in series if one["value"] == one["value"]]

    def firing(self, without: Collection[str] = ()) -> set[tuple[str, str]]:
        """Names of the alerts that fire, but for some, and their runs."""
        found = [alert for alert in self.ask("alerts")["alerts"] if alert["state"] == "firing"]
        named = {(alert["labels"]["alertname"], alert["labels"]["run"]) for alert in found}
        return {(name, run) for name, run in named if name not in without}


def expressions(variables: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Title, expression and legend of everything that the dashboard draws, with the variables' values put in."""
    values = {**variables, "__rate_interval": RATE_INTERVAL}
    for panel in panels():
        for target in panel["targets"]:
            expression = re.sub(r"\$(\w+)", lambda found: values[found[1]], target["expr"])
            yield panel["title"], expression, target["legendFormat"]
