"""Says which rank the others wait for, and where it stands, while a run makes no progress; ends it where it never will.

A collective that doesn't finish looks the same on every rank that waits in it. Each rank therefore leaves its last sign
of life (a beat: step and phase) in the job's store, and a rank that has had none for a while reads those of all.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from torch.distributed import Store  # type: ignore[attr-defined]

from partial_fc.errors import ConfigError
from partial_fc.signs import (
    NAMED,
    STORE_SECONDS,
    Board,
    Sign,
    StoreUnreachable,
    describe_all,
    describe_behind,
    describe_lost,
)

_LOOKS = 4  # a rank that publishes nothing between this many looks is not heard of


class Beat(NamedTuple):
    """The last sign of life of this rank's training thread; ``moment`` in seconds of ``time.monotonic()``.

    ``(era, step, nth)`` orders the beats of all ranks that call :meth:`Watchdog.beat` in the same order: the era
    counts how often the step went back, nth the beats within a step.
    """

    phase: str
    step: int
    era: int
    nth: int
    moment: float


class Watchdog:
    """Watches the thread that made it (the training thread), from :meth:`__enter__` to :meth:`__exit__`.

    After ``stall_seconds`` without a beat, once a stall: every rank's stacks go to ``stacks-rank<r>.txt``; one line is
    said by the lowest waiting rank of each machine, and one by the first ranks that the others wait for. The ranks that
    are behind are those that publish nothing any more, else those whose beat is the oldest in the order of beats.
    After ``limit_seconds`` without a beat the process ends with exit code 1, for the elastic agent to start the job
    again. That catches what the process group's own timeout, which should be shorter, doesn't: a thread that hangs
    outside of collectives, on a dead file server for instance.

    A store call can block for as long as the machine at the other end is silent, whatever the store's timeout says.
    All of them run in a thread of their own, over a connection of their own; whoever needs an answer waits at most a
    few seconds for it. Neither that thread nor the watching one ever raises.

    Args:
        store: the job's store, with a prefix that belongs to this attempt (an agent's store outlives restarts);
            None: this rank watches itself only.
        rank: this rank.
        world_size: number of ranks, all of which have a watchdog over the same store.
        stall_seconds: without a beat until it is said; more than the longest phase takes.
        limit_seconds: without a beat until the process ends; at least ``stall_seconds``.
        folder: where the stacks go; None: to stderr.
        publish_seconds: how often each rank leaves its sign.
        report: takes a line; None: to stderr.

    Raises:
        ConfigError: a time of 0 or less, or a limit below the stall.
    """

    def __init__(
        self,
        store: Store | None,
        rank: int,
        world_size: int,
        *,
        stall_seconds: float,
        limit_seconds: float,
        folder: Path | None,
        publish_seconds: float = 2.0,
        report: Callable[[str], None] | None = None,
    ) -> None:
        if not 0 < stall_seconds <= limit_seconds or not publish_seconds > 0:
            raise ConfigError(
                f"the watchdog's stall_seconds is {stall_seconds}, limit_seconds {limit_seconds}, publish_seconds "
                f"{publish_seconds}: expected 0 < stall_seconds <= limit_seconds and 0 < publish_seconds"
            )
        self._rank, self._world_size = rank, world_size
        self._stall, self._limit, self._publish = stall_seconds, limit_seconds, publish_seconds
        self._folder, self._report = folder, report or _to_stderr
        self._thread_id = threading.get_ident()
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._beat = Beat("start", -1, 0, 0, time.monotonic())
        self._paused = 0
        self._said: Beat | None = None
        self._ending = threading.Event()
        self._board = None
        if store is not None and world_size > 1:
            self._board = Board(store, rank, world_size, self._sign, publish_seconds)
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat(self._beat.phase)
        if self._board is not None:
            self._board.start()
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        if self._board is not None:
            self._board.close()
        self._watcher.join(STORE_SECONDS)

    def beat(self, phase: str, step: int | None = None) -> None:
        """A phase begins (called by the training thread, in the same order on every rank; costs about a microsecond).

        Args:
            phase: its name.
            step: optimizer step; None: the one of the beat before.
        """
        last = self._beat
        step = last.step if step is None else step
        era, nth = last.era + (step < last.step), last.nth + 1 if step == last.step else 0
        self._beat = Beat(phase, step, era, nth, time.monotonic())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block no beat is expected: a phase that is known to be long. The others still see where it is."""
        self._paused += 1
        try:
            yield
        finally:
            self._beat = self._beat._replace(moment=time.monotonic())
            self._paused -= 1

    @property
    def stalled(self) -> bool:
        """Whether there has been no beat for ``stall_seconds``."""
        return not self._paused and self._quiet >= self._stall

    @property
    def _quiet(self) -> float:
        return time.monotonic() - self._beat.moment

    def _sign(self, count: int, left: bool) -> Sign:
        beat = self._beat
        frame = sys._current_frames().get(self._thread_id)
        at = "" if frame is None else f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
        order = (beat.era, beat.step, beat.nth)
        quiet = time.monotonic() - beat.moment
        return Sign(count, self._host, self._pid, beat.phase, order, quiet, time.time(), at, self._paused > 0, left)

    def _watch(self) -> None:
        interval = min(self._publish, self._stall / 4)
        while not self._ending.wait(interval):
            beat, stalled = self._beat, self.stalled
            if stalled and beat is not self._said:
                self._said = beat
                self._tell(beat)
            if not self._paused and self._quiet >= self._limit:
                self._end()

    def _end(self) -> None:
        line = f"rank {self._rank} ({self._host}, pid {self._pid}) ends: {self._no_progress()}, the limit is reached"
        path = self._dump("the limit is reached", aloud=True)
        _within(STORE_SECONDS, lambda: self._report(f"{line}; stacks in {path}"))
        os._exit(1)

    def _no_progress(self) -> str:
        beat = self._beat
        where = f"at step {beat.step} (phase {beat.phase})" if beat.step >= 0 else f"in phase {beat.phase}"
        return f"no progress for {self._quiet:.0f} s {where}"

    def _tell(self, beat: Beat) -> None:
        """Find out who is missing, and say it where it is this rank's turn to speak."""
        try:
            line, speaks = self._missing()
        except StoreUnreachable as error:
            line, speaks = str(error), True
        except Exception as error:  # A watchdog that fails must not take the run with it, and must not go unnoticed.
            line, speaks = f"who is missing can't be told ({type(error).__name__}: {error})", True
        if self._beat is not beat or self._ending.is_set():
            return
        path = self._dump(line, aloud=speaks)
        if speaks:
            text = f"{self._no_progress()}: {line}; stacks of rank {self._rank} in {path}"
            _within(STORE_SECONDS, lambda: self._report(text))

    def _missing(self) -> tuple[str, bool]:
        """(who is missing and where, whether this rank says so).

        Raises:
            StoreUnreachable: nothing can be read.
        """
        if self._board is None:
            return f"it is at {self._sign(0, False).at}", True
        signs, silent = self._look()
        living = {rank: sign for rank, sign in signs.items() if rank not in silent and not sign.left}
        living[self._rank] = self._sign(0, False)
        lost = [rank for rank in range(self._world_size) if rank not in living]
        least = min(sign.order for sign in living.values())
        behind = [rank for rank, sign in living.items() if sign.order == least]
        if lost:
            line, blamed = describe_lost(lost, signs, silent), lost
        elif len(behind) == self._world_size:
            line, blamed = describe_all(living), []
        else:
            line, blamed = describe_behind(behind, living), behind
        if self._rank in blamed:
            return f"the other ranks wait for this one: {line}", self._rank in blamed[:NAMED]
        waiting = [
            rank
            for rank, sign in living.items()
            if rank not in blamed
            and sign.host == self._host
            and not sign.paused
            and sign.quiet > self._stall - 2 * self._publish
        ]
        return line, min(waiting, default=self._rank) >= self._rank

    def _look(self) -> tuple[dict[int, Sign], dict[int, float]]:
        """The ranks' signs, and for those that publish no new one the seconds since the last (by the clocks)."""
        assert self._board is not None
        begin = time.monotonic()
        first = self._board.read()
        signs, unchanged = first, set(range(self._world_size)) - {self._rank}
        for _ in range(_LOOKS - 1):
            if self._ending.wait(self._publish):
                break
            signs = self._board.read()
            unchanged = {rank for rank in unchanged if signs.get(rank) == first.get(rank)}
            if not unchanged:
                break
        looked = time.monotonic() - begin
        ages = {rank: time.time() - signs[rank].wall if rank in signs else 0.0 for rank in unchanged}
        return signs, {rank: max(age, looked) for rank, age in ages.items()}

    def _dump(self, reason: str, *, aloud: bool) -> str:
        """Append the stacks of all threads to this rank's file; its name. Without a folder, to stderr where aloud."""
        if self._folder is None:
            if aloud:
                faulthandler.dump_traceback(all_threads=True)
            return "stderr"
        path = self._folder / f"stacks-rank{self._rank}.txt"

        def write() -> None:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"\n{datetime.now().astimezone().isoformat(timespec='seconds')}  {reason}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

        # The folder may lie on the file server that is dead.
        return str(path) if _within(STORE_SECONDS, write) else f"no file ({path} can't be written)"


def _within(seconds: float, action: Callable[[], None]) -> bool:
    """Do something that may hang or fail; whether it was done in time."""
    done = threading.Event()

    def work() -> None:
        with contextlib.suppress(Exception):
            action()
            done.set()

    thread = threading.Thread(target=work, name="watchdog-write", daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
