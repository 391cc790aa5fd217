"""Learning-rate schedules: functions of the optimizer step alone, so that a run goes on anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

from partial_fc.checks import require


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
        require(kind in kinds, "Schedule", "kind", kind, f"one of {', '.join(kinds)}")
        require(0 <= warmup_steps < total_steps, "Schedule", "warmup_steps", warmup_steps, f"less than {total_steps}")
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
