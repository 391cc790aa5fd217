"""What this process may use of the machine it runs on."""

from __future__ import annotations

import os


def processors() -> int:
    """How many processors this process may use: those of its affinity mask where the system has one, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
