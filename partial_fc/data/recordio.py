"""The scanner of MXNet RecordIO as InsightFace writes it.

A record is ``uint32 0xced7230a, uint32 (cflag << 29 | length)``, ``length`` bytes of payload, and zeros up to 4 bytes;
a payload is ``uint32 flag, float32 label, uint64 id, uint64 id2``, then ``flag`` float32 labels where ``flag > 0`` (the
first is the class), then the image; all little-endian. The ``.idx`` holds lines of ``key<TAB>byte offset``, and is the
only thing that says where records are.

Both of InsightFace's writers are read: with a header record at key 0 (labels ``[N+1, N+1+C]``, no image), keys 1..N are
images and the C keys after them identity records, whose ranges of keys nobody needs here; without one, every key is an
image.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from partial_fc.data.files import MappedFiles, read_property, unreadable
from partial_fc.data.table import MAX_IMAGE_BYTES, UNUSABLE, Fault, Progress, Scan
from partial_fc.errors import DataError

_MAGIC = 0xCED7230A
_MAGIC_BYTES = np.frombuffer(struct.pack("<I", _MAGIC), dtype=np.uint8)
_LENGTH_MASK = (1 << 29) - 1
# Magic, length, and the fixed part of the payload: no whole record is smaller.
_HEADER = 32
# Integers from here on may have been rounded when they were written as float32.
_FLOAT32_EXACT = 1 << 24
# Above this a label or a header's number is no rounded integer but damage.
_MOST_CLASSES = 1 << 40
# Records whose headers are read at once; small enough for the processor's cache.
_CHUNK = 1 << 16
# Faults are kept one by one. A set with more is of no use, and the list would take gigabytes.
_MOST_FAULTS = 1_000_000
_DAMAGED = "the file is damaged, or the .idx belongs to another .rec: compare both with their source"
# What can be wrong with the header of a record; the place in this list, from 1 on, stands for it.
_DAMAGES = [
    "behind the end of the file ({size} bytes)",
    f"no record starts there (the magic word {_MAGIC:#x} is missing)",
    "not the first part of a record",
    "the record goes on behind the end of the file ({size} bytes)",
    "the record is too short for its own header",
    "the record has no image",
]
_WHOLE, _CUT, _EMPTY = 0, (1, 4), 6


def scan_recordio(rec: Path, progress: Progress | None = None) -> Scan:
    """Read the header of every image record.

    The rows are in the order of the image keys. C is from ``property`` beside the ``.rec``, else the number of identity
    records, else None. A damaged record, and a label that is no integer from 0 to C - 1, are faults of their rows.

    Args:
        rec: the ``.rec`` file, with its ``.idx`` beside it.
        progress: called with bytes of the ``.rec`` behind, and its size.

    Raises:
        DataError: a file is missing, an index line is wrong, the index or the ``.rec`` is truncated, the header record
            is nonsense, or labels have been lost because float32 isn't exact from 2**24 on.
    """
    files = MappedFiles(rec.parent, [rec.name])
    data = files.bytes(0)
    if data.size < _HEADER:
        raise DataError(f"{rec}: {data.size} bytes, too short for a record: copy it again")
    keys, offsets = _read_index(rec.with_suffix(".idx"))
    _check_end(rec, data, int(offsets.max()))
    (first, edge), identities = _image_keys(rec, data, keys, offsets)
    offsets = offsets[(keys >= first) & (keys < edge)]
    declared = read_property(rec.parent / "property") or identities
    count = len(offsets)
    scan = Scan(
        file=np.zeros(count, dtype=np.int32),
        offset=np.zeros(count, dtype=np.int64),
        length=np.zeros(count, dtype=np.int32),
        label=np.full(count, UNUSABLE, dtype=np.int64),
        num_classes=declared,
    )
    # In the order of the file, which is the order in which a disk reads it well.
    order = np.argsort(offsets, kind="stable") if np.any(offsets[1:] < offsets[:-1]) else np.arange(count)
    for at in range(0, count, _CHUNK):
        rows = order[at : at + _CHUNK]
        _fill(scan, rec, files.bytes(0), rows, offsets[rows])
        if len(scan.faults) > _MOST_FAULTS:
            reason = scan.faults[min(scan.faults)].reason
            raise DataError(f"{rec}: more than {_MOST_FAULTS} samples can't be used; the first: {reason}")
        if progress is not None:
            progress(min(int(offsets[rows[-1]]), data.size), data.size)
    if progress is not None:
        progress(data.size, data.size)
    return scan


def joined_image(data: np.ndarray, offset: int, extent: int, where: str) -> np.ndarray:
    """The image of a record in parts.

    Args:
        data: the whole file, uint8 ``[size]``.
        offset: of the record's first byte.
        extent: bytes of all parts with their headers and padding; nothing else of the file is read.
        where: what a message calls the place.

    Returns:
        uint8 ``[bytes]``, a copy.

    Raises:
        DataError: there is no such record.
    """
    if not 0 <= offset <= offset + extent <= data.size:
        raise DataError(f"{where}: {_DAMAGES[3].format(size=data.size)}; {_DAMAGED}")
    try:
        payload, image, _ = _joined(data, offset, offset + extent)
    except _DamagedRecord as error:
        raise DataError(f"{where}: {error}; {_DAMAGED}") from error
    return payload[image:]


class _DamagedRecord(ValueError):
    """What is wrong with a record in parts."""


class _Headers(NamedTuple):
    """The headers of n records.

    Attributes:
        words: the first 8 words of each, uint32 ``[n, 8]``.
        start: where its image starts, int64 ``[n]``; -1 for a record in parts, of which only the first header is known.
        end: where its image ends, int64 ``[n]``; -1 for a record in parts.
        damage: what is wrong with it, int64 ``[n]``: 1 + the place in ``_DAMAGES``; 0: nothing.
    """

    words: np.ndarray
    start: np.ndarray
    end: np.ndarray
    damage: np.ndarray


def _headers(data: np.ndarray, offsets: np.ndarray) -> _Headers:
    """Read and check the headers of the records at these offsets, int64 ``[n]``, which may be anywhere."""
    size = data.size
    # The file as 32 bytes from each byte on: a header is then one element, which is copied in one piece.
    windows = np.ndarray((size - _HEADER + 1,), dtype=f"V{_HEADER}", buffer=data, strides=(1,))
    words = windows[np.clip(offsets, 0, size - _HEADER)].view("<u4").reshape(len(offsets), 8)
    part = words[:, 1] >> 29
    end = offsets + 8 + (words[:, 1] & _LENGTH_MASK)
    start = offsets + _HEADER + 4 * words[:, 2].astype(np.int64)
    wrong = [
        offsets > size - _HEADER,
        words[:, 0] != _MAGIC,
        part > 1,
        end > size,
        (start > end) & (part == 0),
        (start == end) & (part == 0),
    ]
    damage = np.select(wrong, range(1, len(wrong) + 1), _WHOLE)
    return _Headers(words, np.where(part == 0, start, -1), np.where(part == 0, end, -1), damage)


def _fill(scan: Scan, rec: Path, data: np.ndarray, rows: np.ndarray, offsets: np.ndarray) -> None:
    """Fill these rows of the table from the records at these offsets."""
    head = _headers(data, offsets)
    values = np.ascontiguousarray(head.words[:, 3]).view("<f4")
    whole = head.damage == _WHOLE
    listed = np.flatnonzero(whole & (head.words[:, 2] > 0) & (head.start >= 0))
    firsts = np.ndarray((data.size - 3,), dtype="V4", buffer=data, strides=(1,))
    values[listed] = firsts[offsets[listed] + _HEADER].view("<f4")
    start, length = head.start, head.end - head.start
    faults = {
        row: Fault("empty" if damage == _EMPTY else "record", _DAMAGES[damage - 1].format(size=data.size))
        for row, damage in enumerate(head.damage.tolist())
        if damage != _WHOLE
    }
    for row in np.flatnonzero(whole & (head.start < 0)).tolist():
        start[row] = offset = int(offsets[row])
        try:
            payload, image, end = _joined(data, offset, data.size)
        except _DamagedRecord as error:
            faults[row] = Fault("record", str(error))
            continue
        values[row] = np.frombuffer(payload[24:28] if image > 24 else payload[4:8], dtype="<f4")[0]
        length[row] = offset - end
    faulty = np.zeros(len(rows), dtype=bool)
    faulty[list(faults)] = True
    start[faulty], length[faulty] = offsets[faulty], 0
    wrong = _wrong_labels(scan.num_classes, rec, values, rows, offsets, ~faulty)
    classes = scan.num_classes
    expected = "2**24 - 1" if classes is None else f"{classes - 1} (the files tell of {classes} classes)"
    for row in np.flatnonzero(wrong).tolist():
        faults[row] = Fault("label", f"label {values[row]}, expected an integer from 0 to {expected}")
    for row, (kind, reason) in faults.items():
        scan.faults[int(rows[row])] = Fault(kind, f"{rec}: byte {offsets[row]}: {reason}; {_DAMAGED}")
    scan.offset[rows] = start
    scan.length[rows] = length
    usable = ~(faulty | wrong)
    scan.label[rows[usable]] = values[usable].astype(np.int64)


def _wrong_labels(
    declared: int | None, rec: Path, values: np.ndarray, rows: np.ndarray, offsets: np.ndarray, whole: np.ndarray
) -> np.ndarray:
    """Which labels of whole records, float32 ``[n]``, are no class: bool ``[n]``.

    Raises:
        DataError: a label may have been rounded, and nothing tells that it's only damage.
    """
    if declared is None or declared > _FLOAT32_EXACT:
        rounded = np.flatnonzero(whole & (values >= _FLOAT32_EXACT) & (values < _MOST_CLASSES))
        if rounded.size:
            row = int(rounded[0])
            raise DataError(
                f"{rec}: sample {rows[row]} at byte {offsets[row]}: label {values[row]:.0f}, but labels in RecordIO "
                "are float32, which isn't exact from 2**24 on: the classes are lost here, so write the data set as "
                "WebDataset or TFRecord from its source"
            )
    # Comparisons with NaN are False, and quiet; floor of one is not.
    with np.errstate(invalid="ignore"):
        integers = values == np.floor(values)
    return whole & ~((values >= 0) & (values < (declared or _FLOAT32_EXACT)) & integers)


def _joined(data: np.ndarray, offset: int, limit: int) -> tuple[np.ndarray, int, int]:
    """Put a record in parts (cflag 1, 2, ..., 3) together, reading nothing from ``limit`` on.

    The writer cuts a payload where it holds the magic word, and leaves the word out; so it's put back here.

    Returns:
        The payload, uint8 ``[bytes]``; where in it the image starts; where in the file the record ends, with padding.

    Raises:
        _DamagedRecord: in words, why this can't be done.
    """
    at = offset
    parts: list[np.ndarray] = []
    while True:
        if at + 8 > limit:
            raise _DamagedRecord("the file ends before the record's last part")
        magic, word = struct.unpack_from("<II", data.data, at)
        cflag, length = word >> 29, word & _LENGTH_MASK
        if magic != _MAGIC or cflag not in ((2, 3) if parts else (1,)) or at + 8 + length > limit:
            raise _DamagedRecord(f"the record's part at byte {at} is no such part")
        parts += (data[at + 8 : at + 8 + length], _MAGIC_BYTES)
        at += 8 + length + -length % 4
        if at - offset > MAX_IMAGE_BYTES:
            raise _DamagedRecord(f"the record is larger than {MAX_IMAGE_BYTES} bytes")
        if cflag == 3:
            break
    payload = np.concatenate(parts[:-1])
    image = 24 + 4 * struct.unpack_from("<I", payload.data)[0] if payload.size >= 24 else 24
    if image > payload.size:
        raise _DamagedRecord("the record is too short for its own header")
    if image == payload.size:
        raise _DamagedRecord("the record has no image")
    return payload, image, min(at, limit)


def _check_end(rec: Path, data: np.ndarray, last: int) -> None:
    """Check that the last record ends inside the file, which it doesn't in a truncated copy."""
    head = _headers(data, np.array([last]))
    ends = head.damage[0] not in _CUT
    if head.damage[0] == _WHOLE and head.start[0] < 0:
        try:
            _joined(data, last, data.size)
        except _DamagedRecord:
            ends = False
    if not ends:
        raise DataError(
            f"{rec}: {data.size} bytes, but the last record, at byte {last}, isn't whole: "
            "the .rec is truncated, or the .idx belongs to another one; copy both again"
        )


def _image_keys(
    rec: Path, data: np.ndarray, keys: np.ndarray, offsets: np.ndarray
) -> tuple[tuple[int, int], int | None]:
    """Range of the image keys, and the number of identity records (None where there is no header record)."""
    index = rec.with_suffix(".idx")
    if keys[0] != 0 or (header := _header_labels(rec, data, offsets)) is None:
        return (0, int(keys[-1]) + 1), None
    edge = header[0]
    if edge >= _FLOAT32_EXACT:
        edge = _search_edge(data, keys, offsets, edge)
    present = int(np.searchsorted(keys, edge)) - 1
    if present != edge - 1 or present == 0:
        gaps = np.flatnonzero(keys[: present + 1] != np.arange(present + 1))
        raise DataError(
            f"{index}: {present} of {edge - 1} image keys (the header record's number), "
            f"key {gaps[0] if gaps.size else present + 1} is missing: the index is truncated, copy it again"
        )
    identities = len(keys) - edge
    told = header[1] - header[0]
    if identities != told and (edge < _FLOAT32_EXACT or abs(identities - told) > 2 * np.spacing(np.float32(edge))):
        raise DataError(
            f"{index}: {identities} identity keys, the header record tells of {told}: "
            "the index is truncated, copy it again"
        )
    return (1, edge), identities or None


def _header_labels(rec: Path, data: np.ndarray, offsets: np.ndarray) -> tuple[int, int] | None:
    """Labels of the header record at key 0, ``(N+1, N+1+C)``; None where it's an image, maybe a damaged one."""
    offset = int(offsets[0])
    head = _headers(data, offsets[[0, -1]])
    if head.damage[0] not in (_WHOLE, _EMPTY) and head.damage[1] != _WHOLE:
        # Behind a header record the last key is an identity, without an image. Were it one, key 0 would be one, too.
        raise DataError(f"{rec}: the record of key 0, at byte {offset}: {_what(head, data)}; {_DAMAGED}")
    if head.damage[0] != _EMPTY or head.words[0, 2] < 2:
        return None
    first, last = (float(value) for value in data[offset + _HEADER : offset + _HEADER + 8].view("<f4"))
    if not (1 <= first <= last < _MOST_CLASSES and first.is_integer() and last.is_integer()):
        raise DataError(
            f"{rec}: the header record at byte {offset} has the labels [{first}, {last}], "
            "expected [images + 1, images + 1 + classes]: write the data set anew"
        )
    return int(first), int(last)


def _search_edge(data: np.ndarray, keys: np.ndarray, offsets: np.ndarray, edge: int) -> int:
    """Find the first key after the images where the header record, in float32, only tells about where it is."""
    reach = int(np.spacing(np.float32(edge)))
    near = slice(*np.searchsorted(keys, [edge - reach, edge + reach + 1]).tolist())
    empty = np.flatnonzero(_headers(data, offsets[near]).damage == _EMPTY)
    if empty.size:
        return int(keys[near][empty[0]])
    return min(edge + reach, int(keys[-1])) + 1 if len(keys[near]) else edge


def _what(head: _Headers, data: np.ndarray) -> str:
    return _DAMAGES[head.damage[0] - 1].format(size=data.size)


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and byte offsets of an ``.idx`` file, in ascending order of the keys: two int64 arrays.

    Raises:
        DataError: the file is missing or empty, a line isn't two numbers, or a key occurs twice.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, "the index of the .rec beside it", error, "copy it from the data's source") from error
    # What is left of well-formed lines without their digits; the numbers are then parsed in one call, not line by line.
    shape = data.translate(bytes.maketrans(b" ", b"\t"), b"0123456789\r")
    lines = len(shape) // 2
    numbers = np.empty(0, dtype=np.int64)
    if shape in (b"\t\n" * lines, b"\t\n" * lines + b"\t"):
        numbers = np.fromstring(data, dtype=np.int64, sep=" ")
    if numbers.size == 0 or numbers.size != 2 * shape.count(b"\t"):
        numbers = _parse_lines(path, data)
    pairs = numbers.reshape(-1, 2)
    keys, offsets = pairs[:, 0], pairs[:, 1]
    if np.any(keys[1:] <= keys[:-1]):
        ascending = np.argsort(keys, kind="stable")
        keys, offsets = keys[ascending], offsets[ascending]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if twice.size:
        raise DataError(f"{path}: key {keys[twice[0]]} stands there twice, each key may once: write the index anew")
    return keys, offsets


def _parse_lines(path: Path, data: bytes) -> np.ndarray:
    """Parse an index line by line: slower, takes empty lines and any blanks, and names the line that is wrong."""
    numbers: list[int] = []
    for number, line in enumerate(data.splitlines(), start=1):
        match = re.fullmatch(rb"\s*(\d{1,18})\s+(\d{1,18})\s*", line)
        if match:
            numbers += (int(match[1]), int(match[2]))
        elif line.strip():
            raise DataError(f"{path}: line {number} is {line[:40]!r}, expected 'key<TAB>byte offset': copy it again")
    if not numbers:
        raise DataError(f"{path}: the index is empty, expected lines of 'key<TAB>byte offset': copy it again")
    return np.array(numbers, dtype=np.int64)
