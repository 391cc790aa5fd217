"""Optimizers for class centres, row by row, and learning-rate schedules.

A row that a step does not touch stays as it is in memory: no momentum, no decay (lazy rows, as in Partial FC,
arXiv 2010.05222, first version). Where every row is touched, :class:`RowSGD` equals ``torch.optim.SGD`` and
:class:`RowAdamW` equals ``torch.optim.AdamW`` to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from partial_fc.errors import ConfigError

# Rows that a two-phase update works on at once: temporaries stay small beside weight and state.
_ROWS = 8192


class RowOptimizer(torch.optim.Optimizer):
    """Base: hands out rows of dense or row-sparse gradients, or takes them inside ``loss.backward()``.

    Args:
        params: parameters ``[n, d]`` (``head.parameters()``).
        defaults: the options of a parameter group.
        in_backward: update each chunk as soon as the head has its gradient; then no gradient is kept, and ``step()``
            and ``zero_grad()`` only keep the books. It allows one forward a backward and no loss scale.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], *, in_backward: bool) -> None:
        super().__init__(params, defaults)
        self.in_backward = in_backward
        if in_backward:
            for number, group in enumerate(self.param_groups):
                for param in group["params"]:
                    taken = hasattr(param, "row_updater")
                    _require(
                        not taken, type(self).__name__, "in_backward", True, "one a parameter: call remove() first"
                    )
                    param.row_updater = self._updater(param, number)

    def _updater(self, param: Tensor, number: int) -> Callable[[slice | Tensor, Tensor, Tensor | None], None]:
        def update(rows: slice | Tensor, gradient: Tensor, gate: Tensor | None) -> None:
            # Looked up at each call: load_state_dict puts new groups in the place of the old.
            self._update(param, self.param_groups[number], rows, gradient, gate)

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
        return loss

    def _apply_gradient(self, param: Tensor, group: dict[str, Any], gradient: Tensor) -> None:
        failed = getattr(param, "failed_step", None)
        gate = None if failed is None else ~failed
        if not gradient.is_sparse:
            for begin in range(0, len(param), _ROWS):
                rows = slice(begin, min(begin + _ROWS, len(param)))
                self._update(param, group, rows, gradient[rows].clone(), gate)
            return
        gradient = gradient.coalesce()
        ids, values = gradient.indices()[0], gradient.values()
        for begin in range(0, len(ids), _ROWS):
            self._update(param, group, ids[begin : begin + _ROWS], values[begin : begin + _ROWS].clone(), gate)

    @torch.no_grad()
    def _update(
        self, param: Tensor, group: dict[str, Any], rows: slice | Tensor, gradient: Tensor, gate: Tensor | None
    ) -> None:
        """Move some rows; ``gradient`` may be overwritten."""
        most = group["max_row_norm"]
        if most is not None:
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient.mul_((most / norm.clamp_min(1e-30)).clamp_max(1))
        closed = None if gate is None else ~gate
        if closed is not None:
            gradient.masked_fill_(closed, 0)
        self._update_rows(param, group, rows, gradient, closed)

    def _update_rows(
        self, param: Tensor, group: dict[str, Any], rows: slice | Tensor, gradient: Tensor, closed: Tensor | None
    ) -> None:
        """The optimizer's formula; where ``closed`` (0-dim bool) is True all stays as it is."""
        raise TypeError(f"{type(self).__name__} is not an optimizer: use RowSGD or RowAdamW")

    def _rows_of(self, param: Tensor, name: str) -> Tensor:
        """A state tensor of the parameter's shape, zero at first."""
        state = self.state[param]
        if name not in state:
            state[name] = torch.zeros_like(param)
        tensor: Tensor = state[name]
        return tensor


class RowSGD(RowOptimizer):
    """SGD with momentum on rows; the formulas of ``torch.optim.SGD`` (dampening 0).

    Args:
        params: parameters ``[n, d]``.
        lr: learning rate.
        momentum: factor of the momentum buffer.
        weight_decay: L2 penalty, added to the gradient of touched rows.
        nesterov: Nesterov momentum.
        max_row_norm: a row's gradient is scaled down to this norm, before the decay; None: no clipping.
        in_backward: see :class:`RowOptimizer`.

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
        max_row_norm: float | None = None,
        in_backward: bool = False,
    ) -> None:
        _require(lr >= 0, "RowSGD", "lr", lr, "at least 0")
        _require(0 <= momentum < 1, "RowSGD", "momentum", momentum, "in [0, 1)")
        _require(weight_decay >= 0, "RowSGD", "weight_decay", weight_decay, "at least 0")
        _require(not nesterov or momentum > 0, "RowSGD", "nesterov", nesterov, "a momentum above 0 with it")
        _require(max_row_norm is None or max_row_norm > 0, "RowSGD", "max_row_norm", max_row_norm, "above 0, or None")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "max_row_norm": max_row_norm,
        }
        super().__init__(params, defaults, in_backward=in_backward)

    def _update_rows(
        self, param: Tensor, group: dict[str, Any], rows: slice | Tensor, gradient: Tensor, closed: Tensor | None
    ) -> None:
        if group["weight_decay"]:
            # A closed gate takes the decay away, too.
            gradient.add_(_unless(closed, param[rows]), alpha=group["weight_decay"])
        if group["momentum"]:
            buffer = self._rows_of(param, "momentum_buffer")
            kept = _held(closed, group["momentum"], gradient)
            moved = buffer[rows].mul_(kept).add_(gradient)
            if isinstance(rows, Tensor):
                buffer.index_copy_(0, rows, moved)
            gradient = gradient.add_(moved, alpha=group["momentum"]) if group["nesterov"] else moved
        _subtract(param, rows, _unless(closed, gradient), group["lr"])


class RowAdamW(RowOptimizer):
    """AdamW on rows (arXiv 1711.05101); the formulas of ``torch.optim.AdamW``, with a step count a row.

    The count makes the bias correction right for rows that are touched seldom.

    Args:
        params: parameters ``[n, d]``.
        lr: learning rate.
        betas: factors of the running mean and of the running square.
        eps: added to the root of the running square.
        weight_decay: decoupled decay of touched rows.
        max_row_norm: a row's gradient is scaled down to this norm; None: no clipping.
        in_backward: see :class:`RowOptimizer`.

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
        max_row_norm: float | None = None,
        in_backward: bool = False,
    ) -> None:
        _require(lr >= 0, "RowAdamW", "lr", lr, "at least 0")
        _require(all(0 <= beta < 1 for beta in betas), "RowAdamW", "betas", betas, "two factors in [0, 1)")
        _require(eps > 0, "RowAdamW", "eps", eps, "above 0")
        _require(weight_decay >= 0, "RowAdamW", "weight_decay", weight_decay, "at least 0")
        _require(max_row_norm is None or max_row_norm > 0, "RowAdamW", "max_row_norm", max_row_norm, "above 0, or None")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_row_norm": max_row_norm}
        super().__init__(params, defaults, in_backward=in_backward)

    def _update_rows(
        self, param: Tensor, group: dict[str, Any], rows: slice | Tensor, gradient: Tensor, closed: Tensor | None
    ) -> None:
        beta1, beta2 = group["betas"]
        mean, square = self._rows_of(param, "exp_avg"), self._rows_of(param, "exp_avg_sq")
        if "steps" not in self.state[param]:
            self.state[param]["steps"] = torch.zeros(len(param), device=param.device)
        steps = self.state[param]["steps"]
        new_mean = mean[rows].mul_(_held(closed, beta1, gradient)).add_(gradient, alpha=1 - beta1)
        new_square = square[rows].mul_(_held(closed, beta2, gradient)).addcmul_(gradient, gradient, value=1 - beta2)
        count = steps[rows].add_(1 if closed is None else ~closed)
        if isinstance(rows, Tensor):
            mean.index_copy_(0, rows, new_mean)
            square.index_copy_(0, rows, new_square)
            steps.index_copy_(0, rows, count)
        # In float64: 1 - 0.999^1 keeps only four digits in float32.
        count = count.double().clamp_min(1)[:, None]
        correction1, correction2 = (1 - beta1**count).to(param.dtype), (1 - beta2**count).sqrt().to(param.dtype)
        root = new_square.sqrt().div_(correction2).add_(group["eps"])
        change = (new_mean / correction1).div_(root).add_(param[rows], alpha=group["weight_decay"])
        _subtract(param, rows, _unless(closed, change), group["lr"])


def _held(closed: Tensor | None, factor: float, like: Tensor) -> float | Tensor:
    """The factor of a running mean: 1 where ``closed``."""
    return factor if closed is None else torch.where(closed, like.new_ones(()), like.new_full((), factor))


def _unless(closed: Tensor | None, value: Tensor) -> Tensor:
    """The value, or zeros where ``closed`` (a product with 0 would keep a NaN)."""
    return value if closed is None else value.masked_fill(closed, 0)


def _subtract(param: Tensor, rows: slice | Tensor, change: Tensor, lr: float) -> None:
    if isinstance(rows, slice):
        param[rows].sub_(change, alpha=lr)
    else:
        param.index_add_(0, rows, change, alpha=-lr)


def _require(ok: bool, owner: str, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{owner}: {name}={value!r}, expected {expected}")


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
    gradient = param.grad
    if gradient is not None and gradient.is_sparse:
        gradient = param.grad = gradient.coalesce()
    values = None if gradient is None else gradient.values() if gradient.is_sparse else gradient
    own = param.new_zeros((), dtype=torch.float32) if values is None else values.float().square().sum()
    norm = sum_over_shards(own).sqrt()
    if values is not None:
        values.mul_((max_norm / norm.clamp_min(1e-30)).clamp_max(1))
    return norm


class Schedule:
    """Factor of the learning rate as a function of the optimizer step: a linear warm-up, then a decay.

    ``polynomial``: (1 - x)^power; ``cosine``: (1 + cos(pi x)) / 2, with x the share of the steps after the warm-up that
    are done; ``step``: gamma^(number of milestones passed); ``constant``: 1.

    Args:
        kind: one of the four.
        total_steps: steps of the whole run.
        warmup_steps: the factor of step i of the warm-up is (i + 1) / warmup_steps.
        power: of ``polynomial``.
        milestones: steps at which ``step`` decays.
        gamma: factor of one such decay.

    Raises:
        ConfigError: for another kind, or a warm-up that is not shorter than the run.
    """

    def __init__(
        self,
        kind: str,
        total_steps: int,
        *,
        warmup_steps: int = 0,
        power: float = 2.0,
        milestones: Sequence[int] = (),
        gamma: float = 0.1,
    ) -> None:
        kinds = ("polynomial", "cosine", "step", "constant")
        _require(kind in kinds, "Schedule", "kind", kind, f"one of {', '.join(kinds)}")
        _require(0 <= warmup_steps < total_steps, "Schedule", "warmup_steps", warmup_steps, f"less than {total_steps}")
        self._kind, self._total, self._warmup = kind, total_steps, warmup_steps
        self._power, self._milestones, self._gamma = power, tuple(milestones), gamma

    def __call__(self, step: int) -> float:
        """The factor for a step, counted from 0."""
        if step < self._warmup:
            return (step + 1) / self._warmup
        done = min((step - self._warmup) / (self._total - self._warmup), 1.0)
        if self._kind == "polynomial":
            return float((1 - done) ** self._power)
        if self._kind == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        if self._kind == "step":
            return float(self._gamma ** sum(step >= milestone for milestone in self._milestones))
        return 1.0
