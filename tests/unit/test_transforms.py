from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from partial_fc.data import decode
from partial_fc.data.augment import Augmentation, Column
from partial_fc.data.transforms import augment_image, warp_image
from tests import records

SIDE = 48
IMAGE = records.smooth_image(3, SIDE, SIDE)
STILL = Augmentation(flip=0.0).parameters(0, np.arange(1))[0]
ALONE = {
    "flip": Augmentation(flip=1.0),
    "affine": Augmentation(flip=0.0, rotate=0.3, scale=0.2, shift=0.1, fill=200),
    "crop": Augmentation(flip=0.0, crop=1.0),
    "low_resolution": Augmentation(flip=0.0, low_resolution=1.0),
    "colour_twist": Augmentation(flip=0.0, colour_twist=1.0, colour_hue=0.1),
    "grayscale": Augmentation(flip=0.0, grayscale=1.0),
    "blur": Augmentation(flip=0.0, blur=1.0, blur_sigma=4.0),
    "jpeg": Augmentation(flip=0.0, jpeg=1.0),
    "cutout": Augmentation(flip=0.0, cutout=1.0, fill=90),
}


@pytest.fixture(params=["opencv", "pillow"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pillow":
        monkeypatch.setattr(decode, "opencv", lambda: None)
    return request.param


def apply(image: np.ndarray = IMAGE, augmentation: Augmentation | None = None, **columns: object) -> np.ndarray:
    """An image after the augmentations of a row of which some columns are set."""
    row = STILL.copy()
    for name, value in columns.items():
        row[getattr(Column, name)] = value
    result = augment_image(image, augmentation or Augmentation(), row)
    assert result.shape == image.shape and result.dtype == np.uint8 and result.flags.c_contiguous
    return result


def levels(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(float) - b.astype(float))


def test_nothing_happens_to_an_image_without_augmentation(library: str) -> None:
    assert apply() is IMAGE


def test_an_image_is_flipped(library: str) -> None:
    assert np.array_equal(apply(FLIP=1), IMAGE[:, ::-1])


def test_warp_is_bilinear_with_a_fill(library: str) -> None:
    assert np.array_equal(warp_image(IMAGE, np.eye(2, 3, dtype=np.float32), 0), IMAGE)
    # The output's pixel (x, y) shows the source's (x + 2.5, y - 3).
    moved = warp_image(IMAGE, np.array([[1, 0, 2.5], [0, 1, -3]], dtype=np.float32), 77).astype(float)
    expected = (IMAGE[:-3, 2:-1].astype(float) + IMAGE[:-3, 3:]) / 2
    assert levels(moved[3:, :-3], expected).max() <= 0.6
    assert (moved[:3] == 77).all() and (moved[:, -2:] == 77).all()
    # Half of the last column's neighbour is outside: blended with the fill.
    assert levels(moved[3:, -3], (IMAGE[:-3, -1].astype(float) + 77) / 2).max() <= 0.6


def test_the_affine_map_of_a_row_is_applied(library: str) -> None:
    # A quarter turn around the middle; the corners are whole pixels.
    turned = apply(augmentation=Augmentation(rotate=0.1), AFFINE=[0, 1, 0, -1, 0, 0])
    assert np.array_equal(turned, np.rot90(IMAGE, -1))


def test_a_crop_is_enlarged_and_sees_nothing_around_it(library: str) -> None:
    image = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    # A box of 24 x 12 pixels, with its left at floor(0.5 * 25) = 12 and its top at floor(0.25 * 37) = 9.
    image[9:21, 12:36] = np.arange(24, dtype=np.uint8)[:, None] * 4
    cropped = apply(image, CROP=[0.5, 0.25, 0.5, 0.25])
    # Twice as wide: pixel x shows x / 2 - 1/4 of the box, whose first and last pixels are repeated.
    ramp = np.clip((np.arange(SIDE) - 0.5) / 2, 0, 23) * 4
    assert levels(cropped, ramp[:, None]).max() <= 0.5


def triangles(size: int, new_size: int) -> np.ndarray:
    """Weights ``[new_size, size]`` of a bilinear filter that is as wide as a pixel of the coarser of both.

    It sees the outermost pixels again behind the border.
    """
    middles = (np.arange(new_size) + 0.5) * size / new_size
    seen = np.arange(-size, 2 * size)
    weights = np.maximum(0, 1 - np.abs(seen + 0.5 - middles[:, None]) / max(1, size / new_size))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ np.eye(size)[np.clip(seen, 0, size - 1)]


@pytest.mark.parametrize("small", [1, 13, 24, 47])
def test_a_low_resolution_is_filtered_down_and_interpolated_up(small: int, library: str) -> None:
    stripes = IMAGE.copy()
    stripes[:, ::2] = 250
    for image in (IMAGE, stripes):
        there_and_back = triangles(small, SIDE) @ triangles(SIDE, small)
        expected = np.einsum("ij,jkc,lk->ilc", there_and_back, image.astype(float), there_and_back)
        result = apply(image, LOW_RESOLUTION=small / SIDE)
        assert levels(result, expected).max() <= 2 and levels(result, expected).mean() < 0.5


def test_a_low_resolution_keeps_what_has_nothing_to_lose(library: str) -> None:
    flat = np.full_like(IMAGE, 77)
    assert np.array_equal(apply(flat, LOW_RESOLUTION=0.3), flat)
    assert np.array_equal(apply(LOW_RESOLUTION=1), IMAGE)


def test_colours_are_mapped_and_clipped(library: str) -> None:
    matrix = np.array([[2, 0, 0, -100], [0, 0.5, 0.25, 3], [0.2, 0.3, 0, 200]], dtype=np.float32)
    expected = np.clip(IMAGE @ matrix[:, :3].T.astype(float) + matrix[:, 3], 0, 255)
    assert levels(apply(COLOUR=[1, *matrix.ravel()]), expected).max() <= 0.51
    assert np.array_equal(apply(COLOUR=[1, *np.eye(3, 4).ravel()]), IMAGE)


def test_grey_is_luma(library: str) -> None:
    expected = IMAGE @ np.array([0.299, 0.587, 0.114])
    assert levels(apply(GRAYSCALE=1), expected[:, :, None]).max() <= 0.51


def test_a_blur_is_a_gaussian_of_sigma_pixels(library: str) -> None:
    point = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    point[20, 30] = 255
    blurred = apply(point, Augmentation(blur_sigma=4), BLUR=1.5 / SIDE).astype(float)
    y, x = np.mgrid[:SIDE, :SIDE]
    gaussian = np.exp(-((y - 20) ** 2 + (x - 30) ** 2) / (2 * 1.5**2))
    assert levels(blurred[..., 1], 255 * gaussian / gaussian.sum()).max() <= 0.6
    # Mirrored at the border, so that a flat image stays flat.
    flat = np.full_like(point, 200)
    assert np.array_equal(apply(flat, BLUR=2 / SIDE), flat)


def test_a_jpeg_is_what_pillow_makes_of_it(library: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(IMAGE).save(stream, "JPEG", quality=40, subsampling="4:2:0")
    assert levels(apply(JPEG=40), np.asarray(Image.open(stream))).max() <= 1
    assert levels(apply(JPEG=95), IMAGE).mean() < levels(apply(JPEG=30), IMAGE).mean() < 10


def test_a_cutout_is_a_filled_square(library: str) -> None:
    # 12 pixels, at floor(0.5 * 37) = 18 and floor(0.99 * 37) = 36.
    cut = apply(augmentation=Augmentation(fill=9), CUTOUT=[0.25, 0.5, 0.99])
    expected = IMAGE.copy()
    expected[36:48, 18:30] = 9
    assert np.array_equal(cut, expected)


def test_the_order_is_that_of_the_names(library: str) -> None:
    augmentation = Augmentation(shift=0.1, fill=150)
    image = IMAGE
    steps = {
        "AFFINE": [1, 0, 0.1, 0, 1, 0],
        "CROP": [0.6, 0.7, 0.2, 0.9],
        "LOW_RESOLUTION": 0.4,
        "COLOUR": [1, 1.2, 0.1, 0, -9, 0, 0.8, 0, 0, 0.1, 0, 1, 5],
        "GRAYSCALE": 1,
        "BLUR": 0.01,
        "JPEG": 50,
        "CUTOUT": [0.3, 0.2, 0.4],
        "FLIP": 1,
    }
    for name, value in steps.items():
        image = apply(image, augmentation if name in ("AFFINE", "CUTOUT") else None, **{name: value})
    assert np.array_equal(apply(IMAGE, augmentation, **steps), image)


@pytest.mark.parametrize("name", list(ALONE))
def test_both_libraries_do_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    augmentation = ALONE[name]
    rows = augmentation.parameters(1, np.arange(20))
    mine = [augment_image(IMAGE, augmentation, row) for row in rows]
    monkeypatch.setattr(decode, "opencv", lambda: None)
    difference = np.stack(
        [levels(a, augment_image(IMAGE, augmentation, row)) for a, row in zip(mine, rows, strict=True)]
    )
    # OpenCV before 5 rounds the coordinates of a warp to 1/32 pixel.
    assert difference.max() <= (3 if name == "affine" else 1)
    assert difference.mean() < 0.5
    assert any(levels(image, IMAGE).max() > 5 for image in mine)


def test_the_image_given_stays_as_it_is(library: str) -> None:
    given = IMAGE.copy()
    everything = Augmentation(1.0, 0.3, crop=1, low_resolution=1, colour_twist=1, grayscale=1, blur=1, jpeg=1, cutout=1)
    for augmentation in (everything, *ALONE.values()):
        augment_image(given, augmentation, augmentation.parameters(0, np.arange(1))[0])
        assert np.array_equal(given, IMAGE)
