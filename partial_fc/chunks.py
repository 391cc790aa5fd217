"""The walk over a rank's class centres in chunks: how long they are, how their rows and products are had.

Legend: B rows of the global batch, d embedding size, P classes walked (all of the shard's, or the sampled ones), p
classes of a chunk.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.memory import empty_rows

NORM_FLOOR = 1e-12

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE = 16 << 20
_FEWEST_CLASSES = 256


class Chunk(NamedTuple):
    """A block of the walk.

    Attributes:
        number: which one.
        begin: its first place in the walk.
        end: one past its last.
        rows: where its centres stand in the weight: a slice, or int64 ids ``[p]``.
        centres: its rows of the weight ``[p, d]``, as they are stored.
    """

    number: int
    begin: int
    end: int
    rows: slice | Tensor
    centres: Tensor


class KeptRows:
    """The rows of sampled classes, gathered by the forward, for the backward: where they are few beside the shard.

    They stand in one block that is kept from step to step, and belong to the step (its token) that filled it last.
    """

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._owner: object = None

    def take(self, owner: object, weight: Tensor, rows: int) -> Tensor | None:
        """A place ``[rows, d]`` for a step's rows; None where they are more than an eighth of the shard's."""
        self._owner = None
        if 8 * rows > len(weight):
            return None
        block = self._block
        if block is None or len(block) < rows or block.dtype != weight.dtype or block.device != weight.device:
            # A little more: another step samples a few classes more.
            self._block = block = empty_rows(rows + rows // 64 + 64, weight.shape[1], weight.dtype, weight.device)
        self._owner = owner
        return block[:rows]

    def of(self, owner: object, rows: int) -> Tensor | None:
        """The rows, where they still are those of this step."""
        return self._block[:rows] if self._owner is owner and self._block is not None else None


class Walk:
    """The chunks of one pass over the weight; gathered rows stand in one buffer, which the next chunk overwrites.

    Args:
        weight: ``[local classes, d]``.
        ids: sorted local ids ``[P]`` to walk; None: all.
        batch: B.
        chunk_size: classes of a chunk; None: by the size of the cache.
        gathered: a place ``[P, d]`` for all gathered rows instead.
        filled: whether they are there already.
    """

    def __init__(
        self,
        weight: Tensor,
        ids: Tensor | None,
        batch: int,
        chunk_size: int | None,
        gathered: Tensor | None = None,
        *,
        filled: bool = False,
    ) -> None:
        self._weight, self._ids, self._all, self._filled = weight, ids, gathered, filled
        total = len(weight) if ids is None else len(ids)
        count, self.longest = equal_chunks(total, chunk_size or chunk_length(batch, weight.shape[1], weight.device))
        self.bounds = [total * number // count for number in range(count + 1)] if count else [0]
        self._gathered: Tensor | None = None
        self._first: Chunk | None = None

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[Chunk]:
        for number in range(len(self)):
            first, self._first = self._first, None
            yield first if first is not None else self._load(number)

    def load_first(self) -> Chunk | None:
        """The first chunk ahead of the iteration, while something else is on its way; None where there is none."""
        if self._first is None and len(self):
            self._first = self._load(0)
        return self._first

    def _load(self, number: int) -> Chunk:
        begin, end = self.bounds[number], self.bounds[number + 1]
        if self._ids is None:
            return Chunk(number, begin, end, slice(begin, end), self._weight[begin:end])
        rows = self._ids[begin:end]
        if self._all is not None:
            place = self._all[begin:end]
        else:
            if self._gathered is None:
                self._gathered = self._weight.new_empty(self.longest, self._weight.shape[1])
            place = self._gathered[: end - begin]
        if not self._filled:
            torch.index_select(self._weight, 0, rows, out=place)
        return Chunk(number, begin, end, rows, place)


def default_budget(weight_bytes: int) -> int:
    """Bytes of products that are kept unasked: at most a thirty-second of what a rank's centres take."""
    return weight_bytes // 32


class KeptProducts:
    """Products of the forward that the backward uses again, as far as a budget of bytes allows.

    On a CPU they stand in one block of memory that is kept from step to step: asking the system for that much anew,
    and touching it first, would cost as much as the product that is saved.

    Args:
        budget: bytes.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._block: Tensor | None = None

    def take(self, walk: Walk, batch: int, dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
        """Places ``[p, B]`` for the products of the first chunks, as many as fit; give them back after use.

        On a GPU None stands for each: the allocator keeps memory there, and the product is its own place.
        """
        sizes = [(end - begin) * batch for begin, end in zip(walk.bounds, walk.bounds[1:], strict=False)]
        fitting = [end for end in itertools.accumulate(sizes) if end * dtype.itemsize <= self._budget]
        if not fitting or device.type != "cpu":
            return [None] * len(fitting)
        block, self._block = self._block, None
        if block is None or block.dtype != dtype or len(block) < fitting[-1]:
            # A little more, where there is room: another step samples a few classes more.
            room = min(fitting[-1] + fitting[-1] // 64, self._budget // dtype.itemsize)
            block = empty_rows(1, room, dtype, device)[0]
        return [part.view(-1, batch) for part in block[: fitting[-1]].split(sizes[: len(fitting)])]

    def give_back(self, places: Sequence[Tensor | None]) -> None:
        """What :meth:`take` gave is not needed any more."""
        first = places[0] if places else None
        if first is not None and first.device.type == "cpu":
            self._block = (first if first._base is None else first._base).view(-1)


def chunk_length(batch: int, size: int, device: torch.device) -> int:
    """Classes of a chunk: so many that products, centres and gradient rows stay in the cache (CPU) or L2 (GPU).

    Args:
        batch: B.
        size: d.
        device: where the weight is.
    """
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    else:
        # Others use it, too.
        cache = cpu_cache() // 2
    return classes_in_cache(batch, size, cache)


def classes_in_cache(batch: int, size: int, cache: int) -> int:
    """Classes of a chunk whose products, centres and gradient rows fill ``cache`` bytes: a multiple of 64, 256 or more.

    Args:
        batch: B.
        size: d.
        cache: bytes.
    """
    per_class = 4 * (batch + 2 * size)
    return max(_FEWEST_CLASSES, cache // per_class // 64 * 64)


def equal_chunks(total: int, most: int) -> tuple[int, int]:
    """(number of chunks, classes of the longest) that ``total`` classes are cut into, none longer than ``most``.

    Chunk i is ``[total i // number, total (i + 1) // number)``: of equal length, so that none is tiny.
    """
    count = -(-total // most)
    return count, -(-total // count) if count else 0


@functools.cache
def cpu_cache() -> int:
    """Bytes of the CPU's largest cache; 16 MiB where the system doesn't tell."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        try:
            found = re.fullmatch(r"(\d+)([KMG]?)\s*", path.read_text(encoding="ascii"))
        except OSError:
            continue
        if found:
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes, default=_UNKNOWN_CACHE)


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their norms (floored at 1e-12), and their norms ``[n]``. A row that isn't finite becomes NaN."""
    norm = torch.linalg.vector_norm(rows, dim=1)
    floored = norm.clamp_min(NORM_FLOOR).masked_fill(~torch.isfinite(norm), torch.nan)
    return rows / floored[:, None], floored


def inverse_norms(centres: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / |w_j| ``[p]`` in ``dtype``, norms floored at 1e-12."""
    return torch.linalg.vector_norm(centres, dim=1, dtype=dtype).clamp_min(NORM_FLOOR).reciprocal()
