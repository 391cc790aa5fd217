from __future__ import annotations

import io
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from partial_fc.data import decode
from partial_fc.data.decode import (
    ImageError,
    decode_image,
    decode_images,
    decode_pixels,
    inspect_encoded,
    look_at,
    normalise_into,
    resize_image,
)
from partial_fc.errors import DataError
from tests import records

SIDE = 32
SMOOTH = records.smooth_image(0, SIDE, SIDE)
GOOD = records.encode(SMOOTH, quality=90)
WIDE = records.smooth_image(1, 20, 300)
# Every format whose header is read, 300 x 20 pixels.
FORMATS = {
    "JPEG": records.encode(WIDE),
    "JPEG, grey": records.encode(WIDE[..., 0]),
    "JPEG, progressive": records.encode(WIDE, progressive=True),
    "JPEG, FF before a marker": records.encode(WIDE)[:2] + b"\xff\xff" + records.encode(WIDE)[2:],
    "PNG": records.encode(WIDE, "PNG"),
    "GIF": records.encode(WIDE, "GIF"),
    "BMP": records.encode(WIDE, "BMP"),
    "BMP, upside down": records.encode(WIDE, "BMP")[:22] + struct.pack("<i", -20) + records.encode(WIDE, "BMP")[26:],
    "BMP, oldest": b"BM" + bytes(12) + struct.pack("<IHHHH", 12, 300, 20, 1, 24) + bytes(40),
    "WebP": records.encode(WIDE, "WEBP"),
    "WebP, lossless": records.encode(WIDE, "WEBP", lossless=True),
    "WebP, extended": records.encode(np.dstack([WIDE, WIDE[..., 0]]), "WEBP", exif=b"Exif\0\0" + bytes(20)),
}
# Those whose header tells the size in another way.
OTHERS = {
    "TIFF": records.encode(WIDE, "TIFF"),
    "TIFF, deflated": records.encode(WIDE, "TIFF", compression="tiff_adobe_deflate"),
    "JPEG 2000": records.encode(WIDE, "JPEG2000"),
    "JPEG 2000, codestream": records.encode(WIDE, "JPEG2000", no_jp2=True),
    "PPM": records.encode(WIDE, "PPM"),
    "PGM": records.encode(WIDE[..., 0], "PPM"),
    "PBM": b"P4 300 20\n" + bytes(38 * 20),
    # Bytes before a marker, which the JPEG libraries pass over.
    "JPEG, odd": FORMATS["JPEG"][:20] + b"\0\0" + FORMATS["JPEG"][20:],
}


@pytest.fixture(params=["opencv", "pillow"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pillow":
        monkeypatch.setattr(decode, "opencv", lambda: None)
    return request.param


def as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def with_thumbnail(jpeg: bytes) -> bytes:
    """The same image with a small one, end marker and all, in its header."""
    content = b"Exif\0\0" + records.encode(records.smooth_image(5, 8, 8))
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(content)) + content + jpeg[2:]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_are_rgb(kind: str, library: str) -> None:
    image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    image[..., 0], image[..., 1] = 200, 50
    result = decode_image(records.encode(image, kind), SIDE)
    assert result.shape == (SIDE, SIDE, 3) and result.dtype == np.uint8
    assert np.abs(result.astype(int) - [200, 50, 0]).max() <= 4


def test_grey_and_turned_images(library: str) -> None:
    image = records.smooth_image(1, SIDE, SIDE)
    grey = decode_image(records.encode(image[..., 0], "PNG"), SIDE)
    assert np.array_equal(grey, np.repeat(image[..., :1], 3, axis=2))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = decode_image(records.encode(image, quality=95, subsampling=0, exif=exif), SIDE)
    assert np.abs(turned.astype(int) - image[::-1, ::-1]).mean() < 4


def test_pixels_come_in_their_own_size(library: str) -> None:
    assert np.array_equal(decode_pixels(records.encode(WIDE, "PNG")), WIDE)
    assert decode_image(records.encode(WIDE), SIDE).shape == (SIDE, SIDE, 3)


def test_images_of_another_size_are_resized_with_a_filter(library: str) -> None:
    stripes = np.zeros((4 * SIDE, 4 * SIDE, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    result = decode_image(records.encode(stripes, "PNG"), SIDE)
    assert result.shape == (SIDE, SIDE, 3)
    assert np.abs(result[:, 2:-2].astype(int) - 127).max() <= 2
    assert decode_image(records.encode(records.smooth_image(2, 20, 50)), SIDE).shape == (SIDE, SIDE, 3)


def test_the_filter_sees_the_outermost_pixels_again_behind_the_border(library: str) -> None:
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[:, None] * 4, 3, axis=1)[None].repeat(20, axis=0)
    result = resize_image(ramp, 16)
    # A pixel of the result is 4 wide, its triangle 8: the first is the mean of 0, 0, 0, 1, 2, 3, 4, 5 by the triangle.
    triangle = np.array([0.5, 1.5, 2.5, 3.5, 3.5, 2.5, 1.5, 0.5])
    expected = 4 * (triangle @ [0, 0, 0, 1, 2, 3, 4, 5]) / triangle.sum()
    assert np.abs(result[:, 0] - expected).max() <= 1
    assert np.array_equal(resize_image(WIDE[:, :20], 20), WIDE[:, :20])


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", "empty", "0 bytes are no image"),
        (b"GIF89a", "image", "6 bytes are no image"),
        (b"not an image at all", "image", "19 bytes that begin with b'not an i' are no image"),
        (GOOD[: len(GOOD) // 2], "image", "JPEG of .* bytes is truncated"),
        (GOOD[:-2], "image", "JPEG of .* bytes is truncated"),
        (with_thumbnail(GOOD)[:-20], "image", "JPEG of .* bytes is truncated"),
        (GOOD[:30] + b"\xff\xd9", "image", "are no image"),
        (records.encode(SMOOTH, "PNG")[:200], "image", "are no image"),
    ],
)
def test_broken_images_are_refused(data: bytes, kind: str, message: str, library: str) -> None:
    for encoded in (data, as_array(data)):
        with pytest.raises(ImageError, match=message + ".*copy the data again") as caught:
            decode_image(encoded, SIDE)
        assert caught.value.kind == kind and isinstance(caught.value, DataError)


@pytest.mark.parametrize("name", list(FORMATS))
def test_images_with_too_many_pixels_are_seen_by_their_header(name: str) -> None:
    data = as_array(FORMATS[name])
    assert inspect_encoded(data, 300 * 20) is None
    found = inspect_encoded(data, 300 * 20 - 1)
    assert found is not None and found[0] == "oversized"
    assert found[1] == ("300 x 20 pixels, at most 5999 are decoded: shrink the image, or raise data.max_image_pixels")


@pytest.mark.parametrize("name", list(OTHERS))
def test_the_size_of_other_formats_is_read_too(name: str) -> None:
    data = as_array(OTHERS[name])
    assert look_at(data, 300 * 20) == (None, 0, 0)
    assert decode_pixels(data).shape == (20, 300, 3)
    fault, *size = look_at(data, 300 * 20 - 1)
    assert fault is not None and size == [0, 0]
    assert fault == (
        "oversized",
        "300 x 20 pixels, at most 5999 are decoded: shrink the image, or raise data.max_image_pixels",
    )


def test_a_small_tiff_of_too_many_pixels_is_not_decoded(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.new("1", (16_000, 16_000)).save(stream, "TIFF", compression="group4")
    monkeypatch.setattr(decode, f"_decode_{library}", lambda data: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="16000 x 16000 pixels, at most 67108864 are decoded") as caught:
        decode_image(stream.getvalue(), SIDE)
    assert caught.value.kind == "oversized"


@pytest.mark.parametrize("suffix", [".hdr", ".pam", ".pfm"])
def test_formats_whose_size_nobody_reads_are_no_images(suffix: str) -> None:
    if (cv2 := decode.opencv()) is None:
        pytest.skip("no OpenCV, which alone would decode them")
    image = SMOOTH if suffix == ".pam" else SMOOTH.astype(np.float32)
    data = cv2.imencode(suffix, image)[1].ravel()
    assert inspect_encoded(data) is None
    with pytest.raises(ImageError, match="are no image: copy the data again"):
        decode_pixels(data)


def in_mode(mode: str, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(WIDE).convert(mode).save(stream, kind)
    return stream.getvalue()


GREY = np.asarray(Image.fromarray(WIDE).convert("L"))
LEVELS = GREY.astype(np.uint16) * 257 + 100
MODES = {
    **{mode: in_mode(mode) for mode in ("L", "LA", "RGB", "P", "1")},
    "RGBA": records.encode(np.dstack([WIDE, GREY]), "PNG"),
    "CMYK": in_mode("CMYK", "JPEG"),
    "I;16": records.encode(LEVELS, "PNG"),
    "I;16 of TIFF": records.encode(LEVELS, "TIFF"),
    "I;16B of TIFF": records.encode(LEVELS.astype(">u2"), "TIFF"),
    "I": b"P5 300 20 65535\n" + LEVELS.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("mode", list(MODES))
def test_the_libraries_decode_each_mode_alike(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if decode.opencv() is None:
        pytest.skip("no OpenCV")
    by_opencv = decode_pixels(MODES[mode])
    monkeypatch.setattr(decode, "opencv", lambda: None)
    by_pillow = decode_pixels(MODES[mode])
    assert by_pillow.shape == by_opencv.shape == WIDE.shape and by_pillow.dtype == np.uint8
    assert np.abs(by_pillow.astype(int) - by_opencv).max() <= (2 if mode == "CMYK" else 1)
    if mode.startswith("I"):
        assert np.abs(by_pillow.astype(int) - GREY[..., None]).max() <= 1


def test_levels_of_more_than_16_bits_are_refused(library: str) -> None:
    for levels in (GREY.astype(np.float32), GREY.astype(np.int32)):
        with pytest.raises(ImageError, match="are no image"):
            decode_pixels(records.encode(levels, "TIFF"))


@pytest.mark.timeout(60)
def test_images_with_too_many_pixels_are_not_decoded(library: str) -> None:
    huge = bytearray(records.encode(SMOOTH, "PNG"))
    huge[16:24] = struct.pack(">II", 1_000_000, 1_000_000)
    for encoded, limit in ((bytes(huge), 1 << 26), (GOOD, SIDE * SIDE - 1)):
        for function in (decode_pixels, lambda data, **limits: decode_image(data, SIDE, **limits)):
            with pytest.raises(ImageError, match="pixels, at most .* are decoded") as caught:
                function(encoded, max_pixels=limit)
            assert caught.value.kind == "oversized"
    assert decode_image(GOOD, SIDE, max_pixels=SIDE * SIDE).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("name", list(FORMATS))
def test_nothing_is_found_in_whole_images(name: str) -> None:
    assert inspect_encoded(as_array(FORMATS[name])) is None
    assert inspect_encoded(as_array(FORMATS[name] + b"\0\0\0tail")) is None


def test_nothing_is_found_in_a_jpeg_with_a_thumbnail() -> None:
    assert inspect_encoded(as_array(with_thumbnail(GOOD))) is None
    found = inspect_encoded(as_array(with_thumbnail(records.encode(WIDE))), 100)
    assert found is not None and "300 x 20" in found[1]


@given(st.integers(0, len(GOOD) - 1))
@settings(max_examples=200, deadline=None)
def test_every_truncated_jpeg_is_found(length: int) -> None:
    found = inspect_encoded(as_array(GOOD[:length]))
    assert found is not None and found[0] == ("image" if length else "empty")


@given(
    st.sampled_from(
        [
            b"",
            b"\xff\xd8",
            b"\xff\xd8\xff",
            b"\x89PNG",
            b"GIF8",
            b"BM",
            b"RIFF\0\0\0\0WEBPVP8",
            b"II*\0",
            b"MM\0*",
            b"P6 ",
        ]
    ),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_can_be_looked_at(begin: bytes, data: st.DataObject) -> None:
    found = inspect_encoded(as_array(begin + data.draw(st.binary(max_size=60))))
    assert found is None or found[0] in ("empty", "image", "oversized")


@given(st.integers(2, 200), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_a_jpeg_with_a_changed_byte_can_be_looked_at(at: int, value: int) -> None:
    changed = bytearray(with_thumbnail(GOOD))
    changed[at] = value
    inspect_encoded(as_array(bytes(changed)))


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("oversized", "9 x 9 pixels")))
    assert isinstance(error, ImageError) and error.kind == "oversized" and str(error) == "9 x 9 pixels"


def test_levels_are_normalised_to_the_last_bit() -> None:
    image = np.arange(16 * 16 * 3, dtype=np.uint32).astype(np.uint8).reshape(16, 16, 3)
    out = np.full((3, 16, 16), np.nan, dtype=np.float32)
    normalise_into(image, out)
    assert torch.equal(torch.from_numpy(out), torch.from_numpy(image).permute(2, 0, 1).sub(127.5).div_(127.5))
    assert set(image.ravel().tolist()) == set(range(256))


def test_decode_images_normalises() -> None:
    images = [records.encode(np.full((SIDE, SIDE, 3), level, dtype=np.uint8), "PNG") for level in (0, 255, 51)]
    result = decode_images(images, SIDE)
    assert result.shape == (3, 3, SIDE, SIDE) and result.dtype == torch.float32 and result.is_contiguous()
    for image, value in zip(result, (-1.0, 1.0, -0.6), strict=True):
        assert torch.allclose(image, torch.tensor(value))
    assert decode_images([], SIDE).shape == (0, 3, SIDE, SIDE)
    with pytest.raises(ImageError, match="image 1 of 2: ") as caught:
        decode_images([images[0], b""], SIDE)
    assert caught.value.kind == "empty"
