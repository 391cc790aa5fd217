"""Readers of data sets: a table of (encoded image, label) by sample id.

MXNet RecordIO as InsightFace writes it. A record is ``uint32 0xced7230a, uint32 (cflag << 29 | length)``, ``length``
bytes of payload, and zeros up to 4 bytes; a payload is ``uint32 flag, float32 label, uint64 id, uint64 id2``, then
``flag`` float32 labels where ``flag > 0`` (the first is the class), then the image; all little-endian. The ``.idx``
holds lines of ``key<TAB>byte offset``, and is the only thing that says where records are.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from pathlib import Path

import numpy as np

from partial_fc.errors import DataError

_MAGIC = 0xCED7230A
_MAGIC_BYTES = np.frombuffer(struct.pack("<I", _MAGIC), dtype=np.uint8)
_LENGTH_MASK = (1 << 29) - 1
# Magic, length, and the fixed part of the payload: no whole record is smaller.
_HEADER = 32
# Integers from here on may have been rounded when they were written as float32.
_FLOAT32_EXACT = 1 << 24
_DAMAGED = "the file is damaged, or the .idx belongs to another .rec: compare both with their source"


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and byte offsets of an ``.idx`` file, in ascending order of the keys: two int64 arrays.

    Raises:
        DataError: the file is missing or empty, a line isn't two numbers, or a key occurs twice.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: can't read the index of the .rec beside it ({error.strerror}): copy it from the data's source"
        ) from error
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


class RecordReader:
    """A memory-mapped RecordIO data set, by sample id 0..N-1 in the order of the image keys.

    Takes both of InsightFace's writers: with a header record at key 0 (labels ``[N+1, N+1+C]``, no image), keys 1..N
    are images and the C keys after them identity records; without one, every key is an image. Records that were split
    into parts are joined. Only the records that are asked for are touched, at the open too.

    A file that shrinks while it is mapped ends a process that reads behind its new end (SIGBUS), which no Python code
    can catch. The size is therefore compared at the open and again at each call; only the moment between remains.

    Args:
        path: a folder with ``train.rec``, ``train.idx`` and, as a rule, ``property``; or a ``.rec`` file with its
            ``.idx`` beside it.
        num_classes: C, where the files don't say it; what is given here comes first.

    Attributes:
        path: the ``.rec`` file.

    Raises:
        DataError: a file is missing, an index line is wrong, or the ``.rec`` is shorter than its index says.
    """

    def __init__(self, path: str | os.PathLike[str], num_classes: int | None = None) -> None:
        place = Path(path)
        self.path = place / "train.rec" if place.is_dir() else place
        self._map, self._bytes = _map_file(self.path)
        keys, offsets = _read_index(self.path.with_suffix(".idx"))
        self._check_ends(offsets)
        edge, identities = self._image_keys(keys, offsets)
        self._offsets = np.ascontiguousarray(offsets[(keys >= edge[0]) & (keys < edge[1])])
        self._num_classes = num_classes or _read_property(self.path.parent / "property") or identities

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self._offsets)

    @property
    def num_classes(self) -> int:
        """C: as given, else from ``property``, else the number of identity records.

        Raises:
            DataError: nothing of this is there.
        """
        if not self._num_classes:
            raise DataError(f"{self.path}: no 'property' file tells the number of classes: set data.num_classes")
        return self._num_classes

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Classes of these samples.

        Args:
            ids: int64 array ``[n]``, values in ``[0, N)``.

        Returns:
            int64 array ``[n]``.

        Raises:
            DataError: a record is damaged, or its label is no integer from 0 to 2**24 - 1 (float32 isn't exact above).
            IndexError: an id is out of range.
        """
        offsets = self._offsets_of(ids)
        words, start, _ = self._locate(ids, offsets)
        values = np.ascontiguousarray(words[:, 3]).view("<f4")
        listed = np.flatnonzero(start > offsets + _HEADER)
        if listed.size:
            first = self._bytes[offsets[listed, None] + np.arange(_HEADER, _HEADER + 4)]
            values[listed] = first.view("<f4")[:, 0]
        for row in np.flatnonzero(start < 0).tolist():
            payload, image = self._joined(int(ids[row]), int(offsets[row]))
            values[row] = np.frombuffer(payload[24:28] if image > 24 else payload[4:8], dtype="<f4")[0]
        wrong = ~((values >= 0) & (values < _FLOAT32_EXACT)) | (values != np.floor(values))
        if wrong.any():
            row = int(np.argmax(wrong))
            what = f"label {values[row]}, expected an integer from 0 to 2**24 - 1"
            raise self._damage(int(ids[row]), int(offsets[row]), what)
        return values.astype(np.int64)

    def encoded(self, ids: np.ndarray) -> list[np.ndarray]:
        """Encoded images of these samples: uint8 arrays, read-only views of the file except for records in parts.

        Args:
            ids: int64 array ``[n]``, values in ``[0, N)``.

        Raises:
            DataError: a record is damaged.
            IndexError: an id is out of range.
        """
        offsets = self._offsets_of(ids)
        _, start, end = self._locate(ids, offsets)
        data = self._bytes
        images = [data[first:last] for first, last in zip(start.tolist(), end.tolist(), strict=True)]
        for row in np.flatnonzero(start < 0).tolist():
            payload, image = self._joined(int(ids[row]), int(offsets[row]))
            images[row] = payload[image:]
        return images

    def _offsets_of(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"sample ids must be in [0, {len(self)}), got {ids.min()} to {ids.max()}")
        return self._offsets[ids]

    def _damage(self, sample: int, offset: int, what: str) -> DataError:
        return DataError(f"{self.path}: sample {sample} at byte {offset}: {what}; {_DAMAGED}")

    def _locate(self, ids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Check the headers of records and find their images.

        Returns:
            The first 8 words of each record, uint32 ``[n, 8]``; where its image starts and ends, int64 ``[n]`` each;
            both are -1 for a record in parts, of which only the first header is checked.
        """
        size = len(self._bytes)
        if (now := self._map.size()) < size:
            raise DataError(f"{self.path}: shrank from {size} to {now} bytes while in use: restore the file")

        def check(bad: np.ndarray, what: str) -> None:
            if bad.any():
                first = int(np.argmax(bad))
                raise self._damage(int(ids[first]), int(offsets[first]), what)

        check(offsets > size - _HEADER, f"behind the end of the file ({size} bytes)")
        words = self._bytes[offsets[:, None] + np.arange(_HEADER)].view("<u4")
        check(words[:, 0] != _MAGIC, f"no record starts there (the magic word {_MAGIC:#x} is missing)")
        part = words[:, 1] >> 29
        check(part > 1, "not the first part of a record")
        end = offsets + 8 + (words[:, 1] & _LENGTH_MASK)
        check(end > size, f"the record goes on behind the end of the file ({size} bytes)")
        start = offsets + _HEADER + 4 * words[:, 2].astype(np.int64)
        check((start > end) & (part == 0), "the record is too short for its own header")
        return words, np.where(part == 0, start, -1), np.where(part == 0, end, -1)

    def _joined(self, sample: int, offset: int) -> tuple[np.ndarray, int]:
        """Payload of a record in parts (cflag 1, 2, ..., 3), and where in it the image starts.

        The writer cuts a payload where it holds the magic word, and leaves the word out; so it's put back here.
        """
        size, at = len(self._bytes), offset
        parts: list[np.ndarray] = []
        while True:
            if at + 8 > size:
                raise self._damage(sample, offset, "the file ends before the record's last part")
            magic, word = struct.unpack_from("<II", self._bytes.data, at)
            cflag, length = word >> 29, word & _LENGTH_MASK
            if magic != _MAGIC or cflag not in ((2, 3) if parts else (1,)) or at + 8 + length > size:
                raise self._damage(sample, offset, f"the record's part at byte {at} is no such part")
            parts += (self._bytes[at + 8 : at + 8 + length], _MAGIC_BYTES)
            if cflag == 3:
                break
            at += 8 + length + -length % 4
        payload = np.concatenate(parts[:-1])
        image = 24 + 4 * struct.unpack_from("<I", payload.data)[0] if payload.size >= 24 else 24
        if image > payload.size:
            raise self._damage(sample, offset, "the record is too short for its own header")
        return payload, image

    def _check_ends(self, offsets: np.ndarray) -> None:
        """Check that the last record ends inside the file: what a truncated copy fails at, found without a scan."""
        last = int(offsets.max())
        try:
            _, _, end = self._locate(np.zeros(1, dtype=np.int64), np.array([last]))
            if end[0] < 0:
                self._joined(0, last)
        except DataError as error:
            raise DataError(
                f"{self.path}: {len(self._bytes)} bytes, but the last record, at byte {last}, isn't whole: "
                "the .rec is truncated, or the .idx belongs to another one; copy both again"
            ) from error

    def _image_keys(self, keys: np.ndarray, offsets: np.ndarray) -> tuple[tuple[int, int], int | None]:
        """Range of the image keys, and the number of identity records (None where there is no header record)."""
        if keys[0] != 0 or (header := self._header_labels(int(offsets[0]))) is None:
            return (0, int(keys[-1]) + 1), None
        edge = header[0]
        if edge >= _FLOAT32_EXACT:
            edge = self._search_edge(keys, offsets, edge)
        present = int(np.searchsorted(keys, edge)) - 1
        if present != edge - 1 or present == 0:
            gaps = np.flatnonzero(keys[: present + 1] != np.arange(present + 1))
            raise DataError(
                f"{self.path.with_suffix('.idx')}: {present} of {edge - 1} image keys (the header record's number), "
                f"key {gaps[0] if gaps.size else present + 1} is missing: the index is truncated, copy it again"
            )
        identities = len(keys) - edge
        told = header[1] - header[0]
        if identities != told and (edge < _FLOAT32_EXACT or abs(identities - told) > 2 * np.spacing(np.float32(edge))):
            raise DataError(
                f"{self.path.with_suffix('.idx')}: {identities} identity keys, the header record tells of {told}: "
                "the index is truncated, copy it again"
            )
        return (1, edge), identities or None

    def _header_labels(self, offset: int) -> tuple[int, int] | None:
        """Labels of the header record at key 0, ``(N+1, N+1+C)``; None where it's an image."""
        sample = np.zeros(1, dtype=np.int64)
        words, start, end = self._locate(sample, np.array([offset]))
        if start[0] < 0 or start[0] < end[0] or words[0, 2] < 2:
            return None
        first, last = (float(value) for value in self._bytes[offset + _HEADER : offset + _HEADER + 8].view("<f4"))
        if not (1 <= first <= last < 1 << 40 and first.is_integer() and last.is_integer()):
            raise DataError(
                f"{self.path}: the header record at byte {offset} has the labels [{first}, {last}], "
                "expected [images + 1, images + 1 + classes]: write the data set anew"
            )
        return int(first), int(last)

    def _search_edge(self, keys: np.ndarray, offsets: np.ndarray, edge: int) -> int:
        """Find the first key after the images where the header record, in float32, only tells about where it is."""
        reach = int(np.spacing(np.float32(edge)))
        near = slice(*np.searchsorted(keys, [edge - reach, edge + reach + 1]).tolist())
        _, start, end = self._locate(keys[near], offsets[near])
        empty = np.flatnonzero((start == end) & (start >= 0))
        if empty.size:
            return int(keys[near][empty[0]])
        return min(edge + reach, int(keys[-1])) + 1 if len(keys[near]) else edge


def _map_file(path: Path) -> tuple[mmap.mmap, np.ndarray]:
    """Map a file into memory, read-only: the mapping, and its bytes as a uint8 array."""
    try:
        with open(path, "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) < _HEADER:
                raise DataError(f"{path}: {size} bytes, too short for a record: copy it again")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(
            f"{path}: can't read the data set ({error.strerror}): "
            "set data.path to a folder with train.rec and train.idx, or to a .rec file"
        ) from error
    # A plain array, not a numpy.memmap: slicing that one costs several microseconds an image.
    return mapping, np.frombuffer(mapping, dtype=np.uint8)


def _read_property(path: Path) -> int | None:
    """Number of classes in a ``property`` file (``classes,height,width``), or None where there is no such file."""
    if not path.exists():
        return None
    text = path.read_bytes()[:80].decode("ascii", "replace")
    match = re.match(r"\s*(\d{1,15})\s*,", text)
    if not match or int(match[1]) < 1:
        raise DataError(f"{path}: begins with {text[:20]!r}, expected 'classes,height,width': copy the file again")
    return int(match[1])
