from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import resource
import shutil
import struct
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partial_fc.data import kept as tables
from partial_fc.data.archives import Archive, open_archive
from partial_fc.data.files import MachineError, MappedFiles, Mappings
from partial_fc.data.sources import Sources
from partial_fc.data.table import UNUSABLE
from partial_fc.errors import ConfigError, DataError
from tests import records

MAGIC = records.WORD
IMAGES, LABELS = records.SPLIT_IMAGES, records.SPLIT_LABELS


def contents(archive: Archive) -> tuple[list[bytes], list[int]]:
    ids = np.arange(len(archive))
    return [image.tobytes() for image in archive.encoded(ids)], archive.labels(ids).tolist()


def write_tar(path: Path, samples: list[tuple[bytes, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, (image, label) in enumerate(samples):
            for extension, data in (("jpg", image), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{path.stem}-{number:04}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def checksum(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def tag(field: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([field << 3 | 2, len(data)]) + data


def write_tfrecord(path: Path, samples: list[tuple[bytes, int]], image_key: str = "image") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for image, label in samples:
            features = [(image_key, tag(1, tag(1, image))), ("label", tag(3, tag(1, bytes([label]))))]
            entries = b"".join(tag(1, tag(1, name.encode()) + tag(2, value)) for name, value in features)
            message = tag(1, entries)
            length = struct.pack("<Q", len(message))
            file.write(length + struct.pack("<I", checksum(length)) + message + struct.pack("<I", checksum(message)))


def write_folder(root: Path, samples: list[tuple[bytes, int]]) -> None:
    for number, (image, label) in enumerate(samples):
        folder = root / f"person {label}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(image)


SAMPLES = list(zip(IMAGES, LABELS, strict=True))


def write_recordio(root: Path) -> None:
    records.write_new(root, IMAGES, LABELS, classes=3)


def write_tars(root: Path) -> None:
    write_tar(root / "shard-000001.tar", SAMPLES[4:])
    write_tar(root / "shard-000000.tar", SAMPLES[:4])


def write_tfrecords(root: Path) -> None:
    write_tfrecord(root / "train-00001-of-00002", SAMPLES[3:])
    write_tfrecord(root / "train-00000-of-00002", SAMPLES[:3])


WRITERS: dict[str, Callable[[Path], None]] = {
    "recordio": write_recordio,
    "webdataset": write_tars,
    "tfrecord": write_tfrecords,
    "folder": lambda root: write_folder(root, SAMPLES),
}
SCANNERS = {
    "recordio": "scan_recordio",
    "webdataset": "scan_tars",
    "tfrecord": "scan_tfrecords",
    "folder": "scan_folder",
}


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the scanners that were called."""
    called: list[str] = []

    def count(name: str) -> None:
        scan = getattr(tables, name)

        def counting(*args: object, **options: object) -> object:
            called.append(name)
            return scan(*args, **options)

        monkeypatch.setattr(tables, name, counting)

    for name in SCANNERS.values():
        count(name)
    return called


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_is_recognised_and_read(format: str, tmp_path: Path, scans: list[str]) -> None:
    WRITERS[format](tmp_path)
    for asked in ("auto", format):
        archive = open_archive(str(tmp_path), format=asked)
        assert archive.format == format and contents(archive) == (IMAGES, LABELS)
        assert archive.num_classes == 3 and archive.all_labels().tolist() == LABELS
        assert archive.path == (tmp_path / "train.rec" if format == "recordio" else tmp_path)
        assert archive.root == tmp_path and all(path.is_file() for path in archive.files)
    assert scans == [SCANNERS[format]]
    assert archive.labels(np.array([5, 0, 5])).tolist() == [2, 0, 2]
    lengths = archive.lengths(np.arange(6))
    assert lengths.dtype == np.int64 and archive.labels(np.arange(6)).dtype == np.int64
    parts = [1, 3, 4] if format == "recordio" else []
    assert lengths.tolist() == [-1 if row in parts else len(image) for row, image in enumerate(IMAGES)]
    assert all(archive.fault(sample) is None for sample in range(6))


@pytest.mark.parametrize("format", WRITERS)
def test_a_table_that_was_kept_is_read_as_it_was_made(format: str, tmp_path: Path, scans: list[str]) -> None:
    WRITERS[format](tmp_path)
    made, kept = open_archive(tmp_path), open_archive(tmp_path)
    assert len(scans) == 1
    for name in ("file", "offset", "length", "label"):
        one, other = getattr(made._table, name), getattr(kept._table, name)
        assert np.array_equal(one, other) and one.dtype == other.dtype and type(other) is np.ndarray
        assert not other.flags.writeable
    assert [made.locate(sample) for sample in range(6)] == [kept.locate(sample) for sample in range(6)]
    names = None if kept.class_names is None else list(kept.class_names)
    assert names == (["person 0", "person 1", "person 2"] if format == "folder" else None)
    assert made.files == kept.files and contents(kept) == (IMAGES, LABELS)


@pytest.mark.parametrize("writer", [records.write_old, records.write_new])
def test_both_writers_of_recordio_are_read(writer, tmp_path: Path) -> None:
    writer(tmp_path, IMAGES, LABELS, classes=3)
    for path in (tmp_path, tmp_path / "train.rec", str(tmp_path)):
        archive = open_archive(path)
        assert contents(archive) == (IMAGES, LABELS)
        assert archive.num_classes == 3 and archive.path == tmp_path / "train.rec"


def test_a_folder_and_its_only_file_share_a_table(tmp_path: Path, scans: list[str]) -> None:
    records.write_new(tmp_path, IMAGES, LABELS)
    for name in ("rec", "idx"):
        (tmp_path / f"train.{name}").rename(tmp_path / f"faces.{name}")
    assert open_archive(tmp_path).path == open_archive(tmp_path / "faces.rec").path == tmp_path / "faces.rec"
    assert len(scans) == 1


def test_images_are_views_of_the_file(tmp_path: Path) -> None:
    archive = open_archive(records.write_new(tmp_path, IMAGES, LABELS))
    whole, split = archive.encoded(np.array([0, 1]))
    assert not whole.flags.owndata and not whole.flags.writeable
    assert split.flags.writeable


def test_images_are_read_in_any_order_from_any_file(tmp_path: Path) -> None:
    images = [f"image {number}".encode() for number in range(30)]
    for shard in range(5):
        write_tar(tmp_path / f"{shard}.tar", [(image, 0) for image in images[6 * shard : 6 * shard + 6]])
    archive = open_archive(tmp_path)
    ids = np.random.default_rng(0).integers(0, 30, 100)
    assert [image.tobytes() for image in archive.encoded(ids)] == [images[sample] for sample in ids]
    assert archive.encoded(np.array([], dtype=np.int64)) == []


def test_of_very_many_files_few_are_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(40):
        write_tar(tmp_path / f"{shard:02}.tar", [(f"image {shard}".encode(), 0)])
    archive = open_archive(tmp_path)
    archive._files.mappings = Mappings(4)
    seen: list[int] = []
    read = MappedFiles.bytes

    def count(files: MappedFiles, file: int) -> np.ndarray:
        data = read(files, file)
        seen.append(mapped(tmp_path))
        return data

    monkeypatch.setattr(MappedFiles, "bytes", count)
    ids = np.array([*range(40), *range(40)])
    images = archive.encoded(ids)
    assert [image.tobytes() for image in images] == [f"image {shard}".encode() for shard in ids]
    # Those that are kept, and those of the few images that are read at once.
    assert max(seen) <= 4 + 8 and mapped(tmp_path) == 4


def mapped(folder: Path) -> int:
    """Tar files below a folder that this process has mapped."""
    return len(re.findall(rf" {re.escape(str(folder))}/.*\.tar$", Path("/proc/self/maps").read_text(), re.M))


@pytest.mark.timeout(60)
def test_several_data_sets_with_many_files_keep_to_the_descriptors_there_are(tmp_path: Path) -> None:
    # None of them has more than are kept, 64.
    for number in range(5):
        for shard in range(50):
            write_tar(tmp_path / f"{number}" / f"{shard:02}.tar", [(b"%d %d" % (number, shard), shard)])
    expected = [b"%d %d" % (number, shard) for number in range(5) for shard in range(50)]
    wrong: list[object] = []

    def read(sources: Sources, seed: int) -> None:
        try:
            held = []
            for step in range(6):
                ids = np.random.default_rng((seed, step)).integers(0, 250, 100)
                held.append(sources.encoded(ids))
                wrong.extend(i for i, image in zip(ids, held[-1], strict=True) if image.tobytes() != expected[i])
        except DataError as error:
            wrong.append(error)

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[1]), limits[1]))
    try:
        sources = Sources([open_archive(tmp_path / f"{number}") for number in range(5)])
        threads = [threading.Thread(target=read, args=(sources, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and mapped(tmp_path) <= 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("format", WRITERS)
def test_too_many_open_files_are_no_fault_of_a_sample(format: str, tmp_path: Path) -> None:
    WRITERS[format](tmp_path)
    made, kept_one = open_archive(tmp_path), open_archive(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        for archive in (made, kept_one):
            with pytest.raises(MachineError, match=r"can't read the (data set|image) \(Too many open files.*ulimit -n"):
                archive.encoded(np.arange(6))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert contents(made) == contents(kept_one) == (IMAGES, LABELS)


def test_a_table_that_cannot_be_read_now_is_not_made_anew(
    tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recordio(tmp_path)
    open_archive(tmp_path)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(tables.np, "load", refuse)
        with pytest.raises(MachineError, match=r"/train-\w+: can't read the table \(Too many open files\).*ulimit"):
            open_archive(tmp_path)
    open_archive(tmp_path)
    assert len(scans) == 1


@pytest.mark.parametrize("format", WRITERS)
def test_ids_out_of_range(format: str, tmp_path: Path) -> None:
    WRITERS[format](tmp_path)
    archive = open_archive(tmp_path)
    for ids in ([-1], [6], [0, 6]):
        for read in (archive.encoded, archive.labels, archive.lengths):
            with pytest.raises(IndexError, match=r"\[0, 6\)"):
                read(np.array(ids))
    for sample in (-1, 6):
        for ask in (archive.fault, archive.locate):
            with pytest.raises(IndexError, match=r"\[0, 6\)"):
                ask(sample)


def test_the_place_of_a_sample_is_told(tmp_path: Path) -> None:
    archive = open_archive(records.write_new(tmp_path / "rec", [b"1234", b"5678"], [0, 1]))
    assert archive.locate(1) == f"{tmp_path}/rec/train.rec, byte 68"
    write_tars(tmp_path / "tars")
    assert open_archive(tmp_path / "tars").locate(4) == f"{tmp_path}/tars/shard-000001.tar, byte 512"
    write_folder(tmp_path / "folder", SAMPLES)
    assert open_archive(tmp_path / "folder").locate(3) == f"{tmp_path}/folder/person 1/3.jpg"


def test_a_damaged_record_and_a_bad_label_are_faults(tmp_path: Path) -> None:
    records.write_new(tmp_path, [b"1234", b"5678", b"90ab", b"cdef"], [0, 1, -1, 3])
    data = bytearray((tmp_path / "train.rec").read_bytes())
    data[36] = 0
    (tmp_path / "train.rec").write_bytes(data)
    for _ in range(2):
        archive = open_archive(tmp_path)
        assert archive.labels(np.arange(4)).tolist() == [0, UNUSABLE, UNUSABLE, 3] and archive.num_classes == 4
        kinds = [fault and fault.kind for fault in map(archive.fault, range(4))]
        assert kinds == [None, "record", "label", None]
        assert [image.tobytes() for image in archive.encoded(np.array([0, 2, 3]))] == [b"1234", b"90ab", b"cdef"]
        with pytest.raises(DataError, match="sample 1 can't be used: .*train.rec: byte 36: no record starts.*compare"):
            archive.encoded(np.arange(4))
        assert archive.lengths(np.array([1])).tolist() == [-1]


def test_a_data_set_without_a_usable_sample_is_refused(tmp_path: Path) -> None:
    records.write_new(tmp_path, [b"1234", b"5678"], [-1, -2])
    with pytest.raises(DataError, match=r"train.rec: none of its 2 samples can be used; the first: .*label -1.0"):
        open_archive(tmp_path)


def test_the_number_of_classes(tmp_path: Path) -> None:
    assert open_archive(records.write_old(tmp_path / "old", IMAGES, LABELS)).num_classes == 3
    assert open_archive(records.write_old(tmp_path / "both", IMAGES, LABELS, classes=9)).num_classes == 9
    new = records.write_new(tmp_path / "new", IMAGES, LABELS)
    assert open_archive(new, num_classes=5).num_classes == 5
    assert open_archive(new).num_classes == 3
    (new / "property").write_text("nonsense\n")
    with pytest.raises(DataError, match="property: begins with 'nonsense"):
        open_archive(new)


def test_a_number_of_classes_that_the_labels_contradict_is_refused(tmp_path: Path) -> None:
    records.write_new(tmp_path, IMAGES, LABELS)
    message = rf"data.num_classes: got 2, but sample 4 \({tmp_path}/train.rec, byte \d+\) has the label 2: expected.* 3"
    for _ in range(2):
        with pytest.raises(ConfigError, match=message):
            open_archive(tmp_path, num_classes=2)
    with pytest.raises(ConfigError, match="data.num_classes: got 0, expected 1 or more"):
        open_archive(tmp_path, num_classes=0)
    assert open_archive(tmp_path, num_classes=3).num_classes == 3


def test_a_label_that_is_far_above_the_others_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "a.tar", [(b"x", 0), (b"x", 2000), (b"x", 1)])
    write_tar(tmp_path / "b.tar", [(b"x", 0), (b"x", 3000), (b"x", 1)])
    assert open_archive(tmp_path / "a.tar").num_classes == 2001
    assert open_archive(tmp_path / "b.tar", num_classes=3001).num_classes == 3001
    assert not caplog.messages
    assert open_archive(tmp_path / "b.tar").num_classes == 3001
    (line,) = caplog.messages
    place = f"{tmp_path}/b.tar"
    assert line.startswith(
        f"{place}: 3001 classes for 3 samples, since sample 1 ({place}, byte 2560) has the label 3000:"
    )


def test_what_stands_beside_the_data_must_be_readable(tmp_path: Path) -> None:
    write_tars(tmp_path)
    for name in ("property", "classes.txt"):
        (tmp_path / name).mkdir()
        with pytest.raises(DataError, match=rf"/{name}: can't read the file \(Is a directory\): give the right"):
            open_archive(tmp_path)
        (tmp_path / name).rmdir()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.rec: can't read the data set \(No such file.*data.path"):
        open_archive(tmp_path, format="recordio")
    with pytest.raises(DataError, match=r"train.rec: can't read the data set \(No such file.*data.path"):
        open_archive(tmp_path / "train.rec")
    with pytest.raises(DataError, match=r"nowhere: can't read the data set \(No such file.*data.path"):
        open_archive(tmp_path / "nowhere")
    records.write_new(tmp_path, IMAGES, LABELS)
    (tmp_path / "train.idx").unlink()
    with pytest.raises(DataError, match=r"train.idx: can't read the index .*No such file.*copy it"):
        open_archive(tmp_path)
    (tmp_path / "train.rec").write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes, too short"):
        open_archive(tmp_path)


def test_several_formats_in_one_folder_are_refused(tmp_path: Path) -> None:
    write_recordio(tmp_path)
    write_tars(tmp_path)
    write_folder(tmp_path, SAMPLES)
    with pytest.raises(ConfigError, match=r"several formats.*recordio \(train.rec\) and folder \(person .*data.format"):
        open_archive(tmp_path)
    for format in ("recordio", "webdataset", "folder"):
        archive = open_archive(tmp_path, format=format)
        assert archive.format == format and contents(archive) == (IMAGES, LABELS)
    with pytest.raises(ConfigError, match=r"found shard-.*, train.rec, expected files of data.format=tfrecord: set"):
        open_archive(tmp_path, format="tfrecord")


def test_a_folder_without_a_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / ".hidden.tar").write_text("nothing")
    with pytest.raises(ConfigError, match="found no data set, expected a .rec file.*data.path.*data.format"):
        open_archive(tmp_path)
    with pytest.raises(ConfigError, match="found no data set, expected files of data.format=webdataset"):
        open_archive(tmp_path, format="webdataset")


@pytest.mark.parametrize(
    "name", ["a.tar.gz", "a.tgz", "a.tar.zst", "a.tar.xz", "a.tfrecord.gz", "train-00000-of-00002.gz"]
)
def test_compressed_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path, tmp_path / name, tmp_path / (name[:-1] + "?")):
        for format in ("auto", "webdataset"):
            with pytest.raises(ConfigError, match=f"{name}: is compressed.*unpack it"):
                open_archive(path, format=format)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("x.rec", "recordio"),
        ("x.tar", "webdataset"),
        ("x.tfrecord", "tfrecord"),
        ("x.tfrecords", "tfrecord"),
        ("x.tfrecord-00000-of-00010", "tfrecord"),
        ("train-00000-of-00010", "tfrecord"),
        ("x.tfrecord.idx", None),
        ("x.idx", None),
        ("train-00000-of-00010.parquet", None),
        ("train.record", None),
    ],
)
def test_the_format_of_a_file_is_told_from_its_name(name: str, format: str | None, tmp_path: Path) -> None:
    samples = [(b"image", 0)]
    if format == "recordio":
        records.write_new(tmp_path, [b"image"], [0])
        (tmp_path / "train.rec").rename(tmp_path / "x.rec")
        (tmp_path / "train.idx").rename(tmp_path / "x.idx")
    elif format == "webdataset":
        write_tar(tmp_path / name, samples)
    else:
        write_tfrecord(tmp_path / name, samples)
    if format:
        archive = open_archive(tmp_path / name)
        assert archive.format == open_archive(tmp_path).format == format and archive.path == tmp_path / name
        return
    with pytest.raises(ConfigError, match=f"{name}: the format can't be told.*data.format"):
        open_archive(tmp_path / name)
    assert open_archive(tmp_path / name, format="tfrecord").format == "tfrecord"


def test_of_several_recordio_files_one_must_be_named(tmp_path: Path) -> None:
    for name in ("b", "a"):
        records.write_new(tmp_path, [name.encode()], [0])
        (tmp_path / "train.rec").rename(tmp_path / f"{name}.rec")
        (tmp_path / "train.idx").rename(tmp_path / f"{name}.idx")
    for format in ("auto", "recordio"):
        with pytest.raises(ConfigError, match="no train.rec, but a.rec, b.rec: set data.path to one"):
            open_archive(tmp_path, format=format)
        with pytest.raises(ConfigError, match="2 .rec files, expected one: .*data.more"):
            open_archive(tmp_path / "*.rec", format=format)
    assert contents(open_archive(tmp_path / "b.rec")) == ([b"b"], [0])
    assert contents(open_archive(tmp_path / "a.rec")) == ([b"a"], [0])


def test_files_by_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(8, 12):
        write_tar(tmp_path / f"set {shard % 2}" / f"s-{shard:03}.tar", [(b"%d" % shard, 0)])

    def found(pattern: str) -> list[bytes]:
        return contents(open_archive(pattern))[0]

    assert found(f"{tmp_path}/set 1/*.tar") == [b"9", b"11"]
    assert found(f"{tmp_path}/set 1/s-0[01]?.tar") == [b"9", b"11"]
    assert found(f"{tmp_path}/*/*.tar") == [b"8", b"10", b"9", b"11"]
    assert found(f"{tmp_path}/set 0/s-{{008..008}}.tar") == [b"8"]
    assert found(f"{tmp_path}/set {{0,1}}/s-*.tar") == [b"8", b"10", b"9", b"11"]
    assert found(f"{tmp_path}/set 1/s-0{{09,11}}.tar") == [b"9", b"11"]
    assert found(f"{tmp_path}/set 1/s-01{{1..1}}.tar") == [b"11"]
    monkeypatch.chdir(tmp_path)
    archive = open_archive("set 1/*.tar")
    assert contents(archive)[0] == [b"9", b"11"] and archive.path == Path("set 1")
    shutil.copy("set 1/s-009.tar", "a{0..9}[x].tar")
    assert found(f"{tmp_path}/a{{0..9}}[x].tar") == [b"9"]


def test_shards_of_a_pattern_that_are_missing_are_named(tmp_path: Path) -> None:
    for shard in (0, 1, 3):
        write_tar(tmp_path / f"s-{shard:02}.tar", [(b"x", 0)])
    with pytest.raises(DataError, match=r"s-02.tar: there is no such file, and 2 of the 5 .*copy"):
        open_archive(tmp_path / "s-{00..04}.tar")
    with pytest.raises(DataError, match=r"t-\*.tar: there is no such file, and 1 of the 1"):
        open_archive(tmp_path / "t-*.tar")
    for braces in ("{3..1}", "{a..c}", "{}", "{0..9999999}", "{x}"):
        with pytest.raises(ConfigError, match=r"data.path: \{.*can't be expanded, expected a range"):
            open_archive(tmp_path / f"s-{braces}.tar")
    (tmp_path / "s-00.tfrecord").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"can't be told from the names \(s-.*data.format"):
        open_archive(tmp_path / "s-*")


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    write_tars(tmp_path)
    with pytest.raises(ConfigError, match="data.format: got 'lmdb', expected auto or one of recordio, folder"):
        open_archive(tmp_path, format="lmdb")
    for key in ("image_key", "label_key"):
        with pytest.raises(ConfigError, match="data.image_key.*for TFRecord, but .* is webdataset"):
            open_archive(tmp_path, **{key: "jpg"})
    with pytest.raises(ConfigError, match="expected a folder with data.format=folder"):
        open_archive(tmp_path / "shard-000000.tar", format="folder")


def test_progress_is_told_while_files_are_scanned(tmp_path: Path) -> None:
    write_recordio(tmp_path)
    told: list[tuple[int, int]] = []
    for _ in range(2):
        open_archive(tmp_path, progress=lambda *done: told.append(done))
    size = (tmp_path / "train.rec").stat().st_size
    assert told[-1] == (size, size) and told.count((size, size)) == 1


def later(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def grow(path: Path) -> None:
    """Another size, the same time of change."""
    status = path.stat()
    with open(path, "ab") as file:
        file.write(bytes(512))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("format", "change"),
    [
        ("recordio", lambda root: later(root / "train.rec")),
        ("recordio", lambda root: later(root / "train.idx")),
        ("recordio", lambda root: later(root / "property")),
        ("recordio", lambda root: (root / "property").unlink()),
        ("recordio", lambda root: grow(root / "train.rec")),
        ("webdataset", lambda root: later(root / "shard-000001.tar")),
        ("webdataset", lambda root: grow(root / "shard-000001.tar")),
        ("webdataset", lambda root: write_tar(root / "shard-000002.tar", SAMPLES)),
        ("webdataset", lambda root: (root / "shard-000001.tar").unlink()),
        ("tfrecord", lambda root: later(root / "train-00000-of-00002")),
        ("tfrecord", lambda root: write_tfrecord(root / "train-00002-of-00003", SAMPLES)),
        ("folder", lambda root: write_folder(root / "deep", SAMPLES)),
        ("folder", lambda root: (root / "person 1" / "new.jpg").write_bytes(b"x")),
        ("folder", lambda root: (root / "person 1" / "empty" / "new.jpg").write_bytes(b"x")),
        ("folder", lambda root: (root / "person 0" / "0.jpg").unlink()),
    ],
)
def test_a_table_is_made_anew_when_files_changed(
    format: str,
    change: Callable[[Path], None],
    tmp_path: Path,
    scans: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = tmp_path / "data"
    WRITERS[format](root)
    if format == "folder":
        (root / "person 1" / "empty").mkdir()
        for folder, _, _ in os.walk(root):
            os.utime(folder, ns=(10**18, 10**18))
    caplog.set_level(logging.INFO, logger="partial_fc.data")
    open_archive(root)
    open_archive(root)
    assert len(scans) == 1
    change(root)
    caplog.clear()
    open_archive(root)
    assert len(scans) == 2
    (line,) = caplog.messages
    assert re.search(rf"scanning the data set for its table, since {root}[\w/. -]* was changed$", line)
    open_archive(root)
    assert len(scans) == 2


def test_other_keys_of_tfrecord_have_their_own_table(tmp_path: Path, scans: list[str]) -> None:
    write_tfrecord(tmp_path / "a.tfrecord", [(b"one", 0)], image_key="image")
    write_tfrecord(tmp_path / "b.tfrecord", [(b"two", 1)], image_key="face")
    assert contents(open_archive(tmp_path / "a.tfrecord")) == ([b"one"], [0])
    for _ in range(2):
        archive = open_archive(tmp_path / "b.tfrecord", image_key="face", label_key="label")
        assert contents(archive) == ([b"two"], [1])
    assert len(scans) == 2
    with pytest.raises(DataError, match="b.tfrecord"):
        open_archive(tmp_path / "b.tfrecord", image_key="nose")


def test_tables_are_kept_beside_the_data_or_where_it_is_said(tmp_path: Path, scans: list[str]) -> None:
    for name in ("one", "two"):
        records.write_new(tmp_path / name, [name.encode()], [0])
    for _ in range(2):
        for name in ("one", "two"):
            archive = open_archive(tmp_path / name, cache=tmp_path / "tables" / "here")
            assert contents(archive) == ([name.encode()], [0])
    assert len(scans) == 2 and not (tmp_path / "one" / ".partial_fc").exists()
    tables = sorted(path.name for path in (tmp_path / "tables" / "here").iterdir())
    assert len(tables) == 2 and all(name.startswith("train-") for name in tables)
    open_archive(tmp_path / "one")
    assert len(scans) == 3 and len(list((tmp_path / "one" / ".partial_fc").iterdir())) == 1
    open_archive(tmp_path / "one", cache=tmp_path / "elsewhere")
    assert len(scans) == 3


@pytest.mark.parametrize("format", WRITERS)
def test_what_changes_while_it_is_scanned_is_scanned_anew(
    format: str, tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    WRITERS[format](root)
    first = sorted(path for path in root.iterdir() if path.name != "property")[-1]
    scan = getattr(tables, SCANNERS[format])

    def change_behind(*args: object, **options: object) -> object:
        found = scan(*args, **options)
        later(first)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(tables, SCANNERS[format], change_behind)
        open_archive(root)
    for _ in range(2):
        assert contents(open_archive(root)) == (IMAGES, LABELS)
    assert len(scans) == 2


def test_the_home_folder_may_be_meant(tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_recordio(tmp_path / "faces")
    for _ in range(2):
        assert open_archive("~/faces", cache="~/tables").path == tmp_path / "faces" / "train.rec"
    assert len(scans) == 1 and len(list((tmp_path / "tables").iterdir())) == 1
    assert sorted(os.listdir(tmp_path)) == ["faces", "tables"]


def test_the_folder_that_was_changed_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "faces", SAMPLES)
    monkeypatch.chdir(tmp_path / "faces")
    caplog.set_level(logging.INFO, logger="partial_fc.data")
    open_archive(tmp_path / "faces", cache=tmp_path / "tables")
    later(tmp_path / "faces")
    open_archive(tmp_path / "faces", cache=tmp_path / "tables")
    assert caplog.messages[-1].endswith(f"since {tmp_path}/faces was changed")


def test_a_data_set_keeps_its_table_when_it_is_moved(tmp_path: Path, scans: list[str]) -> None:
    records.write_new(tmp_path / "before", [b"1234", b"5678"], [0, -1])
    open_archive(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    archive = open_archive(tmp_path / "after")
    assert len(scans) == 1 and archive.path == tmp_path / "after" / "train.rec"
    fault = archive.fault(1)
    assert fault is not None and fault.reason.startswith(f"{tmp_path}/after/train.rec: byte 36: label -1.0")


def test_without_a_place_for_it_the_table_stays_in_memory(
    tmp_path: Path, scans: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    write_recordio(root)
    (root / ".partial_fc").write_text("in the way")
    (tmp_path / "tables").write_text("in the way")
    for cache in (None, tmp_path / "tables"):
        caplog.clear()
        assert contents(open_archive(root, cache=cache)) == (IMAGES, LABELS)
        (line,) = caplog.messages
        assert "its table can't be kept" in line and "data.cache" in line

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    caplog.clear()
    (root / ".partial_fc").unlink()
    monkeypatch.setattr(tables, "keep_arrays", full)
    assert contents(open_archive(root)) == (IMAGES, LABELS)
    assert "No space left on device" in caplog.messages[0] and len(caplog.messages) == 1
    caplog.clear()
    monkeypatch.setattr(tables.os, "access", lambda path, mode: False)
    open_archive(root)
    assert ".partial_fc is read-only" in caplog.messages[0] and len(scans) == 4


def kept(root: Path) -> Path:
    (folder,) = (root / ".partial_fc").iterdir()
    return folder


def edit(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        facts = json.loads((folder / "table.json").read_text())
        (folder / "table.json").write_text(json.dumps({**facts, **changes}))

    return change


def store(name: str, array: object, dtype: type) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / f"{name}.npy", np.array(array, dtype=dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(version=0), "is a table of something else"),
        (edit(options={}), "is a table of something else"),
        (edit(state=None), "is damaged"),
        (edit(state=[]), "was changed"),
        (edit(num_classes="many"), "is damaged"),
        (edit(num_classes=1), "a label is out of range"),
        (edit(faults=[[0, "label", "why"]]), "the faults aren't those"),
        (edit(faults=7), "is damaged"),
        (lambda folder: (folder / "table.json").write_text("[1]"), "is damaged"),
        (lambda folder: (folder / "table.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "table.json").unlink(), "table.json is missing"),
        (lambda folder: (folder / "label.npy").unlink(), "label.npy is missing"),
        (lambda folder: os.truncate(folder / "offset.npy", 150), "is damaged"),
        (lambda folder: os.truncate(folder / "offset.npy", 0), "is damaged"),
        (
            lambda folder: (folder / "offset.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'a': (" + b" " * 20),
            "is damaged",
        ),
        (store("label", LABELS, np.int32), "label.npy: int32"),
        (store("label", LABELS[:5], np.int64), "several lengths"),
        (store("label", [0, 0, 1, 1, 2, -1], np.int64), "the faults aren't those"),
        (store("label", [0, 0, 1, 1, 2, -2], np.int64), "a label is out of range"),
        (store("file", [0, 0, 0, 0, 0, 1], np.int32), "a row is in no file"),
        (store("file", [0, 0, 0, 0, 0, -1], np.int32), "a row is in no file"),
        (store("name_ends", [100], np.int64), "not the ends of names"),
    ],
)
def test_a_damaged_or_foreign_table_is_made_anew(
    change: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    scans: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_recordio(tmp_path)
    open_archive(tmp_path)
    change(kept(tmp_path))
    caplog.set_level(logging.INFO, logger="partial_fc.data")
    caplog.clear()
    assert contents(open_archive(tmp_path)) == (IMAGES, LABELS)
    (line,) = caplog.messages
    assert message in line and "scanning the data set" in line
    assert len(scans) == 2
    assert contents(open_archive(tmp_path)) == (IMAGES, LABELS)
    assert len(scans) == 2 and len(list((tmp_path / ".partial_fc").iterdir())) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_table_never_does_more_than_raise(data: st.DataObject, tmp_path: Path) -> None:
    format = data.draw(st.sampled_from(["recordio", "webdataset", "folder"]))
    root = tmp_path / format
    if not root.exists():
        WRITERS[format](root)
    open_archive(root)
    paths = sorted(kept(root).iterdir())
    for path in data.draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3)):
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
        path.unlink()
        path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        archive = open_archive(root)
        for sample in range(len(archive)):
            try:
                assert len(archive.encoded(np.array([sample]))) == 1
            except DataError:
                pass
    except DataError:
        pass
    shutil.rmtree(root / ".partial_fc")


@pytest.mark.timeout(60)
def test_several_may_open_a_data_set_for_the_first_time_at_once(tmp_path: Path) -> None:
    write_tars(tmp_path)
    together = threading.Barrier(6)
    read: list[object] = []

    def open_it() -> None:
        for _ in range(5):
            together.wait()
            read.append(contents(open_archive(tmp_path)))
            together.wait()
            later(tmp_path / "shard-000000.tar") if together.wait() == 0 else None

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [(IMAGES, LABELS)] * 30
    assert len(list((tmp_path / ".partial_fc").iterdir())) == 1


def test_a_file_that_shrinks_while_in_use_is_noticed(tmp_path: Path) -> None:
    archive = open_archive(records.write_new(tmp_path, IMAGES, LABELS))
    archive.encoded(np.array([5]))
    with open(tmp_path / "train.rec", "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="shrank from .* to 100 bytes"):
        archive.encoded(np.array([5]))


@pytest.mark.parametrize("sample", [5, 4])
def test_a_file_that_changed_before_it_is_read_is_noticed(sample: int, tmp_path: Path) -> None:
    archive = open_archive(records.write_new(tmp_path, IMAGES, LABELS))
    os.truncate(tmp_path / "train.rec", 100)
    with pytest.raises(DataError, match=f"train.rec: sample {sample}, bytes .*the file has 100: it was changed since"):
        archive.encoded(np.array([sample]))
    (tmp_path / "train.rec").write_bytes(bytes(1000))
    with pytest.raises(DataError, match="record of key 0, at byte 0: no record starts there"):
        open_archive(tmp_path)


def test_parts_that_changed_before_they_are_read_are_noticed(tmp_path: Path) -> None:
    archive = open_archive(records.write_new(tmp_path, IMAGES, LABELS))
    (tmp_path / "train.rec").write_bytes(bytes((tmp_path / "train.rec").stat().st_size))
    with pytest.raises(
        DataError, match=r"train.rec: sample 1 at byte 40: the record's part at byte 40 is no such part"
    ):
        archive.encoded(np.array([1]))


def test_an_image_file_that_is_gone_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, SAMPLES)
    archive = open_archive(tmp_path)
    (tmp_path / "person 1" / "2.jpg").unlink()
    with pytest.raises(DataError, match=r"person 1/2.jpg: can't read the image \(No such file"):
        archive.encoded(np.array([0, 2]))
    (tmp_path / "person 1" / "3.jpg").write_bytes(b"overwritten")
    assert archive.encoded(np.array([3]))[0].tobytes() == b"overwritten"


def test_images_behind_links_are_followed_and_watched(tmp_path: Path, scans: list[str]) -> None:
    write_folder(tmp_path / "elsewhere", SAMPLES)
    (tmp_path / "data").mkdir()
    for label in range(3):
        (tmp_path / "data" / f"person {label}").symlink_to(tmp_path / "elsewhere" / f"person {label}")
    (tmp_path / "elsewhere" / "person 0" / "loop").symlink_to(tmp_path / "data")
    open_archive(tmp_path / "data")
    os.utime(tmp_path / "elsewhere" / "person 2", ns=(10**18, 10**18))
    open_archive(tmp_path / "data")
    assert len(scans) == 2
    open_archive(tmp_path / "data")
    assert len(scans) == 2


@pytest.mark.skipif(not records.OMNIGLOT.is_dir(), reason="the Omniglot files are not beside the repository")
def test_omniglot(tmp_path: Path) -> None:
    for _ in range(2):
        archive = open_archive(records.OMNIGLOT, cache=tmp_path)
        assert len(archive) == 19280 and archive.num_classes == 964
        labels = archive.labels(np.arange(19280))
        assert np.array_equal(np.bincount(labels), np.full(964, 20))
        assert all(image[:2].tobytes() == b"\xff\xd8" for image in archive.encoded(np.arange(0, 19280, 97)))


@pytest.mark.parametrize("format", ["recordio", "webdataset"])
def test_number_and_names_of_classes_may_stand_beside_the_files(format: str, tmp_path: Path, scans: list[str]) -> None:
    root = tmp_path / "set"
    WRITERS[format](root)
    classes = max(LABELS) + 3
    (root / "property").write_text(f"{classes},112,112\n")
    (root / "classes.txt").write_text("".join(f"class {number}\n" for number in range(classes)))
    for _ in range(2):
        archive = open_archive(root)
        assert archive.num_classes == classes and archive.class_names is not None
        assert list(archive.class_names) == [f"class {number}" for number in range(classes)]
    assert len(scans) == 1
    (root / "classes.txt").write_text("another\n")
    assert open_archive(root).class_names is None and len(scans) == 2
    (root / "property").write_text(f"{max(LABELS)},112,112\n")
    if format == "webdataset":
        with pytest.raises(DataError, match=f"property tells of {max(LABELS)} classes, but sample .* has the label"):
            open_archive(root)
