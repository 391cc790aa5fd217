"""The result of the preflight, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from partial_fc.doctor.findings import Finding, Hosts, Level, Report
from partial_fc.errors import ConfigError

# In the order of the table.
CHECKS = (
    "ranks",
    "configuration",
    "versions",
    "environment",
    "limits",
    "processors",
    "gpu",
    "network",
    "run folder",
    "data",
    "group",
    "bandwidth",
    "links",
    "clocks",
)
_LEVELS: tuple[Level, ...] = ("fail", "warn", "ok")
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
# Below so many characters the place stands in the line of the text.
_WIDE = 100


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """By check, what is wrong first."""
    return sorted(findings, key=lambda finding: (CHECKS.index(finding.check), _LEVELS.index(finding.level)))


def verdict(findings: Sequence[Finding]) -> str:
    """The last line: ``ready``, ``ready, 1 warning``, ``2 problems, 1 warning``."""
    problems, warnings = (sum(finding.level == level for finding in findings) for level in ("fail", "warn"))
    parts = [f"{problems} problem{'s' * (problems > 1)}" if problems else "ready"]
    if warnings:
        parts.append(f"{warnings} warning{'s' * (warnings > 1)}")
    return ", ".join(parts)


def show(title: str, findings: Sequence[Finding], hosts: Hosts, console: Console) -> None:
    """A table on a terminal; else a line for each finding, for ``grep``."""
    ordered = in_order(findings)
    if console.is_terminal:
        console.print(Text(title, style="bold"))
        console.print(_table(ordered, hosts, console.width))
    else:
        console.print(title, soft_wrap=True, markup=False)
        for line in _lines(ordered, hosts):
            console.print(line, soft_wrap=True, markup=False)
    level: Level = next((level for level in _LEVELS if any(one.level == level for one in findings)), "ok")
    console.print(Text(verdict(findings), style=_COLOURS[level]), soft_wrap=True)


def _lines(findings: Sequence[Finding], hosts: Hosts) -> Iterator[str]:
    for finding in findings:
        yield f"{finding.level:<5}{finding.check:<14}{hosts.describe(finding.ranks)}: {' '.join(finding.text.split())}"


def _table(findings: Sequence[Finding], hosts: Hosts, width: int) -> Table:
    wide = width >= _WIDE
    table = Table(box=box.HORIZONTALS, pad_edge=False, header_style="bold", width=min(width, 140))
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    if wide:
        table.add_column("where", max_width=24, overflow="fold")
    table.add_column("found", ratio=1, overflow="fold")
    before = ""
    for finding in findings:
        where = hosts.describe(finding.ranks)
        text = Text(finding.text)
        if not wide and finding.ranks and where != hosts.describe(()):
            text = Text.assemble((f"{where}: ", "bold"), text)
        place = [Text(where)] if wide else []
        name = Text(finding.check if finding.check != before else "")
        table.add_row(name, Text(finding.level, style=_COLOURS[finding.level]), *place, text)
        before = finding.check
    return table


def write_json(
    path: Path,
    findings: Sequence[Finding],
    reports: Sequence[Report],
    measured: dict[int, dict[str, Any]],
) -> None:
    """All of it for programs.

    Raises:
        ConfigError: the file can't be written.
    """
    content = {
        "ready": all(finding.level != "fail" for finding in findings),
        "verdict": verdict(findings),
        "findings": [finding._asdict() for finding in in_order(findings)],
        "ranks": [report.as_dict() for report in reports],
        "measured": {str(rank): found for rank, found in measured.items()},
    }
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}, expected a file that can be written") from error
