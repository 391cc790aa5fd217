"""Measured between the ranks: collectives, neighbours in a ring, clocks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames it.
_all_gather_into: Callable[..., Any] = getattr(
    dist, "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
)
SMALL_BYTES = 4096
_SMALL_CALLS = 20
_REPEATS = 5
# Fewer repeats where the first call took long.
_SECONDS_A_TEST = 3.0
_PINGS = 8


def measure_links(device: torch.device, megabytes: int) -> dict[str, Any]:
    """Measure all of it over the default group. Collective.

    Args:
        device: where tensors are.
        megabytes: size of the large message.

    Returns:
        ``all_reduce`` and ``all_gather``, each {``bytes``: of the tensor (what a gather makes), ``seconds``: of a large
        call, ``latency``: seconds of one of 4096 bytes}; ``ring``: {``bytes``, ``seconds``: until this rank had sent to
        the next and received from the one before}; ``clock``: on rank 0 {rank: (seconds that its clock is ahead of
        rank 0's, round trip)}. Empty with one rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return {}
    size = megabytes * 10**6
    return {
        "all_reduce": _collective(_all_reduce, size, device),
        "all_gather": _collective(_all_gather, size, device),
        "ring": _ring(max(size // 4, SMALL_BYTES), device),
        "clock": _clocks(),
    }


def _all_reduce(size: int, device: torch.device) -> Callable[[], object]:
    tensor = torch.zeros(size // 4, device=device)
    return lambda: dist.all_reduce(tensor)


def _all_gather(size: int, device: torch.device) -> Callable[[], object]:
    ranks = dist.get_world_size()
    part = torch.zeros(max(1, size // 4 // ranks), device=device)
    whole = torch.zeros(len(part) * ranks, device=device)
    return lambda: _all_gather_into(whole, part)


def _collective(
    make: Callable[[int, torch.device], Callable[[], object]], size: int, device: torch.device
) -> dict[str, float]:
    small, large = make(SMALL_BYTES, device), make(size, device)
    return {
        "bytes": size,
        "latency": _median(small, device, calls=_SMALL_CALLS),
        "seconds": _median(large, device),
    }


def _median(action: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of a call: of several rounds of so many calls the median, as the slowest rank has it."""

    def one_round() -> float:
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(calls):
            action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / calls

    one_round()
    first = _slowest(one_round())
    repeats = max(1, min(_REPEATS, int(_SECONDS_A_TEST / max(first * calls, 1e-9))))
    return _slowest(statistics.median([one_round() for _ in range(repeats)]))


def _slowest(seconds: float) -> float:
    """The largest value of all ranks, the same on each."""
    value = torch.tensor(seconds, dtype=torch.float64)
    # On the CPU, that is over gloo: every group of this package has it.
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def _ring(size: int, device: torch.device) -> dict[str, float]:
    """Every rank sends to the next one, all at once."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    out, into = torch.zeros(size // 4, device=device), torch.zeros(size // 4, device=device)

    def one_round() -> float:
        dist.barrier()
        begin = time.perf_counter()
        operations = [
            dist.P2POp(dist.isend, out, (rank + 1) % ranks),
            dist.P2POp(dist.irecv, into, (rank - 1) % ranks),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    first = _slowest(max(one_round(), one_round()))
    repeats = max(1, min(_REPEATS, int(_SECONDS_A_TEST / max(first, 1e-9))))
    return {"bytes": size // 4 * 4, "seconds": statistics.median([one_round() for _ in range(repeats)])}


def _clocks() -> dict[str, tuple[float, float]]:
    """Clocks of the other ranks, asked by rank 0 one after the other.

    (ahead, round trip) of the quickest of several round trips: ahead = its time - middle of the trip, known to half of
    the trip.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, tuple[float, float]] = {}
    for other in range(1, ranks):
        if rank == other:
            for _ in range(_PINGS):
                dist.recv(torch.empty(1, dtype=torch.float64), 0)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0)
        elif rank == 0:
            found[str(other)] = min((_ask_time(other) for _ in range(_PINGS)), key=lambda answer: answer[1])
    return found


def _ask_time(other: int) -> tuple[float, float]:
    """(ahead, round trip) of one question; seconds."""
    answer: Tensor = torch.empty(1, dtype=torch.float64)
    began, begin = time.time(), time.perf_counter()
    dist.send(torch.zeros(1, dtype=torch.float64), other)
    dist.recv(answer, other)
    trip = time.perf_counter() - begin
    return float(answer) - (began + trip / 2), trip
