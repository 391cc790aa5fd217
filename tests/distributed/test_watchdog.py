"""Ranks that sleep, are killed, or lose the store: the lines of the others name them and their phase."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from partial_fc.watchdog import Watchdog
from tests.ranks import RankPool

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 90


def make_store(rank: int) -> Any:
    store: list[Any] = [None]
    port = [0]
    if rank == 0:
        store[0] = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port[0] = store[0].port
    dist.broadcast_object_list(port)
    return store[0] or dist.TCPStore("127.0.0.1", port[0], is_master=False, wait_for_workers=False)


def sleeps_on_duty(store: Any, lines: int, files: list[Path]) -> None:
    end = time.monotonic() + DEADLINE
    while not (store.add("said", 0) >= lines and all(path.exists() for path in files)):
        assert time.monotonic() < end, "nobody said anything"
        time.sleep(0.05)


def lag(rank: int, world_size: int, folder: str, sleeper: int) -> tuple[int, list[str]]:
    store = make_store(rank)
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        store.add("said", 1)

    with Watchdog(
        dist.PrefixStore("attempt", store),
        rank,
        world_size,
        stall_seconds=2.0,
        limit_seconds=1000.0,
        folder=Path(folder),
        publish_seconds=0.5,
        report=report,
    ) as dog:
        for step in range(4):
            dog.beat("data", step)
            if step == 3 and rank == sleeper:
                sleeps_on_duty(store, 2, [Path(folder) / f"stacks-rank{other}.txt" for other in range(world_size)])
            dog.beat("head")
            dist.barrier()
    dist.barrier()  # rank 0 keeps the store
    return os.getpid(), lines


@pytest.mark.parametrize(("world_size", "sleeper"), [(2, 0), (3, 1)])
def test_a_rank_that_sleeps_is_named(
    ranks: Callable[[int], RankPool], tmp_path: Path, world_size: int, sleeper: int
) -> None:
    results = ranks(world_size).run(lag, str(tmp_path), sleeper, timeout=DEADLINE + 30)
    who = f"rank {sleeper} (host {socket.gethostname()}, pid {results[sleeper][0]}) is behind, in phase data of step 3"
    speaker = min(rank for rank in range(world_size) if rank != sleeper)
    for rank, (_, lines) in enumerate(results):
        if rank == speaker:
            (line,) = lines
            assert "s at step 3 (phase head): " + who in line and "at sleeps_on_duty (test_watchdog.py:" in line
            assert line.endswith(f"stacks of rank {rank} in {tmp_path / f'stacks-rank{rank}.txt'}")
        elif rank == sleeper:
            (line,) = lines
            assert f"(phase data): the other ranks wait for this one: {who}" in line
        else:
            assert lines == []
    assert "in sleeps_on_duty" in (tmp_path / f"stacks-rank{sleeper}.txt").read_text()
    assert "in barrier" in (tmp_path / f"stacks-rank{speaker}.txt").read_text()


def wait_in_vain(port: str, rank: str, world_size: str) -> None:  # pragma: no cover (in another process)
    """A rank of a job without collectives: goes to its place and stays there."""
    store = dist.TCPStore(
        "127.0.0.1", int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=600)
    )
    lines = sys.stdout

    def report(line: str) -> None:
        print(line, file=lines, flush=True)

    with Watchdog(
        dist.PrefixStore("attempt", store),
        int(rank),
        int(world_size),
        stall_seconds=2.0,
        limit_seconds=12.0,
        folder=None,
        publish_seconds=0.5,
        report=report,
    ) as dog:
        dog.beat("backbone", 119)
        with dog.paused():
            while b"119" not in store.get(f"attempt/beat/{rank}"):
                time.sleep(0.05)
            report("ready")
            store.wait(["go"])
            report("waits")
        while True:
            time.sleep(1)


def keep_store() -> None:  # pragma: no cover (in another process)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print(store.port, flush=True)
    time.sleep(10 * DEADLINE)


@contextmanager
def process(call: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    code = f"import sys; from tests.distributed import test_watchdog as here; here.{call}(*sys.argv[1:])"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    timer = threading.Timer(DEADLINE, child.kill)
    timer.start()
    try:
        yield child
    finally:
        timer.cancel()
        child.kill()
        child.communicate()


def line_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


@pytest.mark.slow
def test_a_killed_rank_is_not_heard_of() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ExitStack() as stack:
        ranks = [stack.enter_context(process("wait_in_vain", store.port, rank, 3)) for rank in range(3)]
        assert [line_of(rank) for rank in ranks] == ["ready"] * 3
        ranks[2].send_signal(signal.SIGKILL)
        store.set("go", "now")
        assert [line_of(rank) for rank in ranks[:2]] == ["waits"] * 2
        gone = f"rank 2 (host {socket.gethostname()}, pid {ranks[2].pid}) hasn't been heard of for "
        line = line_of(ranks[0])
        assert line.startswith("no progress for ") and "s at step 119 (phase backbone): " in line
        assert gone in line
        assert "s, last in phase backbone of step 119: its process or machine is gone; stacks of rank 0" in line
        # Rank 1 of the same machine says nothing before both reach the limit.
        for rank in (0, 1):
            assert line_of(ranks[rank]).startswith(
                f"rank {rank} ({socket.gethostname()}, pid {ranks[rank].pid}) ends: "
            )
            assert ranks[rank].wait(DEADLINE) == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_store_that_is_gone_is_said_and_holds_nobody(how: signal.Signals) -> None:
    with process("keep_store") as keeper, ExitStack() as stack:
        port = line_of(keeper)
        ranks = [stack.enter_context(process("wait_in_vain", port, rank, 2)) for rank in range(2)]
        assert [line_of(rank) for rank in ranks] == ["ready"] * 2
        dist.TCPStore("127.0.0.1", int(port), is_master=False, wait_for_workers=False).set("go", "now")
        assert [line_of(rank) for rank in ranks] == ["waits"] * 2
        keeper.send_signal(how)
        for rank in ranks:
            assert "rank 0's machine, which keeps the store, can't be reached" in line_of(rank)
            assert " ends: no progress for " in line_of(rank)
            assert rank.wait(DEADLINE) == 1
