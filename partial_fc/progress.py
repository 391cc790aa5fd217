"""A bar for work that takes long: on a terminal only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Called with the work done and its total, from any thread.
Report = Callable[[int, int], None]


@contextlib.contextmanager
def progress_bars(*titles: str, active: bool = True) -> Iterator[list[Report]]:
    """Show bars while the block runs, one below the other, each from its first report on.

    Args:
        titles: what is done, such as "finding the images".
        active: False: nothing is shown.

    Yields:
        For each title what is called with the work done and its total, from any thread.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bars = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True)
    with bars if active and console.is_terminal else contextlib.nullcontext():
        yield [_report_of(bars, title) for title in titles]


@contextlib.contextmanager
def progress_bar(title: str, *, active: bool = True) -> Iterator[Report]:
    """Show one bar: see :func:`progress_bars`."""
    with progress_bars(title, active=active) as (report,):
        yield report


def _report_of(bars: Progress, title: str) -> Report:
    task = bars.add_task(title, total=None, visible=False, start=False)

    def report(done: int, total: int) -> None:
        bars.start_task(task)  # the first time only
        bars.update(task, completed=done, total=total, visible=True)

    return report
