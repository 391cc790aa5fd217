"""Axis 2 of the loss: negative emphasis, the function h that replaces the cosines of support vectors.

A support vector of sample i is a negative class j whose cosine lies above the boundary: c_ij > f_i (support vectors in
SV-Softmax, arXiv 1812.11317; "mis-classified vectors" in MV-Softmax, AAAI 2020, arXiv 1912.00833). For those
h(c) = q c^2 + a c + b, for all other negatives h(c) = c.

An emphasis holds numbers only. Where its coefficients move with the training (:class:`Curricular`), the values that
move are state, as with the margins: it goes in, and new state comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from partial_fc.checks import Checked


class Coefficients(NamedTuple):
    """h(c) = q c^2 + a c + b on support vectors; each a number, or a 0-dim tensor where it is state."""

    q: float | Tensor
    a: float | Tensor
    b: float | Tensor


class Negatives(Checked):
    """Base of the emphases.

    Attributes:
        filter_above: a negative whose cosine lies above it leaves the sum; None: none does.
        top_k: how many support vectors of a sample are kept over all shards; None: all of them.
    """

    filter_above: float | None = None
    top_k: int | None = None

    def coefficients(self, state: Mapping[str, Tensor] | None = None) -> Coefficients | None:
        """The polynomial on support vectors; None: no negative is treated as one.

        Args:
            state: what :meth:`advance` gave for this step, or the saved state where nothing is trained.

        Raises:
            TypeError: where state is missing and this emphasis reads it.
        """
        return None

    @property
    def candidates(self) -> int | None:
        """``top_k``."""
        return self.top_k

    def initial_state(self) -> dict[str, Tensor]:
        """Running values by name before the first step, 0-dim float32; they are saved with the head."""
        return {}

    def advance(self, state: Mapping[str, Tensor], target_cosine: Tensor) -> dict[str, Tensor]:
        """The state that this training step uses; nothing is changed in place and no gradient is kept.

        Args:
            state: the state after the step before.
            target_cosine: c_iy ``[B]`` (global). Values that aren't finite spoil the new state: the caller keeps the
                old one then.
        """
        return {}

    def weakened(self, share: float) -> Negatives:
        """The same emphasis at a share of its strength, for a linear warm-up; itself at share 1.

        Raises:
            ConfigError: where share is not in [0, 1].
        """
        self._require_share(share)
        return self

    def _check(self) -> None:
        above, k = self.filter_above, self.top_k
        self._require(above is None or -1 <= above <= 1, "filter_above", "a cosine in [-1, 1], or None")
        whole = isinstance(k, int) and k >= 1
        self._require(k is None or whole, "top_k", "a whole number, at least 1, or None for all")


@dataclass(frozen=True)
class Plain(Negatives):
    """No emphasis: h(c) = c for every negative.

    Args:
        filter_above: a negative whose cosine lies above this leaves the sum, as if its logit were -inf (inter-class
            filtering of noisy labels, as in arXiv 2203.15565, sec. 3.4). None: no filtering.

    Raises:
        ConfigError: where filter_above is not in [-1, 1].
    """

    filter_above: float | None = None

    def __post_init__(self) -> None:
        self._check()


@dataclass(frozen=True)
class SupportVectors(Negatives):
    """Support-vector guidance: the logits of support vectors are raised.

    ``mode='adaptive'``: h(c) = t c + t - 1, so that e^{s h} = e^{s (t - 1)(c + 1)} e^{s c} (SV-Softmax, eq. 7; with
    CosFace SV-AM-Softmax, with ArcFace SV-Arc-Softmax; ``t`` here is 1 + t of the official repository).
    ``mode='fixed'``: h(c) = c + t - 1 (MV-Softmax, fixed weight).

    Args:
        t: strength, at least 1; 1.2 is the papers' setting. From scratch it diverges in places: begin lower, or with
            a pre-trained backbone.
        mode: ``adaptive`` or ``fixed``.
        top_k: keep only the k support vectors of largest cosine of each sample, over all shards: exactly k, ties by
            the lowest class id. None: all.
        filter_above: as in :class:`Plain`; a filtered negative is no support vector.

    Raises:
        ConfigError: where an argument is out of its range.
    """

    t: float = 1.2
    mode: Literal["adaptive", "fixed"] = "adaptive"
    top_k: int | None = None
    filter_above: float | None = None

    def __post_init__(self) -> None:
        self._check()
        self._require(1 <= self.t <= 2, "t", "a strength in [1, 2]")
        self._require(self.mode in ("adaptive", "fixed"), "mode", "'adaptive' or 'fixed'")

    def coefficients(self, state: Mapping[str, Tensor] | None = None) -> Coefficients:
        """(0, t, t - 1) for ``adaptive``, (0, 1, t - 1) for ``fixed``."""
        return Coefficients(0.0, self.t if self.mode == "adaptive" else 1.0, self.t - 1.0)

    def weakened(self, share: float) -> Negatives:
        """T goes from 1 to its value."""
        self._require_share(share)
        return self if share == 1 else replace(self, t=1 + (self.t - 1) * share)


@dataclass(frozen=True)
class Curricular(Negatives):
    """Adaptive curriculum: h(c) = c (c + tau) on support vectors (CurricularFace, arXiv 2004.00288, sec. 3).

    tau is an exponential average of the mean target cosine over the global batch, used after this step's update
    as in the official code: near 0 at first, where hard negatives count less than they are (c^2 < c), and larger
    the better the samples are told apart, so that the hard negatives come later. It is a warm-up of its own:
    :meth:`weakened` leaves it as it is. The paper joins it with :class:`~partial_fc.margins.ArcFace`.

    Args:
        momentum: weight of the batch in tau; 0.01 is the setting of the official code.
        top_k: as in :class:`SupportVectors`.
        filter_above: as in :class:`Plain`; a filtered negative is no support vector.

    Raises:
        ConfigError: where an argument is out of its range.
    """

    momentum: float = 0.01
    top_k: int | None = None
    filter_above: float | None = None

    def __post_init__(self) -> None:
        self._check()
        self._require(0 < self.momentum <= 1, "momentum", "a weight in (0, 1]")

    def coefficients(self, state: Mapping[str, Tensor] | None = None) -> Coefficients:
        """(1, tau, 0)."""
        if state is None:
            raise TypeError("Curricular.coefficients: state=None, expected the running 'tau'")
        return Coefficients(1.0, state["tau"], 0.0)

    def initial_state(self) -> dict[str, Tensor]:
        """Tau 0, as in the official code."""
        return {"tau": torch.tensor(0.0, dtype=torch.float32)}

    def advance(self, state: Mapping[str, Tensor], target_cosine: Tensor) -> dict[str, Tensor]:
        """Tau moved towards the mean target cosine of the batch."""
        tau = state["tau"].detach()
        mean = target_cosine.detach().to(tau.dtype).mean()
        return {"tau": self.momentum * mean + (1 - self.momentum) * tau}
