"""What ranks tell each other before there is a process group, and where none can be made: keys of the job's store."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from partial_fc.doctor.findings import Finding, Identity
from partial_fc.doctor.interfaces import master_address
from partial_fc.errors import PartialFCError

_POLL_SECONDS = 0.05


class Ended(Exception):
    """The launcher ends the job."""


class Ending:
    """Within it SIGTERM doesn't end this process, but what it waits for: there is something to show first.

    torchrun sends it to all ranks when one has stopped. Python's handler runs between two polls of a wait, and every
    wait of the preflight is polled; what may hang is done in a thread.

    Args:
        active: False, or outside of the main thread: nothing changes.
    """

    def __init__(self, *, active: bool) -> None:
        self._active = active and threading.current_thread() is threading.main_thread()
        self._asked = self._answered = False
        self._old: Any = None

    def __enter__(self) -> Ending:
        if self._active:
            self._old = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            # None: a handler that was not installed from Python, which can't be put back.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._old is None else self._old)

    def check(self) -> None:
        """Raise :class:`Ended` where the signal came and isn't answered yet."""
        if self._asked and not self._answered:
            raise Ended

    def answer(self) -> None:
        """What is left takes seconds, and is done whether the signal came or comes."""
        self._answered = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


class Board:
    """A place where ranks put values (JSON) under a name, and read those of others, with a deadline.

    Args:
        store: that all ranks reach.
        me: this process.
        between: called at every poll of a wait; what it raises ends the wait.
    """

    def __init__(self, store: Store, me: Identity, between: Callable[[], None] = lambda: None) -> None:
        self._store, self._me, self._between = store, me, between

    def put(self, name: str, value: Any) -> None:
        """This rank's value under a name; a later one takes its place."""
        self._store.set(f"{name}/{self._me.rank}", json.dumps(value))

    def read(self, name: str, rank: int) -> Any:
        """A rank's value under a name, None where there is none yet."""
        key = f"{name}/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def wait(self, name: str, rank: int, seconds: float) -> Any:
        """A rank's value under a name, None where there is none in time."""
        return self.collect(name, [rank], seconds).get(rank)

    def collect(self, name: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """The values of these ranks under a name, without those that aren't there in time."""
        found: dict[int, Any] = {}
        missing = list(ranks)
        deadline = time.monotonic() + seconds
        while True:
            self._between()
            for rank in list(missing):
                value = self.read(name, rank)
                if value is not None:
                    found[rank] = value
                    missing.remove(rank)
            if not missing or time.monotonic() >= deadline:
                return found
            time.sleep(_POLL_SECONDS)


def open_board(me: Identity, seconds: float, between: Callable[[], None] = lambda: None) -> Board:
    """Reach the job's store at MASTER_ADDR:MASTER_PORT; a process that is alone has its own.

    Args:
        me: this process.
        seconds: how long to try.
        between: of the :class:`Board`.

    Raises:
        PartialFCError: the address is missing, or nobody answers there in time.
    """
    if not me.launched:
        return Board(HashStore(), me, between)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise PartialFCError(f"RANK is {me.rank} but {missing[0]} isn't set: start the job with torchrun")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # The agent of torchrun keeps the store, else rank 0 does: then the process group finds this one (multi-tenant).
    # Nobody waits here for the other ranks, so that rank 0 can say which are missing.
    keeps = me.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            address,
            port,
            is_master=keeps,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise PartialFCError(
            f"rank {me.rank} on {me.host} can't reach the job's store at {address}:{port} within {seconds:g} s "
            f"({reason[:120]}): see that rank 0 runs, that the name means that machine here, and that no firewall "
            "is between"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Board(PrefixStore(f"doctor/{attempt}", store), me, between)


def presence(
    me: Identity, here: Mapping[int, str], answers: Collection[int], join_seconds: float, all_seconds: float
) -> list[Finding]:
    """Which ranks came, and which of them told what they found.

    Args:
        me: rank 0.
        here: host by rank, of the others that came.
        answers: the others that told.
        join_seconds: how long they were waited for.
        all_seconds: how long they could tell.
    """
    missing = tuple(rank for rank in range(1, me.world_size) if rank not in here)
    late = tuple(rank for rank in here if rank not in answers)
    findings = []
    if missing:
        hosts = ", ".join(dict.fromkeys([me.host, *here.values()]))
        text = (
            f"{len(missing)} of {me.world_size} did not come within {join_seconds:g} s, those of {hosts} did: see the "
            f"output of rank {missing[0]}, and whether its machine reaches {master_address()}"
        )
        findings.append(Finding("fail", "ranks", text, missing))
    if late:
        text = f"came, but told nothing within {all_seconds:g} s: see the output of rank {late[0]}"
        findings.append(Finding("fail", "ranks", text, late))
    if not findings:
        came = "all came" if me.world_size > 1 else "alone, without a launcher" if not me.launched else "the only one"
        findings.append(Finding("ok", "ranks", came))
    return findings


def cut_off(me: Identity, answers: Collection[int], measured: Collection[int]) -> Finding:
    """What the launcher's signal cut off.

    Args:
        me: rank 0.
        answers: the others that told what they found.
        measured: the others that joined the group and measured it.
    """
    others = range(1, me.world_size)
    why = "the launcher ended all ranks (SIGTERM), as it does when one stops: see the rank that it names"
    silent = tuple(rank for rank in others if rank not in answers)
    if silent:
        return Finding("fail", "ranks", f"told nothing before {why}", silent)
    apart = tuple(rank for rank in others if rank not in measured)
    if apart:
        return Finding("fail", "ranks", f"had not joined and measured yet when {why}", apart)
    return Finding("fail", "ranks", f"not at the end yet when {why}")
