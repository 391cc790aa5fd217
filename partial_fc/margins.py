"""Axis 1 of the loss: target margins, the function phi that replaces the target cosine c = cos(theta).

A margin holds numbers only. :meth:`Margin.evaluate` maps the target cosines of the global batch to phi(c), its true
derivative and the boundary f, above which a negative's cosine makes it a support vector. f is the margin's value before
``easy_margin`` (as in the official SV-X layer). Angles are in radians.

Each derivative is taken with respect to the cosine: d theta / d c = -1 / sin(theta), with sin(theta) floored
(:func:`sine_floor`), so that it stays finite at c = 1 and c = -1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.errors import ConfigError


class MarginValues(NamedTuple):
    """What a margin makes of the target cosines; each a tensor ``[B]`` (global) of the cosines' dtype.

    Attributes:
        phi: phi(c), the target's value before the scale.
        derivative: phi'(c).
        boundary: f, phi before easy_margin.
    """

    phi: Tensor
    derivative: Tensor
    boundary: Tensor


def sine_floor(dtype: torch.dtype) -> float:
    """Smallest sin(theta) that a derivative divides by: 1e-8 in float64, 1e-4 in every other dtype."""
    return 1e-8 if dtype == torch.float64 else 1e-4


@dataclass(frozen=True)
class Margin:
    """Base of the target margins; a subclass defines :meth:`_phi`."""

    def _phi(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """phi(c) before easy_margin, and its derivative."""
        raise TypeError(f"{type(self).__name__} is not a margin: use CosFace, ArcFace, ...")

    def evaluate(self, cosine: Tensor) -> MarginValues:
        """Phi, its derivative and the boundary at the target cosines ``[B]`` (global, float32 or float64)."""
        phi, derivative = self._phi(cosine)
        if not getattr(self, "easy_margin", False):
            return MarginValues(phi, derivative, phi)
        easy = cosine <= 0
        return MarginValues(
            torch.where(easy, cosine, phi), torch.where(easy, torch.ones_like(phi), derivative), boundary=phi
        )

    def _require(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ConfigError(f"{type(self).__name__}: {name}={getattr(self, name)!r}, expected {expected}")


@dataclass(frozen=True)
class NormFace(Margin):
    """No margin, phi(c) = c (Wang et al., "NormFace", ACM MM 2017, arXiv 1704.06369)."""

    def _phi(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        return cosine, torch.ones_like(cosine)


@dataclass(frozen=True)
class CosFace(Margin):
    """Additive cosine margin, phi(c) = c - m (CosFace, arXiv 1801.09414, eq. 4; AM-Softmax, arXiv 1801.05599, eq. 5).

    Args:
        m: margin on the cosine; 0.35 is both papers' setting.
        easy_margin: phi(c) = c where c <= 0.

    Raises:
        ConfigError: where m is not in [0, 2].
    """

    m: float = 0.35
    easy_margin: bool = False

    def __post_init__(self) -> None:
        self._require(0 <= self.m <= 2, "m", "a cosine margin in [0, 2]")

    def _phi(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        return cosine - self.m, torch.ones_like(cosine)


@dataclass(frozen=True)
class ArcFace(Margin):
    """Additive angular margin, phi(c) = cos(theta + m) (ArcFace, arXiv 1801.07698, eq. 3).

    Past theta = pi - m, where cos(theta + m) would rise again, phi(c) = c - m sin(m) (the official code's guard): phi
    stays monotone, with a jump. phi' = sin(theta + m) / sin(theta) before the guard and 1 past it.

    Args:
        m: margin on the angle, radians; 0.5 is the paper's setting.
        easy_margin: phi(c) = c where c <= 0.

    Raises:
        ConfigError: where m is not in [0, pi).
    """

    m: float = 0.5
    easy_margin: bool = False

    def __post_init__(self) -> None:
        self._require(0 <= self.m < math.pi, "m", "an angle in [0, pi) radians")

    def _phi(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        cos_m, sin_m = math.cos(self.m), math.sin(self.m)
        sine = torch.sqrt(((1 - cosine) * (1 + cosine)).clamp_min(0))
        guarded = cosine <= -cos_m
        phi = torch.where(guarded, cosine - self.m * sin_m, cosine * cos_m - sine * sin_m)
        # sin(theta + m) / sin(theta), expanded.
        slope = cos_m + sin_m * cosine / sine.clamp_min(sine_floor(cosine.dtype))
        return phi, torch.where(guarded, torch.ones_like(slope), slope)


@dataclass(frozen=True)
class CombinedMargin(Margin):
    """Multiplicative, additive angular and additive cosine margin in one (ArcFace, arXiv 1801.07698, eq. 4).

    phi(c) = (-1)^k cos(a) - 2k - m3 with a = m1 theta + m2 and k = floor(a / pi): monotone and continuous on all of
    [0, pi]. (It differs from :class:`ArcFace` past theta = pi - m, where the classic form jumps.)
    phi' = (-1)^k m1 sin(a) / sin(theta).

    Args:
        m1: factor of the angle (SphereFace).
        m2: margin on the angle, radians (ArcFace).
        m3: margin on the cosine (CosFace).
        easy_margin: phi(c) = c where c <= 0.

    Raises:
        ConfigError: where m1 <= 0, m2 < 0 or m3 < 0.
    """

    m1: float = 1.0
    m2: float = 0.5
    m3: float = 0.0
    easy_margin: bool = False

    def __post_init__(self) -> None:
        self._require(0 < self.m1 < math.inf, "m1", "a factor above 0")
        self._require(0 <= self.m2 < math.inf, "m2", "an angle of at least 0 radians")
        self._require(0 <= self.m3 < math.inf, "m3", "a cosine margin of at least 0")

    def _phi(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.m1 * torch.acos(cosine) + self.m2
        turns = torch.floor(angle / math.pi)
        sign = 1 - 2 * torch.remainder(turns, 2)
        sine = torch.sqrt(((1 - cosine) * (1 + cosine)).clamp_min(0)).clamp_min(sine_floor(cosine.dtype))
        phi = sign * torch.cos(angle) - 2 * turns - self.m3
        return phi, sign * self.m1 * torch.sin(angle) / sine
