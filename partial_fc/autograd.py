"""The sharded margin softmax as one autograd function: chunks, collectives, kernels.

Legend: W ranks, b rows of this rank, B rows of the global batch, d embedding size, P classes that this rank walks (all
its classes, or the sampled ones), K candidates of ``top_k``. "Global" tensors are the same on every rank.

Forward walks the local classes in chunks and keeps a maximum and a sum per row; backward makes each chunk's cosines
again. Nothing of size B x P exists. :func:`_forward` and :func:`_backward` show the four collectives in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from partial_fc.collectives import HeadGroup
from partial_fc.emphasis import Negatives
from partial_fc.errors import NonFiniteError
from partial_fc.kernels import chunk_gradient, emphasized, multiply, partial_normalizer
from partial_fc.margins import Margin
from partial_fc.normalizer import add_terms, keep_largest, log_normalizer, merge_sums

NORM_FLOOR = 1e-12

# Applies the gradient of some rows at once: (rows: a slice or int64 ids, gradient [P, d], gate: 0-dim bool or None).
RowUpdater = Callable[[slice | Tensor, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class Definition:
    """What does not change from step to step: the loss, the group and how it is computed."""

    group: HeadGroup
    margin: Margin
    negatives: Negatives
    scale: float
    compute_dtype: torch.dtype | None
    chunk_size: int | None

    def dtypes(self, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """(dtype of the products' operands, dtype of reductions, norms and exponentials)."""
        reduce = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return (reduce if reduce == torch.float64 else self.compute_dtype or reduce), reduce


class StepResult(NamedTuple):
    """What a step leaves for the statistics; global tensors ``[B]``, detached.

    Attributes:
        target_cosine: c.
        support_vectors: how many negatives of each sample are raised; None for :class:`Plain`.
        failed: 0-dim bool: the step holds a value that isn't finite; None where that was checked at once.
    """

    target_cosine: Tensor
    support_vectors: Tensor | None
    failed: Tensor | None


@dataclass
class Step:
    """One step's batch and the classes that it walks.

    Attributes:
        definition: the loss.
        sizes: rows of each rank.
        labels: ``[B]`` global class ids, in range.
        start: first class of this rank's shard.
        local_classes: how many classes the shard has.
        ids: sorted local ids ``[P]`` to walk; None: all.
        deferred: 0-dim bool, True where something is known to be wrong already (a label); None: failures raise at once.
        claim: called at the start of backward; returns the row updater, or None to return a gradient.
        result: set by the forward.
    """

    definition: Definition
    sizes: Sequence[int]
    labels: Tensor
    start: int
    local_classes: int
    ids: Tensor | None
    deferred: Tensor | None
    claim: Callable[[], RowUpdater | None]
    result: StepResult | None = field(default=None, init=False)

    @property
    def walked(self) -> int:
        """P."""
        return self.local_classes if self.ids is None else len(self.ids)

    def target_columns(self) -> Tensor:
        """Where in the walk each row's target stands: int64 ``[B]``, P where another rank owns it."""
        local = self.labels - self.start
        owned = (local >= 0) & (local < self.local_classes)
        if self.ids is not None:
            local = torch.searchsorted(self.ids, local)
        return torch.where(owned, local, self.walked)


class Chunk(NamedTuple):
    """A block of the walk: its rows of the weight ``[p, d]`` and where they stand."""

    begin: int
    end: int
    rows: slice | Tensor
    centres: Tensor

    def columns(self, index: Tensor) -> Tensor:
        """Columns in this chunk of places in the walk; the scrap column where they lie elsewhere."""
        inside = (index >= self.begin) & (index < self.end)
        return torch.where(inside, index - self.begin, self.end - self.begin)


def chunk_length(batch: int, walked: int, chunk_size: int | None, device: torch.device) -> int:
    """Classes of a chunk: as given, else what keeps the chunk's cosines near the cache (CPU) or L2 (GPU)."""
    if chunk_size is None:
        budget = (64 if device.type == "cuda" else 4) << 20
        chunk_size = max(256, budget // (4 * max(batch, 1)) // 256 * 256)
    return max(1, min(chunk_size, walked))


def walk(weight: Tensor, ids: Tensor | None, length: int, dtype: torch.dtype) -> Iterator[Chunk]:
    """The local classes (or the sampled ones) in chunks, in the order of their ids."""
    total = len(weight) if ids is None else len(ids)
    for begin in range(0, total, length):
        end = min(begin + length, total)
        if ids is None:
            yield Chunk(begin, end, slice(begin, end), weight[begin:end].to(dtype))
        else:
            rows = ids[begin:end]
            yield Chunk(begin, end, rows, weight.index_select(0, rows).to(dtype))


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their norms (floored at 1e-12), and 1 / norm ``[n]``. A row that isn't finite becomes NaN."""
    norm = torch.linalg.vector_norm(rows, dim=1)
    inverse = norm.clamp_min(NORM_FLOOR).reciprocal().masked_fill(~torch.isfinite(norm), torch.nan)
    return rows * inverse[:, None], inverse


def inverse_norms(centres: Tensor) -> Tensor:
    """1 / |w_j| ``[p]``, norms floored at 1e-12."""
    return torch.linalg.vector_norm(centres, dim=1).clamp_min(NORM_FLOOR).reciprocal()


def row_of(sizes: Sequence[int], index: int) -> str:
    """Name a row of the global batch by its rank and its row there."""
    rank = 0
    while index >= sizes[rank]:
        index -= sizes[rank]
        rank += 1
    return f"row {index} of rank {rank}"


class ShardedSoftmax(torch.autograd.Function):
    """Loss of the global batch from this rank's embeddings and its shard of the class centres."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, weight: Tensor, step: Step) -> Tensor:
        """The mean loss over the global batch, a scalar, the same on all ranks."""
        loss, saved = _forward(embeddings, weight, step)
        ctx.step = step
        ctx.embedding_dtype = embeddings.dtype
        ctx.save_for_backward(weight, *saved)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """W x the gradient of the embeddings ``[b, d]``, and the weight's (None where an updater took it)."""
        weight, *saved = ctx.saved_tensors
        wants_embeddings, wants_weight, _ = ctx.needs_input_grad
        embedding_gradient, weight_gradient = _backward(
            loss_gradient, weight, _Saved(*saved), ctx.step, wants_embeddings, wants_weight
        )
        if embedding_gradient is not None:
            embedding_gradient = embedding_gradient.to(ctx.embedding_dtype)
        return embedding_gradient, weight_gradient, None


class _Saved(NamedTuple):
    """Tensors that the backward needs; global but for those of this rank's rows or classes."""

    unit_bd: Tensor  # local rows, not rounded to the compute dtype
    inverse_norm_b: Tensor
    unit_Bd: Tensor
    inverse_norm_P: Tensor
    boundary_B: Tensor
    log_normalizer_B: Tensor
    target_gradient_B: Tensor  # d l_i / d c_iy
    kept_index_BK: Tensor | None
    kept_cosine_BK: Tensor | None
    failed: Tensor | None


def _forward(embeddings: Tensor, weight: Tensor, step: Step) -> tuple[Tensor, _Saved]:
    definition, group = step.definition, step.definition.group
    compute_dtype, dtype = definition.dtypes(weight)
    unit_bd, inverse_norm_b = unit_rows(embeddings.to(dtype))
    unit_Bd = group.gather_embeddings(unit_bd.to(compute_dtype), step.sizes)
    finite_B = torch.isfinite(unit_Bd).all(1)
    if step.deferred is None and not finite_B.all():
        row = int((~finite_B).nonzero()[0])
        raise NonFiniteError(
            f"the embedding in {row_of(step.sizes, row)} isn't finite: expected finite numbers from the backbone "
            "(nothing was trained on this batch; lower the learning rate or look at the batch's images)"
        )
    target_cosine_B = group.sum_target_cosines(_local_target_cosines(unit_Bd.to(dtype), weight, step)).clamp_(-1, 1)
    target = definition.margin.evaluate(target_cosine_B)
    local = _walk_forward(unit_Bd, weight, step, target.boundary, compute_dtype, dtype)
    negative_max_B, negative_sum_B, support_vectors_B, kept_index_BK = _merge(local, step)

    # l = log(1 + sum of negatives / e^{z_y}); exact for samples that are nearly certain, too.
    excess_B = log_normalizer(negative_max_B, negative_sum_B) - definition.scale * target.phi
    loss_B = torch.logaddexp(excess_B, torch.zeros_like(excess_B))
    loss = loss_B.mean()
    failed = None
    if step.deferred is not None:
        failed = step.deferred | ~finite_B.all() | ~torch.isfinite(loss)
        loss = loss.masked_fill(failed, torch.nan)
    elif not torch.isfinite(loss):
        raise NonFiniteError(
            f"the loss is {loss.item()} although all embeddings are finite: expected finite class centres "
            "(nothing was trained on this batch; go back to an earlier saved model)"
        )
    step.result = StepResult(target_cosine_B, support_vectors_B, failed)
    saved = _Saved(
        unit_bd=unit_bd,
        inverse_norm_b=inverse_norm_b,
        unit_Bd=unit_Bd,
        inverse_norm_P=local.inverse_norm_P,
        boundary_B=target.boundary,
        log_normalizer_B=definition.scale * target.phi + loss_B,
        target_gradient_B=-definition.scale * target.derivative * torch.sigmoid(excess_B),
        kept_index_BK=kept_index_BK,
        kept_cosine_BK=local.candidate_cosine_BK,
        failed=failed,
    )
    return loss, saved


def _local_target_cosines(unit_Bd: Tensor, weight: Tensor, step: Step) -> Tensor:
    """Cosine of each row and its class centre where this rank owns it, else 0: ``[B]``."""
    if step.local_classes == 0:
        return unit_Bd.new_zeros(len(unit_Bd))
    local = step.labels - step.start
    owned = (local >= 0) & (local < step.local_classes)
    centres_Bd = weight.index_select(0, local.clamp(0, step.local_classes - 1)).to(unit_Bd.dtype)
    cosine_B = (unit_Bd * centres_Bd).sum(1) * inverse_norms(centres_Bd)
    return torch.where(owned, cosine_B, 0)


class _LocalNormalizer(NamedTuple):
    """What one rank knows after its walk."""

    maximum_B: Tensor
    total_B: Tensor
    support_vectors_B: Tensor | None
    candidate_cosine_BK: Tensor | None
    candidate_index_BK: Tensor | None
    inverse_norm_P: Tensor


def _walk_forward(
    unit_Bd: Tensor, weight: Tensor, step: Step, boundary_B: Tensor, compute_dtype: torch.dtype, dtype: torch.dtype
) -> _LocalNormalizer:
    definition, batch, walked = step.definition, len(unit_Bd), step.walked
    coefficients, top_k = definition.negatives.coefficients, definition.negatives.candidates
    length = chunk_length(batch, walked, definition.chunk_size, unit_Bd.device)
    target_B = step.target_columns()
    storage = torch.empty(batch, length + 1, dtype=dtype, device=unit_Bd.device)
    inverse_norm_P = torch.empty(walked, dtype=dtype, device=unit_Bd.device)
    maximum_B, total_B = boundary_B.new_full((batch,), -torch.inf), boundary_B.new_zeros(batch)
    counts_B = torch.zeros_like(target_B) if coefficients is not None and top_k is None else None
    cosine_BK = index_BK = None
    if top_k is not None:
        cosine_BK, index_BK = boundary_B.new_full((batch, top_k), -torch.inf), target_B.new_full((batch, top_k), walked)
    for chunk in walk(weight, step.ids, length, dtype):
        inverse_norm_p = inverse_norm_P[chunk.begin : chunk.end]
        inverse_norm_p.copy_(inverse_norms(chunk.centres))
        cos_BQ = _cosines(unit_Bd, chunk, inverse_norm_p, storage, compute_dtype)
        part = partial_normalizer(
            cos_BQ,
            chunk.columns(target_B),
            boundary_B,
            scale=definition.scale,
            coefficients=coefficients,
            filter_above=definition.negatives.filter_above,
            top_k=top_k,
        )
        maximum_B, total_B = merge_sums(torch.stack([maximum_B, part.maximum_B]), torch.stack([total_B, part.total_B]))
        if counts_B is not None and part.support_vectors_B is not None:
            counts_B += part.support_vectors_B
        if part.candidate_cosine_BK is not None and part.candidate_column_BK is not None:
            assert cosine_BK is not None and index_BK is not None and top_k is not None
            cosine_BK = torch.cat([cosine_BK, part.candidate_cosine_BK], 1)
            index_BK = torch.cat([index_BK, part.candidate_column_BK + chunk.begin], 1)
            _, order = keep_largest(cosine_BK, top_k)
            cosine_BK, index_BK = cosine_BK.gather(1, order), index_BK.gather(1, order)
            # The evicted are ordinary negatives again.
            maximum_B, total_B = add_terms(maximum_B, total_B, cosine_BK[:, top_k:] * definition.scale)
            cosine_BK, index_BK = cosine_BK[:, :top_k], index_BK[:, :top_k]
    return _LocalNormalizer(maximum_B, total_B, counts_B, cosine_BK, index_BK, inverse_norm_P)


def _cosines(
    unit_Bd: Tensor, chunk: Chunk, inverse_norm_p: Tensor, storage: Tensor, compute_dtype: torch.dtype
) -> Tensor:
    """Cosines of the chunk in ``storage``: ``[B, p + 1]``, the last column scrap."""
    classes = chunk.end - chunk.begin
    cos_BP = multiply(unit_Bd, chunk.centres.T, compute_dtype, out=storage[:, :classes])
    cos_BP.mul_(inverse_norm_p)
    return storage[:, : classes + 1]


def _merge(local: _LocalNormalizer, step: Step) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Merge the shards: (max, sum) of the negatives, support vectors a sample, and our candidates that are kept."""
    group, negatives, scale = step.definition.group, step.definition.negatives, step.definition.scale
    rows = [local.maximum_B[None], local.total_B[None]]
    if local.support_vectors_B is not None:
        rows.append(local.support_vectors_B.to(local.total_B.dtype)[None])
    if local.candidate_cosine_BK is not None:
        rows.append(local.candidate_cosine_BK.T)
    parts_WnB = group.gather_normalizers(torch.cat(rows))
    maximum_B, total_B = merge_sums(parts_WnB[:, 0], parts_WnB[:, 1])
    if local.candidate_cosine_BK is None or local.candidate_index_BK is None:
        counts_B = parts_WnB[:, 2].sum(0) if local.support_vectors_B is not None else None
        return maximum_B, total_B, counts_B, None
    k = local.candidate_cosine_BK.shape[1]
    # By rank, then by slot: equal cosines stand in the order of their class ids.
    cosine_BK = parts_WnB[:, 2:].flatten(0, 1).T.contiguous()
    kept_BK, _ = keep_largest(cosine_BK, k)
    assert negatives.coefficients is not None
    terms_BK = torch.where(kept_BK, emphasized(cosine_BK, negatives.coefficients), cosine_BK) * scale
    maximum_B, total_B = add_terms(maximum_B, total_B, terms_BK)
    mine_BK = kept_BK[:, group.rank * k : (group.rank + 1) * k]
    return maximum_B, total_B, kept_BK.sum(1), torch.where(mine_BK, local.candidate_index_BK, step.walked)


def _backward(
    loss_gradient: Tensor, weight: Tensor, saved: _Saved, step: Step, wants_embeddings: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    group, negatives = step.definition.group, step.definition.negatives
    compute_dtype, dtype = step.definition.dtypes(weight)
    updater = step.claim()
    batch, walked, unit_Bd = len(saved.unit_Bd), step.walked, saved.unit_Bd
    length = chunk_length(batch, walked, step.definition.chunk_size, unit_Bd.device)
    row_weight_B = (loss_gradient.to(dtype) / batch).expand(batch)
    target_gradient_B, target_B = saved.target_gradient_B * row_weight_B, step.target_columns()
    storage = torch.empty(batch, length + 1, dtype=dtype, device=unit_Bd.device)
    embedding_gradient_Bd = torch.zeros(batch, weight.shape[1], dtype=dtype, device=unit_Bd.device)
    weight_gradient = None
    if wants_weight and updater is None:
        weight_gradient = weight.new_empty(walked, weight.shape[1])
    gate = None if saved.failed is None else ~saved.failed

    for chunk in walk(weight, step.ids, length, dtype):
        inverse_norm_p = saved.inverse_norm_P[chunk.begin : chunk.end]
        cos_BQ = _cosines(unit_Bd, chunk, inverse_norm_p, storage, compute_dtype)
        kept = None
        if saved.kept_index_BK is not None and saved.kept_cosine_BK is not None:
            kept = chunk.columns(saved.kept_index_BK), saved.kept_cosine_BK
        chunk_gradient(
            cos_BQ,
            chunk.columns(target_B),
            saved.boundary_B,
            saved.log_normalizer_B,
            row_weight_B,
            target_gradient_B,
            inverse_norm_p,
            scale=step.definition.scale,
            coefficients=negatives.coefficients,
            filter_above=negatives.filter_above,
            kept=kept,
        )
        gradient_BP = cos_BQ[:, :-1]
        if wants_embeddings:
            if compute_dtype == dtype:
                embedding_gradient_Bd.addmm_(gradient_BP, chunk.centres)
            else:
                embedding_gradient_Bd += multiply(gradient_BP, chunk.centres, compute_dtype)
        if wants_weight:
            centre_gradient = _centre_gradient(gradient_BP, unit_Bd, chunk.centres, inverse_norm_p, compute_dtype)
            if saved.failed is not None:
                centre_gradient.masked_fill_(saved.failed, 0)
            if updater is not None:
                updater(chunk.rows, centre_gradient, gate)
            elif weight_gradient is not None:
                weight_gradient[chunk.begin : chunk.end] = centre_gradient
    if weight_gradient is not None and step.ids is not None:
        weight_gradient = torch.sparse_coo_tensor(
            step.ids[None], weight_gradient, weight.shape, is_coalesced=True, check_invariants=False
        )
    if not wants_embeddings:
        return None, weight_gradient
    gradient_bd = group.scatter_embedding_gradient(embedding_gradient_Bd, step.sizes)
    along_b = (gradient_bd * saved.unit_bd).sum(1, keepdim=True)
    gradient_bd = (gradient_bd - saved.unit_bd * along_b) * (saved.inverse_norm_b[:, None] * group.world_size)
    if saved.failed is not None:
        gradient_bd.masked_fill_(saved.failed, 0)
    return gradient_bd, weight_gradient


def _centre_gradient(
    gradient_BP: Tensor, unit_Bd: Tensor, centres_Pd: Tensor, inverse_norm_P: Tensor, compute_dtype: torch.dtype
) -> Tensor:
    """The loss by the centres of a chunk, ``[P, d]``: the product without its part along each centre.

    ``gradient_BP`` is divided by |w_j| already, so with v = gradient^T unit: dw = v - w <v, w> / |w|^2.
    """
    product_Pd = multiply(gradient_BP.T, unit_Bd, compute_dtype)
    along_P = torch.linalg.vecdot(product_Pd, centres_Pd) * inverse_norm_P.square()
    return product_Pd.addcmul_(centres_Pd, along_P[:, None], value=-1)
