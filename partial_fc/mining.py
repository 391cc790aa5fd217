"""Axis 3 of the loss: sample mining, how the losses of the samples become the loss of the batch.

Without mining that is their mean. Everything here is in closed form, on the device, without a synchronisation: a loss
that isn't finite goes through and comes out in the result, for the caller to see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.checks import Checked


class Mining(Checked):
    """Base of the minings; a subclass defines :meth:`reduce`."""

    def reduce(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the batch, and its derivative by the loss of each sample.

        Args:
            losses: l_i >= 0 of the global batch ``[B]``, B >= 1.

        Returns:
            A scalar and a tensor ``[B]``, both of the losses' dtype.
        """
        raise TypeError(f"{type(self).__name__} is not a mining: use FocalLoss or HardMining")


@dataclass(frozen=True)
class FocalLoss(Mining):
    """Easy samples count less: mean of (1 - p_i)^gamma l_i with p_i = e^{-l_i} (arXiv 1708.02002, eq. 4).

    The weight is differentiated, too: with u = 1 - p, d loss / d l = u^gamma + gamma u^(gamma - 1) p l, which is
    u^gamma (1 + gamma l / (e^l - 1)); the last quotient is 1 at l = 0.

    Args:
        gamma: how much less; 0 is the mean. 2 is the setting of the paper and of the official SV-X code.

    Raises:
        ConfigError: where gamma < 0 or not finite.
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        self._require(0 <= self.gamma < math.inf, "gamma", "an exponent of at least 0")

    def reduce(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the weighted losses, and its derivative."""
        weight = (-torch.expm1(-losses)).pow(self.gamma)
        # 1 - e^-l and e^l - 1 by expm1: the plain differences are 0 for a loss below the rounding of 1.
        odds = torch.expm1(losses)
        quotient = torch.where(odds == 0, 1.0, losses / odds)
        return (weight * losses).mean(), weight * (1 + self.gamma * quotient) / len(losses)


@dataclass(frozen=True)
class HardMining(Mining):
    """The mean over the hardest samples alone: the ceil(keep B) of largest loss, of equal ones the lowest rows.

    It is the ``HardMining`` of the official SV-X code (which rounds down), after OHEM (arXiv 1604.03540).

    Args:
        keep: share of the global batch that counts; 0.9 is the setting of the official SV-X code.

    Raises:
        ConfigError: where keep is not in (0, 1].
    """

    keep: float = 0.9

    def __post_init__(self) -> None:
        self._require(0 < self.keep <= 1, "keep", "a share in (0, 1]")

    def kept(self, batch: int) -> int:
        """How many samples of a batch count, at least 1."""
        # The product of a share such as 0.7 and a batch may lie just above a whole number.
        return max(1, math.ceil(self.keep * batch - 1e-9))

    def reduce(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the hardest, and its derivative: 1 / kept for them, 0 for the others."""
        kept = self.kept(len(losses))
        hardest = torch.argsort(losses, descending=True, stable=True)[:kept]
        return losses[hardest].mean(), torch.zeros_like(losses).index_fill(0, hardest, 1 / kept)
