"""Axis 1 of the loss: target margins, the function phi that replaces the target cosine c = cos(theta).

A margin holds numbers only. :meth:`Margin.evaluate` maps the target cosines of the global batch to phi(c), its true
derivative and the boundary f, above which a negative's cosine makes it a support vector. f is the margin's value before
``easy_margin`` (as in the official SV-X layer). Angles are in radians.

Some margins also read the norm a of each embedding (``needs_norms``), running statistics (``initial_state`` and
``advance``: state goes in, new state comes out) or the number of the step. What they need is handed to ``evaluate``;
the margin itself never changes.

Each derivative is taken with respect to the cosine: d theta / d c = -1 / sin(theta), with sin(theta) floored
(:func:`sine_floor`), so that it stays finite at c = 1 and c = -1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from partial_fc.checks import Checked

_Input = TypeVar("_Input")


class MarginValues(NamedTuple):
    """What a margin makes of the target cosines; each a tensor ``[B]`` (global) of the cosines' dtype.

    Attributes:
        phi: phi(c), the target's value before the scale.
        derivative: d phi / d c.
        boundary: f, phi before easy_margin.
        norm_derivative: d phi / d a, a the norm of the embedding; None where phi doesn't depend on it, or by its
            definition doesn't pass a gradient to it.
    """

    phi: Tensor
    derivative: Tensor
    boundary: Tensor
    norm_derivative: Tensor | None = None


def sine_floor(dtype: torch.dtype) -> float:
    """Smallest sin(theta) that a derivative divides by: 1e-8 in float64, 1e-4 in every other dtype."""
    return 1e-8 if dtype == torch.float64 else 1e-4


def sine_of(cosine: Tensor) -> Tensor:
    """sin(theta) of theta in [0, pi]."""
    return torch.sqrt(((1 - cosine) * (1 + cosine)).clamp_min(0))


def turned_cosine(cosine: Tensor, cos_m: float | Tensor, sin_m: float | Tensor) -> tuple[Tensor, Tensor]:
    """cos(theta + m) and its derivative sin(theta + m) / sin(theta), both expanded; m one angle, or one a sample."""
    sine = sine_of(cosine)
    slope = cos_m + sin_m * cosine / sine.clamp_min(sine_floor(cosine.dtype))
    return cosine * cos_m - sine * sin_m, slope


def guarded_cosine(
    cosine: Tensor, m: float | Tensor, cos_m: float | Tensor, sin_m: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """ArcFace's phi, its derivative, and which samples lie past the guard theta = pi - m."""
    turned, slope = turned_cosine(cosine, cos_m, sin_m)
    past = cosine <= -cos_m
    return torch.where(past, cosine - m * sin_m, turned), torch.where(past, torch.ones_like(slope), slope), past


def _unfolded(cosine: Tensor, factor: float, offset: float) -> tuple[Tensor, Tensor]:
    """The falling continuation of cos(a), (-1)^k cos(a) - 2k with k = floor(a / pi), at a = factor theta + offset.

    Its derivative (-1)^k factor sin(a) / sin(theta) is continuous, too: sin(a) = 0 where k changes.
    """
    angle = factor * torch.acos(cosine) + offset
    turns = torch.floor(angle / math.pi)
    sign = 1 - 2 * torch.remainder(turns, 2)
    sine = sine_of(cosine).clamp_min(sine_floor(cosine.dtype))
    return sign * torch.cos(angle) - 2 * turns, sign * factor * torch.sin(angle) / sine


@dataclass(frozen=True)
class Margin(Checked):
    """Base of the target margins; a subclass defines :meth:`_phi`, or :meth:`_values` where it reads more than c.

    Attributes:
        needs_norms: whether ``evaluate``, ``advance`` or ``penalty`` read the norms of the embeddings.
    """

    needs_norms: ClassVar[bool] = False
    _weakened_fields: ClassVar[tuple[str, ...]] = ()

    def _phi(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """phi(c) before easy_margin, and its derivative."""
        raise TypeError(f"{type(self).__name__} is not a margin: use CosFace, ArcFace, ...")

    def _values(
        self, cosine: Tensor, norms: Tensor | None, state: Mapping[str, Tensor] | None, step: int
    ) -> MarginValues:
        """All values before easy_margin."""
        phi, derivative = self._phi(cosine)
        return MarginValues(phi, derivative, phi)

    def evaluate(
        self,
        cosine: Tensor,
        *,
        norms: Tensor | None = None,
        state: Mapping[str, Tensor] | None = None,
        step: int = 0,
    ) -> MarginValues:
        """Phi, its derivatives and the boundary.

        Args:
            cosine: target cosines ``[B]`` (global, float32 or float64) in [-1, 1].
            norms: norms of the embeddings ``[B]`` (global), before they are made unit vectors.
            state: what :meth:`advance` gave for this step, or the saved state where nothing is trained.
            step: training steps done so far (the head counts its training forwards; a trainer may set them).

        Raises:
            TypeError: where norms or state are missing and this margin reads them.
        """
        values = self._values(cosine, norms, state, step)
        if not getattr(self, "easy_margin", False):
            return values
        easy, by_norm = cosine <= 0, values.norm_derivative
        return MarginValues(
            torch.where(easy, cosine, values.phi),
            torch.where(easy, torch.ones_like(cosine), values.derivative),
            values.boundary,
            None if by_norm is None else by_norm.masked_fill(easy, 0),
        )

    def initial_state(self) -> dict[str, Tensor]:
        """Running values by name before the first step, 0-dim float32; they are saved with the head."""
        return {}

    def advance(self, state: Mapping[str, Tensor], norms: Tensor) -> dict[str, Tensor]:
        """The state that this training step uses; nothing is changed in place and no gradient is kept.

        Args:
            state: the state after the step before.
            norms: norms of the embeddings ``[B]`` (global). Values that aren't finite spoil the new state: the caller
                keeps the old one then.
        """
        return {}

    def penalty(self, norms: Tensor) -> tuple[Tensor, Tensor] | None:
        """Regularizer of each sample ``[B]`` (global) and its derivative by the norm; its mean is added to the loss."""
        return None

    def weakened(self, share: float) -> Margin:
        """The same margin at a share of its strength, for a linear warm-up; itself at share 1.

        Raises:
            ConfigError: where share is not in [0, 1].
        """
        self._require_share(share)
        if share == 1 or not self._weakened_fields:
            return self
        return replace(self, **{name: getattr(self, name) * share for name in self._weakened_fields})

    def _needed(self, value: _Input | None, name: str, what: str) -> _Input:
        if value is None:
            raise TypeError(f"{type(self).__name__}.evaluate: {name}=None, expected {what}")
        return value

    def _needed_norms(self, norms: Tensor | None, dtype: torch.dtype) -> Tensor:
        return self._needed(norms, "norms", "the norms of the embeddings [B]").to(dtype)


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

    _weakened_fields: ClassVar[tuple[str, ...]] = ("m",)

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

    _weakened_fields: ClassVar[tuple[str, ...]] = ("m",)

    def __post_init__(self) -> None:
        self._require(0 <= self.m < math.pi, "m", "an angle in [0, pi) radians")

    def _phi(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        phi, slope, _ = guarded_cosine(cosine, self.m, math.cos(self.m), math.sin(self.m))
        return phi, slope


@dataclass(frozen=True)
class CombinedMargin(Margin):
    """Multiplicative, additive angular and additive cosine margin in one (ArcFace, arXiv 1801.07698, eq. 4).

    phi(c) = (-1)^k cos(a) - 2k - m3 with a = m1 theta + m2 and k = floor(a / pi): monotone and continuous on all of
    [0, pi]. (It differs from :class:`ArcFace` past theta = pi - m, where the classic form jumps.)
    phi' = (-1)^k m1 sin(a) / sin(theta).

    Args:
        m1: factor of the angle (SphereFace); a warm-up begins at 1.
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
        value, slope = _unfolded(cosine, self.m1, self.m2)
        return value - self.m3, slope

    def weakened(self, share: float) -> Margin:
        """m1 goes from 1, m2 and m3 go from 0 to their values."""
        self._require_share(share)
        if share == 1:
            return self
        return replace(self, m1=1 + (self.m1 - 1) * share, m2=self.m2 * share, m3=self.m3 * share)


@dataclass(frozen=True)
class SphereFace(Margin):
    """Multiplicative angular margin with annealing (SphereFace or A-Softmax, arXiv 1704.08063, eq. 7).

    phi(c) = (lambda c + psi) / (1 + lambda), with psi = (-1)^k cos(m theta) - 2k, k = floor(m theta / pi), and
    lambda = max(lambda_min, lambda_start (1 + gamma step)^-power): nearly no margin at first.
    psi' = (-1)^k m sin(m theta) / sin(theta).

    The defaults are those of the authors' published training configuration (``sphereface_model.prototxt``: QUADRUPLE,
    base 1000, gamma 0.12, power 1, lambda_min 5), which reaches lambda_min after 1659 steps. The official SV-X layer
    has gamma 1e-4 and power 2, and reaches it after 131422 steps. Both count from 1 where ``step`` counts from 0.

    Args:
        m: factor of the angle, a whole number.
        lambda_min: lambda in the end; 0 leaves psi alone.
        lambda_start: lambda at step 0.
        gamma: how fast lambda falls, per step.
        power: exponent of the fall.

    Raises:
        ConfigError: where m is not a whole number of at least 1, or another argument is below 0 or not finite.
    """

    m: int = 4
    lambda_min: float = 5.0
    lambda_start: float = 1000.0
    gamma: float = 0.12
    power: float = 1.0

    def __post_init__(self) -> None:
        self._require(isinstance(self.m, int) and self.m >= 1, "m", "a whole number, at least 1")
        for name in ("lambda_min", "lambda_start", "gamma", "power"):
            self._require(0 <= getattr(self, name) < math.inf, name, "a number of at least 0")

    def annealing(self, step: int) -> float:
        """Lambda at a step."""
        return max(self.lambda_min, self.lambda_start * (1 + self.gamma * step) ** -self.power)

    def _values(
        self, cosine: Tensor, norms: Tensor | None, state: Mapping[str, Tensor] | None, step: int
    ) -> MarginValues:
        weight = self.annealing(step)
        value, slope = _unfolded(cosine, self.m, 0.0)
        phi = (weight * cosine + value) / (1 + weight)
        return MarginValues(phi, (weight + slope) / (1 + weight), phi)
