from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailed, RankPool, run_ranks


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


def add_ranks(rank: int, world_size: int, extra: float) -> torch.Tensor:
    total = torch.tensor([rank + extra])
    dist.all_reduce(total)
    return total


def where_am_i(rank: int, world_size: int) -> tuple[int, int, int, int]:
    return rank, world_size, dist.get_rank(), dist.get_world_size()


def draw(rank: int, world_size: int) -> tuple[float, int]:
    return torch.rand(()).item(), torch.get_num_threads()


def fail_on(rank: int, world_size: int, bad: int) -> None:
    if rank == bad:
        raise ValueError(f"rank {rank} is not amused")
    dist.barrier()


def die_on(rank: int, world_size: int, bad: int) -> None:
    if rank == bad:
        os._exit(7)
    dist.barrier()


def hang_on(rank: int, world_size: int, bad: int) -> int:
    if rank == bad:
        time.sleep(600)
    return rank


def unpicklable(rank: int, world_size: int) -> object:
    return lambda: rank


def open_groups(rank: int, world_size: int) -> int:
    group = dist.new_group(list(range(world_size)))
    dist.barrier(group)
    return os.getpid()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_results_come_back_by_rank(pool):
    assert pool.run(where_am_i) == [(0, 2, 0, 2), (1, 2, 1, 2)]
    assert [float(total) for total in pool.run(add_ranks, 0.5)] == [2.0, 2.0]


def test_the_processes_stay_and_each_job_starts_from_the_same_seed(pool):
    first = pool.run(draw)
    pids = pool.pids
    assert pool.run(draw) == first == [first[0]] * 2
    assert first[0][1] == 1
    assert pool.pids == pids and len(set(pids)) == 2


def test_a_failure_is_shown_and_kills_the_peers(pool):
    pool.run(where_am_i)
    pids = pool.pids
    with pytest.raises(RankFailed, match="ValueError: rank 1 is not amused") as caught:
        pool.run(fail_on, 1)
    assert caught.value.rank == 1
    assert "in fail_on" in caught.value.traceback
    assert all(gone(pid) for pid in pids)
    assert pool.pids == []
    assert pool.run(where_am_i)[1] == (1, 2, 1, 2)


def test_the_deadline_kills_and_shows_where_the_late_rank_is(pool):
    pool.run(where_am_i)
    pids = pool.pids
    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"ranks \[0\] not done within 0\.5 s") as caught:
        pool.run(hang_on, 0, timeout=0.5)
    assert time.monotonic() - start < 10
    assert "in hang_on" in caught.value.traceback
    assert all(gone(pid) for pid in pids)


def test_a_death_is_blamed_on_the_rank_that_died(pool):
    with pytest.raises(RankFailed, match="exit code 7") as caught:
        pool.run(die_on, 1)
    assert caught.value.rank == 1


def test_a_process_killed_between_jobs_is_noticed(pool):
    pool.run(where_am_i)
    os.kill(pool.pids[1], signal.SIGKILL)
    with pytest.raises(RankFailed, match="exit code -9") as caught:
        pool.run(add_ranks, 0.0)
    assert caught.value.rank == 1


def test_a_result_that_cannot_be_pickled_is_a_failure(pool):
    with pytest.raises(RankFailed, match="pickle"):
        pool.run(unpicklable)


def test_a_function_that_cannot_be_sent_leaves_the_pool_alone(pool):
    pool.run(where_am_i)
    pids = pool.pids
    with pytest.raises(Exception, match="pickle"):
        pool.run(lambda rank, world_size: rank)
    assert pool.pids == pids


def test_one_rank_has_a_group_and_nothing_is_left_behind(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (pid,) = run_ranks(open_groups, 1)
    assert gone(pid)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() < 10


def test_the_session_fixture_keeps_one_pool_per_world_size(ranks):
    assert ranks(1) is ranks(1)
    assert ranks(1).run(where_am_i) == [(0, 1, 0, 1)]
