"""Files that were damaged on their way: nothing crashes, hangs or is read outside its file, and messages say where."""

from __future__ import annotations

import re
import struct
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partial_fc.data.archives import open_archive
from partial_fc.data.recordio import scan_recordio
from partial_fc.data.table import UNUSABLE, Scan
from partial_fc.data.tar import scan_tars
from partial_fc.data.tfrecord import bad_checksums, scan_tfrecords
from partial_fc.errors import DataError
from tests import formats, records

MAGIC = struct.pack("<I", records.MAGIC)
IMAGES = [bytes([65 + i]) * (5 + 53 * i) for i in range(6)] + [b"abcd" + MAGIC + b"efgh", b"xy12" + MAGIC * 2 + b"z"]
LABELS = [0, 3, 1, 2, 0, 5, 4, 2]
Files = dict[str, bytes]
# What a message may say of a file as a whole, without a place in it.
OF_THE_WHOLE = re.compile(
    r"no (sample|record) in 1 |too short for a record|index is empty|key \d+ (is missing|stands)|identity keys"
)
EXTREME = [
    *(struct.pack("<Q", value) for value in (0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 16, 2**64 - 1)),
    *(struct.pack("<I", value) for value in (0, 2**29 - 1, 2**31, 2**32 - 1)),
    *(b"77777777777\0", b"-0000000512\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"00000000000\0", b"9" * 12),
    *(b"999999999999999999999999", b"-5", b"\n", b"\t", b"x", b"g", b"L", b"S", b"5", b"99 size=", b"\xff" * 10),
]


def recordio(old: bool) -> Callable[[Path], Files]:
    def make(folder: Path) -> Files:
        writer = records.write_old if old else records.write_new
        writer(folder, IMAGES, LABELS)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return make


def tar(folder: Path) -> Files:
    members = [
        member
        for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True))
        for member in ((f"{'deep/' * (i * 12)}{i}.jpg", image), (f"{'deep/' * (i * 12)}{i}.cls", str(label).encode()))
    ]
    members[5] = (members[4][0].replace(".jpg", ".json"), f'{{"label": {LABELS[2]}}}'.encode())
    pax, gnu = formats.tar(members[:10], tarfile.PAX_FORMAT, 0.5), formats.tar(members[10:], tarfile.GNU_FORMAT)
    return {"x.tar": pax.rstrip(b"\0") + bytes(-len(pax.rstrip(b"\0")) % 512) + gnu}


def tfrecord(with_index: bool) -> Callable[[Path], Files]:
    def make(folder: Path) -> Files:
        kinds = [int, float, lambda label: str(label).encode(), lambda label: [label, 1]]
        messages = [
            formats.example(
                {"name": b"n" * i, "label": kinds[i % 4](label), "image": image, "size": [1, 2]}, i % 2 == 0
            )
            for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True))
        ]
        framed = [formats.record(message) for message in messages]
        files = {"x.tfrecord": b"".join(framed)}
        return files | ({"x.tfrecord.idx": formats.index(framed).encode()} if with_index else {})

    return make


# Format, what makes the files, the file that is damaged, and how many examples are tried.
CASES = {
    "recordio": ("recordio", recordio(old=False), "train.rec", 150),
    "recordio with header": ("recordio", recordio(old=True), "train.rec", 100),
    "recordio index": ("recordio", recordio(old=True), "train.idx", 100),
    "tar": ("webdataset", tar, "x.tar", 300),
    "tfrecord": ("tfrecord", tfrecord(with_index=False), "x.tfrecord", 200),
    "tfrecord with index": ("tfrecord", tfrecord(with_index=True), "x.tfrecord", 100),
    "tfrecord index": ("tfrecord", tfrecord(with_index=True), "x.tfrecord.idx", 100),
}


def structures(name: str, data: bytes) -> list[int]:
    """Where the headers of a file are."""
    if name.endswith(".rec"):
        return [at for at in range(0, len(data), 4) if data[at : at + 4] == MAGIC]
    if name.endswith(".tar"):
        return [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    found = [0]
    while name.endswith(".tfrecord") and found[-1] < len(data):
        found.append(found[-1] + 16 + struct.unpack_from("<Q", data, found[-1])[0])
    return found[:-1] or [0]


def sealed(name: str, data: bytes, at: int) -> bytes:
    """The file with the checksum of the header at this byte put right, so that what it says is believed."""
    if name.endswith(".tar") and at + 512 <= len(data):
        return data[:at] + formats.reseal(data[at : at + 512]) + data[at + 512 :]
    if name.endswith(".tfrecord") and at + 12 <= len(data):
        return data[: at + 8] + formats.masked(data[at : at + 8]) + data[at + 12 :]
    return data


def mutated(name: str, data: bytes, mutations: list[tuple[str, bool, int, int, int]]) -> bytes:
    """The file after these mutations: (what, near a header?, where, how much, with what)."""
    headers = structures(name, data)
    for what, near, where, size, value in mutations:
        header = headers[where % len(headers)]
        # The fields of a tar header lie further apart than those of the others.
        at = header + (value % (512 if name.endswith(".tar") else 40)) if near else where % (len(data) + 1)
        before, behind = data[:at], data[at:]
        if what == "flip":
            data = before + bytes([byte ^ 1 << value % 8 for byte in behind[:1]]) + behind[1:]
        elif what == "truncate":
            data = before
        elif what == "delete":
            data = before + behind[size:]
        elif what == "insert":
            data = before + np.random.default_rng(value).bytes(size) + behind
        elif what == "splice":
            other = value % (len(data) + 1)
            data = before + data[other : other + size] + behind
        elif what == "zero":
            data = before + bytes(len(behind[:size])) + behind[size:]
        else:
            # Where lengths stand: the size of a tar member, the length of a record.
            fields = (124, 156, 148, 0) if name.endswith(".tar") else (0, 4, 8, 12, 16, 24)
            at = header + fields[size % len(fields)] if near else at
            extreme = EXTREME[value % len(EXTREME)]
            data = data[:at] + extreme + data[at + len(extreme) :]
            if near and what == "sealed":
                data = sealed(name, data, header)
    return data


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "truncate", "delete", "insert", "splice", "zero", "extreme", "sealed", "sealed"]),
        st.booleans(),
        st.integers(0, 1 << 14),
        st.sampled_from([1, 2, 4, 16, 100, 512, 1024]),
        st.integers(0, 1 << 14),
    ),
    min_size=1,
    max_size=3,
)


def scanned(format: str, path: Path) -> Scan:
    if format == "recordio":
        return scan_recordio(path)
    return scan_tars([path]) if format == "webdataset" else scan_tfrecords([path])


def check_message(error: DataError, path: Path) -> None:
    message = str(error)
    assert path.stem in message and str(path.parent) in message, message
    assert re.search(r"byte \d|line \d", message) or OF_THE_WHOLE.search(message), message
    assert "\n" not in message and len(message) < 1500


def check_table(table: Scan, path: Path) -> None:
    """Every image lies inside the file, and what can't be used is explained."""
    size = path.stat().st_size
    assert (table.file == 0).all() and (table.offset >= 0).all()
    assert (table.offset + np.abs(table.length.astype(np.int64)) <= size).all()
    assert (table.label >= UNUSABLE).all()
    assert sorted(table.faults) == np.flatnonzero(table.label == UNUSABLE).tolist()
    for fault in table.faults.values():
        assert str(path) in fault.reason and re.search(r"byte \d", fault.reason)


def read(format: str, path: Path) -> list[tuple[int, bytes]]:
    """Label and image of every sample; images that aren't there come as empty ones."""
    table, data = scanned(format, path), path.read_bytes()
    check_table(table, path)
    archive = open_archive(path, format=format)
    ids = np.arange(len(archive))
    labels = archive.labels(ids)
    assert len(ids) == len(table) and labels.tolist() == table.label.tolist() == archive.all_labels().tolist()
    found = []
    for row in ids.tolist():
        fault, image = archive.fault(row), b""
        assert (fault is None) == (labels[row] != UNUSABLE) and fault == table.faults.get(row)
        try:
            image = archive.encoded(ids[row : row + 1])[0].tobytes()
        except DataError as error:
            assert fault is not None and fault.kind in ("record", "empty")
            check_message(error, path)
        else:
            if (length := int(table.length[row])) >= 0:
                assert image == data[table.offset[row] : table.offset[row] + length]
        found.append((int(labels[row]), image))
    return found


def main_file(files: Files) -> str:
    return next(name for name in files if not name.endswith(".idx") and name != "property")


@pytest.mark.parametrize("case", CASES)
def test_whole_files_give_the_originals(case: str, tmp_path: Path):
    format, make, _, _ = CASES[case]
    files = make(tmp_path)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert read(format, tmp_path / main_file(files)) == list(zip(LABELS, IMAGES, strict=True))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", CASES)
def test_damaged_files_are_read_or_refused(case: str, tmp_path: Path):
    format, make, target, examples = CASES[case]
    (tmp_path / "whole").mkdir()
    files = make(tmp_path / "whole")
    originals = list(zip(LABELS, IMAGES, strict=True))
    seen: Counter[str] = Counter()

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(MUTATIONS)
    def run(mutations: list[tuple[str, bool, int, int, int]]) -> None:
        seen["tried"] += 1
        folder = tmp_path / str(seen["tried"])
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(mutated(name, data, mutations) if name == target else data)
        path = folder / main_file(files)
        try:
            found = read(format, path)
        except DataError as error:
            check_message(error, path)
            seen["refused"] += 1
        else:
            kept = Counter(originals) & Counter(found)
            seen["faults"] += any(label == UNUSABLE for label, _ in found)
            seen["whole"] += found == originals
            seen["some kept"] += 0 < kept.total() < len(originals)
        if format == "tfrecord":
            try:
                assert all(0 <= at < path.stat().st_size for at in bad_checksums(path))
            except DataError as error:
                check_message(error, path)

    run()
    # Neither refuses all nor takes all.
    assert seen["refused"] > examples // 20
    assert seen["refused"] < seen["tried"]
    if target.endswith((".rec", ".tar", ".tfrecord")):
        assert seen["faults"] > 0 and seen["some kept"] > 0
