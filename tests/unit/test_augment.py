from __future__ import annotations

import colorsys
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_fc.data import augment
from partial_fc.data.augment import Augmentation, Column, blur_kernel, first_pixel, pixel_matrices, pixels
from partial_fc.errors import ConfigError

CHANCES = ("flip", "crop", "low_resolution", "colour_twist", "grayscale", "blur", "jpeg", "cutout")
COLUMNS = {
    "flip": Column.FLIP,
    "affine": Column.AFFINE,
    "crop": Column.CROP,
    "low_resolution": Column.LOW_RESOLUTION,
    "colour_twist": Column.COLOUR,
    "grayscale": Column.GRAYSCALE,
    "blur": Column.BLUR,
    "jpeg": Column.JPEG,
    "cutout": Column.CUTOUT,
}
ALL = Augmentation(rotate=0.3, scale=0.2, shift=0.1, colour_hue=0.1, **dict.fromkeys(CHANCES, 0.5))


def always(**changes: float) -> np.ndarray:
    """Parameters of 5,000 samples, as float64."""
    return Augmentation(**{"flip": 0.0, **changes}).parameters(0, np.arange(5000)).astype(np.float64)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """All values are in the range, fill it, and have its mean and its quarters."""
    span = high - low
    assert values.min() >= low - 1e-6 * span and values.max() <= high + 1e-6 * span
    quarters = np.quantile(values, [0.001, 0.25, 0.5, 0.75, 0.999])
    assert np.abs(quarters - (low + span * np.array([0, 0.25, 0.5, 0.75, 1]))).max() < 0.03 * span


def test_parameters_are_a_function_of_seed_and_position() -> None:
    all_ = ALL.parameters(3, np.arange(1000))
    assert all_.shape == (1000, Column.COUNT) and all_.dtype == np.float32
    some = np.array([999, 0, 512, 512])
    assert np.array_equal(ALL.parameters(3, some), all_[some])
    assert not np.array_equal(ALL.parameters(4, some), all_[some])
    assert ALL.parameters(3, np.arange(0)).shape == (0, Column.COUNT)


def test_columns_stand_side_by_side() -> None:
    found = [column for part in COLUMNS.values() for column in np.r_[part].tolist()]
    assert sorted(found) == list(range(Column.COUNT))


@given(st.integers(0, 2**60), st.sets(st.sampled_from((*CHANCES, "rotate", "shift"))), st.integers())
@settings(max_examples=60, deadline=None)
def test_an_augmentation_switched_off_changes_no_other(position: int, off: set[str], seed: int) -> None:
    positions = position + np.arange(20)
    everything = ALL.parameters(seed, positions)
    fewer = dataclasses.replace(ALL, **dict.fromkeys(off, 0.0))
    parameters = fewer.parameters(seed, positions)
    for name, column in COLUMNS.items():
        if name == "affine":
            if not off & {"rotate", "shift"}:
                assert np.array_equal(parameters[:, column], everything[:, column])
        else:
            expected = 0 if name in off else everything[:, column]
            assert np.array_equal(parameters[:, column], np.broadcast_to(expected, parameters[:, column].shape))


def test_flips_and_affine_maps_are_those_of_earlier_releases() -> None:
    parameters = Augmentation(flip=0.4, rotate=0.3, scale=0.2, shift=0.1).parameters(5, np.array([0, 1, 10**12]))
    expected = [
        [1.0, 0.879791, 0.08480168, -0.0038108798, -0.08480168, 0.879791, -0.076188736],
        [1.0, 0.8943209, 0.05040655, -0.031043692, -0.05040655, 0.8943209, 0.012997131],
        [0.0, 1.1008972, -0.0011872303, -0.10556021, 0.0011872303, 1.1008972, 0.09729666],
    ]
    assert np.array_equal(parameters[:, :7], np.array(expected, dtype=np.float32))


def test_probabilities_are_kept() -> None:
    chances = dict(zip(CHANCES, (0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6), strict=True))
    parameters = Augmentation(**chances).parameters(0, np.arange(20_000))
    applied = {name: parameters[:, np.r_[COLUMNS[name]][0]] != 0 for name in CHANCES}
    for name, chance in chances.items():
        assert abs(applied[name].mean() - chance) < 0.02
    for one in CHANCES:
        for other in CHANCES:
            if one != other:
                # Independent of each other.
                both = (applied[one] & applied[other]).mean()
                assert abs(both - chances[one] * chances[other]) < 0.02
    assert np.all(always(crop=1.0, blur=1.0)[:, [Column.CROP.start, Column.BLUR]] > 0)


def test_everything_is_drawn_independently() -> None:
    settings_ = dict(rotate=0.1, scale=0.1, shift=0.1, crop_area=0.5, crop_aspect=1.1)
    drawn = always(**settings_, **dict.fromkeys(CHANCES, 1.0))
    width, height, x, y = drawn[:, Column.CROP].T
    affine, colours = drawn[:, Column.AFFINE], drawn[:, Column.COLOUR]
    contrast, grey = colours[:, 4], colours[:, 1:4].sum(axis=1)
    values = [affine[:, 1], affine[:, 0], affine[:, 2], affine[:, 5], width * height, width / height, x, y]
    values += [drawn[:, column] for column in (Column.LOW_RESOLUTION, Column.BLUR, Column.JPEG)]
    values += [contrast, grey / (1 - contrast / 127.5), colours[:, 1] / grey, *drawn[:, Column.CUTOUT].T]
    applied = always(**settings_, **dict.fromkeys(CHANCES, 0.5))
    values += [applied[:, np.r_[COLUMNS[name]][0]] != 0 for name in CHANCES]
    correlations = np.corrcoef(values) - np.eye(len(values))
    assert len(values) == 25 and np.abs(correlations).max() < 0.06


def test_the_affine_range_is_filled_and_kept() -> None:
    matrices = always(rotate=0.3, scale=0.2, shift=0.1)[:, Column.AFFINE].reshape(-1, 2, 3)
    # Back to what happens to the image: the inverse map.
    inverse = np.linalg.inv(matrices[:, :, :2])
    assert_uniform(np.sqrt(np.linalg.det(inverse)) - 1, -0.2, 0.2)
    assert_uniform(np.arctan2(inverse[:, 1, 0], inverse[:, 0, 0]), -0.3, 0.3)
    shift = -np.einsum("nij,nj->ni", inverse, matrices[:, :, 2])
    assert_uniform(shift[:, 0], -0.1, 0.1)
    assert_uniform(shift[:, 1], -0.1, 0.1)
    # Rotated and scaled only, never sheared.
    assert np.allclose(inverse[:, 0, 0], inverse[:, 1, 1]) and np.allclose(inverse[:, 0, 1], -inverse[:, 1, 0])


def test_crops_have_the_areas_and_ratios_asked_for() -> None:
    width, height, x, y = always(crop=1.0, crop_area=0.3, crop_aspect=1.5)[:, Column.CROP].T
    assert_uniform(width * height, 0.3, 1.0)
    assert max(width.max(), height.max()) <= 1
    ratio = np.log(width / height)
    assert np.abs(ratio).max() <= np.log(1.5) + 1e-6
    # Where every ratio fits, all of them come.
    assert_uniform(ratio[width * height < 1 / 1.5], -np.log(1.5), np.log(1.5))
    assert_uniform(x, 0, 1)
    assert_uniform(y, 0, 1)
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.05


def test_strengths_fill_their_ranges() -> None:
    assert_uniform(always(low_resolution=1.0, low_resolution_side=0.4)[:, Column.LOW_RESOLUTION], 0.4, 1.0)
    assert_uniform(always(blur=1.0, blur_sigma=3.0)[:, Column.BLUR] * 112, 0, 3.0)
    assert_uniform(always(cutout=1.0, cutout_side=0.3)[:, Column.CUTOUT][:, 0], 0, 0.3)
    qualities, counts = np.unique(always(jpeg=1.0, jpeg_quality=86)[:, Column.JPEG], return_counts=True)
    assert qualities.tolist() == list(range(86, 96))
    assert counts.min() > 400


def test_a_positive_turn_of_the_hue_goes_from_orange_to_purple() -> None:
    options = Augmentation(flip=0, colour_twist=1.0, colour_strength=0.0, colour_hue=0.25)
    positions = np.arange(200)
    drawn = options.parameters(3, positions)[:, Column.COLOUR][:, 1:].reshape(-1, 3, 4)
    numbers = augment.random_unit(augment.hash64(3, augment._STREAM_TAG), augment._NUMBERS, positions)
    colour = np.array([0.6, 0.4, 0.3])
    for matrix, number in zip(drawn, numbers[:, augment._HUE], strict=True):
        # By the standard library: the angle of (I, Q), orange and purple, grows.
        y, i, q = colorsys.rgb_to_yiq(*colour)
        turn = 2 * math.pi * 0.25 * (2 * number - 1)
        turned = (i * math.cos(turn) - q * math.sin(turn), i * math.sin(turn) + q * math.cos(turn))
        expected = colorsys.yiq_to_rgb(y, *turned)
        # Its coefficients have two digits.
        assert np.allclose(matrix @ [*colour, 1], expected, atol=0.02)
    assert numbers[:, augment._HUE].min() < 0.1 and numbers[:, augment._HUE].max() > 0.9


def test_colours_are_scaled_around_grey() -> None:
    twisted = always(colour_twist=1.0, colour_strength=0.4, colour_hue=0.2)[:, Column.COLOUR]
    assert (twisted[:, 0] == 1).all()
    matrices = twisted[:, 1:].reshape(-1, 3, 4)
    # Grey stays grey: contrast x brightness; and the offset of the contrast.
    greys = matrices[:, :, :3].sum(axis=2)
    assert np.allclose(greys, greys[:, :1], atol=1e-6)
    contrast = 1 - matrices[:, 0, 3] / 127.5
    assert_uniform(contrast, 0.6, 1.4)
    assert_uniform(greys[:, 0] / contrast, 0.6, 1.4)
    # What is not grey: stretched by the saturation, turned by the hue, and no other change of luma.
    luma = np.array([0.299, 0.587, 0.114])
    colours = matrices[:, :, :3] / greys[:, :1, None]
    assert np.allclose(luma @ colours, luma, atol=1e-5)
    grey = np.tile(luma, (3, 1))
    saturation = np.sqrt(np.linalg.det(colours))
    assert_uniform(saturation, 0.6, 1.4)
    turn = np.arccos(np.clip((np.trace(colours, axis1=1, axis2=2) - 1) / (2 * saturation), -1, 1)) / (2 * np.pi)
    assert_uniform(turn, 0, 0.2)
    still = always(colour_twist=1.0, colour_strength=0.4)[:, Column.COLOUR][:, 1:].reshape(-1, 3, 4)[:, :, :3]
    saturation = np.sqrt(np.linalg.det(still / still.sum(axis=2)[:, :1, None]))[:, None, None]
    assert np.allclose(
        still / still.sum(axis=2)[:, :1, None], saturation * np.eye(3) + (1 - saturation) * grey, atol=1e-5
    )


def test_nothing_to_do_is_the_identity() -> None:
    still = Augmentation(flip=0)
    assert still.identity and not still.affine and still.active == ()
    expected = np.zeros((3, Column.COUNT))
    expected[:, Column.AFFINE] = [1, 0, 0, 0, 1, 0]
    assert np.array_equal(still.parameters(0, np.arange(3)), expected)
    assert Augmentation().active == ("flip",)
    assert Augmentation(flip=0, shift=0.1).active == ("affine",)
    assert ALL.active == ("affine", *CHANCES[1:], "flip") and not ALL.identity
    assert Augmentation(flip=0, jpeg=0.1, crop=0.2).active == ("crop", "jpeg")


def test_pixel_matrices_turn_around_the_middle() -> None:
    parameters = np.zeros((2, Column.COUNT), dtype=np.float32)
    parameters[:, Column.AFFINE] = [[0, 1, 0, -1, 0, 0], [1, 0, 0.25, 0, 1, -0.5]]
    quarter, shifted = pixel_matrices(parameters, 8)
    # The output's upper left corner shows the source's lower left one; the middle stays.
    assert np.allclose(quarter @ [0, 0, 1], [0, 8])
    assert np.allclose(quarter @ [4, 4, 1], [4, 4])
    assert np.allclose(shifted @ [1, 5, 1], [3, 1])


@given(st.integers(0, 2**60), st.integers(1, 300), st.floats(0.01, 1), st.floats(1, 10), st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_boxes_lie_inside_the_image(seed: int, side: int, area: float, aspect: float, cutout: float) -> None:
    augmentation = Augmentation(crop=0.8, crop_area=area, crop_aspect=aspect, cutout=0.8, cutout_side=cutout)
    parameters = augmentation.parameters(seed, np.arange(200)).astype(np.float64)
    width, height, x, y = parameters[:, Column.CROP].T
    square, across, down = parameters[:, Column.CUTOUT].T
    for length, position in ((width, x), (height, y), (square, across), (square, down)):
        whole = pixels(length, side)
        first = first_pixel(position, whole, side)
        assert np.array_equal(whole == 0, length == 0)
        assert np.array_equal(whole, whole.astype(int)) and np.array_equal(first, first.astype(int))
        assert first.min() >= 0 and (first + whole).max() <= side
        assert np.abs(whole - length * side).max() <= max(0.5, 1 - length[length > 0].min(initial=1) * side)
        # One by one the same.
        singly = [pixels(value, side) for value in length.tolist()]
        assert singly == whole.tolist()
        assert [first_pixel(*pair, side) for pair in zip(position.tolist(), singly, strict=True)] == first.tolist()


@pytest.mark.parametrize("unit", [0.0, 0.5, 1 - 2.0**-32])
def test_the_largest_and_smallest_random_numbers_stay_inside(unit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "random_unit", lambda key, streams, index: np.full((len(index), streams), unit))
    row = dataclasses.replace(ALL, **dict.fromkeys(CHANCES, 1.0)).parameters(0, np.arange(1))[0].astype(np.float64)
    width, height, x, y = row[Column.CROP].tolist()
    square, across, down = row[Column.CUTOUT].tolist()
    for length, position in ((width, x), (height, y), (square, across), (square, down)):
        whole = pixels(length, 112)
        assert 1 <= whole <= 112 and 0 <= first_pixel(position, whole, 112) <= 112 - whole
    assert (
        0.2 <= row[Column.LOW_RESOLUTION] <= 1 and 0 < row[Column.BLUR] < 2.0001 / 112 and 30 <= row[Column.JPEG] <= 95
    )
    assert np.isfinite(row).all()


def test_every_place_of_a_box_comes() -> None:
    parameters = always(cutout=1.0, cutout_side=0.5)[:, Column.CUTOUT]
    whole = pixels(parameters[:, 0], 8)
    assert set(whole.tolist()) == {1, 2, 3, 4}
    for length in (1, 2, 3, 4):
        firsts = first_pixel(parameters[whole == length, 1], whole[whole == length], 8)
        assert set(firsts.tolist()) == set(range(9 - length))


def test_blur_kernels_are_gaussians() -> None:
    assert Augmentation(blur_sigma=2.0).blur_radius(112) == 6
    assert Augmentation(blur_sigma=2.0).blur_radius(224) == 12
    kernels = blur_kernel(np.array([0.0, 1.5, 1e-9]), 6)
    assert kernels.shape == (3, 13) and kernels.dtype == np.float32
    assert not kernels[0].any()
    assert np.allclose(kernels[1:].sum(axis=1), 1)
    assert np.array_equal(kernels[2], np.eye(13, dtype=np.float32)[6])
    offsets = np.arange(-6, 7)
    assert abs((kernels[1] * offsets**2).sum() - 1.5**2) < 0.01
    assert np.array_equal(blur_kernel(1.5, 6), kernels[1])


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("flip", 1.5, "from 0 to 1"),
        ("rotate", -0.1, "from 0 to 3.14159"),
        ("scale", 1.0, "from 0 to 0.99"),
        ("shift", float("nan"), "from 0 to 1"),
        ("fill", 256, "from 0 to 255"),
        ("crop", -1.0, "from 0 to 1"),
        ("crop_area", 0.0, "from 0.01 to 1"),
        ("crop_aspect", 0.5, "from 1 to 10"),
        ("low_resolution", 2.0, "from 0 to 1"),
        ("low_resolution_side", 1.1, "from 0.01 to 1"),
        ("colour_twist", float("nan"), "from 0 to 1"),
        ("colour_strength", 1.0, "from 0 to 0.99"),
        ("colour_hue", 0.6, "from 0 to 0.5"),
        ("grayscale", -0.5, "from 0 to 1"),
        ("blur", float("inf"), "from 0 to 1"),
        ("blur_sigma", 0.0, "from 0.01 to 20"),
        ("jpeg", 7, "from 0 to 1"),
        ("jpeg_quality", 96, "from 1 to 95"),
        ("cutout", 1.01, "from 0 to 1"),
        ("cutout_side", 0, "from 0.01 to 1"),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: float, limits: str) -> None:
    with pytest.raises(ConfigError, match=f"^augment.{name} must be {limits}, got {value}$"):
        Augmentation(**{name: value})


def test_every_setting_has_its_range() -> None:
    for field in dataclasses.fields(Augmentation):
        with pytest.raises(ConfigError, match=f"augment.{field.name} must be from"):
            Augmentation(**{field.name: 1e9})


@pytest.mark.parametrize("name", ["fill", "jpeg_quality"])
def test_a_fraction_of_a_level_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"augment.{name} must be a whole number, got 50.5"):
        Augmentation(**{name: 50.5})
