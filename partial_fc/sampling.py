"""Which classes a step uses: a function of (seed, position, labels), in time and memory of what it draws.

Class ids are cut into fixed blocks of 2**16. Block b with the edges e_b, e_{b+1} draws
floor(e_{b+1} n / C + u) - floor(e_b n / C + u) of its ids through a keyed permutation, with one u per position. The
counts add up to n exactly, and no tensor of C elements exists. Every rank that owns a part of a block permutes the
whole block and keeps its own range, so the draw does not depend on the world size.

All of it runs on the host, in NumPy: no device waits for it, and the counts are known without asking one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from partial_fc.permutation import KeyedPermutation, hash64, hash64_each, permute_bits

_BLOCK_BITS = 16
_BLOCK = 1 << _BLOCK_BITS
_STREAM = 0x5A3D
_MASK32 = (1 << 32) - 1
# Ids permuted at once: the few arrays of 128 KiB that this takes stay in the cache (twice as fast as all at once).
_AT_ONCE = 1 << 15


class SampledClasses(NamedTuple):
    """The classes that a step uses, of one shard.

    ``drawn_positives`` and ``positives``, added up over the shards, are what the sampling correction needs: n minus the
    former is n', how many drawn classes are no positives, and C minus the latter is C', how many those stand for.

    Attributes:
        ids: sorted local ids (global id - start) ``[P]``, int64, on the CPU.
        positive: ``[P]`` bool, on the CPU: whether the class is a label of the global batch.
        positives: how many of the ids are positives.
        drawn_positives: how many of those were drawn, too.
    """

    ids: Tensor
    positive: Tensor
    positives: int
    drawn_positives: int


def block_counts(first: int, last: int, num_classes: int, drawn: int, key: int) -> np.ndarray:
    """How many ids each of the blocks ``[first, last)`` draws: int64 ``[last - first]``, in exact integer arithmetic.

    Over all blocks they add up to ``drawn``. Two blocks of full size differ by at most one.

    Args:
        first: first block.
        last: one past the last block.
        num_classes: C.
        drawn: n, how many classes all blocks draw together.
        key: the position's key; its low 32 bits are u 2**32.
    """
    # floor(e n / C + u) = floor((e n + floor(u C)) / C), as e n is an integer: 64 bits are enough up to 3e9 classes.
    offset = (key & _MASK32) * num_classes >> 32
    dtype = np.int64 if num_classes * (drawn + 1) < 1 << 63 else object
    edges = np.minimum(np.arange(first, last + 1, dtype=np.int64) * _BLOCK, num_classes).astype(dtype)
    return np.diff((edges * drawn + offset) // num_classes).astype(np.int64)


def draw_classes(num_classes: int, drawn: int, *, seed: int, position: int, start: int, end: int) -> np.ndarray:
    """The drawn classes inside ``[start, end)``: global ids, int64, sorted, each at most once.

    Args:
        num_classes: C.
        drawn: n, how many are drawn over all shards, 0 to C.
        seed: the head's seed.
        position: index of the step's first sample in the sample stream.
        start: first class of the shard.
        end: one past its last class.
    """
    if start == end:
        return np.empty(0, dtype=np.int64)
    key = hash64(_STREAM, seed, position)
    first, last = start >> _BLOCK_BITS, (end - 1 >> _BLOCK_BITS) + 1
    counts = block_counts(first, last, num_classes, drawn, key)
    # The last block of all may be shorter than 2**16.
    whole = min(last, num_classes >> _BLOCK_BITS) - first
    ids = np.empty(counts.sum(), dtype=np.int64)
    filled = _draw_whole_blocks(first, counts[:whole], key, ids)
    if whole < len(counts):
        block = last - 1
        size = num_classes - block * _BLOCK
        images = KeyedPermutation(size, hash64(key, block))(np.arange(counts[-1], dtype=np.uint32))
        images.sort()
        ids[filled:] = images
        ids[filled:] += block * _BLOCK
    return ids[slice(*np.searchsorted(ids, (start, end)))]


def sampled_classes(
    labels: Tensor, num_classes: int, drawn: int, *, seed: int, position: int, start: int, end: int
) -> SampledClasses:
    """Drawn classes and the batch's positives inside ``[start, end)``; nothing tops the two up.

    Args:
        labels: ``[B]`` global labels of the global batch, int64, on the CPU; other shards' labels are passed over.
        num_classes: C.
        drawn: as in :func:`draw_classes`, as are ``seed``, ``position``, ``start`` and ``end``.
        seed: the head's seed.
        position: index of the step's first sample.
        start: first class of the shard.
        end: one past its last class.
    """
    ids = draw_classes(num_classes, drawn, seed=seed, position=position, start=start, end=end)
    rows = labels.numpy()
    positives = np.unique(rows[(rows >= start) & (rows < end)])
    # The few positives go to their places: the drawn ids needn't be sorted again.
    places = np.searchsorted(ids, positives)
    missing = np.ones(len(positives), dtype=bool)
    inside = places < len(ids)
    missing[inside] = ids[places[inside]] != positives[inside]
    ids = np.insert(ids, places[missing], positives[missing])
    ids -= start
    positive = np.zeros(len(ids), dtype=bool)
    # Each place moves up by the positives that were put in before it.
    positive[places + np.cumsum(missing) - missing] = True
    return SampledClasses(
        torch.from_numpy(ids), torch.from_numpy(positive), len(positives), len(positives) - int(missing.sum())
    )


def _draw_whole_blocks(first: int, counts: np.ndarray, key: int, out: np.ndarray) -> int:
    """Write the sorted ids that the blocks from ``first`` on draw to the beginning of ``out``; return how many."""
    blocks = np.flatnonzero(counts)
    if len(blocks) == 0:
        return 0
    counts = counts[blocks]
    blocks += first
    keys = (hash64_each(key, last=blocks) & _MASK32).astype(np.uint32)
    width = int(counts.max())
    index = np.arange(width, dtype=np.uint32)
    rows = max(1, _AT_ONCE // width)
    filled = 0
    for begin in range(0, len(blocks), rows):
        some = slice(begin, begin + rows)
        images = permute_bits(index, _BLOCK_BITS, keys[some, None])
        # A block that draws one fewer than the others has one image too many: it is marked and sorted to the end.
        fewer = counts[some] < width
        images[fewer, -1] = _MASK32
        images.sort(axis=1)
        ids = images + blocks[some, None] * _BLOCK
        if fewer.any():
            ids = ids[images != _MASK32]
        out[filled : filled + ids.size] = ids.ravel()
        filled += ids.size
    return filled
