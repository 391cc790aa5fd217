"""Run a function on W processes joined by a gloo process group, on this machine, with a deadline.

Every test of several ranks goes through here: :func:`run_ranks` for one job on fresh processes, :class:`RankPool` (the
``ranks`` fixture) for many jobs on the same processes, because a process that imports torch costs seconds and a job on
a living one milliseconds. The first failure of a rank kills the other ranks, which may be waiting for it in a
collective, and shows its traceback in the parent.

A job is a function at the top level of a module, so that the processes can import it.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

START_SECONDS = 180.0  # importing torch on a busy machine
GRACE_SECONDS = 0.1  # in which the failure that came first overtakes those that it caused


class RankFailed(AssertionError):
    """A rank raised, died or was late.

    Attributes:
        rank: the rank that failed first; where several were late, the lowest of them.
        traceback: what the rank wrote: the formatted traceback, or the exit code, or the stacks of the late ranks.
    """

    def __init__(self, rank: int, traceback: str) -> None:
        super().__init__(f"rank {rank} failed\n{traceback}")
        self.rank = rank
        self.traceback = traceback


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Run ``fn(rank, world_size, *args)`` on ``world_size`` fresh processes and return what they return, by rank.

    Args:
        fn: a function at the top level of a module.
        world_size: number of processes; 1 goes through a process group as well.
        args: picklable; each rank gets its own copy.
        timeout: seconds from the moment that all processes are joined (starting them is not counted).

    Raises:
        RankFailed: where a rank raises, dies, returns what can't be pickled, or is not done in time.
    """
    with RankPool(world_size) as pool:
        return pool.run(fn, *args, timeout=timeout)


class RankPool:
    """World_size processes that stay alive between jobs.

    They start with the first job. A failed job kills them; the next job gets new ones. Each job begins with
    ``torch.manual_seed(0)`` and one thread; what else it changes in its process stays for the next job.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._connections: list[multiprocessing.connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty where no process runs."""
        return [process.pid for process in self._processes]

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """As :func:`run_ranks`, on the processes of this pool."""
        job = pickle.dumps((fn, args))
        if not self._processes:
            self._start()
        try:
            for connection in self._connections:
                try:
                    connection.send_bytes(job)
                except OSError:
                    pass  # it died: _collect reports how
            return self._collect(timeout)
        except BaseException:
            self.kill()
            raise

    def close(self) -> None:
        """Let idle processes leave the group in order; kill those that don't."""
        for connection in self._connections:
            try:
                connection.send_bytes(pickle.dumps(None))
            except OSError:
                pass
        deadline = time.monotonic() + 10
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Kill what is left and forget it."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        try:
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, rank, self.world_size, self._folder.name), daemon=True
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
            self._collect(START_SECONDS)
        except BaseException:
            self.kill()
            raise

    def _collect(self, timeout: float) -> list[Any]:
        """Wait for one answer of each rank; raise the failure that came first."""
        deadline = time.monotonic() + timeout
        waiting = dict(zip(self._connections, range(self.world_size), strict=True))
        answers: dict[int, Any] = {}
        failures: list[tuple[float, int, str]] = []
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready and failures:
                break
            if not ready:
                late = sorted(waiting.values())
                raise RankFailed(late[0], f"ranks {late} not done within {timeout:g} s\n{self._stacks(late)}")
            for connection in ready:
                assert isinstance(connection, multiprocessing.connection.Connection)
                rank = waiting.pop(connection)
                moment, answer, failure = self._receive(connection, rank)
                if failure is None:
                    answers[rank] = answer
                else:
                    failures.append((moment, rank, failure))
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            _, rank, failure = min(failures)
            raise RankFailed(rank, failure)
        return [answers[rank] for rank in range(self.world_size)]

    def _receive(self, connection: multiprocessing.connection.Connection, rank: int) -> tuple[float, Any, str | None]:
        """(moment of the failure, result, failure); a process that died failed before any that only lost its peer."""
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            process = self._processes[rank]
            process.join(5)
            return 0.0, None, f"the process died with exit code {process.exitcode}"
        moment, answer, failure = pickle.loads(message)
        return moment, answer, failure

    def _stacks(self, ranks: list[int]) -> str:
        assert self._folder is not None
        for rank in ranks:
            try:
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
            except ProcessLookupError:
                pass
        time.sleep(0.2)
        files = {rank: _stack_file(self._folder.name, rank) for rank in ranks}
        return "\n".join(f"rank {rank}: {path.read_text() if path.exists() else ''}" for rank, path in files.items())


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"stack-{rank}"


def _serve(
    connection: multiprocessing.connection.Connection, rank: int, world_size: int, folder: str
) -> None:  # pragma: no cover (in another process)
    """The life of one process: join the group, answer jobs, leave when told to."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    with _stack_file(folder, rank).open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        if not _answer(connection, _join_group, (rank, world_size, folder)):
            return
        while (job := _next_job(connection)) is not None:
            _answer(connection, _run_job, (job, rank, world_size))
        # A process that ends while a peer still talks to it can abort in gloo's teardown.
        dist.barrier()
        dist.destroy_process_group()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _join_group(rank: int, world_size: int, folder: str) -> None:
    # Loopback only: nothing listens on a public address, and the machine's name need not resolve.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=10),
    )
    dist.barrier()


def _next_job(connection: multiprocessing.connection.Connection) -> bytes | None:
    try:
        message = connection.recv_bytes()
    except EOFError:
        os._exit(1)
    return None if message == pickle.dumps(None) else message


def _run_job(job: bytes, rank: int, world_size: int) -> Any:
    fn, args = pickle.loads(job)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return fn(rank, world_size, *args)


def _answer(connection: multiprocessing.connection.Connection, fn: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Send (moment, result, failure) of ``fn(*args)``.

    Plain pickle on purpose: the connection's own would send tensors as file descriptors of shared memory, which die
    with the process.
    """
    try:
        message, ok = pickle.dumps((0.0, fn(*args), None)), True
    except BaseException:
        message, ok = pickle.dumps((time.monotonic(), None, traceback.format_exc())), False
    connection.send_bytes(message)
    return ok
