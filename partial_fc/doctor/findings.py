"""What the checks find: facts and notes of a rank, findings about the job, and where they hold."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from partial_fc.errors import PartialFCError

Level = Literal["ok", "warn", "fail"]

# More hosts than this are counted, not named.
_NAMED = 3
# How often a wait for a check looks whether it is to end, and what a check gets to end in order then.
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 0.5


class Identity(NamedTuple):
    """Which process this is.

    Attributes:
        rank: among all ranks.
        world_size: W.
        local_rank: among the ranks of this machine.
        local_world_size: how many those are.
        node: number of the machine, as torchrun counts them.
        host: the machine's name.
        launched: whether a launcher started it (else it is alone).
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    host: str
    launched: bool

    @property
    def several_hosts(self) -> bool:
        """Whether the job has ranks on other machines."""
        return self.local_world_size < self.world_size


def read_identity(environ: Mapping[str, str], host: str) -> Identity:
    """This process, by what the launcher says in the environment.

    Raises:
        PartialFCError: a number isn't one.
    """

    def number(name: str, default: int) -> int:
        text = environ.get(name, str(default))
        if not text.isdigit():
            raise PartialFCError(f"{name} is {text!r}, expected a whole number: start the job with torchrun")
        return int(text)

    world_size = number("WORLD_SIZE", 1)
    local_world_size = number("LOCAL_WORLD_SIZE", world_size)
    rank = number("RANK", 0)
    node = number("GROUP_RANK", rank // max(local_world_size, 1))
    return Identity(rank, world_size, number("LOCAL_RANK", 0), local_world_size, node, host, launched="RANK" in environ)


@dataclass
class Notes:
    """What one check found on one rank.

    Attributes:
        check: its name.
        facts: values that rank 0 compares and shows; JSON.
        found: (level, text) of what is wrong here.
    """

    check: str
    facts: dict[str, Any] = field(default_factory=dict)
    found: list[tuple[Level, str]] = field(default_factory=list)

    def warn(self, text: str) -> None:
        """Something that a run survives."""
        self.found.append(("warn", text))

    def fail(self, text: str) -> None:
        """Something that a run doesn't."""
        self.found.append(("fail", text))


@dataclass(frozen=True)
class Report:
    """All that one rank found.

    Attributes:
        rank, node, host: as in :class:`Identity`.
        facts: by check.
        found: (check, level, text) of what is wrong there.
    """

    rank: int
    node: int
    host: str
    facts: dict[str, dict[str, Any]]
    found: list[tuple[str, Level, str]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Finding(NamedTuple):
    """A line of the result.

    Attributes:
        level: ``ok``, ``warn`` or ``fail``.
        check: what was looked at.
        text: the value got, what was expected, and the next step.
        ranks: where it holds; empty: the job as a whole.
    """

    level: Level
    check: str
    text: str
    ranks: tuple[int, ...] = ()


def perform(
    check: str, action: Callable[[Notes], None], seconds: float, between: Callable[[], None] = lambda: None
) -> Notes:
    """Run one check; that it raises, or isn't done in time, is what it found.

    It runs in a thread: a call to a file system that doesn't answer can't be interrupted, only left behind.

    Args:
        check: its name.
        action: what is done.
        seconds: how long to wait for it.
        between: called every tenth of a second of that; what it raises is raised here, and the check left behind.
    """
    notes = Notes(check)

    def run() -> None:
        try:
            action(notes)
        except PartialFCError as error:
            notes.fail(str(error))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            notes.fail(f"{where}{error.strerror or error}: check the path and its permissions")
        except Exception as error:  # A check that breaks is a finding, and the others go on.
            notes.fail(f"the check itself failed ({type(error).__name__}: {error}): report this as a bug")

    thread = threading.Thread(target=run, name=f"doctor-{check}", daemon=True)
    between()
    thread.start()
    deadline = time.monotonic() + seconds
    while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
        thread.join(min(_POLL_SECONDS, left))
        try:
            between()
        except BaseException:
            # It removes its files, if it can.
            thread.join(_GRACE_SECONDS)
            raise
    if thread.is_alive():
        late = Notes(check)
        late.fail(f"no answer within {seconds:g} s: see whether the file systems (df) and devices of this machine work")
        return late
    return notes


def merge(reports: Sequence[Report]) -> list[Finding]:
    """What is wrong on single ranks; the same text of several ranks is one finding."""
    ranks: dict[tuple[str, Level, str], list[int]] = {}
    for report in reports:
        for check, level, text in report.found:
            ranks.setdefault((check, level, text), []).append(report.rank)
    return [Finding(level, check, text, tuple(sorted(set(on)))) for (check, level, text), on in ranks.items()]


def gather_by_value(values: Mapping[int, Any]) -> list[tuple[Any, tuple[int, ...]]]:
    """(value, ranks that have it), the value of the lowest rank first."""
    found: list[tuple[Any, list[int]]] = []
    for rank in sorted(values):
        with contextlib.suppress(StopIteration):
            next(ranks for value, ranks in found if value == values[rank]).append(rank)
            continue
        found.append((values[rank], [rank]))
    return [(value, tuple(ranks)) for value, ranks in found]


class Hosts:
    """Names of ranks and machines for the reader.

    Args:
        reports: of all ranks that answered.
        world_size: W.
    """

    def __init__(self, reports: Iterable[Report], world_size: int) -> None:
        self._world_size = world_size
        self._node = {report.rank: report.node for report in reports}
        names = {report.node: report.host for report in reports}
        # Two machines may have one name: cloned images do.
        doubled = {name for name in names.values() if list(names.values()).count(name) > 1}
        self._names = {node: f"{name} (node {node})" if name in doubled else name for node, name in names.items()}

    @property
    def nodes(self) -> list[int]:
        """Numbers of the machines."""
        return sorted(self._names)

    def name(self, node: int) -> str:
        """Of a machine."""
        return self._names[node]

    def ranks(self, node: int) -> tuple[int, ...]:
        """Ranks on a machine."""
        return tuple(sorted(rank for rank, on in self._node.items() if on == node))

    def node(self, rank: int) -> int:
        """The machine of a rank."""
        return self._node[rank]

    def describe(self, ranks: Sequence[int]) -> str:
        """Where something holds: ``all ranks``, ``node1``, ``rank 3 (node1)``."""
        if not ranks or (len(set(ranks)) == self._world_size > 1):
            return "all ranks" if self._world_size > 1 else self._alone()
        if self._world_size == 1:
            return self._alone()
        whole = [node for node in self.nodes if set(self.ranks(node)) <= set(ranks)]
        if len(self.nodes) > 1 and {rank for node in whole for rank in self.ranks(node)} == set(ranks):
            return _named([self.name(node) for node in whole])
        numbers = f"rank{'s' * (len(set(ranks)) > 1)} {show_ranks(ranks)}"
        nodes = sorted({self._node[rank] for rank in ranks if rank in self._node})
        return f"{numbers} ({_named([self.name(node) for node in nodes])})" if nodes else numbers

    def _alone(self) -> str:
        return next(iter(self._names.values()), "rank 0")


def show_ranks(ranks: Iterable[int]) -> str:
    """``0-3, 6`` for 0, 1, 2, 3 and 6."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:_NAMED])} and {more} more"
