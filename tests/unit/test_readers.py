from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partial_fc.data import readers
from partial_fc.data.readers import RecordReader
from partial_fc.errors import DataError
from tests import records

MAGIC = struct.pack("<I", records.MAGIC)
# The magic word at a multiple of 4 bytes splits a record; at 2 it doesn't. Lengths that need and don't need padding.
IMAGES = [
    b"first",
    b"abcd" + MAGIC + b"efgh",
    b"xy" + MAGIC + b"z",
    MAGIC,
    b"mn12" + MAGIC + MAGIC + b"end",
    b"12345678",
]
LABELS = [0, 0, 1, 1, 2, 2]


def contents(reader: RecordReader) -> tuple[list[bytes], list[int]]:
    ids = np.arange(len(reader))
    return [image.tobytes() for image in reader.encoded(ids)], reader.labels(ids).tolist()


@pytest.mark.parametrize("writer", [records.write_old, records.write_new])
def test_both_writers_are_read(writer, tmp_path: Path) -> None:
    writer(tmp_path, IMAGES, LABELS, classes=3)
    for path in (tmp_path, tmp_path / "train.rec", str(tmp_path)):
        reader = RecordReader(path)
        assert contents(reader) == (IMAGES, LABELS)
        assert reader.num_classes == 3 and reader.path == tmp_path / "train.rec"
    assert reader.labels(np.array([5, 0, 5])).tolist() == [2, 0, 2]


def test_images_are_views_of_the_file(tmp_path: Path) -> None:
    reader = RecordReader(records.write_new(tmp_path, IMAGES, LABELS))
    whole, split = reader.encoded(np.array([0, 1]))
    assert not whole.flags.owndata and not whole.flags.writeable
    assert split.flags.writeable


def test_the_index_decides_not_the_place_in_the_file(tmp_path: Path) -> None:
    framed = [records.frame(records.payload(key, key % 2, f"image {key}".encode())) for key in range(4)]
    records.write(tmp_path, [(3, framed[3]), (1, framed[1]), (0, framed[0]), (2, framed[2])], classes=2)
    assert contents(RecordReader(tmp_path)) == ([b"image 0", b"image 1", b"image 2", b"image 3"], [0, 1, 0, 1])


def test_an_image_with_two_labels_at_key_0_is_no_header(tmp_path: Path) -> None:
    framed = [(key, records.frame(records.payload(key, [7.0, 1.0], b"image"))) for key in range(3)]
    assert contents(RecordReader(records.write(tmp_path, framed))) == ([b"image"] * 3, [7] * 3)


def test_the_number_of_classes(tmp_path: Path) -> None:
    assert RecordReader(records.write_old(tmp_path / "old", IMAGES, LABELS)).num_classes == 3
    assert RecordReader(records.write_old(tmp_path / "both", IMAGES, LABELS, classes=9)).num_classes == 9
    new = records.write_new(tmp_path / "new", IMAGES, LABELS)
    assert RecordReader(new, num_classes=5).num_classes == 5
    reader = RecordReader(new)
    with pytest.raises(DataError, match="set data.num_classes"):
        _ = reader.num_classes
    (new / "property").write_text("nonsense\n")
    with pytest.raises(DataError, match="property: begins with 'nonsense"):
        RecordReader(new)


def test_a_header_rounded_to_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records.write_old(tmp_path, IMAGES, LABELS)
    monkeypatch.setattr(readers, "_FLOAT32_EXACT", 4)
    monkeypatch.setattr(readers.np, "spacing", lambda value: 2.0)
    data = bytearray((tmp_path / "train.rec").read_bytes())
    exact = struct.pack("<ff", 7, 10)
    for first, last in ((6, 9), (8, 11), (7, 10), (5, 10), (9, 10)):
        at = data.index(exact)
        data[at : at + 8] = rounded = struct.pack("<ff", first, last)
        (tmp_path / "train.rec").write_bytes(data)
        reader = RecordReader(tmp_path)
        assert len(reader) == 6 and reader.num_classes == 3
        exact = rounded


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan"), float("inf"), 2.0**24])
def test_a_label_that_is_no_class_is_refused(label: float, tmp_path: Path) -> None:
    images = [(0, records.frame(records.payload(0, 1, b"a"))), (1, records.frame(records.payload(1, label, b"b")))]
    reader = RecordReader(records.write(tmp_path, images))
    assert reader.labels(np.array([0])).tolist() == [1]
    with pytest.raises(DataError, match=r"train.rec: sample 1 at byte 36: label .* expected an integer"):
        reader.labels(np.array([0, 1]))


def test_ids_out_of_range(tmp_path: Path) -> None:
    reader = RecordReader(records.write_new(tmp_path, IMAGES, LABELS))
    for ids in ([-1], [6]):
        with pytest.raises(IndexError, match=r"\[0, 6\)"):
            reader.encoded(np.array(ids))
    assert reader.encoded(np.array([], dtype=np.int64)) == []


@pytest.mark.parametrize(
    "text", ["0\t0\n\n1\t40\n", "0 0\r\n1 40\r\n", "0\t0\n1\t40", " 0\t 0 \n1\t40\n", "1\t40\n0\t0\n"]
)
def test_index_lines_in_other_shapes(text: str, tmp_path: Path) -> None:
    records.write_new(tmp_path, [b"12345678", b"x"], [0, 1])
    (tmp_path / "train.idx").write_bytes(text.encode())
    assert contents(RecordReader(tmp_path)) == ([b"12345678", b"x"], [0, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the index is empty"),
        ("\n\n", "the index is empty"),
        ("0\t0\n1 forty\n", "line 2 is b'1 forty', expected 'key<TAB>byte offset'"),
        ("0\t0\n1\n", "line 2"),
        ("0\t0\t0\n", "line 1"),
        ("0\t0\n\t40\n", "line 2"),
        ("0\t-8\n", "line 1"),
        ("0\t" + "9" * 30 + "\n", "byte 9223372036854775807|line 1"),
        ("0\t0\n1\t4000\n", "the .rec is truncated, or the .idx belongs to another"),
        ("0\t0\n0\t40\n", "key 0 stands there twice"),
    ],
)
def test_a_wrong_index_is_refused(text: str, message: str, tmp_path: Path) -> None:
    records.write_new(tmp_path, [b"12345678", b"x"], [0, 1])
    (tmp_path / "train.idx").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        RecordReader(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.rec: can't read the data set \(No such file.*data.path"):
        RecordReader(tmp_path)
    records.write_new(tmp_path, IMAGES, LABELS)
    (tmp_path / "train.idx").unlink()
    with pytest.raises(DataError, match=r"train.idx: can't read the index .*No such file.*copy it"):
        RecordReader(tmp_path)
    (tmp_path / "train.rec").write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes, too short"):
        RecordReader(tmp_path)


@pytest.mark.parametrize("writer", [records.write_old, records.write_new])
@pytest.mark.parametrize("image", [b"12345678", MAGIC + b"123"])
def test_a_truncated_file_is_refused_at_the_open(writer, image: bytes, tmp_path: Path) -> None:
    writer(tmp_path, [b"1234", image], [0, 0])
    data = (tmp_path / "train.rec").read_bytes()
    last = int((tmp_path / "train.idx").read_text().split()[-1])
    for size in range(4, len(data), 4):
        (tmp_path / "train.rec").write_bytes(data[:size])
        if size == len(data) - 4 and writer is records.write_new and image[4:] != b"5678":
            continue  # Only the zeros at the end are gone then.
        with pytest.raises(DataError, match=f"too short|at byte {last}, isn't whole: the .rec is truncated"):
            RecordReader(tmp_path)


def test_a_truncated_index_is_refused(tmp_path: Path) -> None:
    records.write_old(tmp_path, IMAGES, LABELS)
    lines = (tmp_path / "train.idx").read_text().splitlines(keepends=True)
    (tmp_path / "train.idx").write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match="2 identity keys, the header record tells of 3"):
        RecordReader(tmp_path)
    (tmp_path / "train.idx").write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(DataError, match="5 of 6 image keys.*key 3 is missing"):
        RecordReader(tmp_path)


def test_a_file_that_shrinks_while_in_use_is_noticed(tmp_path: Path) -> None:
    reader = RecordReader(records.write_new(tmp_path, IMAGES, LABELS))
    with open(tmp_path / "train.rec", "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="shrank from .* to 100 bytes"):
        reader.encoded(np.array([5]))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"\0", "no record starts there"),
        (7, b"\x60", "not the first part of a record"),
        (6, b"\xff", "goes on behind the end of the file"),
        (4, b"\x07", "too short for its own header"),
        (8, b"\xff", "too short for its own header"),
        (11, b"\xff", "too short for its own header"),
        (7, b"\x20", "the record's part at byte 72 is no such part"),
    ],
)
def test_a_damaged_record_is_named(at: int, value: bytes, message: str, tmp_path: Path) -> None:
    records.write_new(tmp_path, [b"1234", b"5678", b"90ab"], [0, 1, 2])
    data = bytearray((tmp_path / "train.rec").read_bytes())
    data[36 + at] = value[0]
    (tmp_path / "train.rec").write_bytes(data)
    reader = RecordReader(tmp_path)
    assert [image.tobytes() for image in reader.encoded(np.array([0, 2]))] == [b"1234", b"90ab"]
    for read in (reader.encoded, reader.labels):
        with pytest.raises(DataError, match=f"train.rec: sample 1 at byte 36: .*{message}.*compare both"):
            read(np.arange(3))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_never_do_more_than_raise(data: st.DataObject, tmp_path: Path) -> None:
    writer = data.draw(st.sampled_from([records.write_old, records.write_new]))
    writer(tmp_path, IMAGES, LABELS)
    for name, most in (("train.rec", 6), ("train.idx", 3)):
        content = bytearray((tmp_path / name).read_bytes())
        for _ in range(data.draw(st.integers(0, most))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
            content = content or bytearray(b"\0")
        size = data.draw(st.sampled_from([len(content), len(content) - 3, len(content) // 2]))
        (tmp_path / name).write_bytes(content[:size])
    try:
        reader = RecordReader(tmp_path)
    except DataError:
        return
    for sample in range(len(reader)):
        for read in (reader.encoded, reader.labels):
            try:
                assert len(read(np.array([sample]))) == 1
            except DataError:
                pass


@pytest.mark.skipif(not records.OMNIGLOT.is_dir(), reason="the Omniglot files are not beside the repository")
def test_omniglot() -> None:
    reader = RecordReader(records.OMNIGLOT)
    assert len(reader) == 19280 and reader.num_classes == 964
    labels = reader.labels(np.arange(19280))
    assert np.array_equal(np.bincount(labels), np.full(964, 20))
    assert all(image[:2].tobytes() == b"\xff\xd8" for image in reader.encoded(np.arange(0, 19280, 97)))
