"""How runs stand, on a terminal or as JSON: what ``partial-fc status`` does."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, RenderableType
from rich.live import Live

from partial_fc.errors import PartialFCError
from partial_fc.status.facts import EXIT_CODES, Facts
from partial_fc.status.gather import RunReader, is_run
from partial_fc.status.tables import draw_runs, screen_of
from partial_fc.status.view import draw

# Runs of a folder that are looked at, the newest.
_MOST_RUNS = 200
# Of these so many at once: each may wait seconds for an endpoint.
_AT_ONCE = 32
_LONGEST_WATCH = 86_400.0
# States after which nothing more comes by itself.
_OVER = ("finished", "failed")


class _Found(NamedTuple):
    """What came of a look.

    Attributes:
        runs: those that were looked at.
        single: whether it was one run, not a folder of runs.
        older: runs of the folder that weren't looked at.
    """

    runs: list[Facts]
    single: bool
    older: int = 0


def show_status(
    path: Path,
    *,
    watch: float | None = None,
    as_json: bool = False,
    endpoints: bool = True,
    console: Console | None = None,
) -> int:
    """Show a run, or the runs of a folder.

    Args:
        path: a run's folder, or a folder of such.
        watch: seconds between two looks, until the run is finished or failed, or Ctrl-C; None: one look.
        as_json: an object a look instead of a screen: that of the run, or ``{"runs": [...], "older_runs": 0}``.
        endpoints: whether ranks are asked.
        console: where it goes; None: standard output.

    Returns:
        The exit code: that of the run's state (:data:`partial_fc.status.facts.EXIT_CODES`), 0 for a folder of runs;
        that of an unknown state where Ctrl-C came before the first look had ended.

    Raises:
        PartialFCError: neither is there, or ``watch`` is no time to wait.
    """
    # NaN compares with nothing.
    if watch is not None and not 0 < watch <= _LONGEST_WATCH:
        raise PartialFCError(f"--watch {watch:g}: expected seconds, above 0 and up to {_LONGEST_WATCH:,.0f} (a day)")
    console = console or _standard_output()
    single = is_run(path)
    if not single:
        _require_runs(path)
    look = _look_at_run(path, endpoints) if single else _look_at_runs(path, endpoints)
    last: list[_Found] = []

    def look_again() -> _Found:
        last[:] = [look()]
        return last[0]

    try:
        if watch is None:
            _print(look_again(), as_json, console)
        else:
            _watch(look_again, watch, as_json, console)
    except BrokenPipeError:
        # Whoever reads has seen enough; what is still buffered must not fail at the program's end.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), console.file.fileno())
    if not single:
        return 0
    return last[0].runs[0].exit_code if last else EXIT_CODES["unknown"]


def _standard_output() -> Console:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name of any letters, on a terminal of few.
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False)


def _look_at_run(path: Path, endpoints: bool) -> Callable[[], _Found]:
    reader = RunReader(path, endpoints=endpoints)
    return lambda: _Found([reader.read()], True)


def _look_at_runs(path: Path, endpoints: bool) -> Callable[[], _Found]:
    readers: dict[Path, RunReader] = {}

    def look() -> _Found:
        there = _runs_of(path)
        folders = there[:_MOST_RUNS]
        for folder in folders:
            readers.setdefault(folder, RunReader(folder, endpoints=endpoints, brief=True))
        pool = ThreadPoolExecutor(_AT_ONCE)
        try:
            found = list(pool.map(lambda folder: readers[folder].read(), folders))
        finally:
            # After Ctrl-C nobody waits for the runs whose turn hasn't come.
            pool.shutdown(wait=False, cancel_futures=True)
        return _Found(sorted(found, key=lambda facts: -(facts.updated or 0.0)), False, len(there) - len(folders))

    return look


def _watch(
    look: Callable[[], _Found],
    seconds: float,
    as_json: bool,
    console: Console,
) -> None:
    """Look and show, again and again until Ctrl-C or the run's end."""
    live = Live(console=console, auto_refresh=False, screen=False) if console.is_terminal and not as_json else None
    with contextlib.suppress(KeyboardInterrupt), live or contextlib.nullcontext():
        while True:
            found = look()
            if live is None:
                _print(found, as_json, console)
            else:
                live.update(_drawn(found, console), refresh=True)
            if found.single and found.runs[0].state in _OVER:
                break
            time.sleep(seconds)


def _print(found: _Found, as_json: bool, console: Console) -> None:
    if as_json:
        # As it is: a console would wrap it.
        runs = [dataclasses.asdict(facts) for facts in found.runs]
        content = runs[0] if found.single else {"runs": runs, "older_runs": found.older}
        text = json.dumps(content, allow_nan=False) + "\n"
    else:
        with console.capture() as captured:
            console.print(_drawn(found, console))
        text = captured.get()
    console.file.write(text)
    console.file.flush()


def _drawn(found: _Found, console: Console) -> RenderableType:
    screen, now = screen_of(console), time.time()
    return draw(found.runs[0], now, screen) if found.single else draw_runs(found.runs, now, screen, found.older)


def _runs_of(path: Path) -> list[Path]:
    """The runs of a folder, the newest first."""
    with contextlib.suppress(OSError):
        runs = [folder for folder in path.iterdir() if is_run(folder)]
        return sorted(runs, key=_changed, reverse=True)
    return []


def _changed(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return (folder / "status.json").stat().st_mtime
    return 0.0


def _require_runs(path: Path) -> None:
    if _runs_of(path):
        return
    places = [path.parent, Path("runs")]
    known = {folder.name: folder for place in reversed(places) for folder in _runs_of(place)}
    near = difflib.get_close_matches(path.name, known, n=3, cutoff=0.5)
    hint = f"; near names: {', '.join(str(known[name]) for name in near)}" if near else ""
    raise PartialFCError(
        f"{path}: no run is there, expected a folder with status.json, or one of such folders (train.run_dir){hint}"
    )
