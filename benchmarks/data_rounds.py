"""Contenders in processes of their own, timed in turns: images a second, and CPU seconds an image of the whole tree.

A contender's process stays over all rounds, so imports, graphs, caches and worker processes are there before the first.
Every contender reads ahead, which a short run would get for nothing. So the CPU time of a round goes from standstill to
standstill, where each batch taken means one batch made; and its wall time begins after a few batches, once those that
were ready at the start are used up.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Standstill: less than this share of a CPU, for so many intervals of so many seconds.
_QUIET_SHARE, _QUIET_INTERVALS, _INTERVAL = 0.03, 3, 0.04
_STANDSTILL_DEADLINE = 60.0
# Decoders differ by rounding; the mean level of a class that lacks an image, or has one twice, by much more.
_LEVEL_TOLERANCE = 0.01

# Endless; what it gives has float32 images [b, 3, S, S], int64 labels [b], and int64 sample ids [b] or None.
Batches = Generator[Any, None, None]


class ContenderFailed(RuntimeError):
    """A contender's process ended; its traceback is on the standard error."""


@dataclass
class Round:
    """What one contender took for one round."""

    images_per_second: float
    cpu_microseconds: float


@dataclass
class Facts:
    """What a contender's stream gave for its first epoch, or for its first images where an epoch is too long.

    Attributes:
        images: how many.
        shape: of an image.
        dtype: of the images.
        low: smallest level.
        high: largest level.
        counts: images of each class, int64 ``[C]``.
        levels: sum of the images' mean levels by class, float64 ``[C]``. A flip doesn't change it.
        id_sum: sum of the sample ids, where the stream says them.
    """

    images: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""
    low: float = float("inf")
    high: float = float("-inf")
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    levels: np.ndarray = field(default_factory=lambda: np.zeros(0))
    id_sum: int | None = None

    def add(self, batch: Any, most: int) -> None:
        """Count the first ``most`` images of a batch (``images``, ``labels``, and ``ids`` or None)."""
        images, labels = batch.images[:most], batch.labels[:most].cpu().numpy()
        self.images += len(images)
        self.shape, self.dtype = tuple(images.shape[1:]), str(images.dtype).removeprefix("torch.")
        self.low, self.high = min(self.low, float(images.min())), max(self.high, float(images.max()))
        size = max(len(self.counts), int(labels.max()) + 1)
        self.counts = _padded(self.counts, size) + np.bincount(labels, minlength=size)
        means = images.double().mean((1, 2, 3)).cpu().numpy()
        self.levels = _padded(self.levels, size) + np.bincount(labels, means, minlength=size)
        if batch.ids is not None:
            self.id_sum = (self.id_sum or 0) + int(batch.ids[:most].sum())


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    return np.pad(values, (0, size - len(values)))


def differences(facts: Mapping[str, Facts], *, whole: bool, augmented: Sequence[str] = ()) -> list[str]:
    """What the contenders' work differs in, a line each; none where it is the same.

    Args:
        facts: by contender.
        whole: an epoch was looked at, so labels and images must be the same ones too, in whatever order.
        augmented: contenders that change images by more than flips.
    """
    (first, expected), *others = facts.items()
    found = []
    for name, got in facts.items():
        if got.low < -1 or got.high > 1:
            found.append(f"{name}: levels from {got.low:.4g} to {got.high:.4g}, expected -1 to 1")
        if whole and got.id_sum not in (None, got.images * (got.images - 1) // 2):
            found.append(f"{name}: the sample ids of an epoch of {got.images} sum to {got.id_sum}")
    for name, got in others:
        for what in ("images", "shape", "dtype"):
            if getattr(got, what) != getattr(expected, what):
                found.append(f"{name}: {what} {getattr(got, what)}, {first}: {getattr(expected, what)}")
        if not whole:
            continue
        size = max(len(got.counts), len(expected.counts))
        counts, other = _padded(got.counts, size), _padded(expected.counts, size)
        if (counts != other).any():
            label = int(np.argmax(counts != other))
            found.append(f"{name}: {counts[label]} images of class {label}, {first}: {other[label]}")
            continue
        apart = np.abs(_padded(got.levels, size) - _padded(expected.levels, size)) / np.maximum(counts, 1)
        if apart.max() > _LEVEL_TOLERANCE and not {name, first} & set(augmented):
            label = int(np.argmax(apart))
            found.append(f"{name}: mean level of class {label} is {apart[label]:.3g} from that of {first}")
    return found


def cpu_seconds() -> float:
    """CPU seconds so far of this process, its threads, its children that ended, and its descendants that live."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = sum(_seconds_of(process) for process in _descendants(os.getpid()))
    return time.process_time() + ended.ru_utime + ended.ru_stime + living


def _seconds_of(process: int) -> float:
    """CPU seconds of another process, to the nanosecond; 0 if it has just ended."""
    clock = ctypes.c_int()
    if ctypes.CDLL(None).clock_getcpuclockid(process, ctypes.byref(clock)):
        return 0.0
    try:
        return time.clock_gettime(clock.value)
    except OSError:
        return 0.0


def _descendants(process: int) -> list[int]:
    try:
        threads = list(Path(f"/proc/{process}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except FileNotFoundError:
        return []
    return children + [process for child in children for process in _descendants(child)]


def wait_for_standstill() -> float:
    """Wait until neither this process nor its descendants work any more; the CPU seconds then."""
    begin, quiet, last = time.monotonic(), 0, cpu_seconds()
    while quiet < _QUIET_INTERVALS:
        time.sleep(_INTERVAL)
        now = cpu_seconds()
        quiet = quiet + 1 if now - last < _QUIET_SHARE * _INTERVAL else 0
        last = now
        if time.monotonic() - begin > _STANDSTILL_DEADLINE:
            raise RuntimeError(f"still at work {_STANDSTILL_DEADLINE:.0f} s after the last batch was taken")
    return last


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def run_round(stream: Iterator[Any], lead: int, batches: int) -> Round:
    """Take ``lead`` batches, then ``batches`` more, of which the wall time is taken."""
    before = wait_for_standstill()
    ahead = sum(len(next(stream).images) for _ in range(lead))
    _synchronize()
    begin = time.perf_counter()
    images = sum(len(next(stream).images) for _ in range(batches))
    _synchronize()
    seconds = time.perf_counter() - begin
    return Round(images / seconds, 1e6 * (wait_for_standstill() - before) / (ahead + images))


def _serve(connection: Connection, open_contender: Callable[[Any], Batches], work: Any) -> None:
    """The contender's process: opens its stream, and answers until the other side closes."""
    # Worker processes start as they do by default, not as this one was started.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(work.threads)
    stream = open_contender(work)
    while True:
        try:
            command, *arguments = connection.recv()
        except EOFError:
            break
        if command == "check":
            facts = Facts()
            while facts.images < arguments[0]:
                facts.add(next(stream), arguments[0] - facts.images)
            connection.send(facts)
        else:
            connection.send(run_round(stream, *arguments))
    stream.close()


class ContenderProcess:
    """A contender in a process of its own; as a context manager it ends the process.

    Args:
        name: for messages.
        open_contender: function of ``work`` at the top of a module; gives an endless generator of batches.
        work: its argument; has ``threads``.
    """

    def __init__(self, name: str, open_contender: Callable[[Any], Batches], work: Any) -> None:
        # A fresh interpreter: DALI and OpenMP don't survive a fork, and nothing of this process counts as theirs.
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, open_contender, work))
        self._process.start()
        other.close()

    def check(self, images: int) -> Facts:
        """What the stream gives for its first ``images`` images; to be called once, first."""
        result: Facts = self._ask("check", images)
        return result

    def round(self, lead: int, batches: int) -> Round:
        """Time a round; see :func:`run_round`."""
        result: Round = self._ask("round", lead, batches)
        return result

    def _ask(self, *command: Any) -> Any:
        try:
            self._connection.send(command)
            return self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise ContenderFailed(
                f"{self.name}: its process ended with status {self._process.exitcode}; its messages are above"
            ) from error

    def __enter__(self) -> ContenderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def take_turns(processes: Sequence[ContenderProcess], rounds: int, lead: int, batches: int) -> dict[str, list[Round]]:
    """Every contender once a round, each round with another one first. A round before the first isn't counted."""
    results: dict[str, list[Round]] = {process.name: [] for process in processes}
    for number in range(rounds + 1):
        first = number % len(processes)
        for process in (*processes[first:], *processes[:first]):
            result = process.round(lead, batches)
            if number:
                results[process.name].append(result)
    return results


def efficiency_ratio(rounds: Mapping[str, Sequence[Round]], name: str, reference: str) -> float | None:
    """How many times the images a CPU second of ``reference``: the median of the rounds' ratios, None if not timed."""
    if not rounds.get(name) or not rounds.get(reference):
        return None
    pairs = zip(rounds[name], rounds[reference], strict=True)
    return statistics.median(other.cpu_microseconds / own.cpu_microseconds for own, other in pairs)
