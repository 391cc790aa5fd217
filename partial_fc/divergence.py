"""Notices a run that left its course: a loss far above its own running median, or many steps without an update."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from partial_fc.errors import ConfigError

# A window says something once it is a quarter full, and never with fewer losses than this.
_MIN_LOSSES = 10


class DivergenceWatch:
    """Sees the mean loss of each step and says when the run diverges.

    It says so where

    * ``loss > factor * max(median, floor)``, the median over the last ``window`` losses that had not diverged; a median
      because single outliers must move neither the bound nor the verdict, or
    * ``nonfinite_limit`` steps in a row had no update (no loss, NaN or infinity).

    The caller gives every rank the same losses, so all come to the same verdict at the same step.

    Args:
        factor: above 1; None: the loss is not compared, only the steps without an update are counted.
        window: losses in the median; below ``max(window // 4, 10)`` of them (or ``window``, where that is less) no
            loss is judged.
        nonfinite_limit: steps without an update in a row.
        floor: nats; a median below it counts as this much. Near zero one hard sample is many times the median, and a
            median of zero or less has no multiple that means anything.

    Raises:
        ConfigError: a factor of 1 or less, or a window, limit or floor that is not positive.
    """

    def __init__(
        self, factor: float | None, *, window: int = 100, nonfinite_limit: int = 10, floor: float = 0.1
    ) -> None:
        if factor is not None and not factor > 1:
            raise ConfigError(f"the divergence factor is {factor}, expected more than 1, or null to switch it off")
        for name, value in (("window", window), ("nonfinite_limit", nonfinite_limit), ("floor", floor)):
            if not value > 0:
                raise ConfigError(f"the divergence watch's {name} is {value}, expected a positive number")
        self._factor, self._window, self._limit, self._floor = factor, window, nonfinite_limit, floor
        self._enough = min(max(window // 4, _MIN_LOSSES), window)
        self.reset()

    def reset(self) -> None:
        """Forget everything, as after a rollback: the losses seen are of a course that was left."""
        self._losses: deque[float] = deque()
        self._sorted: list[float] = []
        self._without_update = 0
        self._diverged = False

    @property
    def in_trouble(self) -> bool:
        """Whether the last step had no update, or a loss that diverged: no state to keep."""
        return self._without_update > 0 or self._diverged

    @property
    def median(self) -> float | None:
        """Running median of the losses in the window; None where there are too few to judge by."""
        count = len(self._sorted)
        if count < self._enough:
            return None
        middle = self._sorted[count // 2]
        # Halved first: the sum of two large losses could overflow.
        return middle if count % 2 else self._sorted[count // 2 - 1] / 2 + middle / 2

    def see(self, loss: float | None) -> str | None:
        """Take in the mean loss of the next step.

        Args:
            loss: nats; None, NaN or infinity for a step without an update.

        Returns:
            Why the run diverges, in one line; None where it doesn't.
        """
        if loss is None or not math.isfinite(loss):
            self._without_update += 1
            if self._without_update < self._limit:
                return None
            return f"{self._without_update} steps in a row had no update (the loss or a gradient was not finite)"
        self._without_update, self._diverged = 0, False
        if self._factor is None:
            return None
        median = self.median
        if median is not None and loss > self._factor * max(median, self._floor):
            self._diverged = True
            return (
                f"the loss is {loss:.4g}, more than {self._factor:g} times {max(median, self._floor):.4g} "
                f"(the median of the last {len(self._losses)} was {median:.4g})"
            )
        self._add(loss)
        return None

    def state_dict(self) -> dict[str, Any]:
        """The losses in the window, oldest first, and the steps without an update so far; plain JSON."""
        return {"losses": list(self._losses), "without_update": self._without_update}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; of a longer window, with its last losses."""
        self.reset()
        self._without_update = int(state["without_update"])
        for loss in state["losses"]:
            self._add(float(loss))

    def _add(self, loss: float) -> None:
        if len(self._losses) == self._window:
            del self._sorted[bisect.bisect_left(self._sorted, self._losses.popleft())]
        self._losses.append(loss)
        bisect.insort(self._sorted, loss)
