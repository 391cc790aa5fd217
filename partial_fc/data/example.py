"""The message ``tf.train.Example``, read in place: which features it has, and where in the file their values are.

Messages of protocol buffers: ``Example {Features features = 1}``, ``Features {map<string, Feature> feature = 1}``,
``Feature {oneof: BytesList = 1, FloatList = 2, Int64List = 3}``, each list ``{repeated value = 1}``. Only what is asked
for is read: a parser of whole messages would copy the image.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from partial_fc.data.table import LARGEST_LABEL

# Kinds of lists: the numbers of their fields, and the places in KINDS. 0: a feature without a list.
BYTES, FLOATS, INTEGERS = 1, 2, 3
KINDS = ("nothing", "bytes", "floats", "integers")

_FLOAT = struct.Struct("<f")
_FLOAT32_EXACT = 1 << 24

# Kind of a list, and where in the file it, or a value of it, begins and ends.
Values = tuple[int, int, int]


class DamagedMessage(ValueError):
    """Bytes that are no message; says what is wrong, and at which byte of the file."""


def features(view: memoryview, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Walk along the features of an Example.

    Args:
        view: the file.
        at: byte offset of the Example.
        end: byte offset behind it; nothing from there on is read.

    Yields:
        Name of a feature, and where its message begins and ends. A name may come again, and the last one counts.

    Raises:
        DamagedMessage: it's no message.
    """
    for outer, wire, start, stop in _fields(view, at, end):
        if outer == 1 and wire == 2:
            for number, wire, low, high in _fields(view, start, stop):
                if number == 1 and wire == 2:
                    yield _entry(view, low, high)


def list_of(view: memoryview, at: int, end: int) -> Values:
    """The list of a feature that is between two byte offsets; the kind is 0 where it has none.

    Raises:
        DamagedMessage: it's no message.
    """
    found = (0, end, end)
    for number, wire, start, stop in _fields(view, at, end):
        if wire == 2 and number in (BYTES, FLOATS, INTEGERS):
            found = (number, start, stop)
    return found


def first_value(view: memoryview, at: int, end: int) -> Values | None:
    """The first value of a feature that is between two byte offsets; None where it has none.

    Of packed numbers it's the range of all of them.

    Raises:
        DamagedMessage: it's no message.
    """
    kind, at, end = list_of(view, at, end)
    for number, wire, start, stop in _fields(view, at, end):
        fits = wire == 2 or (kind == FLOATS and wire == 5) or (kind == INTEGERS and wire == 0)
        if number == 1 and fits and (stop > start or kind == BYTES):
            return kind, start, stop
    return None


def read_label(view: memoryview, at: int, end: int) -> int | str:
    """The label in a feature that is between two byte offsets; or, in words, what is there instead.

    Raises:
        DamagedMessage: it's no message.
    """
    first = first_value(view, at, end)
    if first is None:
        return "an empty list"
    kind, start, stop = first
    if kind == INTEGERS:
        value, _ = _varint(view, start, stop)
        return value if value <= LARGEST_LABEL else str(value - (1 << 64))
    if kind == BYTES:
        text = bytes(view[start : min(stop, start + 64)]).strip()
        value = int(text) if text.isdigit() and stop - start <= 64 else -1
        return value if 0 <= value <= LARGEST_LABEL else repr(text[:40])
    if stop - start < 4:
        raise DamagedMessage(f"{stop - start} of the 4 bytes of a number at byte {start}")
    (number,) = _FLOAT.unpack_from(view, start)
    if 0 <= number < _FLOAT32_EXACT and number.is_integer():
        return int(number)
    return f"{number} in float32, which is exact below 2**24"


def _entry(view: memoryview, at: int, end: int) -> tuple[bytes, int, int]:
    """An entry of the map: its name, and where its value begins and ends."""
    # As writers lay it out: the name, and a short value up to the end.
    if end - at > 3 and view[at] == 0x0A and (size := view[at + 1]) < 0x80:
        middle = at + 2 + size
        if middle + 1 < end and view[middle] == 0x12 and view[middle + 1] == end - middle - 2 < 0x80:
            return bytes(view[at + 2 : middle]), middle + 2, end
    name, low, high = b"", end, end
    for number, wire, start, stop in _fields(view, at, end):
        if number == 1 and wire == 2:
            name = bytes(view[start:stop])
        elif number == 2 and wire == 2:
            low, high = start, stop
    return name, low, high


def _fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Fields of a message: number, wire type, and where the value begins and ends. Each turn goes forward."""
    while at < end:
        tag, start = view[at], at + 1
        if tag >= 0x80:
            tag, start = _varint(view, at, end)
        wire = tag & 7
        if wire == 2:
            size, start = _varint(view, start, end)
            stop = start + size
        elif wire == 0:
            _, stop = _varint(view, start, end)
        elif wire in (1, 5):
            stop = start + (8 if wire == 1 else 4)
        else:
            raise DamagedMessage(f"wire type {wire} at byte {at}")
        if stop > end:
            raise DamagedMessage(f"the field at byte {at} goes on behind its message, which ends at byte {end}")
        yield tag >> 3, wire, start, stop
        at = stop


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    """A number of 7 bits a byte, below 2**64, and the offset behind it."""
    if at < end and view[at] < 0x80:
        return view[at], at + 1
    first, value = at, 0
    while at < min(end, first + 10):
        byte = view[at]
        value |= (byte & 0x7F) << 7 * (at - first)
        at += 1
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise DamagedMessage(f"no number ends within 10 bytes of byte {first}")
