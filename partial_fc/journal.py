"""What a run tells: lines (or a progress bar) on rank 0's terminal, and ``metrics.jsonl`` in the run's folder."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Journal:
    """The run's record, kept by rank 0; on other ranks every method does nothing.

    Args:
        folder: the run's folder, which exists.
        total_steps: optimizer steps of the run.
        active: whether this is rank 0.
    """

    def __init__(self, folder: Path, total_steps: int, *, active: bool) -> None:
        self._active = active
        self._total = total_steps
        self._console = Console(soft_wrap=True, highlight=False)
        self._begin = time.monotonic()
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8") if active else None
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
            self._task = self._bar.add_task("train", total=total_steps, figures="")

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
            self._file.close()

    def say(self, text: str) -> None:
        """Print a line."""
        if self._active:
            self._console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Move the progress bar to ``step`` steps done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def record(self, kind: str, step: int, **figures: Any) -> None:
        """Add a line to ``metrics.jsonl``: ``kind`` (``train`` or ``evaluation``), the step, the time and figures.

        A number that isn't finite becomes null, so that every line is JSON that any reader takes.
        """
        if self._file is None:
            return
        line = {"kind": kind, "step": step, "seconds": round(time.monotonic() - self._begin, 3), **figures}
        self._file.write(json.dumps(_finite(line)) + "\n")
        self._file.flush()

    def show(self, step: int, figures: dict[str, float | None]) -> None:
        """Show the step's figures: in the bar's line, or as a line of their own where there is no terminal."""
        if not self._active:
            return
        text = "  ".join(f"{name} {_short(value)}" for name, value in figures.items() if value is not None)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text)
        else:
            self.say(f"step {step}/{self._total}  {text}  {time.monotonic() - self._begin:.0f} s")


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
