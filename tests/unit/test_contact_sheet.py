from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from partial_fc.data import contact_sheet as module
from partial_fc.data.archives import Archive, open_archive
from partial_fc.data.augment import Augmentation
from partial_fc.data.contact_sheet import contact_sheet
from partial_fc.data.decode import decode_image
from partial_fc.data.sources import Sources
from partial_fc.data.transforms import augment_image
from partial_fc.errors import ConfigError
from tests import records

SIDE = 64
AUGMENTATION = Augmentation(rotate=0.3, scale=0.1, shift=0.1)


def archive(folder: Path, classes: int = 4, each: int = 5, bad: Sequence[int] = ()) -> Archive:
    images = [records.encode(records.smooth_image(i, SIDE, SIDE)) for i in range(classes * each)]
    for sample in bad:
        images[sample] = b"this is no image"
    return open_archive(records.write_new(folder, images, [i // each for i in range(classes * each)], classes))


def tiles(picture: Image.Image, image_size: int, rows: int, columns: int) -> np.ndarray:
    """The tiles of a sheet, uint8 ``[rows, columns, side, side, 3]``."""
    sheet = module._Sheet(image_size, rows, columns)
    assert picture.size == sheet.image.size
    side, pixels = sheet._side, np.asarray(picture)
    places = [
        [(sheet._place(row) + module._BAND, sheet._left(column)) for column in range(columns)] for row in range(rows)
    ]
    return np.array([[pixels[top : top + side, left : left + side] for top, left in row] for row in places])


def enlarged(image: np.ndarray, times: int) -> np.ndarray:
    return np.repeat(np.repeat(image, times, axis=0), times, axis=1)


def test_the_same_arguments_give_the_same_picture_and_another_seed_another(tmp_path: Path) -> None:
    source = archive(tmp_path)
    pictures = [contact_sheet(source, AUGMENTATION, image_size=SIDE, seed=seed) for seed in (3, 3, 4)]
    assert pictures[0].tobytes() == pictures[1].tobytes() != pictures[2].tobytes()
    assert pictures[0].mode == "RGB"


def test_tiles_show_samples_and_then_their_augmented_views(tmp_path: Path) -> None:
    source = archive(tmp_path)
    picture = contact_sheet(source, AUGMENTATION, image_size=SIDE, seed=3, columns=8)
    shown = tiles(picture, SIDE, rows=4, columns=8)
    for row in range(4):
        # Of five samples: the first, the one in the middle, the last.
        images = [decode_image(source.encoded(np.array([5 * row + i]))[0], SIDE) for i in (0, 2, 4)]
        parameters = AUGMENTATION.parameters(3, 8 * row + np.arange(5))
        for column, image in enumerate(images):
            assert np.array_equal(shown[row, column], enlarged(image, 2))
        for view in range(5):
            expected = augment_image(images[view % 3], AUGMENTATION, parameters[view])
            assert np.array_equal(shown[row, 3 + view], enlarged(expected, 2))


@pytest.mark.parametrize(("image_size", "times"), [(16, 7), (32, 4), (64, 2), (112, 1), (224, 1)])
def test_small_images_are_enlarged_by_a_whole_number(image_size: int, times: int, tmp_path: Path) -> None:
    source = archive(tmp_path, classes=1)
    picture = contact_sheet(source, AUGMENTATION, image_size=image_size, seed=0, columns=4)
    first = tiles(picture, image_size, rows=1, columns=4)[0, 0]
    assert np.array_equal(first, enlarged(decode_image(source.encoded(np.array([0]))[0], image_size), times))


def test_classes_are_spread_over_those_that_have_a_sample(tmp_path: Path) -> None:
    labels = [3, 3, 10, 20, 21, 22, 90]
    images = [records.encode(records.smooth_image(i, SIDE, SIDE)) for i in range(len(labels))]
    source = open_archive(records.write_new(tmp_path, images, labels, classes=100))
    assert module._spread_classes(source.all_labels(), 3) == [3, 20, 90]
    assert module._spread_classes(source.all_labels(), 50) == [3, 10, 20, 21, 22, 90]
    picture = contact_sheet(source, AUGMENTATION, image_size=SIDE, seed=0, classes=3)
    assert np.array_equal(
        tiles(picture, SIDE, 3, 10)[1, 0], enlarged(decode_image(source.encoded(np.array([3]))[0], SIDE), 2)
    )


def test_a_class_with_one_sample_leaves_the_other_samples_places_empty(tmp_path: Path) -> None:
    source = archive(tmp_path, classes=2, each=1)
    shown = tiles(contact_sheet(source, AUGMENTATION, image_size=SIDE, seed=0), SIDE, 2, 10)
    paper = ImageColor.getrgb(module._PAPER)
    assert (shown[:, 1:3, 4:-4, 4:-4] == paper).all()
    assert not any((shown[:, column] == paper).all() for column in (0, *range(3, 10)))


def test_two_columns_are_a_sample_and_a_view_of_it(tmp_path: Path) -> None:
    source = archive(tmp_path, classes=1)
    shown = tiles(contact_sheet(source, AUGMENTATION, image_size=SIDE, seed=5, columns=2), SIDE, 1, 2)
    image = decode_image(source.encoded(np.array([0]))[0], SIDE)
    assert np.array_equal(shown[0, 0], enlarged(image, 2))
    view = augment_image(image, AUGMENTATION, AUGMENTATION.parameters(5, np.array([0]))[0])
    assert np.array_equal(shown[0, 1], enlarged(view, 2))


def test_bad_samples_are_crossed_and_named_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []
    crossed = module._Sheet._crossed
    monkeypatch.setattr(
        module._Sheet, "_crossed", lambda sheet, box, kind: (named.append(kind), crossed(sheet, box, kind))
    )
    source = archive(tmp_path, bad=[5])
    shown = tiles(contact_sheet(source, AUGMENTATION, image_size=SIDE, seed=0), SIDE, 4, 10)
    # The sample itself, and views 0, 3 and 6 of it.
    assert named == ["image"] * 4
    red = (shown == ImageColor.getrgb(module._BAD)).all(axis=-1).any(axis=(2, 3))
    assert np.argwhere(red).tolist() == [[1, 0], [1, 3], [1, 6], [1, 9]]


def test_images_with_too_many_pixels_are_crossed(tmp_path: Path) -> None:
    source = archive(tmp_path, classes=1)
    small = contact_sheet(source, AUGMENTATION, image_size=SIDE, seed=0, max_image_pixels=SIDE * SIDE)
    large = contact_sheet(source, AUGMENTATION, image_size=SIDE, seed=0, max_image_pixels=SIDE * SIDE - 1)
    red = [
        (tiles(picture, SIDE, 1, 10) == ImageColor.getrgb(module._BAD)).all(axis=-1).any(axis=(2, 3))
        for picture in (small, large)
    ]
    assert not red[0].any() and red[1].all()


def test_captions_name_class_and_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[tuple[str, ...]] = []
    monkeypatch.setattr(module._Sheet, "caption", lambda sheet, row, *parts: captions.append(parts))
    for name, count in (("ada", 2), ("bob", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.jpg").write_bytes(records.encode(records.smooth_image(i, SIDE, SIDE)))
    folder = open_archive(tmp_path)
    contact_sheet(folder, AUGMENTATION, image_size=SIDE, seed=0)
    assert captions == [("class 0", "ada", "2 images"), ("class 1", "bob", "1 image")]
    captions.clear()
    contact_sheet(Sources([folder, folder]), AUGMENTATION, image_size=SIDE, seed=0, class_ids=[3, 0])
    assert captions == [("class 3", "", "1 image"), ("class 0", "", "2 images")]


def test_the_summary_names_what_is_done_to_the_images(tmp_path: Path) -> None:
    source = archive(tmp_path)
    lines = module._summary(source, Augmentation(flip=0.25, rotate=0.5), SIDE, 7)
    assert lines == ["20 images, 4 classes, shown at 64 x 64", "augmentation (seed 7): flip 0.25, rotate 0.5"]
    assert module._summary(source, Augmentation(flip=0), SIDE, 7)[1] == "augmentation (seed 7): none"


def test_long_names_are_cut_at_the_paper_s_edge(tmp_path: Path) -> None:
    sheet = module._Sheet(SIDE, 1, 4)
    sheet.caption(0, "class 0", "W" * 500, "1 image")
    margin = np.asarray(sheet.image)[:, -module._MARGIN :]
    assert (margin == ImageColor.getrgb(module._PAPER)).all()


def test_classes_without_a_sample_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="class 9 has no sample, expected one from 0 to 3"):
        contact_sheet(archive(tmp_path), AUGMENTATION, image_size=SIDE, seed=0, class_ids=[1, 9])


@pytest.mark.parametrize(("name", "value", "least"), [("image_size", 0, 1), ("classes", 0, 1), ("columns", 1, 2)])
def test_arguments_out_of_range_are_named(name: str, value: int, least: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value}, expected {least} or more"):
        contact_sheet(archive(tmp_path), AUGMENTATION, **({"image_size": SIDE, "seed": 0} | {name: value}))


def test_a_picture_too_large_is_refused_before_it_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = archive(tmp_path)
    drawn = contact_sheet(source, AUGMENTATION, image_size=SIDE, seed=0)
    longest = max(drawn.size)
    same = contact_sheet(source, AUGMENTATION, image_size=SIDE, seed=0, largest_side=longest)
    assert same.size == drawn.size
    monkeypatch.setattr(module.Image, "new", lambda *_: pytest.fail("memory was taken"))
    pixels = f"{drawn.width} x {drawn.height} pixels"
    with pytest.raises(ConfigError, match=f"{pixels}, expected at most {longest - 1} a side .*: show fewer classes or"):
        contact_sheet(source, AUGMENTATION, image_size=SIDE, seed=0, largest_side=longest - 1)
    with pytest.raises(
        ConfigError, match=r"\d+ x \d+ pixels, expected at most .* 200000000 in all: show fewer classes"
    ):
        contact_sheet(source, AUGMENTATION, image_size=8192, seed=0)
