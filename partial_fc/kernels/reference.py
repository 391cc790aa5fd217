"""The elementwise part of a chunk in plain PyTorch: from cosines to a partial normalizer, and to gradients.

Legend: B rows of the global batch, P classes of the chunk, K candidates a row. Every function works in place on
``cos_BQ`` with Q = P + 1: the last column is scrap, so that a row whose target (or candidate) lies in another chunk
has somewhere to write without a branch. A column number of P means "not in this chunk".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]


class ChunkNormalizer(NamedTuple):
    """What a chunk adds to the normalizer of each row (local to the shard, float32 or float64).

    Attributes:
        maximum_B: largest logit, -inf where there is none.
        total_B: sum of e^{z - maximum}.
        support_vectors_B: how many negatives lie above the boundary, int64; None without coefficients or with top_k.
        candidate_cosine_BK: with top_k the K largest support vectors by rising column (-inf: none), left out of the
            sum; else None.
        candidate_column_BK: their columns in the chunk, int64; P where there is none.
    """

    maximum_B: Tensor
    total_B: Tensor
    support_vectors_B: Tensor | None
    candidate_cosine_BK: Tensor | None
    candidate_column_BK: Tensor | None


def partial_normalizer(
    cos_BQ: Tensor,
    target_B: Tensor,
    boundary_B: Tensor,
    *,
    scale: float,
    coefficients: Polynomial | None,
    filter_above: float | None,
    top_k: int | None,
) -> ChunkNormalizer:
    """Row maxima and sums of exponentials of a chunk's negatives; the cosines are overwritten.

    Args:
        cos_BQ: cosines (unclamped) of the chunk, and the scrap column.
        target_B: the target's column, or P.
        boundary_B: the boundary f of each row.
        scale: s.
        coefficients: (q, a, b) of h on support vectors, or None.
        filter_above: negatives above it leave the sum; None: none does.
        top_k: how many support vectors of a row may be kept over all shards; None: all.
    """
    logit_BP = _clear_targets(cos_BQ, target_B, filter_above)
    support_vectors_B = cosine_BK = column_BK = None
    if coefficients is not None and top_k is not None:
        cosine_BK, column_BK = _largest_support_vectors(logit_BP, boundary_B, top_k)
        cos_BQ.scatter_(1, column_BK, -torch.inf)
    elif coefficients is not None:
        mask_BP = logit_BP > boundary_B[:, None]
        support_vectors_B = mask_BP.sum(1)
        logit_BP = torch.where(mask_BP, emphasized(logit_BP, coefficients), logit_BP)
    maximum_B = logit_BP.amax(1)
    # -inf - -inf would be NaN: a row without terms keeps the sum 0.
    shift_B = maximum_B.masked_fill(maximum_B == -torch.inf, 0)
    total_B = logit_BP.sub_(shift_B[:, None]).mul_(scale).exp_().sum(1)
    return ChunkNormalizer(maximum_B * scale, total_B, support_vectors_B, cosine_BK, column_BK)


def chunk_gradient(
    cos_BQ: Tensor,
    target_B: Tensor,
    boundary_B: Tensor,
    log_normalizer_B: Tensor,
    row_weight_B: Tensor,
    target_gradient_B: Tensor,
    inverse_norm_P: Tensor,
    *,
    scale: float,
    coefficients: Polynomial | None,
    filter_above: float | None,
    kept: tuple[Tensor, Tensor] | None,
) -> None:
    """Turn a chunk's cosines, in place, into d loss / d cos, divided by the norm of each class centre.

    d loss / d c_ij = w_i s p_ij h'(c_ij) with p = e^{z - log normalizer}; at the target, ``target_gradient_B``.

    Args:
        cos_BQ: as in :func:`partial_normalizer`, the same values again.
        target_B: the target's column, or P.
        boundary_B: the boundary f of each row.
        log_normalizer_B: log of the merged sum over all classes, the target included.
        row_weight_B: w_i, d loss / d l_i.
        target_gradient_B: d loss / d c_iy.
        inverse_norm_P: 1 / |w_j| of the chunk's classes.
        scale: s.
        coefficients: (q, a, b), or None.
        filter_above: as in :func:`partial_normalizer`.
        kept: with top_k, (columns, cosines) ``[B, K]`` of the support vectors kept, as the forward chose them: column P
            where a place is empty or in another chunk. Nothing is compared again.
    """
    gradient_BP = _clear_targets(cos_BQ, target_B, filter_above)
    mask_BP = None
    if coefficients is not None and kept is None:
        mask_BP = gradient_BP > boundary_B[:, None]
        slope_BP = emphasis_slope(gradient_BP, coefficients)
        torch.where(mask_BP, emphasized(gradient_BP, coefficients), gradient_BP, out=gradient_BP)
    gradient_BP.mul_(scale).sub_(log_normalizer_B[:, None]).exp_().mul_((row_weight_B * scale)[:, None])
    if mask_BP is not None:
        gradient_BP.mul_(torch.where(mask_BP, slope_BP, 1.0))
    if coefficients is not None and kept is not None:
        column_BK, cosine_BK = kept
        probability_BK = (emphasized(cosine_BK, coefficients) * scale - log_normalizer_B[:, None]).exp()
        slope_BK = emphasis_slope(cosine_BK, coefficients)
        cos_BQ.scatter_(1, column_BK, probability_BK * slope_BK * (row_weight_B * scale)[:, None])
    cos_BQ.scatter_(1, target_B[:, None], target_gradient_B[:, None])
    gradient_BP.mul_(inverse_norm_P)


def emphasized(cosine: Tensor, coefficients: Polynomial) -> Tensor:
    """h(c) = q c^2 + a c + b, of any shape. -inf (no entry) stays -inf."""
    q, a, b = coefficients
    if q == 0:
        return cosine * a + b
    return torch.where(cosine == -torch.inf, cosine, (cosine * q + a) * cosine + b)


def emphasis_slope(cosine: Tensor, coefficients: Polynomial) -> Tensor:
    """h'(c) = 2 q c + a, of the cosines' shape, or a scalar tensor where it is constant."""
    q, a, _ = coefficients
    if q == 0:
        return cosine.new_tensor(a)
    return torch.where(cosine == -torch.inf, a, cosine * (2 * q) + a)


def _clear_targets(cos_BQ: Tensor, target_B: Tensor, filter_above: float | None) -> Tensor:
    """Clamp the cosines, take targets and filtered negatives out (-inf), and return the view ``[B, P]``."""
    cos_BP = cos_BQ[:, :-1]
    cos_BP.clamp_(-1, 1)
    if filter_above is not None:
        cos_BP.masked_fill_(cos_BP > filter_above, -torch.inf)
    cos_BQ.scatter_(1, target_B[:, None], -torch.inf)
    return cos_BP


def _largest_support_vectors(cos_BP: Tensor, boundary_B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest cosines above the boundary of each row, ties by the lowest column: (cosines, columns) ``[B, K]``.

    K = min(k, P); columns rise along a row; an empty place has cosine -inf and column P. ``topk`` alone gives the right
    values but any of the tied columns, so the places at the threshold are given out by a running count.
    """
    classes = cos_BP.shape[1]
    masked_BP = torch.where(cos_BP > boundary_B[:, None], cos_BP, -torch.inf)
    threshold_B1 = masked_BP.topk(min(k, classes), dim=1).values[:, -1:]
    above_BP = masked_BP > threshold_B1
    tied_BP = (masked_BP == threshold_B1) & (threshold_B1 != -torch.inf)
    room_B1 = min(k, classes) - above_BP.sum(1, keepdim=True)
    above_BP |= tied_BP & (tied_BP.cumsum(1, dtype=torch.int32) <= room_B1)
    countdown_P = torch.arange(classes, 0, -1, device=cos_BP.device, dtype=torch.int32)
    rank_BK = torch.where(above_BP, countdown_P, 0).topk(min(k, classes), dim=1).values
    column_BK = (classes - rank_BK).long()
    cosine_BK = masked_BP.gather(1, column_BK.clamp_max(classes - 1))
    return cosine_BK.masked_fill_(rank_BK == 0, -torch.inf), column_BK
