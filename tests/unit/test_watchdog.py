"""The watchdog of one process, on a clock of the test's own; several of them over a store in memory; its limit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore

from partial_fc import watchdog
from partial_fc.errors import ConfigError
from partial_fc.signs import Sign, describe_all, describe_behind, describe_lost
from partial_fc.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60
STALL = 50.0  # seconds of the test's clock, which moves only when a test moves it


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = clock.time = lambda: clock.now
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def make(lines: list[str], store: Any = None, rank: int = 0, world_size: int = 1, **options: Any) -> Watchdog:
    settings = {"stall_seconds": STALL, "limit_seconds": 1e9, "folder": None, "publish_seconds": 0.01}
    return Watchdog(store, rank, world_size, report=lines.append, **{**settings, **options})


def test_says_it_once_a_stall_and_nothing_while_beats_come(clock: SimpleNamespace, tmp_path: Path) -> None:
    lines: list[str] = []
    with make(lines, folder=tmp_path) as dog:
        for step in range(10):
            dog.beat("data", step)
            clock.now += 0.9 * STALL
            time.sleep(0.03)  # the watcher looks
            assert not dog.stalled
        assert lines == []
        clock.now += 0.2 * STALL
        assert dog.stalled
        wait_for(lambda: len(lines) == 1)
        clock.now += STALL
        time.sleep(0.05)
        assert len(lines) == 1
        assert lines[0].startswith("no progress for 55 s at step 9 (phase data): it is at ")
        assert lines[0].endswith(f"stacks of rank 0 in {tmp_path / 'stacks-rank0.txt'}")
        dog.beat("head")
        assert not dog.stalled
        clock.now += 2 * STALL
        wait_for(lambda: len(lines) == 2)
        assert "no progress for 100 s at step 9 (phase head)" in lines[1]
    text = (tmp_path / "stacks-rank0.txt").read_text()
    assert text.count("most recent call first") >= 2 and "test_says_it_once_a_stall" in text


def test_before_the_first_beat_it_watches_too(clock: SimpleNamespace, tmp_path: Path) -> None:
    lines: list[str] = []
    with make(lines, folder=tmp_path):
        clock.now += STALL
        wait_for(lambda: bool(lines))
    assert lines[0].startswith("no progress for 50 s in phase start: ")


def test_no_beat_is_expected_in_a_pause(clock: SimpleNamespace) -> None:
    lines: list[str] = []
    with make(lines, limit_seconds=STALL) as dog:
        with dog.paused(), dog.paused():
            clock.now += 10 * STALL
            time.sleep(0.05)
            assert not dog.stalled
        assert not dog.stalled
        time.sleep(0.05)
    assert lines == []


def test_a_report_that_raises_and_a_folder_that_is_none_do_no_harm(clock: SimpleNamespace, tmp_path: Path) -> None:
    lines: list[str] = []

    def fail(line: str) -> None:
        lines.append(line)
        raise ValueError(line)

    with Watchdog(
        None, 0, 1, stall_seconds=STALL, limit_seconds=1e9, folder=tmp_path / "no", publish_seconds=0.01, report=fail
    ) as dog:
        for count in (1, 2):
            dog.beat("data", count)
            clock.now += STALL
            wait_for(lambda count=count: len(lines) == count)  # type: ignore[misc]
    assert f"no file ({tmp_path / 'no' / 'stacks-rank0.txt'} can't be written)" in lines[0]


def test_it_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    with make([], HashStore(), 0, 2, publish_seconds=1000.0):
        assert threading.active_count() == before + 2
    assert threading.active_count() == before


@pytest.fixture
def three(clock: SimpleNamespace, tmp_path: Path) -> Iterator[list[tuple[Watchdog, list[str]]]]:
    """Three ranks of this process over one store, all of whose beats and looks are the test's."""
    store = HashStore()
    dogs = []
    for rank in range(3):
        lines: list[str] = []
        dogs.append((make(lines, PrefixStore("attempt", store), rank, 3, folder=tmp_path, publish_seconds=0.2), lines))
    for dog, _ in dogs:
        dog.__enter__()
    yield dogs
    for dog, _ in dogs:
        dog.__exit__(None, None, None)


Three = list[tuple[Watchdog, list[str]]]


def test_the_lowest_waiting_rank_and_the_missing_one_speak(
    three: Three, clock: SimpleNamespace, tmp_path: Path
) -> None:
    for rank, (dog, _) in enumerate(three):
        dog.beat("data", 7)
        if rank != 0:
            dog.beat("head")
    clock.now += STALL
    stacks = [tmp_path / f"stacks-rank{rank}.txt" for rank in range(3)]
    wait_for(lambda: bool(three[0][1] and three[1][1]) and all(path.exists() for path in stacks))
    who = f"rank 0 (host {socket.gethostname()}, pid {os.getpid()}) is behind, in phase data of step 7 for 50 s, at "
    assert three[1][1][0].startswith(f"no progress for 50 s at step 7 (phase head): {who}")
    assert three[0][1][0].startswith(
        f"no progress for 50 s at step 7 (phase data): the other ranks wait for this one: {who}"
    )
    assert three[2][1] == [], "rank 1 of the same machine has said it"


def test_each_machine_speaks(three: Three, clock: SimpleNamespace) -> None:
    three[2][0]._host = "other"
    for rank, (dog, _) in enumerate(three):
        dog.beat("data", 8 if rank else 7)
    clock.now += STALL
    wait_for(lambda: all(lines for _, lines in three))


def test_a_rank_that_left(three: Three, clock: SimpleNamespace) -> None:
    three[1][0].beat("evaluation", 4)
    three[1][0].__exit__(None, None, None)
    clock.now += STALL
    wait_for(lambda: bool(three[0][1]))
    assert (
        f"rank 1 (host {socket.gethostname()}, pid {os.getpid()}) has left the run, last in phase evaluation of step 4"
        in (three[0][1][0])
    )


def test_after_a_rollback_the_rank_that_did_not_follow_is_behind(three: Three, clock: SimpleNamespace) -> None:
    for rank, (dog, _) in enumerate(three):
        dog.beat("data", 500)
        if rank != 2:
            dog.beat("data", 300)
    clock.now += STALL
    wait_for(lambda: bool(three[0][1]))
    assert (
        f"rank 2 (host {socket.gethostname()}, pid {os.getpid()}) is behind, in phase data of step 500"
        in three[0][1][0]
    )


def test_all_in_the_same_place(three: Three, clock: SimpleNamespace) -> None:
    for dog, _ in three:
        dog.beat("head", 5)
    clock.now += STALL
    wait_for(lambda: bool(three[0][1]))
    assert (
        "all 3 ranks stand in phase head of step 5 (the network, if that is a collective): ranks 0, 1, 2 at "
        in (three[0][1][0])
    )


def test_signs_of_an_earlier_attempt_are_not_those_of_this_one(clock: SimpleNamespace, tmp_path: Path) -> None:
    store, lines = HashStore(), []
    with make([], PrefixStore("a", store), 1, 2):
        time.sleep(0.05)
    with make(lines, PrefixStore("b", store), 0, 2, folder=tmp_path):
        clock.now += STALL
        wait_for(lambda: bool(lines))
    assert "rank 1 hasn't been heard of at all" in lines[0]


def test_a_pause_is_told_to_those_who_wait(three: Three, clock: SimpleNamespace) -> None:
    with three[0][0].paused():
        for rank, (dog, _) in enumerate(three):
            dog.beat("save", 5)
            if rank:
                dog.beat("wait")
        clock.now += STALL
        wait_for(lambda: bool(three[1][1]))
        assert "is behind, in phase save of step 5 for 50 s, which is known to be long" in three[1][1][0]


def sign(**changes: Any) -> Sign:
    base = Sign(1, "gpu-7", 4711, "data", (0, 120, 0), 40.0, 0.0, "read (files.py:3)", False, False)
    return base._replace(**changes)


def test_many_ranks_are_given_by_number() -> None:
    signs = {rank: sign() for rank in range(20)}
    assert describe_behind(list(range(4)), signs) == "ranks 0, 1, 2, 3 are behind, in phase data of step 120 for 40 s"
    assert describe_lost(list(range(20)), {}, {}).endswith("; so it is with ranks 3, 4, 5, 6, 7, 8, 9, 10 and 9 more")
    lost = describe_lost([3], signs, {3: 41.2})
    assert lost == (
        "rank 3 (host gpu-7, pid 4711) hasn't been heard of for 41 s, last in phase data of step 120: "
        "its process or machine is gone"
    )


def test_lines_of_python_tell_ranks_in_the_same_phase_apart() -> None:
    signs = {rank: sign(at="load (x.py:9)" if rank == 2 else "all_reduce (y.py:5)") for rank in range(12)}
    assert describe_all(signs) == (
        "all 12 ranks stand in phase data of step 120: rank 2 at load (x.py:9), "
        "ranks 0, 1, 3, 4, 5, 6, 7, 8 and 3 more at all_reduce (y.py:5)"
    )


@pytest.mark.parametrize("report", ["None", "lambda line: time.sleep(1000)"])
def test_the_limit_ends_a_process_whose_main_thread_hangs(report: str, tmp_path: Path) -> None:
    code = f"""
    import ctypes, time
    from pathlib import Path
    from partial_fc.watchdog import Watchdog

    def hang_in_the_file_server():
        mutex = ctypes.create_string_buffer(128)  # locked twice: no signal and no Python wakes it
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)

    folder = Path({str(tmp_path)!r})
    with Watchdog(None, 0, 1, stall_seconds=0.2, limit_seconds=0.5, folder=folder, report={report}) as dog:
        dog.beat("data", 3)
        hang_in_the_file_server()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    if report == "None":
        stalled, ended = done.stderr.splitlines()
        assert "s at step 3 (phase data): it is at hang_in_the_file_server (<string>:" in stalled
        assert f"rank 0 ({socket.gethostname()}, pid " in ended and "the limit is reached; stacks in " in ended
    assert "hang_in_the_file_server" in (tmp_path / "stacks-rank0.txt").read_text()


@pytest.mark.parametrize("times", [(0, 5, 1), (6, 5, 1), (2, 5, 0)])
def test_bad_times(times: tuple[float, float, float]) -> None:
    stall, limit, publish = times
    with pytest.raises(ConfigError, match=rf"stall_seconds is {stall}, .* expected 0 < stall_seconds <= limit_seconds"):
        make([], stall_seconds=stall, limit_seconds=limit, publish_seconds=publish)
