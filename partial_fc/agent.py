"""torchrun with the settings that a run needs, and an exit code that says how the run ended.

``python -m partial_fc.agent OPTIONS -m partial_fc train ...`` takes torchrun's options, and its environment variables
(``PET_...``) go before the settings here. Its exit code is

====  ==================================================================================
0     the run finished, or the workers that were no training ended in order
2     an option's value makes no sense; nothing was started
75    it was ended by a signal, saved where there was time: the same command goes on
70    the run failed for good (it diverged, or its commit doesn't fit): starts won't help
else  that of torchrun: its processes failed
====  ==================================================================================

torchrun itself ends with 1 and a trace after a signal, though its workers saved the run.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from partial_fc.machine import addresses_towards
from partial_fc.run_status import OUTCOME

# What argparse ends with; EX_TEMPFAIL and EX_SOFTWARE of sysexits.h: try again later; don't.
MISTAKEN, UNFINISHED, FAILED = 2, 75, 70
# What each is to the ranks, which know these two only: a terminal's signals don't reach them, they are sessions of
# their own.
_SIGNALS = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGQUIT: signal.SIGTERM,
}
# As the ranks have it: the same signal again within this time is the same request.
_SETTLE_SECONDS = 2.0
_CPU_RANKS = 2
# How long the main thread may take to end after a signal, or after the save of a run that another machine was told to
# end, once there are no ranks: it may wait in C++ for what doesn't come, the end of an agent that left (torchrun waits
# five minutes) or the answer of a store that is none.
_FAREWELL_SECONDS = 5.0
# Until it's said that there are no ranks yet.
_PATIENCE_SECONDS = 60.0
# Starts of torchrun after a rendezvous that was lost before there were ranks: that of an earlier start of the run,
# whose agent was about to leave.
_REJOINS = 3


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run torchrun with these arguments, those of the command line unasked, and end this process."""
    for key, value in _settings(os.environ).items():
        os.environ.setdefault(key, value)
    with tempfile.TemporaryDirectory(prefix="partial_fc-") as folder:
        file = Path(folder) / "outcome"
        os.environ[OUTCOME] = str(file)
        # From now on, not only while there are workers: an agent may wait for other machines when its time is up.
        watch = _Watch(file)
        watch.start()
        code = _run(sys.argv[1:] if arguments is None else arguments, file, watch)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader is gone
            stream.flush()
    sys.exit(code)


class _Watch:
    """Handles signals, and a thread that acts where the main one can't: it may sit in C++, where no handler runs.

    Args:
        file: where the ranks tell the run's state.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._first: tuple[int, float] | None = None
        self._answered = False
        self._over = False
        self._ending = threading.Lock()
        self._read, self._write = socket.socketpair()
        self.waits_for = ""
        self.had_ranks = False

    @property
    def told(self) -> str | None:
        """Name of the first signal; None while there was none."""
        return None if self._first is None else signal.Signals(self._first[0]).name

    def start(self) -> None:
        """Install the handlers, but where a signal is ignored (``nohup``, a shell's background)."""
        self._write.setblocking(False)
        self._read.settimeout(0.5)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def end(self) -> None:
        """The main thread is about to end this process. It waits for ever where the other does already."""
        with self._ending:
            self._over = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = number, now
        again = self._answered and number == self._first[0] and now - self._first[1] < _SETTLE_SECONDS
        if again or self._over:
            return
        name = signal.Signals(number)
        if self._answered:
            # torchrun would send SIGTERM again, which to the ranks may be the request that they know.
            _say(f"{name.name}: the second signal: the ranks end at once, without saving")
            for child in _children():
                with contextlib.suppress(OSError):
                    os.killpg(child, signal.SIGKILL)
        self._answered = True
        raise SignalException(f"process {os.getpid()} got {name.name}", _SIGNALS[name])

    def _look(self) -> None:
        started, alone, said = time.monotonic(), None, False
        while not self._over:
            with contextlib.suppress(TimeoutError):
                for number in self._read.recv(64):
                    if number in _SIGNALS and self._first is None:
                        self._first = number, time.monotonic()
            now = time.monotonic()
            ends = self._first is not None or _state(self._file) == "resume"
            if self.had_ranks and not ends:
                continue
            has_ranks = bool(_children())
            self.had_ranks |= has_ranks
            if has_ranks or not ends:
                alone = None
            elif alone is None:
                alone = now
            elif now - alone > _FAREWELL_SECONDS:
                self._leave()
            if not (said or self.had_ranks) and now - started > _PATIENCE_SECONDS:
                said = True
                _say(self.waits_for)

    def _leave(self) -> None:
        with self._ending:
            if self._over:
                return
            code = _conclude(_state(self._file), self.told, 1)
            shutil.rmtree(self._file.parent, ignore_errors=True)
            os._exit(code)


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    settings = {
        # torch 2.13 keeps the addresses of dead ranks across restarts without this (pytorch issue 135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PET_RDZV_BACKEND": "c10d",
        # A process that dies is started again, and the run goes on from its last commit.
        "PET_MAX_RESTARTS": "3",
        # torchrun's own handlers would take the place of those here; it wants to handle one signal at least.
        "PET_SIGNALS_TO_HANDLE": "SIGUSR2",
    }
    if "PET_NPROC_PER_NODE" not in environment:
        settings["PET_NPROC_PER_NODE"] = str(torch.cuda.device_count() or _CPU_RANKS)
    return settings


def _run(arguments: Sequence[str], file: Path, watch: _Watch) -> int:
    told = False
    code = 0
    try:
        settings = torchrun.parse_args(arguments)
        if mistake := _mistake(settings):
            _say(f"error: {mistake}")
            return MISTAKEN
        # Where the number of machines is a range, a start waits so long for more of them, 30 s by torchrun's default.
        if "last_call_timeout" not in settings.rdzv_conf:
            settings.rdzv_conf = ",".join(filter(None, [settings.rdzv_conf, "last_call_timeout=5"]))
        if settings.local_addr is None:
            settings.local_addr = _own_address(settings.rdzv_endpoint)
        if settings.nproc_per_node != "1":
            # What torchrun sets, after a warning.
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        watch.waits_for = (
            f"there are no ranks yet: this machine waits for the rendezvous at {settings.rdzv_endpoint} and --nnodes "
            f"{settings.nnodes} (is the same command started on all, or another program on that port?)"
        )
        _join(settings, watch)
    except SignalException:
        told, code = True, 1
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        how = f"exit code {failure.exitcode}" if failure.exitcode > 0 else signal.Signals(-failure.exitcode).name
        _say(f"error: rank {rank} (pid {failure.pid}) ended first, by {how}: its own lines above say why")
    except RendezvousConnectionError as error:
        code = 1
        if watch.had_ranks or not _never_connected(error):
            where = settings.rdzv_endpoint
            _say(f"error: the rendezvous {where} is gone: the machine that kept it left, and its log says why")
        else:
            _say(
                f"error: no rendezvous at {settings.rdzv_endpoint} within a minute: expected a machine of the run "
                "there; start the same command on it, too, and let its port through"
            )
    except RendezvousClosedError:
        code = 1
        _say(
            f"error: the rendezvous {settings.rdzv_endpoint} is closed: another start of the run ends there; start the "
            "same command again when its processes are gone"
        )
    except RendezvousTimeoutError:
        code = 1
        _say(
            f"error: fewer machines than --nnodes {settings.nnodes} came to {settings.rdzv_endpoint} in time: start "
            "the same command on all of them (--rdzv-conf join_timeout=SECONDS waits longer)"
        )
    finally:
        watch.end()
    return _conclude(_state(file), (watch.told or "a signal") if told else None, code)


def _join(settings: argparse.Namespace, watch: _Watch) -> None:
    for last in (*[False] * _REJOINS, True):
        try:
            torchrun.run(settings)
        except (RendezvousConnectionError, RendezvousClosedError) as error:
            if last or watch.had_ranks or _never_connected(error):
                raise
        else:
            return
        _say(f"the rendezvous {settings.rdzv_endpoint} was that of a start that has ended: joining the next one")
        time.sleep(_FAREWELL_SECONDS / 2)


def _never_connected(error: BaseException) -> bool:
    """Whether it was torchrun's first connection that failed; its message is the same later."""
    return any(frame.f_code.co_name == "_create_tcp_store" for frame, _ in traceback.walk_tb(error.__traceback__))


def _mistake(settings: argparse.Namespace) -> str | None:
    """What is wrong with options whose values torchrun answers with a trace; None: nothing."""
    nodes = re.fullmatch(r"(\d+)(?::(\d+))?", str(settings.nnodes))
    if nodes is None or not 1 <= int(nodes[1]) <= int(nodes[2] or nodes[1]):
        return f"--nnodes is {settings.nnodes!r}, expected a number of machines (2) or a range from few to many (1:4)"
    ranks = str(settings.nproc_per_node)
    if ranks not in ("auto", "cpu", "gpu", "xpu") and not (re.fullmatch(r"\d+", ranks) and int(ranks)):
        return f"--nproc-per-node (RANKS) is {ranks!r}, expected the number of processes on this machine, such as 8"
    if settings.max_restarts < 0:
        return f"--max-restarts (RESTARTS) is {settings.max_restarts}, expected 0 or more"
    host, _, port = settings.rdzv_endpoint.rpartition(":")
    if host and not (re.fullmatch(r"\d+", port) and int(port) < 2**16):
        return f"the port of --rdzv-endpoint {settings.rdzv_endpoint} is {port!r}, expected one from 0 to 65535"
    try:
        host.encode("idna")
    except UnicodeError as error:
        return f"--rdzv-endpoint is {settings.rdzv_endpoint}, expected HOST:PORT, but {host!r} is no host ({error})"
    return None


def _conclude(state: str | None, told: str | None, code: int) -> int:
    """The exit code, after a line that says how the run ended by a signal.

    Args:
        state: what the ranks told; None: nothing.
        told: the signal to this process, if one ended it.
        code: torchrun's.
    """
    if state == "finished":
        return 0
    if state == "failed":
        return FAILED
    if state == "resume":
        who = told or "a signal to another process"
        _say(f"{who} ended the run in order, rank 0 names its last commit: start the same command again to go on")
        return UNFINISHED
    if told is not None:
        _say(f"{told} ended the run before it was saved, its last commit counts: start the same command again to go on")
        return UNFINISHED
    if state is not None and code == 0:
        _say(
            f"error: the processes ended in order, but the run's state is {state or 'unknown'!r}, expected 'finished': "
            "their lines above say why (a full disk under the temporary folder?); the same command goes on"
        )
        return 1
    return code


def _state(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def _children() -> list[int]:
    """Those of this process that live: a container's first may have dead ones that others left, and none buries."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                # Behind the name, which is in parentheses and may hold blanks.
                state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if int(parent) == os.getpid() and state not in "ZX":
                    found.append(int(folder.name))
    return found


def _own_address(endpoint: str) -> str | None:
    """This machine's address on its way to the rendezvous: torchrun's default, its name, may mean nothing to others.

    None, for that default, where there is no way, or the rendezvous is on this machine by a name for its loopback.
    """
    for own in addresses_towards(endpoint.rpartition(":")[0].strip("[]")):
        if not ipaddress.ip_address(own.partition("%")[0]).is_loopback:
            return own
    return None


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads: its terminal is gone
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
