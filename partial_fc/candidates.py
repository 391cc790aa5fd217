"""Support vectors that may be among the top k: chosen chunk by chunk, then over all shards. Pure maths on tensors.

A shard keeps its k best out of the normalizer's sum; one that is evicted goes back into it as an ordinary negative, and
the merge adds those that stay. Nothing is ever subtracted. Legend: B rows of the global batch, K = k candidates a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.emphasis import Coefficients
from partial_fc.kernels import emphasized, largest_support_vectors
from partial_fc.normalizer import add_terms, keep_largest


@dataclass
class Candidates:
    """The k best support vectors of each row so far; an empty place has cosine -inf.

    Attributes:
        cosine_BK: their cosines.
        index_BK: their places in the walk, int64; P (the number of classes walked) where a place is empty.
        offset_BK: what is added to their logits; None: nothing.
    """

    cosine_BK: Tensor
    index_BK: Tensor
    offset_BK: Tensor | None

    @classmethod
    def none(cls, boundary_B: Tensor, k: int, walked: int, offset_P: Tensor | None) -> Candidates:
        """No candidate yet."""
        cosine_BK = boundary_B.new_full((len(boundary_B), k), -torch.inf)
        index_BK = torch.full_like(cosine_BK, walked, dtype=torch.int64)
        return cls(cosine_BK, index_BK, None if offset_P is None else torch.zeros_like(cosine_BK))

    def take_from(
        self, cosine_QB: Tensor, begin: int, boundary_B: Tensor, offset_P: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Look for better candidates in a chunk, and take its best out of it.

        Args:
            cosine_QB: the chunk's cosines, -inf at targets and filtered negatives; its best become -inf, too. With
                Q = P + 1: the last row is scrap, where empty places write.
            begin: where the chunk begins in the walk.
            boundary_B: the boundary f.
            offset_P: the chunk's offsets, or None.

        Returns:
            What leaves the candidates: (cosines, offsets) ``[B, K']``, -inf where there is none.
        """
        k, classes = self.cosine_BK.shape[1], len(cosine_QB) - 1
        found_BK, column_BK = largest_support_vectors(cosine_QB[:-1].T, boundary_B, k)
        cosine_QB.scatter_(0, column_BK.T, -torch.inf)
        cosine_BK = torch.cat([self.cosine_BK, found_BK], 1)
        index_BK = torch.cat([self.index_BK, column_BK + begin], 1)
        _, order = keep_largest(cosine_BK, k)
        cosine_BK, index_BK = cosine_BK.gather(1, order), index_BK.gather(1, order)
        self.cosine_BK, self.index_BK = cosine_BK[:, :k], index_BK[:, :k]
        left_BK, offset_BK = cosine_BK[:, k:], torch.zeros_like(cosine_BK[:, k:])
        if self.offset_BK is not None and offset_P is not None:
            offsets_BK = torch.cat([self.offset_BK, offset_P[column_BK.clamp_max(classes - 1)]], 1).gather(1, order)
            self.offset_BK, offset_BK = offsets_BK[:, :k], offsets_BK[:, k:]
        return left_BK, offset_BK


@dataclass(frozen=True)
class MergedCandidates:
    """What the merge of all shards' candidates decides; global but for ``index_BK``.

    Attributes:
        maximum_B: of the normalizer with all candidates in it.
        total_B: its sum.
        count_B: how many support vectors each row keeps.
        index_BK: places in this rank's walk of those of its candidates that are kept; P for the others.
    """

    maximum_B: Tensor
    total_B: Tensor
    count_B: Tensor
    index_BK: Tensor


def merge_candidates(
    maximum_B: Tensor,
    total_B: Tensor,
    parts_WKB: Tensor,
    offsets_WKB: Tensor | None,
    own: Candidates,
    *,
    rank: int,
    walked: int,
    scale: float,
    coefficients: Coefficients,
) -> MergedCandidates:
    """Keep the k largest candidates of each row over all shards, raised; the others are ordinary negatives.

    Args:
        maximum_B: of the normalizer without any candidate.
        total_B: its sum.
        parts_WKB: every shard's candidates' cosines.
        offsets_WKB: and their offsets, or None.
        own: this rank's.
        rank: this rank.
        walked: P.
        scale: s.
        coefficients: (q, a, b).
    """
    k = own.cosine_BK.shape[1]
    # By rank, then by slot: equal cosines stand in the order of their class ids.
    cosine_BK = parts_WKB.flatten(0, 1).T.contiguous()
    kept_BK, _ = keep_largest(cosine_BK, k)
    finite_BK = cosine_BK.masked_fill(~kept_BK, 0)
    terms_BK = torch.where(kept_BK, emphasized(finite_BK, *coefficients), cosine_BK) * scale
    if offsets_WKB is not None:
        terms_BK = terms_BK + offsets_WKB.flatten(0, 1).T
    maximum_B, total_B = add_terms(maximum_B, total_B, terms_BK)
    mine_BK = kept_BK[:, rank * k : (rank + 1) * k]
    index_BK = torch.where(mine_BK, own.index_BK, walked)
    return MergedCandidates(maximum_B, total_B, kept_BK.sum(1), index_BK)
