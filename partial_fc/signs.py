"""Each rank's last sign of life in the job's store, and in words what the signs of all say about who is missing."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import Store  # type: ignore[attr-defined]

STORE_SECONDS = 3.0  # a store that takes longer to answer counts as gone
_RETRY_SECONDS = 30.0  # how often a store that is gone is tried again, each time with the backend's lines on stderr
NAMED = 3  # ranks that a line describes one by one; of more it gives the numbers


class Sign(NamedTuple):
    """A beat of a rank as it lies in the store, as JSON.

    Attributes:
        number: rises with each that the rank publishes.
        host: the machine's name.
        pid: the process.
        phase: what the training thread does.
        order: (era, step, nth) of the beat; the step is -1 before the first.
        quiet: seconds since the beat.
        wall: when it was published, seconds of ``time.time()``.
        at: the training thread's innermost line of Python.
        paused: whether the phase is known to be long.
        left: whether the rank has ended in order, or by an error of its own.
    """

    number: int
    host: str
    pid: int
    phase: str
    order: tuple[int, int, int]
    quiet: float
    wall: float
    at: str
    paused: bool
    left: bool

    @property
    def place(self) -> str:
        """Where the rank stands, in words."""
        return place(self.phase, self.order[1])


class StoreUnreachable(Exception):
    """Nothing can be read: no answer from the store; the message says so in words."""


class Board:
    """The signs of all ranks in the store: one thread publishes this rank's and, when asked, reads the others'.

    Args:
        store: where they lie.
        rank: this rank.
        world_size: number of ranks.
        sign: makes this rank's sign, given its number and whether it is the last.
        publish_seconds: how often.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        sign: Callable[[int, bool], Sign],
        publish_seconds: float,
    ) -> None:
        self._store, self._own, self._retry_at = store, False, 0.0
        self._key, self._keys = f"beat/{rank}", [f"beat/{other}" for other in range(world_size)]
        self._sign, self._interval = sign, publish_seconds
        self._number = 0
        # None ends the thread.
        self._asked: queue.SimpleQueue[Future[dict[int, Sign]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="watchdog-store", daemon=True)

    def start(self) -> None:
        """Begin to publish."""
        self._thread.start()

    def close(self) -> None:
        """Publish that this rank leaves, and end; a thread that is stuck in a call is left behind."""
        self._asked.put(None)
        self._thread.join(STORE_SECONDS)

    def read(self) -> dict[int, Sign]:
        """The sign of each rank that left one.

        Raises:
            StoreUnreachable: no answer within a few seconds.
        """
        answer: Future[dict[int, Sign]] = Future()
        self._asked.put(answer)
        try:
            return answer.result(2 * STORE_SECONDS)
        except (StoreUnreachable, FutureTimeoutError):
            raise StoreUnreachable(
                "rank 0's machine, which keeps the store, can't be reached: it, its process or the network to it is "
                "gone, and who else is missing is unknown"
            ) from None

    def _serve(self) -> None:
        request: Future[dict[int, Sign]] | None = None
        while True:
            if request is not None or time.monotonic() >= self._retry_at:
                self._exchange(request)
            try:
                request = self._asked.get(timeout=self._interval)
            except queue.Empty:
                request = None
                continue
            if request is None:
                if self._own:
                    with contextlib.suppress(Exception):
                        self._publish(last=True)
                return

    def _exchange(self, request: Future[dict[int, Sign]] | None) -> None:
        try:
            if not self._own:
                # The clone of a clone takes over its short timeout; of a store that is gone, only this thread waits.
                self._store = self._store.clone()  # type: ignore[attr-defined]
                self._store.set_timeout(timedelta(seconds=STORE_SECONDS))
                self._own = True
            self._publish(last=False)
            if request is not None:
                request.set_result(self._read())
        except Exception as error:  # This thread must go on; whoever asks is told what it was.
            self._own, self._retry_at = False, time.monotonic() + _RETRY_SECONDS
            if request is not None:
                # Those of a store are RuntimeErrors, and its backend has written to stderr what happened.
                request.set_exception(StoreUnreachable() if isinstance(error, RuntimeError | OSError) else error)

    def _publish(self, *, last: bool) -> None:
        self._number += 1
        self._store.set(self._key, json.dumps(self._sign(self._number, last)))

    def _read(self) -> dict[int, Sign]:
        # Of a key that isn't there, get() would wait for the whole timeout.
        present = list(range(len(self._keys)))
        if not self._store.check(self._keys):
            present = [rank for rank in present if self._store.check([self._keys[rank]])]
        keys = [self._keys[rank] for rank in present]
        many = bool(keys) and self._store.has_extended_api()  # type: ignore[attr-defined]
        values = self._store.multi_get(keys) if many else [self._store.get(key) for key in keys]
        return {rank: _parse(value) for rank, value in zip(present, values, strict=True)}


def _parse(value: bytes) -> Sign:
    sign = Sign(*json.loads(value))
    era, step, nth = sign.order
    return sign._replace(order=(era, step, nth))


def describe_lost(lost: list[int], signs: dict[int, Sign], silent: dict[int, float]) -> str:
    """Ranks that publish nothing any more, ``silent`` for that many seconds, or that have left."""
    parts = []
    for rank in lost[:NAMED]:
        sign = signs.get(rank)
        if sign is None:
            parts.append(f"rank {rank} hasn't been heard of at all: its process or machine is gone or didn't start")
        elif sign.left:
            parts.append(f"{_who(rank, sign)} has left the run, last {sign.place}")
        else:
            age = f"{silent[rank]:.0f} s"
            gone = "its process or machine is gone"
            parts.append(f"{_who(rank, sign)} hasn't been heard of for {age}, last {sign.place}: {gone}")
    if len(lost) > NAMED:
        parts.append(f"so it is with {_numbers(lost[NAMED:])}")
    return "; ".join(parts)


def describe_behind(behind: list[int], signs: dict[int, Sign]) -> str:
    """Ranks whose last beat comes before those of the others."""
    if len(behind) > NAMED:
        sign = signs[behind[0]]
        return f"{_numbers(behind)} are behind, {sign.place} for {sign.quiet:.0f} s"
    parts = []
    for rank in behind:
        sign = signs[rank]
        known = ", which is known to be long" if sign.paused else ""
        parts.append(f"{_who(rank, sign)} is behind, {sign.place} for {sign.quiet:.0f} s{known}, at {sign.at}")
    return "; ".join(parts)


def describe_all(signs: dict[int, Sign]) -> str:
    """Where the beats don't tell the ranks apart, their lines of Python may: the smallest groups first."""
    groups: dict[str, list[int]] = {}
    for rank, sign in sorted(signs.items()):
        groups.setdefault(sign.at, []).append(rank)
    places = sorted(groups.items(), key=lambda group: len(group[1]))[:NAMED]
    where = ", ".join(f"{_numbers(ranks)} at {at}" for at, ranks in places)
    guess = "" if len(groups) > 1 else " (the network, if that is a collective)"
    return f"all {len(signs)} ranks stand {signs[0].place}{guess}: {where}"


def place(phase: str, step: int) -> str:
    """A place in the training, in words; the step is -1 before the first."""
    return f"in phase {phase}" + (f" of step {step}" if step >= 0 else "")


def _who(rank: int, sign: Sign) -> str:
    return f"rank {rank} (host {sign.host}, pid {sign.pid})"


def _numbers(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
