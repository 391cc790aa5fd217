"""Encoded images to pixels, in plain Python: by OpenCV, or by Pillow where there is no OpenCV.

Legend: S side of the images in pixels.
"""

from __future__ import annotations

import functools
import io
import re
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from partial_fc.errors import DataError

# Unless somebody says otherwise: 8192 x 8192, which take 200 MB.
MAX_PIXELS = 1 << 26

FaultKind = Literal["empty", "image", "oversized"]

_END_OF_IMAGE = b"\xff\xd9"
# JPEG's frame headers, SOF0 to SOF15, are C0 to CF but for DHT, JPG and DAC.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN, _END, _FILL = 0xDA, 0xD9, 0xFF
_RESTART, _FIRST_WITH_LENGTH = 0xD0, 0xC0
# How the formats begin whose size is read here, and what Pillow calls the others that are decoded.
_JPEG = b"\xff\xd8"
_OWN_FORMATS = (_JPEG, b"\x89PNG", b"GIF8", b"BM", b"RIFF")
_OTHER_FORMATS = ("JPEG2000", "TIFF", "PPM", "AVIF", "SUN")
# What Pillow raises for bytes that are no image.
_PILLOW_ERRORS = (OSError, EOFError, ValueError, SyntaxError, ArithmeticError, RuntimeError)
# Length, precision, height, width, components.
_FRAME = struct.Struct(">HBHHB")
_ANY_FRAME = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]")


class ImageError(DataError):
    """Bytes that can't be made an image of.

    Attributes:
        kind: ``'empty'`` (no bytes), ``'image'`` (no image, or not all of one), ``'oversized'`` (too many pixels).
    """

    def __init__(self, kind: FaultKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, str(self))


@functools.cache
def opencv() -> ModuleType | None:
    """OpenCV, with its own threads off (the streams have theirs), or None where it can't be imported."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(0)
    return cv2


def inspect_encoded(data: np.ndarray, max_pixels: int = MAX_PIXELS) -> tuple[FaultKind, str] | None:
    """Say what shows to be wrong with an encoded image without decoding it: the first part of :func:`look_at`."""
    return look_at(data, max_pixels)[0]


def look_at(data: np.ndarray, max_pixels: int = MAX_PIXELS) -> tuple[tuple[FaultKind, str] | None, int, int]:
    """Say what shows of an encoded image without decoding it: what is wrong with it, and its size.

    Its size is read from the header of a JPEG, PNG, GIF, BMP or WebP file. Of JPEG 2000, TIFF, PNM, AVIF and Sun raster
    files, Pillow reads the header, which takes longer; nothing is said of what is none of these, nor of a header that
    makes no sense, which the decoder will refuse. A JPEG with an odd header, which it may not refuse, counts by the
    largest frame in it. Releases of the JPEG libraries differ in what they make of a truncated file, an error or an
    image with a grey end, so it's found here: in the compressed data an FF is always followed by a 00, so that an end
    marker behind the header can't be there by chance.

    Args:
        data: uint8 array.
        max_pixels: largest width x height that is put up with.

    Returns:
        The kind of fault (see :class:`ImageError`) and the reason in words, or None where nothing shows; width and
        height in pixels, 0 where something is odd about the header, and for the formats that Pillow reads.
    """
    raw = data.tobytes()
    if len(raw) < 8:
        return ("image" if raw else "empty", f"{len(raw)} bytes are no image: copy the data again"), 0, 0
    if raw.startswith(_JPEG):
        header, width, height = _jpeg_size(raw)
        if not raw.endswith(_END_OF_IMAGE) and raw.rfind(_END_OF_IMAGE, header) < 0:
            reason = f"the JPEG of {len(raw)} bytes is truncated (no end marker): copy the data again"
            return ("image", reason), width, height
    else:
        width, height = _size(raw)
    seen = width, height
    if raw.startswith(_JPEG) and not width:
        seen = _largest_frame(raw)
    elif not raw.startswith(_OWN_FORMATS):
        seen = _size_by_pillow(raw)
    if seen[0] * seen[1] > max_pixels:
        reason = f"{seen[0]} x {seen[1]} pixels, at most {max_pixels} are decoded"
        return ("oversized", f"{reason}: shrink the image, or raise data.max_image_pixels"), width, height
    return None, width, height


def _size_by_pillow(raw: bytes) -> tuple[int, int]:
    """Width and height by Pillow, which reads no more than the header; zeros where it makes nothing of it."""
    Image.init()
    for name in _OTHER_FORMATS:
        # Releases of Pillow differ in what they read. Image.open would have a limit of its own.
        opener, accepts = Image.OPEN.get(name, (None, None))
        try:
            if opener is not None and accepts is not None and accepts(raw[:16]):
                return opener(io.BytesIO(raw), "").size
        except _PILLOW_ERRORS:
            pass
    return 0, 0


def _jpeg_size(raw: bytes) -> tuple[int, int, int]:
    """Walk the segments of a JPEG up to its data: where they end, width and height; zeros where a segment is odd."""
    at, end, size = 2, len(raw) - 10, (0, 0)
    while at < end and raw[at] == _FILL:
        marker = raw[at + 1]
        if marker == _SCAN:
            return at, *size
        # Any number of FF may stand before a marker; those without a length have no place here.
        if marker == _FILL:
            at += 1
            continue
        if marker < _FIRST_WITH_LENGTH or _RESTART <= marker <= _END:
            break
        length = raw[at + 2] << 8 | raw[at + 3]
        if marker in _FRAMES:
            _, _, height, width, components = _FRAME.unpack_from(raw, at + 2)
            if size != (0, 0) or components not in (1, 3, 4) or length != 8 + 3 * components:
                break
            size = width, height
        at += 2 + length
    return 2, 0, 0


def _largest_frame(raw: bytes) -> tuple[int, int]:
    """Width and height of the largest frame header anywhere in a JPEG, for one that only a decoder understands."""
    frames = (_FRAME.unpack_from(raw, found.end()) for found in _ANY_FRAME.finditer(raw, 0, len(raw) - _FRAME.size))
    sizes = ((width, height) for length, _, height, width, parts in frames if length == 8 + 3 * parts)
    return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))


def _size(raw: bytes) -> tuple[int, int]:
    """Width and height by the header of a PNG, GIF, BMP or WebP file; zeros where that says nothing."""
    head = raw[:32].ljust(32, b"\0")
    width, height = 0, 0
    if head.startswith(b"\x89PNG"):
        width, height = struct.unpack_from(">II", head, 16)
    elif head.startswith(b"GIF8"):
        width, height = struct.unpack_from("<HH", head, 6)
    elif head.startswith(b"BM"):
        # The oldest header, of 12 bytes, has half the room. A negative height: from the top downwards.
        oldest = struct.unpack_from("<I", head, 14)[0] == 12
        width, height = struct.unpack_from("<HH" if oldest else "<ii", head, 18)
    elif head.startswith(b"RIFF"):
        width, height = _webp_size(head)
    return abs(width), abs(height)


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height by the first 32 bytes of a WebP file, by the kind of its first chunk."""
    if head[8:16] == b"WEBPVP8 ":
        # The upper two bits of each are a scale for the display.
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if head[8:16] == b"WEBPVP8L":
        bits = struct.unpack_from("<I", head, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if head[8:16] == b"WEBPVP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    return 0, 0


def decode_pixels(encoded: np.ndarray | bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode one image, upright after its EXIF orientation, in its own size.

    Args:
        encoded: JPEG, PNG, or another of the formats of :func:`look_at`; bytes, or a uint8 array.
        max_pixels: largest width x height that is decoded.

    Returns:
        uint8 ``[H, W, 3]``, RGB.

    Raises:
        ImageError: the bytes are no whole image, or one with too many pixels.
    """
    data = np.frombuffer(encoded, dtype=np.uint8) if isinstance(encoded, bytes) else encoded
    if found := inspect_encoded(data, max_pixels):
        raise ImageError(*found)
    begin = data[:8].tobytes()
    image = None
    # OpenCV also reads some formats whose size nobody has seen by now, and it would take memory for any.
    if begin.startswith(_OWN_FORMATS) or _size_by_pillow(data.tobytes()) != (0, 0):
        image = _decode_opencv(data) if opencv() else _decode_pillow(data)
    if image is None:
        raise ImageError("image", f"{data.size} bytes that begin with {begin!r} are no image: copy the data again")
    return image


def decode_image(encoded: np.ndarray | bytes, image_size: int, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode one image, upright after its EXIF orientation, and resize it where it has another size.

    Args:
        encoded: JPEG, PNG, or another of the formats of :func:`look_at`; bytes, or a uint8 array.
        image_size: S.
        max_pixels: largest width x height that is decoded.

    Returns:
        uint8 ``[S, S, 3]``, RGB.

    Raises:
        ImageError: the bytes are no whole image, or one with too many pixels.
    """
    image = decode_pixels(encoded, max_pixels=max_pixels)
    return image if image.shape == (image_size, image_size, 3) else resize_image(image, image_size)


def resize_image(image: np.ndarray, image_size: int) -> np.ndarray:
    """Resize an image, uint8 ``[H, W, 3]``, to ``[S, S, 3]`` by a bilinear filter that is antialiased, as DALI does.

    Where it's made smaller the filter is as wide as two pixels of the result, and behind the border it sees the
    outermost pixels again.
    """
    height, width = image.shape[:2]
    # Pillow also where there is OpenCV, whose bilinear filter isn't antialiased. Pillow's ends at the border, unless
    # there is a frame around what is resized.
    top, left = (-(-side // image_size) if side > image_size else 0 for side in (height, width))
    if top or left:
        if cv2 := opencv():
            image = cv2.copyMakeBorder(image, top, top, left, left, cv2.BORDER_REPLICATE)
        else:
            image = np.pad(image, ((top, top), (left, left), (0, 0)), mode="edge")
    box = (left, top, left + width, top + height)
    return np.asarray(Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BILINEAR, box))


def _decode_opencv(data: np.ndarray) -> np.ndarray | None:
    cv2 = opencv()
    assert cv2 is not None
    direct = getattr(cv2, "IMREAD_COLOR_RGB", None)
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR if direct is None else direct)
    except cv2.error:
        return None
    # A floating-point PNM file becomes something else.
    if image is None or image.dtype != np.uint8 or image.ndim != 3:
        return None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if direct is None else image


def _decode_pillow(data: np.ndarray) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            # Only a TIFF file has 32 bits in whole numbers; OpenCV refuses both.
            if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
                return None
            upright = ImageOps.exif_transpose(image)
            if not upright.mode.startswith("I"):
                return np.asarray(upright.convert("RGB"))
            # 16 bits, which Pillow would cut off at 255.
            return np.repeat((np.asarray(upright) // 257).astype(np.uint8)[..., None], 3, axis=2)
    except (*_PILLOW_ERRORS, Image.DecompressionBombError):
        return None


def normalise_into(image: np.ndarray, out: np.ndarray) -> None:
    """Make an image what the backbone wants. NumPy's loops let other threads run, so this is for those that decode.

    Args:
        image: uint8 ``[S, S, 3]``.
        out: float32 ``[3, S, S]``, contiguous; is filled with (level - 127.5) / 127.5.
    """
    # The planes first: arithmetic on contiguous memory is fast.
    np.copyto(out, image.transpose(2, 0, 1))
    middle = np.float32(127.5)
    np.subtract(out, middle, out=out)
    np.divide(out, middle, out=out)


def decode_images(encoded: Sequence[np.ndarray | bytes], image_size: int, threads: int = 2) -> Tensor:
    """Decode images without augmentation, on the CPU.

    Args:
        encoded: n encoded images.
        image_size: S.
        threads: how many threads decode.

    Returns:
        float32 ``[n, 3, S, S]``, (x - 127.5) / 127.5, RGB.

    Raises:
        ImageError: one of them is no whole image, or one with too many pixels; the message gives its index.
    """
    images = np.empty((len(encoded), 3, image_size, image_size), dtype=np.float32)

    def decode(row: int) -> None:
        try:
            normalise_into(decode_image(encoded[row], image_size), images[row])
        except ImageError as error:
            raise ImageError(error.kind, f"image {row} of {len(encoded)}: {error}") from error

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for _ in pool.map(decode, range(len(encoded))):
            pass
    return torch.from_numpy(images)
