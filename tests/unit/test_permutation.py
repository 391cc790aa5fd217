from __future__ import annotations

import numpy as np
import pytest
import torch

from partial_fc.permutation import KeyedPermutation, draw_in_turn, hash64, permute_bits, permute_pairs, random_unit


@pytest.mark.parametrize("n", [1, 2, 3, 7, 255, 256, 257, 1000, 4096, 10007, 65537])
def test_is_a_bijection(n: int) -> None:
    for key in (0, 1, -5, 1 << 80):
        image = KeyedPermutation(n, key)(np.arange(n))
        assert np.array_equal(np.sort(image), np.arange(n))


def test_is_a_bijection_for_every_small_range() -> None:
    for n in range(1, 5001):
        image = KeyedPermutation(n, n)(np.arange(n))
        assert len(image) == n and image.min() >= 0 and (np.bincount(image, minlength=n) == 1).all(), n


@pytest.mark.parametrize("n", [(1 << 40) + 15, 1 << 62])
def test_stays_inside_a_range_that_cannot_be_listed(n: int) -> None:
    index = np.random.default_rng(0).integers(0, n, 2000)
    image = KeyedPermutation(n, 3)(index)
    assert image.min() >= 0 and image.max() < n
    assert len(np.unique(image)) == len(np.unique(index))


def test_keys_give_different_permutations() -> None:
    images = {tuple(KeyedPermutation(1000, key)(np.arange(1000)).tolist()) for key in range(20)}
    assert len(images) == 20


@pytest.mark.parametrize("n", [40, 200])
def test_the_first_position_is_uniform_over_keys(n: int) -> None:
    draws = 10 * n
    zero = np.zeros(1, dtype=np.int64)
    counts = np.bincount([KeyedPermutation(n, key)(zero)[0] for key in range(draws)], minlength=n)
    chi2 = float(((counts - draws / n) ** 2 / (draws / n)).sum())
    # Mean n - 1, standard deviation sqrt(2 (n - 1)): five of these are never left by chance.
    assert abs(chi2 - (n - 1)) < 5 * np.sqrt(2 * (n - 1)) + 1


def deviation(one: np.ndarray, other: np.ndarray, cells: int) -> float:
    """Chi-square of the differences of two different elements of ``range(cells + 1)``, in standard deviations."""
    counts = np.bincount((one - other) % (cells + 1), minlength=cells + 1)
    assert counts[0] == 0
    expected = len(one) / cells
    return float((((counts[1:] - expected) ** 2 / expected).sum() - (cells - 1)) / np.sqrt(2 * (cells - 1)))


@pytest.mark.parametrize("bits", [6, 7, 8, 9, 10])
def test_pairs_are_uniform_over_keys(bits: int) -> None:
    keys = np.random.default_rng(bits).integers(0, 1 << 32, 1 << 20)
    # Elements with the same right half, which the first round doesn't tell apart.
    one, other = (permute_pairs(np.full(len(keys), element), bits, keys) for element in (0, 1 << bits // 2))
    assert abs(deviation(one, other, (1 << bits) - 1)) < 5


def test_pairs_of_draws_are_uniform_over_groups() -> None:
    group = np.arange(1 << 20)
    size = np.full(len(group), 128)
    one, other = (draw_in_turn(1, group, size, np.full(len(group), draw)) for draw in (0, 8))
    assert abs(deviation(one, other, 127)) < 5


def test_a_permutation_stays_what_it_was() -> None:
    # Written down: runs that were begun go on in their order.
    for n, digest in ((513, 455413), (4096, 390462), (1_000_003, 442737)):
        images = KeyedPermutation(n, 7)(np.arange(n))
        assert int((images * (1 + np.arange(n))).sum() % 1_000_003) == digest


def test_neighbours_go_apart() -> None:
    image = KeyedPermutation(100_000, 1)(np.arange(100_000))
    correlation = np.corrcoef(image[:-1], image[1:])[0, 1]
    assert abs(correlation) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), image)[0, 1]) < 0.02


@pytest.mark.parametrize("bits", [2, 9, 16, 33, 62])
def test_numpy_and_torch_agree(bits: int) -> None:
    index = np.random.default_rng(1).integers(0, 1 << bits, 500)
    expected = permute_bits(index, bits, 0x89ABCDEF)
    assert np.array_equal(permute_bits(torch.from_numpy(index), bits, 0x89ABCDEF).numpy(), expected)


def test_hash_separates_order_sign_and_size() -> None:
    values = [hash64(1, 2), hash64(2, 1), hash64(1), hash64(-1), hash64(1, 0), hash64(1 << 64), hash64(0), hash64()]
    assert len(set(values)) == len(values)


def test_random_units_are_uniform_and_independent() -> None:
    units = random_unit(7, 4, np.arange(20_000))
    assert units.min() >= 0 and units.max() < 1
    assert np.allclose(units.mean(axis=0), 0.5, atol=0.01)
    assert np.allclose(np.corrcoef(units.T), np.eye(4), atol=0.03)
    assert abs(np.corrcoef(units[:-1, 0], units[1:, 0])[0, 1]) < 0.03
    assert np.array_equal(random_unit(7, 4, np.array([123, 7])), units[[123, 7]])


@pytest.mark.parametrize("n", [0, -1, (1 << 62) + 1])
def test_a_range_that_cannot_be_permuted_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}"):
        KeyedPermutation(n, 0)


@pytest.mark.parametrize("n", [1, 2, 3, 20, 63, 64, 65, 127, 128, 129, 1000])
def test_draws_take_every_element_once_a_turn(n: int) -> None:
    draws = np.arange(5 * n)
    groups, sizes = np.full(5 * n, 7), np.full(5 * n, n)
    turns = draw_in_turn(3, groups, sizes, draws).reshape(5, n)
    assert np.array_equal(np.sort(turns, axis=1), np.tile(np.arange(n), (5, 1)))
    if n >= 20:
        assert len({tuple(turn) for turn in turns.tolist()}) == 5
        assert not np.array_equal(draw_in_turn(3, groups + 1, sizes, draws), turns.ravel())
        assert not np.array_equal(draw_in_turn(4, groups, sizes, draws), turns.ravel())


def test_many_draws_of_small_groups_are_made_in_parts() -> None:
    draws = np.arange(3 << 13)
    whole = draw_in_turn(1, draws % 7, 1 + draws % 64, draws)
    for rows in (slice(0, 100), slice(8000, 8400), slice(-50, None)):
        assert np.array_equal(draw_in_turn(1, (draws % 7)[rows], (1 + draws % 64)[rows], draws[rows]), whole[rows])


def test_draws_are_functions_of_each_element_alone() -> None:
    generator = np.random.default_rng(0)
    group = generator.integers(0, 1000, 3000)
    size, draw = 1 + group % 300, generator.integers(0, 1 << 40, 3000)
    together = draw_in_turn(9, group, size, draw)
    assert (together >= 0).all() and (together < size).all()
    alone = [draw_in_turn(9, group[i : i + 1], size[i : i + 1], draw[i : i + 1])[0] for i in range(0, 3000, 37)]
    assert together[::37].tolist() == alone


@pytest.mark.parametrize("n", [11, 100])
def test_the_first_draw_is_uniform_over_groups_and_over_turns(n: int) -> None:
    rows = 100 * n
    for group, turn in ((np.arange(rows), np.zeros(rows, dtype=np.int64)), (np.full(rows, 5), np.arange(rows))):
        counts = np.bincount(draw_in_turn(2, group, np.full(rows, n), turn * n), minlength=n)
        chi2 = float(((counts - rows / n) ** 2 / (rows / n)).sum())
        assert abs(chi2 - (n - 1)) < 5 * np.sqrt(2 * (n - 1)) + 1
