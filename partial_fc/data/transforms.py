"""The augmentations of one image in plain Python: by OpenCV, or by Pillow and NumPy where there is no OpenCV.

They do what the operators of :mod:`partial_fc.data.pipeline` do, up to rounding. Legend: S side of the images in
pixels, K columns of the parameters.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from partial_fc.data import decode
from partial_fc.data.augment import Augmentation, Column, blur_kernel, first_pixel, pixel_matrices, pixels


def augment_image(image: np.ndarray, augmentation: Augmentation, row: np.ndarray) -> np.ndarray:
    """Apply one sample's augmentations, in the order of :attr:`Augmentation.active`.

    Args:
        image: uint8 ``[S, S, 3]``, RGB; stays as it is.
        augmentation: what ``row`` was made by.
        row: float32 ``[K]``, a row of :meth:`Augmentation.parameters`.

    Returns:
        uint8 ``[S, S, 3]``, contiguous; ``image`` itself where nothing happens to it.
    """
    side, values = image.shape[0], row.tolist()
    if augmentation.affine:
        image = warp_image(image, pixel_matrices(row[None], side)[0], augmentation.fill)
    width, height, x, y = values[Column.CROP]
    if width:
        width, height = pixels(width, side), pixels(height, side)
        image = _crop(image, int(first_pixel(x, width, side)), int(first_pixel(y, height, side)), width, height)
    if share := values[Column.LOW_RESOLUTION]:
        image = _lower_resolution(image, int(pixels(share, side)))
    if values[Column.COLOUR][0]:
        image = _map_colours(image, row[Column.COLOUR][1:].reshape(3, 4))
    if values[Column.GRAYSCALE]:
        image = _grey(image)
    if sigma := values[Column.BLUR]:
        image = _filter(image, blur_kernel(sigma * side, augmentation.blur_radius(side)))
    if quality := values[Column.JPEG]:
        image = _compress(image, int(quality))
    square, x, y = values[Column.CUTOUT]
    if square:
        square = pixels(square, side)
        left, top = int(first_pixel(x, square, side)), int(first_pixel(y, square, side))
        image = image.copy()
        image[top : top + int(square), left : left + int(square)] = augmentation.fill
    if values[Column.FLIP]:
        image = _flip(image)
    return image


def warp_image(image: np.ndarray, matrix: np.ndarray, fill: int) -> np.ndarray:
    """Apply an affine map, bilinearly; what lies outside the image has the level ``fill``.

    Args:
        image: uint8 ``[S, S, 3]``.
        matrix: float32 ``[2, 3]``, a row of :func:`partial_fc.data.augment.pixel_matrices`.
        fill: 0 to 255.

    Returns:
        uint8 ``[S, S, 3]``.
    """
    side = image.shape[0]
    matrix = matrix.astype(np.float64)
    if cv2 := decode.opencv():
        # OpenCV's (0, 0) is the middle of the first pixel, not its corner.
        matrix[:, 2] += 0.5 * matrix[:, :2].sum(axis=1) - 0.5
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(image, matrix, (side, side), flags=flags, borderValue=(fill, fill, fill))
    # Pillow doesn't blend pixels at the border with the fill, so there's a border of fill around the image.
    framed = ImageOps.expand(Image.fromarray(image), border=1, fill=(fill, fill, fill))
    matrix[:, 2] += 1
    warped = framed.transform(
        (side, side),
        Image.Transform.AFFINE,
        matrix.ravel().tolist(),
        resample=Image.Resampling.BILINEAR,
        fillcolor=(fill, fill, fill),
    )
    return np.asarray(warped)


def _crop(image: np.ndarray, left: int, top: int, width: float, height: float) -> np.ndarray:
    """Cut out a box, in whole pixels, and enlarge it to the image's size, bilinearly."""
    box = image[top : top + int(height), left : left + int(width)]
    return _enlarge(box, image.shape[0])


def _lower_resolution(image: np.ndarray, small: int) -> np.ndarray:
    """Resize to ``[small, small, 3]`` and back."""
    return _enlarge(decode.resize_image(image, small), image.shape[0])


def _enlarge(image: np.ndarray, side: int) -> np.ndarray:
    """Resize to ``[side, side, 3]``, bilinearly; the outermost pixels are repeated."""
    if cv2 := decode.opencv():
        # The other INTER_LINEAR rounds the weights to 1/2048.
        return cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR_EXACT)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))


def _map_colours(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply ``matrix``, float32 ``[3, 4]``, to the (red, green, blue, 1) of each pixel."""
    if cv2 := decode.opencv():
        return cv2.transform(image, matrix)
    return np.asarray(Image.fromarray(image).convert("RGB", tuple(matrix.ravel().tolist())))


def _grey(image: np.ndarray) -> np.ndarray:
    if cv2 := decode.opencv():
        return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def _filter(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve along both axes with a kernel, float32 ``[2 radius + 1]``; outermost pixels are mirrors."""
    if cv2 := decode.opencv():
        return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
    side, radius = image.shape[0], len(kernel) // 2
    levels = image.astype(np.float32)
    for _ in range(2):
        padded = np.pad(levels, ((radius, radius), (0, 0), (0, 0)), mode="reflect")
        filtered = sum(weight * padded[at : at + side] for at, weight in enumerate(kernel))
        levels = np.asarray(filtered).transpose(1, 0, 2)
    return np.ascontiguousarray(np.rint(levels).astype(np.uint8))


def _compress(image: np.ndarray, quality: int) -> np.ndarray:
    """Compress as JPEG, colours at half the resolution, and decompress."""
    if cv2 := decode.opencv():
        options = [cv2.IMWRITE_JPEG_QUALITY, quality]
        return decode.decode_pixels(cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].ravel())
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    return decode.decode_pixels(stream.getvalue())


def _flip(image: np.ndarray) -> np.ndarray:
    if cv2 := decode.opencv():
        return cv2.flip(image, 1)
    # A third of the time that a copy of image[:, ::-1] takes.
    return image.take(np.arange(image.shape[1] - 1, -1, -1), axis=1)
