"""The head's collectives under names of the domain: every byte that the head sends goes through this file.

Legend: W ranks, b rows of this rank, B rows of the global batch, d embedding size. The process group is read once and
becomes integers. Each call is counted by name in :attr:`HeadGroup.calls`, what it sends in :attr:`HeadGroup.bytes`.
Those that something can run beside return a :class:`Pending` result.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames these two; the older releases that are supported know the first names only.
_all_gather: Callable[..., Any] = getattr(
    dist, "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
)
_reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)


# Names of the head's collectives, which calls and bytes are counted by.
COLLECTIVES = (
    "sizes",
    "labels",
    "embeddings",
    "target_cosines",
    "normalizers",
    "embedding_gradient",
    "candidates",
    "sums",
)

Result = TypeVar("Result")
# Entered while a result is waited for.
Waiting = Callable[[], contextlib.AbstractContextManager[object]]


def ring_bytes(size: int, ranks: int, *, sums: bool = False) -> int:
    """Bytes that each rank sends by the ring algorithm.

    Args:
        size: bytes of what a gather makes, a reduce-scatter takes, or a sum sums.
        ranks: W.
        sums: whether it's a sum on every rank, which is twice the (W - 1) / W of the whole that the others take.
    """
    return (2 if sums else 1) * size * (ranks - 1) // ranks


class Pending(Generic[Result]):
    """A collective under way.

    Args:
        work: what the backend gave; None: the result is there.
        finish: makes the result of what arrived.
        waiting: entered while the work is waited for.
    """

    def __init__(self, work: Any, finish: Callable[[], Result], waiting: Waiting = contextlib.nullcontext) -> None:
        self._work, self._finish, self._waiting = work, finish, waiting

    def wait(self) -> Result:
        """The result. On a GPU the stream waits for it, not the host."""
        if self._work is not None:
            with self._waiting():
                self._work.wait()
            self._work = None
        return self._finish()


class HeadGroup:
    """The ranks that share one head.

    Args:
        process_group: the group; None: the default group where one is initialised, else a single process.

    Attributes:
        rank: this process in the group.
        world_size: W.
        reaches_host: whether tensors on the host can be sent.
        calls: how often each collective ran, by name.
        bytes: what this rank sent, by name, where the backend uses ring algorithms (:func:`ring_bytes`).
        waiting: what is entered while a collective is waited for; a trainer counts the time there.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._group = process_group
        if process_group is None and not (dist.is_available() and dist.is_initialized()):
            self.rank, self.world_size, self.reaches_host = 0, 1, True
        else:
            self.rank, self.world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
            self.reaches_host = self.world_size == 1 or "cpu:" in dist.get_backend_config(process_group)
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.waiting: Waiting = contextlib.nullcontext

    def gather_sizes(self, rows: int, device: torch.device) -> list[int]:
        """Rows of each rank's batch, where they may differ (one integer a rank)."""
        if self.world_size == 1:
            return [rows]
        sizes = torch.empty(self.world_size, dtype=torch.int64, device=device)
        self._gather("sizes", sizes, torch.tensor([rows], dtype=torch.int64, device=device))
        return sizes.tolist()

    def gather_labels(self, labels: Tensor, sizes: Sequence[int]) -> Pending[Tensor]:
        """Labels ``[b]`` of every rank, in rank order: ``[B]``."""
        return self._gather_rows("labels", labels, sizes)

    def gather_embeddings(self, embeddings: Tensor, sizes: Sequence[int]) -> Pending[Tensor]:
        """Embeddings ``[b, d]`` (and what rides along) of every rank, in rank order: ``[B, d]``."""
        return self._gather_rows("embeddings", embeddings, sizes)

    def sum_target_cosines(self, cosine: Tensor) -> Pending[Tensor]:
        """Target cosines ``[B]`` (and what rides along), each known to its owner and 0 elsewhere. In place."""
        if self.world_size == 1:
            return Pending(None, lambda: cosine)
        self._count("target_cosines", cosine, sums=True)
        work = dist.all_reduce(cosine, group=self._group, async_op=True)
        return Pending(work, lambda: cosine, self.waiting)

    def gather_normalizers(self, parts: Tensor) -> Tensor:
        """Each shard's partial normalizers ``[n, B]`` (maximum, sum, and what goes with them): ``[W, n, B]``."""
        return self._stack("normalizers", parts)

    def scatter_embedding_gradient(self, gradient: Tensor, sizes: Sequence[int]) -> Pending[Tensor]:
        """Sum of the shards' gradients ``[B, d]``, each rank receiving its own rows: ``[b, d]``."""
        if self.world_size == 1:
            return Pending(None, lambda: gradient)
        most = max(sizes)
        if min(sizes) < most:
            padded = gradient.new_zeros(self.world_size, most, *gradient.shape[1:])
            for row, part in zip(padded, gradient.split(list(sizes)), strict=True):
                row[: len(part)] = part
            gradient = padded.flatten(0, 1)
        mine = gradient.new_empty(most, *gradient.shape[1:])
        self._count("embedding_gradient", gradient)
        work = _reduce_scatter(mine, gradient.contiguous(), group=self._group, async_op=True)
        return Pending(work, lambda: mine[: sizes[self.rank]], self.waiting)

    def gather_candidates(self, candidates: Tensor) -> Tensor:
        """Each shard's top-k values or classes ``[B, k]`` of :meth:`PartialFC.topk`: ``[W, B, k]``."""
        return self._stack("candidates", candidates)

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """Sum of a small tensor (a squared norm, a count) over the shards. In place."""
        if self.world_size > 1:
            self._count("sums", value, sums=True)
            with self.waiting():
                dist.all_reduce(value, group=self._group)
        return value

    def _stack(self, name: str, tensor: Tensor) -> Tensor:
        if self.world_size == 1:
            return tensor[None]
        stacked = tensor.new_empty(self.world_size, *tensor.shape)
        self._gather(name, stacked, tensor.contiguous())
        return stacked

    def _gather_rows(self, name: str, rows: Tensor, sizes: Sequence[int]) -> Pending[Tensor]:
        if self.world_size == 1:
            return Pending(None, lambda: rows)
        most = max(sizes)
        if len(rows) < most:
            rows = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        gathered = rows.new_empty(self.world_size, most, *rows.shape[1:])
        work = self._gather(name, gathered, rows.contiguous(), wait=False)

        def finish() -> Tensor:
            if min(sizes) == most:
                return gathered.flatten(0, 1)
            return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

        return Pending(work, finish, self.waiting)

    def _gather(self, name: str, output: Tensor, tensor: Tensor, *, wait: bool = True) -> Any:
        self._count(name, output)
        with self.waiting() if wait else contextlib.nullcontext():
            return _all_gather(output.flatten(), tensor.flatten(), group=self._group, async_op=not wait)

    def _count(self, name: str, whole: Tensor, *, sums: bool = False) -> None:
        self.calls[name] += 1
        self.bytes[name] += ring_bytes(whole.nbytes, self.world_size, sums=sums)
