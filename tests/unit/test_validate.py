from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_fc.data import pieces
from partial_fc.data import validate as module
from partial_fc.data.archives import Archive, open_archive
from partial_fc.data.findings import Spread, ValidationReport, render
from partial_fc.data.sources import Sources
from partial_fc.data.validate import validate
from partial_fc.errors import ConfigError
from tests import formats, records

SIDE = 24
LIMIT = 10_000


def image(seed: int, height: int = SIDE, width: int = SIDE) -> bytes:
    return records.encode(records.smooth_image(seed, height, width))


def archive(
    folder: Path, images: list[bytes], labels: list[float], classes: int | None = None, damage: bytes | None = None
) -> Archive:
    """RecordIO; with ``damage``, bytes that take the place of the first record's magic word."""
    records.write_new(folder, images, labels, classes)
    if damage is not None:
        whole = (folder / "train.rec").read_bytes()
        (folder / "train.rec").write_bytes(damage + whole[len(damage) :])
    return open_archive(folder)


def check(source: Archive | Sources, **changes) -> ValidationReport:
    return validate(source, **({"max_image_pixels": LIMIT, "threads": 2} | changes))


def without_time(report: ValidationReport) -> ValidationReport:
    return dataclasses.replace(report, seconds=0.0)


def test_a_good_set_passes_and_is_counted(tmp_path: Path) -> None:
    images = [image(i) for i in range(6)] + [image(6, 40, 30)]
    report = check(archive(tmp_path, images, [0, 0, 0, 1, 1, 2, 2], classes=3), image_size=SIDE)
    assert report.ok and report.problems == []
    assert (report.samples, report.checked, sum(report.unusable.values())) == (7, 7, 0)
    assert (report.classes.lowest, report.classes.highest, report.classes.missing) == (0, 2, 0)
    assert (report.classes.samples.least, report.classes.samples.median, report.classes.samples.most) == (2, 2, 3)
    assert report.classes.histogram == [(2, 3, 3)]
    assert report.images.sizes == [(SIDE, SIDE, 6), (30, 40, 1)]
    assert (report.images.other_size, report.images.not_square, report.images.grey) == (1, 1, 0)
    lengths = sorted(map(len, images))
    assert report.images.encoded_bytes == Spread(lengths[0], lengths[3], sum(lengths) / 7, lengths[-1], sum(lengths))
    assert render(report).startswith(f"OK: {tmp_path / 'train.rec'}: all 7 samples can be used\n")


def test_each_kind_of_fault_is_counted_and_named(tmp_path: Path) -> None:
    images = [image(i) for i in range(8)]
    images[2] = images[2][:-40]
    images[3] = b"no image, but bytes enough"
    images[4] = image(4, 101, 100)
    report = check(
        archive(tmp_path, images, [0, 1, 0, 1, 0, float("nan"), 1, 2], classes=2, damage=b"\0\0\0\0"), threads=1
    )
    assert report.unusable == {"record": 1, "label": 2, "empty": 0, "oversized": 1, "image": 2}
    assert [example.sample for example in report.first["label"]] == [5, 7]
    assert [example.sample for example in report.first["image"]] == [2, 3]
    for kind, sample in (("record", 0), ("label", 5), ("oversized", 4), ("image", 2)):
        example = report.first[kind][0]
        assert example.sample == sample and "train.rec" in example.reason and "byte" in example.reason
    assert not report.ok and len(report.problems) == 4
    text = render(report)
    assert text.startswith(f"NOT OK: {tmp_path / 'train.rec'}: 6 of 8 samples can't be used\n")
    assert f"sample 4: {tmp_path / 'train.rec'}, byte" in text


def test_an_empty_file_of_a_folder_is_empty(tmp_path: Path) -> None:
    for name in ("ada", "bob"):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.jpg").write_bytes(image(i + 10 * len(name)))
    (tmp_path / "ada" / "1.jpg").write_bytes(b"")
    report = check(open_archive(tmp_path))
    assert sum(report.unusable.values()) == 1
    ((example,),) = [found for found in report.first.values() if found]
    assert example.sample == 1 and "ada/1.jpg" in example.reason


def test_many_faults_are_counted_but_few_are_named(tmp_path: Path) -> None:
    report = check(archive(tmp_path, [b"not an image at all"] * 300, [0] * 300, classes=1))
    assert report.unusable["image"] == 300
    assert [example.sample for example in report.first["image"]] == [0, 1, 2, 3, 4]
    assert report.images.encoded_bytes is None and report.images.sizes == []


def test_gaps_and_single_images_are_only_warned_of(tmp_path: Path) -> None:
    report = check(archive(tmp_path, [image(i) for i in range(5)], [1, 1, 3, 3, 7], classes=12))
    assert report.ok
    assert (report.classes.missing, report.classes.single) == (9, 1)
    assert report.classes.missing_ranges == [(0, 0), (2, 2), (4, 6), (8, 11)]
    assert "9 classes without a sample: 0, 2, 4-6, 8-11" in report.warnings


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_the_histogram_counts_every_class_once(values: list[int]) -> None:
    histogram = module._histogram(np.array(values))
    assert sum(count for _, _, count in histogram) == len(values) and len(histogram) <= 8
    for first, last, count in histogram:
        assert count == sum(first <= value <= last for value in values)
    assert histogram[0][0] == min(values) and histogram[-1][1] == max(values)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 30), min_size=1), st.integers(31, 40))
def test_gaps_are_those_of_a_plain_search(present: set[int], num_classes: int) -> None:
    class Labels:
        def all_labels(self) -> np.ndarray:
            return np.array(sorted(present, reverse=True))

    source = Labels()
    source.num_classes = num_classes
    figures = module._class_figures(source)
    missing = [label for label in range(num_classes) if label not in present]
    named = [label for first, last in figures.missing_ranges for label in range(first, last + 1)]
    assert figures.missing == len(missing) and named == missing[: len(named)]
    assert named == missing or len(figures.missing_ranges) == 5


def test_copies_within_and_across_classes_are_told_apart(tmp_path: Path) -> None:
    a, b, c = image(0), image(1), image(2)
    # a: twice in class 0 and once in 1; b: three times in class 2; c: once in 1 and once in 2.
    report = check(archive(tmp_path, [a, b, c, a, b, a, b, c, image(3)], [0, 2, 1, 0, 2, 1, 2, 2, 0], classes=3))
    assert report.ok
    copies = report.copies
    assert (copies.within, copies.across, copies.across_samples) == (3, 2, 5)
    assert [pair.samples for pair in copies.within_first] == [(0, 3), (1, 4)]
    assert [(pair.samples, pair.classes) for pair in copies.across_first] == [((0, 5), (0, 1)), ((2, 7), (1, 2))]
    assert copies.across_first[0].places[0] == f"{tmp_path / 'train.rec'}, byte 32"
    assert "2 images in several classes (5 samples): some of their labels are wrong" in report.warnings


def test_equal_hashes_alone_make_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_hash", lambda data: 7)
    report = check(archive(tmp_path, [image(0), image(1), image(0), image(2)], [0, 0, 0, 1], classes=2))
    assert (report.copies.within, report.copies.across) == (1, 0)
    assert report.copies.within_first[0].samples == (0, 2)


def test_an_image_in_two_data_sets_is_in_two_classes_unless_classes_are_merged(tmp_path: Path) -> None:
    one = archive(tmp_path / "one", [image(0), image(1)], [0, 1], classes=2)
    two = archive(tmp_path / "two", [image(5), image(1)], [0, 1], classes=2)
    apart, merged = check(Sources([one, two])), check(Sources([one, two], merge_classes=True))
    assert (apart.copies.within, apart.copies.across) == (0, 1)
    assert apart.copies.across_first[0].classes == (1, 3)
    assert "one" in apart.copies.across_first[0].places[0] and "two" in apart.copies.across_first[0].places[1]
    assert (merged.copies.within, merged.copies.across) == (1, 0)


def test_threads_and_pieces_leave_the_report_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [image(i % 50) if i % 7 else b"damaged beyond help %d" % i for i in range(90)]
    source = archive(tmp_path, images, [i % 9 for i in range(90)], classes=9)
    alone = check(source, threads=1)
    monkeypatch.setattr(pieces, "_PIECE", 7)
    assert without_time(check(source, threads=4)) == without_time(alone)
    assert alone.unusable["image"] == 13 and alone.copies.across > 0


def test_a_limit_spreads_the_samples_evenly(tmp_path: Path) -> None:
    images = [image(i, SIDE, SIDE + i) for i in range(20)]
    seen: list[tuple[int, int]] = []
    source = archive(tmp_path, images, [0] * 20, classes=1)
    report = check(source, sample_limit=4, progress=lambda done, total: seen.append((done, total)))
    assert (report.samples, report.checked) == (20, 4)
    assert sorted(width for width, _, _ in report.images.sizes) == [SIDE, SIDE + 5, SIDE + 10, SIDE + 15]
    assert report.classes.samples.total == 20
    assert seen[-1] == (4, 4)
    assert render(report).splitlines()[0].endswith("all 4 samples (of 20) can be used")


def test_progress_counts_up_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 4)
    seen: list[tuple[int, int]] = []
    source = archive(tmp_path, [image(i) for i in range(30)], [0] * 30, classes=1)
    check(source, threads=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(min(done, 30), 30) for done in range(4, 33, 4)]


@pytest.mark.timeout(60)
def test_an_interruption_stops_between_two_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 4)
    source = archive(tmp_path, [image(i) for i in range(30)], [0] * 30, classes=1)
    decode, decoded = module.decode_pixels, []
    stopping, stopped = threading.Event(), threading.Event()
    told: list[bool] = []

    class Stopped(threading.Event):
        def set(self) -> None:
            super().set()
            stopped.set()

    def slow(data: np.ndarray, *, max_pixels: int) -> np.ndarray:
        decoded.append(data)
        if len(decoded) == 6:
            stopping.set()
            told.append(stopped.wait(20))
        return decode(data, max_pixels=max_pixels)

    def progress(done: int, total: int) -> None:
        assert stopping.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(pieces, "threading", SimpleNamespace(Event=Stopped))
    monkeypatch.setattr(module, "decode_pixels", slow)
    with pytest.raises(KeyboardInterrupt):
        check(source, threads=1, progress=progress)
    # The second image of the second piece was the last one.
    assert len(decoded) == 6 and told == [True]


def test_grey_images_are_counted_however_they_are_stored(tmp_path: Path) -> None:
    grey = records.smooth_image(1, SIDE, SIDE)[..., 0]
    images = [records.encode(grey, "PNG"), records.encode(np.stack([grey] * 3, axis=2), "PNG"), image(3)]
    assert check(archive(tmp_path, images, [0, 0, 0], classes=1)).images.grey == 2


def test_a_wrong_checksum_is_a_problem_even_where_the_image_decodes(tmp_path: Path) -> None:
    messages = [formats.example({"image/encoded": image(i), "image/class/label": i % 2}) for i in range(4)]
    path = formats.write_tfrecord(tmp_path / "train-00000-of-00001.tfrecord", messages)
    third = sum(len(formats.record(message)) for message in messages[:2])
    report = check(open_archive(path))
    assert report.ok and report.bad_checksums == 0 and "checksums   0 wrong" in render(report)
    # A bit within the compressed pixels of the third image.
    spoiled = bytearray(path.read_bytes())
    spoiled[third + formats.record(messages[2]).index(image(2)) + len(image(2)) - 20] ^= 1
    path.write_bytes(spoiled)
    report = check(open_archive(path))
    assert sum(report.unusable.values()) == 0 and report.bad_checksums == 1 and not report.ok
    assert report.checksums_first == [f"{path}, byte {third}"]
    assert render(report).startswith(f"NOT OK: {path}: 1 record: the checksum isn't that of the data\n")


def test_checksums_are_left_out_with_a_limit_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [formats.example({"image/encoded": image(i), "image/class/label": i % 2}) for i in range(4)]
    path = formats.write_tfrecord(tmp_path / "train-00000-of-00001.tfrecord", messages)
    assert check(open_archive(path), sample_limit=4).bad_checksums == 0
    monkeypatch.setattr(module, "bad_checksums", lambda *_: pytest.fail("the whole file was read"))
    report = check(open_archive(path), sample_limit=3)
    assert report.ok and report.bad_checksums is None and report.checksums_skipped
    assert "checksums   not checked (--limit)" in render(report)
    recordio = check(archive(tmp_path / "rec", [image(0), image(1)], [0, 1], classes=2), sample_limit=1)
    assert not recordio.checksums_skipped and "checksums   " not in render(recordio)


def test_progress_of_the_checksums_is_in_bytes_of_all_files(tmp_path: Path) -> None:
    size = 0
    for file in range(2):
        messages = [formats.example({"image/encoded": image(i), "image/class/label": i % 2}) for i in range(3)]
        path = formats.write_tfrecord(tmp_path / f"train-{file:05d}-of-00002.tfrecord", messages)
        size += path.stat().st_size
    images: list[tuple[int, int]] = []
    bytes_: list[tuple[int, int]] = []
    source = open_archive(tmp_path)
    check(source, progress=lambda *done: images.append(done), checksum_progress=lambda *done: bytes_.append(done))
    assert images == [(6, 6)]
    assert bytes_ == [(path.stat().st_size, size), (size, size)]


@pytest.mark.parametrize("name", ["threads", "image_size", "sample_limit"])
def test_arguments_out_of_range_are_named(name: str, tmp_path: Path) -> None:
    source = archive(tmp_path, [image(0)], [0], classes=1)
    with pytest.raises(ConfigError, match=rf"validate: {name}=0, expected 1 or more"):
        check(source, **{name: 0})


def test_the_text_fits_a_screen_and_the_report_is_json(tmp_path: Path) -> None:
    sizes = [(SIDE + i, SIDE + 2 * i) for i in range(1, 14)]
    images = [image(i, *size) for i, size in enumerate(sizes)] + [image(0, *sizes[0])] * 2
    images += [b"not an image at all %d" % i for i in range(9)] + [image(9, 101, 100)] * 9
    labels = [i % 7 for i in range(len(images))]
    labels[2:6] = [100, 101, 102, 99]
    report = check(archive(tmp_path, images, labels, classes=90, damage=b"\0\0\0\0"), image_size=SIDE)
    assert len(report.problems) == 4 and len(report.warnings) == 3
    lines = render(report).splitlines()
    assert len(lines) <= 40
    assert all(len(line) <= 100 for line in lines if str(tmp_path) not in line)
    found = json.loads(json.dumps(report.as_dict()))
    assert found["ok"] is False and found["unusable"]["image"] == 9 and found["problems"] == report.problems


@pytest.mark.skipif(not records.OMNIGLOT.is_dir(), reason="needs Omniglot's RecordIO files")
def test_omniglot_is_whole_and_has_one_copy(tmp_path: Path) -> None:
    report = validate(open_archive(records.OMNIGLOT, cache=tmp_path), max_image_pixels=1 << 26, image_size=112)
    assert report.ok and report.checked == 19_280
    assert report.images.sizes == [(112, 112, 19_280)] and report.images.other_size == 0
    assert report.classes.histogram == [(20, 20, 964)]
    assert (report.copies.within, report.copies.across) == (1, 0)
    assert report.copies.within_first[0].samples == (4802, 4818)
