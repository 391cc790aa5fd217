"""torchrun with the settings that a run needs, and an exit code that says how the run ended.

``python -m partial_fc.agent OPTIONS -m partial_fc train ...`` takes torchrun's options, and its environment variables
(``PET_...``) go before the settings here. Its exit code is

====  ==================================================================================
0     the run finished, or the workers that were no training ended in order
75    it was ended by a signal, saved where there was time: the same command goes on
70    the run failed for good (it diverged, or its commit doesn't fit): starts won't help
else  that of torchrun: its processes failed
====  ==================================================================================

torchrun itself ends with 1 and a trace after a signal, though its workers saved the run.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError

from partial_fc.run_status import OUTCOME

# EX_TEMPFAIL and EX_SOFTWARE of sysexits.h: try again later; don't.
UNFINISHED, FAILED = 75, 70
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
_CPU_RANKS = 2
# After the save of a run that another machine was told to end: that machine's agent may have left already, and
# torchrun would wait five minutes for it.
_FAREWELL_SECONDS = 20.0


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run torchrun with these arguments, those of the command line unasked, and end this process."""
    for name in _SIGNALS:
        # From now on, not only while there are workers: an agent may wait for other machines when its time is up.
        signal.signal(getattr(signal, name), _raise)
    for key, value in _settings(os.environ).items():
        os.environ.setdefault(key, value)
    with tempfile.TemporaryDirectory(prefix="partial_fc-") as folder:
        file = Path(folder) / "outcome"
        os.environ[OUTCOME] = str(file)
        threading.Thread(target=_leave_once_saved, args=(file,), name="outcome", daemon=True).start()
        code = _run(sys.argv[1:] if arguments is None else arguments, file)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    settings = {
        # torch 2.13 keeps the addresses of dead ranks across restarts without this (pytorch issue 135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PET_RDZV_BACKEND": "c10d",
        # Where the number of machines is a range, a start waits so long for more of them, 30 s by torchrun's default.
        "PET_RDZV_CONF": "last_call_timeout=5",
        # A process that dies is started again, and the run goes on from its last commit.
        "PET_MAX_RESTARTS": "3",
        "PET_SIGNALS_TO_HANDLE": ",".join(_SIGNALS),
    }
    if "PET_NPROC_PER_NODE" not in environment:
        settings["PET_NPROC_PER_NODE"] = str(torch.cuda.device_count() or _CPU_RANKS)
    return settings


def _run(arguments: Sequence[str], file: Path) -> int:
    told: str | None = None
    code = 0
    try:
        settings = torchrun.parse_args(arguments)
        if settings.local_addr is None:
            settings.local_addr = _own_address(settings.rdzv_endpoint)
        if settings.nproc_per_node != "1":
            # What torchrun sets, after a warning.
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        torchrun.run(settings)
    except SignalException as error:
        told, code = error.sigval.name, 1
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        how = f"exit code {failure.exitcode}" if failure.exitcode > 0 else signal.Signals(-failure.exitcode).name
        _say(f"error: rank {rank} (pid {failure.pid}) ended first, by {how}: its own lines above say why")
    except RendezvousConnectionError:
        code = 1
        _say(
            f"error: no rendezvous at {settings.rdzv_endpoint} within a minute: expected a machine of the run there; "
            "start the same command on it, too, and let its port through"
        )
    except RendezvousTimeoutError:
        code = 1
        _say(
            f"error: fewer machines than --nnodes {settings.nnodes} came to {settings.rdzv_endpoint} in time: start "
            "the same command on all of them (--rdzv-conf join_timeout=SECONDS waits longer)"
        )
    state = _read(file)
    if state == "finished":
        return 0
    if state == "resume" or (told is not None and state != "failed"):
        _say_unfinished(told or "a signal to another process", saved=state == "resume")
        return UNFINISHED
    return FAILED if state == "failed" else code


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def _leave_once_saved(file: Path) -> None:
    """End this process when its workers saved the run and ended; its main thread waits in C++, and hears no signal."""
    while _read(file) != "resume" or _has_children():
        time.sleep(1)
    time.sleep(_FAREWELL_SECONDS)
    shutil.rmtree(file.parent, ignore_errors=True)
    _say_unfinished("a signal to another machine", saved=True)
    os._exit(UNFINISHED)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _say_unfinished(who: str, *, saved: bool) -> None:
    how = "it's saved" if saved else "it wasn't saved in time, its last commit counts"
    _say(f"{who} ended the run, {how}: start the same command again to go on")


def _own_address(endpoint: str) -> str | None:
    """This machine's address on its way to the rendezvous: torchrun's default, its name, may mean nothing to others.

    None, for that default, where there is no way, or the rendezvous is on this machine by a name for its loopback.
    """
    host = endpoint.rpartition(":")[0].strip("[]")
    with contextlib.suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            own = str(probe.getsockname()[0])
        if not ipaddress.ip_address(own.partition("%")[0]).is_loopback:
            return own
    return None


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    name = signal.Signals(number)
    raise SignalException(f"process {os.getpid()} got {name.name}", name)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
