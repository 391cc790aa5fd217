from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_fc.data import crc32c, table, tfrecord
from partial_fc.data.table import UNUSABLE, Scan
from partial_fc.data.tfrecord import bad_checksums, check_data, scan_tfrecords
from partial_fc.errors import DataError
from tests import formats

IMAGES = [bytes([i]) * (i * 137 % 1500) for i in range(20)]
LABELS = [i * i for i in range(20)]
EXACT = [0, 2**24 + 1, 2**40 + 1, 2**53 + 1, 2**63 - 1]


def images(paths: list[Path], scan: Scan) -> list[bytes]:
    files = [path.read_bytes() for path in paths]
    rows = zip(scan.file.tolist(), scan.offset.tolist(), scan.length.tolist(), strict=True)
    return [files[file][offset : offset + length] for file, offset, length in rows]


def messages(count: int = 20) -> list[bytes]:
    return [formats.example({"image": IMAGES[i], "label": LABELS[i]}) for i in range(count)]


def reasons(scan: Scan) -> list[str]:
    assert sorted(scan.faults) == np.flatnonzero(scan.label == UNUSABLE).tolist()
    return [f"{fault.kind}: {fault.reason}" for _, fault in sorted(scan.faults.items())]


def example_class() -> Any:
    """tf.train.Example, made from a description of its own."""
    pool_module = pytest.importorskip("google.protobuf.descriptor_pool")
    from google.protobuf import descriptor_pb2, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, int, str], parent: Any = file.message_type) -> Any:
        made = parent.add(name=name)
        for title, number, kind, repeat, of in fields:
            made.field.add(name=title, number=number, type=kind, label=repeat, type_name=of or None)
        return made

    one, many = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED
    message("BytesList", ("value", 1, kinds.TYPE_BYTES, many, ""))
    message("FloatList", ("value", 1, kinds.TYPE_FLOAT, many, ""))
    message("Int64List", ("value", 1, kinds.TYPE_INT64, many, ""))
    made = message(
        "Feature",
        ("bytes_list", 1, kinds.TYPE_MESSAGE, one, ".t.BytesList"),
        ("float_list", 2, kinds.TYPE_MESSAGE, one, ".t.FloatList"),
        ("int64_list", 3, kinds.TYPE_MESSAGE, one, ".t.Int64List"),
    )
    made.oneof_decl.add(name="kind")
    for field in made.field:
        field.oneof_index = 0
    made = message("Features", ("feature", 1, kinds.TYPE_MESSAGE, many, ".t.Features.FeatureEntry"))
    entry = message(
        "FeatureEntry",
        ("key", 1, kinds.TYPE_STRING, one, ""),
        ("value", 2, kinds.TYPE_MESSAGE, one, ".t.Feature"),
        parent=made.nested_type,
    )
    entry.options.map_entry = True
    message("Example", ("features", 1, kinds.TYPE_MESSAGE, one, ".t.Features"))
    pool = pool_module.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def by_protobuf(features: dict[str, Any]) -> bytes:
    message = example_class()()
    for name, values in features.items():
        values = values if isinstance(values, list) else [values]
        kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(values[0])]
        getattr(message.features.feature[name], kind).value.extend(values)
    return message.SerializeToString()


@pytest.mark.parametrize("index", ["none", "x.tfrecord.idx", "x.idx", "x.tfrecord.index", "x.tfindex"])
def test_files_of_the_tfrecord_package(index: str, tmp_path: Path):
    writer_module = pytest.importorskip("tfrecord.writer")
    path = tmp_path / "x.tfrecord"
    writer = writer_module.TFRecordWriter(str(path))
    for image, label in zip(IMAGES, LABELS, strict=True):
        writer.write({"label": (label, "int"), "image": (image, "byte"), "size": ([1.0, 2.0], "float")})
    writer.close()
    if index != "none":
        pytest.importorskip("tfrecord.tools.tfrecord2idx").create_index(str(path), str(tmp_path / index))
    scan = scan_tfrecords([path])
    assert images([path], scan) == IMAGES and scan.label.tolist() == LABELS
    assert not scan.faults and scan.num_classes is None and scan.class_names is None
    assert [getattr(scan, name).dtype for name in ("file", "offset", "length", "label")] == ["i4", "i8", "i4", "i8"]
    assert bad_checksums(path) == []


def test_the_index_of_the_command_tfrecord2idx(tmp_path: Path):
    script = shutil.which("tfrecord2idx", path=str(Path(sys.executable).parent)) or shutil.which("tfrecord2idx")
    if script is None:
        pytest.skip("there is no tfrecord2idx, which comes with DALI and the tfrecord package")
    path = formats.write_tfrecord(tmp_path / "x.tfrecord", messages())
    subprocess.run([sys.executable, script, str(path), f"{path}.idx"], check=True)
    assert Path(f"{path}.idx").read_text() == formats.index([formats.record(message) for message in messages()])
    assert images([path], scan_tfrecords([path])) == IMAGES


@pytest.mark.parametrize("label", EXACT)
def test_messages_by_protobuf(label: int, tmp_path: Path):
    features = {f"feature {i}": [i, -i] for i in range(9)} | {"text": [b"x" * 300, b"y"], "score": 0.5, "": 3}
    written = [by_protobuf(features | {"image": [image, b"second"], "label": [label, 5]}) for image in IMAGES]
    path = formats.write_tfrecord(tmp_path / "x.tfrecord", written)
    scan = scan_tfrecords([path])
    assert images([path], scan) == IMAGES and set(scan.label.tolist()) == {label} and not scan.faults


def test_the_helper_of_these_tests_writes_what_protobuf_reads():
    features = {"image": [b"x" * 200, b""], "label": [2**63 - 1, -1, 300], "score": [0.5, -2.0]}
    message = example_class()()
    for packed in (True, False):
        message.ParseFromString(formats.example(features, packed))
        found = message.features.feature
        assert list(found["image"].bytes_list.value) == features["image"]
        assert list(found["label"].int64_list.value) == features["label"]
        assert list(found["score"].float_list.value) == features["score"]


@pytest.mark.parametrize("label", EXACT)
@pytest.mark.parametrize("packed", [True, False])
def test_integer_labels_are_exact(label: int, packed: bool, tmp_path: Path):
    message = formats.example({"cls": [label, 7], "jpg": b"image"}, packed)
    assert scan_tfrecords([formats.write_tfrecord(tmp_path / "x", [message])]).label.tolist() == [label]


@pytest.mark.parametrize(
    ("value", "label"),
    [(b"9007199254740993", 2**53 + 1), (b" 12\n", 12), (16777215.0, 2**24 - 1), ([0.0, 1.5], 0), ([3, -1], 3)],
)
@pytest.mark.parametrize("packed", [True, False])
def test_labels_of_other_kinds(value: Any, label: int, packed: bool, tmp_path: Path):
    message = formats.example({"target": value, "img": b"image"}, packed)
    assert scan_tfrecords([formats.write_tfrecord(tmp_path / "x", [message])]).label.tolist() == [label]


@pytest.mark.parametrize(
    ("features", "keys", "image", "label"),
    [
        ({"data": b"0", "image": b"1", "image/encoded": b"2", "label": 5, "image/class/label": 6}, {}, b"2", 6),
        ({"image": 1, "image_raw": b"3", "cls": 7, "class": b"dog"}, {}, b"3", 7),
        ({"image": b"1", "thumb": b"2", "label": 3, "id": 9}, {"image_key": "thumb", "label_key": "id"}, b"2", 9),
        ({"größe": b"1", "label": 3}, {"image_key": "größe"}, b"1", 3),
    ],
)
def test_which_features_are_taken(
    features: dict[str, Any], keys: dict[str, str], image: bytes, label: int, tmp_path: Path
):
    path = formats.write_tfrecord(tmp_path / "x", [formats.example(features)] * 2)
    scan = scan_tfrecords([path], **keys)
    assert images([path], scan) == [image] * 2 and scan.label.tolist() == [label] * 2


def test_an_entry_may_have_any_order_and_the_last_of_a_name_counts(tmp_path: Path):
    def entry(name: bytes, value: bytes) -> bytes:
        return formats.field(1, formats.field(2, value) + formats.field(1, name))

    parts = [
        entry(b"label", formats.feature(1)),
        entry(b"image", formats.feature(b"first")),
        formats.field(9, b"unknown") + formats.field(8, 5) + formats.field(7, 1.5),
        entry(b"image", formats.field(3, b"") + formats.feature(b"second")),
        entry(b"label", formats.field(3, formats.field(1, b"") + formats.field(1, 300))),
    ]
    message = formats.field(1, b"".join(parts[:3])) + formats.field(5, 5) + formats.field(1, b"".join(parts[3:]))
    path = formats.write_tfrecord(tmp_path / "x", [message])
    scan = scan_tfrecords([path])
    assert images([path], scan) == [b"second"] and scan.label.tolist() == [300]


def test_features_that_are_missing_are_told_with_those_that_are_there(tmp_path: Path):
    path = formats.write_tfrecord(tmp_path / "x", [formats.example({"photo": b"x", "label": 1, "score": 0.5})] * 3)
    with pytest.raises(DataError, match=r"x: byte 0: none of the first 3 records has 'image/encoded' or .* with bytes"):
        scan_tfrecords([path])
    with pytest.raises(DataError, match=r"'label' \(integers\), 'photo' \(bytes\), .*: set data.image_key"):
        scan_tfrecords([path])
    with pytest.raises(DataError, match=r"has 'id' with bytes or floats or integers; .*: set data.label_key"):
        scan_tfrecords([path], image_key="photo", label_key="id")
    path = formats.write_tfrecord(tmp_path / "x", [b"\x0f\xff no message"])
    with pytest.raises(DataError, match="no features: are they tf.train.Example"):
        scan_tfrecords([path])


GOOD = {"image": b"image", "label": 1}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (formats.example({"label": 1}), "record: .*no image: no bytes in the feature 'image'"),
        (formats.example({"image": 5, "label": 1}), "record: .*no bytes in the feature 'image'"),
        (formats.example({"image": ("raw", b""), "label": 1}), "record: .*no bytes in the feature"),
        (formats.example({"image": ("raw", formats.field(1, b"")), "label": 1}), "record: .*no bytes in the feature"),
        (b"", "record: .*no image"),
        (b"\x0a\x7f", "record: .*no tf.train.Example: the field at byte .* goes on behind its message"),
        (b"\x0b", "record: .*wire type 3"),
        (b"\xff" * 11, "record: .*no number ends within 10 bytes"),
        (b"\x09abc", "record: .*goes on behind"),
        (formats.example(GOOD)[:-1], "record: .*goes on behind"),
        (formats.example(GOOD | {"label": ("raw", b"\x1a\x02\x0a\x01")}), "record: .*goes on behind"),
        (formats.example(GOOD | {"label": ("raw", b"\x1a\x03\x0a\x01\xff")}), "record: .*no number ends"),
        (formats.example(GOOD | {"label": ("raw", b"\x12\x04\x0a\x02\x00\x00")}), "record: .*2 of the 4 bytes"),
        (formats.example({"image": b"image"}), "label: .*no feature 'label'"),
        (formats.example(GOOD | {"label": -1}), "label: .*'label' is -1, expected an integer from 0"),
        (formats.example(GOOD | {"label": 0.5}), "label: .*is 0.5 in float32"),
        (formats.example(GOOD | {"label": float(2**24)}), "label: .*is 16777216.0 in float32, .* below 2"),
        (formats.example(GOOD | {"label": float("nan")}), "label: .*is nan"),
        (formats.example(GOOD | {"label": b"dog"}), "label: .*is b'dog'"),
        (formats.example(GOOD | {"label": b"1" * 65}), "label: .*is b'1111"),
        (formats.example(GOOD | {"label": str(2**63).encode()}), "label: .*is b'9223372036854775808'"),
        (formats.example(GOOD | {"label": ("raw", b"")}), "label: .*is an empty list"),
        (formats.example(GOOD | {"label": ("raw", formats.field(3, b""))}), "label: .*is an empty list"),
    ],
)
def test_a_record_that_can_t_be_used_is_a_fault(message: bytes, reason: str, tmp_path: Path):
    good = formats.example(GOOD)
    path = formats.write_tfrecord(tmp_path / "x", [good, message, good])
    scan = scan_tfrecords([path])
    assert scan.label.tolist() == [1, UNUSABLE, 1]
    (found,) = reasons(scan)
    kind, _, rest = reason.partition(": ")
    assert found.startswith(f"{kind}: {path}: byte {len(formats.record(good))}: ")
    with pytest.raises(DataError, match=rest):
        raise DataError(found)
    assert images([path], scan)[0::2] == [b"image"] * 2


def test_without_one_usable_record_it_is_refused(tmp_path: Path):
    path = formats.write_tfrecord(tmp_path / "x", [formats.example(GOOD | {"label": b"dog"})] * 101)
    with pytest.raises(DataError, match="none of the first 100 samples can be used; the first: .*byte 0: .*b'dog'"):
        scan_tfrecords([path])
    with pytest.raises(DataError, match="none of the first 2 samples"):
        scan_tfrecords([formats.write_tfrecord(tmp_path / "x", [formats.example(GOOD | {"label": -5})] * 2)])


def test_more_faults_than_can_be_listed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = formats.write_tfrecord(tmp_path / "x", [formats.example(GOOD)] + [b""] * 20)
    monkeypatch.setattr(table, "_MOST_FAULTS", 19)
    with pytest.raises(DataError, match="more than 19 samples can't be used; the first: .*no image"):
        scan_tfrecords([path])


def test_several_files_are_one_table(tmp_path: Path):
    paths = [formats.write_tfrecord(tmp_path / f"x-0000{i}-of-00003", messages(i * 2), i == 2) for i in range(3)]
    told: list[tuple[int, int]] = []
    scan = scan_tfrecords(paths, progress=lambda done, total: told.append((done, total)))
    assert scan.file.tolist() == [1, 1, 2, 2, 2, 2] and images(paths, scan) == IMAGES[:2] + IMAGES[:4]
    total = sum(path.stat().st_size for path in paths)
    assert told == [(paths[1].stat().st_size, total), (total, total)]
    with pytest.raises(DataError, match="no record in 1 TFRecord files"):
        scan_tfrecords(paths[:1])
    with pytest.raises(DataError, match="no record in 0 TFRecord files"):
        scan_tfrecords([])
    with pytest.raises(DataError, match="absent"):
        scan_tfrecords([tmp_path / "absent"], progress=lambda done, total: None)


@pytest.mark.parametrize("with_index", [True, False])
def test_where_chunks_end_makes_no_difference(with_index: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = formats.write_tfrecord(tmp_path / "x.tfrecord", messages(), with_index)
    for records, size in ((1, 1 << 20), (3, 1 << 20), (8192, 1000)):
        monkeypatch.setattr(tfrecord, "_CHUNK_RECORDS", records)
        monkeypatch.setattr(tfrecord, "_CHUNK_BYTES", size)
        scan = scan_tfrecords([path])
        assert images([path], scan) == IMAGES and scan.label.tolist() == LABELS
        assert bad_checksums(path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], r"byte 2661: a record of 38 bytes goes on behind the end of the file"),
        (lambda data: data + b"\0" * 11, r"byte \d+: 11 of the 12 bytes before a record"),
        (lambda data: data + b"\0" * 16, r"byte \d+: the checksum of the record's length is wrong"),
        (lambda data: b"\x01" + data[1:], "byte 0: the checksum of the record's length is wrong"),
        (lambda data: data[:7] + b"\x80" + data[8:], "byte 0: the checksum"),
        (
            lambda data: b"\xff" * 8 + formats.masked(b"\xff" * 8) + data,
            "byte 0: a record of 18446744073709551615 bytes",
        ),
        (lambda data: gzip.compress(data), "byte 0: the checksum .* compressed with gzip or zlib"),
        (lambda data: zlib.compress(data), "byte 0: the checksum .* compressed with gzip or zlib"),
    ],
)
def test_damaged_framing_is_refused(change: Any, message: str, tmp_path: Path):
    path = formats.write_tfrecord(tmp_path / "x", messages(5) + [formats.example(GOOD)] * 20)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"x: {message}"):
        scan_tfrecords([path])
    with pytest.raises(DataError, match=f"x: {message}"):
        bad_checksums(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], r"x.idx: after the last line, 4, the records end at byte \d+, the file at \d+"),
        (lambda lines: [], "x.idx: after the last line, 0, the records end at byte 0"),
        (lambda lines: lines[1:], r"x.idx: line 1: a record of .* expected one from byte 0 on"),
        (lambda lines: lines + ["99999 20"], "x.idx: line 6: .* inside the"),
        (lambda lines: [lines[0], "0\t1", *lines[2:]], r"x.idx: line 2: a record of 1 bytes"),
        (lambda lines: [*lines[:2], "x 7", *lines[3:]], r"x.idx: line 3 is b'x 7', expected 'offset length'"),
        (lambda lines: [*lines[:2], "7", "8 9 10", *lines[4:]], r"x.idx: line 3 is b'7'"),
        (lambda lines: [*lines[:4], " 5"], r"x.idx: line 5 is b' 5'"),
        (lambda lines: ["0 " + "9" * 30, *lines[1:]], r"x.idx: line 1"),
        (
            lambda lines: ["0 40", "40 " + str(int(lines[1].split()[1]) + 1), *lines[2:]],
            "x.idx: line 3: .* expected one from byte 232",
        ),
    ],
)
def test_an_index_that_doesn_t_fit_is_refused(change: Any, message: str, tmp_path: Path):
    path = formats.write_tfrecord(tmp_path / "x.tfrecord", messages(5))
    lines = formats.index([formats.record(message) for message in messages(5)]).splitlines()
    (tmp_path / "x.idx").write_text("".join(f"{line}\n" for line in change(lines)))
    with pytest.raises(DataError, match=message):
        scan_tfrecords([path])


def test_an_index_with_other_blanks_or_without_a_last_line_break_is_read(tmp_path: Path):
    path = formats.write_tfrecord(tmp_path / "x.tfrecord", messages(5))
    text = formats.index([formats.record(message) for message in messages(5)])
    for other in (text.rstrip("\n"), text.replace(" ", "\t"), text.replace("\n", "\r\n"), text + "\n\n"):
        (tmp_path / "x.idx").write_text(other, newline="")
        assert images([path], scan_tfrecords([path])) == IMAGES[:5]


def test_two_records_that_an_index_joins_are_found(tmp_path: Path):
    framed = [formats.record(message) for message in messages(3)]
    path = formats.write_tfrecord(tmp_path / "x.tfrecord", messages(3))
    (tmp_path / "x.idx").write_text(formats.index([framed[0], framed[1] + framed[2]]))
    with pytest.raises(DataError, match=rf"line 2: a record of .* at byte {len(framed[0])} of .* is one of"):
        scan_tfrecords([path])


def test_the_index_of_another_shard_isn_t_taken(tmp_path: Path):
    path = formats.write_tfrecord(tmp_path / "x.tfrecord-00000-of-00002", messages(5))
    (tmp_path / "x.idx").write_text("0 1\n")
    assert images([path], scan_tfrecords([path])) == IMAGES[:5]


def test_data_that_was_damaged_is_found_by_its_checksum(tmp_path: Path):
    path = formats.write_tfrecord(tmp_path / "x", messages())
    data, starts = bytearray(path.read_bytes()), [0]
    for message in messages():
        starts.append(starts[-1] + len(formats.record(message)))
    data[starts[3] + 12] ^= 1
    data[starts[8] - 5] ^= 0x80  # the last byte of record 7
    data[starts[12] - 1] ^= 1  # the checksum itself
    path.write_bytes(data)
    told: list[tuple[int, int]] = []
    assert bad_checksums(path, lambda done, total: told.append((done, total))) == [starts[3], starts[7], starts[11]]
    assert told == [(len(data), len(data))]
    path.write_bytes(b"")
    assert bad_checksums(path) == []


def test_the_checksum_is_crc32c():
    assert formats.crc32c(b"123456789") == 0xE3069283
    data = np.frombuffer(b"123456789" + formats.masked(b"123456789"), dtype=np.uint8)
    assert check_data(data, np.array([0]), np.array([9])).tolist() == [True]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 511, 512, 513, 1024, 1500, 2049]), min_size=0, max_size=9),
    lanes=st.sampled_from([1, 2, 3, 64]),
    flip=st.integers(0, 1 << 20),
)
def test_checksums_of_records_side_by_side(lengths: list[int], lanes: int, flip: int):
    content = np.random.default_rng(flip).bytes(sum(lengths))
    parts, offsets, at = [], [], 0
    for length in lengths:
        offsets.append(sum(map(len, parts)) + 3 * len(parts))
        data = content[at : at + length]
        parts.append(data + formats.masked(data))
        at += length
    file = bytearray(b"".join(part + b"gap" for part in parts))
    whole = np.frombuffer(bytes(file), dtype=np.uint8)
    places = np.array(offsets, dtype=np.int64), np.array(lengths, dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crc32c, "_LANES", lanes)
        assert check_data(whole, *places).tolist() == [True] * len(lengths)
        if lengths:
            row = flip % len(lengths)
            file[offsets[row] + flip % (lengths[row] + 4)] ^= 1 << flip % 8
            expected = [i != row for i in range(len(lengths))]
            assert check_data(np.frombuffer(bytes(file), dtype=np.uint8), *places).tolist() == expected
