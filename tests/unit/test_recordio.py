from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partial_fc.data import recordio
from partial_fc.data.files import map_file
from partial_fc.data.recordio import joined_image, scan_recordio
from partial_fc.data.table import UNUSABLE, Scan
from partial_fc.errors import DataError
from tests import records

MAGIC = records.WORD
IMAGES, LABELS = records.SPLIT_IMAGES, records.SPLIT_LABELS


def scan(folder: Path) -> Scan:
    return scan_recordio(folder / "train.rec")


def image(folder: Path, table: Scan, row: int) -> bytes:
    data = map_file(folder / "train.rec")
    offset, length = int(table.offset[row]), int(table.length[row])
    if length < 0:
        return joined_image(data, offset, -length, "here").tobytes()
    return data[offset : offset + length].tobytes()


def contents(folder: Path) -> tuple[list[bytes], list[int]]:
    table = scan(folder)
    return [image(folder, table, row) for row in range(len(table))], table.label.tolist()


@pytest.mark.parametrize("writer", [records.write_old, records.write_new])
def test_both_writers_are_read(writer, tmp_path: Path) -> None:
    writer(tmp_path, IMAGES, LABELS, classes=3)
    assert contents(tmp_path) == (IMAGES, LABELS)
    table = scan(tmp_path)
    assert table.num_classes == 3 and table.class_names is None and table.faults == {}
    assert [column.dtype for column in (table.file, table.offset, table.length, table.label)] == [
        np.int32,
        np.int64,
        np.int32,
        np.int64,
    ]
    assert not table.file.any()
    assert (table.length < 0).tolist() == [False, True, False, True, True, False]


def test_the_index_decides_not_the_place_in_the_file(tmp_path: Path) -> None:
    framed = [records.frame(records.payload(key, key % 2, f"image {key}".encode())) for key in range(4)]
    records.write(tmp_path, [(3, framed[3]), (1, framed[1]), (0, framed[0]), (2, framed[2])], classes=2)
    assert contents(tmp_path) == ([b"image 0", b"image 1", b"image 2", b"image 3"], [0, 1, 0, 1])


def test_chunks_are_put_together_in_the_order_of_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled = np.random.default_rng(0).permutation(53).tolist()
    images = [(key, records.split(records.payload(key, key // 2, IMAGES[key % 6]))) for key in shuffled]
    records.write(tmp_path, images)
    monkeypatch.setattr(recordio, "_CHUNK", 7)
    told: list[tuple[int, int]] = []
    table = scan_recordio(tmp_path / "train.rec", lambda *done: told.append(done))
    assert [image(tmp_path, table, row) for row in range(53)] == [IMAGES[key % 6] for key in range(53)]
    assert table.label.tolist() == [key // 2 for key in range(53)]
    size = (tmp_path / "train.rec").stat().st_size
    assert told == sorted(told) and len(told) == 9 and told[-1] == (size, size) and all(of == size for _, of in told)


def test_an_image_with_two_labels_at_key_0_is_no_header(tmp_path: Path) -> None:
    framed = [(key, records.frame(records.payload(key, [7.0, 1.0], b"image"))) for key in range(3)]
    assert contents(records.write(tmp_path, framed)) == ([b"image"] * 3, [7] * 3)


def test_the_number_of_classes(tmp_path: Path) -> None:
    assert scan(records.write_old(tmp_path / "old", IMAGES, LABELS)).num_classes == 3
    assert scan(records.write_old(tmp_path / "both", IMAGES, LABELS, classes=9)).num_classes == 9
    new = records.write_new(tmp_path / "new", IMAGES, LABELS)
    assert scan(new).num_classes is None
    (new / "property").write_text("nonsense\n")
    with pytest.raises(DataError, match="property: begins with 'nonsense"):
        scan(new)


def test_a_header_rounded_to_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records.write_old(tmp_path, IMAGES, LABELS)
    monkeypatch.setattr(recordio, "_FLOAT32_EXACT", 4)
    monkeypatch.setattr(recordio.np, "spacing", lambda value: 2.0)
    data = bytearray((tmp_path / "train.rec").read_bytes())
    exact = struct.pack("<ff", 7, 10)
    for first, last in ((6, 9), (8, 11), (7, 10), (5, 10), (9, 10)):
        at = data.index(exact)
        data[at : at + 8] = rounded = struct.pack("<ff", first, last)
        (tmp_path / "train.rec").write_bytes(data)
        table = scan(tmp_path)
        assert len(table) == 6 and table.num_classes == 3
        exact = rounded


@pytest.mark.parametrize("labels", [(0.5, 9.0), (7.0, float("nan")), (9.0, 7.0), (0.0, 3.0), (7.0, 2.0**41)])
def test_a_header_record_that_is_nonsense_is_refused(labels: tuple[float, float], tmp_path: Path) -> None:
    records.write_old(tmp_path, IMAGES, LABELS)
    data = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(data.replace(struct.pack("<ff", 7, 10), struct.pack("<ff", *labels)))
    with pytest.raises(DataError, match=r"train.rec: the header record at byte \d+ has the labels .*expected \[images"):
        scan(tmp_path)


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan"), float("inf"), 2.0**60])
@pytest.mark.parametrize("framed", [records.frame, records.split])
def test_a_label_that_is_no_class_is_a_fault(label: float, framed, tmp_path: Path) -> None:
    data = b"b" if framed is records.frame else MAGIC
    images = [(0, records.frame(records.payload(0, 1, b"a"))), (1, framed(records.payload(1, label, data)))]
    table = scan(records.write(tmp_path, images))
    assert table.label.tolist() == [1, UNUSABLE] and list(table.faults) == [1]
    kind, reason = table.faults[1]
    assert kind == "label"
    assert reason.startswith(
        f"{tmp_path}/train.rec: byte 36: label {np.float32(label)}, expected an integer from 0 to 2**24 - 1"
    )
    assert image(tmp_path, table, 1) == data


@pytest.mark.parametrize("label", [2.0**24, 2.0**30])
def test_labels_that_float32_may_have_rounded_are_refused(label: float, tmp_path: Path) -> None:
    images = [(0, records.frame(records.payload(0, 1, b"a"))), (1, records.frame(records.payload(1, label, b"b")))]
    message = rf"train.rec: sample 1 at byte 36: label {label:.0f}.*float32.*2\*\*24.*WebDataset or TFRecord"
    for classes in (None, 2**24 + 1, 2**31):
        with pytest.raises(DataError, match=message):
            scan(records.write(tmp_path, images, classes))
    for classes in (2, 2**24):
        table = scan(records.write(tmp_path, images, classes))
        assert table.label.tolist() == [1, UNUSABLE]
        assert table.faults[1].kind == "label" and f"0 to {classes - 1} (the files" in table.faults[1].reason


def test_the_largest_exact_label_is_taken(tmp_path: Path) -> None:
    images = [(0, records.frame(records.payload(0, 2.0**24 - 1, b"a")))]
    for classes in (None, 2**24, 2**31):
        assert scan(records.write(tmp_path, images, classes)).label.tolist() == [2**24 - 1]


@pytest.mark.parametrize("writer", [records.write_old, records.write_new])
def test_a_label_above_the_declared_number_of_classes_is_a_fault(writer, tmp_path: Path) -> None:
    table = scan(writer(tmp_path, IMAGES, LABELS, classes=2))
    assert table.label.tolist() == [0, 0, 1, 1, UNUSABLE, UNUSABLE] and list(table.faults) == [4, 5]
    assert "label 2.0, expected an integer from 0 to 1 (the files tell of 2 classes)" in table.faults[4].reason


@pytest.mark.parametrize(
    "text", ["0\t0\n\n1\t40\n", "0 0\r\n1 40\r\n", "0\t0\n1\t40", " 0\t 0 \n1\t40\n", "1\t40\n0\t0\n"]
)
def test_index_lines_in_other_shapes(text: str, tmp_path: Path) -> None:
    records.write_new(tmp_path, [b"12345678", b"x"], [0, 1])
    (tmp_path / "train.idx").write_bytes(text.encode())
    assert contents(tmp_path) == ([b"12345678", b"x"], [0, 1])


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
        scan(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.rec: can't read the data set \(No such file.*data.path"):
        scan(tmp_path)
    records.write_new(tmp_path, IMAGES, LABELS)
    (tmp_path / "train.idx").unlink()
    with pytest.raises(DataError, match=r"train.idx: can't read the index .*No such file.*copy it"):
        scan(tmp_path)
    (tmp_path / "train.rec").write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes, too short"):
        scan(tmp_path)


@pytest.mark.parametrize("writer", [records.write_old, records.write_new])
@pytest.mark.parametrize("image", [b"12345678", MAGIC + b"123"])
def test_a_truncated_file_is_refused(writer, image: bytes, tmp_path: Path) -> None:
    writer(tmp_path, [b"1234", image], [0, 0])
    data = (tmp_path / "train.rec").read_bytes()
    last = int((tmp_path / "train.idx").read_text().split()[-1])
    for size in range(4, len(data), 4):
        (tmp_path / "train.rec").write_bytes(data[:size])
        if size == len(data) - 4 and writer is records.write_new and image[4:] != b"5678":
            continue  # Only the zeros at the end are gone then.
        with pytest.raises(DataError, match=f"too short|at byte {last}, isn't whole: the .rec is truncated"):
            scan(tmp_path)


@pytest.mark.parametrize("image", [b"12345", MAGIC + b"123"])
def test_zeros_missing_at_the_end_are_no_damage(image: bytes, tmp_path: Path) -> None:
    records.write_new(tmp_path, [b"1234", image], [0, 0])
    data = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(data[: len(data) - (-len(image) % 4)])
    assert contents(tmp_path) == ([b"1234", image], [0, 0])


def test_a_truncated_index_is_refused(tmp_path: Path) -> None:
    records.write_old(tmp_path, IMAGES, LABELS)
    lines = (tmp_path / "train.idx").read_text().splitlines(keepends=True)
    (tmp_path / "train.idx").write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match="2 identity keys, the header record tells of 3"):
        scan(tmp_path)
    (tmp_path / "train.idx").write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(DataError, match="5 of 6 image keys.*key 3 is missing"):
        scan(tmp_path)


def test_a_file_that_shrinks_while_it_is_scanned_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records.write_new(tmp_path, IMAGES, LABELS)
    monkeypatch.setattr(recordio, "_CHUNK", 2)

    def cut(done: int, total: int) -> None:
        with open(tmp_path / "train.rec", "r+b") as file:
            file.truncate(100)

    with pytest.raises(DataError, match="shrank from .* to 100 bytes"):
        scan_recordio(tmp_path / "train.rec", cut)


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"\0", "no record starts there"),
        (7, b"\x60", "not the first part of a record"),
        (6, b"\xff", "goes on behind the end of the file"),
        (4, b"\x07", "too short for its own header"),
        (8, b"\xff", "too short for its own header"),
        (11, b"\xff", "too short for its own header"),
        (7, b"\x20", "the record's part at byte {next} is no such part"),
        (4, b"\x18", "the record has no image"),
        (8, b"\x01", "the record has no image"),
    ],
)
def test_a_damaged_record_is_a_fault_of_its_row(at: int, value: bytes, message: str, row: int, tmp_path: Path) -> None:
    images = [b"1234", b"5678", b"90ab"]
    records.write_new(tmp_path, images, [0, 1, 2])
    data = bytearray((tmp_path / "train.rec").read_bytes())
    data[36 * row + at] = value[0]
    (tmp_path / "train.rec").write_bytes(data)
    if row == 2 and ("behind" in message or "part at" in message):
        with pytest.raises(DataError, match="at byte 72, isn't whole: the .rec is truncated"):
            scan(tmp_path)
        return
    table = scan(tmp_path)
    good = [other for other in range(3) if other != row]
    assert [image(tmp_path, table, other) for other in good] == [images[other] for other in good]
    assert table.label.tolist() == [UNUSABLE if other == row else other for other in range(3)]
    assert list(table.faults) == [row] and table.faults[row].kind == ("empty" if "no image" in message else "record")
    reason = table.faults[row].reason
    assert (
        reason.startswith(f"{tmp_path}/train.rec: byte {36 * row}: ") and message.format(next=36 * row + 36) in reason
    )
    assert "compare both" in reason and table.offset[row] == 36 * row and table.length[row] == 0


def test_damage_where_the_header_record_was_is_refused(tmp_path: Path) -> None:
    records.write_old(tmp_path, IMAGES, LABELS)
    at = dict(line.split("\t") for line in (tmp_path / "train.idx").read_text().splitlines())["0"]
    data = bytearray((tmp_path / "train.rec").read_bytes())
    data[int(at)] = 0
    (tmp_path / "train.rec").write_bytes(data)
    with pytest.raises(DataError, match=f"train.rec: the record of key 0, at byte {at}: no record starts there"):
        scan(tmp_path)


def test_more_faults_than_anyone_reads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records.write_new(tmp_path, [b"1234"] * 4, [-1, 0, -1, -1])
    monkeypatch.setattr(recordio, "_MOST_FAULTS", 3)
    assert len(scan(tmp_path).faults) == 3
    monkeypatch.setattr(recordio, "_MOST_FAULTS", 2)
    with pytest.raises(DataError, match=r"more than 2 samples can't be used; the first: .*train.rec: byte 0: label -1"):
        scan(tmp_path)


def test_parts_are_joined_within_their_extent_only(tmp_path: Path) -> None:
    records.write_new(tmp_path, [b"abcd" + MAGIC + b"efgh", b"next"], [0, 0])
    data = map_file(tmp_path / "train.rec")
    table = scan(tmp_path)
    extent = -int(table.length[0])
    assert extent == int(table.offset[1]) - 32
    assert joined_image(data, 0, extent, "here").tobytes() == b"abcd" + MAGIC + b"efgh"
    for offset, length in ((0, extent - 4), (0, 4), (0, 0), (-4, extent), (0, data.size + 1), (data.size, 0), (4, 60)):
        with pytest.raises(DataError, match="^here: .*compare both"):
            joined_image(data, offset, length, "here")


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
        table = scan(tmp_path)
    except DataError:
        return
    size = (tmp_path / "train.rec").stat().st_size
    assert np.all((table.offset >= 0) & (table.offset + np.abs(table.length) <= size) | (table.label == UNUSABLE))
    assert np.array_equal(np.flatnonzero(table.label == UNUSABLE), sorted(table.faults))
    for row in np.flatnonzero(table.label != UNUSABLE).tolist():
        assert len(image(tmp_path, table, row)) > 0


@pytest.mark.skipif(not records.OMNIGLOT.is_dir(), reason="the Omniglot files are not beside the repository")
def test_omniglot() -> None:
    table = scan(records.OMNIGLOT)
    assert len(table) == 19280 and table.num_classes == 964 and not table.faults
    assert np.array_equal(np.bincount(table.label), np.full(964, 20))
    assert all(image(records.OMNIGLOT, table, row)[:2] == b"\xff\xd8" for row in range(0, 19280, 97))
