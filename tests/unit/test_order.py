from __future__ import annotations

import numpy as np
import pytest

from partial_fc.data.order import SampleOrder, local_positions
from partial_fc.errors import ConfigError


def walk(order: SampleOrder, batch_size: int, world_size: int, steps: int, start: int = 0) -> list[np.ndarray]:
    """The global batches, as the ranks' parts joined in rank order."""
    batches = []
    for step in range(steps):
        position = start + step * batch_size
        parts = [order.sample_ids(local_positions(position, batch_size, r, world_size)) for r in range(world_size)]
        batches.append(np.concatenate(parts))
    return batches


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_comes_once_an_epoch(world_size: int) -> None:
    count, batch_size = 103, 8
    order = SampleOrder(count, seed=5)
    stream = np.concatenate(walk(order, batch_size, world_size, steps=3 * count // batch_size + 1))
    for epoch in range(3):
        part = stream[epoch * count : (epoch + 1) * count]
        assert np.array_equal(np.sort(part), np.arange(count))
    assert not np.array_equal(stream[:count], stream[count : 2 * count])


@pytest.mark.parametrize("batch_size", [4, 7, 32])
def test_the_global_batches_do_not_depend_on_the_world_size(batch_size: int) -> None:
    order = SampleOrder(57, seed=1)
    expected = walk(order, batch_size, 1, steps=20)
    for world_size in (2, 3, 4):
        for mine, theirs in zip(walk(order, batch_size, world_size, steps=20), expected, strict=True):
            assert np.array_equal(mine, theirs)


def test_resuming_needs_the_position_only() -> None:
    expected = walk(SampleOrder(57, seed=1), 10, 2, steps=20)
    resumed = walk(SampleOrder(57, seed=1), 10, 3, steps=8, start=120)
    assert np.array_equal(np.concatenate(resumed), np.concatenate(expected[12:]))


def test_a_batch_may_span_many_epochs() -> None:
    ids = SampleOrder(3, seed=0).sample_ids(np.arange(30))
    assert np.array_equal(np.sort(ids.reshape(10, 3), axis=1), np.tile(np.arange(3), (10, 1)))
    scattered = np.array([29, 0, 17, 17])
    assert np.array_equal(SampleOrder(3, seed=0).sample_ids(scattered), ids[scattered])


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(SampleOrder(50, seed).sample_ids(np.arange(50)).tolist()) for seed in range(10)}
    assert len(orders) == 10


def test_the_ranks_share_the_rows_evenly() -> None:
    for world_size in range(1, 9):
        sizes = [len(local_positions(100, 8, rank, world_size)) for rank in range(world_size)]
        assert sum(sizes) == 8 and max(sizes) - min(sizes) <= 1


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch of 3 can't be split over 4 ranks.*train.batch_size"):
        local_positions(0, 3, 0, 4)
    with pytest.raises(ConfigError, match="rank=2, world_size=2"):
        local_positions(0, 3, 2, 2)
    with pytest.raises(ConfigError, match="got -1"):
        local_positions(-1, 3, 0, 2)
    with pytest.raises(ConfigError, match="got -7"):
        SampleOrder(10, 0).sample_ids(np.array([3, -7]))
    with pytest.raises(ConfigError, match="num_samples=0"):
        SampleOrder(0, 0)
