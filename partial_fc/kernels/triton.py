"""Triton kernels of the two functions on a chunk's hot path: ``accumulate`` and ``gradient`` of ``reference``.

Legend: P classes of the chunk, B rows of the global batch, S slabs of classes. Products stand as ``[P, B]``. All is
float32, but for the gradient, which is written in any float dtype.

A GPU is filled by cutting the classes into slabs: a program keeps the maximum and the sum of a slab's logits for some
rows of the batch and leaves them in scratch memory ``[S, B]``, which a second kernel merges with what earlier chunks
left. There are no atomics, and slabs depend on P and B alone: the same input gives the same bits.

A kernel is compiled for each pattern of absent arguments, each width of tile and whether rows are aligned, which both
follow B: never for another P, nor for where in a buffer a chunk begins. Nothing here waits for the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Entries of a tile, for a program's 128 threads: the more, the more is in flight, but the fewer programs fit beside
# each other. With these a thread needs 60 to 110 registers at B of 512 and more (compiled for an H100).
_ACCUMULATED_AT_ONCE = 4096
_WRITTEN_AT_ONCE = 2048
# A warp reads 512 bytes of a row at once; at four warps side by side no reduction over classes crosses threads.
_WIDEST_TILE = 512
# Programs that slabs are cut for: about four for each of a large GPU's processors.
_PROGRAMS = 512


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
    """As :func:`partial_fc.kernels.reference.accumulate`; float32 only."""
    classes, rows = product_PB.shape
    tile_P, tile_B = _tile(rows, _ACCUMULATED_AT_ONCE)
    blocks = triton.cdiv(rows, tile_B)
    slab = _slab_length(classes, tile_P, blocks)
    slabs = triton.cdiv(classes, slab)
    scratch_nSB = product_PB.new_empty(2 if count_B is None else 3, slabs, rows)
    maximum_SB, total_SB = scratch_nSB[0], scratch_nSB[1]
    count_SB = None if count_B is None else scratch_nSB[2]
    with torch.cuda.device_of(product_PB):
        _accumulate_slabs[(blocks, slabs)](
            product_PB,
            inverse_norm_P,
            offset_P,
            target_B,
            boundary_B,
            numbers,
            maximum_SB,
            total_SB,
            count_SB,
            classes,
            rows,
            product_PB.stride(0),
            slab,
            TILE_P=tile_P,
            TILE_B=tile_B,
        )
        _merge_slabs[(triton.cdiv(rows, 32),)](
            maximum_SB, total_SB, count_SB, maximum_B, total_B, count_B, slabs, rows, TILE_S=64, TILE_B=32
        )


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
    """As :func:`partial_fc.kernels.reference.gradient`; float32 only, but for what is written."""
    classes, rows = product_PB.shape
    out_PB = product_PB if gradient_PB is None else gradient_PB
    tile_P, tile_B = _tile(rows, _WRITTEN_AT_ONCE)
    # The largest share of a class is had by one program, which then takes all rows of the batch in turn.
    across = triton.cdiv(rows, tile_B) if peak_P is None else 1
    with torch.cuda.device_of(product_PB):
        _write_gradient[(triton.cdiv(classes, tile_P), across)](
            product_PB,
            inverse_norm_P,
            offset_P,
            target_B,
            boundary_B,
            log_normalizer_B,
            row_factor_B,
            target_gradient_B,
            numbers,
            out_PB,
            peak_P,
            classes,
            rows,
            product_PB.stride(0),
            out_PB.stride(0),
            TILE_P=tile_P,
            TILE_B=tile_B,
        )


def interpreted() -> bool:
    """Whether the kernels were made for Triton's interpreter (TRITON_INTERPRET), which runs them on CPU tensors."""
    return not isinstance(_merge_slabs, triton.JITFunction)


def _tile(rows: int, entries: int) -> tuple[int, int]:
    """Classes and rows of a tile."""
    tile_B = min(_WIDEST_TILE, max(32, triton.next_power_of_2(rows)))
    return entries // tile_B, tile_B


def _slab_length(classes: int, tile_P: int, blocks: int) -> int:
    """Classes of a slab: whole tiles, and not many more programs than ``_PROGRAMS`` on all blocks of rows."""
    return tile_P * triton.cdiv(triton.cdiv(classes, tile_P), max(1, _PROGRAMS // blocks))


@triton.jit
def _load_cosines(
    product_PB: tl.tensor,
    inverse_norm_P: tl.tensor,
    class_P: tl.tensor,
    row_B: tl.tensor,
    classes: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
) -> tl.tensor:
    """A tile of cosines; 0 beyond the edges. Entries are counted in int64: P x B may pass 2^31."""
    inside_P, inside_B = class_P < classes, row_B < rows
    place_PB = class_P[:, None].to(tl.int64) * stride + row_B[None, :]
    value_PB = tl.load(product_PB + place_PB, mask=inside_P[:, None] & inside_B[None, :], other=0.0)
    cosine_PB = value_PB * tl.load(inverse_norm_P + class_P, mask=inside_P, other=0.0)[:, None]
    # In this form NaN passes, as it has to: the loss tells of it.
    return tl.where(cosine_PB > 1.0, 1.0, tl.where(cosine_PB < -1.0, -1.0, cosine_PB))


@triton.jit
def _logits(
    value_PB: tl.tensor, numbers: tl.tensor, offset_P: tl.tensor | None, class_P: tl.tensor, classes: tl.tensor
) -> tl.tensor:
    logit_PB = value_PB * tl.load(numbers)
    if offset_P is not None:
        logit_PB += tl.load(offset_P + class_P, mask=class_P < classes, other=0.0)[:, None]
    return logit_PB


@triton.jit(
    do_not_specialize=["classes", "slab"],
    do_not_specialize_on_alignment=["inverse_norm_P", "offset_P", "maximum_SB", "total_SB", "count_SB"],
)
def _accumulate_slabs(
    product_PB: tl.tensor,
    inverse_norm_P: tl.tensor,
    offset_P: tl.tensor | None,
    target_B: tl.tensor,
    boundary_B: tl.tensor,
    numbers: tl.tensor,
    maximum_SB: tl.tensor,
    total_SB: tl.tensor,
    count_SB: tl.tensor | None,
    classes: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    slab: tl.tensor,
    TILE_P: tl.constexpr,
    TILE_B: tl.constexpr,
) -> None:
    """One program: (maximum, sum, count) of a slab's logits for a tile's width of rows."""
    row_B = tl.program_id(0) * TILE_B + tl.arange(0, TILE_B)
    inside_B = row_B < rows
    above = tl.load(numbers + 4)
    target_of_B = tl.load(target_B + row_B, mask=inside_B, other=-1)
    maximum = tl.full([TILE_B], float("-inf"), tl.float32)
    total = tl.zeros([TILE_B], tl.float32)
    count = tl.zeros([TILE_B], tl.float32)
    begin = tl.program_id(1) * slab
    for first in range(begin, tl.minimum(begin + slab, classes), TILE_P):
        class_P = first + tl.arange(0, TILE_P)
        cosine_PB = _load_cosines(product_PB, inverse_norm_P, class_P, row_B, classes, rows, stride)
        out_PB = (cosine_PB > above) | (class_P[:, None] == target_of_B[None, :]) | (class_P >= classes)[:, None]
        value_PB = cosine_PB
        if count_SB is not None:
            boundary = tl.load(boundary_B + row_B, mask=inside_B, other=0.0)
            raised_PB = (cosine_PB > boundary[None, :]) & ~out_PB
            emphasized_PB = (cosine_PB * tl.load(numbers + 1) + tl.load(numbers + 2)) * cosine_PB
            value_PB = tl.where(raised_PB, emphasized_PB + tl.load(numbers + 3), cosine_PB)
            count += tl.sum(tl.where(raised_PB, 1.0, 0.0), 0)
        logit_PB = _logits(value_PB, numbers, offset_P, class_P, classes)
        logit_PB = tl.where(out_PB, float("-inf"), logit_PB)
        highest = tl.maximum(maximum, tl.max(logit_PB, 0))
        # -inf - -inf would be NaN: a row without terms keeps the sum 0.
        reference = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(maximum - reference) + tl.sum(tl.exp(logit_PB - reference[None, :]), 0)
        maximum = highest
    place_B = tl.program_id(1).to(tl.int64) * rows + row_B
    tl.store(maximum_SB + place_B, maximum, mask=inside_B)
    tl.store(total_SB + place_B, total, mask=inside_B)
    if count_SB is not None:
        tl.store(count_SB + place_B, count, mask=inside_B)


@triton.jit(
    do_not_specialize=["slabs"],
    do_not_specialize_on_alignment=["maximum_SB", "total_SB", "count_SB"],
)
def _merge_slabs(
    maximum_SB: tl.tensor,
    total_SB: tl.tensor,
    count_SB: tl.tensor | None,
    maximum_B: tl.tensor,
    total_B: tl.tensor,
    count_B: tl.tensor | None,
    slabs: tl.tensor,
    rows: tl.tensor,
    TILE_S: tl.constexpr,
    TILE_B: tl.constexpr,
) -> None:
    """One program: merge all slabs' (maximum, sum, count) of some rows with the running ones, in place."""
    row_B = tl.program_id(0) * TILE_B + tl.arange(0, TILE_B)
    inside_B = row_B < rows
    maximum = tl.load(maximum_B + row_B, mask=inside_B, other=float("-inf"))
    total = tl.load(total_B + row_B, mask=inside_B, other=0.0)
    added = tl.zeros([TILE_B], tl.float32)
    for first in range(0, slabs, TILE_S):
        slab_S = first + tl.arange(0, TILE_S)
        place_SB = slab_S[:, None].to(tl.int64) * rows + row_B[None, :]
        inside_SB = (slab_S < slabs)[:, None] & inside_B[None, :]
        slab_maximum_SB = tl.load(maximum_SB + place_SB, mask=inside_SB, other=float("-inf"))
        slab_total_SB = tl.load(total_SB + place_SB, mask=inside_SB, other=0.0)
        highest = tl.maximum(maximum, tl.max(slab_maximum_SB, 0))
        reference = tl.where(highest == float("-inf"), 0.0, highest)
        terms_SB = slab_total_SB * tl.exp(slab_maximum_SB - reference[None, :])
        total = total * tl.exp(maximum - reference) + tl.sum(terms_SB, 0)
        maximum = highest
        if count_SB is not None:
            added += tl.sum(tl.load(count_SB + place_SB, mask=inside_SB, other=0.0), 0)
    tl.store(maximum_B + row_B, maximum, mask=inside_B)
    tl.store(total_B + row_B, total, mask=inside_B)
    if count_SB is not None:
        tl.store(count_B + row_B, tl.load(count_B + row_B, mask=inside_B, other=0.0) + added, mask=inside_B)


@triton.jit(
    do_not_specialize=["classes"],
    do_not_specialize_on_alignment=["inverse_norm_P", "offset_P", "peak_P"],
)
def _write_gradient(
    product_PB: tl.tensor,
    inverse_norm_P: tl.tensor,
    offset_P: tl.tensor | None,
    target_B: tl.tensor,
    boundary_B: tl.tensor | None,
    log_normalizer_B: tl.tensor,
    row_factor_B: tl.tensor,
    target_gradient_B: tl.tensor,
    numbers: tl.tensor,
    gradient_PB: tl.tensor,
    peak_P: tl.tensor | None,
    classes: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    gradient_stride: tl.tensor,
    TILE_P: tl.constexpr,
    TILE_B: tl.constexpr,
) -> None:
    """One program: a tile, or with ``peak_P`` all tiles of some classes. The gradient may overwrite the product."""
    class_P = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    inverse_P = tl.load(inverse_norm_P + class_P, mask=class_P < classes, other=0.0)
    above = tl.load(numbers + 4)
    peak = tl.zeros([TILE_P], tl.float32)
    for first in range(tl.program_id(1) * TILE_B, rows, tl.num_programs(1) * TILE_B):
        row_B = first + tl.arange(0, TILE_B)
        inside_B = row_B < rows
        inside_PB = (class_P < classes)[:, None] & inside_B[None, :]
        cosine_PB = _load_cosines(product_PB, inverse_norm_P, class_P, row_B, classes, rows, stride)
        target_PB = class_P[:, None] == tl.load(target_B + row_B, mask=inside_B, other=-1)[None, :]
        value_PB = cosine_PB
        if boundary_B is not None:
            q, a = tl.load(numbers + 1), tl.load(numbers + 2)
            raised_PB = cosine_PB > tl.load(boundary_B + row_B, mask=inside_B, other=0.0)[None, :]
            value_PB = tl.where(raised_PB, (cosine_PB * q + a) * cosine_PB + tl.load(numbers + 3), cosine_PB)
        logit_PB = _logits(value_PB, numbers, offset_P, class_P, classes)
        share_PB = tl.exp(logit_PB - tl.load(log_normalizer_B + row_B, mask=inside_B, other=0.0)[None, :])
        share_PB = tl.where((cosine_PB > above) | target_PB, 0.0, share_PB)
        result_PB = share_PB * tl.load(row_factor_B + row_B, mask=inside_B, other=0.0)[None, :]
        if boundary_B is not None:
            result_PB = tl.where(raised_PB, result_PB * (cosine_PB * (2 * q) + a), result_PB)
        at_target = tl.load(target_gradient_B + row_B, mask=inside_B, other=0.0)
        result_PB = tl.where(target_PB, at_target[None, :], result_PB) * inverse_P[:, None]
        place_PB = class_P[:, None].to(tl.int64) * gradient_stride + row_B[None, :]
        if gradient_PB.dtype.element_ty == tl.float16:
            result_PB = tl.where(result_PB > 65504.0, 65504.0, tl.where(result_PB < -65504.0, -65504.0, result_PB))
        tl.store(gradient_PB + place_PB, result_PB.to(gradient_PB.dtype.element_ty), mask=inside_PB)
        if peak_P is not None:
            share_PB = tl.where(target_PB, 1.0, share_PB)
            peak = tl.maximum(peak, tl.max(tl.where(inside_PB, share_PB, 0.0), 1))
    if peak_P is not None:
        tl.store(peak_P + class_P, peak, mask=class_P < classes)
