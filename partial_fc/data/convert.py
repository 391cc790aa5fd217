"""Images on their way from one data set to another: copied as they are, or decoded, resized and encoded."""

from __future__ import annotations

import io
import struct
import threading
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from partial_fc.data.archives import Archive
from partial_fc.data.decode import ImageError, decode_image, decode_pixels, inspect_encoded
from partial_fc.data.files import MachineError
from partial_fc.data.sources import Sources
from partial_fc.data.writers import image_ending
from partial_fc.errors import DataError

# MXNet's im2rec.py and InsightFace's face2rec2.py encode with this quality where nothing is said.
_QUALITY = 95
_JPEG_MAX_SIDE = 65500
# A RecordIO part has 29 bits of length; header and image have to fit.
_MAX_RECORD_IMAGE = (1 << 29) - 64
# What Pillow raises on headers and EXIF that are damaged.
_PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    ArithmeticError,
    KeyError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)
_ORIENTATION = 0x0112
# How the formats begin that NVIDIA's list for DALI's decoder names: JPEG, PNG, BMP, TIFF, PNM and JPEG 2000; besides
# WebP. OpenCV reads others too, GIF among them.
_DALI = (
    b"\xff\xd8",
    b"\x89PNG",
    b"BM",
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    *(b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"),
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
)


class Skipped(NamedTuple):
    """A sample that is left out; ``kind`` as in ``faults.FAULT_KINDS``."""

    kind: str
    reason: str


class Ready(NamedTuple):
    """An image as it is written; height and width in pixels."""

    image: bytes
    reencoded: bool
    height: int
    width: int


class _Header(NamedTuple):
    height: int
    width: int
    # By its EXIF orientation.
    upright: bool


class Converter:
    """Reads samples, looks at them, and encodes anew those that have to be. For several threads at once."""

    def __init__(
        self, source: Archive | Sources, format: str, image_size: int | None, quality: int | None, max_pixels: int
    ) -> None:
        self._source = source
        self._format = format
        self._image_size = image_size
        self._quality = quality
        self._max_pixels = max_pixels

    def convert(self, samples: np.ndarray, stopped: threading.Event) -> list[Skipped | Ready]:
        """What becomes of these samples, int64 ``[n]``; of fewer once ``stopped`` is set.

        Raises:
            DataError: the source can't be read.
        """
        images: list[np.ndarray] | list[None]
        try:
            images = self._source.encoded(samples)
        except MachineError:
            raise
        except DataError:
            # One or more of them; each is then read by itself.
            images = [None] * len(samples)
        done = []
        for sample, image in zip(samples.tolist(), images, strict=True):
            if stopped.is_set():
                break
            done.append(self._read(sample) if image is None else self._convert(sample, image))
        return done

    def _read(self, sample: int) -> Skipped | Ready:
        try:
            image = self._source.encoded(np.array([sample], dtype=np.int64))[0]
        except DataError as error:
            if isinstance(error.__cause__, OSError):
                # A disk that is gone for a moment is no reason to leave out what is on it.
                raise
            return Skipped("record", str(error))
        return self._convert(sample, image)

    def _convert(self, sample: int, image: np.ndarray) -> Skipped | Ready:
        try:
            if found := inspect_encoded(image, self._max_pixels):
                raise ImageError(*found)
            data = image.tobytes()
            header = _read_header(data)
            if not self._stays(data, header):
                pixels = self._decode(image)
                return Ready(_encode(pixels, self._quality or _QUALITY), True, pixels.shape[0], pixels.shape[1])
            if header is None:
                # Only the decoder can tell whether this is an image.
                height, width, _ = self._decode(image).shape
                header = _Header(height, width, True)
            if self._format == "recordio" and len(data) > _MAX_RECORD_IMAGE:
                raise ImageError("oversized", f"{len(data)} bytes, a record has room for {_MAX_RECORD_IMAGE}")
            return Ready(data, False, header.height, header.width)
        except ImageError as error:
            return Skipped(error.kind, f"{self._source.locate(sample)}: {error}")

    def _stays(self, data: bytes, header: _Header | None) -> bool:
        """Whether an image is copied as it is: DALI's own readers take what is written, so DALI has to decode it."""
        if self._quality is not None or not _dali_decodes(data):
            return False
        if self._format == "webdataset" and image_ending(data) is None:
            return False
        return self._image_size is None or header == (self._image_size, self._image_size, True)

    def _decode(self, image: np.ndarray) -> np.ndarray:
        if self._image_size is None:
            return decode_pixels(image, max_pixels=self._max_pixels)
        return decode_image(image, self._image_size, max_pixels=self._max_pixels)


def _read_header(data: bytes) -> _Header | None:
    """What the header says; None of a format that Pillow doesn't know, or of a header that is damaged."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            # Without this look getexif would decode a PNG.
            has_exif = "exif" in image.info or image.format == "TIFF"
            upright = not has_exif or image.getexif().get(_ORIENTATION, 1) == 1
            return _Header(image.height, image.width, upright)
    except _PILLOW_ERRORS:
        return None


def _dali_decodes(data: bytes) -> bool:
    """Whether an image has a format that DALI decodes."""
    return data.startswith(_DALI) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def _encode(pixels: np.ndarray, quality: int) -> bytes:
    """JPEG of uint8 ``[H, W, 3]`` RGB, its colour not subsampled. OpenCV lets other threads run meanwhile."""
    if max(pixels.shape[:2]) > _JPEG_MAX_SIDE:
        raise ImageError("oversized", f"{pixels.shape[1]} x {pixels.shape[0]} pixels, JPEG has {_JPEG_MAX_SIDE} a side")
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1].tobytes()
