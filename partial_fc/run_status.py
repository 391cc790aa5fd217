"""``status.json`` of a run's folder, and the lock that one job at a time holds on it.

The status says where the run stands: ``running`` (also after its processes were killed), ``resume`` (saved and ended on
a signal: start the same command again), ``finished``, or ``failed``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from partial_fc.errors import PartialFCError

# Names a file of this machine for the launcher's eyes: the state of the run that it started, a word.
OUTCOME = "PARTIAL_FC_OUTCOME"
_FILE = "status.json"
# A job that restarts may meet the last breaths of the process that held the lock.
_LOCK_SECONDS = 60.0

_log = logging.getLogger(__name__)


class Status:
    """Writes the status; on other ranks than 0 it only tells the machine's launcher, where that wants to know.

    Args:
        folder: the run's.
        active: whether this is rank 0.
        tells: whether this is local rank 0, which writes the state into the file that ``PARTIAL_FC_OUTCOME`` names.
        content: what every status holds, such as the run's name.
    """

    def __init__(self, folder: Path, *, active: bool, tells: bool = False, **content: Any) -> None:
        self._path, self._active, self._content = folder / _FILE, active, content
        self._outcome, self._told = os.environ.get(OUTCOME) if tells else None, ""

    def write(self, state: str, step: int, **more: Any) -> None:
        """Replace the status; a disk that is full costs a warning, not the run.

        Args:
            state: see above.
            step: optimizer steps done.
            more: what this status and those after it hold, such as the last committed step.
        """
        self.tell(state)
        if not self._active:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._content |= {"state": state, "step": step, "updated": now, **more}
        other = self._path.with_suffix(".json.new")
        try:
            other.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
            os.replace(other, self._path)
        except OSError as error:
            _log.warning("%s can't be written (%s): the status there is an older one", self._path, error.strerror)

    def tell(self, state: str) -> None:
        """Tell the launcher of this machine only."""
        if self._outcome and state != self._told:
            # Beside it first: on a disk that is full an empty file would take the place of what was told before.
            new = Path(f"{self._outcome}.new")
            try:
                new.write_text(f"{state}\n", encoding="utf-8")
                os.replace(new, self._outcome)
                self._told = state
            except OSError as error:
                _log.warning("%s can't be written (%s): the launcher won't know the outcome", self._outcome, error)


def read_status(folder: Path) -> dict[str, Any] | None:
    """The status of a folder; None where there is none that can be read."""
    try:
        content = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def this_agent() -> str | None:
    """What names the process of torchrun that started this one, and no other; None: torchrun didn't.

    All restarts of a job are by agents that were there before, whatever ``--rdzv-id`` they were given.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parent = os.getppid()
    started = "?"
    with contextlib.suppress(OSError):
        # Behind the name, which is in parentheses and may hold blanks: clock ticks since the machine's start.
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()}:{parent}:{started}"


def restarted(status: dict[str, Any], agents: Sequence[str | None]) -> bool:
    """Whether one of these agents was there when the status was written."""
    return bool(set(status.get("agents", ())) & {agent for agent in agents if agent is not None})


def hold(folder: Path) -> IO[str] | None:
    """Lock a run's folder until the file that is returned is closed, or this process ends, however it does.

    Returns:
        The locked file; None where the file system knows no locks.

    Raises:
        PartialFCError: another process holds it, and goes on to.
    """
    file = (folder / ".lock").open("a+", encoding="utf-8")
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise PartialFCError(
                    f"{folder}: another job writes this run ({file.read().strip() or 'unknown'}): end it, or choose "
                    "another train.name"
                ) from None
            time.sleep(0.5)
        except OSError:
            file.close()
            return None
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
    file.flush()
    return file
