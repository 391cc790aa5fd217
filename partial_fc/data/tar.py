"""WebDataset shards: where the samples of uncompressed tar archives are.

A tar archive is a chain of members: a header of 512 bytes (name, size, type, checksum), then the data, padded with
zeros to 512 bytes. At the end are blocks of zeros. Names and sizes that don't fit stand in a member of their own
before: types ``x`` and ``g`` (pax: records ``length key=value``), ``L`` (GNU). ``webdataset`` makes samples of them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from partial_fc.data.files import file_size, map_file
from partial_fc.data.table import Progress, Scan
from partial_fc.data.webdataset import Member, Samples
from partial_fc.errors import DataError

_BLOCK = 512
_ZEROS = b"\0" * _BLOCK
# The fields that the walk reads, from byte 124 of a header: size and type.
_SIZE_AND_TYPE = struct.Struct("<12s20xB")
_FILES = frozenset(b"0\x007")
# Links, devices, folders and pipes have no data, whatever their size field says.
_WITHOUT_DATA = frozenset(b"123456")
_PAX = frozenset(b"xXg")
# Members that tell of the one behind them.
_ANNOUNCING = frozenset(b"xXgLK")
_SPARSE = frozenset(b"S")
# Names and pax records are far shorter; a larger one is damage, and isn't read.
_MAX_ANNOUNCED = 1 << 20
# What is walked before its checksums are checked and progress is told.
_CHUNK_HEADERS = 8192
_CHUNK_BYTES = 64 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def scan_tars(paths: Sequence[Path], progress: Progress | None = None) -> Scan:
    """Find the samples of WebDataset shards, in the order of the shards and of their members.

    Tars as GNU tar and Python write them (v7, ustar, GNU, pax). ``webdataset.Samples`` says
    which members are a sample, its image and its label.

    Args:
        paths: the archives; ``file`` of the table is the index into them.
        progress: called with bytes done and bytes in all.

    Returns:
        The table. A sample without an image, with several, or without a usable label is a fault of its row.

    Raises:
        DataError: an archive can't be read, is damaged, compressed or sparse; or none of the first 100 samples can be
            used.
    """
    samples = Samples(paths)
    total = sum(map(file_size, paths)) if progress else 0
    before = 0
    for file, path in enumerate(paths):
        archive = _Archive(path)
        samples.open(file, archive.view)
        while not archive.done:
            samples.add(archive.members())
            if progress:
                progress(before + min(archive.at, len(archive.view)), total)
        samples.close_sample()
        before += len(archive.view)
    return samples.scan()


class _Archive:
    """A walk along the members of one archive, a chunk at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = map_file(path)
        self.view = self.data.data
        self.at = 0
        self.done = False
        # What pax records say of the next member, and of all that follow.
        self._next: dict[bytes, bytes] = {}
        self._shared: dict[bytes, bytes] = {}
        # Where a member is that tells of the next one, until that comes.
        self._announcement: int | None = None
        begin = bytes(self.view[:8])
        if not begin:
            raise DataError(f"{path}: byte 0: the file is empty, expected a tar archive: copy it again")
        for magic, name in _COMPRESSED.items():
            if begin.startswith(magic):
                raise DataError(
                    f"{path}: byte 0: the archive is compressed ({name}), and samples are read from anywhere in it: "
                    "decompress it (images don't get smaller by it)"
                )

    def members(self) -> list[Member]:
        """The regular files of the next chunk; ``at`` and ``done`` then tell how far the walk is.

        Raises:
            DataError: a header is damaged, a member isn't whole or sparse, or something follows the end.
        """
        headers: list[int] = []
        files: list[int] = []
        lengths: list[int] = []
        names: dict[int, bytes] = {}
        problem = None
        try:
            self._walk(headers, files, lengths, names)
        except DataError as error:
            problem = error
        # A damaged header leads the walk astray; so the first wrong checksum is the cause of what came after.
        blocks = self._checked(headers)
        if problem is not None:
            raise problem
        found = _names(blocks[files])
        for file, name in names.items():
            found[file] = name
        starts = [headers[row] + _BLOCK for row in files]
        return list(zip(found, starts, lengths, strict=True))

    def _walk(self, headers: list[int], files: list[int], lengths: list[int], names: dict[int, bytes]) -> None:
        """Follow the chain for a chunk.

        Args:
            headers: takes the byte offset of every header.
            files: takes, of regular files, the index into ``headers``.
            lengths: takes their sizes in bytes.
            names: takes, by index into ``files``, names that stand outside the header.
        """
        view, size, read = self.view, len(self.view), _SIZE_AND_TYPE.unpack_from
        at = self.at
        stop = at + _CHUNK_BYTES
        while len(headers) < _CHUNK_HEADERS and at < stop:
            if at + _BLOCK > size:
                return self._finish(at)
            field, kind = read(view, at + 124)
            if kind == 0 and bytes(view[at : at + _BLOCK]) == _ZEROS:
                return self._finish(at)
            headers.append(at)
            announcing = kind in _ANNOUNCING
            length = 0 if kind in _WITHOUT_DATA else _number(field)
            told = self._next or self._shared
            if told and not announcing and kind not in _WITHOUT_DATA:
                length = self._told_size(length)
            if length is None:
                raise self._error(at, f"the size of the member is {field!r}, expected an octal number")
            if at + _BLOCK + length > size:
                raise self._error(
                    at, f"the member of {length} bytes isn't whole, the file ends at byte {size}: it is truncated"
                )
            if kind in _FILES:
                if told and (name := self._next.get(b"path", self._shared.get(b"path"))) is not None:
                    names[len(files)] = name
                files.append(len(headers) - 1)
                lengths.append(length)
            elif announcing:
                self._read_announced(kind, at, length)
            elif kind in _SPARSE:
                raise self._sparse(at)
            if not announcing and self._announcement is not None:
                self._announcement = None
                if self._next:
                    self._next = {}
            # Lengths are never negative, so each turn goes forward.
            at += _BLOCK + (length + _BLOCK - 1) // _BLOCK * _BLOCK
        self.at = at

    def _told_size(self, length: int | None) -> int | None:
        """The size that pax records tell, else the one of the header."""
        told = self._next.get(b"size", self._shared.get(b"size"))
        return length if told is None else int(told)

    def _read_announced(self, kind: int, at: int, length: int) -> None:
        """Read what a member of type x, g, L or K tells of the next one."""
        if length > _MAX_ANNOUNCED:
            raise self._error(at, f"{length} bytes of names or attributes, expected at most {_MAX_ANNOUNCED}")
        text = bytes(self.view[at + _BLOCK : at + _BLOCK + length])
        if kind != ord("g"):
            self._announcement = at
        if kind == ord("L"):
            self._next[b"path"] = text.split(b"\0", 1)[0]
        # Python writes a pax header for every member with a time of day in fractions: most need no reading.
        if kind not in _PAX or not (b"path=" in text or b"size=" in text or b"GNU.sparse." in text):
            return
        told = self._shared if kind == ord("g") else self._next
        for key, value in self._pax_records(at, text):
            if key.startswith(b"GNU.sparse."):
                raise self._sparse(at)
            if key == b"size" and not (value.isdigit() and len(value) < 20):
                raise self._error(at, f"the pax record 'size' is {value[:40]!r}, expected a decimal number")
            if key in (b"path", b"size"):
                told[key] = value

    def _pax_records(self, header: int, text: bytes) -> Iterator[tuple[bytes, bytes]]:
        at = 0
        while at < len(text) and text[at]:
            space = text.find(b" ", at, at + 20)
            digits = text[at : max(space, at)]
            end = at + int(digits) if digits.isdigit() else 0
            key, equals, value = text[space + 1 : end - 1].partition(b"=")
            if not at < space < end <= len(text) or text[end - 1] != ord("\n") or not equals:
                raise self._error(header, f"{text[at : at + 40]!r} is no pax record ('length key=value')")
            yield key, value
            at = end

    def _finish(self, at: int) -> None:
        """End the walk: from here on there may be nothing but zeros."""
        self.at, self.done = at, True
        if self._announcement is not None:
            raise self._error(self._announcement, f"the member that this one tells of is missing at byte {at}")
        size, step = len(self.view), 1 << 24
        for first in range(at, size, step):
            if (rest := self.data[first : first + step]).any():
                byte = first + int(np.argmax(rest != 0))
                if size - at < _BLOCK:
                    raise self._error(at, f"{size - at} of 512 bytes of a header: the archive is truncated")
                raise self._error(
                    byte,
                    f"something follows the archive's end at byte {at}: a part was never written, or archives "
                    "were joined with cat (tar --concatenate joins them)",
                )

    def _checked(self, headers: list[int]) -> np.ndarray:
        """Headers, uint8 ``[n, 512]``, whose checksums are right: the sum of all bytes, blanks for their own field."""
        size = len(self.view) // _BLOCK * _BLOCK
        blocks = self.data[:size].reshape(-1, _BLOCK)[np.array(headers, dtype=np.int64) // _BLOCK]
        field = blocks[:, 148:156]
        sums = _row_sums(blocks) + 8 * ord(" ") - field.sum(axis=1, dtype=np.int64)
        # As nearly all write it: six digits, then NUL or a blank.
        digits = field[:, :6] - np.uint8(ord("0"))
        usual = (digits < 8).all(axis=1) & ((field[:, 6] == 0) | (field[:, 6] == ord(" ")))
        told = digits.astype(np.int64) @ (8 ** np.arange(5, -1, -1))
        for row in np.flatnonzero(~usual | (told != sums)).tolist():
            # Some old writers took bytes as signed.
            signed = (
                8 * ord(" ")
                + int(blocks[row].view(np.int8).sum(dtype=np.int64))
                - int(field[row].view(np.int8).sum(dtype=np.int64))
            )
            if _number(field[row].tobytes()) not in (int(sums[row]), signed):
                what = (
                    f"no header of a member is here (its checksum is {field[row].tobytes()!r}, its sum {sums[row]:o})"
                )
                raise self._error(headers[row], what if headers[row] else f"{what}: damaged, or no tar archive")
        return blocks

    def _sparse(self, at: int) -> DataError:
        return DataError(
            f"{self.path}: byte {at}: the member is sparse, its image isn't there in one piece: "
            "write the archive without --sparse"
        )

    def _error(self, at: int, what: str) -> DataError:
        return DataError(f"{self.path}: byte {at}: {what}; copy the archive again, or write it anew")


def _number(field: bytes) -> int | None:
    """A number of a header: octal digits, or, where the first bit is set, big-endian binary. None if it's neither."""
    digits = field.rstrip(b" \0")
    if not digits.isdigit():
        if field[0] & 0x80:
            # The second bit is the sign.
            return None if field[0] & 0x40 else int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
        digits = field.split(b"\0", 1)[0].strip() or b"0"
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None  # 8 or 9


def _row_sums(blocks: np.ndarray) -> np.ndarray:
    """Sums of bytes, int64 ``[n]``, of uint8 ``[n, 512]``: four at once in one word, which 64 words can't overflow."""
    words = blocks.view(np.uint64)
    every_other = np.uint64(0x00FF00FF00FF00FF)
    lanes = (words & every_other) + ((words >> np.uint64(8)) & every_other)
    return lanes.sum(axis=1, dtype=np.uint64).view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64)


def _names(blocks: np.ndarray) -> list[bytes]:
    """Names in headers, uint8 ``[n, 512]``: up to the first NUL, behind the prefix where ustar has one."""
    names = np.ascontiguousarray(blocks[:, :100]).view("S100")[:, 0].tolist()
    names = [name.split(b"\0", 1)[0] if b"\0" in name else name for name in names]
    ustar = (blocks[:, 257:263] == np.frombuffer(b"ustar\0", dtype=np.uint8)).all(axis=1)
    for row in np.flatnonzero(ustar & (blocks[:, 345] != 0)).tolist():
        names[row] = blocks[row, 345:500].tobytes().split(b"\0", 1)[0] + b"/" + names[row]
    return names
