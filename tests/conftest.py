"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import settings

from partial_fc import cli_errors
from tests.jobs import Jobs
from tests.ranks import RankPool
from tests.runs import make_data

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
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """Jobs whose logs are in the test's folder, and that end with the test."""
    with Jobs(tmp_path) as opened:
        yield opened


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of made-up identities, which nobody changes."""
    return make_data(tmp_path_factory.mktemp("faces"))


@pytest.fixture
def leaves_by_raising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that end early raise SystemExit, instead of ending the process of the tests."""

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(cli_errors, "leave", leave)
