"""What a step of the head is: how it's computed, of what, and what its forward leaves for its backward.

Legend: W ranks, b rows of this rank, B rows of the global batch, d embedding size, P classes that this rank walks (all
its classes, or the sampled ones), p classes of a chunk, K candidates of ``top_k``. "Global" tensors are the same on
every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.chunks import Chunk, KeptProducts, KeptRows, Walk
from partial_fc.collectives import HeadGroup
from partial_fc.emphasis import Negatives
from partial_fc.errors import NonFiniteError
from partial_fc.kernels import multiply
from partial_fc.margins import Margin
from partial_fc.mining import Mining

# Applies the gradient of some rows at once: (rows: a slice or int64 ids, gradient [P, d], gate: 0-dim bool or None,
# the rows as they are now [P, d]).
RowUpdater = Callable[[slice | Tensor, Tensor, Tensor | None, Tensor], None]


@dataclass(frozen=True)
class Engine:
    """How a head computes; the same from step to step.

    Attributes:
        group: the ranks.
        scale: s.
        compute_dtype: what the products' operands are rounded to; None: not rounded.
        tf32: let GPUs multiply float32 in TF32.
        chunk_size: classes of a chunk, or None.
        kernels: which backend.
        filter_gradient: a class whose softmax weight is below it for every row is left out of its own gradient's
            product; None: none is.
        kept: the products that the forward may keep.
        rows: the gathered centres that it keeps.
    """

    group: HeadGroup
    scale: float
    compute_dtype: torch.dtype | None
    tf32: bool
    chunk_size: int | None
    kernels: str
    filter_gradient: float | None
    kept: KeptProducts
    rows: KeptRows

    def dtypes(self, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """(dtype of the products' operands, dtype of reductions, norms and exponentials)."""
        reduce = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return (reduce if reduce == torch.float64 else self.compute_dtype or reduce), reduce

    def multiply(self, left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """``left @ right``; see :func:`partial_fc.kernels.multiply`."""
        return multiply(left, right, dtype, out=out, tf32=self.tf32)


@dataclass(frozen=True)
class Loss:
    """The three axes at this step, and their state before it."""

    margin: Margin
    negatives: Negatives
    mining: Mining | None
    margin_state: Mapping[str, Tensor]
    negatives_state: Mapping[str, Tensor]


class StepResult(NamedTuple):
    """What a step leaves; global tensors, detached.

    Attributes:
        target_cosine: c ``[B]``.
        support_vectors: how many negatives of each sample are raised ``[B]``; None for :class:`Plain`.
        failed: 0-dim bool: the step holds a value that isn't finite; None where that was checked at once.
        finite: whether each row's embedding is ``[B]``.
        centre_norms: smallest and largest norm ``[2]`` of the centres that this rank walked; None where it has none.
        margin_state: the margin's state after the step.
        negatives_state: the emphasis' state after the step.
    """

    target_cosine: Tensor
    support_vectors: Tensor | None
    failed: Tensor | None
    finite: Tensor
    centre_norms: Tensor | None
    margin_state: Mapping[str, Tensor]
    negatives_state: Mapping[str, Tensor]


@dataclass
class Step:
    """One step's batch and the classes that it walks.

    Attributes:
        engine: how to compute.
        loss: what.
        number: of the step, for annealed margins.
        trains: whether state moves and a backward may come.
        sizes: rows of each rank.
        labels: ``[B]`` global class ids, in range.
        start: first class of this rank's shard.
        local_classes: how many classes the shard has.
        ids: sorted local ids ``[P]`` to walk; None: all.
        correction: of the normalizer for the classes that weren't drawn; None: there is none.
        deferred: 0-dim bool, True where something is known to be wrong already (a label); None: failures raise at once.
        claim: called at the start of backward; returns the row updater, or None to return a gradient.
        result: set by the forward.
        kept: products that the forward kept, chunk by chunk from the first; emptied by the backward.
        token: stands for the step where holding the step itself would keep all of it alive.
    """

    engine: Engine
    loss: Loss
    number: int
    trains: bool
    sizes: Sequence[int]
    labels: Tensor
    start: int
    local_classes: int
    ids: Tensor | None
    correction: Correction | None
    deferred: Tensor | None
    claim: Callable[[], RowUpdater | None]
    result: StepResult | None = field(default=None, init=False)
    kept: list[Tensor | None] = field(default_factory=list, init=False)
    token: object = field(default_factory=object, init=False)

    @property
    def walked(self) -> int:
        """P."""
        return self.local_classes if self.ids is None else len(self.ids)

    def target_columns(self) -> Tensor:
        """Where in the walk each row's target stands: int64 ``[B]``, -1 where another rank owns it."""
        local = self.labels - self.start
        owned = (local >= 0) & (local < self.local_classes)
        if self.ids is not None:
            local = torch.searchsorted(self.ids, local)
        return torch.where(owned, local, -1)


class Correction(NamedTuple):
    """What the sampled classes say of those that weren't drawn: drawn non-positives weigh C'/n'.

    C' classes are no positive of the batch; n' of them were drawn, over all shards.

    Attributes:
        positive_P: whether a walked class is a positive of the batch.
        negatives: C'.
        drawn: how many classes were drawn over all shards.
        drawn_positives: how many of this shard's positives were drawn, too, 0-dim.
    """

    positive_P: Tensor
    negatives: int
    drawn: int
    drawn_positives: Tensor

    def offsets(self, drawn_positives: Tensor) -> Tensor:
        """log(C'/n') for non-positives, 0 for positives ``[P]``, with the sum of all shards' ``drawn_positives``."""
        drawn_negatives = (self.drawn - drawn_positives).clamp_min(1)
        return torch.where(self.positive_P, 0.0, (self.negatives / drawn_negatives).log())


def row_of(sizes: Sequence[int], index: int) -> str:
    """Name a row of the global batch by its rank and its row there."""
    rank = 0
    while index >= sizes[rank]:
        index -= sizes[rank]
        rank += 1
    return f"row {index} of rank {rank}"


def raise_embeddings(finite_B: Tensor, sizes: Sequence[int]) -> None:
    """Raise a NonFiniteError that names the first row whose embedding isn't finite, where there is one."""
    rows = (~finite_B).nonzero()
    if len(rows):
        raise NonFiniteError(
            f"the embedding in {row_of(sizes, int(rows[0]))} isn't finite: expected finite numbers from the backbone "
            "(nothing was trained on this batch; lower the learning rate or look at the batch's images)"
        )


class Saved(NamedTuple):
    """Tensors that the backward needs; global but for those of this rank's rows or classes."""

    unit_bd: Tensor  # local rows, not rounded to the compute dtype
    norm_b: Tensor
    unit_Bd: Tensor
    inverse_norm_P: Tensor
    offset_P: Tensor | None
    boundary_B: Tensor
    numbers: Tensor
    log_normalizer_B: Tensor
    row_weight_B: Tensor  # B x d loss / d l_i
    target_gradient_B: Tensor  # B x d loss / d c_iy
    norm_gradient_B: Tensor | None  # B x d loss / d |x_i|
    kept_index_BK: Tensor | None
    kept_gradient_BK: Tensor | None  # B x d loss / d c_ij at the kept support vectors, not divided by |w_j|
    failed: Tensor | None


class Storage:
    """Memory for the products of one chunk, with a scrap row behind them; on a GPU the allocator has it."""

    def __init__(self, walk: Walk, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(walk.longest + 1, batch, dtype=dtype, device=device)

    def product(self, chunk: Chunk) -> Tensor:
        """Where the chunk's product goes, ``[p, B]``."""
        return self._memory[: chunk.end - chunk.begin]

    def with_scrap(self, classes: int) -> Tensor:
        """``[p + 1, B]``: the last row is scrap."""
        return self._memory[: classes + 1]

    def unless_there(self, product_PB: Tensor) -> Tensor | None:
        """Where what replaces a product goes; None where the product stands there itself."""
        there = self.with_scrap(len(product_PB))[:-1]
        return None if there.data_ptr() == product_PB.data_ptr() else there
