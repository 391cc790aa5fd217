"""Augmentation parameters as a function of (seed, position), in one form that every decoder applies.

A sample's parameters are a flip flag and an affine map from the output image to the source image, in coordinates
without a unit: the image is the square from -1/2 to 1/2, x to the right, y downwards. So they don't depend on its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from partial_fc.errors import ConfigError
from partial_fc.permutation import hash64, random_unit

_STREAM_TAG = 0xA0651


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image: a rotation, a change of scale and a shift, then a horizontal flip.

    Pixels are interpolated bilinearly; those from outside the source image are ``fill``.

    Attributes:
        flip: probability of a horizontal flip.
        rotate: largest angle of rotation, in radians; uniform in ``[-rotate, rotate]``.
        scale: largest relative change of size, less than 1; the size is multiplied by ``1 + u``, u uniform in
            ``[-scale, scale]``.
        shift: largest shift along each axis, as a fraction of the image's side.
        fill: level of the pixels from outside the image, 0 (black) to 255 (white).

    Raises:
        ConfigError: a value is out of its range.
    """

    flip: float = 0.5
    rotate: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    fill: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        limits = {"flip": 1.0, "rotate": math.pi, "scale": 0.99, "shift": 1.0, "fill": 255}
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise ConfigError(f"augment.{name} must be from 0 to {limit:.6g}, got {value}")

    @property
    def affine(self) -> bool:
        """Whether images are rotated, scaled or shifted at all; if not, no decoder runs an affine operation."""
        return self.rotate > 0 or self.scale > 0 or self.shift > 0

    @property
    def identity(self) -> bool:
        """Whether images stay as they are."""
        return self.flip == 0 and not self.affine

    def parameters(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """Parameters of the samples at these positions, a function of (seed, position) alone.

        Args:
            seed: any integer.
            positions: int64 array ``[n]``, values from 0.

        Returns:
            float32 array ``[n, 7]``: 1 where the image is flipped, else 0; then the affine map
            ``m11, m12, m13, m21, m22, m23``, with which the output's point (x, y) shows the source's point
            ``(m11 x + m12 y + m13, m21 x + m22 y + m23)``.
        """
        unit = random_unit(hash64(seed, _STREAM_TAG), 5, np.asarray(positions, dtype=np.int64))
        result = np.zeros((len(unit), 7))
        result[:, 0] = unit[:, 0] < self.flip
        angle, change, shift_x, shift_y = (2 * unit[:, 1:] - 1).T
        # The map goes from the output to the source, so it's the inverse of: scale and rotate, then shift.
        zoom = 1 / (1 + self.scale * change)
        cos, sin = zoom * np.cos(self.rotate * angle), zoom * np.sin(self.rotate * angle)
        shift_x, shift_y = self.shift * shift_x, self.shift * shift_y
        result[:, 1:4] = np.stack([cos, sin, -(cos * shift_x + sin * shift_y)], axis=1)
        result[:, 4:7] = np.stack([-sin, cos, sin * shift_x - cos * shift_y], axis=1)
        return result.astype(np.float32)


def pixel_matrices(parameters: np.ndarray, image_size: int) -> np.ndarray:
    """The affine maps in pixels, with (0, 0) at the outer corner of the first pixel (its middle is at 0.5, 0.5).

    Args:
        parameters: float32 array ``[n, 7]`` of :meth:`Augmentation.parameters`.
        image_size: side of the image in pixels.

    Returns:
        float32 array ``[n, 2, 3]``.
    """
    matrices = parameters[:, 1:].reshape(-1, 2, 3).copy()
    linear, offset = matrices[:, :, :2], matrices[:, :, 2]
    matrices[:, :, 2] = image_size * (offset + 0.5 - 0.5 * linear.sum(axis=2))
    return matrices
