"""Keyed pseudo-random permutations, evaluated per index: nothing is stored, whatever the range.

Everything random in this package is a pure function of (seed, position). This file holds the two functions that the
rest is made of: a hash of integers, and a permutation of ``range(n)`` that a key selects. Both are the same on every
machine and device, because they use integer operations only.

The permutation is an alternating (unbalanced) Feistel network over the next power of two, restricted to ``range(n)`` by
cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). It's statistical, not
cryptographic. The 32-bit mixer is "lowbias32" (C. Wellons, "Prospecting for hash functions", 2018), the 64-bit one
SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).

The arrays may be NumPy int64 arrays or torch int64 tensors: only operators are used. Where 32 bits suffice, NumPy
uint32 arrays give the same values in half the time.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
# Below 10 bits, 6 rounds leave the images of two elements dependent on one another.
_ROUNDS, _ROUNDS_OF_FEW, _FEW_BITS = 6, 12, 9
_MIN_BITS = 8
# Groups up to this size are permuted by sorting.
_SORTED = 64
# So many of them at once, which takes 10 MB.
_SORTED_AT_ONCE = 1 << 13

# A NumPy int64 or uint32 array, or a torch int64 tensor.
IntArray = TypeVar("IntArray", bound=Any)


def hash64(*parts: int) -> int:
    """Hash integers (of any size and sign, order matters) into 64 bits, the same everywhere.

    >>> hash64(1, 2) == hash64(1, 2), hash64(1, 2) == hash64(2, 1)
    (True, False)
    """
    state = 0x9E3779B97F4A7C15
    for part in parts:
        word = part & _MASK64
        high = (part >> 64) if part >= 0 else ~((~part) >> 64)
        for value in (word,) if high in (0, -1) else (word, high & _MASK64):
            state = _absorb(value, state)
    return state


def hash64_each(*parts: int, last: np.ndarray) -> np.ndarray:
    """``hash64(*parts, value)`` for each value of ``last``, an int64 array; the result is uint64, of the same shape."""
    # A hash is the state after its parts, so only the last part is absorbed once for each value.
    return _absorb(last.astype(np.uint64), hash64(*parts))


def _absorb(value: Any, state: Any) -> Any:
    """SplitMix64 of their sum (``value`` and ``state`` may change places): integers below 2**64, or uint64 arrays."""
    mixed = (value + state + 0x9E3779B97F4A7C15) & _MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
    return mixed ^ (mixed >> 31)


def mix32(x: IntArray) -> IntArray:
    """Mix the low 32 bits of each element; the result is in ``[0, 2**32)``. Overflow of int64 wraps, as intended."""
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def permute_bits(index: IntArray, bits: int, key: int | IntArray) -> IntArray:
    """Permute ``range(2**bits)``: the image of each element of ``index``.

    Over the keys each image is equally frequent; those of two elements are so too from 10 bits on (below, there is
    :func:`permute_pairs`).

    Args:
        index: int64 array of values in ``[0, 2**bits)``; uint32, if NumPy's, where bits is at most 32.
        bits: 2 to 62.
        key: 32-bit key, or an array of such keys that broadcasts with ``index`` (a permutation per element), of the
            same dtype.
    """
    return _feistel(index, bits, key, _ROUNDS)


def permute_pairs(index: IntArray, bits: int, key: int | IntArray) -> IntArray:
    """Permute as :func:`permute_bits`, below 10 bits in more rounds: there too each pair of images is as frequent."""
    return _feistel(index, bits, key, _ROUNDS if bits > _FEW_BITS else _ROUNDS_OF_FEW)


def _feistel(index: IntArray, bits: int, key: int | IntArray, rounds: int) -> IntArray:
    low_bits = bits // 2
    high_bits = bits - low_bits
    left = index >> low_bits
    right = index & ((1 << low_bits) - 1)
    left_bits, right_bits = high_bits, low_bits
    for round_ in range(rounds):
        mask = (1 << left_bits) - 1
        noise = mix32(mix32(right + (round_ * 0x9E3779B1 & _MASK32)) ^ key)
        left, right = right, (left ^ noise) & mask
        left_bits, right_bits = right_bits, left_bits
    # An even number of rounds: the halves have their first widths again.
    return (left << low_bits) | right


def random_unit(key: int, streams: int, index: np.ndarray) -> np.ndarray:
    """Uniform numbers in ``[0, 1)`` that are functions of (key, index): float64 array ``[len(index), streams]``.

    Args:
        key: any integer, mixed by :func:`hash64`.
        streams: how many independent numbers per index.
        index: int64 array ``[n]``, values from 0 to 2**62.
    """
    low_key, high_key = hash64(key) & _MASK32, hash64(key) >> 32
    columns = np.arange(streams, dtype=np.int64)
    base = mix32(mix32(index[:, None] ^ low_key) + mix32((index[:, None] >> 32) ^ high_key))
    return mix32(base + mix32(columns * 0x9E3779B1 + high_key)) / 2.0**32


def draw_in_turn(key: int, group: np.ndarray, size: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Draw from groups, each in turns: draw d from a group of n is element ``perm(key, group, d // n)[d % n]``.

    Args:
        key: any integer.
        group: int64 array ``[m]``, number of the group.
        size: int64 array ``[m]``, n of the group, 1 to 2**62.
        draw: int64 array ``[m]``, d, from 0.

    Returns:
        int64 array ``[m]``, values in ``[0, n)``.
    """
    turn, index = np.divmod(draw, size)
    # A key for each (group, turn).
    keys = hash64_each(key, last=group) + hash64_each(key, 1, last=turn)
    keys = ((keys ^ (keys >> 29)) * 0xBF58476D1CE4E5B9) & _MASK64
    keys = (keys >> 32).astype(np.int64)
    result = np.zeros_like(index)
    small = np.flatnonzero((size > 1) & (size <= _SORTED))
    for begin in range(0, len(small), _SORTED_AT_ONCE):
        # Walking cycles takes long where a group fills a small part of the power of two: its elements are sorted by
        # random numbers instead.
        rows = small[begin : begin + _SORTED_AT_ONCE]
        width = int(size[rows].max())
        noise = mix32(mix32(np.arange(width) * 0x9E3779B1) ^ keys[rows, None])
        noise[np.arange(width) >= size[rows, None]] = 1 << 32
        result[rows] = np.argsort(noise, axis=1, kind="stable")[np.arange(len(noise)), index[rows]]
    bits = np.where(size > _SORTED, np.frexp((size - 1).astype(np.float64))[1], 0)
    for number in np.unique(bits[bits > 0]).tolist():
        rows = np.flatnonzero(bits == number)
        image = permute_pairs(index[rows], number, keys[rows])
        while (outside := np.flatnonzero(image >= size[rows])).size:
            image[outside] = permute_pairs(image[outside], number, keys[rows[outside]])
        result[rows] = image
    return result


class KeyedPermutation:
    """A permutation of ``range(n)``, chosen by ``key``; calling it maps indices to their images.

    Args:
        n: size of the range, 1 to 2**62.
        key: any integer.
    """

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"a permutation needs 1 <= n <= 2**62, got n={n}")
        self.n = n
        self._bits = max(_MIN_BITS, (n - 1).bit_length())
        self._key = hash64(key) & _MASK32

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Map an int64 array (uint32 will do for n <= 2**32) of values in ``[0, n)`` to their images in ``[0, n)``."""
        image = permute_bits(index, self._bits, self._key)
        outside = np.flatnonzero(image >= self.n)
        while outside.size:
            walked = permute_bits(image[outside], self._bits, self._key)
            image[outside] = walked
            outside = outside[walked >= self.n]
        return image
