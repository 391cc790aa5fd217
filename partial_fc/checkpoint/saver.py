"""Saving beside the training: a step waits for the copy of the state, and a thread writes it into a commit."""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import shutil
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from partial_fc.checkpoint.commits import begin, prune, seal
from partial_fc.checkpoint.marker import FORMAT, FileSum
from partial_fc.checkpoint.state import TrainingState
from partial_fc.checkpoint.tensors import local_part, sharded, write_summed
from partial_fc.errors import PartialFCError
from partial_fc.memory import empty_rows

T = TypeVar("T")

# A rank may wait for another one's disk this long; the training is not held up by it.
WRITE_TIMEOUT = timedelta(hours=2)
# The writing gives way to the training, but is never starved while it holds the interpreter's lock.
_NICENESS = 5
# How long the end of a process waits for a thread that was told to stop.
_STOP_SECONDS = 5.0


class Saved(NamedTuple):
    """How a save ended; step, bytes, failure and note are the same on every rank.

    Attributes:
        step: optimizer steps done.
        seconds: from its start to its end.
        copy_seconds: of them, what the training waited for.
        bytes: of the files that all ranks wrote; 0 where it failed.
        failure: why there is no new commit, in one line; None: there is.
        note: what went wrong after the commit was made; None: nothing.
    """

    step: int
    seconds: float
    copy_seconds: float
    bytes: int
    failure: str | None = None
    note: str | None = None


class Saver:
    """Commits the state into a folder, while the training goes on. The constructor is collective.

    A failure of any rank fails the save on every rank; the commits that are there stay, and the next save may succeed.

    Args:
        root: folder of the commits, the same for all ranks.
        state: what to save.
        keep_last: how many of the newest commits stay.
        keep_best: whether the one of the best accuracy stays.
        background: False: :meth:`save` returns when the commit is there, and no copy is made.
        waiting: how all ranks wait for their threads: called with what returns when this rank's is done. The default
            just calls it, and then a rank that hangs is noticed by the writers' timeout only, two hours later.
        timeout: for what the ranks agree on in :meth:`save`; None: the library's.
    """

    def __init__(
        self,
        root: Path,
        state: TrainingState,
        *,
        keep_last: int,
        keep_best: bool,
        background: bool = True,
        waiting: Callable[[Callable[[], None]], object] = lambda join: join(),
        timeout: timedelta | None = None,
    ) -> None:
        self._waiting = waiting
        self._root, self._state = root, state
        self._keep_last, self._keep_best, self._background = keep_last, keep_best, background
        # The thread talks in its own group; what the training asks meanwhile goes through another.
        self._writers, self._askers = _Ranks(WRITE_TIMEOUT), _Ranks(timeout)
        self._staging = _Staging()
        if background:
            self._staging.reserve({**state.coming(), **state.tensors()})
        self._thread: threading.Thread | None = None
        self._done: deque[Saved] = deque()
        self._stop = threading.Event()
        # A thread that still runs when the interpreter ends can abort the process.
        atexit.register(_close, weakref.ref(self))

    @property
    def staged_bytes(self) -> int:
        """Of the host's memory that the copies take on this rank."""
        return self._staging.bytes

    def save(self, info: Mapping[str, Any], *, wait: bool = False, veto: bool = False) -> bool:
        """Copy the state and start to write it; all ranks call this at the same step, between steps.

        Args:
            info: for ``run.json`` (``format`` is added); rank 0's is written.
            wait: for an earlier save first, and then for this one.
            veto: don't save, on any rank.

        Returns:
            Whether it was started; False on every rank where an earlier one is under way on one, or one objects. Then
            try again at the next step.
        """
        if wait:
            self.finish()
        started = time.perf_counter()
        busy = veto or (self._thread is not None and self._thread.is_alive())
        refused, broken = self._askers.any(busy, not busy and self._writers.broken)
        if refused:
            return False
        if broken:
            # gloo closes a group's connections for good where one of its collectives failed.
            self._writers = _Ranks(WRITE_TIMEOUT)
        staged: dict[str, Tensor] = {}
        problem: Exception | None = None
        try:
            tensors = self._state.tensors()
            staged = self._staging.copy(tensors) if self._background else tensors
        except (RuntimeError, MemoryError) as error:  # The other ranks wait for this one in the thread.
            problem = error
        copied = time.perf_counter() - started
        aside = self._background and not wait
        work = (aside, staged, {"format": FORMAT, **copy.deepcopy(dict(info))}, problem, started, copied)
        self._thread = threading.Thread(target=self._run, args=work, name="saver", daemon=True)
        self._thread.start()
        if wait or not self._background:
            self.finish()
        return True

    def outcome(self) -> Saved | None:
        """The oldest finished save that wasn't told yet; None: there is none.

        The ranks may learn of it at different steps; after :meth:`finish`, or a :meth:`save` that started another one,
        all know it.
        """
        return self._done.popleft() if self._done else None

    def finish(self) -> None:
        """Wait for the save that is under way, if one is."""
        if self._thread is not None:
            self._waiting(self._thread.join)
            self._thread = None

    def close(self, wait: bool = True) -> None:
        """The end: wait for a save under way, or give it up (what it wrote is no commit)."""
        if wait:
            self.finish()
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)
        if self._thread is None or not self._thread.is_alive():
            self._staging.free()

    def _run(
        self,
        aside: bool,
        staged: dict[str, Tensor],
        info: dict[str, Any],
        problem: Exception | None,
        started: float,
        copied: float,
    ) -> None:
        """The thread: nothing is raised here."""
        if aside:
            _step_aside()
        size, failure, note = 0, None, None
        try:
            size = self._commit(staged, info, problem)
        except BaseException as error:  # Whatever it is, the training goes on.
            failure = _told(error)
        if failure is None:
            try:
                self._writers.agree(lambda rank: None if rank else self._prune())
            except BaseException as error:  # The commit is there.
                note = f"old checkpoints can't be removed: {_told(error)}"
        seconds = time.perf_counter() - started
        self._done.append(Saved(info["step"], seconds, copied if self._background else seconds, size, failure, note))

    def _commit(self, staged: dict[str, Tensor], info: dict[str, Any], problem: Exception | None) -> int:
        """Write, sum and seal; the bytes of all ranks' files."""
        ranks, made = self._writers, list[Path]()

        def start(rank: int) -> Path | None:
            if problem is not None:
                raise problem
            if rank:
                return None
            # Kept as well, so that it's known where another rank fails.
            made.append(begin(self._root, info["step"]))
            return made[0]

        try:
            partial = ranks.agree(start)[0]
            assert partial is not None
            sums = self._write(partial, staged)
            ranks.agree(lambda rank: None if rank else seal(partial, info, sums))
        except BaseException:
            for folder in made:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return sum(entry.size for entry in sums.values())

    def _write(self, partial: Path, staged: dict[str, Tensor]) -> dict[str, FileSum]:
        def write(rank: int) -> dict[str, FileSum]:
            return write_summed(partial, staged, self._writers.group, self._stop.is_set)

        return {name: entry for sums in self._writers.agree(write) for name, entry in sums.items()}

    def _prune(self) -> None:
        prune(self._root, keep_last=self._keep_last, keep_best=self._keep_best)


class _Staging:
    """Memory on the host for copies of tensors, made once, and touched, so that a copy meets no page fault."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._pinned: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def reserve(self, state: Mapping[str, Tensor]) -> None:
        """Make the buffers for tensors of these names, where they aren't there in this form."""
        for name, tensor in state.items():
            source, buffer = local_part(tensor), self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
                self._unpin(name)
                self._buffers[name] = self._make(name, source)

    def copy(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies by name, sharded ones as such; they stand until the next call."""
        self.reserve(state)
        staged, devices = {}, set()
        for name, tensor in state.items():
            source, buffer = local_part(tensor), self._buffers[name]
            buffer.copy_(source, non_blocking=True)
            if source.is_cuda:
                devices.add(source.device)
            staged[name] = sharded(buffer, len(tensor)) if isinstance(tensor, DTensor) else buffer
        for device in devices:
            torch.cuda.synchronize(device)
        return staged

    def free(self) -> None:
        """Let pinned memory go."""
        for name in list(self._pinned):
            self._unpin(name)

    def _unpin(self, name: str) -> None:
        if name in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop(name))

    def _make(self, name: str, source: Tensor) -> Tensor:
        if source.dim() == 2 and source.is_contiguous():
            buffer = empty_rows(len(source), source.shape[1], source.dtype, "cpu")
        else:
            buffer = torch.empty_like(source, device="cpu", requires_grad=False)
        buffer.zero_()
        # Registered where it is: memory that the library pins itself is rounded up to a power of two.
        if source.is_cuda and buffer.nbytes:
            failed = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
            if not failed:
                self._pinned[name] = buffer.data_ptr()
        return buffer


class _Failed(Exception):
    """What a rank met, on every rank."""


class _Ranks:
    """All ranks, in a group of their own on the host; alone where there is no process group.

    Args:
        timeout: of each collective; None: the library's.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self._size = 0, 1
        # Whether a collective failed, so that the group is of no use any more.
        self.broken = False
        if dist.is_initialized():
            self.rank, self._size = dist.get_rank(), dist.get_world_size()
            self.group = dist.new_group(backend="gloo", timeout=timeout)

    def any(self, *flags: bool) -> list[bool]:
        """Whether each holds on any rank."""
        if self.group is None:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int64, device="cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in found]

    def agree(self, action: Callable[[int], T]) -> list[T]:
        """What ``action(rank)`` gave, by rank; where it fails on one, all raise :class:`_Failed` with its words."""
        result: T | None = None
        failure: str | None = None
        cause: BaseException | None = None
        try:
            result = action(self.rank)
        except BaseException as error:  # The others must hear of it.
            cause, failure = error, _told(error)
        told: list[Any] = [(result, failure)]
        if self.group is not None:
            told *= self._size
            try:
                dist.all_gather_object(told, (result, failure), group=self.group)
            except BaseException:
                self.broken = True
                raise
        for rank, (_, other) in enumerate(told):
            if other is not None:
                raise _Failed(f"rank {rank}: {other}" if rank else other) from cause
        return [result for result, _ in told]


def _told(error: BaseException) -> str:
    """An error in one line; of which type, where it isn't one of ours."""
    line = " ".join(str(error).split())
    return line if isinstance(error, PartialFCError | _Failed) else f"{type(error).__name__}: {line}"


def _step_aside() -> None:
    """Give this thread a lower priority than those that train, where the system has one for threads."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _close(saver: weakref.ref[Saver]) -> None:
    living = saver()
    if living is not None:
        living.close(wait=False)
