"""Augmentation parameters as a function of (seed, position), in one form that every decoder applies.

A sample's parameters are a row of K numbers, whose columns :class:`Column` names. They have no unit of pixels: of the
affine map, the image is the square from -1/2 to 1/2, x to the right, y downwards; elsewhere lengths are shares of the
side. The functions behind the classes turn them into pixels, for all decoders alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from partial_fc.errors import ConfigError
from partial_fc.permutation import hash64, random_unit

_STREAM_TAG = 0xA0651

# Independent numbers in [0, 1) of a sample. Each augmentation has its own, whatever others are on; those of the flip
# and the affine map keep their places, so that a run goes on as it began.
_FLIP, _ANGLE, _SCALE, _SHIFT_X, _SHIFT_Y = range(5)
_CROP, _CROP_AREA, _CROP_ASPECT, _CROP_X, _CROP_Y = range(5, 10)
_LOW_RESOLUTION, _LOW_RESOLUTION_SIDE = range(10, 12)
_COLOUR, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(12, 17)
_GRAYSCALE = 17
_BLUR, _BLUR_SIGMA = range(18, 20)
_JPEG, _JPEG_QUALITY = range(20, 22)
_CUTOUT, _CUTOUT_SIDE, _CUTOUT_X, _CUTOUT_Y = range(22, 26)
_NUMBERS = 26

# Side of the images that a sigma is given for; pixels behind the 3 sigmas of the widest blur don't count.
_BLUR_REFERENCE = 112
_BLUR_REACH = 3

# Highest quality of a JPEG augmentation.
_JPEG_BEST = 95

# Share of red, green and blue in the grey level (ITU-R BT.601), as of OpenCV and DALI.
_LUMA = (0.299, 0.587, 0.114)
# Two axes of colour, which with the luma are YIQ (FCC 1953).
_COLOUR_AXES = ((0.596, -0.274, -0.322), (0.211, -0.523, 0.312))

# The number before 1 in float32: the last position that stays inside.
_BELOW_ONE = 1 - 2.0**-24

# A number, or a float64 array of numbers.
Numbers = TypeVar("Numbers", float, np.ndarray)


class Column:
    """Columns of the parameters, K = ``COUNT`` of them.

    But for the affine map, an augmentation isn't applied to a sample where its (first) column is 0.

    Attributes:
        FLIP: 1 where the image is flipped.
        AFFINE: the map ``m11, m12, m13, m21, m22, m23``, with which the output's point (x, y) shows the source's point
            ``(m11 x + m12 y + m13, m21 x + m22 y + m23)``.
        CROP: the box's width and height as shares of the side; then from 0 to 1, where in the room that is left it
            begins, horizontally and vertically.
        LOW_RESOLUTION: share of the side that remains.
        COLOUR: 1; then the map of colours, row by row: ``[3, 4]``, applied to (red, green, blue, 1), levels 0 to 255.
        GRAYSCALE: 1 where the image becomes grey.
        BLUR: sigma as a share of the side.
        JPEG: quality.
        CUTOUT: the square's side as a share of the image's; then its position, as of ``CROP``.
        COUNT: K.
    """

    FLIP = 0
    AFFINE = np.s_[1:7]
    CROP = np.s_[7:11]
    LOW_RESOLUTION = 11
    COLOUR = np.s_[12:25]
    GRAYSCALE = 25
    BLUR = 26
    JPEG = 27
    CUTOUT = np.s_[28:31]
    COUNT = 31


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image, in the order of :attr:`active`; all of it off by default but the flip.

    ``crop``, ``low_resolution``, ``colour_twist``, ``grayscale``, ``blur``, ``jpeg``, ``cutout`` and ``flip`` are
    probabilities; the values next to them say how strong they are at most. AdaFace (arXiv 2204.00964), in its code and
    that of CVLface, crops, lowers the resolution and changes the colours, with a probability of 0.2 each: the defaults
    of those three are its values. They are drawn as follows, all uniform.

    - affine: a rotation by ``[-rotate, rotate]``, a size of ``1 + [-scale, scale]``, a shift by ``[-shift, shift]``.
      Interpolated bilinearly; from outside the image comes ``fill``.
    - crop: a box of an area in ``[crop_area, 1]`` and an aspect ratio (its logarithm) between 1 / ``crop_aspect`` and
      ``crop_aspect``, as far as it fits; resized to the image's size, bilinearly. As torchvision's RandomResizedCrop,
      which however draws again what doesn't fit, and so has fewer large boxes. (AdaFace blackens what is outside the
      box and leaves the rest in its place.)
    - low resolution: down to ``[low_resolution_side, 1]`` of the side by an antialiased bilinear filter, and up again
      bilinearly (AdaFace draws the two filters from five).
    - colour twist: a saturation and a turn of the hue, then brightness, then contrast around the middle grey. Factors
      in ``1 + [-colour_strength, colour_strength]``, turns in ``[-colour_hue, colour_hue]``.
    - grayscale: the grey level 0.299 red + 0.587 green + 0.114 blue.
    - blur: Gaussian, of a sigma in ``(0, blur_sigma]``, which is in pixels of an image of side 112 and grows with the
      images.
    - JPEG: compressed with a quality in ``[jpeg_quality, 95]``, colours at half the resolution, and decompressed.
    - cutout (arXiv 1708.04552): a square of a side in ``(0, cutout_side]``, all of it in the image, becomes ``fill``.
    - flip: horizontally.

    Attributes:
        flip: probability of a flip.
        rotate: largest angle of rotation, in radians.
        scale: largest relative change of size.
        shift: largest shift along each axis, as a share of the image's side.
        fill: level of the pixels from outside the image and of the cutout, 0 (black) to 255 (white).
        crop: probability of a crop.
        crop_area: smallest share of the area; AdaFace's 0.2 (torchvision's default is 0.08).
        crop_aspect: largest ratio of the longer side to the shorter one; 4/3 in AdaFace and torchvision.
        low_resolution: probability of a low resolution.
        low_resolution_side: smallest share of the side; AdaFace's 0.2.
        colour_twist: probability of changed colours.
        colour_strength: largest relative change of brightness, contrast and saturation; AdaFace's 0.5.
        colour_hue: largest turn of the hue, 1 being a full turn; AdaFace's 0.
        grayscale: probability that colours go.
        blur: probability of a blur.
        blur_sigma: largest sigma, in pixels of an image of side 112. MoCo v2 (arXiv 2003.04297) has 2 for images of
            224, CVLface's second augmenter 4 for images of 112; the default lies between.
        jpeg: probability of a compression.
        jpeg_quality: lowest quality; 30 to 95 is the range of Real-ESRGAN (arXiv 2107.10833), which imitates what
            images on the internet went through.
        cutout: probability of a cutout.
        cutout_side: largest side of the square as a share of the image's; the authors' is always 16 of 32 pixels for
            CIFAR-10, and may stick out of the image.

    Raises:
        ConfigError: a value is out of its range.
    """

    flip: float = 0.5
    rotate: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    fill: int = 0
    crop: float = 0.0
    crop_area: float = 0.2
    crop_aspect: float = 4 / 3
    low_resolution: float = 0.0
    low_resolution_side: float = 0.2
    colour_twist: float = 0.0
    colour_strength: float = 0.5
    colour_hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: float = 2.0
    jpeg: float = 0.0
    jpeg_quality: int = 30
    cutout: float = 0.0
    cutout_side: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, (low, high) in _limits().items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"augment.{name} must be from {low:.6g} to {high:.6g}, got {value}")
            if name in ("fill", "jpeg_quality") and value != int(value):
                raise ConfigError(f"augment.{name} must be a whole number, got {value}")

    @property
    def affine(self) -> bool:
        """Whether images are rotated, scaled or shifted at all; if not, no decoder runs an affine operation."""
        return self.rotate > 0 or self.scale > 0 or self.shift > 0

    @property
    def active(self) -> tuple[str, ...]:
        """Names of what may happen, in the order in which it does."""
        others = ("crop", "low_resolution", "colour_twist", "grayscale", "blur", "jpeg", "cutout", "flip")
        return ("affine",) * self.affine + tuple(name for name in others if getattr(self, name) > 0)

    @property
    def identity(self) -> bool:
        """Whether images stay as they are."""
        return not self.active

    def parameters(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """Parameters of the samples at these positions, a function of (seed, position) alone.

        Those of one augmentation don't depend on the settings of another.

        Args:
            seed: any integer.
            positions: int64 array ``[n]``, values from 0.

        Returns:
            float32 array ``[n, K]``; :class:`Column` says what stands where.
        """
        active = set(self.active)
        numbers = 1 if active <= {"flip"} else 5 if active <= {"flip", "affine"} else _NUMBERS
        unit = random_unit(hash64(seed, _STREAM_TAG), numbers, np.asarray(positions, dtype=np.int64)).T
        result = np.zeros((unit.shape[1], Column.COUNT), dtype=np.float32)
        result[:, Column.FLIP] = unit[_FLIP] < self.flip
        result[:, Column.AFFINE] = self._affine(unit) if "affine" in active else [1, 0, 0, 0, 1, 0]
        if "crop" in active:
            result[:, Column.CROP] = self._crop(unit)
        if "low_resolution" in active:
            share = self.low_resolution_side + (1 - self.low_resolution_side) * unit[_LOW_RESOLUTION_SIDE]
            result[:, Column.LOW_RESOLUTION] = share * (unit[_LOW_RESOLUTION] < self.low_resolution)
        if "colour_twist" in active:
            result[:, Column.COLOUR] = self._colour(unit)
        if "grayscale" in active:
            result[:, Column.GRAYSCALE] = unit[_GRAYSCALE] < self.grayscale
        if "blur" in active:
            sigma = self.blur_sigma / _BLUR_REFERENCE * (1 - unit[_BLUR_SIGMA])
            result[:, Column.BLUR] = sigma * (unit[_BLUR] < self.blur)
        if "jpeg" in active:
            quality = np.floor(self.jpeg_quality + (_JPEG_BEST + 1 - self.jpeg_quality) * unit[_JPEG_QUALITY])
            result[:, Column.JPEG] = quality * (unit[_JPEG] < self.jpeg)
        if "cutout" in active:
            square = np.stack([self.cutout_side * (1 - unit[_CUTOUT_SIDE]), unit[_CUTOUT_X], unit[_CUTOUT_Y]], axis=1)
            result[:, Column.CUTOUT] = _inside(square, 1) * (unit[_CUTOUT] < self.cutout)[:, None]
        return result

    def blur_radius(self, image_size: int) -> int:
        """How far the kernels of a blur reach from their middle, in pixels: 3 of the largest sigma."""
        return math.ceil(_BLUR_REACH * self.blur_sigma * image_size / _BLUR_REFERENCE)

    def _affine(self, unit: np.ndarray) -> np.ndarray:
        angle, change, shift_x, shift_y = 2 * unit[[_ANGLE, _SCALE, _SHIFT_X, _SHIFT_Y]] - 1
        # The map goes from the output to the source, so it's the inverse of: scale and rotate, then shift.
        zoom = 1 / (1 + self.scale * change)
        cos, sin = zoom * np.cos(self.rotate * angle), zoom * np.sin(self.rotate * angle)
        shift_x, shift_y = self.shift * shift_x, self.shift * shift_y
        return np.stack([cos, sin, -(cos * shift_x + sin * shift_y), -sin, cos, sin * shift_x - cos * shift_y], axis=1)

    def _crop(self, unit: np.ndarray) -> np.ndarray:
        area = self.crop_area + (1 - self.crop_area) * unit[_CROP_AREA]
        # The longer side of a box of this area and ratio is sqrt(area * ratio), at most 1.
        widest = np.minimum(math.log(self.crop_aspect), -np.log(area))
        aspect = np.exp((2 * unit[_CROP_ASPECT] - 1) * widest)
        box = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect), unit[_CROP_X], unit[_CROP_Y]], axis=1)
        return _inside(box, 2) * (unit[_CROP] < self.crop)[:, None]

    def _colour(self, unit: np.ndarray) -> np.ndarray:
        change = 2 * unit[[_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE]] - 1
        brightness, contrast, saturation = 1 + self.colour_strength * change[:3]
        turn = 2 * math.pi * self.colour_hue * change[3]
        # Luma stays; the other two axes of YIQ are stretched by the saturation and turned by the hue.
        grey, to_yiq = np.tile(_LUMA, (3, 1)), np.array([_LUMA, *_COLOUR_AXES])
        quarter_turn = np.linalg.inv(to_yiq) @ [[0, 0, 0], [0, 0, -1], [0, 1, 0]] @ to_yiq
        along, across = saturation * np.cos(turn), saturation * np.sin(turn)
        matrix = grey + along[:, None, None] * (np.eye(3) - grey) + across[:, None, None] * quarter_turn
        result = np.ones((unit.shape[1], 13))
        colours = result[:, 1:].reshape(-1, 3, 4)
        colours[:, :, :3] = (contrast * brightness)[:, None, None] * matrix
        colours[:, :, 3] = (127.5 * (1 - contrast))[:, None]
        return result * (unit[_COLOUR] < self.colour_twist)[:, None]


def _limits() -> dict[str, tuple[float, float]]:
    """The smallest and the largest value of each setting."""
    chances = ("flip", "crop", "low_resolution", "colour_twist", "grayscale", "blur", "jpeg", "cutout")
    return {name: (0.0, 1.0) for name in chances} | {
        "rotate": (0.0, math.pi),
        "scale": (0.0, 0.99),
        "shift": (0.0, 1.0),
        "fill": (0, 255),
        "crop_area": (0.01, 1.0),
        "crop_aspect": (1.0, 10.0),
        "low_resolution_side": (0.01, 1.0),
        "colour_strength": (0.0, 0.99),
        "colour_hue": (0.0, 0.5),
        "blur_sigma": (0.01, 20.0),
        "jpeg_quality": (1, _JPEG_BEST),
        "cutout_side": (0.01, 1.0),
    }


def _inside(values: np.ndarray, first: int) -> np.ndarray:
    """Keep positions, the columns from ``first`` on, below 1 where float32 would round them up."""
    values[:, first:] = np.minimum(values[:, first:], _BELOW_ONE)
    return values


def pixel_matrices(parameters: np.ndarray, image_size: int) -> np.ndarray:
    """The affine maps in pixels, with (0, 0) at the outer corner of the first pixel (its middle is at 0.5, 0.5).

    Args:
        parameters: float32 array ``[n, K]`` of :meth:`Augmentation.parameters`.
        image_size: S, the side of the image in pixels.

    Returns:
        float32 array ``[n, 2, 3]``.
    """
    matrices = parameters[:, Column.AFFINE].reshape(-1, 2, 3).copy()
    linear, offset = matrices[:, :, :2], matrices[:, :, 2]
    matrices[:, :, 2] = image_size * (offset + 0.5 - 0.5 * linear.sum(axis=2))
    return matrices


def pixels(share: Numbers, image_size: int) -> Numbers:
    """A length in whole pixels: the nearest, but at least 1 of what is more than nothing.

    Args:
        share: of the image's side, 0 to 1; a number, or a float64 array.
        image_size: S.
    """
    nearest = (share * image_size + 0.5) // 1
    return nearest + ((share > 0) & (nearest < 1))


def first_pixel(position: Numbers, length: Numbers, image_size: int) -> Numbers:
    """Where a box of a length in whole pixels begins, so that it lies inside: 0 to S - length.

    Args:
        position: 0 to 1 (exclusive); a number, or a float64 array.
        length: in pixels.
        image_size: S.
    """
    return (position * (image_size + 1 - length)) // 1


def blur_kernel(sigma: float | np.ndarray, radius: int) -> np.ndarray:
    """A Gaussian at whole pixels, with a sum of 1.

    Args:
        sigma: in pixels; a number, or a float64 array ``[n]``. Where it's 0, the kernel is zeros.
        radius: how far the kernel reaches.

    Returns:
        float32 ``[2 radius + 1]``, or ``[n, 2 radius + 1]``.
    """
    width = np.asarray(sigma, dtype=np.float64)[..., None]
    applies = width > 0
    exponent = np.arange(-radius, radius + 1) / np.where(applies, width, 1)
    kernel = np.exp(-0.5 * exponent**2)
    return (kernel / kernel.sum(axis=-1, keepdims=True) * applies).astype(np.float32)
