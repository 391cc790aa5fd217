"""Where the ranks of a run serve their metrics: ``targets/NAME.json`` beside the run's folder, which Prometheus reads.

The files of all runs lie in one folder, as Prometheus' file discovery takes a ``*`` only in a path's last part. A file
is written at each start of its run, and is ``[]`` once the processes ended in order. Where they were killed it stays as
it was: the targets are down then, and an alert can say so.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import socket
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from partial_fc.machine import addresses_towards

_FOLDER = "targets"

_log = logging.getLogger(__name__)


def reachable_host(address: str, advertise: str | None, rendezvous_host: str | None) -> str:
    """The name or address under which others reach an endpoint of this machine. Sends nothing.

    Args:
        address: where the endpoint listens.
        advertise: what to tell others; None: ``address``, or where that is all addresses of the machine (``0.0.0.0``,
            ``::``), the one from which it would reach the rendezvous host; the machine's name where that is a loopback.
        rendezvous_host: a name or address at which the job's ranks meet; None: there is none.
    """
    if advertise is not None:
        return advertise
    if address not in ("0.0.0.0", "::"):
        return address
    families = [socket.AF_INET] if address == "0.0.0.0" else [socket.AF_INET, socket.AF_INET6]
    for source in addresses_towards(rendezvous_host, families) if rendezvous_host else ():
        found = ipaddress.ip_address(source)
        # A link-local address means something only together with the other side's interface.
        if not (found.is_loopback or found.is_link_local or found.is_unspecified):
            return source
    return socket.gethostname()


def targets_of(endpoints: Sequence[tuple[str, int | None]], *, run: str, tls: bool) -> list[dict[str, Any]]:
    """What the file holds.

    Args:
        endpoints: by rank, host and port; a rank without a port serves nothing and is left out.
        run: name of the run.
        tls: whether the endpoints are encrypted.
    """
    scheme = {"__scheme__": "https"} if tls else {}
    return [
        {"targets": [f"{_bracketed(host)}:{port}"], "labels": {"run": run, "rank": str(rank), **scheme}}
        for rank, (host, port) in enumerate(endpoints)
        if port is not None
    ]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def targets_file(folder: Path) -> Path:
    """The file of the run that has this folder."""
    folder = folder.resolve()
    return folder.parent / _FOLDER / f"{folder.name}.json"


def write_targets(folder: Path, targets: Sequence[Mapping[str, Any]]) -> None:
    """Replace a run's file; a disk that is full costs a warning, not the run."""
    file = targets_file(folder)
    other = file.with_name(f"{file.name}.new")
    try:
        if not file.parent.exists():
            file.parent.mkdir(exist_ok=True)
            # Whoever may make runs there may tell of them, too.
            file.parent.chmod(stat.S_IMODE(file.parent.parent.stat().st_mode))
        other.write_text(json.dumps(list(targets), indent=1) + "\n", encoding="utf-8")
        # Prometheus is another user.
        other.chmod(0o644)
        # Prometheus may read at any moment, and keeps what it had only where the file can't be parsed.
        os.replace(other, file)
    except OSError as error:
        _log.warning("%s can't be written (%s): Prometheus doesn't find this start's ranks by it", file, error.strerror)
        with contextlib.suppress(OSError):
            other.unlink()


def clear_targets(folder: Path) -> None:
    """Say that there is nothing to scrape any more; nothing is made where no file is."""
    if targets_file(folder).exists():
        write_targets(folder, [])


def read_targets(folder: Path) -> list[dict[str, Any]]:
    """What the file holds, as :func:`targets_of` made it; without what isn't like that, and ``[]`` without a file."""
    try:
        return parse_targets(targets_file(folder).read_bytes())
    except OSError:
        return []


def parse_targets(text: bytes) -> list[dict[str, Any]]:
    """The targets in the text of such a file; without what isn't like that."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return [entry for entry in content if _is_target(entry)] if isinstance(content, list) else []


def _is_target(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("labels"), dict):
        return False
    targets, labels = entry.get("targets"), entry["labels"]
    texts = isinstance(targets, list) and len(targets) == 1 and isinstance(targets[0], str)
    return texts and all(isinstance(value, str) for value in labels.values()) and {"run", "rank"} <= labels.keys()
