"""Class sampling: exact counts, no dependence on shards, even use of classes, cost of what is drawn."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.sampling import block_counts, draw_classes, sampled_classes
from partial_fc.sharding import ClassShards

CPU = torch.device("cpu")


@given(
    num_classes=st.integers(1, 300_000), rate=st.floats(0, 1), seed=st.integers(0, 9), position=st.integers(0, 2**40)
)
def test_draws_n_distinct_classes(num_classes: int, rate: float, seed: int, position: int) -> None:
    drawn = int(rate * num_classes)
    ids = draw_classes(num_classes, drawn, seed=seed, position=position, start=0, end=num_classes, device=CPU)
    assert len(ids) == drawn == len(ids.unique())
    assert drawn == 0 or (0 <= int(ids.min()) and int(ids.max()) < num_classes)


@given(num_classes=st.integers(1, 200_000), world_size=st.integers(1, 7), position=st.integers(0, 2**40))
def test_shards_draw_parts_of_the_same_set(num_classes: int, world_size: int, position: int) -> None:
    drawn = num_classes // 3
    whole = draw_classes(num_classes, drawn, seed=1, position=position, start=0, end=num_classes, device=CPU)
    shards = ClassShards(num_classes, world_size)
    parts = []
    for rank in range(world_size):
        start, end = shards.bounds(rank)
        parts.append(draw_classes(num_classes, drawn, seed=1, position=position, start=start, end=end, device=CPU))
    assert torch.equal(torch.cat(parts).sort().values, whole.sort().values)


def test_every_class_is_drawn_equally_often() -> None:
    num_classes, drawn, steps = 70_000, 7_000, 400
    counts = torch.zeros(num_classes)
    for position in range(steps):
        ids = draw_classes(num_classes, drawn, seed=3, position=128 * position, start=0, end=num_classes, device=CPU)
        counts[ids] += 1
    rate = drawn / num_classes
    # Binomial: mean 40, variance 36; the chi-square over 70,000 classes has a standard deviation of 0.5 % of its mean.
    assert abs(counts.var().item() / (steps * rate * (1 - rate)) - 1) < 0.03
    assert abs(counts[65536:].mean().item() / (steps * rate) - 1) < 0.03, (
        "the short last block is drawn like the others"
    )


def test_counts_of_a_billion_classes_are_exact() -> None:
    num_classes, drawn = 10**9 + 7, 123_456_789
    last = -(-num_classes // 65536)
    assert sum(block_counts(0, last, num_classes, drawn, key=0xFFFFFFFF)) == drawn


def test_a_billion_classes_cost_what_is_drawn() -> None:
    # A tensor of 10^9 classes, or one random number for each, would take 4 GB and seconds.
    ids = draw_classes(10**9, 10_000, seed=0, position=0, start=0, end=10**9 // 64, device=CPU)
    assert 100 < len(ids) < 220


def test_positives_are_always_there_and_nothing_tops_up() -> None:
    labels = torch.tensor([5, 5, 999, 17, 400])
    ids, positives = sampled_classes(labels, 1000, 50, seed=0, position=7, start=0, end=500)
    assert positives == 3
    assert {5, 17, 400} <= set(ids.tolist())
    assert torch.equal(ids, ids.unique())
    drawn = draw_classes(1000, 50, seed=0, position=7, start=0, end=500, device=CPU)
    assert set(ids.tolist()) == set(drawn.tolist()) | {5, 17, 400}
    right, positives = sampled_classes(labels, 1000, 50, seed=0, position=7, start=500, end=1000)
    assert positives == 1 and 999 - 500 in right.tolist()
