"""Flags that any rank raises at any moment and all ranks see at the same step: stop, save, roll back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.errors import ConfigError


class Council:
    """Agrees on flags once a step, a step late, so that no step waits for the agreement.

    What is asked before :meth:`exchange` number k is returned by exchange number k + 1 at the latest, on every rank by
    the same one. In between, a small MAX over all ranks runs in the background: in a gloo group of its own, so that it
    is in nobody's way, neither in the training's collectives nor in the order of what runs on a GPU.

    Making one is collective over the default group.

    Args:
        names: the flags; the same on every rank, in the same order.
        process_group: the ranks that take part; None: all of them. The ranks outside of a part make the same
            ``new_group`` call instead, because a group is made by everybody. Without a default group, or with one
            rank, nothing is sent, and the flags come as late as they would with more.
        timeout: how long an exchange may wait for the other ranks; None: gloo's 30 minutes.

    Raises:
        ConfigError: no name, or one twice.
    """

    def __init__(
        self,
        names: Sequence[str],
        process_group: dist.ProcessGroup | None = None,
        *,
        timeout: timedelta | None = None,
    ) -> None:
        self._names = tuple(names)
        if not self._names or len(set(self._names)) < len(self._names):
            raise ConfigError(f"the council's flags are {list(self._names)}, expected one or more, each once")
        self._lock = threading.Lock()
        self._asked: set[str] = set()
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized() and dist.get_world_size(process_group) > 1:
            ranks = None if process_group is None else dist.get_process_group_ranks(process_group)
            self._group = dist.new_group(ranks, backend="gloo", timeout=timeout)
        self._under_way: tuple[Tensor, dist.Work | None] | None = None

    def ask(self, name: str) -> None:
        """Raise a flag, from any thread, at any time; it stays up until an exchange has returned it.

        Raises:
            ConfigError: not one of the council's flags.
        """
        if name not in self._names:
            raise ConfigError(f"no flag {name!r}, expected one of {list(self._names)}")
        with self._lock:
            self._asked.add(name)

    def exchange(self) -> frozenset[str]:
        """Take up the flags asked for so far, and return those that the exchange before took up. Collective.

        Returns:
            The same on every rank; each flag once, however many ranks asked for it and how often until now.

        Raises:
            RuntimeError: the backend's, where a rank died or none came within the timeout.
        """
        agreed = self.drain()
        with self._lock:
            flags = torch.tensor([name in self._asked for name in self._names], dtype=torch.int64)
        work = None
        if self._group is not None:
            work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._under_way = flags, work
        return agreed

    def drain(self) -> frozenset[str]:
        """Wait for the exchange that is under way, and return its flags. Collective.

        Due at the end of a run: no rank may leave while another waits for its answer. Returns nothing where none is
        under way.

        Raises:
            RuntimeError: as :meth:`exchange`; a later call doesn't wait for the failed exchange again.
        """
        if self._under_way is None:
            return frozenset()
        (flags, work), self._under_way = self._under_way, None
        if work is not None:
            work.wait()
        agreed = frozenset(name for name, flag in zip(self._names, flags.tolist(), strict=True) if flag)
        with self._lock:
            self._asked -= agreed
        return agreed
