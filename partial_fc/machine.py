"""What this process may use of the machine it runs on."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


def processors() -> int:
    """How many processors this process may use: those of its affinity mask where the system has one, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def addresses_towards(host: str, families: Sequence[int] = (socket.AF_UNSPEC,)) -> Iterator[str]:
    """This machine's addresses on its ways to another one. Nothing is sent.

    Args:
        host: a name or address; of one that isn't known there are none.
        families: of the addresses, such as ``socket.AF_INET``; any, in the system's order.
    """
    for wanted in families:
        with contextlib.suppress(OSError, UnicodeError):
            found = socket.getaddrinfo(host, 9, family=wanted, type=socket.SOCK_DGRAM)
            for family, kind, protocol, _, place in found:
                # A datagram socket: connecting it only chooses the way.
                with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                    probe.connect(place)
                    yield str(probe.getsockname()[0])


class HostMemory(NamedTuple):
    """Memory that programs here can have.

    Attributes:
        available: bytes that can still be had.
        limit: bytes in all.
    """

    available: int
    limit: int


def host_memory(root: Path = Path("/")) -> HostMemory | None:
    """The machine's memory, or less where a control group (of a container, or a job) has a limit; Linux only.

    Args:
        root: where ``proc`` and ``sys`` are.

    Returns:
        None where the system doesn't say.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
        memory = HostMemory(fields["MemAvailable"], fields["MemTotal"])
    except (OSError, ValueError, KeyError, IndexError):
        return None
    for group in _control_groups(root):
        available, limit = group
        memory = HostMemory(min(memory.available, available), min(memory.limit, limit))
    return memory


def _control_groups(root: Path) -> Iterator[HostMemory]:
    """Those that limit this process, from its own to the outermost; of both versions of the interface."""
    try:
        entries = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for entry in entries:
        _, controllers, path = (*entry.split(":", 2), "", "")[:3]
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be that of the machine, of which only the innermost folder is seen, as the top.
        inner = top / path.lstrip("/")
        for folder in [inner, *inner.parents] if inner.is_dir() else [top]:
            memory = _group_memory(folder, *names)
            if memory is not None:
                yield memory
            if folder == top:
                break


def _group_memory(folder: Path, limit_name: str, used_name: str, cache_name: str) -> HostMemory | None:
    try:
        limit = int((folder / limit_name).read_text(encoding="ascii"))
        used = int((folder / used_name).read_text(encoding="ascii"))
        stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        # Pages of files are given back when memory is wanted.
        used -= int(stat.get(cache_name, 0))
    except (OSError, ValueError):
        # "max": no limit.
        return None
    return HostMemory(max(limit - used, 0), limit)
