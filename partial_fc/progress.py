"""A bar for work that takes long: on a terminal only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress_bar(title: str, *, active: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the block runs, from its first report on.

    Args:
        title: what is done, such as "finding the images".
        active: False: nothing is shown.

    Yields:
        What is called with the work done and its total, from any thread.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True)
    with bar if active and console.is_terminal else contextlib.nullcontext():
        task = bar.add_task(title, total=None, visible=False)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        yield show
