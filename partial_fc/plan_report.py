"""The tables of ``partial-fc plan``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from partial_fc import footprint
from partial_fc.config import Config
from partial_fc.errors import ConfigError
from partial_fc.plan import SIZES, RunPlan, as_dict, choose_machine, plan_run, show_bytes, show_count

# Widths in characters: of the tables where no terminal shows them, of the items' names, of a column of figures.
_WIDTH, _NAMES, _FIGURES = 100, 28, 14


def make_plan(
    config: Config,
    *,
    classes: Sequence[int] = (),
    ranks: int = 8,
    memory: str | None = None,
    gpu: str | None = None,
    json_file: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the tables of ``partial-fc plan``, and write them to a file.

    Args:
        config: the configuration.
        classes: sizes to show; empty: that of the configuration, and 10^6 to 10^9.
        ranks: W.
        memory: of a rank, as :func:`read_memory`.
        gpu: a name of :data:`GPUS`.
        json_file: where the figures go as JSON.
        console: where the tables go; None: standard output.

    Raises:
        ConfigError: where an argument can't be used.
    """
    for count in classes:
        if not 2 <= count <= footprint.LARGEST:
            raise ConfigError(f"--classes is {count}, expected 2 to {footprint.LARGEST}")
    run = plan_run(config, choose_machine(config.train.device == "cpu", gpu, memory), ranks)
    known = (config.data.num_classes,) if config.data.num_classes else ()
    sizes = sorted(set(classes or (*known, *SIZES)))
    found = as_dict(run, sizes)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {json_file}: {error.strerror}, expected a file that can be written") from error
    if console is None:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    for part in _tables(run, found, console.width):
        console.print(part)


def _tables(run: RunPlan, found: Mapping[str, Any], width: int) -> Iterator[Table | str]:
    yield run.title
    columns = max(1, (width - _NAMES) // _FIGURES)
    for begin in range(0, len(found["sizes"]), columns):
        yield _memory_table(run, found["sizes"][begin : begin + columns])
    if found["sent"]:
        yield _sent_table(found["sent"])
    yield "\nThe most classes that fit:"
    for entry in found["largest"]:
        yield f"  {_largest_line(run, entry['ranks'], entry['num_classes'])}"
    yield ""
    yield (
        "(In parentheses: held at another moment only, not in the sum.) Activations are estimated from what the "
        "backbone saves of a few images on a CPU; the runtime "
        + ("(CUDA's context, NCCL, the allocator's slack) is assumed." if run.machine.gpu else "is glibc's slack.")
    )


def _memory_table(run: RunPlan, sizes: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("Memory of the fullest rank", *(show_count(size["num_classes"]) for size in sizes))
    kinds = ("memory", "memory_at_other_moments")
    for item in dict.fromkeys(item for kind in kinds for size in sizes for item in size[kind]):
        table.add_row(item, *(_memory_cell(*(size[kind].get(item, 0) for kind in kinds)) for size in sizes))
    table.add_section()
    table.add_row("together", *(show_bytes(size["memory_total"]) for size in sizes))
    table.add_row(f"fits in {show_bytes(run.machine.memory)}", *("yes" if size["fits"] else "no" for size in sizes))
    table.add_row("fullest moment", *(size["fullest_moment"] for size in sizes))
    if any(size["host_memory"] for size in sizes) and run.machine.gpu:
        table.add_row("on the host: sampled ids", *(show_bytes(size["host_memory"]) for size in sizes))
    if run.machine.gpu:
        table.add_row("on the host: staged commit", *(show_bytes(size["staged_for_commits"]) for size in sizes))
    table.add_section()
    table.add_row("classes of a rank", *(show_count(size["local_classes"]) for size in sizes))
    table.add_row("walked a step", *(show_count(size["walked_classes"]) for size in sizes))
    table.add_row("chunks", *(show_count(size["chunks"]) for size in sizes))
    table.add_row("operations of the products", *(f"{size['operations']:.2e}" for size in sizes))
    return table


def _memory_cell(held: int, otherwise: int) -> str:
    """What is held at other moments only stands in parentheses: it isn't in the sum."""
    return f"({show_bytes(otherwise)})" if otherwise else show_bytes(held)


def _sent_table(collectives: Mapping[str, Mapping[str, int]]) -> Table:
    table = _table("Sent a step, ring algorithm", "tensor", "a rank sends")
    for name, sizes in collectives.items():
        table.add_row(name.replace("_", " "), show_bytes(sizes["tensor"]), show_bytes(sizes["rank_sends"]))
    table.add_section()
    table.add_row("together", "", show_bytes(sum(sizes["rank_sends"] for sizes in collectives.values())))
    return table


def _largest_line(run: RunPlan, ranks: int, count: int) -> str:
    where = f"{ranks} rank{'s' * (ranks > 1)}:"
    memory = run.memory(run.at(max(count, 2), ranks))
    most = sorted(memory.items, key=lambda item: -memory.items[item])[:2]
    shares = ", ".join(f"{item} {memory.items[item] / memory.together:.0%}" for item in most)
    if count == 0:
        return f"{where} none: two classes take {show_bytes(memory.together)} ({shares})"
    return f"{where} {count:,} ({shares})"


def _table(first: str, *columns: str) -> Table:
    table = Table(box=box.HORIZONTALS, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
