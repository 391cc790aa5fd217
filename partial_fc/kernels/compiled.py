"""``torch.compile`` of the plain functions: one fused pass each, for any number of classes and rows.

A function is compiled once for each pattern of absent arguments, not for each size: sizes are symbols, numbers are
tensors. On a CPU this needs a C++ compiler; :func:`works` tries it once a process.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

# The compiler writes out what several reductions read, and reads it again; computing it twice is far cheaper here.
_OPTIONS = {"realize_opcount_threshold": 1000, "realize_reads_threshold": 100, "realize_acc_reads_threshold": 100}


@functools.cache
def compiled(function: Function) -> Function:
    """The function, fused; made at its first call, kept for the process."""
    fused: Function = torch.compile(function, dynamic=True, options=dict(_OPTIONS))  # type: ignore[assignment]
    return fused


@functools.cache
def works(device: str) -> bool:
    """Whether ``torch.compile`` makes working code for a kind of device (``cpu``, ``cuda``) on this machine."""
    try:
        done = torch.compile(_add_one, dynamic=True)(torch.zeros(2, 3, device=device))
        return bool((done == 1).all())
    except Exception as error:  # The compilers' errors have no base of their own, and any of them means "no".
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logging.getLogger(__name__).warning(
            "torch.compile does not work on this machine's %s (%s): the head's elementwise part runs unfused, several "
            "times slower; on a CPU it needs a C++ compiler",
            device,
            reason,
        )
        return False


def _add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1
