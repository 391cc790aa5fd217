"""The elementwise part of a chunk in plain PyTorch: from products to a running normalizer, and to gradients.

Legend: P classes of the chunk, B rows of the global batch, K candidates a row, d embedding size. Products of centres
and unit embeddings stand as ``[P, B]``: a class a row, so that the products read and write whole rows. Numbers come in
one tensor (:func:`pack_numbers`), because a compiled function is made anew for each Python number that it meets.

What is written must not overlap what is read, unless it is the same argument: the compiler's code pays dearly for it.
``compiled`` fuses these same functions; ``triton`` has its own two of them. A target's row number outside ``[0, P)``
means that the target is in another chunk or on another rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Numbers(NamedTuple):
    """The loss in numbers, unpacked from :func:`pack_numbers`; each a 0-dim tensor.

    Attributes:
        scale: s.
        q: with ``a`` and ``b`` of h(c) = q c^2 + a c + b on support vectors.
        a: see ``q``.
        b: see ``q``.
        above: negatives whose cosine lies above it leave the sum.
    """

    scale: Tensor
    q: Tensor
    a: Tensor
    b: Tensor
    above: Tensor


def pack_numbers(
    scale: float,
    coefficients: tuple[float | Tensor, float | Tensor, float | Tensor] | None,
    filter_above: float | None,
    like: Tensor,
) -> Tensor:
    """``[5]``: scale, q, a, b, filter_above (infinity for None), of the dtype and on the device of ``like``.

    Nothing waits for a GPU: numbers travel from pinned memory, tensors are copied there.
    """
    q, a, b = coefficients or (0.0, 1.0, 0.0)
    numbers = [scale, q, a, b, torch.inf if filter_above is None else filter_above]
    known = [0.0 if isinstance(number, Tensor) else number for number in numbers]
    packed = torch.tensor(known, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda).to(
        like.device, non_blocking=True
    )
    for place, number in enumerate(numbers):
        if isinstance(number, Tensor):
            packed[place].copy_(number)
    return packed


def accumulate(
    product_PB: Tensor,
    inverse_norm_P: Tensor,
    offset_P: Tensor | None,
    target_B: Tensor,
    boundary_B: Tensor,
    numbers: Tensor,
    maximum_B: Tensor,
    total_B: Tensor,
    count_B: Tensor | None,
) -> None:
    """Add a chunk's negatives to the running (maximum, sum of e^{z - maximum}) of each row, in place.

    Args:
        product_PB: centres times unit embeddings, not divided by the centres' norms.
        inverse_norm_P: 1 / |w_j|.
        offset_P: what is added to the logits of a class, or None.
        target_B: the target's row in the chunk, int32.
        boundary_B: the boundary f of each row of the batch.
        numbers: :func:`pack_numbers`.
        maximum_B: largest logit so far, -inf at first; overwritten.
        total_B: the sum so far, 0 at first; overwritten.
        count_B: support vectors so far, of the sum's dtype; overwritten. None: there is no emphasis.
    """
    number = Numbers(*numbers.unbind())
    cosine_PB = _cosines(product_PB, inverse_norm_P)
    out_PB = _left_out(cosine_PB, target_B, number)
    value_PB = cosine_PB
    if count_B is not None:
        mask_PB = (cosine_PB > boundary_B) & ~out_PB
        value_PB = torch.where(mask_PB, emphasized(cosine_PB, number.q, number.a, number.b), cosine_PB)
        count_B.add_(torch.where(mask_PB, 1.0, 0.0).sum(0))
    logit_PB = value_PB * number.scale
    if offset_P is not None:
        logit_PB = logit_PB + offset_P[:, None]
    _add_to_normalizer(torch.where(out_PB, -torch.inf, logit_PB), maximum_B, total_B)


def clear(
    product_PB: Tensor, inverse_norm_P: Tensor, target_B: Tensor, numbers: Tensor, cosine_PB: Tensor | None
) -> None:
    """Cosines of a chunk, targets and filtered negatives -inf, into ``cosine_PB``; None: in place of the products."""
    number = Numbers(*numbers.unbind())
    value_PB = _cosines(product_PB, inverse_norm_P)
    out_PB = product_PB if cosine_PB is None else cosine_PB
    out_PB.copy_(torch.where(_left_out(value_PB, target_B, number), -torch.inf, value_PB))


def accumulate_cleared(
    cosine_PB: Tensor, offset_P: Tensor | None, numbers: Tensor, maximum_B: Tensor, total_B: Tensor
) -> None:
    """As :func:`accumulate`, without emphasis, from what :func:`clear` made; -inf is no term."""
    logit_PB = cosine_PB * Numbers(*numbers.unbind()).scale
    if offset_P is not None:
        logit_PB = logit_PB + offset_P[:, None]
    _add_to_normalizer(logit_PB, maximum_B, total_B)


def gradient(
    product_PB: Tensor,
    inverse_norm_P: Tensor,
    offset_P: Tensor | None,
    target_B: Tensor,
    boundary_B: Tensor | None,
    log_normalizer_B: Tensor,
    row_factor_B: Tensor,
    target_gradient_B: Tensor,
    numbers: Tensor,
    gradient_PB: Tensor | None,
    peak_P: Tensor | None,
) -> None:
    """The loss by the products of a chunk.

    d l_i / d c_ij = s p_ij h'(c_ij) with p = e^{z - log normalizer}; at the target ``target_gradient_B``. Both are
    divided by |w_j|.

    Args:
        product_PB: as in :func:`accumulate`, the same values again.
        inverse_norm_P: 1 / |w_j|.
        offset_P: as in :func:`accumulate`.
        target_B: as in :func:`accumulate`.
        boundary_B: the boundary f; None: there is no emphasis.
        log_normalizer_B: log of the merged sum over all classes, the target included.
        row_factor_B: factor of each row's gradient, s times its weight in the loss.
        target_gradient_B: the loss by c_iy, the row's weight included.
        numbers: :func:`pack_numbers`.
        gradient_PB: where to write, of any float dtype (float16: clamped to its range), not overlapping the products.
            None: in their place.
        peak_P: the largest p_ij of each class is written there (1 for a target's class); None: it isn't asked for.
    """
    number = Numbers(*numbers.unbind())
    cosine_PB = _cosines(product_PB, inverse_norm_P)
    left_out_PB = _left_out(cosine_PB, target_B, number)
    value_PB = cosine_PB
    if boundary_B is not None:
        mask_PB = cosine_PB > boundary_B
        value_PB = torch.where(mask_PB, emphasized(cosine_PB, number.q, number.a, number.b), cosine_PB)
    logit_PB = value_PB * number.scale
    if offset_P is not None:
        logit_PB = logit_PB + offset_P[:, None]
    share_PB = torch.where(left_out_PB, 0.0, torch.exp(logit_PB - log_normalizer_B))
    result_PB = share_PB * row_factor_B
    if boundary_B is not None:
        slope_PB = emphasis_slope(cosine_PB, number.q, number.a)
        result_PB = torch.where(mask_PB, result_PB * slope_PB, result_PB)
    target_PB = _is_target(cosine_PB, target_B)
    if peak_P is not None:
        peak_P.copy_(torch.where(target_PB, 1.0, share_PB).amax(1))
    result_PB = torch.where(target_PB, target_gradient_B, result_PB) * inverse_norm_P[:, None]
    out_PB = product_PB if gradient_PB is None else gradient_PB
    if out_PB.dtype == torch.float16:
        # Of a centre of tiny norm: the largest number instead of infinity.
        result_PB = result_PB.clamp(-65504, 65504)
    out_PB.copy_(result_PB)


def project(
    gradient_Pd: Tensor, centres_Pd: Tensor, inverse_norm_P: Tensor, factor: Tensor, closed: Tensor | None
) -> None:
    """The loss by the centres of a chunk, in place, from its product without the part along each centre.

    With v the product of the gradient (divided by |w_j| already) and the unit embeddings: dw = v - w <v, w> / |w|^2.

    Args:
        gradient_Pd: v; overwritten.
        centres_Pd: the centres, of any float dtype.
        inverse_norm_P: 1 / |w_j|.
        factor: 0-dim; what all is multiplied by.
        closed: 0-dim bool; where True the result is 0. None: it is open.
    """
    centre_Pd = centres_Pd.to(gradient_Pd.dtype)
    along_P = (gradient_Pd * centre_Pd).sum(1) * inverse_norm_P.square()
    result_Pd = (gradient_Pd - centre_Pd * along_P[:, None]) * factor
    gradient_Pd.copy_(result_Pd if closed is None else torch.where(closed, 0.0, result_Pd))


def emphasized(cosine: Tensor, q: float | Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """h(c) = q c^2 + a c + b, of any shape; finite cosines only."""
    return (cosine * q + a) * cosine + b


def emphasis_slope(cosine: Tensor, q: float | Tensor, a: float | Tensor) -> Tensor:
    """h'(c) = 2 q c + a, of the cosines' shape."""
    return cosine * (2 * q) + a


def largest_support_vectors(cosine_BP: Tensor, boundary_B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest cosines above the boundary of each row, ties by the lowest column: (cosines, columns) ``[B, K]``.

    K = min(k, P); columns rise along a row; an empty place has cosine -inf and column P. ``topk`` alone gives the right
    values but any of the tied columns, so the places at the threshold are given out by a running count.
    """
    classes = cosine_BP.shape[1]
    masked_BP = torch.where(cosine_BP > boundary_B[:, None], cosine_BP, -torch.inf)
    threshold_B1 = masked_BP.topk(min(k, classes), dim=1).values[:, -1:]
    above_BP = masked_BP > threshold_B1
    tied_BP = (masked_BP == threshold_B1) & (threshold_B1 != -torch.inf)
    room_B1 = min(k, classes) - above_BP.sum(1, keepdim=True)
    above_BP |= tied_BP & (tied_BP.cumsum(1, dtype=torch.int32) <= room_B1)
    countdown_P = torch.arange(classes, 0, -1, device=cosine_BP.device, dtype=torch.int32)
    rank_BK = torch.where(above_BP, countdown_P, 0).topk(min(k, classes), dim=1).values
    column_BK = (classes - rank_BK).long()
    cosine_BK = masked_BP.gather(1, column_BK.clamp_max(classes - 1))
    return cosine_BK.masked_fill_(rank_BK == 0, -torch.inf), column_BK


def _cosines(product_PB: Tensor, inverse_norm_P: Tensor) -> Tensor:
    return (product_PB * inverse_norm_P[:, None]).clamp(-1, 1)


def _is_target(cosine_PB: Tensor, target_B: Tensor) -> Tensor:
    row_P = torch.arange(cosine_PB.shape[0], device=cosine_PB.device, dtype=torch.int32)
    return row_P[:, None] == target_B


def _left_out(cosine_PB: Tensor, target_B: Tensor, number: Numbers) -> Tensor:
    """Where an entry is no negative: the target, and what is filtered."""
    return (cosine_PB > number.above) | _is_target(cosine_PB, target_B)


def _add_to_normalizer(logit_PB: Tensor, maximum_B: Tensor, total_B: Tensor) -> None:
    highest_B = torch.maximum(maximum_B, logit_PB.amax(0))
    # -inf - -inf would be NaN: a row without terms keeps the sum 0.
    reference_B = torch.where(highest_B == -torch.inf, 0.0, highest_B)
    added_B = torch.exp(logit_PB - reference_B).sum(0)
    total_B.copy_(total_B * torch.exp(maximum_B - reference_B) + added_B)
    maximum_B.copy_(highest_B)
