"""Whether a process of this machine holds a run's lock, without touching the lock."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from partial_fc.status.following import open_file

_HOLDER = re.compile(r"host (\S+), pid (\d+)\s*")
_LOCK_BYTES = 4096
_LOCKS = Path("/proc/locks")


def lock_holder(folder: Path, locks: Path = _LOCKS) -> int | None:
    """The process that writes this run, by the kernel's list of locks; None where none is known.

    Taking the lock for a look could turn a start away that comes at this moment. The list has the locks of this
    machine only, and in a container those of its own processes.

    Args:
        folder: the run's.
        locks: the list.
    """
    file = folder / ".lock"
    try:
        with open_file(file) as opened:
            said = _HOLDER.fullmatch(opened.read(_LOCK_BYTES).decode("utf-8", errors="replace"))
            inode = os.fstat(opened.fileno()).st_ino
        listed = locks.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if said is None or said[1] != socket.gethostname():
        return None
    # 1: FLOCK  ADVISORY  WRITE 4387 fe:00:2197306 0 EOF. The device is another one than stat's on some file systems.
    held = re.search(rf"FLOCK +ADVISORY +WRITE +{said[2]} +[0-9a-f]+:[0-9a-f]+:{inode} ", listed)
    return int(said[2]) if held else None
