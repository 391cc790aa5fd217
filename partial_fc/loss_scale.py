"""The loss scale of fp16 training, decided by all ranks together.

Scalers that each rank keeps for itself drift apart: a head's shard may overflow on one rank alone. Here "found inf" is
summed over the ranks, so every rank skips a step or none does, and all scales stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor


class LossScale:
    """Multiplies the loss, divides the gradients, and adapts: halved after an overflow, doubled after a quiet time.

    Args:
        sum_over_ranks: sums a small tensor over all ranks, in place (``head.group.sum_over_shards``).
        initial: first scale; 2**16 and the other defaults are those of ``torch.amp.GradScaler``.
        growth_interval: steps without overflow before the scale doubles.
        enabled: False: the scale is 1 and nothing is looked at.
    """

    def __init__(
        self,
        sum_over_ranks: Callable[[Tensor], Tensor],
        *,
        initial: float = 2.0**16,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        self.scale = initial if enabled else 1.0
        self.enabled = enabled
        self._sum_over_ranks = sum_over_ranks
        self._growth_interval = growth_interval
        self._quiet = 0

    def state_dict(self) -> dict[str, float]:
        """What a run goes on with: the scale, and the steps since it last changed."""
        return {"scale": self.scale, "quiet": self._quiet}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on with a saved scale; without one where this run needs none (``enabled=False``)."""
        if self.enabled and state:
            self.scale, self._quiet = float(state["scale"]), int(state["quiet"])

    def unscale(self, parameters: Iterable[Tensor]) -> bool:
        """Divide the gradients by the scale; collective.

        Returns:
            Whether all gradients of all ranks are finite. If not, the step must be skipped; the scale was halved.
        """
        if not self.enabled:
            return True
        values = []
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                # An accumulated sparse gradient is a list of parts: values of a coalesced copy would be scaled in vain.
                parameter.grad = parameter.grad.coalesce()
                values.append(parameter.grad.values())
            elif parameter.grad is not None:
                values.append(parameter.grad)
        device = values[0].device if values else torch.device("cpu")
        overflows = torch.zeros((), device=device)
        for value in values:
            overflows += ~torch.isfinite(value).all()
            value.mul_(1 / self.scale)
        if self._sum_over_ranks(overflows).item() > 0:
            self.scale, self._quiet = max(self.scale / 2, 1.0), 0
            return False
        self._quiet += 1
        if self._quiet == self._growth_interval:
            self.scale, self._quiet = self.scale * 2, 0
        return True
