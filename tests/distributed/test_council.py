"""The council: every rank sees the same flags at the same call, one call late, whoever asked and when."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.council import Council
from partial_fc.errors import ConfigError
from tests.ranks import RankPool, run_ranks

NAMES = ("stop", "save", "roll back")

# By rank, by call: what is asked before the call.
Asks = list[list[list[str]]]


def expected(asks: Asks, calls: int) -> list[frozenset[str]]:
    """The rule, written again: up from the ask until an exchange returns it; returned by the exchange after."""
    up: list[set[str]] = [set() for _ in asks]
    under_way: frozenset[str] = frozenset()
    seen = []
    for call in range(calls):
        for mine, by_call in zip(up, asks, strict=True):
            mine.update(by_call[call])
            mine -= under_way
        seen.append(under_way)
        under_way = frozenset().union(*up)
    return [*seen, under_way]


def play(council: Council, by_call: list[list[str]]) -> list[frozenset[str]]:
    seen = []
    for names in by_call:
        for name in names:
            council.ask(name)
        seen.append(council.exchange())
    return [*seen, council.drain()]


def job(rank: int, world_size: int, games: list[Asks]) -> list[list[frozenset[str]]]:
    council = Council(NAMES, timeout=timedelta(seconds=60))
    seen = []
    for asks in games:
        if rank == world_size - 1:
            time.sleep(0.002)  # a straggler: the others must not run ahead of it
        seen.append(play(council, asks[rank]))
    return seen


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_random_asks_are_seen_everywhere_at_the_same_call(ranks: Callable[[int], RankPool], world_size: int) -> None:
    chance = random.Random(world_size)
    games: list[Asks] = []
    for _ in range(40):
        calls, rate = chance.randrange(6), chance.choice([0.02, 0.2, 0.7])
        games.append(
            [[[name for name in NAMES if chance.random() < rate] for _ in range(calls)] for _ in range(world_size)]
        )
    results = ranks(world_size).run(job, games)
    for number, asks in enumerate(games):
        rule = expected(asks, len(asks[0]))
        for rank, of_rank in enumerate(results):
            assert of_rank[number] == rule, f"game {number}, rank {rank}: {asks}"


@given(st.lists(st.lists(st.sampled_from(NAMES), max_size=4), max_size=12))
def test_without_a_group_the_rule_is_the_same(by_call: list[list[str]]) -> None:
    assert play(Council(NAMES), by_call) == expected([by_call], len(by_call))


def test_a_flag_comes_once_and_one_call_late() -> None:
    council = Council(NAMES)
    council.ask("save")
    council.ask("save")
    assert council.exchange() == frozenset()
    council.ask("save")  # the one that is under way answers this one too
    council.ask("stop")
    assert council.exchange() == {"save"}
    assert council.exchange() == {"stop"}
    assert council.exchange() == frozenset()
    assert council.drain() == council.drain() == frozenset()


@pytest.mark.parametrize("names", [[], ["stop", "stop"]])
def test_bad_names(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="expected one or more, each once"):
        Council(names)


def test_a_flag_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"no flag 'halt', expected one of \['stop', 'save', 'roll back'\]"):
        Council(NAMES).ask("halt")


def beside_other_collectives(rank: int, world_size: int) -> list[Any]:
    """The ranks leave their exchanges under way while they talk in the default group."""
    council = Council(["stop"])
    seen: list[Any] = []
    for step in range(30):
        if step == 10 + rank:
            council.ask("stop")
        total = torch.tensor([float(rank)])
        dist.all_reduce(total)
        assert total.item() == world_size * (world_size - 1) / 2
        seen.append(bool(council.exchange()))
    council.drain()
    return seen


def test_exchanges_run_beside_the_training(ranks: Callable[[int], RankPool]) -> None:
    seen = ranks(3).run(beside_other_collectives)
    assert seen[0] == seen[1] == seen[2]
    # Rank 1 asks while rank 0's flag is under way, rank 2 after it was returned.
    assert [step for step, stop in enumerate(seen[0]) if stop] == [11, 13]


def part(rank: int, world_size: int) -> list[frozenset[str]]:
    group = dist.new_group([0, 2])
    if rank == 1:
        dist.new_group([0, 2], backend="gloo")  # making a group is everybody's call
        return []
    council = Council(["stop"], group)
    if rank == 2:
        council.ask("stop")
    return [council.exchange(), council.exchange(), council.drain()]


def test_a_part_of_the_ranks(ranks: Callable[[int], RankPool]) -> None:
    alone = [frozenset(), {"stop"}, frozenset()]
    assert ranks(3).run(part) == [alone, [], alone]


def lose_a_rank(rank: int, world_size: int) -> str:
    council = Council(["stop"], timeout=timedelta(seconds=60))
    council.exchange()
    council.drain()
    if rank == 1:
        # Only leaves the council's group, so that the test's own group stays whole.
        assert council._group is not None
        dist.destroy_process_group(council._group)
        return ""
    for _ in range(2):
        try:
            council.exchange()
        except RuntimeError as error:
            assert council.drain() == frozenset(), "the failed exchange is waited for again"
            return str(error)
    raise AssertionError("nothing was raised")


def test_a_lost_rank_is_an_error_and_no_hang() -> None:
    message, _ = run_ranks(lose_a_rank, 2)
    assert message
