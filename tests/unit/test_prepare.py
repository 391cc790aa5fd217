"""Writing data sets anew: against parsers written from the formats' descriptions, ``tarfile``, GNU tar and DALI."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from partial_fc.data import pieces
from partial_fc.data import prepare as module
from partial_fc.data.archives import Archive, open_archive
from partial_fc.data.dali import dali_available
from partial_fc.data.decode import decode_image
from partial_fc.data.destination import Destination
from partial_fc.data.prepare import prepare
from partial_fc.data.sources import Sources
from partial_fc.data.table import UNUSABLE, Fault
from partial_fc.errors import ConfigError, DataError
from tests import formats, records
from tests.unit.test_writers import WORD, parse

needs_dali = pytest.mark.skipif(
    not dali_available(), reason="NVIDIA DALI isn't installed (pip install nvidia-dali-cuda130)"
)
ROOT = Path(__file__).parents[2]


class FakeArchive(Archive):
    """Samples from a list; an exception in place of an image is raised when it's read."""

    def __init__(
        self, images: Sequence[bytes | Exception], labels: Sequence[int], class_names: list[str] | None = None
    ) -> None:
        self.path, self.format, self.class_names = Path("/nowhere/fake"), "fake", class_names
        self.num_classes = max(labels) + 1
        self._images, self._labels = list(images), np.array(labels, dtype=np.int64)

    @property
    def root(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        return self._labels[ids]

    def all_labels(self) -> np.ndarray:
        return self._labels

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        images = [self._images[i] for i in ids.tolist()]
        return np.array([len(image) if isinstance(image, bytes) else -1 for image in images], dtype=np.int64)

    def encoded(self, ids: np.ndarray) -> list[np.ndarray]:
        found = []
        for sample in ids.tolist():
            image = self._images[sample]
            if isinstance(image, Exception):
                raise image
            found.append(np.frombuffer(image, dtype=np.uint8))
        return found

    def fault(self, sample: int) -> Fault | None:
        return Fault("label", f"sample {sample} has no label") if self._labels[sample] == UNUSABLE else None

    def locate(self, sample: int) -> str:
        return f"fake, sample {sample}"


def image(seed: int, height: int = 40, width: int = 40, kind: str = "JPEG", **options: object) -> bytes:
    return records.encode(records.smooth_image(seed, height, width), kind, **options)


def some_images() -> list[bytes]:
    """Twelve, of three formats and several sizes; one with RecordIO's magic word behind it, at a multiple of 4."""
    images = [image(i) for i in range(9)] + [image(9, 30, 50), image(10, 40, 40, "PNG"), image(11, 40, 40, "WEBP")]
    images[4] += b"\0" * (-len(images[4]) % 4) + WORD + b"tail"
    return images


# Class 2 has no sample, and the classes don't stand in order.
LABELS = [3, 0, 0, 1, 4, 3, 1, 0, 4, 4, 1, 3]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def data_files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name != "prepare.json"}


def read_recordio(folder: Path) -> list[tuple[int, bytes]]:
    """(label, image) by key; checks the layout: keys from 0 in the order of the file, flag 0, no other records."""
    found, order = parse(folder)
    assert order == list(range(len(found)))
    assert (folder / "train.idx").read_text().startswith("0\t0\n")
    for key, (flag, labels, identifier, _) in found.items():
        assert (flag, identifier, len(labels)) == (0, key, 1)
    return [(int(found[key][1][0]), found[key][3]) for key in order]


def read_shards(folder: Path) -> list[tuple[str, int, bytes]]:
    """(key, label, image) of all shards, by tarfile."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            for picture, text in zip(members[::2], members[1::2], strict=True):
                key = picture.name.split(".")[0]
                data, label = (archive.extractfile(member).read() for member in (picture, text))  # type: ignore[union-attr]
                assert picture.name == f"{key}.{ending(data)}" and text.name == f"{key}.cls"
                found.append((key, int(label), data))
    return found


def sorted_by_class(images: Sequence[bytes], labels: Sequence[int]) -> list[tuple[int, bytes]]:
    return sorted(zip(labels, images, strict=True), key=lambda pair: pair[0])


def ending(data: bytes) -> str:
    return "jpg" if data[:2] == b"\xff\xd8" else "png" if data[:4] == b"\x89PNG" else "webp"


def write_folder(folder: Path, images: list[bytes], labels: list[int]) -> Path:
    for number, (data, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / f"person {label}" / f"{number:03d}.{ending(data)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_recordio(folder: Path, images: list[bytes], labels: list[int]) -> Path:
    return records.write_old(folder, images, labels, classes=max(labels) + 1)


def write_webdataset(folder: Path, images: list[bytes], labels: list[int]) -> Path:
    folder.mkdir()
    members = [
        [(f"x{row}.{ending(data)}", data), (f"x{row}.cls", str(label).encode())]
        for row, (data, label) in enumerate(zip(images, labels, strict=True))
    ]
    for shard, rows in enumerate((members[:7], members[7:])):
        (folder / f"part-{shard}.tar").write_bytes(formats.tar(sum(rows, [])))
    return folder


def write_tfrecord(folder: Path, images: list[bytes], labels: list[int]) -> Path:
    folder.mkdir()
    examples = [
        formats.example({"image/encoded": data, "image/class/label": label})
        for data, label in zip(images, labels, strict=True)
    ]
    formats.write_tfrecord(folder / "train-00000-of-00001.tfrecord", examples)
    return folder


SOURCES: dict[str, Callable[[Path, list[bytes], list[int]], Path]] = {
    "folder": write_folder,
    "recordio": write_recordio,
    "webdataset": write_webdataset,
    "tfrecord": write_tfrecord,
}


def open_source(kind: str, folder: Path) -> tuple[Archive, list[bytes], list[int]]:
    """A set of this format, and what is in it, in its order."""
    images, labels = some_images(), LABELS
    if kind == "folder":
        # Its classes are those that have a folder, and its order is that of the names.
        order = sorted(range(len(images)), key=lambda row: (LABELS[row], row))
        rank = {label: number for number, label in enumerate(sorted(set(LABELS)))}
        images_, labels_ = [images[row] for row in order], [rank[LABELS[row]] for row in order]
    else:
        images_, labels_ = images, labels
    return open_archive(SOURCES[kind](folder, images, labels), format=kind), images_, labels_


@pytest.mark.parametrize("kind", SOURCES)
def test_any_format_to_recordio(kind: str, tmp_path: Path) -> None:
    source, images, labels = open_source(kind, tmp_path / "in")
    report = prepare(source, tmp_path / "out", format="recordio")
    assert read_recordio(tmp_path / "out") == sorted_by_class(images, labels)
    assert (tmp_path / "out" / "property").read_text() == f"{source.num_classes},40,40\n"
    assert (report.outcome, report.samples, report.written, report.reencoded) == ("written", 12, 12, 0)
    assert report.skipped == {} and report.reasons == {} and report.num_classes == max(labels) + 1
    files = data_files(tmp_path / "out")
    assert report.bytes == sum(map(len, files.values())) and report.files == len(files)
    assert ("classes.txt" in files) == (kind == "folder")
    again = open_archive(tmp_path / "out")
    assert again.format == "recordio" and again.num_classes == source.num_classes
    ids = np.arange(12)
    assert again.labels(ids).tolist() == sorted(labels)
    assert [data.tobytes() for data in again.encoded(ids)] == [data for _, data in sorted_by_class(images, labels)]


@pytest.mark.parametrize("kind", SOURCES)
def test_any_format_to_webdataset(kind: str, tmp_path: Path) -> None:
    source, images, labels = open_source(kind, tmp_path / "in")
    report = prepare(source, tmp_path / "out", format="webdataset", shard_size=5)
    shards = read_shards(tmp_path / "out")
    assert shards == [(f"{i:09d}", label, data) for i, (label, data) in enumerate(zip(labels, images, strict=True))]
    files = data_files(tmp_path / "out")
    assert [name for name in files if name.endswith(".tar")] == [f"train-{i:06d}.tar" for i in range(3)]
    assert report.bytes == sum(map(len, files.values())) and report.files == len(files)
    assert ("classes.txt" in files) == (kind == "folder")
    again = open_archive(tmp_path / "out")
    assert again.format == "webdataset" and again.num_classes == source.num_classes
    ids = np.arange(12)
    assert again.labels(ids).tolist() == labels
    assert [data.tobytes() for data in again.encoded(ids)] == images


def test_names_of_classes_stay_in_the_order_of_their_ids(tmp_path: Path) -> None:
    source = FakeArchive([image(0), image(1)], [1, 0], ["Zo\u00eb", "one\ntwo"])
    prepare(source, tmp_path / "out", format="recordio")
    assert (tmp_path / "out" / "classes.txt").read_text(encoding="utf-8") == "Zo\u00eb\none two\n"


@pytest.mark.parametrize("merge", [False, True])
def test_several_sources_become_one_set(merge: bool, tmp_path: Path) -> None:
    images = [image(i) for i in range(5)]
    first = FakeArchive(images[:2], [1, 0], ["a", "b"])
    second = FakeArchive(images[2:], [0, 2, 1], ["a", "b", "c"])
    report = prepare(Sources([first, second], merge_classes=merge), tmp_path / "out", format="recordio")
    labels = [1, 0, 0, 2, 1] if merge else [1, 0, 2, 4, 3]
    assert read_recordio(tmp_path / "out") == sorted_by_class(images, labels)
    assert report.num_classes == (3 if merge else 5)
    assert (tmp_path / "out" / "classes.txt").read_text().split() == list("abc" if merge else "ababc")


@needs_dali
def test_dali_reads_recordio(tmp_path: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    images = some_images()
    prepare(FakeArchive(images, LABELS), tmp_path / "out", format="recordio")
    rec, idx = str(tmp_path / "out" / "train.rec"), str(tmp_path / "out" / "train.idx")

    @pipeline_def(batch_size=12, num_threads=1, device_id=None)
    def pipeline():
        encoded, labels = fn.readers.mxnet(path=[rec], index_path=[idx], name="reader")
        return encoded, labels

    pipe = pipeline()
    pipe.build()
    assert pipe.epoch_size("reader") == 12
    encoded, labels = pipe.run()
    found = [(int(np.array(labels[i])[0]), np.array(encoded[i]).tobytes()) for i in range(12)]
    assert found == sorted_by_class(images, LABELS)


@needs_dali
def test_dali_reads_webdataset(tmp_path: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    images = some_images()
    labels = [label * 10_000_019 for label in LABELS]
    prepare(FakeArchive(images, labels), tmp_path / "out", format="webdataset", shard_size=5)
    paths = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]

    @pipeline_def(batch_size=12, num_threads=1, device_id=None)
    def pipeline():
        return tuple(
            fn.readers.webdataset(paths=paths, ext=["jpg;png;webp", "cls"], missing_component_behavior="error")
        )

    pipe = pipeline()
    pipe.build()
    encoded, texts = pipe.run()
    found = [(int(np.array(texts[i]).tobytes()), np.array(encoded[i]).tobytes()) for i in range(12)]
    assert found == list(zip(labels, images, strict=True))


def test_gnu_tar_lists_the_shards(tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("there is no tar program")
    prepare(FakeArchive(some_images(), LABELS), tmp_path / "out", format="webdataset")
    done = subprocess.run(
        ["tar", "-tvf", tmp_path / "out" / "train-000000.tar"], capture_output=True, text=True, check=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert done.stderr == "" and len(lines) == 24
    assert lines[0].startswith("-rw-r--r-- 0/0") and "1970-01-01" in lines[0] and lines[0].endswith("000000000.jpg")
    assert lines[-1].endswith("000000011.cls")


def test_shuffled_shards_hold_every_sample_once_in_another_order(tmp_path: Path) -> None:
    images = [image(i % 7) for i in range(40)]
    source = FakeArchive(images, list(range(40)))
    for seed in (0, 1):
        prepare(source, tmp_path / f"{seed}", format="webdataset", shuffle_seed=seed, shard_size=16)
    first, second = ([int(key) for key, _, _ in read_shards(tmp_path / seed)] for seed in "01")
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second and first != sorted(first)
    assert all(label == int(key) and data == images[label] for key, label, data in read_shards(tmp_path / "0"))


@pytest.mark.parametrize("format", ["recordio", "webdataset"])
def test_the_number_of_workers_changes_no_byte(format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 3)
    images = [image(i, 20 + i, 24) for i in range(50)]
    images[7], images[20] = b"", b"no image at all"
    source = FakeArchive(images, [i * 7 % 11 for i in range(50)])
    results = []
    for workers in (1, 2, 3):
        calls: list[tuple[int, int]] = []
        report = prepare(
            source,
            tmp_path / str(workers),
            format=format,
            image_size=16,
            workers=workers,
            progress=lambda done, total: calls.append((done, total)),  # noqa: B023
        )
        assert calls == sorted(calls) and calls[-1] == (50, 50)
        results.append((contents(tmp_path / str(workers)), report.skipped, report.reasons))
    assert results[0] == results[1] == results[2]
    assert results[0][1] == {"empty": 1, "image": 1}


def test_only_images_of_another_size_are_encoded(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    images = [
        image(0, 32, 32),
        image(1, 48, 32),
        image(2, 32, 32, "PNG"),
        image(3, 32, 32, exif=turned),
        image(4, 9, 9),
    ]
    report = prepare(FakeArchive(images, [0] * 5), tmp_path / "out", format="recordio", image_size=32)
    written = [data for _, data in read_recordio(tmp_path / "out")]
    assert report.reencoded == 3 and [i for i in range(5) if written[i] == images[i]] == [0, 2]
    assert (tmp_path / "out" / "property").read_text() == "1,32,32\n"
    for i in (1, 3, 4):
        found = Image.open(io.BytesIO(written[i]))
        assert found.size == (32, 32) and found.format == "JPEG" and found.getexif().get(0x0112, 1) == 1
        expected = decode_image(np.frombuffer(images[i], dtype=np.uint8), 32).astype(float)
        assert np.abs(np.asarray(found).astype(float) - expected).mean() < 2


def test_encoded_images_keep_their_colour_at_full_size(tmp_path: Path) -> None:
    prepare(FakeArchive([image(0)], [0]), tmp_path / "out", format="recordio", image_size=32)
    ((_, data),) = read_recordio(tmp_path / "out")
    frame = data.index(b"\xff\xc0")
    # Number of components, then each one's id, sampling factors and table.
    assert data[frame + 9] == 3 and [data[frame + 11 + 3 * i] for i in range(3)] == [0x11] * 3


def test_a_quality_encodes_every_image_at_its_own_size(tmp_path: Path) -> None:
    images = [image(0, 32, 48), image(1, 40, 40, "PNG")]
    sizes = []
    for quality in (30, 90):
        report = prepare(FakeArchive(images, [0, 1]), tmp_path / str(quality), format="recordio", quality=quality)
        written = [data for _, data in read_recordio(tmp_path / str(quality))]
        assert report.reencoded == 2
        assert [Image.open(io.BytesIO(data)).size for data in written] == [(48, 32), (40, 40)]
        assert {Image.open(io.BytesIO(data)).format for data in written} == {"JPEG"}
        assert (tmp_path / str(quality) / "property").read_text() == "2,32,48\n"
        sizes.append(report.bytes)
    assert sizes[0] < sizes[1]


def test_an_image_that_shards_have_no_ending_for_is_encoded(tmp_path: Path) -> None:
    images = [image(0), image(1, 40, 40, "TIFF")]
    report = prepare(FakeArchive(images, [0, 1]), tmp_path / "out", format="webdataset")
    assert report.reencoded == 1 and [key for key, _, _ in read_shards(tmp_path / "out")] == ["000000000", "000000001"]
    prepare(FakeArchive(images, [0, 1]), tmp_path / "rec", format="recordio")
    assert read_recordio(tmp_path / "rec")[1] == (1, images[1])


@pytest.mark.parametrize("format", ["recordio", "webdataset"])
def test_an_image_that_dali_does_not_decode_is_encoded(format: Any, tmp_path: Path) -> None:
    kinds = ["GIF", "JPEG", "PNG", "BMP", "TIFF", "PPM", "JPEG2000", "WEBP"]
    images = [image(i, 40, 48, kind) for i, kind in enumerate(kinds)]
    report = prepare(FakeArchive(images, [0] * 8), tmp_path, format=format)
    found = [data for _, data in read_recordio(tmp_path)] if format == "recordio" else stored_in_shards(tmp_path)
    encoded = [kind for kind, old, new in zip(kinds, images, found, strict=True) if old != new]
    # WebDataset's readers have no ending for two more of them.
    assert encoded == ["GIF"] + (["TIFF", "JPEG2000"] if format == "webdataset" else [])
    assert report.reencoded == len(encoded)
    assert Image.open(io.BytesIO(found[0])).format == "JPEG" and Image.open(io.BytesIO(found[0])).size == (48, 40)


def stored_in_shards(folder: Path) -> list[bytes]:
    with tarfile.open(folder / "train-000000.tar") as archive:
        return [archive.extractfile(member).read() for member in archive.getmembers()[::2]]  # type: ignore[union-attr]


def test_unusable_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    images: list[bytes | Exception] = [image(i) for i in range(20)]
    images[2] = b""
    images[3] = image(3)[:-40]
    images[4] = image(4, 300, 300)
    images[5] = DataError("fake, sample 5: the record is damaged")
    for i in range(6, 13):
        images[i] = b"nonsense"
    images[12] = b"\xff\xd8no header\xff\xd9"
    labels = [UNUSABLE, *range(19)]
    for format in ("recordio", "webdataset"):
        report = prepare(
            FakeArchive(images, labels),
            tmp_path / format,
            format=format,  # type: ignore[arg-type]
            max_image_pixels=40 * 40,
        )
        assert report.skipped == {"label": 1, "empty": 1, "image": 8, "oversized": 1, "record": 1}
        assert (report.samples, report.written) == (20, 8)
        assert len(report.reasons["image"]) == 5 and all("sample" in text for text in report.reasons["image"])
        assert report.reasons["label"] == ["sample 0 has no label"]
        assert report.reasons["record"] == ["fake, sample 5: the record is damaged"]
    assert [label for label, _ in read_recordio(tmp_path / "recordio")] == [0, *range(12, 19)]
    assert [int(key) for key, _, _ in read_shards(tmp_path / "webdataset")] == [1, *range(13, 20)]


@pytest.mark.parametrize(("images", "labels"), [([b"", b"x"], [0, 1]), ([image(0)], [UNUSABLE])])
def test_no_sample_left(images: list[bytes], labels: list[int], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"/nowhere/fake: none of its {len(labels)} samples can be used; .*sample 0"):
        prepare(FakeArchive(images, labels), tmp_path, format="recordio")
    assert os.listdir(tmp_path) == []


def test_a_source_that_cannot_be_read_for_a_moment_loses_no_sample(tmp_path: Path) -> None:
    images: list[bytes | Exception] = [image(i) for i in range(6)]
    gone = DataError("/nowhere/fake: can't read the data set (Stale file handle)")
    gone.__cause__ = OSError(errno.ESTALE, "Stale file handle")
    whole = FakeArchive(images, [0] * 6)
    images[3] = gone
    with pytest.raises(DataError, match="Stale file handle"):
        prepare(FakeArchive(images, [0] * 6), tmp_path, format="recordio")
    report = prepare(whole, tmp_path, format="recordio")
    assert (report.written, report.skipped) == (6, {})


def test_labels_beyond_float32(tmp_path: Path) -> None:
    images = [image(0), image(1), image(2)]
    source = FakeArchive(images, [2**24 + 1, 2**40, 0])
    with pytest.raises(
        ConfigError, match=r"largest label is 1099511627776, .* exact below 16777216: set format=webdata"
    ):
        prepare(source, tmp_path / "rec", format="recordio")
    with pytest.raises(ConfigError, match="largest label is 16777216"):
        prepare(FakeArchive(images, [2**24, 1, 0]), tmp_path / "rec", format="recordio")
    assert not (tmp_path / "rec").exists()
    prepare(FakeArchive(images, [2**24 - 1, 1, 0]), tmp_path / "rec", format="recordio")
    assert [label for label, _ in read_recordio(tmp_path / "rec")] == [0, 1, 2**24 - 1]
    prepare(source, tmp_path / "wds", format="webdataset")
    assert [label for _, label, _ in read_shards(tmp_path / "wds")] == [2**24 + 1, 2**40, 0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"format": "tfrecord"}, "format='tfrecord', expected recordio or webdataset"),
        ({"image_size": 0}, "image_size=0, expected 1 or more"),
        ({"quality": 101}, "quality=101, expected at most 100"),
        ({"workers": 0}, "workers=0, expected 1 or more"),
        ({"format": "webdataset", "shard_size": 0}, "shard_size=0, expected 1 or more"),
        ({"shuffle_seed": 1}, "shuffle_seed=1, expected none with format=recordio"),
    ],
)
def test_arguments_that_cannot_be_used(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        prepare(FakeArchive([image(0)], [0]), tmp_path / "out", **({"format": "recordio"} | options))
    assert not (tmp_path / "out").exists()


def test_a_complete_set_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = FakeArchive(some_images(), LABELS)
    first = prepare(source, tmp_path, format="recordio")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    (tmp_path / "lfw.bin").write_bytes(b"added later")
    with caplog.at_level("INFO", "partial_fc.data"):
        again = prepare(source, tmp_path, format="recordio", workers=1)
    assert f"{tmp_path} is complete: nothing to do" in caplog.text
    (tmp_path / "lfw.bin").unlink()
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before
    assert again.outcome == "complete" and again.written == first.written and again.bytes == first.bytes


def test_a_complete_set_of_other_arguments_or_with_a_file_missing_is_refused(tmp_path: Path) -> None:
    source = FakeArchive(some_images(), LABELS)
    prepare(source, tmp_path, format="webdataset", shard_size=5)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"made otherwise \(shard_size was 5, is 6\): name another folder"):
        prepare(source, tmp_path, format="webdataset", shard_size=6)
    with pytest.raises(ConfigError, match="format was webdataset, is recordio"):
        prepare(source, tmp_path, format="recordio")
    other = some_images()
    other[0] = image(99)
    with pytest.raises(ConfigError, match=r"made otherwise \(the source has changed\)"):
        prepare(FakeArchive(other, LABELS), tmp_path, format="webdataset", shard_size=5)
    assert contents(tmp_path) == before
    os.truncate(tmp_path / "train-000001.tar", 5120)
    with pytest.raises(ConfigError, match=r"train-000001.tar has 5120 bytes, expected \d+ bytes: remove"):
        prepare(source, tmp_path, format="webdataset", shard_size=5)
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(ConfigError, match=r"train-000001.tar is missing, expected \d+ bytes: remove"):
        prepare(source, tmp_path, format="webdataset", shard_size=5)


@pytest.mark.parametrize("name", ["train.rec", "train.rec.partial", "shard.tar", "notes.txt"])
def test_a_folder_with_foreign_files_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("somebody's")
    with pytest.raises(ConfigError, match=f"holds {name}, which prepare didn't write there: name a new or an empty"):
        prepare(FakeArchive([image(0)], [0]), tmp_path, format="recordio")
    assert contents(tmp_path) == {name: b"somebody's"}


def test_a_state_file_of_something_else_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"made_by": "another"}', '{"made_by": "partial-fc prepare 1", "x": 1}'):
        (tmp_path / "prepare.json").write_text(text)
        with pytest.raises(ConfigError, match=r"prepare\.json is not of this prepare"):
            prepare(FakeArchive([image(0)], [0]), tmp_path, format="recordio")
        assert contents(tmp_path) == {"prepare.json": text.encode()}


def test_a_destination_in_the_way_of_the_source_or_of_a_file(tmp_path: Path) -> None:
    source = FakeArchive([image(0)], [0])
    source.path, source.format = tmp_path, "folder"
    for place in (tmp_path, tmp_path / "out"):
        with pytest.raises(ConfigError, match="is inside the source"):
            prepare(source, place, format="recordio")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file, expected a folder"):
        prepare(FakeArchive([image(0)], [0]), tmp_path / "file", format="recordio")
    with pytest.raises(DataError, match="can't write to .*file/below: Not a directory"):
        prepare(FakeArchive([image(0)], [0]), tmp_path / "file" / "below", format="recordio")


def test_a_second_process_keeps_out(tmp_path: Path) -> None:
    source = FakeArchive([image(0)], [0])
    with Destination(tmp_path), pytest.raises(DataError, match="another process is writing there"):
        prepare(source, tmp_path, format="recordio")
    assert prepare(source, tmp_path, format="recordio").written == 1


class Stop(BaseException):
    """Ends a run, as Ctrl-C does."""


def interrupted(source: Archive, folder: Path, after: int, **options: Any) -> None:
    def progress(done: int, total: int) -> None:
        if done >= after:
            raise Stop

    with pytest.raises(Stop):
        prepare(source, folder, progress=progress, **options)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 2)
    monkeypatch.setattr(module, "_COMMIT_BYTES", 2000)


@pytest.mark.parametrize("format", ["recordio", "webdataset"])
def test_an_interrupted_run_goes_on_where_it_was(
    format: Any, tmp_path: Path, small_steps: None, caplog: pytest.LogCaptureFixture
) -> None:
    images = [image(i) for i in range(30)]
    images[1] = b"bad"
    source = FakeArchive(images, [i % 4 for i in range(30)])
    prepare(source, tmp_path / "whole", format=format)
    interrupted(source, tmp_path / "out", 20, format=format)
    left = os.listdir(tmp_path / "out")
    assert all(name.endswith(".partial") or name == "prepare.json" for name in left) and len(left) > 1
    calls: list[int] = []
    with caplog.at_level("INFO", "partial_fc.data"):
        report = prepare(source, tmp_path / "out", format=format, progress=lambda done, _: calls.append(done))
    assert report.outcome == "resumed" and calls[0] > 10 and "goes on at sample" in caplog.text
    assert report.skipped == {"image": 1} and report.written == 29
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_was_done_is_kept_when_a_piece_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 4)
    images = [image(i) for i in range(30)]
    images[9] = b"bad"
    source = FakeArchive(images, [0] * 30)
    for format, writer in (("recordio", module.PlainRecordWriter), ("webdataset", module.ShardWriter)):
        options: dict[str, Any] = {"format": format} | ({"shard_size": 5} if format == "webdataset" else {})
        prepare(source, tmp_path / format, **options)
        write = writer.write
        seen: list[int] = []

        def stopping(self: Any, sample: int, data: bytes, label: int) -> None:
            write(self, sample, data, label)  # noqa: B023
            seen.append(sample)  # noqa: B023
            if sample == 21:
                raise KeyboardInterrupt

        # Sample 21 is the second of its piece; with shards of 5 (9 is left out) it is the first of a new shard.
        monkeypatch.setattr(writer, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "out" / format, **options)
        assert json.loads((tmp_path / "out" / format / "prepare.json").read_text())["position"] == 20
        monkeypatch.setattr(writer, "write", write)
        report = prepare(source, tmp_path / "out" / format, **options)
        assert report.outcome == "resumed" and (report.written, report.skipped) == (29, {"image": 1})
        assert contents(tmp_path / "out" / format) == contents(tmp_path / format)


def test_what_was_done_is_committed_after_some_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 4)
    source = FakeArchive([image(i) for i in range(12)], [0] * 12)
    committed = []

    def progress(done: int, total: int) -> None:
        committed.append(json.loads((tmp_path / str(seconds) / "prepare.json").read_text())["position"])

    for seconds in (0.0, 1e9):
        monkeypatch.setattr(module, "_COMMIT_SECONDS", seconds)
        prepare(source, tmp_path / str(seconds), format="recordio", progress=progress)
    assert committed == [4, 8, 12, 0, 0, 0]


def test_after_a_failed_sync_the_commit_before_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 4)
    monkeypatch.setattr(module, "_COMMIT_SECONDS", 0.0)
    sync, calls = module.PlainRecordWriter.sync, []

    def failing(self: Any) -> dict[str, int]:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return sync(self)

    monkeypatch.setattr(module.PlainRecordWriter, "sync", failing)
    source = FakeArchive([image(i) for i in range(12)], [0] * 12)
    with pytest.raises(DataError, match="can't write to .*: Input/output error"):
        prepare(source, tmp_path, format="recordio")
    assert len(calls) == 2 and json.loads((tmp_path / "prepare.json").read_text())["position"] == 4


@pytest.mark.timeout(60)
def test_an_interruption_gives_up_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 2)
    seen: list[int] = []
    given_up = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            given_up.set()
            super().shutdown(wait=wait)

    class Slow(FakeArchive):
        def encoded(self, ids: np.ndarray) -> list[np.ndarray]:
            seen.extend(ids.tolist())
            if ids[0] == 2:
                given_up.wait(30)
            return super().encoded(ids)

    monkeypatch.setattr(pieces, "ThreadPoolExecutor", Pool)
    # With one worker, the second piece holds up the third, which waits.
    source = Slow([image(i) for i in range(8)], [0] * 8)
    monkeypatch.setattr(module, "_describe", lambda source, labels: {})
    interrupted(source, tmp_path, 1, format="recordio", workers=1)
    assert set(seen) <= {0, 1, 2, 3}


def _describe(source: Archive) -> dict[str, Any]:
    return module._describe(source, source.all_labels())


def test_a_source_is_known_by_its_bytes_and_its_names() -> None:
    images, names = [b"one image", b"another"], ["a", "b"]
    known = _describe(FakeArchive(images, [0, 1], names))
    assert known == _describe(FakeArchive(images, [0, 1], names))
    others = [
        FakeArchive([b"one image", b"anothes"], [0, 1], names),
        FakeArchive(images, [0, 1], ["a", "c"]),
        FakeArchive(images, [0, 1]),
        FakeArchive(images, [1, 0], names),
    ]
    assert all(_describe(other)["fingerprint"] != known["fingerprint"] for other in others)


@pytest.mark.parametrize("change", ["argument", "source", "lost"])
@pytest.mark.parametrize("format", ["recordio", "webdataset"])
def test_an_interrupted_run_starts_over_where_something_changed(
    format: Any, change: str, tmp_path: Path, small_steps: None, caplog: pytest.LogCaptureFixture
) -> None:
    images = [image(i) for i in range(30)]
    source = FakeArchive(images, [i % 4 for i in range(30)])
    interrupted(source, tmp_path / "out", 20, format=format)
    size = None
    if change == "argument":
        size, reason = 24, "image_size was None, is 24"
    elif change == "source":
        images[3] = image(77)
        source, reason = FakeArchive(images, [i % 4 for i in range(30)]), "the source has changed"
    else:
        name = "train.rec" if format == "recordio" else "train-000000.tar"
        os.truncate(tmp_path / "out" / f"{name}.partial", 10)
        reason = f"{name}.partial: 10 bytes, expected the"
    report = prepare(source, tmp_path / "out", format=format, image_size=size)
    assert "starts over" in caplog.text and reason in caplog.text
    assert report.outcome == "written" and report.written == 30
    prepare(source, tmp_path / "whole", format=format, image_size=size)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_files_put_beside_an_interrupted_run_are_not_overwritten(tmp_path: Path, small_steps: None) -> None:
    source = FakeArchive([image(i) for i in range(30)], [0] * 30)
    interrupted(source, tmp_path, 20, format="recordio")
    (tmp_path / "train.idx").write_text("another set's")
    with pytest.raises(ConfigError, match=r"holds train\.idx, which prepare didn't write"):
        prepare(source, tmp_path, format="recordio")
    assert (tmp_path / "train.idx").read_text() == "another set's"

    (tmp_path / "train.idx").unlink()

    def progress(done: int, total: int) -> None:
        (tmp_path / "train.idx").write_text("another set's")

    with pytest.raises(ConfigError, match=r"train\.idx came from elsewhere while the set was written: move it away"):
        prepare(source, tmp_path, format="recordio", progress=progress)
    assert (tmp_path / "train.idx").read_text() == "another set's"
    (tmp_path / "train.idx").unlink()
    assert prepare(source, tmp_path, format="recordio").written == 30
    assert len(read_recordio(tmp_path)) == 30


def test_a_full_disk_is_one_line_and_no_loss(tmp_path: Path) -> None:
    images = [image(i) for i in range(30)]
    source = FakeArchive(images, [0] * 30)
    prepare(source, tmp_path / "whole", format="recordio")
    script = """
        import resource, sys
        from tests.unit.test_prepare import *
        # A write beyond this fails with EFBIG, as one to a full disk does with ENOSPC.
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        pieces._PIECE, module._COMMIT_BYTES = 2, 2000
        try:
            prepare(FakeArchive([image(i) for i in range(30)], [0] * 30), sys.argv[1], format="recordio")
        except DataError as error:
            print(error)
    """
    out = run_script(script, tmp_path / "out")
    assert "can't write to" in out and "File too large: mend that and run the same command again" in out
    assert out.count("\n") == 1
    report = prepare(source, tmp_path / "out", format="recordio")
    assert report.outcome == "resumed" and contents(tmp_path / "out") == contents(tmp_path / "whole")


def run_script(script: str, *args: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        cwd=ROOT,
        timeout=200,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("format", ["recordio", "webdataset"])
def test_killed_at_any_step_it_goes_on_to_the_same_bytes(format: str, tmp_path: Path) -> None:
    # Each step that reaches the disk is a moment to die at. Children are forked before any thread was started.
    script = """
        import json, os, signal, sys
        from partial_fc.data import writers
        from tests.unit.test_prepare import *
        place, format = Path(sys.argv[1]), sys.argv[2]
        images = [image(i, 20, 20) for i in range(10)]
        images[5] = b"bad"
        source = FakeArchive(images, [i % 3 for i in range(10)], ["a", "b", "c"])
        options = dict(format=format, image_size=16, workers=2)
        if format == "webdataset":
            options |= dict(shard_size=3, shuffle_seed=3)
        # Most of what isn't committed is in the files all the same.
        pieces._PIECE, module._COMMIT_BYTES, writers._BUFFER = 2, 2500, 100

        def child(folder, die_at):
            if (pid := os.fork()) == 0:
                steps = 0
                def counted(function):
                    def call(*args, **kwargs):
                        nonlocal steps
                        steps += 1
                        if steps == die_at:
                            os.kill(os.getpid(), signal.SIGKILL)
                        return function(*args, **kwargs)
                    return call
                for name in ("fsync", "replace", "unlink"):
                    setattr(os, name, counted(getattr(os, name)))
                code = 1
                try:
                    prepare(source, folder, **options)
                    code = 0
                finally:
                    os._exit(code)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        def names(folder):
            return {name for name in os.listdir(folder) if name != "prepare.json" and not name.startswith(".")}

        assert child(place / "whole", 0) == 0
        seen = dict(killed=0, same=0, half=[])
        # Once killed at each step.
        for die_at in range(1, 1000):
            folder = place / f"once{die_at}"
            status = child(folder, die_at)
            if status == 0:
                break
            assert status == -signal.SIGKILL, (die_at, status)
            seen["killed"] += 1
            final = {name for name in names(folder) if not name.endswith(".partial")}
            if final and json.loads((folder / "prepare.json").read_text())["phase"] == "writing":
                seen["half"].append(die_at)
            if "train.idx" in final and final != names(place / "whole"):
                seen["half"].append(die_at)
            assert child(folder, 0) == 0, die_at
            seen["same"] += contents(folder) == contents(place / "whole")
        # Killed again and again, a little later each time.
        for die_at in range(1, 1000, 4):
            if (status := child(place / "often", die_at)) == 0:
                break
        seen["often"] = contents(place / "often") == contents(place / "whole")
        print(json.dumps(seen))
    """
    seen = json.loads(run_script(script, tmp_path, format))
    assert seen["killed"] > 15 and seen["same"] == seen["killed"] and seen["half"] == [] and seen["often"]
    # train.rec and train.idx, or three shards; property and classes.txt.
    assert len(data_files(tmp_path / "whole")) == (4 if format == "recordio" else 5)


@pytest.mark.skipif(not records.OMNIGLOT.exists(), reason="the shared data set isn't there")
def test_omniglot_stays_as_it_is(tmp_path: Path) -> None:
    source = open_archive(records.OMNIGLOT, cache=tmp_path / "cache")
    report = prepare(source, tmp_path / "out", format="recordio", image_size=112)
    assert (report.written, report.reencoded, report.num_classes, report.skipped) == (19280, 0, 964, {})
    again = open_archive(tmp_path / "out")
    ids = np.arange(0, 19280, 241)
    assert np.array_equal(again.all_labels(), source.all_labels())
    assert [a.tobytes() for a in again.encoded(ids)] == [b.tobytes() for b in source.encoded(ids)]


@pytest.mark.parametrize("format", ["recordio", "webdataset"])
def test_a_class_map_renames_merges_and_removes_classes(format: Any, tmp_path: Path) -> None:
    images, labels = some_images(), [*LABELS[:11], UNUSABLE]
    names = ["zero", "one", "two", "three", "four"]
    # 0 and 3 become 1, the others but 4 keep a place of their own.
    class_map = np.array([1, 2, 0, 1, -1])
    source = FakeArchive(images, labels, names)
    report = prepare(source, tmp_path / "new", format=format, class_map=class_map)
    kept = [
        (class_map[label], image) for image, label in zip(images, labels, strict=True) if label not in (4, UNUSABLE)
    ]
    if format == "recordio":
        assert read_recordio(tmp_path / "new") == sorted(kept, key=lambda pair: pair[0])
    else:
        assert [(label, data) for _, label, data in read_shards(tmp_path / "new")] == kept
    assert (report.num_classes, report.samples, report.written) == (3, 12, 8)
    assert report.skipped == {"label": 1, "removed": 3}
    assert report.reasons["removed"] == ["of 1 classes that the class map removes"]
    assert (tmp_path / "new" / "classes.txt").read_text() == "two\nzero\none\n"
    assert (tmp_path / "new" / "property").read_text() == "3,40,40\n"
    assert open_archive(tmp_path / "new").num_classes == 3


def test_a_set_of_another_class_map_is_another_set(tmp_path: Path) -> None:
    source = FakeArchive(some_images(), LABELS)
    options: dict[str, Any] = {"format": "recordio", "class_map": np.arange(5)[::-1]}
    before = prepare(source, tmp_path / "new", **options)
    assert prepare(source, tmp_path / "new", **options).outcome == "complete"
    assert before.written == 12
    with pytest.raises(ConfigError, match="was made otherwise .class_map was [0-9a-f]{32}, is None"):
        prepare(source, tmp_path / "new", format="recordio")
    # A set of before there were class maps says nothing of one.
    prepare(source, tmp_path / "old", format="recordio")
    assert "class_map" not in json.loads((tmp_path / "old" / "prepare.json").read_text())["arguments"]


def test_an_interrupted_set_with_removed_classes_counts_them_once(tmp_path: Path) -> None:
    source = FakeArchive(some_images() * 30, LABELS * 30)
    class_map = np.array([0, 1, 2, -1, 3])
    whole = prepare(source, tmp_path / "a", format="webdataset", class_map=class_map)
    interrupted(source, tmp_path / "b", 40, format="webdataset", class_map=class_map)
    resumed = prepare(source, tmp_path / "b", format="webdataset", class_map=class_map)
    assert resumed.outcome == "resumed" and resumed.skipped == whole.skipped == {"removed": 90}
    assert data_files(tmp_path / "a") == data_files(tmp_path / "b")


def test_a_class_map_that_does_not_fit_the_data_is_refused(tmp_path: Path) -> None:
    source = FakeArchive(some_images(), LABELS)
    with pytest.raises(ConfigError, match=r"fake: has 5 classes, the class map is of 4: expected the map of the head"):
        prepare(source, tmp_path / "new", format="recordio", class_map=np.arange(4))
    with pytest.raises(DataError, match="none of its 12 samples can be used"):
        prepare(source, tmp_path / "new", format="recordio", class_map=np.array([-1, -1, 0, -1, -1]))
    assert not (tmp_path / "new").exists()
