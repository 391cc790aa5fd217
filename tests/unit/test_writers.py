"""The writers, against a parse written from RecordIO's description, and against Python's ``tarfile``."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.data.writers import (
    PlainRecordWriter,
    RecordWriter,
    ShardWriter,
    frame_record,
    image_ending,
    partial_name,
    tar_header,
)
from partial_fc.errors import DataError

MAGIC = 0xCED7230A
WORD = struct.pack("<I", MAGIC)


def read_record(data: bytes, offset: int) -> tuple[bytes, int, list[int]]:
    """The payload of the record at an offset, the offset after it, and the cflags of its parts."""
    parts, flags = [], []
    while True:
        magic, word = struct.unpack_from("<II", data, offset)
        assert magic == MAGIC and offset % 4 == 0
        cflag, length = word >> 29, word & ((1 << 29) - 1)
        parts.append(data[offset + 8 : offset + 8 + length])
        assert len(parts[-1]) == length
        end = offset + 8 + length
        offset = (end + 3) // 4 * 4
        assert data[end:offset] == bytes(offset - end)
        flags.append(cflag)
        if cflag in (0, 3):
            return WORD.join(parts), offset, flags


def parse(folder: Path) -> tuple[dict[int, tuple[int, tuple[float, ...], int, bytes]], list[int]]:
    """``{key: (flag, labels, id, image)}``, and the keys in the order of the file. Checks that nothing is left over."""
    data = (folder / "train.rec").read_bytes()
    lines = [line.split("\t") for line in (folder / "train.idx").read_text().splitlines()]
    records, offset, order = {}, 0, []
    for key, start in sorted(((int(k), int(s)) for k, s in lines), key=lambda line: line[1]):
        assert start == offset
        payload, offset, _ = read_record(data, start)
        flag, scalar, identifier, second = struct.unpack_from("<IfQQ", payload)
        assert second == 0
        labels = struct.unpack_from(f"<{flag}f", payload, 24) if flag else (scalar,)
        records[key] = (flag, labels, identifier, payload[24 + 4 * flag :])
        order.append(key)
    assert offset == len(data)
    return records, order


def write(folder: Path, **options: bool) -> list[bytes]:
    """Three classes, of 2, 1 and 3 images."""
    images = [b"JPEG" + bytes(range(n)) for n in range(6)]
    with RecordWriter(folder, image_size=64, **options) as writer:
        keys = [writer.write(image, label) for image, label in zip(images, [0, 0, 1, 2, 2, 2], strict=True)]
        assert keys == [1, 2, 3, 4, 5, 6]
        assert (writer.num_images, writer.num_classes) == (6, 3)
    return images


def test_older_layout(tmp_path: Path) -> None:
    images = write(tmp_path)
    records, order = parse(tmp_path)
    for key, label in enumerate([0, 0, 1, 2, 2, 2], start=1):
        assert records[key] == (2, (label, 1.0), key, images[key - 1])
    assert records[0] == (2, (7.0, 10.0), 0, b"")
    assert [records[key] for key in (7, 8, 9)] == [(2, (1, 3), 7, b""), (2, (3, 4), 8, b""), (2, (4, 7), 9, b"")]
    assert order == [1, 2, 3, 4, 5, 6, 0, 7, 8, 9]
    assert (tmp_path / "property").read_text() == "3,64,64\n"
    assert sorted(os.listdir(tmp_path)) == ["property", "train.idx", "train.rec"]


def test_newer_layout(tmp_path: Path) -> None:
    images = write(tmp_path, scalar_labels=True)
    records, order = parse(tmp_path)
    for key, label in enumerate([0, 0, 1, 2, 2, 2], start=1):
        assert records[key] == (0, (label,), key, images[key - 1])
    assert records[0][:2] == (2, (7.0, 10.0))
    assert order == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


@given(st.lists(st.sampled_from([WORD, b"\0", b"ab", b"jpeg", WORD[:2], WORD[2:]]), max_size=12).map(b"".join))
def test_frame_record_holds_no_word_that_a_reader_could_take_for_a_start(payload: bytes) -> None:
    framed = frame_record(payload)
    joined, end, flags = read_record(framed, 0)
    assert joined == payload and end == len(framed)
    assert flags == [0] or (flags[0] == 1 and flags[-1] == 3 and set(flags[1:-1]) <= {2})
    starts = [at for at in range(0, len(framed), 4) if framed[at : at + 4] == WORD]
    assert len(starts) == len(flags)


@pytest.mark.parametrize(
    ("payload", "flags"),
    [(b"abc" + WORD, [0]), (b"abcd" + WORD + b"e", [1, 3]), (WORD + WORD, [1, 2, 3]), (b"", [0])],
)
def test_parts(payload: bytes, flags: list[int]) -> None:
    assert read_record(frame_record(payload), 0) == (payload, len(frame_record(payload)), flags)


def test_image_with_the_magic_word_is_split(tmp_path: Path) -> None:
    image = b"1234" + WORD + b"56"
    with RecordWriter(tmp_path) as writer:
        writer.write(image, 0)
        writer.write(b"next", 1)
    records, _ = parse(tmp_path)
    assert records[1][3] == image and records[2][3] == b"next"
    assert read_record((tmp_path / "train.rec").read_bytes(), 0)[2] == [1, 3]


def test_labels_out_of_order(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path)
    for label in (1, -1):
        with pytest.raises(DataError, match=f"got label {label} for image 1, expected 0: number the classes"):
            writer.write(b"x", label)
    writer.write(b"x", 0)
    writer.write(b"x", 1)
    for label in (0, 3):
        with pytest.raises(DataError, match=f"got label {label} for image 3, expected 1 or 2"):
            writer.write(b"x", label)
    with pytest.raises(DataError, match="image 3, of class 1, has no bytes"):
        writer.write(b"", 1)
    writer.close()
    assert len(parse(tmp_path)[0]) == 2 + 2 + 1


def test_closed_writer(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path)
    writer.write(b"x", 0)
    writer.close()
    with pytest.raises(DataError, match=r"train\.rec is closed: make a new RecordWriter"):
        writer.write(b"x", 0)
    with pytest.raises(DataError, match="is closed"):
        writer.close()


def test_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image was written"), RecordWriter(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't write a data set to .*file"):
        RecordWriter(tmp_path / "file" / "folder")


def test_an_error_leaves_the_older_set(tmp_path: Path) -> None:
    write(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(RuntimeError, match="stop"), RecordWriter(tmp_path) as writer:
        writer.write(b"another", 0)
        raise RuntimeError("stop")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_new_set_replaces_an_older_one(tmp_path: Path) -> None:
    write(tmp_path)
    with RecordWriter(tmp_path) as writer:
        writer.write(b"another", 0)
    assert parse(tmp_path)[0][1] == (2, (0.0, 1.0), 1, b"another")
    assert sorted(os.listdir(tmp_path)) == ["property", "train.idx", "train.rec"]


def test_a_killed_writer_leaves_no_data_set(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        from partial_fc.data.writers import RecordWriter
        writer = RecordWriter({str(tmp_path)!r})
        for label in range(1000):
            writer.write(b"x" * 1000, label)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=root, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["train.rec.partial"]
    write(tmp_path)
    assert len(parse(tmp_path)[0]) == 6 + 3 + 1
    assert sorted(os.listdir(tmp_path)) == ["property", "train.idx", "train.rec"]


def test_a_label_that_readers_refuse_is_not_written(tmp_path: Path) -> None:
    plain = PlainRecordWriter(tmp_path)
    for label in (-1, 2**24):
        with pytest.raises(
            DataError, match=rf"sample 7: label {label}, expected one from 0 to 16777215, .* WebDataset"
        ):
            plain.write(7, b"x", label)
    plain.write(7, b"x", 2**24 - 1)
    plain.close()


def test_plain_layout(tmp_path: Path) -> None:
    writer = PlainRecordWriter(tmp_path, name="some")
    images, labels = [b"jpeg", b"1234" + WORD + b"56", b"\xff" * 7], [5, 0, 5]
    for image, label in zip(images, labels, strict=True):
        writer.write(99, image, label)
    assert writer.finish() == {"images": 3, "rec": writer.written - 14, "idx": 14}
    writer.close()
    assert writer.names() == ["some.rec", "some.idx"]
    for name in writer.names():
        os.rename(tmp_path / partial_name(name), tmp_path / name.replace("some", "train"))
    records, order = parse(tmp_path)
    assert order == [0, 1, 2]
    assert [records[key] for key in order] == [(0, (labels[key],), key, images[key]) for key in order]


@pytest.mark.parametrize("kind", ["plain", "shards"])
def test_a_resumed_writer_forgets_what_came_after_the_state(kind: str, tmp_path: Path) -> None:
    def open_(folder: Path, state: dict[str, int] | None = None) -> PlainRecordWriter | ShardWriter:
        folder.mkdir(exist_ok=True)
        if kind == "plain":
            return PlainRecordWriter(folder, state=state)
        return ShardWriter(folder, shard_size=3, state=state)

    def write(writer: PlainRecordWriter | ShardWriter, first: int, last: int) -> None:
        for number in range(first, last):
            writer.write(number, b"\xff\xd8" + bytes(number), number)

    whole = open_(tmp_path / "whole")
    write(whole, 0, 8)
    whole.finish()
    whole.close()
    for at in range(9):
        folder = tmp_path / str(at)
        first = open_(folder)
        write(first, 0, at)
        state = first.sync()
        write(first, at, 8)
        first.finish()
        first.close()
        second = open_(folder, state)
        write(second, at, 8)
        assert second.finish() and second.names() == whole.names() and second.written == whole.written
        second.close()
        for name in map(partial_name, whole.names()):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("size", [0, 5])
def test_files_that_were_cut_or_lost_are_not_gone_on_with(size: int, tmp_path: Path) -> None:
    (tmp_path / "train.rec.partial").write_bytes(bytes(size))
    with pytest.raises(DataError, match=rf"train\.rec\.partial: {size} bytes, expected the 40 that were written"):
        PlainRecordWriter(tmp_path, state={"images": 1, "rec": 40, "idx": 4})
    (tmp_path / "train-000000.tar.partial").write_bytes(bytes(size))
    with pytest.raises(DataError, match=f"2 shards of {size} bytes, expected 20480"):
        ShardWriter(tmp_path, state={"shards": 2, "complete_bytes": 20480, "open_samples": 0, "open_bytes": 0})
    with pytest.raises(DataError, match=rf"tar\.partial: {size} bytes, expected the 2048 that were written"):
        ShardWriter(tmp_path, state={"shards": 0, "complete_bytes": 0, "open_samples": 1, "open_bytes": 2048})


def test_shards_are_whole_tar_archives(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, name="some", shard_size=2)
    images = [b"\xff\xd8 jpeg", b"\x89PNG" + bytes(508), b"RIFF\1\2\3\4WEBPVP8 ", b"BM", b"P6 1 1"]
    with pytest.raises(
        DataError, match=r"sample 3: an image that begins with b'GIF89a' has no place in a shard: encode"
    ):
        writer.write(3, b"GIF89a", 0)
    for number, image in enumerate(images):
        writer.write(10**9 * number, image, 10**12 + number)
    writer.finish()
    writer.close()
    assert writer.names() == ["some-000000.tar", "some-000001.tar", "some-000002.tar"]
    found = []
    for name in writer.names():
        data = (tmp_path / partial_name(name)).read_bytes()
        assert len(data) % 10240 == 0 and data.endswith(bytes(1024))
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            found += [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    assert [member.name for member, _ in found[::2]] == [
        f"{key}.{ending}"
        for key, ending in zip(
            ("000000000", "1000000000", "2000000000", "3000000000", "4000000000"),
            ("jpg", "png", "webp", "bmp", "ppm"),
            strict=True,
        )
    ]
    assert [data for _, data in found[::2]] == images
    assert [(member.name[-4:], data) for member, data in found[1::2]] == [
        (".cls", str(10**12 + number).encode()) for number in range(5)
    ]


@given(st.integers(0, 8**11 - 1), st.from_regex("[abz/._09]{0,99}[a9]", fullmatch=True))
def test_tar_headers_are_those_of_tarfile(size: int, name: str) -> None:
    header = tar_header(name, size)
    member = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    assert (member.name, member.size) == (name, size)
    assert (member.mode, member.mtime, member.uid, member.gid) == (0o644, 0, 0, 0)
    assert (member.uname, member.gname, member.linkname) == ("", "", "")
    expected = tarfile.TarInfo(name)
    expected.size = size
    theirs = expected.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    # The device's numbers (empty, or zeros) differ between releases of Python, and so does the sum.
    assert header[:148] + header[156:329] + header[345:] == theirs[:148] + theirs[156:329] + theirs[345:]


def test_endings_of_images() -> None:
    begins = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r": "png", b"RIFFxxxxWEBP": "webp", b"RIFFxxxxWAVE": None, b"": None}
    assert {begin: image_ending(begin) for begin in begins} == begins
