"""Where a step's time goes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch


class PhaseTimer:
    """Seconds by phase of a step: by the clock on a CPU, by events on a GPU (which are read at the next log).

    Args:
        device: where the step computes.
        entered: called with a phase's name when it begins.
    """

    def __init__(self, device: torch.device, entered: Callable[[str], None] | None = None) -> None:
        self._entered = entered
        self._cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[list[tuple[str, Any, Any]]] = []
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for a phase."""
        if self._entered is not None:
            self._entered(name)
        begin = time.perf_counter()
        if self._cuda and name != "data":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
        else:
            yield
            self._seconds[name] += time.perf_counter() - begin

    def end_step(self) -> None:
        """Close the step: what follows belongs to the next one."""
        self._open.append([*self._events, *((name, None, value) for name, value in self._seconds.items())])
        self._events, self._seconds = [], defaultdict(float)

    def read(self) -> list[dict[str, float]]:
        """Seconds by phase of each step since the last call. On a GPU, call it after something that synchronises."""
        steps, self._open = self._open, []
        read = []
        for events in steps:
            seconds: defaultdict[str, float] = defaultdict(float)
            for name, first, last in events:
                if first is not None:
                    last.synchronize()
                seconds[name] += last if first is None else first.elapsed_time(last) / 1000
            read.append(dict(seconds))
        return read
