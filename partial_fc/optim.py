"""Optimizers for class centres, row by row.

A row that a step does not touch stays as it is in memory: no momentum, no decay (lazy rows, as in Partial FC,
arXiv 2010.05222, first version). Where every row is touched, :class:`RowSGD` equals ``torch.optim.SGD`` and
:class:`RowAdamW` equals ``torch.optim.AdamW`` to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from partial_fc.checks import require
from partial_fc.kernels import BACKENDS, Kernels, Noise, choose_kernels
from partial_fc.memory import empty_rows
from partial_fc.permutation import hash64

# Rows that a two-phase update works on at once: temporaries stay small beside weight and state.
_ROWS = 8192
_ROUNDING_STREAM = 0x40D5


class RowOptimizer(torch.optim.Optimizer):
    """Base: hands out rows of dense or row-sparse gradients, or takes them inside ``loss.backward()``.

    Args:
        params: parameters ``[n, d]`` (``head.parameters()``).
        defaults: the options of a parameter group.
        max_value: every entry of a gradient is clipped to [-max_value, max_value]; None: no clipping.
        max_row_norm: a row's gradient is scaled down to this norm, after that and before the decay; None: no clipping.
        state_dtype: of the state tensors of the parameter's shape; None: the parameter's. What is bfloat16, state or
            parameter, is rounded stochastically.
        seed: of that rounding, which is a function of (seed, step, class, column).
        kernels: ``auto``, ``compiled`` or ``eager``, as for the head.
        in_backward: update each chunk as soon as the head has its gradient; then no gradient is kept, and ``step()``
            and ``zero_grad()`` only keep the books. It allows one forward a backward.

    Attributes:
        loss_scale: what the loss was multiplied by: gradients are divided by it before anything else. Set it before
            ``backward`` (in backward) or ``step``; 1 at first. An overflow is looked for by whoever scales the loss.
        gradient_square: where it's a 0-dim tensor (float32, on the parameters' device), each update adds the square of
            its gradient's norm, before its own clipping and decay; None (at first): nothing is looked at.
    """

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        max_value: float | None,
        max_row_norm: float | None,
        state_dtype: torch.dtype | None,
        seed: int,
        kernels: str,
        in_backward: bool,
    ) -> None:
        name = type(self).__name__
        require(max_value is None or max_value > 0, name, "max_value", max_value, "above 0, or None")
        require(max_row_norm is None or max_row_norm > 0, name, "max_row_norm", max_row_norm, "above 0, or None")
        floats = (None, torch.float32, torch.bfloat16)
        require(state_dtype in floats, name, "state_dtype", state_dtype, "None, float32 or bfloat16")
        require(kernels in BACKENDS, name, "kernels", kernels, f"one of {', '.join(BACKENDS)}")
        super().__init__(params, {**defaults, "max_value": max_value, "max_row_norm": max_row_norm})
        self.in_backward, self.loss_scale = in_backward, 1.0
        self.gradient_square: Tensor | None = None
        self._state_dtype, self._seed, self._backend = state_dtype, seed, kernels
        self._packed: dict[tuple[Any, ...], Tensor] = {}
        if in_backward:
            for number, group in enumerate(self.param_groups):
                for param in group["params"]:
                    taken = hasattr(param, "row_updater")
                    require(not taken, name, "in_backward", True, "one a parameter: call remove() first")
                    param.row_updater = self._updater(param, number)

    def _updater(self, param: Tensor, number: int) -> Callable[[slice | Tensor, Tensor, Tensor | None, Tensor], None]:
        def update(rows: slice | Tensor, gradient: Tensor, gate: Tensor | None, current: Tensor) -> None:
            # Looked up at each call: load_state_dict puts new groups in the place of the old.
            self._update(param, self.param_groups[number], rows, gradient, gate, current)

        return update

    def remove(self) -> None:
        """Undo ``in_backward``: the next backward returns gradients again."""
        for group in self.param_groups:
            for param in group["params"]:
                if hasattr(param, "row_updater"):
                    del param.row_updater
        self.in_backward = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply the gradients that ``backward`` left (none with ``in_backward``)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._apply_gradient(param, group, param.grad)
                if "rounded" in self.state[param]:
                    self.state[param]["rounded"] += 1
        return loss

    def init_state(self) -> None:
        """Make the state that steps would make, where it isn't there: zeros. A checkpoint then is complete."""
        for group in self.param_groups:
            for param in group["params"]:
                self._init_state_of(param, group)
                self._count_rounds(param)

    def _init_state_of(self, param: Tensor, group: dict[str, Any]) -> None:
        """Make the formula's state tensors of a parameter."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer``, but what has the parameter's shape gets ``state_dtype``, all else stays."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in enumerate(params):
            saved = state_dict["state"].get(number, {})
            for name, value in saved.items():
                if isinstance(value, Tensor):
                    device = "cpu" if name == "rounded" else param.device
                    dtype = (self._state_dtype or param.dtype) if value.shape == param.shape else value.dtype
                    self.state[param][name] = value.detach().to(device, dtype, copy=True)

    def _apply_gradient(self, param: Tensor, group: dict[str, Any], gradient: Tensor) -> None:
        failed = getattr(param, "failed_step", None)
        gate = None if failed is None else ~failed
        dtype = _working_dtype(param)
        if not gradient.is_sparse:
            for begin in range(0, len(param), _ROWS):
                rows = slice(begin, min(begin + _ROWS, len(param)))
                self._update(param, group, rows, gradient[rows].to(dtype, copy=True), gate, None)
            return
        gradient = gradient.coalesce()
        ids, values = gradient.indices()[0], gradient.values()
        for begin in range(0, len(ids), _ROWS):
            part = slice(begin, begin + _ROWS)
            self._update(param, group, ids[part], values[part].to(dtype, copy=True), gate, None)

    @torch.no_grad()
    def _update(
        self,
        param: Tensor,
        group: dict[str, Any],
        rows: slice | Tensor,
        gradient: Tensor,
        gate: Tensor | None,
        current: Tensor | None,
    ) -> None:
        """Move some rows; ``gradient`` may be overwritten, ``current`` are the rows as they are, where at hand."""
        if isinstance(rows, slice):
            # A view of what the kernel writes: arguments that overlap cost the compiler's code dearly.
            current = None
        kernels = choose_kernels(self._backend, param.device, gradient.dtype, param.numel())
        if self.loss_scale != 1:
            gradient.mul_(1 / self.loss_scale)
        if self.gradient_square is not None:
            self.gradient_square += torch.linalg.vector_norm(gradient).square()
        most, norm = group["max_value"], group["max_row_norm"]
        if most is not None or norm is not None:
            bounds = [math.inf if bound is None else bound for bound in (most, norm)]
            kernels.clip_rows(gradient, self._pack(gradient, *bounds))
        self._update_rows(kernels, param, group, rows, gradient, None if gate is None else ~gate, current)

    def _update_rows(
        self,
        kernels: Kernels,
        param: Tensor,
        group: dict[str, Any],
        rows: slice | Tensor,
        gradient: Tensor,
        closed: Tensor | None,
        current: Tensor | None,
    ) -> None:
        """The optimizer's formula; where ``closed`` (0-dim bool) is True all stays as it is."""
        raise TypeError(f"{type(self).__name__} is not an optimizer: use RowSGD or RowAdamW")

    def _rows_of(self, param: Tensor, name: str) -> Tensor:
        """A state tensor of the parameter's shape, zero at first."""
        state = self.state[param]
        if name not in state:
            dtype = self._state_dtype or param.dtype
            state[name] = empty_rows(param.shape[0], param.shape[1], dtype, param.device).zero_()
        tensor: Tensor = state[name]
        return tensor

    def _pack(self, like: Tensor, *numbers: float) -> Tensor:
        """Numbers as one tensor beside the gradient; the same one as long as they stay the same."""
        key = (numbers, like.dtype, like.device)
        if key not in self._packed:
            if len(self._packed) > 8:
                self._packed.clear()
            host = torch.tensor(numbers, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
            self._packed[key] = host.to(like.device, non_blocking=True)
        return self._packed[key]

    def _count_rounds(self, param: Tensor) -> Tensor | None:
        """The parameter's count of steps that round stochastically; None where nothing is stored in bfloat16."""
        if torch.bfloat16 not in (param.dtype, self._state_dtype):
            return None
        state = self.state[param]
        if "rounded" not in state:
            state["rounded"] = torch.zeros((), dtype=torch.int64, device="cpu")
        rounded: Tensor = state["rounded"]
        return rounded

    def _noise(self, param: Tensor, rows: slice | Tensor) -> Noise | None:
        """What stochastic rounding needs, where something is stored in bfloat16."""
        rounded = self._count_rounds(param)
        if rounded is None:
            return None
        key = hash64(_ROUNDING_STREAM, self._seed, int(rounded)) & 0xFFFFFFFF
        key = key - (1 << 32) if key >> 31 else key
        signed = torch.tensor([key], dtype=torch.int32, device="cpu", pin_memory=param.is_cuda)
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=param.device)
        classes = (rows + getattr(param, "first_class", 0)).to(torch.int32)
        return Noise(signed.to(param.device, non_blocking=True), classes)


class RowSGD(RowOptimizer):
    """SGD with momentum on rows; the formulas of ``torch.optim.SGD`` (dampening 0).

    Args:
        params: parameters ``[n, d]``.
        lr: learning rate.
        momentum: factor of the momentum buffer.
        weight_decay: L2 penalty, added to the gradient of touched rows.
        nesterov: Nesterov momentum.
        max_value: see :class:`RowOptimizer`, as for all that follow.
        max_row_norm: see there.
        state_dtype: of the momentum buffer.
        seed: see there.
        kernels: see there.
        in_backward: see there.

    Raises:
        ConfigError: where an argument is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        max_value: float | None = None,
        max_row_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        kernels: str = "auto",
        in_backward: bool = False,
    ) -> None:
        require(lr >= 0, "RowSGD", "lr", lr, "at least 0")
        require(0 <= momentum < 1, "RowSGD", "momentum", momentum, "in [0, 1)")
        require(weight_decay >= 0, "RowSGD", "weight_decay", weight_decay, "at least 0")
        require(not nesterov or momentum > 0, "RowSGD", "nesterov", nesterov, "a momentum above 0 with it")
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov},
            max_value=max_value,
            max_row_norm=max_row_norm,
            state_dtype=state_dtype,
            seed=seed,
            kernels=kernels,
            in_backward=in_backward,
        )

    def _init_state_of(self, param: Tensor, group: dict[str, Any]) -> None:
        if group["momentum"]:
            self._rows_of(param, "momentum_buffer")

    def _update_rows(
        self,
        kernels: Kernels,
        param: Tensor,
        group: dict[str, Any],
        rows: slice | Tensor,
        gradient: Tensor,
        closed: Tensor | None,
        current: Tensor | None,
    ) -> None:
        buffer = self._rows_of(param, "momentum_buffer") if group["momentum"] else None
        numbers = self._pack(gradient, group["lr"], group["momentum"], group["weight_decay"])
        noise = self._noise(param, rows)
        placed, ids = _placed(rows, param, buffer)
        kernels.sgd_rows(*placed, ids, gradient, current, numbers, closed, group["nesterov"], noise)


class RowAdamW(RowOptimizer):
    """AdamW on rows (arXiv 1711.05101); the formulas of ``torch.optim.AdamW``, with a step count a row.

    The count makes the bias correction right for rows that are touched seldom.

    Args:
        params: parameters ``[n, d]``.
        lr: learning rate.
        betas: factors of the running mean and of the running square.
        eps: added to the root of the running square.
        weight_decay: decoupled decay of touched rows.
        max_value: see :class:`RowOptimizer`, as for all that follow.
        max_row_norm: see there.
        state_dtype: of the running mean and square.
        seed: see there.
        kernels: see there.
        in_backward: see there.

    Raises:
        ConfigError: where an argument is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_value: float | None = None,
        max_row_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        kernels: str = "auto",
        in_backward: bool = False,
    ) -> None:
        require(lr >= 0, "RowAdamW", "lr", lr, "at least 0")
        require(all(0 <= beta < 1 for beta in betas), "RowAdamW", "betas", betas, "two factors in [0, 1)")
        require(eps > 0, "RowAdamW", "eps", eps, "above 0")
        require(weight_decay >= 0, "RowAdamW", "weight_decay", weight_decay, "at least 0")
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            max_value=max_value,
            max_row_norm=max_row_norm,
            state_dtype=state_dtype,
            seed=seed,
            kernels=kernels,
            in_backward=in_backward,
        )

    def _init_state_of(self, param: Tensor, group: dict[str, Any]) -> None:
        self._rows_of(param, "exp_avg")
        self._rows_of(param, "exp_avg_sq")
        if "steps" not in self.state[param]:
            self.state[param]["steps"] = torch.zeros(len(param), device=param.device)

    def _update_rows(
        self,
        kernels: Kernels,
        param: Tensor,
        group: dict[str, Any],
        rows: slice | Tensor,
        gradient: Tensor,
        closed: Tensor | None,
        current: Tensor | None,
    ) -> None:
        self._init_state_of(param, group)
        state = self.state[param]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        numbers = self._pack(gradient, group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        noise = self._noise(param, rows)
        placed, ids = _placed(rows, param, mean, square, state["steps"])
        kernels.adamw_rows(*placed, ids, gradient, current, numbers, closed, noise)


def _working_dtype(param: Tensor) -> torch.dtype:
    """What a row's update is computed in."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _placed(rows: slice | Tensor, *tensors: Tensor | None) -> tuple[list[Tensor | None], Tensor | None]:
    """The rows of a slice as views and no ids; or the whole tensors and the ids."""
    if isinstance(rows, slice):
        return [None if tensor is None else tensor[rows] for tensor in tensors], None
    return list(tensors), rows


@torch.no_grad()
def clip_shards(param: Tensor, max_norm: float, sum_over_shards: Callable[[Tensor], Tensor]) -> Tensor:
    """Scale the gradient of a sharded parameter so that its norm over all shards is at most ``max_norm``.

    Collective; for two-phase optimizers.

    Args:
        param: this rank's shard, with its gradient (dense or row-sparse).
        max_norm: largest norm.
        sum_over_shards: sums a tensor over the ranks (``head.group.sum_over_shards``).

    Returns:
        The norm before clipping, a 0-dim tensor, the same on all ranks.
    """
    norm = sum_over_shards(shard_square(param)).sqrt()
    gradient = param.grad
    if gradient is not None:
        values = gradient.values() if gradient.is_sparse else gradient
        values.mul_((max_norm / norm.clamp_min(1e-30)).clamp_max(1))
    return norm


def shard_square(param: Tensor) -> Tensor:
    """The square of the norm of this shard's gradient, a 0-dim float32 tensor; a row-sparse gradient is coalesced."""
    gradient = param.grad
    if gradient is None:
        return param.new_zeros((), dtype=torch.float32)
    if gradient.is_sparse:
        gradient = param.grad = gradient.coalesce()
    values = gradient.values() if gradient.is_sparse else gradient
    return values.float().square().sum()
