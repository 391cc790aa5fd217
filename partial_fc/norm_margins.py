"""Target margins that read the norm of the embedding, as a sign of the image's quality: MagFace and AdaFace."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from partial_fc.margins import Margin, MarginValues, guarded_cosine, sine_of, turned_cosine


@dataclass(frozen=True)
class MagFace(Margin):
    """Angular margin that grows with the norm of the embedding (MagFace, arXiv 2103.06627, sec. 3).

    phi(c, a) is that of :class:`ArcFace`, guard included, with m(a) = l_m + (a - l_a) (u_m - l_m) / (u_a - l_a) and the
    norm a clamped to [l_a, u_a]. Nothing is detached: d phi / d a = -sin(theta + m) m'(a), past the guard
    -(sin m + m cos m) m'(a), and 0 where a is clamped. :meth:`penalty` draws the norms towards u_a:
    lambda_g (a / u_a^2 + 1 / a), its derivative lambda_g (1 / u_a^2 - 1 / a^2), and 0 where a is clamped.

    The defaults are those of the authors' ``run.sh``. Their trainer warns of a lambda_g below
    s m'(a) u_a^2 l_a^2 / (u_a^2 - l_a^2), with which norms may end at l_a: 22.6 with these bounds and scale 64.

    Args:
        l_a: smallest norm.
        u_a: largest norm.
        l_m: margin at l_a, radians.
        u_m: margin at u_a, radians.
        lambda_g: weight of the regularizer.
        easy_margin: phi(c) = c where c <= 0.

    Raises:
        ConfigError: where not 0 < l_a < u_a, or not 0 <= l_m <= u_m < pi, or lambda_g < 0.
    """

    l_a: float = 10.0
    u_a: float = 110.0
    l_m: float = 0.45
    u_m: float = 0.8
    lambda_g: float = 35.0
    easy_margin: bool = False

    needs_norms: ClassVar[bool] = True
    _weakened_fields: ClassVar[tuple[str, ...]] = ("l_m", "u_m")

    def __post_init__(self) -> None:
        self._require(0 < self.l_a < math.inf, "l_a", "a norm above 0")
        self._require(self.l_a < self.u_a < math.inf, "u_a", f"a norm above l_a={self.l_a!r}")
        self._require(0 <= self.l_m < math.pi, "l_m", "an angle in [0, pi) radians")
        self._require(self.l_m <= self.u_m < math.pi, "u_m", f"an angle in [l_m={self.l_m!r}, pi) radians")
        self._require(0 <= self.lambda_g < math.inf, "lambda_g", "a weight of at least 0")

    def _clamped(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        """The norms in [l_a, u_a], and which were outside."""
        return norms.clamp(self.l_a, self.u_a), (norms < self.l_a) | (norms > self.u_a)

    def _values(
        self, cosine: Tensor, norms: Tensor | None, state: Mapping[str, Tensor] | None, step: int
    ) -> MarginValues:
        norm, outside = self._clamped(self._needed_norms(norms, cosine.dtype))
        growth = (self.u_m - self.l_m) / (self.u_a - self.l_a)
        m = self.l_m + (norm - self.l_a) * growth
        cos_m, sin_m = torch.cos(m), torch.sin(m)
        phi, slope, past = guarded_cosine(cosine, m, cos_m, sin_m)
        by_margin = -torch.where(past, sin_m + m * cos_m, sine_of(cosine) * cos_m + cosine * sin_m)
        return MarginValues(phi, slope, phi, (by_margin * growth).masked_fill(outside, 0))

    def penalty(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        """lambda_g (a / u_a^2 + 1 / a) of each sample, and its derivative by the norm."""
        norm, outside = self._clamped(norms)
        falling, rising = 1 / norm, 1 / self.u_a**2
        slope = self.lambda_g * (rising - falling * falling)
        return self.lambda_g * (norm * rising + falling), slope.masked_fill(outside, 0)


@dataclass(frozen=True)
class AdaFace(Margin):
    """Margin that adapts to the quality of the image, read off the norm (AdaFace, arXiv 2204.00964, sec. 3).

    phi(c) = cos(clip(theta - m g, 0, pi)) - (m + m g), with g = clip(h (a - mean) / (std + 1e-3), -1, 1) and the norm a
    clipped to [1e-3, 100]: at g = -1 that is ArcFace, at 0 CosFace. phi' = sin(theta - m g) / sin(theta), and 0 where
    the angle is clipped. By definition no gradient passes to the norm. mean and std are exponential averages
    of the norms' mean and (unbiased) standard deviation over the global batch, used after this step's update.

    m and h are the paper's (sec. 4); momentum, the first mean and the first std are those of the official code
    (``t_alpha`` of its config.py, and its head.py).

    Args:
        m: margin, on the angle in radians and on the cosine.
        h: how strongly the norm acts: about two thirds of the samples lie within g = -h and h.
        momentum: weight of the batch in the running mean and std.

    Raises:
        ConfigError: where m is not in [0, pi), h < 0, or momentum is not in (0, 1].
    """

    m: float = 0.4
    h: float = 0.333
    momentum: float = 0.01

    needs_norms: ClassVar[bool] = True
    _weakened_fields: ClassVar[tuple[str, ...]] = ("m",)

    def __post_init__(self) -> None:
        self._require(0 <= self.m < math.pi, "m", "an angle in [0, pi) radians")
        self._require(0 <= self.h < math.inf, "h", "a factor of at least 0")
        self._require(0 < self.momentum <= 1, "momentum", "a weight in (0, 1]")

    def initial_state(self) -> dict[str, Tensor]:
        """Mean 20 and std 100, as in the official code."""
        return {name: torch.tensor(value, dtype=torch.float32) for name, value in (("mean", 20.0), ("std", 100.0))}

    def advance(self, state: Mapping[str, Tensor], norms: Tensor) -> dict[str, Tensor]:
        """Both averages moved towards the batch. One sample alone has no std: that of the state stays."""
        mean, std = state["mean"].detach(), state["std"].detach()
        norm = self._clipped(norms).to(mean.dtype)
        batch_std = norm.std() if len(norm) > 1 else std
        keep = 1 - self.momentum
        return {"mean": self.momentum * norm.mean() + keep * mean, "std": self.momentum * batch_std + keep * std}

    def _clipped(self, norms: Tensor) -> Tensor:
        return norms.detach().clamp(1e-3, 100.0)

    def _values(
        self, cosine: Tensor, norms: Tensor | None, state: Mapping[str, Tensor] | None, step: int
    ) -> MarginValues:
        norm = self._clipped(self._needed_norms(norms, cosine.dtype))
        state = self._needed(state, "state", "the running 'mean' and 'std' of the norms")
        mean, std = state["mean"].to(cosine.dtype), state["std"].to(cosine.dtype)
        quality = ((norm - mean) / (std + 1e-3) * self.h).clamp(-1, 1)
        shift = -self.m * quality
        cos_m, sin_m = torch.cos(shift), torch.sin(shift)
        turned, slope = turned_cosine(cosine, cos_m, sin_m)
        below, above = (shift < 0) & (cosine > cos_m), (shift > 0) & (cosine < -cos_m)
        turned = turned.masked_fill(below, 1).masked_fill(above, -1)
        phi = turned - (self.m - shift)
        return MarginValues(phi, slope.masked_fill(below | above, 0), phi)
