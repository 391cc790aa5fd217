"""What ranks do together: a failure of one is raised by all, and nobody waits for the group's timeout."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed as dist

from partial_fc.errors import ConfigError, DataError, PartialFCError
from partial_fc.ranks import agreed, agreed_while


def outcome(action: Any) -> tuple[str, str]:
    """The result, or the error, and that all ranks can still talk to each other."""
    try:
        found = ("result", str(action()))
    except Exception as error:
        found = (type(error).__name__, str(error))
    if dist.is_initialized():
        dist.barrier()
    return found


def failing(rank: int, world_size: int, on: int, kind: str) -> tuple[str, str]:
    def act() -> int:
        if rank != on:
            return rank
        if kind == "data":
            raise DataError("the disk is gone")
        if kind == "os":
            raise FileNotFoundError(2, "No such file", "train.rec")
        raise ValueError("a mistake")

    return outcome(lambda: agreed(act))


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_failure_of_one_is_raised_by_all(ranks: Any, world_size: int) -> None:
    assert ranks(world_size).run(failing, 99, "data") == [("result", str(rank)) for rank in range(world_size)]
    for on in range(world_size):
        who = f"rank {on}: " if on else ""
        assert set(ranks(world_size).run(failing, on, "data")) == {("DataError", f"{who}the disk is gone")}
        (found,) = set(ranks(world_size).run(failing, on, "os"))
        assert found[0] == "DataError" and found[1].startswith(f"{who}train.rec: No such file")
        found = ranks(world_size).run(failing, on, "other")
        assert found[on] == ("ValueError", "a mistake"), "with its trace, on the rank that has it"
        others = {one for rank, one in enumerate(found) if rank != on}
        assert others == {("PartialFCError", f"{who}ValueError: a mistake (that rank shows where)")}


def waiting(rank: int, world_size: int, mine: tuple[int, ...], fails: int) -> tuple[str, str]:
    def act() -> int:
        if rank == fails:
            raise ConfigError("no such key")
        if fails >= 0:
            # Would take for ever: the failure of the other ends the waiting.
            threading.Event().wait(60)
        return 10 * rank

    return outcome(lambda: agreed_while(act, mine=rank in mine))


@pytest.mark.timeout(50)
def test_the_others_wait_for_who_does_it(ranks: Any) -> None:
    assert ranks(3).run(waiting, (1,), -1) == [("result", "None"), ("result", "10"), ("result", "None")]
    assert ranks(3).run(waiting, (0, 2), -1) == [("result", "0"), ("result", "None"), ("result", "20")]
    assert ranks(2).run(waiting, (), -1) == [("result", "None")] * 2
    assert ranks(1).run(waiting, (0,), -1) == [("result", "0")]


@pytest.mark.timeout(50)
def test_a_failure_of_one_ends_the_work_of_all(ranks: Any) -> None:
    assert set(ranks(3).run(waiting, (1, 2), 2)) == {("ConfigError", "rank 2: no such key")}
    assert issubclass(ConfigError, PartialFCError)
