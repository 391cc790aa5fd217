"""The elementwise part of a chunk, its products, and the optimizers' formulas. Numbers and tensors in, no objects."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from partial_fc.errors import ConfigError
from partial_fc.kernels import reference, updates
from partial_fc.kernels.compiled import compiled, works
from partial_fc.kernels.products import multiply
from partial_fc.kernels.reference import emphasis_slope, emphasized, largest_support_vectors, pack_numbers
from partial_fc.kernels.updates import Noise

BACKENDS = ("auto", "eager", "compiled", "triton")
# Entries of a pass from which it repays the seconds that the compiler takes once.
_WORTH_COMPILING = 1 << 22


@dataclass(frozen=True)
class Kernels:
    """One backend's functions, with the signatures of ``reference`` and ``updates``."""

    name: str
    accumulate: Callable[..., None]
    clear: Callable[..., None]
    accumulate_cleared: Callable[..., None]
    gradient: Callable[..., None]
    project: Callable[..., None]
    sgd_rows: Callable[..., None]
    adamw_rows: Callable[..., None]
    clip_rows: Callable[..., None]


def choose_kernels(backend: str, device: torch.device, dtype: torch.dtype, entries: int) -> Kernels:
    """The functions to use for a pass.

    Args:
        backend: one of :data:`BACKENDS`; ``auto``: compiled where that works and repays its time, else eager. It never
            takes ``triton``, which nobody has measured on a GPU yet. ``triton``: two kernels of Triton on GPUs, beside
            the compiled functions; in float64 eager.
        device: where the tensors are.
        dtype: of reductions; float64 is for tests, and is never compiled by ``auto``.
        entries: size of the pass, such as classes times rows.

    Raises:
        ConfigError: for another backend; for ``triton`` where that can't run.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"kernels={backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        large = entries >= _WORTH_COMPILING and dtype != torch.float64
        backend = "compiled" if large and works(device.type) else "eager"
        _say_once(backend, device.type)
    if backend == "triton":
        kernels = _triton_kernels(device.type)
        return _kernels("eager") if dtype == torch.float64 else kernels
    return _kernels(backend)


@functools.cache
def _say_once(backend: str, device: str) -> None:
    logging.getLogger(__name__).info("elementwise kernels on %s: %s", device, backend)


@functools.cache
def _kernels(backend: str) -> Kernels:
    plain = Kernels(
        "eager",
        reference.accumulate,
        reference.clear,
        reference.accumulate_cleared,
        reference.gradient,
        reference.project,
        updates.sgd_rows,
        updates.adamw_rows,
        updates.clip_rows,
    )
    if backend == "eager":
        return plain
    functions = {name: compiled(function) for name, function in vars(plain).items() if name != "name"}
    return Kernels(backend, **functions)


@functools.cache
def _triton_kernels(device: str) -> Kernels:
    on_cpu = ConfigError(
        f"kernels='triton' on {device}, expected tensors on cuda (tests may set TRITON_INTERPRET=1 before Python "
        "starts): use kernels='compiled'"
    )
    if device != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        raise on_cpu
    try:
        from partial_fc.kernels import triton
    except ImportError as error:
        raise ConfigError(
            f"kernels='triton' but Triton can't be imported ({error}), expected the package triton: "
            "pip install triton, or use kernels='compiled'"
        ) from error
    if device != "cuda" and not triton.interpreted():
        raise on_cpu
    others = _kernels("compiled" if device == "cuda" else "eager")
    return replace(others, name="triton", accumulate=triton.accumulate, gradient=triton.gradient)


__all__ = [
    "BACKENDS",
    "Kernels",
    "Noise",
    "choose_kernels",
    "emphasis_slope",
    "emphasized",
    "largest_support_vectors",
    "multiply",
    "pack_numbers",
]
