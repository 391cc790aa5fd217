"""Class sampling: exact counts, the same set for any shards, uniform and independent draws, cost of what is drawn."""

from __future__ import annotations

import hashlib
import math
import tracemalloc
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from partial_fc import permutation, sampling
from partial_fc.permutation import hash64, hash64_each, permute_bits
from partial_fc.sampling import SampledClasses, block_counts, draw_classes, sampled_classes
from partial_fc.sharding import ClassShards

BLOCK = 65536
BATCH = 128
# Two-sided: a draw that is too even (each class in turn) is as wrong as one that is uneven.
LOW, HIGH = 1e-4, 1 - 1e-4
SIZES = [4099, 50_000, 3 * BLOCK + 1000]
SIZE_NAMES = ["a prime", "less than one block", "blocks and a short last one"]
RATES = [0.05, 0.3, 0.8]


@given(
    num_classes=st.integers(1, 300_000), rate=st.floats(0, 1), seed=st.integers(0, 9), position=st.integers(0, 2**40)
)
def test_draws_n_distinct_classes(num_classes: int, rate: float, seed: int, position: int) -> None:
    drawn = int(rate * num_classes)
    ids = draw_classes(num_classes, drawn, seed=seed, position=position, start=0, end=num_classes)
    assert len(ids) == drawn == len(np.unique(ids))
    assert drawn == 0 or (0 <= ids.min() and ids.max() < num_classes)


@given(num_classes=st.integers(1, 200_000), world_size=st.integers(1, 7), position=st.integers(0, 2**40))
def test_shards_draw_parts_of_the_same_set(num_classes: int, world_size: int, position: int) -> None:
    drawn = num_classes // 3
    whole = draw_classes(num_classes, drawn, seed=1, position=position, start=0, end=num_classes)
    shards = ClassShards(num_classes, world_size)
    parts = []
    for rank in range(world_size):
        start, end = shards.bounds(rank)
        parts.append(draw_classes(num_classes, drawn, seed=1, position=position, start=start, end=end))
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("num_classes", "drawn", "seed", "position", "start", "end", "digest"),
    [
        (1000, 100, 0, 0, 0, 1000, "aaf3ed5c12f60369"),
        (70_001, 7_000, 3, 128, 0, 70_001, "022ec02594a557f4"),
        (3 * BLOCK, 20_000, 2, 5, 0, 3 * BLOCK, "6adf95c850bede5c"),
        (1_000_000, 100_000, 7, 2**40, 250_000, 500_000, "bb0de691e592c469"),
        (10**9, 10**6, 1, 12_345, 0, 125_000_000, "b12ecaab9c6d25b2"),
    ],
)
def test_the_set_stays_what_it_was(
    num_classes: int, drawn: int, seed: int, position: int, start: int, end: int, digest: str
) -> None:
    # A run that another version resumes must go on with the same classes.
    ids = draw_classes(num_classes, drawn, seed=seed, position=position, start=start, end=end)
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == digest


@given(
    num_classes=st.one_of(st.integers(1, 10**6), st.integers(10**6, 10**9), st.integers(10**10, 10**12)),
    rate=st.fractions(0, 1),
    key=st.integers(0, 2**64 - 1),
)
def test_all_shards_draw_n_together(num_classes: int, rate: Fraction, key: int) -> None:
    drawn = int(rate * num_classes)
    last = -(-num_classes // BLOCK)
    # The sum telescopes, so a few blocks are enough to add it up where there are millions.
    cuts = sorted({0, last, *(last * part // 7 for part in range(8))}) if last > 20_000 else [0, last]
    if cuts == [0, last]:
        assert block_counts(0, last, num_classes, drawn, key).sum() == drawn
    for block in {0, *(max(0, cut - 1) for cut in cuts)}:
        low, high = (
            math.floor(Fraction(min(edge * BLOCK, num_classes) * drawn, num_classes) + Fraction(key % 2**32, 2**32))
            for edge in (block, block + 1)
        )
        assert block_counts(block, block + 1, num_classes, drawn, key).tolist() == [high - low]


def test_counts_of_a_billion_classes_are_exact() -> None:
    num_classes, drawn = 10**9 + 7, 123_456_789
    last = -(-num_classes // BLOCK)
    counts = block_counts(0, last, num_classes, drawn, key=0xFFFFFFFF)
    assert counts.sum() == drawn
    assert set(counts[:-1].tolist()) <= {drawn * BLOCK // num_classes, drawn * BLOCK // num_classes + 1}


def test_fractions_of_a_class_are_drawn_as_often_as_they_should() -> None:
    # 150,000 classes of which 7 are drawn: a block draws 3.06 or 0.88 of them, in the mean over u.
    sizes = np.array([BLOCK, BLOCK, 150_000 - 2 * BLOCK])
    steps = 4000
    counts = np.stack([block_counts(0, 3, 150_000, 7, hash64(step)) for step in range(steps)])
    expected = sizes * 7 / 150_000
    assert (np.abs(counts - expected) < 1).all()
    fraction = expected % 1
    assert (np.abs(counts.mean(0) - expected) < 4 * np.sqrt(fraction * (1 - fraction) / steps)).all()


def test_hashes_of_an_array_are_the_hashes_of_its_values() -> None:
    values = np.array([0, 1, 2**62, 2**63 - 1, -1, -(2**63)])
    for parts in ((), (2**64 - 1,), (-3, 2**70, 0)):
        assert hash64_each(*parts, last=values).tolist() == [hash64(*parts, int(value)) for value in values]


@pytest.mark.parametrize("bits", [8, 15, 16, 31, 32])
def test_32_bits_permute_as_64_do(bits: int) -> None:
    index = np.random.default_rng(0).integers(0, 1 << bits, 1000)
    keys = np.array([[0], [0xFFFFFFFF], [0x89ABCDEF]])
    narrow = permute_bits(index.astype(np.uint32), bits, keys.astype(np.uint32))
    assert narrow.dtype == np.uint32
    assert np.array_equal(narrow, permute_bits(index, bits, keys))


def scalar_mix(x: int) -> int:
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def scalar_permutation(index: int, bits: int, key: int) -> int:
    """Six Feistel rounds of one index."""
    widths = [bits - bits // 2, bits // 2]
    left, right = divmod(index, 2 ** widths[1])
    for round_ in range(6):
        noise = scalar_mix(scalar_mix(right + round_ * 0x9E3779B1) ^ key)
        left, right = right, (left ^ noise) % 2 ** widths[round_ % 2]
    return left * 2 ** widths[1] + right


def reference_draw(num_classes: int, drawn: int, seed: int, position: int) -> set[int]:
    """All drawn classes, one by one."""
    key = hash64(0x5A3D, seed, position)
    ids = set()
    for begin in range(0, num_classes, BLOCK):
        size = min(BLOCK, num_classes - begin)
        low, high = (
            math.floor(Fraction(edge * drawn, num_classes) + Fraction(key % 2**32, 2**32))
            for edge in (begin, begin + size)
        )
        block_key = hash64(key, begin // BLOCK)
        # A short block is permuted in the next power of two, and walks until it is inside.
        bits, block_key = (16, block_key) if size == BLOCK else (max(8, (size - 1).bit_length()), hash64(block_key))
        for index in range(high - low):
            image = scalar_permutation(index, bits, block_key % 2**32)
            while image >= size:
                image = scalar_permutation(image, bits, block_key % 2**32)
            ids.add(begin + image)
    return ids


@st.composite
def _shards(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(C, n, start, end): also one class, whole blocks, empty shards, shards inside a block, and n of 0 and C."""
    whole_blocks = st.builds(lambda blocks, more: blocks * BLOCK + more, st.integers(1, 3), st.integers(-1, 1))
    num_classes = draw(st.one_of(st.integers(1, 400), st.integers(400, 250_000), whole_blocks))
    drawn = draw(st.integers(0, min(num_classes, 2000)))
    start = draw(st.integers(0, num_classes))
    return num_classes, drawn, start, draw(st.integers(start, num_classes))


@given(shard=_shards(), seed=st.integers(-(2**40), 2**70), position=st.integers(0, 2**50), data=st.data())
def test_equals_the_definition(shard: tuple[int, int, int, int], seed: int, position: int, data: st.DataObject) -> None:
    num_classes, drawn, start, end = shard
    everything = reference_draw(num_classes, drawn, seed, position)
    anywhere = st.integers(0, num_classes - 1)
    label = st.one_of(anywhere, st.sampled_from(sorted(everything))) if everything else anywhere
    labels = data.draw(st.lists(label, max_size=40))
    got = sampled_classes(
        torch.tensor(labels, dtype=torch.int64),
        num_classes,
        drawn,
        seed=seed,
        position=position,
        start=start,
        end=end,
    )
    local_draw = {id_ - start for id_ in everything if start <= id_ < end}
    local_labels = {id_ - start for id_ in labels if start <= id_ < end}
    assert got.ids.dtype == torch.int64 and got.positive.dtype == torch.bool
    assert got.ids.tolist() == sorted(local_draw | local_labels)
    assert got.positive.tolist() == [id_ in local_labels for id_ in got.ids.tolist()]
    assert got.positives == len(local_labels)
    assert got.drawn_positives == len(local_draw & local_labels)


def test_positives_are_always_there_and_nothing_tops_up() -> None:
    labels = torch.tensor([5, 5, 999, 17, 400])
    left = sampled_classes(labels, 1000, 50, seed=0, position=7, start=0, end=500)
    assert left.positives == 3
    assert left.ids[left.positive].tolist() == [5, 17, 400]
    assert torch.equal(left.ids, left.ids.unique())
    drawn = draw_classes(1000, 50, seed=0, position=7, start=0, end=500)
    assert set(left.ids.tolist()) == set(drawn.tolist()) | {5, 17, 400}
    right = sampled_classes(labels, 1000, 50, seed=0, position=7, start=500, end=1000)
    assert right.positives == 1 and right.ids[right.positive].tolist() == [999 - 500]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_corrections_numbers_do_not_depend_on_the_shards(world_size: int) -> None:
    num_classes, drawn = 70_001, 20_000
    labels = torch.randint(num_classes, (500,), generator=torch.Generator().manual_seed(0))
    shards = ClassShards(num_classes, world_size)
    parts = []
    for start, end in map(shards.bounds, range(world_size)):
        parts.append(sampled_classes(labels, num_classes, drawn, seed=4, position=9, start=start, end=end))
    negatives = sum(int((~part.positive).sum()) for part in parts)
    assert negatives == drawn - sum(part.drawn_positives for part in parts)
    assert sum(part.positives for part in parts) == len(labels.unique())


def test_labels_may_be_a_view_and_are_left_alone() -> None:
    rows = torch.tensor([[7, 0], [3, 0], [7, 0]])
    sampled = sampled_classes(rows[:, 0], 10, 0, seed=0, position=0, start=2, end=10)
    assert sampled.ids.tolist() == [1, 5] and sampled.positives == 2 and sampled.drawn_positives == 0
    assert rows[:, 0].tolist() == [7, 3, 7]


def chi_square_p(statistic: float, freedom: int) -> float:
    """How likely a chi-square of so many degrees of freedom is at least this large."""
    halves = (torch.tensor(value / 2, dtype=torch.float64) for value in (freedom, statistic))
    return float(torch.special.gammaincc(*halves))


def uniformity(counts: np.ndarray, steps: int, positives: np.ndarray) -> dict[str, float]:
    """p-values of the hypothesis that each step drew uniformly without replacement within each block.

    ``counts`` [C]: how often each class was drawn. The variance of a class that is drawn at rate r is (1 - r) of its
    mean, so the chi-square is divided by that. It's taken over single classes, over neighbourhoods (64 to a block) and
    over low bits of the id, because a small bias that many classes share is only seen where they are added up. How much
    each block draws is no matter of chance and has tests of its own.
    """
    ids = np.delete(np.arange(len(counts)), positives)
    blocks = ids // BLOCK
    sizes = np.bincount(blocks)
    totals = np.bincount(blocks, weights=counts[ids])
    per_class = totals / sizes
    spread = per_class * (1 - per_class / steps) * sizes / (sizes - 1)
    block_sizes = np.minimum(len(counts) - np.arange(len(sizes)) * BLOCK, BLOCK)
    groupings = {
        "classes": (ids, 1),
        "neighbourhoods": (blocks * 64 + ids % BLOCK * 64 // block_sizes[blocks], 64),
        "low bits": (blocks * 16 + ids % 16, 16),
    }
    result = {}
    for name, (group, groups) in groupings.items():
        members = np.bincount(group)
        owner = np.arange(len(members)) // (groups if groups > 1 else BLOCK)
        observed = np.bincount(group, weights=counts[ids])
        used = members > 0
        expected = (members * per_class[owner])[used]
        statistic = (observed[used] - expected) ** 2 / (members * spread[owner])[used]
        result[name] = chi_square_p(float(statistic.sum()), int(used.sum()) - len(sizes))
    return result


def enough_steps(num_classes: int, rate: float) -> int:
    """Steps for 4 10^5 draws, and for a variance of 10 of each class's count (so that it is nearly normal)."""
    return max(math.ceil(4e5 / (rate * num_classes)), math.ceil(10 / (rate * (1 - rate))))


def counted(draws: Iterable[np.ndarray], num_classes: int) -> np.ndarray:
    counts = np.zeros(num_classes)
    for ids in draws:
        counts[ids] += 1
    return counts


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("num_classes", SIZES, ids=SIZE_NAMES)
def test_negatives_are_uniform_and_never_repeated_and_positives_are_there(num_classes: int, rate: float) -> None:
    drawn, steps = round(rate * num_classes), enough_steps(num_classes, rate)
    labels = torch.randint(num_classes, (BATCH,), generator=torch.Generator().manual_seed(2))
    positives = labels.unique()
    counts = np.zeros(num_classes)
    for step in range(steps):
        sampled = sampled_classes(labels, num_classes, drawn, seed=11, position=step * BATCH, start=0, end=num_classes)
        assert torch.equal(sampled.ids[sampled.positive], positives)
        assert bool((sampled.ids.diff() > 0).all()), "sorted, so none is there twice"
        negatives = sampled.ids[~sampled.positive].numpy()
        assert len(negatives) == drawn - sampled.drawn_positives
        counts[negatives] += 1
    assert counts.sum() > 1e5
    values = uniformity(counts, steps, positives.numpy())
    assert all(LOW < value < HIGH for value in values.values()), values


def biased_draws(num_classes: int, drawn: int, steps: int, bias: float, favoured: np.ndarray) -> Iterable[np.ndarray]:
    """Uniform draws, some of which are exchanged so that the favoured half is drawn ``bias`` more often."""
    random = np.random.default_rng(5)
    for _ in range(steps):
        taken = np.zeros(num_classes, dtype=bool)
        taken[random.choice(num_classes, drawn, replace=False)] = True
        exchanged = math.floor(bias * drawn / 2 + random.random())
        taken[random.choice(np.flatnonzero(taken & ~favoured), exchanged, replace=False)] = False
        taken[random.choice(np.flatnonzero(~taken & favoured), exchanged, replace=False)] = True
        yield np.flatnonzero(taken)


@pytest.mark.parametrize("rate", RATES)
def test_a_bias_of_two_percent_on_half_of_the_classes_would_be_seen(rate: float) -> None:
    num_classes = 4099
    drawn, steps = round(rate * num_classes), enough_steps(num_classes, rate)
    ids = np.arange(num_classes)
    none = np.empty(0, dtype=np.int64)
    for bias, favoured, where in (
        (0.0, ids < num_classes // 2, ""),
        (0.02, ids < num_classes // 2, "neighbourhoods"),
        (0.02, ids % 2 == 1, "low bits"),
    ):
        draws = biased_draws(num_classes, drawn, steps, bias, favoured)
        values = uniformity(counted(draws, num_classes), steps, none)
        if where:
            assert values[where] < LOW, values
        else:
            assert all(LOW < value < HIGH for value in values.values()), values


def test_a_draw_that_is_too_even_would_be_seen() -> None:
    # Each class in turn, in a new random order each time around: the counts are right, the steps are not independent.
    num_classes, drawn = 4000, 400
    random = np.random.default_rng(0)
    steps = enough_steps(num_classes, drawn / num_classes)
    rounds = [random.permutation(num_classes).reshape(-1, drawn) for _ in range(-(-steps * drawn // num_classes))]
    draws = np.concatenate(rounds)[:steps]
    assert uniformity(counted(draws, num_classes), steps, np.empty(0, dtype=np.int64))["classes"] > HIGH


def independence(pairs: Sequence[tuple[np.ndarray, np.ndarray]], size: int) -> tuple[float, float]:
    """p-values of the mean and of the spread of the overlaps of independent draws from ``range(size)``.

    The overlap of two of them with n and m elements is hypergeometric: its mean is n m / size.
    """
    scores = []
    for one, other in pairs:
        n, m = len(one), len(other)
        variance = n * m * (size - n) * (size - m) / (size**2 * (size - 1))
        taken = np.zeros(size, dtype=bool)
        taken[one] = True
        scores.append((taken[other].sum() - n * m / size) / math.sqrt(variance))
    total = sum(scores) / math.sqrt(len(scores))
    return 0.5 * math.erfc(total / math.sqrt(2)), chi_square_p(sum(score**2 for score in scores), len(scores))


def independent(pairs: Sequence[tuple[np.ndarray, np.ndarray]], size: int) -> bool:
    return all(LOW < value < HIGH for value in independence(pairs, size))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("num_classes", SIZES, ids=SIZE_NAMES)
def test_steps_and_seeds_draw_independently(num_classes: int, rate: float) -> None:
    def draw(seed: int, position: int) -> np.ndarray:
        return draw_classes(
            num_classes, round(rate * num_classes), seed=seed, position=position, start=0, end=num_classes
        )

    steps = [draw(6, BATCH * step) for step in range(60)]
    assert not any(np.array_equal(one, other) for one, other in combinations(steps, 2))
    for lag in (1, 2, 7):
        assert independent(list(zip(steps, steps[lag:], strict=False)), num_classes), lag
    # Neighbouring positions and seeds, and the two exchanged.
    assert independent([(draw(6, step), draw(6, step + 1)) for step in range(40)], num_classes)
    assert independent([(draw(seed, 128), draw(seed + 1, 128)) for seed in range(40)], num_classes)
    assert independent([(draw(seed, seed + 9), draw(seed + 9, seed)) for seed in range(40)], num_classes)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("num_classes", [*SIZES, 4 * BLOCK], ids=[*SIZE_NAMES, "a block a shard"])
def test_shards_draw_independently(num_classes: int, rate: float) -> None:
    # Peers give each rank the same generator state, so all ranks draw the same local classes.
    world_size, drawn = 4, round(rate * num_classes)
    shards = ClassShards(num_classes, world_size)
    bounds = [shards.bounds(rank) for rank in range(world_size)]
    # The last shard may be shorter: the local ids that all of them have are compared.
    shortest = bounds[-1][1] - bounds[-1][0]
    no_labels = torch.empty(0, dtype=torch.int64)
    steps = []
    for step in range(40):
        local = []
        for start, end in bounds:
            sampled = sampled_classes(
                no_labels, num_classes, drawn, seed=8, position=BATCH * step, start=start, end=end
            )
            ids = sampled.ids.numpy()
            local.append(ids[ids < shortest])
        steps.append(local)
    for one, other in combinations(range(world_size), 2):
        assert independent([(step[one], step[other]) for step in steps], shortest), (one, other)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shared", [1.0, 0.05, 0.0])
def test_correlated_draws_would_be_seen(rate: float, shared: float) -> None:
    """The same draw on both ranks, and one of which a twentieth is copied; independent draws pass."""
    size = 12_500
    drawn = round(rate * size)
    random = np.random.default_rng(1)
    pairs = []
    for _ in range(40):
        order = random.permutation(size)
        one = order[:drawn]
        copied = one[: int(shared * drawn)]
        rest = np.setdiff1d(np.arange(size), copied)
        other = np.concatenate([copied, random.choice(rest, drawn - len(copied), replace=False)])
        pairs.append((one, other))
    assert independent(pairs, size) == (shared == 0)


class _Count:
    """``permute_bits`` that counts the ids that it is given."""

    def __init__(self) -> None:
        self.permuted = 0

    def __call__(self, index: np.ndarray, bits: int, key: int | np.ndarray) -> np.ndarray:
        images: np.ndarray = permute_bits(index, bits, key)
        self.permuted += images.size
        return images


class _LongestTensor(TorchDispatchMode):
    """How long a tensor PyTorch made at most, which tracemalloc does not see."""

    longest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.longest = max(self.longest, result.numel())
        return result


@pytest.mark.parametrize(
    ("num_classes", "drawn", "start", "end"),
    [
        (1_000_000, 100_000, 0, 1_000_000),
        (10**9, 10**6, 0, 125_000_000),
        (10**9, 10_000, 10**9 - 10**9 // 64, 10**9),
        (10**9, 100, 0, 10**9),
        (40_000, 2_000, 10_000, 20_000),
    ],
)
def test_a_draw_costs_what_it_draws(
    monkeypatch: pytest.MonkeyPatch, num_classes: int, drawn: int, start: int, end: int
) -> None:
    count = _Count()
    monkeypatch.setattr(sampling, "permute_bits", count)
    monkeypatch.setattr(permutation, "permute_bits", count)
    labels = torch.randint(num_classes, (BATCH,), generator=torch.Generator().manual_seed(0))
    first, last = start // BLOCK, -(-end // BLOCK)

    def sample() -> SampledClasses:
        return sampled_classes(labels, num_classes, drawn, seed=0, position=0, start=start, end=end)

    with _LongestTensor() as tensors:
        sampled = sample()
    permuted = count.permuted
    tracemalloc.start()
    try:
        sample()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    in_blocks = int(block_counts(first, last, num_classes, drawn, hash64(0x5A3D, 0, 0)).sum())
    assert max(tensors.longest, len(sampled.ids)) <= in_blocks + BATCH
    # One more a block, as they draw equal numbers or one fewer, and what a short block draws again (half of it, at
    # most, lies outside, in the mean).
    drawing = min(last - first, in_blocks)
    short = min(in_blocks, BLOCK * drawn // num_classes + 1) if end > num_classes // BLOCK * BLOCK else 0
    assert in_blocks <= permuted <= in_blocks + drawing + 2 * short + 16
    # The ids, a copy of them with the positives and the flags; some arrays of 2^15; 64-bit counts of the blocks.
    assert peak < 8 * 3 * (in_blocks + BATCH) + 8 * 6 * (last - first) + 8 * 12 * 2**15


def test_a_billion_classes_cost_what_is_drawn() -> None:
    # A tensor of 10^9 classes, or one random number for each, would take 4 GB and seconds.
    ids = draw_classes(10**9, 10_000, seed=0, position=0, start=0, end=10**9 // 64)
    assert 100 < len(ids) < 220
