"""The forward of the sharded margin softmax: three collectives, and one walk over the local classes.

Legend: W ranks, b rows of this rank, B rows of the global batch, d embedding size, P classes that this rank walks (all
its classes, or the sampled ones), p classes of a chunk, K candidates of ``top_k``. "Global" tensors are the same on
every rank.

Per row a maximum and a sum are kept, and products as far as the budget of bytes allows. :func:`forward` shows the
collectives in their order, and what runs while they are under way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.candidates import Candidates, merge_candidates
from partial_fc.chunks import Chunk, Walk, inverse_norms, unit_rows
from partial_fc.emphasis import Coefficients
from partial_fc.errors import NonFiniteError
from partial_fc.kernels import choose_kernels, emphasis_slope, emphasized, pack_numbers
from partial_fc.margins import MarginValues
from partial_fc.normalizer import add_terms, log_normalizer, merge_sums
from partial_fc.step import Saved, Step, StepResult, Storage, raise_embeddings


def forward(embeddings: Tensor, weight: Tensor, step: Step, *, keep: bool) -> tuple[Tensor, Saved]:
    """The mean loss over the global batch, and what the backward needs.

    Args:
        embeddings: ``[b, d]`` of this rank.
        weight: ``[local classes, d]``.
        step: the step; its ``result`` and ``kept`` are set.
        keep: whether a backward may come, for which products are worth keeping.

    Raises:
        NonFiniteError: on every rank, where something isn't finite and the step doesn't defer that.
    """
    engine, axes = step.engine, step.loss
    compute_dtype, dtype = engine.dtypes(weight)
    unit_bd, norm_b = unit_rows(embeddings.to(dtype))
    gathering = engine.group.gather_embeddings(
        _with_norms(unit_bd.to(compute_dtype), norm_b if axes.margin.needs_norms else None), step.sizes
    )
    gathered = engine.rows.take(step.token, weight, step.walked) if keep and step.ids is not None else None
    walk = Walk(weight, step.ids, sum(step.sizes), engine.chunk_size, gathered)
    forward = _Walked(weight, step, walk, compute_dtype, dtype)
    forward.prepare()  # beside the gather
    unit_Bd, norm_B = _without_norms(gathering.wait(), unit_bd.shape[1], dtype)
    finite_B = torch.isfinite(unit_Bd).all(1)
    if step.deferred is None:
        raise_embeddings(finite_B, step.sizes)
    summing = engine.group.sum_target_cosines(_local_target_cosines(unit_Bd.to(dtype), weight, step, dtype))
    if keep:
        step.kept = engine.kept.take(walk, len(unit_Bd), dtype, weight.device)
    forward.begin(unit_Bd)  # beside the sum
    summed = summing.wait()
    target_cosine_B = summed[: len(unit_Bd)].clamp(-1, 1)
    offset_P = None if step.correction is None else step.correction.offsets(summed[-1])

    margin_state, negatives_state = axes.margin_state, axes.negatives_state
    if step.trains:
        if norm_B is not None:
            margin_state = axes.margin.advance(margin_state, norm_B)
        negatives_state = axes.negatives.advance(negatives_state, target_cosine_B)
    target = axes.margin.evaluate(target_cosine_B, norms=norm_B, state=margin_state, step=step.number)
    coefficients = axes.negatives.coefficients(negatives_state)
    numbers = pack_numbers(engine.scale, coefficients, axes.negatives.filter_above, target_cosine_B)
    normalizer = forward.run(target.boundary, numbers, coefficients, offset_P)

    reduced = _reduce(normalizer, target, norm_B, step)
    loss, failed = _checked(reduced.loss, finite_B, step)
    step.result = StepResult(
        target_cosine_B,
        normalizer.support_vectors_B,
        failed,
        finite_B,
        _norm_range(forward.inverse_norm_P),
        dict(margin_state),
        dict(negatives_state),
    )
    saved = Saved(
        unit_bd=unit_bd,
        norm_b=norm_b,
        unit_Bd=unit_Bd,
        inverse_norm_P=forward.inverse_norm_P,
        offset_P=offset_P,
        boundary_B=target.boundary,
        numbers=numbers,
        log_normalizer_B=reduced.log_normalizer_B,
        row_weight_B=reduced.row_weight_B,
        target_gradient_B=reduced.target_gradient_B,
        norm_gradient_B=reduced.norm_gradient_B,
        kept_index_BK=normalizer.kept_index_BK,
        kept_gradient_BK=_kept_gradient(normalizer, numbers, reduced.log_normalizer_B, reduced.row_weight_B),
        failed=failed,
    )
    return loss, saved


class _Reduced(NamedTuple):
    """The loss of the batch, and what it says of each row; B x where it is a derivative."""

    loss: Tensor
    log_normalizer_B: Tensor
    row_weight_B: Tensor
    target_gradient_B: Tensor
    norm_gradient_B: Tensor | None


def _reduce(normalizer: _Normalizer, target: MarginValues, norm_B: Tensor | None, step: Step) -> _Reduced:
    """From the merged normalizer to the loss of each row and of the batch."""
    scale, axes = step.engine.scale, step.loss
    # l = log(1 + sum of negatives / e^{z_y}); exact for samples that are nearly certain, too.
    excess_B = log_normalizer(normalizer.maximum_B, normalizer.total_B) - scale * target.phi
    loss_B = torch.logaddexp(excess_B, torch.zeros_like(excess_B))
    if axes.mining is None:
        loss, row_weight_B = loss_B.mean(), torch.ones_like(loss_B)
    else:
        loss, row_weight_B = axes.mining.reduce(loss_B)
        row_weight_B = row_weight_B * len(loss_B)
    slope_B = -scale * torch.sigmoid(excess_B) * row_weight_B
    norm_gradient_B = None if target.norm_derivative is None else slope_B * target.norm_derivative
    penalty = None if norm_B is None else axes.margin.penalty(norm_B)
    if penalty is not None:
        loss = loss + penalty[0].mean()
        norm_gradient_B = penalty[1] if norm_gradient_B is None else norm_gradient_B + penalty[1]
    return _Reduced(loss, scale * target.phi + loss_B, row_weight_B, slope_B * target.derivative, norm_gradient_B)


def _checked(loss: Tensor, finite_B: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:
    """The loss (NaN after a failure that is reported later), and whether the step failed."""
    if step.deferred is not None:
        failed = step.deferred | ~finite_B.all() | ~torch.isfinite(loss)
        return loss.masked_fill(failed, torch.nan), failed
    if not torch.isfinite(loss):
        raise NonFiniteError(
            f"the loss is {loss.item()} although all embeddings are finite: expected finite class centres "
            "(nothing was trained on this batch; go back to an earlier saved model)"
        )
    return loss, None


def _norm_range(inverse_norm_P: Tensor) -> Tensor | None:
    """Smallest and largest of the norms."""
    if len(inverse_norm_P) == 0:
        return None
    least, most = inverse_norm_P.aminmax()
    return torch.stack([most, least]).reciprocal()


def _with_norms(unit_bd: Tensor, norm_b: Tensor | None) -> Tensor:
    """Unit rows with their norms beside them, bit for bit, also where the rows are of a smaller dtype."""
    if norm_b is None:
        return unit_bd
    return torch.cat([unit_bd, norm_b[:, None].view(unit_bd.dtype)], 1)


def _without_norms(gathered: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if gathered.shape[1] == size:
        return gathered, None
    return gathered[:, :size].contiguous(), gathered[:, size:].contiguous().view(dtype)[:, 0]


def _local_target_cosines(unit_Bd: Tensor, weight: Tensor, step: Step, dtype: torch.dtype) -> Tensor:
    """Cosine of each row and its class centre where this rank owns it, else 0: ``[B]``.

    With a correction ``[B + 1]``: the last place counts this shard's drawn positives.
    """
    batch, correction = len(unit_Bd), step.correction
    if step.local_classes == 0:
        cosine_B = unit_Bd.new_zeros(batch)
    else:
        local = step.labels - step.start
        owned = (local >= 0) & (local < step.local_classes)
        centres_Bd = weight.index_select(0, local.clamp(0, step.local_classes - 1)).to(dtype)
        cosine_B = torch.where(owned, (unit_Bd * centres_Bd).sum(1) * inverse_norms(centres_Bd, dtype), 0)
    return cosine_B if correction is None else torch.cat([cosine_B, correction.drawn_positives.to(dtype)[None]])


class _Normalizer(NamedTuple):
    """The merged normalizer of the negatives (global), and which of this rank's candidates are kept."""

    maximum_B: Tensor
    total_B: Tensor
    support_vectors_B: Tensor | None
    kept_index_BK: Tensor | None = None
    kept_cosine_BK: Tensor | None = None
    kept_offset_BK: Tensor | None = None
    coefficients: Coefficients | None = None


class _Walked:
    """The forward's walk over the local classes."""

    def __init__(self, weight: Tensor, step: Step, walk: Walk, compute_dtype: torch.dtype, dtype: torch.dtype) -> None:
        self._weight, self._step, self._walk = weight, step, walk
        self._compute_dtype, self._dtype = compute_dtype, dtype
        self.inverse_norm_P = torch.empty(step.walked, dtype=dtype, device=weight.device)

    def prepare(self) -> None:
        """What needs no embedding: the first chunk's centres and norms."""
        chunk = self._walk.load_first()
        if chunk is not None:
            self._norms(chunk)

    def begin(self, unit_Bd: Tensor) -> None:
        """What needs no boundary: the first chunk's product."""
        self._unit_Bd = unit_Bd
        self._storage = Storage(self._walk, len(unit_Bd), self._dtype, unit_Bd.device)
        chunk = self._walk.load_first()
        self._first = None if chunk is None else self._product(chunk)

    def run(
        self, boundary_B: Tensor, numbers: Tensor, coefficients: Coefficients | None, offset_P: Tensor | None
    ) -> _Normalizer:
        """Walk, and merge the shards."""
        step, top_k = self._step, self._step.loss.negatives.candidates
        if coefficients is None:
            top_k = None
        kernels = choose_kernels(step.engine.kernels, self._weight.device, self._dtype, step.walked * len(boundary_B))
        maximum_B, total_B = torch.full_like(boundary_B, -torch.inf), torch.zeros_like(boundary_B)
        count_B = torch.zeros_like(boundary_B) if coefficients is not None and top_k is None else None
        candidates = None if top_k is None else Candidates.none(boundary_B, top_k, step.walked, offset_P)
        target_B = step.target_columns()
        for chunk in self._walk:
            if chunk.number == 0:
                assert self._first is not None
                product_PB, self._first = self._first, None
            else:
                self._norms(chunk)
                product_PB = self._product(chunk)
            place = slice(chunk.begin, chunk.end)
            inverse_norm_P, offset_p = self.inverse_norm_P[place], None if offset_P is None else offset_P[place]
            target_in_chunk_B = (target_B - chunk.begin).to(torch.int32)
            if candidates is None:
                kernels.accumulate(
                    product_PB,
                    inverse_norm_P,
                    offset_p,
                    target_in_chunk_B,
                    boundary_B,
                    numbers,
                    maximum_B,
                    total_B,
                    count_B,
                )
                continue
            cosine_QB = self._storage.with_scrap(len(product_PB))
            out_PB = self._storage.unless_there(product_PB)
            kernels.clear(product_PB, inverse_norm_P, target_in_chunk_B, numbers, out_PB)
            left_BK, left_offset_BK = candidates.take_from(cosine_QB, chunk.begin, boundary_B, offset_p)
            kernels.accumulate_cleared(cosine_QB[:-1], offset_p, numbers, maximum_B, total_B)
            # What leaves the candidates is an ordinary negative.
            left = add_terms(maximum_B, total_B, left_BK * step.engine.scale + left_offset_BK)
            maximum_B.copy_(left[0])
            total_B.copy_(left[1])
        return self._merge(maximum_B, total_B, count_B, candidates, coefficients)

    def _norms(self, chunk: Chunk) -> None:
        self.inverse_norm_P[chunk.begin : chunk.end] = inverse_norms(chunk.centres, self._dtype)

    def _product(self, chunk: Chunk) -> Tensor:
        kept = self._step.kept
        keeps = chunk.number < len(kept)
        out = kept[chunk.number] if keeps else self._storage.product(chunk)
        product_PB = self._step.engine.multiply(chunk.centres, self._unit_Bd.T, self._compute_dtype, out)
        if keeps:
            kept[chunk.number] = product_PB
        return product_PB

    def _merge(
        self,
        maximum_B: Tensor,
        total_B: Tensor,
        count_B: Tensor | None,
        candidates: Candidates | None,
        coefficients: Coefficients | None,
    ) -> _Normalizer:
        group = self._step.engine.group
        rows = [maximum_B[None], total_B[None]]
        if count_B is not None:
            rows.append(count_B[None])
        if candidates is not None:
            rows.append(candidates.cosine_BK.T)
            if candidates.offset_BK is not None:
                rows.append(candidates.offset_BK.T)
        parts_WnB = group.gather_normalizers(torch.cat(rows))
        maximum_B, total_B = merge_sums(parts_WnB[:, 0], parts_WnB[:, 1])
        if candidates is None or coefficients is None:
            return _Normalizer(maximum_B, total_B, None if count_B is None else parts_WnB[:, 2].sum(0))
        k = candidates.cosine_BK.shape[1]
        merged = merge_candidates(
            maximum_B,
            total_B,
            parts_WnB[:, 2 : 2 + k],
            None if candidates.offset_BK is None else parts_WnB[:, 2 + k :],
            candidates,
            rank=group.rank,
            walked=self._step.walked,
            scale=self._step.engine.scale,
            coefficients=coefficients,
        )
        return _Normalizer(
            merged.maximum_B,
            merged.total_B,
            merged.count_B,
            merged.index_BK,
            candidates.cosine_BK,
            candidates.offset_BK,
            coefficients,
        )


def _kept_gradient(
    normalizer: _Normalizer, numbers: Tensor, log_normalizer_B: Tensor, row_weight_B: Tensor
) -> Tensor | None:
    """B x d loss / d c_ij at this rank's candidates ``[B, K]`` (of meaning where they are kept)."""
    if normalizer.kept_cosine_BK is None or normalizer.coefficients is None:
        return None
    cosine_BK = normalizer.kept_cosine_BK.masked_fill(normalizer.kept_cosine_BK == -torch.inf, 0)
    q, a, b = normalizer.coefficients
    logit_BK = emphasized(cosine_BK, q, a, b) * numbers[0]
    if normalizer.kept_offset_BK is not None:
        logit_BK = logit_BK + normalizer.kept_offset_BK
    factor_BK = (row_weight_B * numbers[0])[:, None] * emphasis_slope(cosine_BK, q, a)
    return (logit_BK - log_normalizer_B[:, None]).exp() * factor_BK
