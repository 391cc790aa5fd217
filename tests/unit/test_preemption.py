"""Signals to real processes: in Python code, in a sleep, in C calls, in a wait of gloo; and what the block leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from partial_fc.preemption import Preemption

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 90

# A second thread tells what was requested, because the main one is stuck.
HEAD = """
import ctypes, os, signal, sys, threading, time
from partial_fc.preemption import Preemption

def tell(text):
    os.write(1, f"{text}\\n".encode())

def watch(preemption):
    while preemption.requested is None:
        time.sleep(0.01)
    tell(preemption.requested)
    while True:
        time.sleep(0.01)

def go(stuck, **options):
    with Preemption(**options) as preemption:
        threading.Thread(target=watch, args=(preemption,), daemon=True).start()
        tell("ready")
        stuck()
"""

PYTHON = """
def stuck():
    while True: pass
"""
SLEEP = """
def stuck():
    time.sleep(1000)
"""
# A mutex locked twice: the wait goes on after a signal, so Python's handlers never run.
MUTEX = """
def stuck():
    mutex = ctypes.create_string_buffer(128)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
GLOO = """
import datetime, subprocess, tempfile
import torch, torch.distributed as dist

os.environ["GLOO_SOCKET_IFNAME"] = "lo"
rank = int(os.environ.get("PEER", "0"))
folder = os.environ.setdefault("STORE", tempfile.mkdtemp())
if rank == 0:
    code = open(f"/proc/{os.getpid()}/cmdline").read().split("\\0")[2]
    peer = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PEER": "1"}, stdout=subprocess.DEVNULL)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
if rank == 1:
    # Ends when rank 0 does: nothing is ever sent.
    try:
        dist.recv(torch.zeros(1), 0)
    except RuntimeError:
        os._exit(0)

def stuck():
    dist.recv(torch.zeros(1), 1)
"""


@contextmanager
def running(code: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    # A line that never comes must not hold the test.
    timer = threading.Timer(DEADLINE, process.kill)
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """(exit code, the lines on stderr that tell of signals)."""
    _, errors = process.communicate(timeout=DEADLINE)
    return process.returncode, [text for text in errors.splitlines() if text.startswith("SIG")]


@pytest.mark.parametrize("where", [PYTHON, SLEEP, MUTEX, GLOO], ids=["python", "sleep", "mutex", "gloo"])
def test_the_first_is_a_request_and_the_second_ends_the_process(where: str) -> None:
    with running(where + "\ngo(stuck, settle_seconds=0.0, rank=5)") as process:
        assert line(process) == "ready"
        time.sleep(0.3)  # until it is stuck
        process.send_signal(signal.SIGUSR1)
        assert line(process) == "SIGUSR1"
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        code, said = end(process)
        assert code == 128 + signal.SIGTERM
        assert said == [
            "SIGUSR1: the run is saved after this step and ends; a second signal ends it at once",
            "SIGTERM: the second signal: rank 5 ends at once, without saving",
        ]


def test_the_same_signal_from_scheduler_and_agent_is_one_request() -> None:
    with running(SLEEP + "\ngo(stuck, settle_seconds=1000.0, local_rank=1)") as process:
        assert line(process) == "ready"
        process.send_signal(signal.SIGTERM)
        assert line(process) == "SIGTERM"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None, "the echo ended the run"
        process.send_signal(signal.SIGUSR1)
        assert end(process) == (
            128 + signal.SIGUSR1,
            ["SIGUSR1: the second signal: rank 0 ends at once, without saving"],
        )


def test_the_request_is_seen_at_the_next_line_and_other_signals_are_none() -> None:
    old = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    try:
        with Preemption(local_rank=1) as preemption:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGCHLD)
            assert preemption.requested is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.requested == "SIGTERM"
    finally:
        preemption.close()
        signal.signal(signal.SIGCHLD, old)


def test_a_request_that_comes_again_after_the_block_is_no_failure() -> None:
    code = """
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
    tell(preemption.requested)
    """
    with running(code) as process:
        assert line(process) == "SIGTERM"
        assert process.wait(DEADLINE) == 0


def test_interrupts_still_raise() -> None:
    with Preemption() as preemption:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert preemption.requested is None


def test_handlers_and_wakeup_fd_are_put_back() -> None:
    heard: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    threads = threading.active_count()
    descriptors = len(os.listdir("/proc/self/fd"))
    try:
        with pytest.raises(ZeroDivisionError), Preemption(local_rank=1):
            os.kill(os.getpid(), signal.SIGUSR1)
            raise ZeroDivisionError
        assert heard == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.set_wakeup_fd(-1) == -1
        assert threading.active_count() == threads
        assert len(os.listdir("/proc/self/fd")) == descriptors
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_in_another_thread_nothing_is_installed() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with Preemption() as preemption:
            seen.append((signal.getsignal(signal.SIGTERM), preemption.requested))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(10)
    assert seen == [(before, None)]


def test_a_signal_to_a_forked_child_is_none_of_the_parents() -> None:
    # In a process of its own: forking one with many threads may deadlock.
    code = """
    with Preemption() as preemption:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, b"ready")
            time.sleep(60)
            os._exit(1)
        os.read(read, 5)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.3)
        tell(f"{os.waitstatus_to_exitcode(status)} {preemption.requested}")
    """
    with running(code) as process:
        assert line(process) == "-15 None"
        assert end(process) == (0, [])
