"""The matrix products of a chunk: the library's GEMM, operands in the compute dtype, sums and results in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_LARGEST_HALF = 65504.0


def multiply(
    left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None, *, tf32: bool = False
) -> Tensor:
    """``left @ right`` with operands rounded to ``dtype``; the result is float64 for float64, else float32.

    Args:
        left: ``[m, k]``.
        right: ``[k, n]``.
        dtype: what the operands are rounded to: float64, float32, bfloat16 or float16.
        out: where the result may go, ``[m, n]`` with unit stride in its last dimension; None: a new tensor. GPUs
            return a new one for products in half precision.
        tf32: let a GPU round float32 operands to TF32.
    """
    if dtype == torch.float16:
        # A gradient is divided by its centre's norm, which may be tiny: the largest number instead of infinity.
        left = left.clamp(-_LARGEST_HALF, _LARGEST_HALF)
    left, right = left.to(dtype), right.to(dtype)
    if dtype in _LOW_PRECISION:
        if left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        # CPUs: a product of two such numbers is exact in float32.
        left, right = left.float(), right.float()
    with _tf32() if tf32 and left.is_cuda else contextlib.nullcontext():
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    # Not allow_tf32: reading that raises once somebody has set fp32_precision.
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
