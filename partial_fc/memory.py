"""Large tensors on the host: huge pages, so that rows at random places don't cost a walk through page tables each."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LARGE = 32 << 20


def empty_rows(rows: int, size: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """``[rows, size]``, uninitialised; a large one on a Linux host stands in huge pages where the system grants it."""
    tensor = torch.empty(rows, size, dtype=dtype, device=device)
    advise = _madvise() if tensor.device.type == "cpu" and tensor.nbytes >= _LARGE else None
    if advise is not None:
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # An advice: where the system doesn't take it, nothing changes.
        advise(ctypes.c_void_p(first), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - first), mmap.MADV_HUGEPAGE)
    return tensor


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function: Callable[..., Any] = ctypes.CDLL(None).madvise
    return function
