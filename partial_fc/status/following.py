"""``metrics.jsonl`` of any size, read once from its beginning to its end and followed from there.

Lines of steps are many: some are kept, evenly over the run, and all of the last ones. They aren't parsed on the way, so
half a gigabyte takes a second or two. Which lines are in effect is the same as with
:func:`partial_fc.journal.read_journal`, of those that are kept.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import deque
from pathlib import Path
from typing import IO, Any, NamedTuple

from partial_fc.journal import GOING_BACK, parse_line
from partial_fc.status.words import number, whole

RECENT = 512  # lines of steps that are kept, the last ones
SPREAD = 1024  # lines of steps that are kept of those before, at most
_BLOCK = 1 << 22
# A journal's line is much shorter: what is longer is none.
_LONGEST = 1 << 24
# As the journal writes it; others are parsed.
_OF_A_STEP = re.compile(rb'\{"kind": "train", "step": (\d{1,18})[,}]')


def open_file(path: str | Path, *, follow: bool = True) -> IO[bytes]:
    """Open a file of others: whatever lies there, this neither waits nor opens a device.

    Args:
        path: the file.
        follow: whether it may be a link; the folders on the way may be links in any case.

    Raises:
        OSError: it isn't there, can't be read, or is no regular file.
    """
    # A pipe's open would wait for a writer.
    descriptor = os.open(
        path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    )
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


class _Kept(NamedTuple):
    """A line of a step: its number among all such lines, its step, and its text."""

    number: int
    step: int
    text: bytes


class FollowedJournal:
    """What a run's journal says, up to the last :meth:`refresh`.

    Args:
        path: ``metrics.jsonl``.
        last_bytes: where it's longer, only these are read: what voids a line stands behind it, so they tell which
            lines are in effect as well. None: all of it.

    Attributes:
        evaluations: those in effect, in the file's order.
        commits: number of commits that are told of.
        last_commit: the line of the last one.
        restarts: how often the run went on.
        rollbacks: how often it went back to a commit after a divergence.
        last_rollback: the line of the last one.
        skipped: steps without an update.
        last_skipped: the line of the last one.
    """

    def __init__(self, path: Path, last_bytes: int | None = None) -> None:
        self._path, self._last_bytes = path, last_bytes
        self._clear()

    def _clear(self) -> None:
        self.evaluations: list[dict[str, Any]] = []
        self.commits = self.restarts = self.rollbacks = self.skipped = 0
        self.last_commit: dict[str, Any] | None = None
        self.last_rollback: dict[str, Any] | None = None
        self.last_skipped: dict[str, Any] | None = None
        self._place: tuple[int, int] | None = None
        self._offset, self._rest, self._skipping = 0, b"", False
        self._count, self._stride = 0, 1
        self._spread: list[_Kept] = []
        self._recent: deque[_Kept] = deque()
        self._since, self._started, self._seconds = 0, 0, 0.0

    def refresh(self) -> None:
        """Read what was added. A file that was replaced or cut is read anew.

        Raises:
            OSError: it can't be read; what was read before stays.
        """
        with open_file(self._path) as file:
            self._read(file)

    def _read(self, file: IO[bytes]) -> None:
        state = os.fstat(file.fileno())
        if self._place != (state.st_dev, state.st_ino) or state.st_size < self._offset:
            self._clear()
            self._place = state.st_dev, state.st_ino
            if self._last_bytes is not None and state.st_size > self._last_bytes:
                # Most likely within a line.
                self._offset, self._skipping = state.st_size - self._last_bytes, True
        file.seek(self._offset)
        while block := file.read(_BLOCK):
            self._offset += len(block)
            *lines, self._rest = (self._rest + block).split(b"\n")
            for line in lines:
                if not self._skipping:
                    self._take(line)
                self._skipping = False
            if len(self._rest) > _LONGEST:
                self._rest, self._skipping = b"", True
        # A whole line counts before its end is there.
        if not self._skipping and _parse(self._rest) is not None:
            self._take(self._rest)
            self._rest = b""

    def _take(self, line: bytes) -> None:
        if found := _OF_A_STEP.match(line):
            self._keep(int(found[1]), line)
            return
        content = _parse(line) if line else None
        if content is None:
            return
        kind, step = content["kind"], content["step"]
        if kind == "train":
            self._keep(step, line)
        elif kind == "evaluation":
            self.evaluations.append(content)
        elif kind == "commit":
            self.commits, self.last_commit = self.commits + 1, content
        elif kind == "skipped":
            content.pop("sample_ids", None)
            self.skipped, self.last_skipped = self.skipped + 1, content
        elif kind in GOING_BACK:
            self._go_back(content)

    def _keep(self, step: int, line: bytes) -> None:
        self._recent.append(_Kept(self._count, step, line))
        self._count += 1
        if len(self._recent) <= RECENT:
            return
        oldest = self._recent.popleft()
        if oldest.number % self._stride == 0:
            self._spread.append(oldest)
        if len(self._spread) > SPREAD:
            self._stride *= 2
            self._spread = [kept for kept in self._spread if kept.number % self._stride == 0]

    def _go_back(self, line: dict[str, Any]) -> None:
        step = line["step"]
        if line["kind"] == "resumed":
            self.restarts += 1
            # The seconds of a start begin at 0.
            self._seconds += self._of_start()
            self._started = self._count
        else:
            self.rollbacks, self.last_rollback = self.rollbacks + 1, line
        self._since = self._count
        self._spread = [kept for kept in self._spread if kept.step <= step]
        self._recent = deque(kept for kept in self._recent if kept.step <= step)
        self.evaluations = [old for old in self.evaluations if old["step"] <= step]

    def steps(self) -> list[dict[str, Any]]:
        """The kept lines of steps in effect, in the file's order."""
        return _parsed([*self._spread, *self._recent])

    def latest(self) -> list[dict[str, Any]]:
        """Of these, the lines since the run last went on or back."""
        return _parsed([kept for kept in (*self._spread, *self._recent) if kept.number >= self._since])

    @property
    def seconds(self) -> float:
        """Seconds of all starts, each up to its last line of a step."""
        return self._seconds + self._of_start()

    def _of_start(self) -> float:
        lines = _parsed([kept for kept in self._recent if kept.number >= self._started][-1:])
        return max(0.0, number(lines[-1].get("seconds")) or 0.0) if lines else 0.0


def _parse(line: bytes) -> dict[str, Any] | None:
    content = parse_line(line.decode("utf-8", errors="replace"))
    return content if content is not None and whole(content["step"]) is not None else None


def _parsed(kept: list[_Kept]) -> list[dict[str, Any]]:
    # What a killed process left half-written looks like a line at its beginning.
    lines = (_parse(one.text) for one in kept)
    return [line for line in lines if line is not None and line["kind"] == "train"]
