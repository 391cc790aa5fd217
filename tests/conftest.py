"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
from hypothesis import settings

from partial_fc import cli_errors
from tests.ranks import RankPool

# Examples are drawn anew from the same seed on each run, and a busy machine is no failure.
settings.register_profile("house", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("house")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """``ranks(W)``: W processes with a gloo group that live as long as the tests; ``ranks(W).run(fn, *args)``."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        return pools.setdefault(world_size, RankPool(world_size))

    yield pool
    for living in pools.values():
        living.close()


@pytest.fixture
def leaves_by_raising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that end early raise SystemExit, instead of ending the process of the tests."""

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(cli_errors, "leave", leave)
