"""Prometheus with the shipped configuration: what it says of runs that it really scrapes, and of runs made up for it.

Windows and waits of the rules are a sixtieth here (tests/monitoring.py); everything else is as it is shipped.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from benchmarks import run_curves
from partial_fc.metrics import PHASES
from tests.jobs import Job, JobFailed, Jobs, free_ports, send
from tests.monitoring import DASHBOARD, PROMETHEUS, ROOT, Server, alerts, expressions, faster, recorded, write_faster
from tests.needs import need_programs
from tests.runs import Run, make_data

UNIT_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
DEADLINE = 120
SIGNALS = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
# What a busy machine may have with good reason.
OF_THE_MACHINE = {"PartialFCDataBound", "PartialFCRankLags", "PartialFCHostMemoryFull"}


@pytest.fixture(autouse=True)
def programs() -> None:
    need_programs("prometheus", "prometheus", "promtool")


def promtool(*arguments: str, given: bytes | None = None) -> str:
    """What promtool prints; it has to be content."""
    done = subprocess.run(
        ["promtool", *arguments], input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False
    )
    output = done.stdout.decode()
    assert done.returncode == 0, output
    return output


def test_promtool_finds_nothing_wrong_with_configuration_and_rules(tmp_path: Path) -> None:
    promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))
    output = promtool("check", "rules", *(str(file) for file in (PROMETHEUS / "rules").iterdir()))
    assert f"{len(recorded())} rules found" in output and f"{len(alerts())} rules found" in output
    # And so it is with what stands there as a comment.
    text = (PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8")
    opened = re.sub(
        r"^( *)# (?=( *)(alerting:|alertmanagers:|- static_|- targets|basic_auth:|tls_config:|\w+: [\w/]))",
        r"\1",
        text,
        flags=re.M,
    )
    assert {"alerting", "scrape_configs"} <= yaml.safe_load(opened).keys()
    (scrape,) = yaml.safe_load(opened)["scrape_configs"]
    assert {"basic_auth", "tls_config"} <= scrape.keys()
    for file in set(re.findall(r"/etc/prometheus/([\w.]+)", opened)):
        (tmp_path / file).write_text("")
    opened = opened.replace("/etc/prometheus/", f"{tmp_path}/").replace("rules/*.yml", f"{PROMETHEUS}/rules/*.yml")
    (tmp_path / "prometheus.yml").write_text(opened, encoding="utf-8")
    promtool("check", "config", "--syntax-only", str(tmp_path / "prometheus.yml"))


@pytest.mark.parametrize("file", UNIT_TESTS, ids=lambda file: file.stem)
def test_the_rules_do_what_their_own_tests_say(file: Path) -> None:
    promtool("test", "rules", str(file))


def test_each_alert_is_seen_to_fire_and_not_to_fire() -> None:
    fires, rests = set(), set()
    for file in UNIT_TESTS:
        for case in yaml.safe_load(file.read_text(encoding="utf-8"))["tests"]:
            for one in case.get("alert_rule_test", ()):
                (fires if one["exp_alerts"] else rests).add(one["alertname"])
    assert fires == set(alerts())
    # Healthy runs rest, all alerts at once; and just below the threshold or the wait, where there's one of its own.
    assert len(rests) >= 13 and rests <= fires


@pytest.mark.parametrize(
    ("seen", "file", "right", "wrong"),
    [
        ("training", "alerts.yml", "ratio15m > 0.01", "ratio15m > 0.03"),
        ("training", "alerts.yml", "age:seconds > 2700", "age:seconds > 3000"),
        ("ranks", "alerts.yml", "for: 1m", "for: 3m"),
        ("training", "recording.yml", "on (run) group_left () avg by (run)", "on () group_left () avg"),
        (
            "healthy",
            "recording.yml",
            "(partial_fc_commit_timestamp_seconds > 0)",
            "partial_fc_commit_timestamp_seconds",
        ),
        ("healthy", "recording.yml", " and on (run) run:partial_fc_ranks_up:sum > 0", ""),
    ],
)
def test_a_rule_that_is_wrong_is_noticed(tmp_path: Path, seen: str, file: str, right: str, wrong: str) -> None:
    copy = shutil.copytree(PROMETHEUS, tmp_path / "prometheus")
    text = (copy / "rules" / file).read_text(encoding="utf-8")
    assert text.count(right) == 1
    (copy / "rules" / file).write_text(text.replace(right, wrong), encoding="utf-8")
    command = ["promtool", "test", "rules", str(copy / "tests" / f"{seen}.yml")]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 1


def test_the_page_has_every_alert() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `(PartialFC\w+)` \| (\w+) \| (.+?) \| (.+?) \| .+ \|$", page, re.MULTILINE)
    expected = [
        (alert.name, alert.severity, f"`{alert.series}` {alert.comparison} {alert.threshold:g}", alert.waits)
        for alert in alerts().values()
    ]
    assert described == expected


def test_times_are_made_shorter_and_names_stay() -> None:
    assert faster("rate(a_total[15m]) > 2700 for: 10m run:b:rate5m [6h] 1h [1d]") == (
        "rate(a_total[15s]) > 2700 for: 10s run:b:rate5m [6m] 1m [1h]"
    )


class Scraped(NamedTuple):
    """A Prometheus, where it looks for runs, and data for these."""

    jobs: Jobs
    server: Server
    folder: Path
    data: Path

    def start(self, run: Run, port: int) -> Job:
        """Start a run's job of two ranks, or start it again."""
        changes = ["metrics.enabled=true", f"metrics.port={port}"]
        changes += ["evaluate.sets=[demo_val.bin]", "evaluate.every_steps=40", "train.log_every=10"]
        # Evaluations, in which nothing steps, are to be a small part of the time.
        program = [*run.changed_program(step_seconds=0.1), *changes]
        return self.jobs.torchrun(run.folder.name, *program, ranks=2, options=["--max-restarts", "0", *SIGNALS])

    def run(self, name: str) -> Run:
        """A run without an end."""
        # What a rank waits for a frozen one ends neither.
        times = {"stall_seconds": 3.0, "timeout_seconds": 300.0}
        return Run(self.folder, self.data, name=name, steps=100_000, commit_every=30, **times)

    def wait_for_alerts(self, *expected: tuple[str, str]) -> None:
        """Wait until these alerts of runs fire, and no others but those of the machine."""
        fires = functools.partial(self.server.firing, OF_THE_MACHINE)
        self.jobs.wait_until(lambda: fires() == set(expected), f"{expected} to fire", DEADLINE)

    def wait_for_peace(self) -> None:
        """Wait until no alert fires but those of the machine."""
        rests = functools.partial(self.server.firing, OF_THE_MACHINE)
        self.jobs.wait_until(lambda: not rests(), "all alerts to rest", DEADLINE)


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    need_programs("prometheus", "prometheus", "promtool")
    folder = tmp_path_factory.mktemp("scraped")
    data = make_data(folder / "data")
    (folder / "prometheus").mkdir()
    with Jobs(folder) as jobs:
        server = Server(jobs, write_faster(folder / "prometheus", folder / "runs"))
        yield Scraped(jobs, server, folder, data)


@pytest.fixture(scope="module")
def port(scraped: Scraped) -> int:
    """The first port of a run that is well, and that every expression has data of."""
    first, lacking = free_ports(2), list[str]()
    scraped.start(scraped.run("well"), first)

    def nothing_lacks() -> bool:
        asked = [*recorded(), *(expression for _, expression, _ in expressions({"run": "well", "rank": ".*"}))]
        lacking[:] = [expression for expression in asked if not scraped.server.query(expression)]
        return not lacking

    try:
        scraped.jobs.wait_until(nothing_lacks, "every expression to have data", DEADLINE)
    except JobFailed as error:
        raise AssertionError(f"without data: {lacking}\n{error}") from None
    return first


@pytest.mark.torchrun
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_expression_of_rules_and_dashboard_has_data(scraped: Scraped, port: int) -> None:
    server = scraped.server
    for title, expression, legend in expressions({"run": "well", "rank": ".*"}):
        series = server.query(expression)
        names = {re.sub(r"\{\{(\w+)\}\}", lambda found, one=one: one["labels"][found[1]], legend) for one in series}
        assert legend == "" or len(names) == len(series), f"{title}: the legend {legend!r} doesn't tell apart {series}"
    value = {name: server.query(name)[0]["value"] for name in recorded()}
    assert value["run:partial_fc_ranks_up:sum"] == value["run:partial_fc_ranks:count"] == 2

    def is_that_of_both_ranks() -> bool:
        # Before the second scrape of a rank the sum is one of the other alone.
        samples, steps = (server.query(f"run:partial_fc_{what}:rate5m") for what in ("samples", "steps"))
        return bool(samples and steps) and samples[0]["value"] / steps[0]["value"] == pytest.approx(12, rel=0.3)

    scraped.jobs.wait_until(is_that_of_both_ranks, "12 samples a step, the batch of both ranks", DEADLINE)
    assert 0 < value["run:partial_fc_commit_age:seconds"] < DEADLINE
    assert value["run:partial_fc_decode_errors:ratio15m"] == value["run:partial_fc_skipped_steps:ratio15m"] == 0
    assert not server.firing(OF_THE_MACHINE)


@pytest.mark.torchrun
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_dashboards_variables_offer_runs_and_ranks(scraped: Scraped, port: int) -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    offered = {}
    for variable in dashboard["templating"]["list"]:
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert found is not None
        series = found[1].replace("$run", "well")
        offered[variable["name"]] = scraped.server.ask(f"label/{found[2]}/values", **{"match[]": series})
    assert offered["rank"] == ["0", "1"] and "well" in offered["run"]


@pytest.mark.torchrun
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_promtool_finds_nothing_wrong_with_what_a_rank_serves(port: int) -> None:
    for of_rank in (port, port + 1):
        with urllib.request.urlopen(f"http://127.0.0.1:{of_rank}/metrics", timeout=30) as answer:
            promtool("check", "metrics", given=answer.read())


@pytest.mark.torchrun
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_curves_of_a_run_are_drawn(scraped: Scraped, port: int, tmp_path: Path) -> None:
    def source() -> run_curves.Source:
        return run_curves.Source(scraped.server.url, "well", hours=1.0)

    queries = [query for plot in run_curves.PLOTS for query, _ in plot.queries]
    # What came last is after the last point of a curve.
    scraped.jobs.wait_until(lambda: all(map(source().curves, queries)), "a point of every curve", DEADLINE)
    phases = {curve.labels["phase"] for query in queries if "step_seconds" in query for curve in source().curves(query)}
    assert phases == set(run_curves.PHASES) == set(PHASES)
    run_curves.draw(source(), "well", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"has no figures of a run 'other' in the last 1 h: it knows .*well"):
        run_curves.Source(scraped.server.url, "other", hours=1.0)
    with pytest.raises(SystemExit, match=r"127\.0\.0\.1:9 doesn't answer .*: expected a Prometheus"):
        run_curves.Source("http://127.0.0.1:9", "well", hours=1.0)


@pytest.mark.torchrun
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_happens_to_a_run_is_said_of_this_run_and_no_more_is(scraped: Scraped, port: int) -> None:
    run, first = scraped.run("hurt"), free_ports(2)
    job = scraped.start(run, first)
    scraped.jobs.wait_until(lambda: run.newest_commit() >= 30 and job.workers(), "a commit", DEADLINE)
    scraped.wait_for_peace()
    # Frozen: it doesn't answer, the other one waits and says so.
    frozen = job.workers()[1]
    send(frozen, signal.SIGSTOP)
    scraped.wait_for_alerts(("PartialFCRankDown", "hurt"), ("PartialFCStalled", "hurt"), ("PartialFCNoSteps", "hurt"))
    assert {one["labels"]["rank"] for one in scraped.server.query("rank:partial_fc_down:bool == 1")} == {"1"}
    send(frozen, signal.SIGCONT)
    scraped.wait_for_peace()
    # Killed: the agent ends the other one.
    send(frozen, signal.SIGKILL)
    assert job.wait(DEADLINE) != 0
    scraped.wait_for_alerts(("PartialFCRunDown", "hurt"))
    # Started again: what counts since the start of the processes begins anew.
    steps = scraped.server.query('max(max_over_time(partial_fc_steps_total{run="hurt"}[1h]))')[0]["value"]
    job = scraped.start(run, first)
    scraped.wait_for_peace()
    scraped.jobs.wait_until(
        lambda: any(0 < one["value"] < steps for one in scraped.server.query('partial_fc_steps_total{run="hurt"}')),
        "steps after the start",
        DEADLINE,
    )
    (restarts,) = {one["value"] for one in scraped.server.query('partial_fc_restarts{run="hurt"}')}
    assert restarts == 1
    # Ended in order: its targets are gone, and nobody is called.
    job.signal(signal.SIGTERM)
    job.wait(DEADLINE)
    scraped.jobs.wait_until(lambda: not scraped.server.query('up{run="hurt"}'), "its targets to go", DEADLINE)
    assert run.status["state"] == "resume"
    time.sleep(8)  # longer than PartialFCRunDown waits
    assert not scraped.server.firing(OF_THE_MACHINE)
    assert scraped.server.query('run:partial_fc_ranks_up:sum{run="well"}')[0]["value"] == 2
