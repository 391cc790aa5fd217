"""Axis 2 of the loss: negative emphasis, the function h that replaces the cosines of support vectors.

A support vector of sample i is a negative class j whose cosine lies above the boundary: c_ij > f_i (support vectors in
SV-Softmax, arXiv 1812.11317; "mis-classified vectors" in MV-Softmax, AAAI 2020, arXiv 1912.00833). For those
h(c) = q c^2 + a c + b, for all other negatives h(c) = c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from partial_fc.errors import ConfigError


class Coefficients(NamedTuple):
    """h(c) = q c^2 + a c + b on support vectors."""

    q: float
    a: float
    b: float


class Negatives:
    """Base of the emphases. ``coefficients`` and ``candidates`` are what the head reads."""

    filter_above: float | None

    @property
    def coefficients(self) -> Coefficients | None:
        """The polynomial on support vectors; None: no negative is treated as one."""
        return None

    @property
    def candidates(self) -> int | None:
        """How many support vectors of a sample are kept over all shards (``top_k``); None: all of them."""
        return None

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ConfigError(f"{type(self).__name__}: {name}={getattr(self, name)!r}, expected {expected}")

    def _check_filter(self) -> None:
        above = self.filter_above
        self._require(above is None or -1 <= above <= 1, "filter_above", "a cosine in [-1, 1], or None")


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
        self._check_filter()


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
        self._check_filter()
        self._require(1 <= self.t <= 2, "t", "a strength in [1, 2]")
        self._require(self.mode in ("adaptive", "fixed"), "mode", "'adaptive' or 'fixed'")
        whole = isinstance(self.top_k, int) and self.top_k >= 1
        self._require(self.top_k is None or whole, "top_k", "a whole number, at least 1, or None for all")

    @property
    def coefficients(self) -> Coefficients | None:
        """(0, t, t - 1) for ``adaptive``, (0, 1, t - 1) for ``fixed``."""
        return Coefficients(0.0, self.t if self.mode == "adaptive" else 1.0, self.t - 1.0)

    @property
    def candidates(self) -> int | None:
        """``top_k``."""
        return self.top_k
