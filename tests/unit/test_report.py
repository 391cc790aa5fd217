"""The report's page of a run that was started more than once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from partial_fc.report import write_report


def line(kind: str, step: int, seconds: float, **figures: Any) -> str:
    if kind == "train":
        figures = {"samples": 10 * step, "samples_per_second": 5.0, "phase_seconds": {"head": 0.002}, **figures}
    return json.dumps({"kind": kind, "step": step, "seconds": seconds, **figures}) + "\n"


def page(folder: Path, *lines: str) -> str:
    (folder / "metrics.jsonl").write_text("".join(lines))
    return write_report(folder, {}).read_text()


def test_one_start(tmp_path: Path) -> None:
    text = page(tmp_path, line("train", 2, 20.0), line("train", 4, 40.0), line("evaluation", 4, 70.0))
    assert "4 steps, 40 samples, 40 s; median 5 samples/s.\n" in text and "| head | 2 |" in text


def test_steps_that_were_taken_twice_count_once(tmp_path: Path) -> None:
    first = [line("train", 2, 20.0), line("train", 4, 40.0, samples_per_second=1e6)]
    text = page(tmp_path, *first, '{"kind": "tra\n', line("resumed", 2, 5.0), line("train", 4, 30.0), '{"ki')
    assert "4 steps, 40 samples, 50 s; median 5 samples/s. Starts: 2 (steps taken again count once)." in text


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    text = page(tmp_path, line("resumed", 0, 1.0))
    assert text.startswith(f"# {tmp_path.name}\n") and "steps" not in text
