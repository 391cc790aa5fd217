"""The signals that announce the end of a job: the first is a request that the run answers after its step."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import weakref
from types import FrameType, TracebackType
from typing import Any

# SIGTERM: Kubernetes, SLURM and torchrun's agent. SIGUSR1: what SLURM sends ahead of the limit with --signal=USR1@120.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_BYE = 0  # no signal has this number


class Preemption:
    """Within it, SIGTERM and SIGUSR1 are requests to save and end: :attr:`requested` names the first of them.

    A second one ends the process at once, with exit code 128 + its number, even where the main thread sits in a C++
    call (a wait in a collective whose peer is gone) and Python's handlers can't run: the interpreter's C handler writes
    each signal into a socket, and a daemon thread reads it. The same signal again within ``settle_seconds`` is the same
    request: a scheduler signals every process of a job, and torchrun's agent then passes on what it got itself.

    The old handlers are back after the block, but where it ends in order after a request: then all stays until the
    process ends, so that its exit code is 0 though the signal comes again. Outside of the main thread, where handlers
    can't be installed, the block changes nothing, and ``requested`` stays None. Forked children inherit none of it.

    Args:
        local_rank: local rank 0 says on stderr that a request was heard; every process says that it ends at once.
        rank: named in that line.
        settle_seconds: see above.
    """

    def __init__(self, *, local_rank: int = 0, rank: int = 0, settle_seconds: float = 2.0) -> None:
        self._local_rank, self._rank, self._settle = local_rank, rank, settle_seconds
        self._requested: str | None = None
        self._old: dict[signal.Signals, Any] = {}
        self._old_fd = -1
        self._read: socket.socket | None = None
        self._write: socket.socket | None = None
        self._thread: threading.Thread | None = None

    @property
    def requested(self) -> str | None:
        """Name of the first signal, such as ``SIGTERM``; None while there was none."""
        return self._requested

    def __enter__(self) -> Preemption:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._thread = threading.Thread(target=self._listen, args=(self._read,), name="preemption", daemon=True)
        self._thread.start()
        self._old_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._handle) for number in SIGNALS}
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _leave_in_child(this))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Else the process is ending: a request that comes again must not end it with a failure, which would make an
        # elastic agent start the job again.
        if self._requested is None or kind is not None:
            self.close()

    def close(self) -> None:
        """Put the old handlers back."""
        if self._thread is None or self._read is None or self._write is None:
            return
        self._restore()
        self._write.setblocking(True)
        self._write.send(bytes([_BYE]))
        self._thread.join()
        self._read.close()
        self._write.close()
        self._thread = None

    def _restore(self) -> None:
        for number, handler in self._old.items():
            # None: a handler that was not installed from Python, which can't be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._old_fd)
        self._old = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Python must know a handler, or the C handler writes nothing. A main thread in Python code then sees the
        # request at its next line; the thread below sees it in any case.
        self._requested = self._requested or signal.Signals(number).name

    def _listen(self, read: socket.socket) -> None:
        first: tuple[int, float] | None = None
        while True:
            for number in read.recv(64):
                if number == _BYE:
                    return
                if number not in SIGNALS:
                    continue
                name, now = signal.Signals(number).name, time.monotonic()
                if first is None:
                    first = number, now
                    self._requested = self._requested or name
                    if self._local_rank == 0:
                        _say(f"{name}: the run is saved after this step and ends; a second signal ends it at once")
                elif number != first[0] or now - first[1] > self._settle:
                    _say(f"{name}: the second signal: rank {self._rank} ends at once, without saving")
                    os._exit(128 + number)


def _leave_in_child(preemption: weakref.ref[Preemption]) -> None:
    """A forked child shares the socket: what ends the child would look like a request to the parent."""
    this = preemption()
    if this is not None and this._old:
        this._restore()


def _say(line: str) -> None:
    # Straight to the file: sys.stderr's lock may be held by the thread that is stuck.
    try:
        os.write(2, f"{line}\n".encode())
    except OSError:
        pass  # stderr is closed: there is nobody to tell
