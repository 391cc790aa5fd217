"""Exact merge of the shards' partial normalizers (row max, row sum, top-k candidates): pure maths on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_sums(row_max: Tensor, row_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial sums of exponentials: the result stands for sum_w row_sum_w e^{row_max_w}.

    Args:
        row_max: ``[W, B]``, -inf where a part has no term.
        row_sum: ``[W, B]``, sums of e^{z - row_max}; 0 where a part has no term.

    Returns:
        (max, sum), each ``[B]``; (-inf, 0) where no part has a term.
    """
    highest = row_max.amax(0)
    # -inf - -inf would be NaN: an empty row keeps its zero sum.
    reference = highest.masked_fill(highest == -torch.inf, 0)
    return highest, (row_sum * torch.exp(row_max - reference)).sum(0)


def add_terms(row_max: Tensor, row_sum: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
    """Add e^{terms} to partial sums: ``[B]``, ``[B]`` and terms ``[B, K]`` (-inf: no term) to (max, sum)."""
    highest = terms.amax(1)
    reference = highest.masked_fill(highest == -torch.inf, 0)
    sums = torch.exp(terms - reference[:, None]).sum(1)
    return merge_sums(torch.stack([row_max, highest]), torch.stack([row_sum, sums]))


def log_normalizer(row_max: Tensor, row_sum: Tensor) -> Tensor:
    """Logarithm of sum_j e^{z_j}, ``[B]``; -inf where there is no term."""
    return row_max + torch.log(row_sum)


def keep_largest(cosine: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns of the k largest candidates of each row; ties go to the lowest column.

    Args:
        cosine: ``[B, K]`` candidates' cosines in the order of their class ids wherever they are equal; -inf: none.
        k: how many to keep, at most K.

    Returns:
        (kept, order): ``order`` ``[B, K]`` holds column numbers, the kept ones first, by falling cosine; ``kept``
        ``[B, K]`` is True at columns that are kept and hold a candidate.
    """
    order = cosine.sort(dim=1, descending=True, stable=True).indices
    kept = torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, order[:, :k], True)
    return kept & (cosine != -torch.inf), order
