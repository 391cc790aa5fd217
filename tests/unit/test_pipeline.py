from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
from PIL import Image

from partial_fc.data.augment import Augmentation, Column
from partial_fc.data.decode import decode_image, normalise_into
from partial_fc.data.pipeline import define_pipeline, pipeline_inputs
from partial_fc.data.transforms import augment_image
from tests import records

needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="NVIDIA DALI isn't installed (pip install nvidia-dali-cuda130)",
)
SIDE, COUNT = 64, 12
CHANCES = ("flip", "crop", "low_resolution", "colour_twist", "grayscale", "blur", "jpeg", "cutout")
ALONE = {
    "nothing": Augmentation(flip=0.0),
    "affine": Augmentation(flip=0.0, rotate=0.3, scale=0.2, shift=0.1, fill=200),
    **{name: Augmentation(**({"flip": 0.0} | {name: 1.0})) for name in CHANCES},
    "hue": Augmentation(flip=0.0, colour_twist=1.0, colour_hue=0.2),
    "fill": Augmentation(flip=0.0, cutout=1.0, cutout_side=1.0, fill=77),
    "wide blur": Augmentation(flip=0.0, blur=1.0, blur_sigma=6.0),
}
ALL = Augmentation(rotate=0.2, shift=0.1, colour_hue=0.1, fill=9, **dict.fromkeys(CHANCES, 0.5))
EVERYTHING = dataclasses.replace(ALL, **dict.fromkeys(CHANCES, 1.0))
# Largest and mean difference, in levels. These do arithmetic with other roundings than OpenCV and Pillow do.
LOOSE = {"low_resolution": (2, 0.5), "colour_twist": (2, 0.5), "hue": (2, 0.5), "blur": (2, 0.5), "wide blur": (2, 0.5)}


def grainy(seed: int, side: int = SIDE) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-20, 21, (side, side, 3))
    return np.clip(records.smooth_image(seed, side, side) + noise, 0, 255).astype(np.uint8)


ENCODED = [np.frombuffer(records.encode(grainy(seed), quality=90), dtype=np.uint8) for seed in range(COUNT)]


def by_dali(augmentation: Augmentation, encoded: list[np.ndarray], parameters: np.ndarray) -> np.ndarray:
    given = (encoded, *pipeline_inputs(augmentation, parameters, SIDE))
    pipeline = define_pipeline(
        lambda info: given,
        **dict(batch_size=len(encoded), image_size=SIDE, augmentation=augmentation),
        **dict(threads=1, prefetch=1, device_id=None),
    )
    pipeline.build()
    (images,) = pipeline.run()
    return np.stack([np.asarray(images[row]) for row in range(len(encoded))])


def by_python(augmentation: Augmentation, encoded: list[np.ndarray], parameters: np.ndarray) -> np.ndarray:
    images = np.empty((len(encoded), 3, SIDE, SIDE), dtype=np.float32)
    for data, row, out in zip(encoded, parameters, images, strict=True):
        normalise_into(augment_image(decode_image(data, SIDE), augmentation, row), out)
    return images


def differences(augmentation: Augmentation, encoded: list[np.ndarray] = ENCODED, position: int = 0) -> np.ndarray:
    """In levels, of each pixel."""
    parameters = augmentation.parameters(5, position + np.arange(len(encoded)))
    mine, theirs = (by(augmentation, encoded, parameters) for by in (by_dali, by_python))
    assert mine.shape == theirs.shape == (len(encoded), 3, SIDE, SIDE) and mine.dtype == np.float32
    return np.abs(mine - theirs) * 127.5


@needs_dali
@pytest.mark.parametrize("chance", [1.0, 0.5])
@pytest.mark.parametrize("name", list(ALONE))
def test_each_augmentation_is_that_of_the_python_decoder(name: str, chance: float) -> None:
    augmentation = ALONE[name]
    if chance < 1:
        on = {one: chance for one in CHANCES if getattr(augmentation, one) > 0}
        augmentation = dataclasses.replace(augmentation, **on)
    found = differences(augmentation)
    largest, mean = LOOSE.get(name, (1, 0.1))
    assert found.max() <= largest + 0.01 and found.mean() < mean


@needs_dali
@pytest.mark.parametrize("augmentation", [ALL, EVERYTHING], ids=["often", "always"])
def test_all_augmentations_together_are_those_of_the_python_decoder(augmentation: Augmentation) -> None:
    # Without JPEG the roundings add up, and the contrast stretches them. With it a level more or less can turn a
    # coefficient of its cosine transform into the next multiple of the quantiser, which changes 64 pixels by dozens.
    smooth = differences(dataclasses.replace(augmentation, jpeg=0.0), position=100)
    assert smooth.max() <= 12 and smooth.mean() < 0.5
    found = differences(augmentation, position=100)
    assert found.max() <= 60 and found.mean() < 1


@needs_dali
@pytest.mark.parametrize("augmentation", [Augmentation(), ALL], ids=["flip", "all"])
def test_images_of_other_sizes_and_formats(augmentation: Augmentation) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    images = [
        records.encode(grainy(0, 150), quality=90),
        records.encode(grainy(1, 40), "PNG"),
        records.encode(grainy(2)[..., 0], "PNG"),
        records.encode(grainy(3), "WEBP", lossless=True),
        records.encode(records.smooth_image(4, 50, 90), quality=95, subsampling=0, exif=turned),
        records.encode(records.smooth_image(5, SIDE, 2 * SIDE), "BMP"),
    ]
    augmentation = dataclasses.replace(augmentation, jpeg=0.0)
    found = differences(augmentation, [np.frombuffer(data, dtype=np.uint8) for data in images])
    assert found.max() <= 8 and found.mean() < 0.5


@needs_dali
def test_one_batch_after_the_other_has_its_own_parameters() -> None:
    augmentation = dataclasses.replace(ALL, jpeg=0.0)
    batches = [augmentation.parameters(1, start + np.arange(COUNT)) for start in (0, 50, 100)]
    given = [(ENCODED, *pipeline_inputs(augmentation, batch, SIDE)) for batch in batches]
    pipeline = define_pipeline(
        lambda info: given[info.iteration % 3],
        **dict(batch_size=COUNT, image_size=SIDE, augmentation=augmentation, threads=2, prefetch=2, device_id=None),
    )
    pipeline.build()
    for turn in range(5):
        images = pipeline.run()[0]
        expected = by_python(augmentation, ENCODED, batches[turn % 3])
        found = np.abs(np.stack([np.asarray(images[row]) for row in range(COUNT)]) - expected) * 127.5
        assert found.mean() < 0.5


def test_a_flip_takes_one_array() -> None:
    parameters = Augmentation().parameters(0, np.arange(100))
    (flips,) = pipeline_inputs(Augmentation(), parameters, SIDE)
    assert flips.dtype == np.int32 and flips.shape == (100,)
    assert np.array_equal(flips, parameters[:, Column.FLIP])
    assert set(flips.tolist()) == {0, 1}


def test_the_source_gives_as_little_as_it_can() -> None:
    for augmentation in ALONE.values():
        others = set(augmentation.active) - {"flip"}
        inputs = pipeline_inputs(augmentation, augmentation.parameters(0, np.arange(7)), SIDE)
        assert len(inputs) == 1 + len(others) + ("colour_twist" in others)
        for array in inputs:
            assert len(array) == 7 and array.flags.c_contiguous and array.dtype in (np.int32, np.float32)


def test_a_sample_that_nothing_is_applied_to_has_zeros() -> None:
    augmentation = dataclasses.replace(ALL, rotate=0.0, shift=0.0)
    parameters = augmentation.parameters(0, np.arange(400))
    _, crop, small, twisted, _, grey, kernel, quality, square = pipeline_inputs(augmentation, parameters, SIDE)
    middle = kernel[:, 0, augmentation.blur_radius(SIDE)]
    marks = {"CROP": crop[:, 2], "LOW_RESOLUTION": small, "COLOUR": twisted, "GRAYSCALE": grey, "BLUR": middle}
    for name, mark in (marks | {"JPEG": quality, "CUTOUT": square[:, 2]}).items():
        assert np.array_equal(mark > 0, parameters[:, np.r_[getattr(Column, name)][0]] > 0)
        assert 100 < (mark > 0).sum() < 300


@needs_dali
@pytest.mark.parametrize("augmentation", [*ALONE.values(), ALL], ids=[*ALONE, "all"])
def test_the_gpu_pipeline_can_be_defined(augmentation: Augmentation) -> None:
    pipeline = define_pipeline(
        lambda info: None,
        **dict(batch_size=4, image_size=112, augmentation=augmentation, threads=1, prefetch=2, device_id=0),
    )
    assert pipeline.device_id == 0


@needs_dali
@pytest.mark.gpu
@pytest.mark.parametrize("name", [*ALONE, "all"])
def test_the_gpu_does_what_the_cpu_does(name: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    augmentation = ALONE.get(name, ALL)
    parameters = augmentation.parameters(5, np.arange(COUNT))
    given = (ENCODED, *pipeline_inputs(augmentation, parameters, SIDE))
    pipeline = define_pipeline(
        lambda info: given,
        **dict(batch_size=COUNT, image_size=SIDE, augmentation=augmentation, threads=2, prefetch=2, device_id=0),
    )
    pipeline.build()
    images = pipeline.run()[0].as_cpu()
    found = np.stack([np.asarray(images[row]) for row in range(COUNT)])
    # The GPU's JPEG decoder rounds differently, and its compression is an imitation.
    assert np.abs(found - by_python(augmentation, ENCODED, parameters)).mean() * 127.5 < 3
