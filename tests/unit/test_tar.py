from __future__ import annotations

import bz2
import gzip
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from partial_fc.data import table, tar
from partial_fc.data.table import UNUSABLE, Scan
from partial_fc.data.tar import scan_tars
from partial_fc.errors import DataError
from tests import formats

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "a-folder-with-a-long-name/" * 5
DEEP = "deeper/" * 30
GNU_TAR = shutil.which("tar")
needs_gnu_tar = pytest.mark.skipif(
    GNU_TAR is None or "GNU tar" not in subprocess.run([GNU_TAR, "--version"], capture_output=True, text=True).stdout,
    reason="there is no GNU tar",
)


def members(count: int, prefix: str = "") -> list[tuple[str, bytes]]:
    """Samples of different sizes, some of them whole blocks; their label is the square of their number."""
    found = []
    for i in range(count):
        found += [
            (f"{prefix}{i:04d}.cls", str(i * i).encode()),
            (f"{prefix}{i:04d}.jpg", bytes([i]) * (i * 137 % 1500 if i % 3 else 512 * i)),
        ]
    return found


def images(paths: list[Path], scan: Scan) -> list[bytes]:
    files = [path.read_bytes() for path in paths]
    rows = zip(scan.file.tolist(), scan.offset.tolist(), scan.length.tolist(), strict=True)
    return [files[file][offset : offset + length] for file, offset, length in rows]


def written(folder: Path, content: bytes | list[tuple[str, bytes]], name: str = "shard.tar") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else formats.tar(content))
    return path


def reasons(scan: Scan) -> list[str]:
    assert sorted(scan.faults) == np.flatnonzero(scan.label == UNUSABLE).tolist()
    return [f"{fault.kind}: {fault.reason}" for _, fault in sorted(scan.faults.items())]


@pytest.mark.parametrize("mtime", [0, 1.5])
@pytest.mark.parametrize("prefix", ["", "train/", LONG, "größe/資料/", LONG + "größe/資料/"])
@pytest.mark.parametrize("format", FORMATS)
def test_archives_by_python(format: str, prefix: str, mtime: float, tmp_path: Path):
    content = members(20, prefix)
    path = written(tmp_path, formats.tar(content, FORMATS[format], mtime))
    scan = scan_tars([path])
    assert images([path], scan) == [data for name, data in content if name.endswith(".jpg")]
    assert scan.label.tolist() == [i * i for i in range(20)]
    assert not scan.faults and scan.num_classes is None and scan.class_names is None
    assert [getattr(scan, name).dtype for name in ("file", "offset", "length", "label")] == ["i4", "i8", "i4", "i8"]


@needs_gnu_tar
@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_archives_by_gnu_tar(format: str, tmp_path: Path):
    prefixes = ["short/", "größe/"] if format == "v7" else ["short/", "größe/", LONG]
    prefixes += [DEEP] if format in ("oldgnu", "gnu", "posix") else []
    content = [member for prefix in prefixes for member in members(12, prefix)]
    for name, data in content:
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    os.symlink("0001.jpg", tmp_path / "in" / "short" / "9999.jpg")
    path = tmp_path / "shard.tar"
    assert GNU_TAR
    subprocess.run(
        [GNU_TAR, f"--format={format}", "--sort=name", "-cf", str(path), "."], cwd=tmp_path / "in", check=True
    )
    scan = scan_tars([path])
    found = sorted(zip(scan.label.tolist(), images([path], scan), strict=True))
    expected = [(i * i, data) for _ in prefixes for i, (_, data) in enumerate(members(12)[1::2])]
    assert found == sorted(expected) and not scan.faults


@needs_gnu_tar
def test_a_hard_link_is_no_image(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in [("a.cls", b"1"), ("a.jpg", b"image"), ("b.cls", b"2")]:
        (folder / name).write_bytes(data)
    os.link(folder / "a.jpg", folder / "b.jpg")
    path = tmp_path / "shard.tar"
    assert GNU_TAR
    subprocess.run([GNU_TAR, "--sort=name", "-cf", str(path), "."], cwd=folder, check=True)
    scan = scan_tars([path])
    assert scan.label.tolist() == [1, UNUSABLE]
    assert "record" in reasons(scan)[0] and "./b.cls': the sample has no image" in reasons(scan)[0]


def test_several_shards_are_one_table(tmp_path: Path):
    paths = [written(tmp_path, members(5 + i, f"{i}-"), f"{i}.tar") for i in range(3)]
    told: list[tuple[int, int]] = []
    scan = scan_tars(paths, lambda done, total: told.append((done, total)))
    assert scan.file.tolist() == [0] * 5 + [1] * 6 + [2] * 7
    assert images(paths, scan) == [data for i in range(3) for _, data in members(5 + i)[1::2]]
    total = sum(path.stat().st_size for path in paths)
    assert [of for _, of in told] == [total] * 3 and sorted(told) == told and told[-1][0] <= total


def test_samples_don_t_reach_from_one_shard_into_the_next(tmp_path: Path):
    paths = [written(tmp_path, [("a.jpg", b"1"), ("a.cls", b"1"), ("b.jpg", b"2")], "0.tar")]
    paths += [written(tmp_path, [("b.cls", b"2"), ("c.jpg", b"3"), ("c.cls", b"3")], "1.tar")]
    scan = scan_tars(paths)
    assert scan.label.tolist() == [1, UNUSABLE, UNUSABLE, 3]
    assert [fault.kind for fault in scan.faults.values()] == ["label", "record"]


@pytest.mark.parametrize("headers", [1, 2, 3, 7])
def test_where_chunks_end_makes_no_difference(headers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path, formats.tar(members(20, LONG), tarfile.PAX_FORMAT, 1.5))
    whole = scan_tars([path])
    monkeypatch.setattr(tar, "_CHUNK_HEADERS", headers)
    parts = scan_tars([path])
    monkeypatch.setattr(tar, "_CHUNK_BYTES", 1000)
    for other in (parts, scan_tars([path])):
        for name in ("offset", "length", "label"):
            assert getattr(other, name).tolist() == getattr(whole, name).tolist()


@pytest.mark.parametrize("label", [0, 2**24 + 1, 2**40 + 1, 2**53 + 1, 2**63 - 1])
@pytest.mark.parametrize(
    "member",
    [
        ("a.cls", "{}"),
        ("a.CLS", "{}\n"),
        ("a.json", '{{"label": {}}}'),
        ("a.json", '{{"x": [1], "cls": {}}}'),
        ("a.meta.json", '{{"class": "{}"}}'),
    ],
)
def test_labels_are_exact(label: int, member: tuple[str, str], tmp_path: Path):
    name, text = member
    scan = scan_tars([written(tmp_path, [("a.jpg", b"image"), (name, text.format(label).encode())])])
    assert scan.label.tolist() == [label]


@pytest.mark.parametrize(
    ("content", "label", "image"),
    [
        ([("a.PNG", b"x"), ("a.cls", b"7")], 7, b"x"),
        ([("a.b/c.d/0.webp", b"x"), ("a.b/c.d/0.cls", b"7")], 7, b"x"),
        ([("a.jpg", b"x"), ("a.mask.png", b"y"), ("a.cls", b"7")], 7, b"x"),
        ([("a.mask.png", b"y"), ("a.cls", b"7"), ("a.jpg", b"x"), ("a.txt", b"z")], 7, b"x"),
        ([("a.left.ppm", b"x"), ("a.cls", b"7")], 7, b"x"),
        ([("a.jpg", b"x"), ("a.part.cls", b"8"), ("a.cls", b"7")], 7, b"x"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": 8}'), ("a.cls", b"7")], 7, b"x"),
        ([("a.jpg", b"x"), ("a.other.json", b"{}"), ("a.json", b'{"label": 7.0}')], 7, b"x"),
        ([("._a.jpg", b"y"), ("a.jpg", b"x"), (".hidden.jpg", b"y"), ("a.cls", b"7")], 7, b"x"),
        ([("readme.txt", b""), ("notes", b""), ("x.json", b'{"about": 1}'), ("a.jpg", b"x"), ("a.cls", b"7")], 7, b"x"),
        ([("__meta__", b"y"), ("__a__/b.jpg", b"y"), ("a.jpg", b"x"), ("a.cls", b"7")], 7, b"x"),
        ([("a.jpg", b""), ("a.cls", b"7")], 7, b""),
    ],
)
def test_members_become_samples_as_in_webdataset(
    content: list[tuple[str, bytes]], label: int, image: bytes, tmp_path: Path
):
    path = written(tmp_path, content)
    scan = scan_tars([path])
    assert scan.label.tolist() == [label] and images([path], scan) == [image]


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ([("b.jpg", b"x")], "label: .*byte 2560: 'b.jpg': no label: expected"),
        ([("b.jpg", b"x"), ("b.cls", b"dog")], "label: .*byte 3584: 'b.cls': the label is b'dog', expected an integer"),
        ([("b.jpg", b"x"), ("b.cls", b"-1")], "label: .*is b'-1', expected an integer from 0"),
        ([("b.jpg", b"x"), ("b.cls", b"1_0")], "label: .*is b'1_0'"),
        ([("b.jpg", b"x"), ("b.cls", b"")], "label: .*is b''"),
        ([("b.jpg", b"x"), ("b.cls", str(2**63).encode())], "label: .*is b'9223372036854775808'"),
        ([("b.jpg", b"x"), ("b.cls", b"1" * 65)], "label: .*65 bytes of label, expected at most 64"),
        ([("b.jpg", b"x"), ("b.cls", b"1"), ("b.cls", b"2")], "label: .*byte 4608: 'b.cls': a second label"),
        ([("b.jpg", b"x"), ("b.json", b'{"label": true}')], "label: .*the label is True"),
        ([("b.jpg", b"x"), ("b.json", b'{"label": null}')], "label: .*the label is a NoneType"),
        ([("b.jpg", b"x"), ("b.json", b'{"label": 1.5}')], "label: .*the label is 1.5"),
        ([("b.jpg", b"x"), ("b.json", b'{"label": 1e999}')], "label: .*the label is inf"),
        ([("b.jpg", b"x"), ("b.json", b'{"label": [1]}')], "label: .*the label is a list"),
        ([("b.jpg", b"x"), ("b.json", b'{"name": 1}')], "label: .*no label"),
        ([("b.jpg", b"x"), ("b.json", b"[1]")], "label: .*no label"),
        ([("b.jpg", b"x"), ("b.json", b'{"label": ')], "label: .*can't be read as JSON"),
        ([("b.jpg", b"x"), ("b.json", b"\xff\xfe\xff")], "label: .*can't be read as JSON"),
        ([("b.jpg", b"x"), ("b.json", b"[" * 100_000)], "label: .*can't be read as JSON"),
        ([("b.jpg", b"x"), ("b.json", b'{"label": ' + b"1" * 5000 + b"}")], "label: "),
        ([("b.jpg", b"x"), ("b.json", b'{"label": 1}' + b" " * (1 << 20))], "label: .*expected at most 1048576"),
        ([("b.cls", b"3")], "record: .*byte 2560: 'b.cls': the sample has no image"),
        ([("b.json", b'{"label": 3}')], "record: .*'b.json': the sample has no image"),
        ([("b.jpg", b"x"), ("b.png", b"y"), ("b.cls", b"3")], "record: .*the sample has 2 images"),
        ([("b.1.jpg", b"x"), ("b.2.jpg", b"y"), ("b.cls", b"3")], "record: .*the sample has 2 images"),
    ],
)
def test_a_sample_that_can_t_be_used_is_a_fault(sample: list[tuple[str, bytes]], reason: str, tmp_path: Path):
    path = written(tmp_path, [("a.jpg", b"image"), ("a.cls", b"1"), *sample, ("c.jpg", b"image"), ("c.cls", b"5")])
    scan = scan_tars([path])
    assert scan.label.tolist() == [1, UNUSABLE, 5]
    (found,) = reasons(scan)
    assert str(path) in found and re.match(reason, found)


def test_an_image_above_2_gigabytes_is_a_fault(tmp_path: Path):
    path = written(tmp_path, [("a.jpg", b"image"), ("a.cls", b"1")])
    data = path.read_bytes()[:2048] + formats.tar_header(b"b.jpg", 1 << 31)
    with open(path, "wb") as file:
        file.write(data)
        file.seek(1 << 31, os.SEEK_CUR)  # a hole, which takes no room on the disk
        file.write(formats.tar_header(b"b.cls", 1) + formats.padded(b"3"))
    scan = scan_tars([path])
    assert scan.label.tolist() == [1, UNUSABLE] and scan.length.tolist() == [5, 0]
    assert "'b.jpg': 2147483648 bytes, expected at most 2147483647" in reasons(scan)[0]


def test_without_one_usable_label_it_is_refused(tmp_path: Path):
    path = written(tmp_path, [(f"{i}.{kind}", b"x") for i in range(120) for kind in ("jpg", "txt")])
    with pytest.raises(DataError, match=r"none of the first 100 samples .*byte 512: '0.jpg': no label.*'0.txt'"):
        scan_tars([path])
    path = written(tmp_path, [("0.jpg", b"x"), ("0.cls", b"dog")])
    with pytest.raises(DataError, match=r"none of the first 1 samples .*the label is b'dog'"):
        scan_tars([path])
    late = [(f"{i}.jpg", b"x") for i in range(99)] + [("z.jpg", b"x"), ("z.cls", b"0")]
    assert scan_tars([written(tmp_path, late)]).label.tolist() == [UNUSABLE] * 99 + [0]


def test_more_faults_than_can_be_listed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path, [("a.jpg", b"x"), ("a.cls", b"0"), *[(f"{i}.jpg", b"x") for i in range(20)]])
    monkeypatch.setattr(table, "_MOST_FAULTS", 19)
    with pytest.raises(DataError, match="more than 19 samples can't be used; the first: .*byte 2560: '0.jpg'"):
        scan_tars([path])


def test_archives_without_samples_are_refused(tmp_path: Path):
    paths = [written(tmp_path, []), written(tmp_path, [("a.txt", b"x"), ("b", b"")], "b.tar")]
    with pytest.raises(DataError, match=r"shard.tar: no sample in 2 archives, .* 'a.txt', 'b': expected an image"):
        scan_tars(paths)
    with pytest.raises(DataError, match="no sample in 0 archives"):
        scan_tars([])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "byte 0: the file is empty"),
        (gzip.compress(bytes(2000)), r"byte 0: the archive is compressed \(gzip\)"),
        (bz2.compress(bytes(2000)), r"byte 0: the archive is compressed \(bzip2\)"),
        (b"no tar archive" * 100, "byte 0: no header of a member .* or no tar archive"),
        (b"short", "byte 0: 5 of 512 bytes of a header"),
    ],
)
def test_what_is_no_archive_is_refused(content: bytes, message: str, tmp_path: Path):
    path = written(tmp_path, content)
    with pytest.raises(DataError, match=f"shard.tar: {message}"):
        scan_tars([path])


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="absent.tar"):
        scan_tars([tmp_path / "absent.tar"], lambda done, total: None)


@pytest.mark.parametrize("byte", [0, 99, 130, 150, 156, 260, 511])
def test_a_damaged_header_is_found_wherever_it_leads(byte: int, tmp_path: Path):
    data = bytearray(formats.tar(members(9)))
    data[1536 + byte] ^= 0x11
    with pytest.raises(DataError, match="shard.tar: byte 1536: "):
        scan_tars([written(tmp_path, bytes(data))])


def test_signed_checksums_are_taken(tmp_path: Path):
    head = formats.tar_header("größe.jpg".encode(), 5)
    data = formats.reseal(head, signed=True) + formats.padded(b"image")
    data += formats.reseal(formats.tar_header("größe.cls".encode(), 1), signed=True) + formats.padded(b"4")
    assert scan_tars([written(tmp_path, data + bytes(1024))]).label.tolist() == [4]


@pytest.mark.parametrize(
    "field",
    [
        b"00000000005\0",
        b"         5 \0",
        b"5\0junk\0\0\0\0\0\0",
        b"000000000005",
        b"\x80" + bytes(10) + b"\x05",
        b"5           ",
    ],
)
def test_sizes_are_read_as_any_writer_puts_them(field: bytes, tmp_path: Path):
    data = formats.tar_header(b"a.jpg", field) + formats.padded(b"image") + formats.tar_header(b"a.cls", 1, magic=b"")
    path = written(tmp_path, data + formats.padded(b"4") + bytes(1024))
    scan = scan_tars([path])
    assert images([path], scan) == [b"image"] and scan.label.tolist() == [4]


@pytest.mark.parametrize(
    "field", [b"-0000000001\0", b"0x000000001\0", b"00000000009\0", b"\xff" * 12, b"+5\0" + bytes(9)]
)
def test_what_is_no_size_is_refused(field: bytes, tmp_path: Path):
    path = written(tmp_path, formats.tar(members(1))[:1024] + formats.tar_header(b"b.jpg", field) + bytes(1024))
    with pytest.raises(DataError, match="byte 1024: the size of the member is .*, expected an octal number"):
        scan_tars([path])


@pytest.mark.parametrize("size", [b"\x80" + b"\xff" * 11, b"77777777777\0", 2000])
def test_a_member_that_isn_t_whole_is_refused(size: bytes | int, tmp_path: Path):
    path = written(tmp_path, formats.tar(members(1))[:1024] + formats.tar_header(b"b.jpg", size) + bytes(1024))
    with pytest.raises(DataError, match=r"byte 1024: the member of \d+ bytes isn't whole, the file ends at byte 2560"):
        scan_tars([path])


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return formats.tar_header(b"pax", len(records), kind) + formats.padded(records)


def test_pax_sizes_and_paths_are_taken(tmp_path: Path):
    data = pax(b"9 size=5\n" + b"14 path=b.jpg\n") + formats.tar_header(b"a.txt", 0) + formats.padded(b"image")
    data += pax(b"30 mtime=1700000000.123456789\n") + formats.tar_header(b"b.cls", 1) + formats.padded(b"4")
    path = written(tmp_path, data + bytes(1024))
    scan = scan_tars([path])
    assert images([path], scan) == [b"image"] and scan.label.tolist() == [4]
    data = pax(b"9 size=1\n", b"g") + formats.tar_header(b"a.jpg", 0) + formats.padded(b"y")
    path = written(tmp_path, data + formats.tar_header(b"a.cls", 0) + formats.padded(b"4"))
    assert images([path], scan := scan_tars([path])) == [b"y"] and scan.label.tolist() == [4]


@pytest.mark.parametrize(
    "records",
    [
        b"path=b.jpg\n",
        b"99 path=b.jpg\n",
        b"0 path=b.jpg\n",
        b"14 path=b.jpgx",
        b"14 path=b.jpg\n8 size5\n",
        b"13 size=-1234\n",
        b" path=a\n",
        b"path= =\n\n",
    ],
)
@pytest.mark.timeout(60)
def test_pax_records_that_are_none_are_refused(records: bytes, tmp_path: Path):
    path = written(tmp_path, formats.tar(members(1))[:1024] + pax(records) + formats.tar(members(1)))
    with pytest.raises(DataError, match="byte 1024: .* pax record"):
        scan_tars([path])


def test_a_name_of_a_megabyte_is_refused(tmp_path: Path):
    data = formats.tar_header(b"long", (1 << 20) + 1, b"L") + bytes(3 << 20)
    with pytest.raises(DataError, match="byte 0: 1048577 bytes of names"):
        scan_tars([written(tmp_path, data)])


@needs_gnu_tar
@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_members_are_refused(format: str, tmp_path: Path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.seek(1 << 20)
        file.write(b"image")
    if (tmp_path / "a.jpg").stat().st_blocks * 512 > 1 << 19:
        pytest.skip("this file system has no holes in files")
    path = tmp_path / "shard.tar"
    assert GNU_TAR
    subprocess.run([GNU_TAR, "--sparse", f"--format={format}", "-cf", str(path), "a.jpg"], cwd=tmp_path, check=True)
    with pytest.raises(DataError, match="byte 0: the member is sparse.*without --sparse"):
        scan_tars([path])


def test_the_end_may_be_missing(tmp_path: Path):
    data = formats.tar([("a.cls", b"3"), ("a.jpg", b"image")])
    for end in (2048, 2048 - 512 + 5, 2048 + 100, 2048 + 512):
        path = written(tmp_path, data[:end])
        assert scan_tars([path]).label.tolist() == [3]


def test_what_follows_the_end_is_refused(tmp_path: Path):
    first, second = formats.tar(members(2)), formats.tar(members(3))
    with pytest.raises(DataError, match="byte 10240: something follows the archive's end at byte .*joined with cat"):
        scan_tars([written(tmp_path, first[:10240].ljust(10240, b"\0") + second)])
    with pytest.raises(DataError, match=f"byte {len(first) - 1}: something follows"):
        scan_tars([written(tmp_path, first[:-1] + b"x")])


def test_a_cut_anywhere_leaves_the_samples_before_it_or_is_told(tmp_path: Path):
    data = formats.tar(members(6, LONG), tarfile.PAX_FORMAT)
    path = written(tmp_path, data)
    whole = scan_tars([path])
    refused = 0
    for end in range(1, len(data), 97):
        path.write_bytes(data[:end])
        try:
            scan = scan_tars([path])
        except DataError as error:
            assert re.search(r"shard.tar: (byte \d+: |no sample)", str(error))
            refused += 1
            continue
        count = len(scan)
        assert scan.offset[: count - 1].tolist() == whole.offset[: count - 1].tolist()
        assert scan.label[: count - 1].tolist() == whole.label[: count - 1].tolist()
    assert refused > 50


def test_names_that_are_no_text_are_shown_in_one_line(tmp_path: Path):
    data = formats.tar_header(b"a\n\xff.jpg", 1) + formats.padded(b"x")
    with pytest.raises(DataError) as error:
        scan_tars([written(tmp_path, data)])
    assert "\n" not in str(error.value) and json.dumps("a\n�.jpg", ensure_ascii=False)[1:-1] in str(error.value)
