from __future__ import annotations

import numpy as np
import pytest

from partial_fc import sampling
from partial_fc.data import augment
from partial_fc.data import order as order_module
from partial_fc.data.order import (
    BalancedOrder,
    ClassIndex,
    IdentityOrder,
    Order,
    SampleOrder,
    WeightedOrder,
    local_positions,
)
from partial_fc.errors import ConfigError, DataError
from partial_fc.permutation import KeyedPermutation, hash64

# Classes of very different sizes, not sorted; sample 5 and class 4 can't be used.
LABELS = np.random.default_rng(1).permutation(np.repeat([0, 1, 2, 3, 5, 6, 7], [1, 2, 3, 20, 5, 70, 9]))
LABELS[5] = -1


def walk(order: Order, batch_size: int, world_size: int, steps: int, start: int = 0) -> list[np.ndarray]:
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


def every_order(seed: int = 1) -> list[Order]:
    classes = ClassIndex(LABELS)
    return [
        SampleOrder(len(LABELS), seed),
        WeightedOrder([10, 70, 30], [2.0, 0.3, 1.5], seed),
        BalancedOrder(classes, seed),
        BalancedOrder(classes, seed, balance=0.5),
        IdentityOrder(classes, seed, images=3),
    ]


@pytest.mark.parametrize("which", range(5))
def test_any_order_is_a_function_of_the_position(which: int) -> None:
    order = every_order()[which]
    whole = order.sample_ids(np.arange(4 * order.length))
    assert whole.min() >= 0 and whole.max() < order.num_samples == len(LABELS)
    scattered = np.random.default_rng(0).integers(0, len(whole), 500)
    assert np.array_equal(order.sample_ids(scattered), whole[scattered])
    assert not np.array_equal(every_order(seed=2)[which].sample_ids(np.arange(len(whole))), whole)
    for world_size, batch_size in ((2, 7), (3, 10)):
        steps = len(whole) // batch_size
        assert np.array_equal(np.concatenate(walk(order, batch_size, world_size, steps)), whole[: steps * batch_size])


def test_a_pass_shows_each_source_by_its_weight() -> None:
    order = WeightedOrder([10, 70, 30], [2.0, 0.3, 1.5], seed=3)
    assert order.length == 20 + 21 + 45
    passes = order.sample_ids(np.arange(10 * order.length)).reshape(10, -1)
    for one in passes:
        counts = np.bincount(one, minlength=110)
        assert (counts[:10] == 2).all() and counts[10:80].sum() == 21 and set(counts[80:].tolist()) == {1, 2}
        # Twice only where a turn of the 70 ends inside the pass.
        assert counts[10:80].max() <= 2
    assert np.bincount(passes[0], minlength=110)[10:80].max() == 1
    # Over ten passes each sample has its turns: 0.3 * 10, 1.5 * 10.
    counts = np.bincount(passes.ravel(), minlength=110)
    assert (counts[10:80] == 3).all() and (counts[80:] == 15).all()


def test_weights_of_one_are_the_plain_order() -> None:
    positions = np.arange(300)
    expected = SampleOrder(57, 4).sample_ids(positions)
    assert np.array_equal(WeightedOrder([20, 37], [1, 1], 4).sample_ids(positions), expected)


def test_where_the_samples_of_each_class_are() -> None:
    classes = ClassIndex(LABELS)
    usable = LABELS[LABELS >= 0]
    assert classes.classes.tolist() == np.unique(usable).tolist()
    assert classes.counts.tolist() == np.unique(usable, return_counts=True)[1].tolist()
    for group, (number, count) in enumerate(zip(classes.classes, classes.counts, strict=True)):
        found = classes.samples(np.full(count, group), np.arange(count))
        assert found.tolist() == np.flatnonzero(LABELS == number).tolist()
    in_files = ClassIndex(np.array([3, 3, 7, 9, 9, 9]))
    assert in_files.samples(np.array([0, 1, 2]), np.array([1, 0, 2])).tolist() == [1, 2, 5]
    assert in_files._by_class is None
    with pytest.raises(DataError, match="no sample of the data set has a class.*partial-fc validate"):
        ClassIndex(np.array([-1, -1]))


def test_sorted_classes_need_no_list_of_samples_where_some_are_unusable() -> None:
    labels = np.array([-1, 3, 3, -1, -1, 3, 7, 9, -1, 9, 9, -1])
    classes = ClassIndex(labels)
    assert (classes.classes.tolist(), classes.counts.tolist()) == ([3, 7, 9], [3, 1, 3])
    group, index = np.array([0, 0, 0, 1, 2, 2, 2]), np.array([0, 1, 2, 0, 0, 1, 2])
    assert classes.samples(group, index).tolist() == np.flatnonzero(labels >= 0).tolist()
    assert classes._by_class is None
    assert BalancedOrder(classes, 0, balance=0).length == 7


def turns(sizes: list[int], balance: float, passes: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each class came in each pass, ``[passes, G]``, and how often it should on average, ``[G]``."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order = BalancedOrder(ClassIndex(labels), seed=3, balance=balance)
    assert order.length == len(labels)
    classes = labels[order.sample_ids(np.arange(passes * order.length))].reshape(passes, -1)
    expected = np.array(sizes) ** (1 - balance)
    return (
        np.stack([np.bincount(one, minlength=len(sizes)) for one in classes]),
        expected * (len(labels) / expected.sum()),
    )


@pytest.mark.parametrize("sizes", [[1, 2, 3, 4, 5], [1] * 100 + [2] * 90, LABELS.tolist()[:30] + [200], [7], [3, 3]])
@pytest.mark.parametrize("balance", [0.25, 0.5, 1.0])
def test_a_class_has_its_turns_in_each_pass_and_exactly_over_the_passes(sizes: list[int], balance: float) -> None:
    sizes = [max(1, size) for size in sizes]
    got, expected = turns(sizes, balance, passes=64)
    assert expected.min() > 1 - 1e-9
    # In each pass the number rounded up or down; over 2, 4, ... 64 passes too.
    for passes in (1, 2, 8, 64):
        together = got.reshape(64 // passes, passes, -1).sum(axis=1)
        assert (together > passes * expected - 1).all() and (together < passes * expected + 1).all()
    # Not the same classes are rounded up in all passes, nor do classes of one size go up together.
    rounded_up = got > expected + 1e-9
    assert (rounded_up.mean(axis=0) < 1).all()
    for size in set(sizes):
        same = [number for number in range(len(sizes)) if sizes[number] == size]
        share, most = expected[same[0]] % 1, len(same)
        if len(same) > 50:
            assert (np.abs(rounded_up[:, same].sum(axis=1) - share * most) < 2).all()


def test_small_classes_have_the_ratio_of_their_sizes_to_a_power() -> None:
    got, _ = turns([1] * 1000 + [2] * 900, balance=0.5, passes=32)
    ratio = got[:, 1000:].mean() / got[:, :1000].mean()
    assert abs(ratio - np.sqrt(2)) < 1e-3
    got, _ = turns([1, 2, 3, 4, 5], balance=0.5, passes=1024)
    assert np.allclose(got.mean(axis=0) / got[:, 0].mean(), np.sqrt([1, 2, 3, 4, 5]), atol=0.01)


def test_a_balance_of_one_draws_each_class_equally_often() -> None:
    got, expected = turns([1, 2, 3, 20, 5, 70, 9], balance=1.0, passes=16)
    assert np.allclose(expected, 110 / 7)
    assert set(got.ravel().tolist()) == {15, 16}
    assert np.ptp(got.sum(axis=0)) <= 1


def test_a_balance_of_zero_is_every_sample_once_a_pass() -> None:
    order = BalancedOrder(ClassIndex(LABELS), seed=0, balance=0.0)
    for number in range(5):
        ids = order.sample_ids(np.arange(number * order.length, (number + 1) * order.length))
        assert np.array_equal(np.sort(ids), np.flatnonzero(LABELS >= 0))


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_the_samples_of_a_class_take_turns(balance: float) -> None:
    order = BalancedOrder(ClassIndex(LABELS), seed=0, balance=balance)
    ids = order.sample_ids(np.arange(30 * order.length))
    for passes in (1, 7, 30):
        counts = np.bincount(ids[: passes * order.length], minlength=len(LABELS))
        for number in set(LABELS[LABELS >= 0].tolist()):
            assert np.ptp(counts[number == LABELS]) <= 1


def test_turns_are_counted_right_far_out() -> None:
    """The closed form of how many turns came before, against the points of single passes."""
    order = BalancedOrder(ClassIndex(LABELS), seed=5, balance=0.3)
    generator = np.random.default_rng(0)
    edges = order._edges[1:-1]
    for start in (0, 1, (1 << 24) - 3, 5 << 24, *generator.integers(0, 1 << 40, 40).tolist()):
        before = [order._points_before(np.full(len(edges), start + step), edges) for step in range(7)]
        for step in range(6):
            mirrored = int(f"{(start + step) % (1 << 24):024b}"[::-1], 2) ^ order._key
            # Points q + u below the edge, in 2**-24: as many as q from 0 on.
            points = [-(-(int(edge) - mirrored) // (1 << 24)) for edge in edges]
            assert (before[step + 1] - before[step]).tolist() == points
    assert not order._points_before(np.zeros(len(edges), dtype=np.int64), edges).any()


@pytest.mark.parametrize("images", [1, 2, 3, 4, 7])
def test_identities_come_with_their_images_in_a_row(images: int) -> None:
    order = IdentityOrder(ClassIndex(LABELS), seed=2, images=images)
    assert order.length == 7 * images
    ids = order.sample_ids(np.arange(300 * order.length)).reshape(300, 7, images)
    classes = LABELS[ids]
    assert (classes == classes[:, :, :1]).all()
    # Every class once a pass.
    assert np.array_equal(np.sort(classes[:, :, 0], axis=1), np.tile([0, 1, 2, 3, 5, 6, 7], (300, 1)))
    sizes = np.bincount(LABELS[LABELS >= 0])
    for group, number in zip(ids.reshape(-1, images), classes[:, :, 0].ravel(), strict=True):
        assert len(set(group.tolist())) == min(images, sizes[number])
    # None is left out for ever.
    assert np.array_equal(np.unique(ids), np.flatnonzero(LABELS >= 0))


def test_no_image_of_an_identity_comes_twice_before_all_visits_of_its_turn() -> None:
    # Of 8 samples in threes a turn has 2 visits, with 6 different samples; a third visit would repeat one.
    ids = IdentityOrder(ClassIndex(np.zeros(8, dtype=np.int64)), seed=1, images=3).sample_ids(np.arange(6 * 60))
    assert all(len(set(turn.tolist())) == 6 for turn in ids.reshape(60, 6))
    counts = np.bincount(ids, minlength=8)
    assert counts.min() > 0


def test_each_random_stream_has_a_key_of_its_own() -> None:
    tags = [order_module._STREAM_TAG, order_module._TURN_TAG, order_module._OFFSET_TAG, augment._STREAM_TAG]
    assert len({hash64(0, tag) for tag in [*tags, sampling._STREAM]}) == 5


def test_batches_of_sorted_data_hold_as_many_classes_as_a_uniform_shuffle() -> None:
    """What a shuffle window misses: 20,000 samples, sorted, 20 a class, in batches of 256."""
    count, each, batch_size, epochs = 20_000, 20, 256, 12
    steps = count // batch_size
    generator = np.random.default_rng(0)

    def distinct(ids: np.ndarray) -> list[int]:
        batches = ids[: steps * batch_size].reshape(steps, batch_size) // each
        return [len(np.unique(batch)) for batch in batches]

    order = SampleOrder(count, seed=8)
    ours = np.concatenate([distinct(order.sample_ids(np.arange(e * count, (e + 1) * count))) for e in range(epochs)])
    uniform = np.concatenate([distinct(generator.permutation(count)) for _ in range(epochs)])
    # Exactly: a class is missing from a batch with the chance that none of its 20 samples is among 256 of 20,000.
    missing = np.prod([(count - each - i) / (count - i) for i in range(batch_size)])
    expected = count / each * (1 - missing)
    error = uniform.std() / np.sqrt(len(ours))
    assert abs(ours.mean() - expected) < 4 * error
    assert abs(uniform.mean() - expected) < 4 * error
    assert 0.85 < ours.std() / uniform.std() < 1.15
    # A shuffle in a window of 2,000 samples is far from it, so the test can fail.
    window = np.concatenate([start + generator.permutation(2000) for start in range(0, count, 2000)])
    assert abs(np.mean(distinct(window)) - expected) > 20 * error


def test_positions_and_samples_are_independent() -> None:
    """Chi-square of a table of position against sample, in 20 x 20 blocks, over many epochs."""
    count, epochs = 400, 200
    order = SampleOrder(count, seed=6)
    ids = order.sample_ids(np.arange(epochs * count)).reshape(epochs, 20, 20) // 20
    table = np.stack([np.bincount(ids[:, block].ravel(), minlength=20) for block in range(20)])
    expected = epochs * count / 400
    chi2 = float(((table - expected) ** 2 / expected).sum())
    # Both margins are fixed: 19 * 19 degrees of freedom, by the factor of sampling without replacement.
    assert abs(chi2 - 361 * 400 / 399) < 5 * np.sqrt(2 * 361)


@pytest.mark.parametrize("count", [50, 128, 256, 512])
def test_pairs_of_positions_show_pairs_of_samples_equally_often(count: int) -> None:
    """Few samples, over many passes: chi-square of the differences between the samples of two positions of a pass."""
    passes = np.arange(1 << 17) * count
    order = SampleOrder(count, seed=4)
    for distance in (1, 8, 16):
        differences = (order.sample_ids(passes) - order.sample_ids(passes + distance)) % count
        counts = np.bincount(differences, minlength=count)
        expected = len(passes) / (count - 1)
        assert counts[0] == 0
        chi2 = float(((counts[1:] - expected) ** 2 / expected).sum())
        assert abs(chi2 - (count - 2)) < 5 * np.sqrt(2 * (count - 2))


def test_runs_of_more_than_512_samples_keep_their_order() -> None:
    expected = [KeyedPermutation(513, hash64(9, 0x0DE5, number))(np.arange(513)) for number in range(3)]
    assert np.array_equal(SampleOrder(513, seed=9).sample_ids(np.arange(3 * 513)), np.concatenate(expected))


def test_a_thousand_million_samples_need_no_list() -> None:
    count = 10**9
    order = SampleOrder(count, seed=0)
    positions = np.concatenate([np.arange(5000), count - 3000 + np.arange(6000), 7 * count + np.arange(1000)])
    ids = order.sample_ids(positions)
    assert ids.min() >= 0 and ids.max() < count
    # The first 5,000 and last 3,000 positions of one epoch: all different.
    assert len(np.unique(ids[:8000])) == 8000
    assert len(vars(order)) <= 4 and not any(isinstance(value, np.ndarray) for value in vars(order).values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedOrder([3, 0], [1, 1], 0), "1 sample or more and a weight above 0.*got 0 samples"),
        (lambda: WeightedOrder([3, 4], [1, -2], 0), "got 4 samples, weight -2.*data.more"),
        (lambda: WeightedOrder([3], [float("nan")], 0), "weight nan"),
        (lambda: BalancedOrder(ClassIndex(LABELS), 0, balance=1.5), "data.balance must be from 0 to 1, got 1.5"),
        (lambda: IdentityOrder(ClassIndex(LABELS), 0, images=0), "data.images_per_identity must be 1 or more, got 0"),
    ],
)
def test_wrong_arguments_of_an_order_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
