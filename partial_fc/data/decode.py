"""Encoded images to pixels, in plain Python: by OpenCV, or by Pillow where there is no OpenCV.

Legend: S side of the images in pixels.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from partial_fc.errors import DataError


@functools.cache
def _opencv() -> ModuleType | None:
    """OpenCV, with its own threads off (the streams have theirs), or None where it can't be imported."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(0)
    return cv2


def decode_image(encoded: np.ndarray | bytes, image_size: int) -> np.ndarray:
    """Decode one image, upright after its EXIF orientation, and resize it where it has another size.

    Args:
        encoded: JPEG, PNG and whatever else the image library reads; bytes, or a uint8 array.
        image_size: S.

    Returns:
        uint8 ``[S, S, 3]``, RGB.

    Raises:
        DataError: the bytes are no whole image.
    """
    data = np.frombuffer(encoded, dtype=np.uint8) if isinstance(encoded, bytes) else encoded
    if fault := visible_damage(data):
        raise DataError(f"{fault}: copy the data again")
    image = _decode_opencv(data) if _opencv() else _decode_pillow(data)
    if image is None:
        begin = data[:8].tobytes()
        raise DataError(f"{data.size} bytes that begin with {begin!r} are no image: copy the data again")
    if image.shape != (image_size, image_size, 3):
        # Pillow also where OpenCV decodes: its bilinear filter is antialiased, as DALI's is.
        resized = Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BILINEAR)
        image = np.asarray(resized)
    return image


def visible_damage(data: np.ndarray) -> str | None:
    """Say what is wrong with bytes that can't be a whole image, without decoding them; None where nothing shows.

    Releases of the JPEG libraries differ in what they make of a truncated file: an error, or an image with a grey end.
    In the compressed data an FF is always followed by a 00, so the end marker can't be there by chance.
    """
    if data.size < 8:
        return f"{data.size} bytes are no image"
    if data[0] == 0xFF and data[1] == 0xD8 and data.tobytes().rfind(b"\xff\xd9") < 0:
        return f"the JPEG of {data.size} bytes is truncated (no end marker)"
    return None


def _decode_opencv(data: np.ndarray) -> np.ndarray | None:
    cv2 = _opencv()
    assert cv2 is not None
    direct = getattr(cv2, "IMREAD_COLOR_RGB", None)
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR if direct is None else direct)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if image is not None and direct is None else image
    except cv2.error:
        return None


def _decode_pillow(data: np.ndarray) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, Image.DecompressionBombError):
        return None


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
    if cv2 := _opencv():
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


def normalise(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Images as the backbone wants them: uint8 ``[n, S, S, 3]`` -> float32 ``[n, 3, S, S]``, (x - 127.5) / 127.5."""
    images = torch.from_numpy(pixels)
    if device.type == "cuda":
        images = images.pin_memory().to(device, non_blocking=True)
    elif device.type != "cpu":
        images = images.to(device)
    return images.permute(0, 3, 1, 2).contiguous().sub(127.5).div_(127.5)


def decode_images(encoded: Sequence[np.ndarray | bytes], image_size: int, threads: int = 2) -> Tensor:
    """Decode images without augmentation, on the CPU.

    Args:
        encoded: n encoded images.
        image_size: S.
        threads: how many threads decode.

    Returns:
        float32 ``[n, 3, S, S]``, (x - 127.5) / 127.5, RGB.

    Raises:
        DataError: one of them is no whole image; the message gives its index.
    """
    pixels = np.empty((len(encoded), image_size, image_size, 3), dtype=np.uint8)

    def decode(row: int) -> None:
        try:
            pixels[row] = decode_image(encoded[row], image_size)
        except DataError as error:
            raise DataError(f"image {row} of {len(encoded)}: {error}") from error

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for _ in pool.map(decode, range(len(encoded))):
            pass
    return normalise(pixels, torch.device("cpu"))
