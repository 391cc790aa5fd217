"""Which sample stands at which position of the endless training stream, and which positions a rank takes.

An order is a function of (seed, position): nothing is shuffled, resuming needs one integer, and the world size and the
batch size have no part in it. Position p lies in pass ``p // L`` of the order's length L.

=================== ==================================================== ===============================================
order               a pass                                               what it stores
=================== ==================================================== ===============================================
``SampleOrder``     every sample once, by ``perm(seed, pass)[p % N]``    nothing, for 10^9 samples too
``WeightedOrder``   every source as often as its weight says             a few numbers a source
``BalancedOrder``   every class as often as its size to the power 1 - b  where each class's samples and turns are
``IdentityOrder``   every class once, K of its samples in a row          where each class's samples are
=================== ==================================================== ===============================================

The samples of a class or source of n are drawn in turn: of any n draws in a row that begin at a multiple of n each
takes another sample, in an order that changes from turn to turn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from partial_fc.errors import ConfigError, DataError
from partial_fc.permutation import KeyedPermutation, draw_in_turn, hash64

# Keep these streams of keys apart from one another and from the others that are made from the same seed.
_STREAM_TAG = 0x0DE5
_TURN_TAG = 0x7042
_OFFSET_TAG = 0x0FF5

# Up to here KeyedPermutation doesn't mix pairs evenly, and of so few a batch spans many passes.
_SMALL = 512

# The turns of a class in a pass are counted in 2**-24, which go into an int64 up to 2**38 samples.
_FRACTION_BITS = 24
_WHOLE = 1 << _FRACTION_BITS


class Order(ABC):
    """The order of the endless sample stream.

    Attributes:
        num_samples: N, samples in the data set.
        length: L, positions of a pass: an epoch of ``train.epochs``.
        seed: any integer.
    """

    def __init__(self, num_samples: int, length: int, seed: int) -> None:
        if num_samples < 1:
            raise ConfigError(f"an order needs 1 sample or more, got num_samples={num_samples}: check data.path")
        self.num_samples, self.length, self.seed = num_samples, length, seed

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """Samples at these positions.

        Args:
            positions: int64 array ``[n]``, values from 0; they may span any number of passes.

        Returns:
            int64 array ``[n]``, values in ``[0, num_samples)``.

        Raises:
            ConfigError: a position is negative.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ConfigError(f"a position of the sample stream is 0 or more, got {positions.min()}")
        return self._sample_ids(positions)

    @abstractmethod
    def _sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """As :meth:`sample_ids`, of checked positions."""

    def _shuffled(self, index: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Passes over ``range(count)`` in an order of their own each: pass and element of each index."""
        passes, within = np.divmod(index, count)
        if count <= _SMALL:
            zeros = np.zeros_like(index)
            return passes, draw_in_turn(hash64(self.seed, _STREAM_TAG), zeros, zeros + count, index)
        elements = np.empty_like(within)
        for number in np.unique(passes).tolist():
            rows = passes == number
            elements[rows] = KeyedPermutation(count, hash64(self.seed, _STREAM_TAG, number))(within[rows])
        return passes, elements


class SampleOrder(Order):
    """Every sample exactly once a pass: sample ``perm(seed, p // N)[p % N]`` of N at position p.

    Args:
        num_samples: N.
        seed: any integer.

    Raises:
        ConfigError: ``num_samples`` is less than 1.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        super().__init__(num_samples, num_samples, seed)

    def _sample_ids(self, positions: np.ndarray) -> np.ndarray:
        return self._shuffled(positions, self.num_samples)[1]


class WeightedOrder(Order):
    """Sources one behind the other, each with a weight: in a pass a source of n samples has ``round(weight n)`` turns.

    It has one turn at least, so a weight below 1 / n counts as 1 / n. A weight of 2 shows every sample of the source
    twice a pass, 0.5 half of them, the other half in the next pass. With weights of 1 it's :class:`SampleOrder`.

    Args:
        sizes: samples of each source.
        weights: of each source, above 0.
        seed: any integer.

    Raises:
        ConfigError: a size or weight is out of range.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        for size, weight in zip(sizes, weights, strict=True):
            if size < 1 or not 0 < weight <= 1e6:
                raise ConfigError(
                    f"a source has 1 sample or more and a weight above 0 (at most 1e6), got {size} samples, "
                    f"weight {weight}: check data.weight and data.more"
                )
        self._sizes = np.array(sizes, dtype=np.int64)
        self._draws = np.maximum(1, np.rint(self._sizes * np.array(weights))).astype(np.int64)
        self._starts = _starts(self._sizes)
        self._draw_starts = _starts(self._draws)
        super().__init__(int(self._sizes.sum()), int(self._draws.sum()), seed)

    def _sample_ids(self, positions: np.ndarray) -> np.ndarray:
        passes, element = self._shuffled(positions, self.length)
        source = np.searchsorted(self._draw_starts, element, side="right") - 1
        size, draw = self._sizes[source], element - self._draw_starts[source]
        # Whole rounds take the samples as they come: the permutation above has mixed them. The rest of a round is
        # drawn in turn, or the same samples would be left out in every pass.
        rest = self._draws[source] % size
        of_rest = draw - (self._draws[source] - rest)
        index = draw % size
        rows = of_rest >= 0
        index[rows] = draw_in_turn(
            hash64(self.seed, _TURN_TAG), source[rows], size[rows], passes[rows] * rest[rows] + of_rest[rows]
        )
        return self._starts[source] + index


class ClassIndex:
    """Where the samples of each class are.

    Args:
        labels: int64 ``[N]``, class of each sample; negative: it belongs to none.

    Attributes:
        classes: int64 ``[G]``, the classes that have samples, ascending.
        counts: int64 ``[G]``, how many each has.
        num_samples: N.

    Raises:
        DataError: no sample has a class.
    """

    def __init__(self, labels: np.ndarray) -> None:
        self.num_samples = len(labels)
        unusable = np.flatnonzero(labels < 0)
        if unusable.size:
            labels = np.delete(labels, unusable)
        if not len(labels):
            raise DataError("no sample of the data set has a class: look at it with 'partial-fc validate'")
        # How many usable samples stand before each unusable one.
        self._before = unusable - np.arange(len(unusable))
        # Files of this field are sorted by class, as a rule; then nothing else need be stored.
        self._by_class = None
        if np.any(labels[1:] < labels[:-1]):
            self._by_class = np.argsort(labels, kind="stable").astype(np.uint32 if len(labels) <= 1 << 32 else np.int64)
            labels = labels[self._by_class]
        first = np.flatnonzero(np.concatenate([[True], labels[1:] != labels[:-1]]))
        self.classes = labels[first]
        self.counts = np.diff(np.append(first, len(labels)))
        self._starts = first

    def samples(self, group: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Sample ``index`` of the class ``classes[group]``, elementwise; int64."""
        place = self._starts[group] + index
        if self._by_class is not None:
            place = self._by_class[place].astype(np.int64)
        return place + np.searchsorted(self._before, place, side="right")


class BalancedOrder(Order):
    """Classes more evenly than they are: a class of n_c samples has ``t_c = f n_c ** (1 - balance)`` turns a pass.

    The factor f makes a pass as long as there are samples with a class; then no t_c is below 1. A class has
    ``floor(t_c)`` or ``ceil(t_c)`` turns in a pass, and in the first 2**k passes together 2**k t_c of them, rounded up
    or down (t_c is kept to 2**-24). Over the passes its samples are drawn in turn.

    The classes stand one behind the other on a line, each as long as its t_c. A pass takes the points q + u of the
    line, q = 0, 1, ...; its u in [0, 1) is another one each time, by the sequence of van der Corput, of which it can be
    said in closed form how many of the first p numbers are less than a bound: so many turns came before pass p.

    Args:
        classes: where the samples of each class are.
        seed: any integer.
        balance: b, 0 (each sample once a pass) to 1 (each class equally often).

    Raises:
        ConfigError: ``balance`` is out of range.
    """

    def __init__(self, classes: ClassIndex, seed: int, balance: float = 1.0) -> None:
        if not 0 <= balance <= 1:
            raise ConfigError(f"data.balance must be from 0 to 1, got {balance}")
        length = int(classes.counts.sum())
        ends = np.cumsum(classes.counts ** (1 - balance))
        # Where each class begins on the line, and where the last one ends, in 2**-24.
        self._edges = np.concatenate([[0], np.rint(ends * (length / ends[-1]) * _WHOLE)]).astype(np.int64)
        self._edges[-1] = length << _FRACTION_BITS
        self._key = hash64(seed, _OFFSET_TAG) % _WHOLE
        self._classes = classes
        super().__init__(classes.num_samples, length, seed)

    def _sample_ids(self, positions: np.ndarray) -> np.ndarray:
        passes, element = self._shuffled(positions, self.length)
        offset = _van_der_corput(passes) ^ self._key
        group = np.searchsorted(self._edges, (element << _FRACTION_BITS) + offset, side="right") - 1
        begin, end = self._edges[group], self._edges[group + 1]
        # The pass's first point in the class: those before it are of the classes before.
        first = begin - offset + _WHOLE - 1 >> _FRACTION_BITS
        draw = self._points_before(passes, end) - self._points_before(passes, begin) + element - first
        return self._classes.samples(
            group, draw_in_turn(hash64(self.seed, _TURN_TAG), group, self._classes.counts[group], draw)
        )

    def _points_before(self, passes: np.ndarray, edge: np.ndarray) -> np.ndarray:
        """How many points all the passes before one have that are less than an edge."""
        whole, bound = edge >> _FRACTION_BITS, edge & _WHOLE - 1
        rounds, number = passes >> _FRACTION_BITS, passes & _WHOLE - 1
        # After 2**24 passes each u has been there once.
        return passes * whole + rounds * bound + _count_below(bound, number, self._key)


class IdentityOrder(Order):
    """K samples of a class in a row, classes in a new order each pass: a batch of P K positions holds P identities.

    In a pass every class comes once, so the identities of a batch are different; only in a batch that spans two
    passes one may come twice. The K samples are different where the class has K, and are repeated where it has fewer.

    Args:
        classes: where the samples of each class are.
        seed: any integer.
        images: K.

    Raises:
        ConfigError: K is less than 1.
    """

    def __init__(self, classes: ClassIndex, seed: int, images: int = 4) -> None:
        if images < 1:
            raise ConfigError(f"data.images_per_identity must be 1 or more, got {images}")
        self._classes, self._images = classes, images
        super().__init__(classes.num_samples, len(classes.counts) * images, seed)

    def _sample_ids(self, positions: np.ndarray) -> np.ndarray:
        visits, image = np.divmod(positions, self._images)
        visit, group = self._shuffled(visits, len(self._classes.counts))
        count = self._classes.counts[group]
        # A turn holds whole visits only, so that no sample comes twice in one; which ones are left out changes.
        in_turn = np.maximum(1, count // self._images)
        turn, number = np.divmod(visit, in_turn)
        draw = turn * count + (number * self._images + image) % count
        return self._classes.samples(group, draw_in_turn(hash64(self.seed, _TURN_TAG), group, count, draw))


def local_positions(start: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Positions of a rank in the global batch ``[start, start + B)``: its rows ``[rB//W, (r+1)B//W)``.

    Args:
        start: position of the global batch's first sample, 0 or more.
        batch_size: B, the global batch.
        rank: r, in ``[0, W)``.
        world_size: W.

    Returns:
        int64 array ``[b]``; the ranks' arrays, joined in rank order, are ``start, ..., start + B - 1``.

    Raises:
        ConfigError: B is less than W (a rank would get no row), or an argument is out of its range.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must be in [0, world_size), got rank={rank}, world_size={world_size}")
    if batch_size < world_size:
        raise ConfigError(
            f"a global batch of {batch_size} can't be split over {world_size} ranks, each needs a row: "
            f"set train.batch_size to {world_size} or more, or start fewer processes"
        )
    if start < 0:
        raise ConfigError(f"a position of the sample stream is 0 or more, got {start}")
    first, last = rank * batch_size // world_size, (rank + 1) * batch_size // world_size
    return np.arange(start + first, start + last, dtype=np.int64)


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each of several runs begins when they stand one behind the other; int64."""
    return np.concatenate([[0], np.cumsum(sizes[:-1])]).astype(np.int64)


def _van_der_corput(index: np.ndarray) -> np.ndarray:
    """Numbers of the sequence 0, 1/2, 1/4, 3/4, 1/8, ..., in 2**-24: the low 24 bits of the index, mirrored."""
    result = np.zeros_like(index)
    for bit in range(_FRACTION_BITS):
        result |= (index >> bit & 1) << _FRACTION_BITS - 1 - bit
    return result


def _count_below(bound: np.ndarray, number: np.ndarray, key: int) -> np.ndarray:
    """How many of the first ``number`` of the sequence, xor ``key``, are less than ``bound``; both below 2**24."""
    total = np.zeros_like(number)
    mirrored = _van_der_corput(number)
    for bit in range(int(number.max(initial=0)).bit_length()):
        # The indices with the higher bits of `number`, without this one, and with any below it: their u are 2**bit
        # numbers at equal distances, of which `lowest` is the first.
        distance = _WHOLE >> bit
        lowest = (mirrored & (distance >> 1) - 1) ^ key & distance - 1
        total += (number >> bit & 1) * ((bound - lowest + distance - 1) // distance)
    return total
