"""Measuring: interleaved times, the floor of bare products, peak memory."""

from __future__ import annotations

import ctypes
import functools
import gc
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import DTYPES, FLOAT_BYTES, Case, Contender, make_conventional, make_ours, small_case
from torch import Tensor

# Two steps of other sizes make dynamic shapes compile; they belong to the warm-up.
_WARM_STEPS = 3
_MEMORY_STEPS = 3
_CHUNKS = (None, 2048, 8192)
_COPY_BYTES = 1 << 29
_STATUS = Path("/proc/self/status")


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on CPUs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Times:
    """Wall and CPU seconds of a step, one entry a round."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


class Batches:
    """Fresh embeddings and labels from a fixed generator."""

    def __init__(self, case: Case, seed: int = 1) -> None:
        self._case = case
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, classes: int) -> tuple[Tensor, Tensor]:
        """Embeddings of norms near 1, ``[B, d]``, a leaf; labels ``[B]`` below ``classes``."""
        case, generator = self._case, self._generator
        embeddings = F.normalize(torch.randn(case.batch, case.size, generator=generator))
        embeddings *= 1 + 0.1 * torch.randn(case.batch, 1, generator=generator)
        labels = torch.randint(classes, (case.batch,), generator=generator)
        return embeddings.to(case.torch_device).requires_grad_(), labels.to(case.torch_device)


def timed(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def repeat(work: Callable[[], None], times: int) -> None:
    """Call it a number of times."""
    for _ in range(times):
        work()


def interleave(
    case: Case,
    contenders: Sequence[Contender],
    others: dict[str, Callable[[], None]],
    draw: Callable[[int], tuple[Tensor, Tensor]] | None = None,
) -> tuple[dict[str, Times], dict[str, float]]:
    """Rounds over all contenders and other work, in alternating order.

    Args:
        case: rounds, steps of a round, device.
        contenders: each takes steps on fresh batches.
        others: work without a batch.
        draw: a fresh batch of so many classes; None: random ones.

    Returns:
        The times of each, and the seconds that the warm-up of each contender took (compilation happens there).
    """
    device, draw = case.torch_device, draw or Batches(case).draw

    def run(contender: Contender, steps: int) -> tuple[float, float]:
        drawn = [draw(contender.classes) for _ in range(steps)]

        def work() -> None:
            for batch in drawn:
                contender.step(*batch)

        return timed(work, device)

    warm = {contender.name: run(contender, _WARM_STEPS)[0] for contender in contenders}
    for contender in contenders:
        contender.touch()
    entries: list[tuple[str, Contender | Callable[[], None]]] = [(c.name, c) for c in contenders]
    entries += others.items()
    times = {name: Times() for name, _ in entries}
    for number in range(case.rounds + 1):
        for name, entry in entries if number % 2 else reversed(entries):
            if isinstance(entry, Contender):
                wall, cpu = (value / case.steps for value in run(entry, case.steps))
            else:
                wall, cpu = (
                    value / case.steps for value in timed(functools.partial(repeat, entry, case.steps), device)
                )
            # Round 0 warms up.
            if number:
                times[name].seconds.append(wall)
                times[name].cpu_seconds.append(cpu)
    return times, warm


@dataclass(frozen=True)
class Arrangement:
    """How the bare products are done: classes of a chunk (None: all), and the layout of the logits."""

    chunk: int | None
    transposed: bool

    def __str__(self) -> str:
        """For a table."""
        return (
            f"{'whole' if self.chunk is None else f'chunks of {self.chunk}'}, {'[P,B]' if self.transposed else '[B,P]'}"
        )


class Products:
    """The products that a step can't do without: logits (again, where they aren't kept) and two gradients."""

    def __init__(self, case: Case) -> None:
        options: dict[str, Any] = {"dtype": DTYPES[case.compute_dtype], "device": case.torch_device}
        self._weight = torch.randn(case.sampled, case.size, **options)
        self._embeddings = torch.randn(case.batch, case.size, **options)
        self._logits = torch.zeros(case.batch * case.sampled, **options)
        self._left = torch.zeros_like(self._embeddings)
        self._right = torch.zeros_like(self._weight)
        self._device = case.torch_device

    def run(self, arrangement: Arrangement, count: int) -> None:
        """All products once; ``count`` 4, or 3 without the second logits."""
        length = arrangement.chunk or len(self._weight)
        self._left.zero_()
        for begin in range(0, len(self._weight), length):
            rows = self._weight[begin : begin + length]
            right, logits = self._right[: len(rows)], self._logits[: len(self._embeddings) * len(rows)]
            part = self._logits_of(rows, logits, arrangement.transposed)
            if count == 4:
                part = self._logits_of(rows, logits, arrangement.transposed)
            self._left.addmm_(part, rows)
            torch.mm(part.T, self._embeddings, out=right)

    def _logits_of(self, rows: Tensor, out: Tensor, transposed: bool) -> Tensor:
        if transposed:
            return torch.mm(rows, self._embeddings.T, out=out.view(len(rows), -1)).T
        return torch.mm(self._embeddings, rows.T, out=out.view(-1, len(rows)))

    def fastest(self) -> tuple[Arrangement, dict[str, list[float]]]:
        """The fastest arrangement of four products, and the seconds of all."""
        seconds: dict[Arrangement, list[float]] = {}
        for number in range(3):
            for chunk, transposed in product(_CHUNKS, (False, True)):
                if chunk is not None and chunk >= len(self._weight):
                    continue
                arrangement = Arrangement(chunk, transposed)
                wall, _ = timed(functools.partial(self.run, arrangement, 4), self._device)
                if number:
                    seconds.setdefault(arrangement, []).append(wall)
        best = min(seconds, key=lambda way: min(seconds[way]))
        return best, {str(way): values for way, values in seconds.items()}


def state_traffic(case: Case) -> dict[str, int]:
    """Bytes of state that a step must read and write, by who takes it.

    Ours: rows of weight and momentum of the sampled classes, read and written. Conventional: those of all classes, and
    where classes are sampled the dense gradient's, too.
    """
    row = case.size * FLOAT_BYTES
    return {"ours": 4 * case.sampled * row, "conventional": (4 if case.sample_rate == 1 else 6) * case.classes * row}


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read plus written, of a plain copy of half a gigabyte."""
    source = torch.ones(_COPY_BYTES // FLOAT_BYTES, device=device)
    target = torch.empty_like(source).zero_()

    def copy() -> None:
        target.copy_(source)

    return 2 * _COPY_BYTES / min(timed(copy, device)[0] for _ in range(4))


def available_bytes(device: torch.device) -> int:
    """Memory that is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])


def estimated_bytes(case: Case, who: str) -> int:
    """About what a contender takes at its peak; "products": what the bare products take."""
    weight, drawn = case.state_bytes // 2, case.sampled * case.size * FLOAT_BYTES
    if who == "products":
        return 2 * drawn + case.logits_bytes
    if who == "ours":
        return 2 * weight + (case.logits_bytes if case.kept else 0) + drawn // 4
    return (3 if case.fused_baseline else 4) * weight + 3 * drawn + 6 * case.logits_bytes


class PeakMemory:
    """Peak memory of this process over a baseline: resident on CPUs, allocated on GPUs."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.note = device, ""

    def now(self) -> int:
        """Bytes in use, less what the C library keeps of memory that was freed."""
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        return torch.cuda.memory_allocated() if self._device.type == "cuda" else _status("VmRSS")

    def reset(self) -> None:
        """Forget the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError as error:
            self.note = f"the peak includes the warm-up, since it could not be reset ({error})"

    def peak(self) -> int:
        """The peak since the reset."""
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(name + r":\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])


def measure_memory(case: Case, who: str) -> dict[str, Any]:
    """Peak memory of a contender ("ours" or "conventional") over what this process held before its head.

    What a process takes only once (the library's own memory, compiled code) comes before: a small product and three
    steps of a small head of the same kind. It is reported apart.
    """

    def make(of: Case) -> Contender:
        return make_ours(of)[0] if who == "ours" else make_conventional(of)

    def train(of: Case) -> None:
        contender, batches = make(of), Batches(of)
        for number in range(_MEMORY_STEPS):
            contender.step(*batches.draw(of.classes))
            if number == 0:
                contender.touch()
        synchronize(of.torch_device)

    memory = PeakMemory(case.torch_device)
    torch.mm(torch.randn(256, 512, device=case.torch_device), torch.randn(512, 256, device=case.torch_device))
    first = memory.now()
    train(small_case(case))
    before = memory.now()
    memory.reset()
    train(case)
    used = memory.peak() - before
    return {
        "peak_bytes": used,
        "ratio": used / case.state_bytes,
        "once_bytes": before - first,
        "state_bytes": case.state_bytes,
        "note": memory.note,
    }
