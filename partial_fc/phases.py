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

    A phase inside another one is not counted in that: the phases add up to the step. On a GPU, waiting for data is what
    the device waits: while it still works on the step before, the host's waiting costs nothing.

    Args:
        device: where the step computes.
        entered: called with a phase's name when it begins, but for those inside another.
    """

    def __init__(self, device: torch.device, entered: Callable[[str], None] | None = None) -> None:
        self._entered = entered
        self._cuda = device.type == "cuda"
        self._around: list[str] = []
        # (phase, its sign, first and last event) on a GPU.
        self._events: list[tuple[str, int, Any, Any]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._steps: list[tuple[list[tuple[str, int, Any, Any]], dict[str, float]]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for a phase, and not for the phase around it."""
        around = self._around[-1] if self._around else None
        if around is None and self._entered is not None:
            self._entered(name)
        self._around.append(name)
        try:
            if self._cuda:
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                yield
                last.record()
                self._events.append((name, 1, first, last))
                if around is not None:
                    self._events.append((around, -1, first, last))
            else:
                begin = time.perf_counter()
                yield
                seconds = time.perf_counter() - begin
                self._seconds[name] += seconds
                if around is not None:
                    self._seconds[around] -= seconds
        finally:
            self._around.pop()

    def inside(self, name: str) -> contextlib.AbstractContextManager[None]:
        """As :meth:`phase` where a phase is around it; else the block isn't counted: it belongs to no step."""
        return self.phase(name) if self._around else contextlib.nullcontext()

    def end_step(self) -> None:
        """Close the step: what follows belongs to the next one."""
        self._steps.append((self._events, self._seconds))
        self._events, self._seconds = [], defaultdict(float)

    def read(self) -> list[dict[str, float]]:
        """Seconds by phase of each step since the last call. On a GPU, call it after something that synchronises."""
        steps, self._steps = self._steps, []
        read = []
        for events, counted in steps:
            seconds = defaultdict(float, counted)
            for name, sign, first, last in events:
                last.synchronize()
                seconds[name] += sign * first.elapsed_time(last) / 1000
            # Times of a phase and of those inside it are rounded apart.
            read.append({name: max(value, 0.0) for name, value in seconds.items()})
        return read
