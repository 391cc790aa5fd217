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
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from partial_fc.errors import PartialFCError
from partial_fc.status.facts import Facts
from partial_fc.status.gather import RunReader, is_run
from partial_fc.status.tables import draw_runs, screen_of
from partial_fc.status.view import draw

# Runs of a folder that are looked at, the newest.
_MOST_RUNS = 200
# States after which nothing more comes by itself.
_OVER = ("finished", "failed")


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
        as_json: an object a look instead of a screen: that of the run, or ``{"runs": [...]}``.
        endpoints: whether ranks are asked.
        console: where it goes; None: standard output.

    Returns:
        The exit code: that of the run's state (:data:`partial_fc.status.facts.EXIT_CODES`), 0 for a folder of runs.

    Raises:
        PartialFCError: neither is there.
    """
    console = console or _standard_output()
    single = is_run(path)
    if not single:
        _require_runs(path)
    look = _look_at_run(path, endpoints) if single else _look_at_runs(path, endpoints)
    found = look()
    try:
        if watch is None:
            _print(found, single, as_json, console)
        else:
            found = _watch(look, found, watch, single, as_json, console)
    except BrokenPipeError:
        # Whoever reads has seen enough; what is still buffered must not fail at the program's end.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), console.file.fileno())
    return found[0].exit_code if single else 0


def _standard_output() -> Console:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name of any letters, on a terminal of few.
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False)


def _look_at_run(path: Path, endpoints: bool) -> Callable[[], list[Facts]]:
    reader = RunReader(path, endpoints=endpoints)
    return lambda: [reader.read()]


def _look_at_runs(path: Path, endpoints: bool) -> Callable[[], list[Facts]]:
    readers: dict[Path, RunReader] = {}

    def look() -> list[Facts]:
        folders = _runs_of(path)[:_MOST_RUNS]
        for folder in folders:
            readers.setdefault(folder, RunReader(folder, endpoints=endpoints, brief=True))
        found = [readers[folder].read() for folder in folders]
        return sorted(found, key=lambda facts: -(facts.updated or 0.0))

    return look


def _watch(
    look: Callable[[], list[Facts]],
    found: list[Facts],
    seconds: float,
    single: bool,
    as_json: bool,
    console: Console,
) -> list[Facts]:
    """Look and show, again and again until Ctrl-C or the run's end; what was found last."""
    live = Live(console=console, auto_refresh=False, screen=False) if console.is_terminal and not as_json else None
    with contextlib.suppress(KeyboardInterrupt), live or contextlib.nullcontext():
        while True:
            if live is None:
                _print(found, single, as_json, console)
            else:
                live.update(_drawn(found, single, console), refresh=True)
            if single and found[0].state in _OVER:
                break
            time.sleep(seconds)
            found = look()
    return found


def _print(found: list[Facts], single: bool, as_json: bool, console: Console) -> None:
    if as_json:
        # As it is: a console would wrap it.
        objects = [dataclasses.asdict(facts) for facts in found]
        text = json.dumps(objects[0] if single else {"runs": objects}, allow_nan=False) + "\n"
    else:
        with console.capture() as captured:
            console.print(_drawn(found, single, console))
        text = captured.get()
    console.file.write(text)
    console.file.flush()


def _drawn(found: list[Facts], single: bool, console: Console) -> RenderableType:
    screen = screen_of(console)
    return draw(found[0], time.time(), screen) if single else draw_runs(found, time.time(), screen)


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
