"""The classes of largest cosine over all shards."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.chunks import Walk, inverse_norms, unit_rows
from partial_fc.errors import NonFiniteError
from partial_fc.kernels import largest_support_vectors
from partial_fc.normalizer import keep_largest
from partial_fc.step import Engine, row_of


def largest_classes(embeddings: Tensor, k: int, weight: Tensor, engine: Engine, start: int) -> tuple[Tensor, Tensor]:
    """The k classes of largest cosine, ties by the lowest class id. Collective.

    Args:
        embeddings: ``[b, d]`` of this rank; b may differ from rank to rank.
        k: 1 to the number of classes.
        weight: this rank's centres ``[local classes, d]``.
        engine: how to compute.
        start: first class of this rank.

    Returns:
        (cosines ``[b, k]``, class ids ``[b, k]`` int64) of the rows that this rank passed in, largest first.

    Raises:
        NonFiniteError: on every rank, for a NaN or infinite embedding.
    """
    group, (compute_dtype, dtype) = engine.group, engine.dtypes(weight)
    sizes = group.gather_sizes(len(embeddings), weight.device)
    unit_Bd = group.gather_embeddings(unit_rows(embeddings.to(dtype))[0].to(compute_dtype), sizes).wait()
    bad = (~torch.isfinite(unit_Bd).all(1)).nonzero()
    if len(bad):
        raise NonFiniteError(
            f"topk got an embedding in {row_of(sizes, int(bad[0]))} that isn't finite, expected finite numbers"
        )
    best_BK = unit_Bd.new_full((len(unit_Bd), k), -torch.inf, dtype=dtype)
    class_BK, none_B = torch.full_like(best_BK, -1, dtype=torch.int64), best_BK.new_full((len(unit_Bd),), -torch.inf)
    for chunk in Walk(weight, None, len(unit_Bd), engine.chunk_size):
        with torch.autocast(unit_Bd.device.type, enabled=False):
            cosine_BP = engine.multiply(unit_Bd, chunk.centres.T, compute_dtype)
        cosine_BP.mul_(inverse_norms(chunk.centres, dtype)).clamp_(-1, 1)
        found_BK, column_BK = largest_support_vectors(cosine_BP, none_B, k)
        best_BK, class_BK = _largest(
            torch.cat([best_BK, found_BK], 1), torch.cat([class_BK, column_BK + (chunk.begin + start)], 1), k
        )
    best_all = group.gather_candidates(best_BK).transpose(0, 1).flatten(1)
    class_all = group.gather_candidates(class_BK).transpose(0, 1).flatten(1)
    best_BK, class_BK = _largest(best_all, class_all, k)
    own = slice(sum(sizes[: group.rank]), sum(sizes[: group.rank + 1]))
    return best_BK[own], class_BK[own]


def _largest(values: Tensor, classes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest columns of each row, ties by the lowest column, which is the lowest class."""
    _, order = keep_largest(values, k)
    return values.gather(1, order[:, :k]), classes.gather(1, order[:, :k])
