"""What a run tells: lines (or a progress bar) on rank 0's terminal, and ``metrics.jsonl`` in the run's folder.

Every start of a run appends to the same ``metrics.jsonl``. A start that goes on from a commit, or a run that goes back
to one, records it (``resumed``, ``rollback``), and :func:`read_journal` leaves out what was done after that commit.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_log = logging.getLogger(__name__)

_FILE = "metrics.jsonl"
# What makes earlier lines void, and which ones.
GOING_BACK = ("resumed", "rollback")
VOIDED = ("train", "evaluation")


class Journal:
    """The run's record, kept by rank 0; on other ranks every method does nothing.

    Args:
        folder: the run's folder, which exists; where it has a ``metrics.jsonl``, lines are appended.
        total_steps: optimizer steps of the run.
        active: whether this is rank 0.
        first_step: optimizer steps done before this start; the progress bar begins there.
    """

    def __init__(self, folder: Path, total_steps: int, *, active: bool, first_step: int = 0) -> None:
        self._active = active
        self._total = total_steps
        self._console = Console(soft_wrap=True, highlight=False)
        self._begin = time.monotonic()
        self._file = _open_to_append(folder / _FILE) if active else None
        self._full = self._mute = False
        self._bar: Progress | None = None
        if active and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, figures="")

    def __enter__(self) -> Journal:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            # Lines that a full disk didn't take are tried once more, and were told of.
            with contextlib.suppress(OSError):
                self._file.close()

    def say(self, text: str) -> None:
        """Print a line."""
        if self._active:
            try:
                self._console.print(text, markup=False)
            except OSError as error:
                # Standard output goes to a disk that is full: the run is worth more than its log.
                if not self._mute:
                    self.warn(f"standard output can't be written ({error.strerror}): lines are missing there")
                self._mute = True

    def warn(self, text: str) -> None:
        """Log a warning."""
        if self._active:
            _log.warning("%s", text)

    def advance(self, step: int) -> None:
        """Move the progress bar to ``step`` steps done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def record(self, kind: str, step: int, **figures: Any) -> None:
        """Add a line to ``metrics.jsonl``, at once: another process can read it when this returns.

        A number that isn't finite becomes null, so that every line is JSON that any reader takes.

        Args:
            kind: ``train``, ``evaluation``; ``resumed`` or ``rollback`` where ``step`` is what the run goes on from,
                which makes lines of these two kinds void that are there already and have a later step; or any other.
            step: optimizer steps done.
            figures: what else the line holds; it gets the seconds since this start as well.
        """
        if self._file is None:
            return
        line = {"kind": kind, "step": step, "seconds": round(time.monotonic() - self._begin, 3), **figures}
        try:
            self._file.write(json.dumps(_finite(line)) + "\n")
            self._file.flush()
            self._full = False
        except OSError as error:
            # A full disk costs lines, not the run; what is buffered is written once there is room.
            if not self._full:
                self.warn(
                    f"{self._file.name} can't be written ({error.strerror}): lines are missing there until it can"
                )
            self._full = True

    def show(self, step: int, figures: dict[str, float | None]) -> None:
        """Show the step's figures: in the bar's line, or as a line of their own where there is no terminal."""
        if not self._active:
            return
        text = "  ".join(f"{name} {_short(value)}" for name, value in figures.items() if value is not None)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text)
        else:
            self.say(f"step {step}/{self._total}  {text}  {time.monotonic() - self._begin:.0f} s")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` that are in effect, in the file's order.

    A line ``resumed`` or ``rollback`` of step s makes lines ``train`` and ``evaluation`` before it void where their
    step is later than s: those steps were taken again. Lines without a kind and a step, such as one that a killed
    process left half-written, are skipped.

    Args:
        path: the file.

    Raises:
        OSError: it can't be read.
    """
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        line = parse_line(text)
        if line is None:
            continue
        if line["kind"] in GOING_BACK:
            lines = [old for old in lines if old["kind"] not in VOIDED or old["step"] <= line["step"]]
        lines.append(line)
    return lines


def parse_line(text: str) -> dict[str, Any] | None:
    """What a line holds; None where it has no kind and step, or is no JSON."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    known = isinstance(line, dict) and isinstance(line.get("kind"), str) and isinstance(line.get("step"), int)
    return line if known else None


def _open_to_append(path: Path) -> TextIO:
    """The file at a line's beginning: what a killed process left half-written is ended first."""
    file = path.open("a+b")
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return io.TextIOWrapper(file, encoding="utf-8", newline="\n")


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
