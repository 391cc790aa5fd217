"""TFRecord files of ``tf.train.Example``: where their images are, and their labels.

A record is ``uint64 length, uint32 crc(length), length bytes, uint32 crc(bytes)``, little-endian; the checksum is
CRC-32C, masked. An index of DALI or the tfrecord package has a line ``offset length`` a record; the length counts the
16 bytes of framing too. The data is a ``tf.train.Example``, whose form ``example`` tells.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from partial_fc.data.crc32c import crc_of_pieces, crc_of_rows, masked
from partial_fc.data.example import (
    BYTES,
    FLOATS,
    INTEGERS,
    KINDS,
    DamagedMessage,
    features,
    first_value,
    list_of,
    read_label,
)
from partial_fc.data.files import file_size, map_file, unreadable
from partial_fc.data.table import MAX_IMAGE_BYTES, Fault, Progress, Scan, TableBuilder
from partial_fc.errors import DataError

# Names of features that are looked for where the configuration names none; the first that is there.
IMAGE_KEYS = ("image/encoded", "image_raw", "image", "jpg", "jpeg", "png", "img", "data")
LABEL_KEYS = ("image/class/label", "label", "cls", "class", "target")

_HEADER = struct.Struct("<QI")
# Around the data of a record: length and its checksum before, the data's checksum behind.
_BEFORE, _FRAME = 12, 16
_CHUNK_RECORDS = 8192
_CHUNK_BYTES = 64 << 20
# So many records are looked at for the names of features.
_FIRST = 100


def scan_tfrecords(
    paths: Sequence[Path],
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    progress: Progress | None = None,
) -> Scan:
    """Find the samples of TFRecord files, in the order of the files and of their records.

    The image is the first value of a bytes list. The label is the first value of an int64 list, of a float list (an
    integer below 2**24, where float32 is exact), or of a bytes list (decimal digits). The checksums of all lengths are
    checked, those of the data by ``bad_checksums``. An index beside a file (``x.tfrecord.idx``, ``x.idx``, or
    ``.index``) is used, and compared with the file.

    Args:
        paths: the files; ``file`` of the table is the index into them.
        image_key: name of the feature with the encoded image; by default the first of ``IMAGE_KEYS`` that the first
            records have.
        label_key: name of the feature with the label; by default the first of ``LABEL_KEYS``.
        progress: called with bytes done and bytes in all.

    Returns:
        The table. A record whose message is damaged, or that has no image or no usable label, is a fault of its row.

    Raises:
        DataError: a file can't be read, or its framing is damaged; an index doesn't fit its file; no record has the
            features; or none of the first 100 samples can be used.
    """
    samples = _Samples(paths, image_key, label_key)
    total = sum(map(file_size, paths)) if progress else 0
    done = 0
    for file, path in enumerate(paths):
        data = map_file(path)
        for starts, lengths in _records(path, data):
            samples.add(file, data.data, starts.tolist(), (starts + lengths).tolist())
            if progress:
                progress(done + int(starts[-1] + lengths[-1]) + 4, total)
        done += len(data)
    return samples.scan()


def bad_checksums(path: Path, progress: Progress | None = None) -> list[int]:
    """Read a whole TFRecord file, and compare its data with the checksums.

    Args:
        path: the file.
        progress: called with bytes done and bytes in all.

    Returns:
        Byte offsets of the records whose data isn't what was written; each is where the record's length stands.

    Raises:
        DataError: the file can't be read, or its framing is damaged.
    """
    data = map_file(path)
    bad: list[int] = []
    for starts, lengths in _records(path, data):
        bad += (starts[~check_data(data, starts, lengths)] - _BEFORE).tolist()
        if progress:
            progress(int(starts[-1] + lengths[-1]) + 4, len(data))
    return bad


def check_data(data: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Compare records with the checksums behind them, all side by side.

    Args:
        data: uint8 ``[size]``, the file.
        offsets: int64 ``[n]``, of the records' first data byte, in order.
        lengths: int64 ``[n]``, of their data.

    Returns:
        bool ``[n]``, whether the checksum is right.
    """
    told = data[(offsets + lengths)[:, None] + np.arange(4)].view("<u4")[:, 0]
    return masked(crc_of_pieces(data, offsets, lengths)) == told


def _records(path: Path, data: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Offsets and lengths of the data of records, int64 ``[n]`` each, of a chunk at a time; their framing is right."""
    index = _index_of(path)
    if index is not None:
        yield from _indexed(path, data, index)
        return
    view, size, at = data.data, len(data), 0
    while at < size:
        first, problem = at, ""
        records: list[int] = []
        while at < size and at - first < _CHUNK_BYTES and len(records) < _CHUNK_RECORDS:
            if at + _BEFORE > size:
                problem = f"{size - at} of the 12 bytes before a record"
                break
            length, _ = _HEADER.unpack_from(view, at)
            records.append(at)
            if at + _FRAME + length > size:
                problem = f"a record of {length} bytes goes on behind the end of the file ({size} bytes)"
                break
            at += _FRAME + length
        offsets = np.array(records, dtype=np.int64)
        # A damaged length leads astray; so the first wrong checksum is the cause of what came after.
        lengths = _checked_lengths(path, data, offsets)
        if problem:
            raise DataError(f"{path}: byte {at}: {problem}: it is truncated, copy it again")
        yield offsets + _BEFORE, lengths


def _checked_lengths(path: Path, data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Lengths of the data of these records, int64 ``[n]``, after a look at their checksums."""
    headers = data[offsets[:, None] + np.arange(_BEFORE)]
    crc = crc_of_rows(np.ascontiguousarray(headers[:, :8]))
    wrong = np.flatnonzero(masked(crc) != np.ascontiguousarray(headers[:, 8:]).view("<u4")[:, 0])
    if wrong.size:
        at = int(offsets[wrong[0]])
        compressed = at == 0 and (headers[0, :2].tobytes() == b"\x1f\x8b" or headers[0, 0] == 0x78)
        hint = "is it compressed with gzip or zlib? Then decompress it" if compressed else "copy the file again"
        raise DataError(f"{path}: byte {at}: the checksum of the record's length is wrong; {hint}")
    return np.ascontiguousarray(headers[:, :8]).view("<i8")[:, 0]


def _index_of(path: Path) -> Path | None:
    """The index beside a file, if there is one."""
    stems = [str(path)]
    # Of x.tfrecord-00001-of-00008 the part behind the dot is no extension, and x.idx would be that of all eight.
    if path.suffix in (".tfrecord", ".tfrecords", ".tfrec", ".tfr", ".record", ".records"):
        stems.append(str(path.with_suffix("")))
    for stem in stems:
        for suffix in (".idx", ".index", ".tfindex"):
            if (index := Path(stem + suffix)).is_file():
                return index
    return None


def _indexed(path: Path, data: np.ndarray, index: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As ``_records``, by the index, after a comparison of the two."""
    numbers = _read_index(index)
    offsets, sizes = numbers[:, 0], numbers[:, 1]
    hint = f"{path.name} or its index is damaged, or it's another file's: copy both again, or remove the index"
    ends = offsets + sizes
    expected = np.concatenate([np.zeros(1, dtype=np.int64), ends])[: len(ends)]
    wrong = np.flatnonzero((offsets != expected) | (sizes < _FRAME) | (offsets > len(data) - sizes))
    if wrong.size:
        line = int(wrong[0])
        raise DataError(
            f"{index}: line {line + 1}: a record of {sizes[line]} bytes at byte {offsets[line]}, expected one from "
            f"byte {expected[line]} on, inside the {len(data)} bytes of the file; {hint}"
        )
    if (end := int(ends[-1]) if len(ends) else 0) != len(data):
        raise DataError(
            f"{index}: after the last line, {len(ends)}, the records end at byte {end}, the file at {len(data)}; {hint}"
        )
    for first in range(0, len(offsets), _CHUNK_RECORDS):
        rows = slice(first, first + _CHUNK_RECORDS)
        lengths = _checked_lengths(path, data, offsets[rows])
        wrong = np.flatnonzero(lengths != sizes[rows] - _FRAME)
        if wrong.size:
            line = first + int(wrong[0])
            raise DataError(
                f"{index}: line {line + 1}: a record of {sizes[line]} bytes, but at byte {offsets[line]} of {path} is "
                f"one of {int(lengths[wrong[0]]) + _FRAME}; {hint}"
            )
        yield offsets[rows] + _BEFORE, lengths


def _read_index(path: Path) -> np.ndarray:
    """The numbers of an index, int64 ``[records, 2]``."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise unreadable(path, "the index", error, "copy it again, or remove it") from error
    # What is left of well-formed lines without their digits; the numbers are then parsed in one call, not line by line.
    shape = text.translate(None, b"0123456789\r")
    lines = shape.count(b" ")
    if lines and shape in (b" \n" * lines, (b" \n" * lines)[:-1]):
        numbers = np.fromstring(text, dtype=np.int64, sep=" ")
        if numbers.size == 2 * lines:
            return numbers.reshape(-1, 2)
    parsed: list[int] = []
    for number, line in enumerate(text.rstrip().splitlines(), start=1):
        match = re.fullmatch(rb"\s*(\d{1,18})\s+(\d{1,18})\s*", line)
        if not match:
            raise DataError(
                f"{path}: line {number} is {line[:40]!r}, expected 'offset length' of a record: "
                "write the index anew with tfrecord2idx, or remove it"
            )
        parsed += (int(match[1]), int(match[2]))
    return np.array(parsed, dtype=np.int64).reshape(-1, 2)


class _Samples:
    """Records become rows of the table."""

    def __init__(self, paths: Sequence[Path], image_key: str | None, label_key: str | None) -> None:
        self._paths = paths
        self._wanted = [
            ("image_key", [image_key] if image_key else IMAGE_KEYS),
            ("label_key", [label_key] if label_key else LABEL_KEYS),
        ]
        self._keys: list[bytes] = []
        self._table = TableBuilder()

    def add(self, file: int, view: memoryview, starts: list[int], ends: list[int]) -> None:
        """Take records of a file, by where their messages begin and end."""
        if not self._keys:
            self._keys = self._find_keys(self._paths[file], view, starts[:_FIRST], ends[:_FIRST])
        for start, end in zip(starts, ends, strict=True):
            try:
                offset, length, label = self._read(view, start, end)
            except DamagedMessage as damage:
                offset, length, label = start, 0, Fault("record", f"it is no tf.train.Example: {damage}")
            if isinstance(label, Fault):
                where = f"{self._paths[file]}: byte {start - _BEFORE}: the record there: "
                label = label._replace(reason=where + label.reason)
            self._table.append(file, offset, length, label)

    def _read(self, view: memoryview, start: int, end: int) -> tuple[int, int, int | Fault]:
        """Offset, length and label of a record's image; instead of the label what is wrong with it."""
        image_key, label_key = self._keys
        image = label = None
        for name, low, high in features(view, start, end):
            if name == image_key:
                image = (low, high)
            elif name == label_key:
                label = (low, high)
        value = first_value(view, *image) if image else None
        if value is None or value[0] != BYTES:
            return start, 0, Fault("record", f"no image: no bytes in the feature {_text(image_key)}")
        _, offset, stop = value
        length = stop - offset
        if length > MAX_IMAGE_BYTES:
            return offset, 0, Fault("record", f"an image of {length} bytes, expected at most {MAX_IMAGE_BYTES}")
        if label is None:
            return offset, length, Fault("label", f"no feature {_text(label_key)}")
        got = read_label(view, *label)
        if isinstance(got, str):
            reason = f"the label {_text(label_key)} is {got}, expected an integer from 0 to 2**63 - 1"
            return offset, length, Fault("label", reason)
        return offset, length, got

    def _find_keys(self, path: Path, view: memoryview, starts: list[int], ends: list[int]) -> list[bytes]:
        """Names of the features with image and label, by the first records.

        Raises:
            DataError: none of the names looked for is there.
        """
        kinds: dict[bytes, int] = {}
        for start, end in zip(starts, ends, strict=True):
            try:
                for name, low, high in features(view, start, end):
                    kinds[name] = kinds.get(name) or list_of(view, low, high)[0]
            except DamagedMessage:
                continue  # a fault of this record, told when its row is made
        keys = []
        for setting, names in self._wanted:
            usable = (BYTES,) if setting == "image_key" else (BYTES, FLOATS, INTEGERS)
            key = next((name for name in names if kinds.get(name.encode()) in usable), None)
            if key is None:
                seen = ", ".join(f"{_text(name[:60])} ({KINDS[kind]})" for name, kind in sorted(kinds.items())[:20])
                raise DataError(
                    f"{path}: byte {starts[0] - _BEFORE}: none of the first {len(starts)} records has "
                    f"{' or '.join(map(repr, names))} with {' or '.join(KINDS[kind] for kind in usable)}; they have "
                    f"{seen or 'no features: are they tf.train.Example?'}: set data.{setting}"
                )
            keys.append(key.encode())
        return keys

    def scan(self) -> Scan:
        """The table of all samples."""
        if not len(self._table):
            where = self._paths[0] if self._paths else "no file"
            raise DataError(f"{where}: no record in {len(self._paths)} TFRecord files: set data.path")
        return self._table.scan()


def _text(name: bytes) -> str:
    return repr(name.decode("utf-8", "replace"))
