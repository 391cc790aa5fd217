"""The matrix products of a chunk: the library's GEMM, operands in the compute dtype, sums and results in float32."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def multiply(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``left @ right`` with operands rounded to ``dtype``; the result is float64 for float64, else float32.

    Args:
        left: ``[m, k]``.
        right: ``[k, n]``.
        dtype: what the operands are rounded to: float64, float32, bfloat16 or float16.
        out: where to put the result, ``[m, n]`` with unit stride in its last dimension; None: a new tensor.
    """
    with torch.autocast(left.device.type, enabled=False):
        return _multiply(left.to(dtype), right.to(dtype), dtype, out)


def _multiply(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    if dtype in _LOW_PRECISION:
        if left.is_cuda:
            product = torch.mm(left, right, out_dtype=torch.float32)
            return product if out is None else out.copy_(product)
        # CPUs: a product of two such numbers is exact in float32.
        left, right = left.float(), right.float()
    return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
