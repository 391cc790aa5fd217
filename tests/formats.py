"""Tar and TFRecord files for tests, byte by byte from the formats' descriptions; never imports partial_fc."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def tar(members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> bytes:
    """An archive by Python's tarfile; a time in fractions makes it write a pax header for each member."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def tar_header(name: bytes, size: int | bytes, kind: bytes = b"0", magic: bytes = b"ustar\00000") -> bytes:
    """One header, with whatever size field; its checksum is right."""
    field = b"%011o\0" % size if isinstance(size, int) else size
    head = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0" + b" " * 8 + kind
    return reseal((head + bytes(100) + magic).ljust(512, b"\0"))


def reseal(header: bytes, signed: bool = False) -> bytes:
    """The header with its checksum put right."""
    blank = header[:148] + b" " * 8 + header[156:]
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in blank)
    return blank[:148] + b"%06o\0 " % total + blank[156:]


def padded(data: bytes) -> bytes:
    """Data as it stands in an archive, with zeros up to a whole block."""
    return data + bytes(-len(data) % 512)


def crc32c(data: bytes) -> int:
    """CRC-32C, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    """The checksum as TFRecord files have it."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    """A record of a TFRecord file."""
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def index(records: Iterable[bytes]) -> str:
    """The index of framed records, as DALI's and the tfrecord package's tfrecord2idx write it."""
    lines, at = [], 0
    for framed in records:
        lines.append(f"{at} {len(framed)}\n")
        at += len(framed)
    return "".join(lines)


def write_tfrecord(path: Path, messages: Iterable[bytes], with_index: bool = False) -> Path:
    """Write messages as a TFRecord file, on demand with its index beside it."""
    framed = [record(message) for message in messages]
    path.write_bytes(b"".join(framed))
    if with_index:
        Path(f"{path}.idx").write_text(index(framed))
    return path


def varint(value: int) -> bytes:
    """A number of protocol buffers; negative ones as 64 bits."""
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | float | bytes) -> bytes:
    """A field of a message: a number (varint), a float32, or bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def feature(values: Any, packed: bool = True) -> bytes:
    """A feature: a list of bytes, of floats or of integers, by the type of the first value."""
    if isinstance(values, bytes | int | float):
        values = [values]
    if isinstance(values[0], bytes):
        return field(1, b"".join(field(1, value) for value in values))
    number = 2 if isinstance(values[0], float) else 3
    if not packed:
        return field(number, b"".join(field(1, value) for value in values))
    pack = [struct.pack("<f", value) if number == 2 else varint(value) for value in values]
    return field(number, field(1, b"".join(pack)))


def example(features: dict[str, Any], packed: bool = True) -> bytes:
    """A tf.train.Example; values that are bytes of a ready feature come as ``("raw", bytes)``."""
    entries = []
    for name, values in features.items():
        raw = isinstance(values, tuple) and values[0] == "raw"
        entries.append(field(1, field(1, name.encode()) + field(2, values[1] if raw else feature(values, packed))))
    return field(1, b"".join(entries))
