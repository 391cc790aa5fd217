"""The optimizers' formulas on some rows of a parameter, in plain PyTorch; ``compiled`` fuses each to one pass.

Legend: P rows, d embedding size. Every function moves the rows ``rows`` (None: all of them) of the parameter and of its
state in place. Numbers come in one tensor, because a compiled function is made anew for each Python number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_GOLDEN = -0x61C88647  # 0x9E3779B9 as a signed number: spreads consecutive integers over all bits
_MIX1, _MIX2 = 0x7FEB352D, -0x7B935975  # lowbias32's factors 0x7FEB352D and 0x846CA68B, as signed numbers


class Noise(NamedTuple):
    """What stochastic rounding is a function of, beside the column.

    Attributes:
        key: int32 ``[1]``, of the seed and the step.
        class_P: the rows' global class ids, int32 ``[P]`` (the low 32 bits).
    """

    key: Tensor
    class_P: Tensor


def sgd_rows(
    param: Tensor,
    momentum: Tensor | None,
    rows: Tensor | None,
    gradient_Pd: Tensor,
    current_Pd: Tensor | None,
    numbers: Tensor,
    closed: Tensor | None,
    nesterov: bool,
    noise: Noise | None,
) -> None:
    """The formulas of ``torch.optim.SGD`` (dampening 0).

    Args:
        param: ``[n, d]``.
        momentum: the momentum buffer ``[n, d]``, or None.
        rows: int64 ``[P]``, each at most once; None: all n rows.
        gradient_Pd: float32 or float64.
        current_Pd: the parameter's rows where the caller has gathered them already, else None.
        numbers: ``[3]``: learning rate, factor of the momentum, weight decay.
        closed: 0-dim bool: where True nothing moves. None: it is open.
        nesterov: Nesterov momentum.
        noise: for stochastic rounding where param or momentum is bfloat16; None: round to nearest.
    """
    rate, factor, decay = numbers.unbind()
    old_Pd = (_read(param, rows) if current_Pd is None else current_Pd).to(gradient_Pd.dtype)
    bits_Pd = None if noise is None else _noise_bits(noise, param.shape[1])
    change_Pd = gradient_Pd + old_Pd * decay
    if momentum is not None:
        before_Pd = _read(momentum, rows).to(gradient_Pd.dtype)
        moved_Pd = before_Pd * factor + change_Pd
        change_Pd = change_Pd + moved_Pd * factor if nesterov else moved_Pd
        _write(momentum, rows, _unless(closed, moved_Pd, before_Pd), bits_Pd, high=True)
    _write(param, rows, _unless(closed, old_Pd - change_Pd * rate, old_Pd), bits_Pd)


def adamw_rows(
    param: Tensor,
    mean: Tensor,
    square: Tensor,
    steps: Tensor,
    rows: Tensor | None,
    gradient_Pd: Tensor,
    current_Pd: Tensor | None,
    numbers: Tensor,
    closed: Tensor | None,
    noise: Noise | None,
) -> None:
    """The formulas of ``torch.optim.AdamW``, with a step count a row.

    Args:
        param: ``[n, d]``.
        mean: running mean of the gradient, ``[n, d]``.
        square: running mean of its square, ``[n, d]``.
        steps: updates of each row so far, float ``[n]``.
        rows: as in :func:`sgd_rows`, as are ``gradient_Pd``, ``current_Pd``, ``closed`` and ``noise``.
        gradient_Pd: float32 or float64.
        current_Pd: the gathered rows, or None.
        numbers: ``[5]``: learning rate, beta1, beta2, eps, weight decay.
        closed: the gate.
        noise: for stochastic rounding.
    """
    rate, beta1, beta2, eps, decay = numbers.unbind()
    old_Pd = (_read(param, rows) if current_Pd is None else current_Pd).to(gradient_Pd.dtype)
    old_mean_Pd, old_square_Pd = (_read(state, rows).to(gradient_Pd.dtype) for state in (mean, square))
    old_count_P = _read(steps, rows)
    count_P = (old_count_P + 1).to(gradient_Pd.dtype)[:, None]
    mean_Pd = old_mean_Pd * beta1 + gradient_Pd * (1 - beta1)
    square_Pd = old_square_Pd * beta2 + gradient_Pd * gradient_Pd * (1 - beta2)
    # 1 - beta^n, which loses no digit where it is small.
    correction1_P1 = -torch.expm1(count_P * torch.log(beta1))
    correction2_P1 = -torch.expm1(count_P * torch.log(beta2))
    root_Pd = square_Pd.sqrt() / correction2_P1.sqrt() + eps
    new_Pd = old_Pd - (mean_Pd / correction1_P1 / root_Pd + old_Pd * decay) * rate
    bits_Pd = None if noise is None else _noise_bits(noise, param.shape[1])
    other_Pd = None if bits_Pd is None else _mix(bits_Pd + _GOLDEN)
    _write(mean, rows, _unless(closed, mean_Pd, old_mean_Pd), bits_Pd, high=True)
    _write(square, rows, _unless(closed, square_Pd, old_square_Pd), other_Pd)
    _write(steps, rows, _unless(closed, old_count_P + 1, old_count_P), None)
    _write(param, rows, _unless(closed, new_Pd, old_Pd), bits_Pd)


def clip_rows(gradient_Pd: Tensor, numbers: Tensor) -> None:
    """Clip a gradient in place: each entry to [-v, v], then each row to the norm n.

    Args:
        gradient_Pd: float32 or float64.
        numbers: ``[2]``: v and n; infinity where there is no bound.
    """
    most, norm = numbers.unbind()
    clipped_Pd = torch.maximum(torch.minimum(gradient_Pd, most), -most)
    norm_P1 = clipped_Pd.square().sum(1, keepdim=True).sqrt().clamp_min(1e-30)
    gradient_Pd.copy_(clipped_Pd * (norm / norm_P1).clamp_max(1))


def round_stochastically(value: Tensor, bits: Tensor) -> Tensor:
    """Float32 rounded to bfloat16 up or down, with probabilities that make the mean exact.

    Args:
        value: float32 (float64 is rounded to that first).
        bits: int32 of the same shape, its low 16 bits uniform.
    """
    # The low half of the pattern is what bfloat16 drops: added noise carries into the high half as often as it should.
    pattern = value.float().view(torch.int32) + (bits & 0xFFFF)
    return (pattern & -0x10000).view(torch.float32).to(torch.bfloat16)


def _noise_bits(noise: Noise, columns: int) -> Tensor:
    """32 bits for each entry, int32 ``[P, d]``: a function of the key, the class and the column."""
    row_P = _mix(noise.class_P * _GOLDEN + noise.key)
    column_d = torch.arange(columns, device=noise.class_P.device, dtype=torch.int32)
    return _mix(row_P[:, None] + column_d * _GOLDEN)


def _mix(x: Tensor) -> Tensor:
    """Mix 32 bits (the finalizer "lowbias32"); int32 wraps around, as intended."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MIX1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _MIX2
    return x ^ ((x >> 16) & 0xFFFF)


def _read(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _write(tensor: Tensor, rows: Tensor | None, value: Tensor, bits: Tensor | None, *, high: bool = False) -> None:
    if tensor.dtype == torch.bfloat16 and bits is not None:
        value = round_stochastically(value, bits >> 16 if high else bits)
    value = value.to(tensor.dtype)
    if rows is None:
        tensor.copy_(value)
    else:
        tensor.index_copy_(0, rows, value)


def _unless(closed: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if closed is None else torch.where(closed, old, new)
