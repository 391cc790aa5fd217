"""Tables of ranks and of runs, cut to the screen's width; and what a state is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from partial_fc.status.facts import Facts, Rank
from partial_fc.status.words import duration, figure, plain, ranks, since, size

STYLES = {
    "running": "bold green",
    "finished": "bold green",
    "resume": "bold yellow",
    "failed": "bold red",
    "silent": "bold red",
    "stalled": "bold red",
    "unknown": "bold yellow",
}
# Rows of ranks; of more those that are worth a look.
_MOST_RANKS = 16
# Of their endpoints' addresses so much is shown before a column of figures is.
_ENDPOINT_WIDTH = 16


class Screen(NamedTuple):
    """What is drawn on.

    Attributes:
        width: columns.
        unicode: whether it shows more than ASCII.
        colour: whether it shows colours.
    """

    width: int
    unicode: bool
    colour: bool


def screen_of(console: Console) -> Screen:
    """What a console is."""
    return Screen(console.width, console.encoding.lower().startswith("utf"), console.color_system is not None)


def state_words(facts: Facts) -> str:
    """A run's state in words, without its reason."""
    if facts.state == "running":
        return "running" if facts.loss.last is not None or facts.step else "running, no step is logged yet"
    return {
        "resume": "saved, and ended on a signal",
        "finished": "finished",
        "failed": "failed",
        "silent": "no sign of life",
        "stalled": "no progress",
        "unknown": "state unknown",
    }[facts.state]


class _Column(NamedTuple):
    """A column of the table of ranks; where there isn't room for all, those of the highest rank go first."""

    title: str
    cells: list[str]
    expendable: int = 0

    @property
    def width(self) -> int:
        return max(map(len, (*self.title.split("\n"), *self.cells)), default=0)


def ranks_table(facts: Facts, screen: Screen) -> RenderableType:
    """The ranks of a run, by their endpoints; there is at least one."""
    shown = _worth_a_look(facts)
    columns = _columns(shown, any(rank.gpu_bytes for rank in facts.ranks))
    room = _room_for_endpoints(columns, screen)
    least = min(_ENDPOINT_WIDTH, max(len(rank.address) for rank in shown))
    while room < least and any(column.expendable for column in columns):
        last = max(column.expendable for column in columns)
        columns = [column for column in columns if column.expendable < last]
        room = _room_for_endpoints(columns, screen)
    table = _table(screen)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("endpoint", no_wrap=True)
    for column in columns[1:]:
        table.add_column(column.title, justify="right", no_wrap=True)
    for row, rank in enumerate(shown):
        address = Text(_shortened(rank.address, max(room, 8)))
        cells = (Text(column.cells[row]) for column in columns)
        table.add_row(next(cells), address, *cells, style=_rank_style(rank, facts))
    left = len(facts.ranks) - len(shown)
    return Group(table, Text(f"{left} more ranks answer like these", style="dim")) if left else table


def _room_for_endpoints(columns: Sequence[_Column], screen: Screen) -> int:
    return screen.width - sum(column.width + 2 for column in columns)


def _shortened(address: str, width: int) -> str:
    if len(address) <= width:
        return address
    host, _, port = address.rpartition(":")
    return f"{host[: max(width - len(port) - 3, 0)]}..:{port}"[-width:]


def _table(screen: Screen) -> Table:
    lines = box.SIMPLE_HEAD if screen.unicode else box.ASCII2
    return Table(box=lines, pad_edge=False, show_edge=False, collapse_padding=True, padding=(0, 1))


def _columns(shown: Sequence[Rank], on_gpu: bool) -> list[_Column]:
    columns = [
        _Column("rank", [str(rank.rank) for rank in shown]),
        _Column("step", [_step_of(rank) for rank in shown]),
        _Column("queue", ["-" if rank.queue is None else f"{rank.queue}/{rank.queue_capacity}" for rank in shown], 3),
        _Column("memory", [_known(rank.resident_bytes, size) for rank in shown], 3),
    ]
    if on_gpu:
        columns.append(_Column("GPU", [_known(rank.gpu_bytes, size) for rank in shown], 2))
        columns.append(_Column("peak", [_known(rank.gpu_peak_bytes, size) for rank in shown], 5))
    totals = [sum(rank.phase_seconds.values()) if rank.phase_seconds else None for rank in shown]
    columns.append(_Column("a step", [_known(total, duration) for total in totals], 1))
    for name in next((rank.phase_seconds for rank in shown if rank.phase_seconds), {}):
        cells = [_known(rank.phase_seconds.get(name), duration) for rank in shown]
        columns.append(_Column(name.replace("_", "\n"), cells, {"data": 2, "collectives": 4}.get(name, 6)))
    return columns


def _step_of(rank: Rank) -> str:
    if not rank.up or rank.stalled:
        return "stalled" if rank.up else "down"
    return _known(rank.step, lambda step: f"{step:,.0f}")


def _known(value: float | None, words: Callable[[float], str]) -> str:
    return "-" if value is None else words(value)


def _rank_style(rank: Rank, facts: Facts) -> str:
    if not rank.up or rank.stalled:
        return "red"
    return "yellow" if facts.imbalance is not None and facts.imbalance.rank == rank.rank else ""


def _worth_a_look(facts: Facts) -> list[Rank]:
    """All ranks, or of many those that are down, stalled, behind or slow; in their order."""
    if len(facts.ranks) <= _MOST_RANKS:
        return facts.ranks
    slow = -1 if facts.imbalance is None else facts.imbalance.rank

    def interest(rank: Rank) -> tuple[bool, bool, bool, int, int]:
        return (rank.up and not rank.stalled, rank.up, rank.rank != slow, rank.step or 0, rank.rank)

    return sorted(sorted(facts.ranks, key=interest)[:_MOST_RANKS], key=lambda rank: rank.rank)


def silent_ranks(facts: Facts) -> Iterator[Text]:
    """Why ranks don't answer, a line for each reason."""
    reasons: dict[str, list[int]] = {}
    for rank in facts.ranks:
        if not rank.up:
            reasons.setdefault(rank.problem or "no answer", []).append(rank.rank)
    for reason, silent in reasons.items():
        yield Text(f"{ranks(silent)}: {reason}", style="red")


def draw_runs(runs: Sequence[Facts], now: float, screen: Screen, older: int = 0) -> RenderableType:
    """Several runs, a line each.

    Args:
        runs: their facts, in the order of the lines.
        now: Unix time.
        screen: what it is drawn on.
        older: number of runs that are there and aren't among these.
    """
    table = _table(screen)
    table.add_column("run", overflow="fold")
    table.add_column("state", overflow="fold")
    for name in ("step", "done", "images/s", "left", "loss", "written"):
        table.add_column(name, justify="right", no_wrap=name != "written")
    for facts in runs:
        share = facts.step / facts.planned_steps if facts.step is not None and facts.planned_steps else None
        table.add_row(
            Text(plain(facts.folder.rstrip("/").rpartition("/")[2])),
            Text(state_words(facts), style=STYLES[facts.state]),
            "-" if facts.step is None else f"{facts.step:,}",
            "-" if share is None else f"{int(100 * min(share, 1.0))} %",
            "-" if facts.images_per_second is None or facts.state != "running" else figure(facts.images_per_second),
            "-" if facts.remaining_seconds is None else duration(facts.remaining_seconds),
            "-" if facts.loss.last is None else figure(facts.loss.last),
            "-" if facts.updated is None else since(facts.updated, now),
        )
    if not older:
        return table
    words = "older run isn't" if older == 1 else "older runs aren't"
    return Group(table, Text(f"{older:,} {words} shown", style="dim"))
