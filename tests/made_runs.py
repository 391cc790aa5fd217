"""Runs that never ran, for tests: their folders with made-up lines, and endpoints of their ranks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from partial_fc.metrics import TrainingMetrics
from partial_fc.status import show_status
from partial_fc.status.facts import Facts
from partial_fc.status.gather import RunReader
from partial_fc.status.tables import Screen
from partial_fc.status.view import draw
from partial_fc.targets import targets_of, write_targets

PHASES = {"data": 0.01, "head_forward": 0.02, "collectives": 0.01}


def train(step: int, **more: Any) -> dict[str, Any]:
    """A journal's line: two seconds a step."""
    figures = {"samples": 100 * step, "samples_per_second": 50.0, "phase_seconds": PHASES, "loss": 20.0 - step / 10}
    rates = {"backbone": 0.1, "head": 0.01}
    measured = {
        "target_cosine": 0.5,
        "support_vectors_per_sample": 3.25,
        "sampled_classes": 11,
        "nearest_cosine_1": 0.3,
    }
    line = {"kind": "train", "step": step, "seconds": 2.0 * step, "learning_rate": rates, **figures, **measured}
    return line | more


def evaluation(step: int, accuracy: float, name: str = "lfw") -> dict[str, Any]:
    """A journal's line."""
    line = {"kind": "evaluation", "step": step, "seconds": 2.0 * step, "set": name, "accuracy": accuracy}
    return line | {"evaluation_seconds": 5.0}


def iso(seconds_ago: float = 0.0) -> str:
    """A time as status.json has it."""
    return datetime.fromtimestamp(time.time() - seconds_ago, timezone.utc).isoformat(timespec="seconds")


def make_run(
    folder: Path, *lines: dict[str, Any], state: str = "running", seconds_ago: float = 1.0, **more: Any
) -> Path:
    """A run's folder with these lines, that was last written so long ago."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = lines or tuple(train(step) for step in range(10, 101, 10))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(folder / "metrics.jsonl", (time.time() - seconds_ago,) * 2)
    status = {"name": folder.name, "state": state, "step": lines[-1]["step"], "steps": 1000, "world_size": 2}
    (folder / "status.json").write_text(json.dumps({**status, "updated": iso(seconds_ago), **more}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"batch_size": 100, "steps": 1000}}))
    return folder


@contextlib.contextmanager
def served(folder: Path, ranks: int = 2) -> Iterator[list[TrainingMetrics]]:
    """Endpoints of a run's ranks, with its file of targets."""
    with contextlib.ExitStack() as opened:
        metrics = [opened.enter_context(TrainingMetrics(rank, ranks)) for rank in range(ranks)]
        for rank, one in enumerate(metrics):
            one.start(0)
            one.record_step(1, 103 + rank)
            one.record_figures({"data_queue_batches": 2.0, "data_queue_capacity": 4.0, "epoch": 1.5})
        write_targets(folder, targets_of([("127.0.0.1", one.port) for one in metrics], run=folder.name, tls=False))
        yield metrics


def read(folder: Path, **options: Any) -> Facts:
    """What is found out about a run."""
    return RunReader(folder, **options).read()


def drawn(facts: Facts, width: int = 80, *, unicode: bool = True, colour: bool = False) -> str:
    """The screen as text."""
    file = io.StringIO()
    colours: Any = "standard" if colour else None
    console = Console(file=file, width=width, force_terminal=colour, color_system=colours, highlight=False)
    console.print(draw(facts, time.time(), Screen(width, unicode, colour)))
    return file.getvalue()


def shown(path: Path, **options: Any) -> tuple[int, str]:
    """Exit code and output of the command's function."""
    file = io.StringIO()
    code = show_status(path, console=Console(file=file, width=80, highlight=False), **options)
    return code, file.getvalue()
