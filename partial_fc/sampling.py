"""Which classes a step uses: a function of (seed, position, labels), in time and memory of what it draws.

Class ids are cut into fixed blocks of 2**16. Block b with the edges e_b, e_{b+1} draws
floor(e_{b+1} n / C + u) - floor(e_b n / C + u) of its ids through a keyed permutation, with one u per position. The
counts add up to n (or differ by one), and no tensor of C elements exists. Every rank that owns a part of a block
permutes the whole block and keeps its own range, so the draw does not depend on the world size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from partial_fc.permutation import KeyedPermutation, hash64, permute_bits

_BLOCK_BITS = 16
_BLOCK = 1 << _BLOCK_BITS
_STREAM = 0x5A3D
_MASK32 = (1 << 32) - 1


def block_counts(first: int, last: int, num_classes: int, drawn: int, key: int) -> list[int]:
    """How many ids each of the blocks ``[first, last)`` draws, in exact integer arithmetic.

    Args:
        first: first block.
        last: one past the last block.
        num_classes: C.
        drawn: n, how many classes all blocks draw together.
        key: the position's key; its low 32 bits are u 2**32.
    """
    offset = (key & _MASK32) * num_classes
    unit = num_classes << 32
    edges = [min(block * _BLOCK, num_classes) for block in range(first, last + 1)]
    floors = [(edge * drawn * (1 << 32) + offset) // unit for edge in edges]
    return [high - low for low, high in zip(floors, floors[1:], strict=False)]


def draw_classes(
    num_classes: int, drawn: int, *, seed: int, position: int, start: int, end: int, device: torch.device
) -> Tensor:
    """The drawn classes inside ``[start, end)``: global ids, int64, unsorted, each at most once.

    Args:
        num_classes: C.
        drawn: n, how many are drawn over all shards (one more or fewer by rounding).
        seed: the head's seed.
        position: index of the step's first sample in the sample stream.
        start: first class of the shard.
        end: one past its last class.
        device: where the ids are made.
    """
    if start == end:
        return torch.empty(0, dtype=torch.int64, device=device)
    key = hash64(_STREAM, seed, position)
    first, last = start >> _BLOCK_BITS, (end - 1 >> _BLOCK_BITS) + 1
    counts = block_counts(first, last, num_classes, drawn, key)
    ids = []
    if last * _BLOCK > num_classes:
        # The last block of all is shorter than 2**16.
        last -= 1
        size = num_classes - last * _BLOCK
        images = KeyedPermutation(size, hash64(key, last))(np.arange(counts.pop(), dtype=np.int64))
        ids.append(torch.from_numpy(images + last * _BLOCK).to(device))
    if last > first:
        repeats = torch.tensor(counts, device=device)
        block = torch.arange(first, last, device=device).repeat_interleave(repeats, output_size=sum(counts))
        begins = (repeats.cumsum(0) - repeats).repeat_interleave(repeats, output_size=sum(counts))
        index = torch.arange(sum(counts), device=device) - begins
        keys = torch.tensor([hash64(key, b) & _MASK32 for b in range(first, last)], device=device)
        ids.append(permute_bits(index, _BLOCK_BITS, keys[block - first]) + block * _BLOCK)
    drawn_ids = torch.cat(ids)
    return drawn_ids[(drawn_ids >= start) & (drawn_ids < end)]


def sampled_classes(
    labels: Tensor, num_classes: int, drawn: int, *, seed: int, position: int, start: int, end: int
) -> tuple[Tensor, int]:
    """Drawn classes and the batch's positives inside ``[start, end)``.

    Args:
        labels: ``[B]`` global labels of the global batch, int64, all in range.
        num_classes: C.
        drawn: as in :func:`draw_classes`, as are ``seed``, ``position``, ``start`` and ``end``.
        seed: the head's seed.
        position: index of the step's first sample.
        start: first class of the shard.
        end: one past its last class.

    Returns:
        Sorted local ids (global id - start) ``[P]``, int64, and how many of them are positives.
    """
    drawn_ids = draw_classes(
        num_classes, drawn, seed=seed, position=position, start=start, end=end, device=labels.device
    )
    positives = torch.unique(labels[(labels >= start) & (labels < end)])
    return torch.unique(torch.cat([drawn_ids, positives])) - start, len(positives)
