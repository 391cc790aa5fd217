"""What ranks tell each other before there is a process group, and where none can be made: keys of the job's store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from partial_fc.doctor.findings import Identity
from partial_fc.errors import PartialFCError

_POLL_SECONDS = 0.05


class Board:
    """A place where ranks put values (JSON) under a name, and read those of others, with a deadline.

    Args:
        store: that all ranks reach.
        me: this process.
    """

    def __init__(self, store: Store, me: Identity) -> None:
        self._store, self._me = store, me

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
            for rank in list(missing):
                value = self.read(name, rank)
                if value is not None:
                    found[rank] = value
                    missing.remove(rank)
            if not missing or time.monotonic() >= deadline:
                return found
            time.sleep(_POLL_SECONDS)


def open_board(me: Identity, seconds: float) -> Board:
    """Reach the job's store at MASTER_ADDR:MASTER_PORT; a process that is alone has its own.

    Raises:
        PartialFCError: the address is missing, or nobody answers there in time.
    """
    if not me.launched:
        return Board(HashStore(), me)
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
    return Board(PrefixStore(f"doctor/{attempt}", store), me)
