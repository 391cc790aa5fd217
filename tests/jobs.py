"""torchrun jobs in tests: started as subprocesses, followed by what they print, hit by signals, never left behind.

A job is an agent (torchrun) and its workers. All of them, and whatever they start, carry a mark in their environment,
by which ``/proc`` finds them even where their parent is gone: the workers of a killed agent go on by themselves. A
guard, a process of its own, clears up where the test process itself is killed. Every wait has a deadline, and what
doesn't come in time raises :class:`JobFailed` with the last lines of all jobs.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

MARK = "PARTIAL_FC_TEST_JOB"
POLL_SECONDS = 0.02
TAIL_LINES = 60
# The test process may be a rank itself, or be run by something that set these.
_NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")


class JobFailed(AssertionError):
    """A job ended or was late where something else was expected of it; the message has the last lines of all jobs."""


class Marked(NamedTuple):
    """A living process of a job.

    Attributes:
        pid: its id.
        parent: id of the process that started it, or of the one that took it over.
        environment: the one that it was started with.
    """

    pid: int
    parent: int
    environment: dict[str, str]


def marked_processes(mark: str) -> list[Marked]:
    """The living processes whose mark starts with ``mark``. A zombie isn't one."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            raw = (folder / "environ").read_bytes()
            # The name, in parentheses, may hold blanks.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        environment = dict(line.partition("=")[::2] for line in raw.decode(errors="replace").split("\0"))
        if MARK in environment and environment[MARK].startswith(mark):
            found.append(Marked(int(folder.name), parent, environment))
    return found


def kill_marked(mark: str) -> None:
    """SIGKILL to every process of a mark, until none is left: one may be starting another just now."""
    deadline = time.monotonic() + 10
    while (living := marked_processes(mark)) and time.monotonic() < deadline:
        for process in living:
            send(process.pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; False where the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


class Guard:
    """A process that clears up after this one is dead, by ``python -m MODULE PID MARK``."""

    def __init__(self, module: str, mark: str) -> None:
        command = [sys.executable, "-m", module, str(os.getpid()), mark]
        # A session of its own: what stops the tests by their process group leaves it alive.
        self._process = subprocess.Popen(command, cwd=Path(__file__).parents[1], start_new_session=True)

    def dismiss(self) -> None:
        """End it: the test process has cleared up."""
        self._process.kill()
        self._process.wait(10)


def serve_as_guard(clear: Callable[[str], None]) -> None:
    """The life of a guard: wait until the process that started it is gone, then clear up."""
    parent, mark = int(sys.argv[1]), sys.argv[2]
    while os.getppid() == parent:
        time.sleep(0.5)
    clear(mark)


def free_ports(count: int) -> int:
    """The first of some ports in a row that nobody listens on, below those that the system gives away by itself."""
    for first in range(12000 + os.getpid() % 1000 * 8, 32000, count):
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            for port in range(first, first + count):
                opened.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise JobFailed(f"there are no {count} free ports in a row")


class Job:
    """An agent and its workers; made by :meth:`Jobs.start`.

    Args:
        jobs: those that it belongs to.
        name: what it is called in messages, and its log file.
        command: the agent's, which has to become the process itself (``exec``).
        environment: the agent's.
    """

    def __init__(self, jobs: Jobs, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name, self._jobs = name, jobs
        self.mark = environment[MARK]
        self.log = jobs.folder / f"{name}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """The agent's process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The agent's exit code (minus the signal that killed it), or None while it runs."""
        return self._process.poll()

    @property
    def output(self) -> str:
        """All that agent and workers printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def workers(self) -> dict[int, int]:
        """Process ids of the living workers by rank, those of a killed agent, too."""
        living = {process.pid: process for process in marked_processes(self.mark)}
        found = {}
        for process in living.values():
            parent = living.get(process.parent)
            started_by_a_worker = parent is not None and "LOCAL_RANK" in parent.environment
            if "LOCAL_RANK" in process.environment and not started_by_a_worker:
                found[int(process.environment["RANK"])] = process.pid
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the agent."""
        send(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the agent and to all that it started."""
        kill_marked(self.mark)
        self._process.wait(10)

    def wait(self, timeout: float) -> int:
        """Wait until the agent ends and return its exit code.

        Raises:
            JobFailed: not in time.
        """
        self._jobs.wait_until(lambda: self.returncode is not None, f"{self.name} to end", timeout)
        assert self.returncode is not None
        return self.returncode

    def succeed(self, timeout: float) -> str:
        """Wait until the agent ends with exit code 0 and return its output.

        Raises:
            JobFailed: not in time, or with another exit code.
        """
        if code := self.wait(timeout):
            raise JobFailed(f"{self.name} ended with exit code {code}\n{self._jobs.tails()}")
        return self.output

    def wait_for(self, pattern: str, timeout: float, *, start: int = 0) -> re.Match[str]:
        """Wait until the output has a regular expression (``^`` and ``$`` are those of a line), and return the match.

        Args:
            pattern: what to search for.
            timeout: seconds.
            start: characters of the output to leave out.

        Raises:
            JobFailed: the job ended without it, or it didn't come in time.
        """
        match: list[re.Match[str] | None] = [None]

        def has_come() -> bool:
            # In this order: what the job printed last is read after it ended.
            ended = self.returncode is not None
            match[0] = re.compile(pattern, re.MULTILINE).search(self.output, start)
            if ended and match[0] is None:
                raise JobFailed(f"{self.name} ended ({self.returncode}) without {pattern!r}\n{self._jobs.tails()}")
            return match[0] is not None

        self._jobs.wait_until(has_come, f"{pattern!r} from {self.name}", timeout)
        assert match[0] is not None
        return match[0]


class Jobs:
    """The jobs of a test, a context manager that leaves no process behind.

    Args:
        folder: where their logs go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark = f"{os.getpid()}-{secrets.token_hex(4)}-"
        self._jobs: list[Job] = []
        self._guard: Guard | None = None

    def __enter__(self) -> Jobs:
        self._guard = Guard("tests.jobs", self._mark)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in (signal.SIGABRT, signal.SIGKILL):
            # The interpreter writes its stacks on the first, into the log.
            living = marked_processes(self._mark)
            for process in living:
                send(process.pid, number)
            if living:
                time.sleep(0.3)
        kill_marked(self._mark)
        for job in self._jobs:
            job.kill()
        if self._guard is not None:
            self._guard.dismiss()
        # The report of a failed test shows it; that of another doesn't.
        print(self.tails())

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> Job:
        """Start a job.

        Args:
            name: of the job; one that is used again gets a number.
            command: of the agent.
            environment: changes to that of the test process.
            prefix: put before the command, such as that of a node.
        """
        taken = sum(job.name == name or job.name.startswith(f"{name}-") for job in self._jobs)
        name = f"{name}-{taken + 1}" if taken else name
        inherited = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
        whole = {
            **inherited,
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            **(environment or {}),
            # The dot keeps a name from being the beginning of another.
            MARK: f"{self._mark}{name}.",
        }
        self._jobs.append(Job(self, name, [*prefix, *command], whole))
        return self._jobs[-1]

    def torchrun(
        self,
        name: str,
        *program: str,
        ranks: int = 2,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Job:
        """Start torchrun on this machine, over loopback, with a port that the system chooses.

        Args:
            name: of the job.
            program: the workers' command line: ``-m``, a module and its arguments, or a script and its arguments.
            ranks: workers.
            options: more options of torchrun.
            environment: changes to that of the test process.
        """
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
        changes = {"GLOO_SOCKET_IFNAME": "lo", **(environment or {})}
        return self.start(name, [*command, *options, *program], changes)

    def wait_until(self, condition: Callable[[], object], what: str, timeout: float) -> None:
        """Wait until the condition holds.

        Raises:
            JobFailed: it didn't in ``timeout`` seconds; ``what`` says in words what was waited for.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise JobFailed(f"waited {timeout:.0f} s for {what}\n{self.tails()}")
            time.sleep(POLL_SECONDS)

    def tails(self) -> str:
        """The last lines of every job."""
        return "\n".join(_tails(self._jobs))


def _tails(jobs: Sequence[Job]) -> Iterator[str]:
    for job in jobs:
        state = "runs" if job.returncode is None else f"ended with exit code {job.returncode}"
        yield f"{job.name} (agent {job.pid}, {state}):"
        yield from (f"  {line}" for line in job.output.splitlines()[-TAIL_LINES:])


if __name__ == "__main__":
    serve_as_guard(kill_marked)
