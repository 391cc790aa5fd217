"""InsightFace verification sets (``.bin``): pickles of ``(images, same)``, read without executing what they say.

A pickle is a program: the usual loader calls any function that the file names. The one here knows lists, tuples,
numbers, text and bytes, and six names with which NumPy's arrays are written. Those names don't reach NumPy: stand-ins
take their place, which hold bytes and an element type of one byte and can't do anything. So a type that holds objects
can't be asked for either. A hostile file ends in a :class:`~partial_fc.errors.DataError`.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partial_fc.errors import ConfigError, DataError

# JPEG, PNG, BMP, GIF, TIFF (two), WebP, JPEG 2000 (two), portable pixmaps.
_IMAGE_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"BM",
    b"GIF8",
    b"II*\x00",
    b"MM\x00*",
    b"RIFF",
    b"\x00\x00\x00\x0cjP",
    b"\xff\x4f\xff\x51",
    b"P5",
    b"P6",
)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of images with the answer whether both show the same identity.

    Attributes:
        images: the m distinct encoded images; one that is used in several pairs stands here once.
        left: int64 ``[n]``, index into ``images`` of each pair's first image.
        right: int64 ``[n]``, index of the second.
        same: bool ``[n]``.
    """

    images: list[bytes]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    same: NDArray[np.bool_]

    def __len__(self) -> int:
        """Number of pairs, n."""
        return len(self.same)


def read_pairs(path: str | os.PathLike[str]) -> Pairs:
    """Read an InsightFace ``.bin``: the pickle of ``(images, same)`` where pair i is the images 2i and 2i + 1.

    Written by Python 2 or 3, with any protocol. Images are bytes or NumPy ``uint8`` arrays of an encoded image;
    ``same`` holds booleans or 0 and 1, as a list or as a NumPy array. Only the first bytes of the images are looked
    at here.

    Raises:
        DataError: where the file is missing, truncated, asks for anything else than such values, or holds another
            structure; or where an item is no encoded image.
    """
    path = Path(path)
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error
    except _RefusedError as error:
        raise DataError(f"{path}: {error}") from error
    except EOFError as error:
        raise DataError(f"{path}: ends in the middle of its pickle: truncated; copy the file again") from error
    except KeyError as error:
        raise DataError(
            f"{path}: refused: its pickle uses operation {error}, which verification sets don't need; "
            "it may be damaged or of another format"
        ) from error
    # What a damaged or hostile pickle makes of the loader's stack can end in nearly any exception.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: is no verification set: its pickle can't be read ({type(error).__name__}: {reason}); "
            "it may be truncated or of another format"
        ) from error
    try:
        return _pairs_of(content)
    except _RefusedError as error:
        raise DataError(f"{path}: {error}") from error


def write_pairs(path: str | os.PathLike[str], images: Sequence[bytes], same: Iterable[bool]) -> None:
    """Write an InsightFace ``.bin`` (pickle protocol 4) that :func:`read_pairs` and the usual loaders read.

    Args:
        path: the file; it appears complete or not at all.
        images: 2n encoded images, pair i being 2i and 2i + 1; an image that stands here several times is stored once.
        same: n answers.

    Raises:
        ConfigError: where there are not two images a pair.
    """
    answers = [bool(answer) for answer in same]
    if len(images) != 2 * len(answers) or not answers:
        raise ConfigError(f"{path}: {len(images)} images for {len(answers)} pairs: expected two a pair, and a pair")
    stored: dict[bytes, bytes] = {}
    # Pickle stores an object once, so equal images have to become one object.
    shared = [stored.setdefault(bytes(image), bytes(image)) for image in images]
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        pickle.dump((shared, answers), file, protocol=4)
    part.replace(path)


def _pairs_of(content: Any) -> Pairs:
    if type(content) not in (tuple, list) or len(content) != 2:
        raise _RefusedError(f"holds {_kind(content)}, expected the pair (images, same) of a verification set")
    items, same = content[0], _answers(content[1])
    if type(items) not in (tuple, list):
        raise _RefusedError(f"its images are {_kind(items)}, expected a list")
    if len(items) != 2 * len(same) or len(same) == 0:
        raise _RefusedError(
            f"holds {len(items)} images for {len(same)} pairs, expected two images a pair, and at least one pair"
        )
    numbers: dict[bytes, int] = {}
    indices = np.empty(len(items), np.int64)
    for index, item in enumerate(items):
        image = _encoded(item, index)
        indices[index] = numbers.setdefault(image, len(numbers))
    return Pairs(list(numbers), indices[0::2].copy(), indices[1::2].copy(), same)


def _encoded(item: Any, index: int) -> bytes:
    """The bytes of one encoded image."""
    if type(item) is _Array:
        if item.kind != "u1" or sum(side != 1 for side in item.shape) > 1:
            raise _RefusedError(
                f"image {index} is an array of {item.kind} of shape {item.shape}, expected the bytes of an "
                "encoded image (uint8, one row); encode pixels first, as JPEG or PNG"
            )
        item = item.data
    if type(item) is not bytes:
        raise _RefusedError(f"image {index} is {_kind(item)}, expected the bytes of an encoded image")
    if not item.startswith(_IMAGE_STARTS):
        raise _RefusedError(f"image {index} starts with {item[:8]!r} as no image does; expected JPEG or PNG bytes")
    return item


def _answers(same: Any) -> NDArray[np.bool_]:
    if type(same) is _Array and len(same.shape) == 1:
        answers: list[Any] = list(same.data)
    elif type(same) in (tuple, list):
        answers = [value.data[0] if type(value) is _Array and value.shape == () else value for value in same]
    else:
        raise _RefusedError(f"its answers are {_kind(same)}, expected a list of booleans")
    for index, answer in enumerate(answers):
        if type(answer) not in (bool, int) or answer not in (0, 1):
            shown = answer if type(answer) is int and abs(answer) < 10**9 else _kind(answer)
            raise _RefusedError(f"the answer of pair {index} is {shown}, expected True or False")
    return np.array(answers, np.bool_)


def _kind(value: Any) -> str:
    """What a value is, without its content, which a file may make as large as it likes."""
    if type(value) is _Array:
        return f"an array of shape {value.shape}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if type(value) in (tuple, list, bytes, str) else "")


class _RefusedError(Exception):
    """The reason for which a file is refused, without its name."""


class _PlainUnpickler(pickle._Unpickler):
    """An unpickler of plain values and one-byte arrays.

    Python's own and not the faster one in C: its memo is a dictionary, so that an index of four billion costs nothing,
    and its table of operations can be cut down. The operations that make objects of a class, sets and dictionaries, or
    call registered extensions and persistent ids are not in it.
    """

    dispatch = {
        operation[0]: pickle._Unpickler.dispatch[operation[0]]
        for operation in (
            *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
            *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.LONG, pickle.LONG1),
            *(pickle.BININT, pickle.BININT1, pickle.BININT2),
            *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING),
            *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
            *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
            *(pickle.LIST, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
            *(pickle.TUPLE, pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
            *(pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
            *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
            *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD),
        )
    }
    # Reads what is there, where the bytearray's own reader first fills as much memory as the file claims.
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, fix_imports=False, encoding="bytes")

    def find_class(self, module: str, name: str) -> _Name:
        """The stand-in of a name; anything but the six is refused."""
        if (module, name) in _NAMES:
            return _Name(name)
        raise _RefusedError(
            f"refused: its pickle asks for {ascii(f'{module}.{name}'[:120])}, which verification sets don't need; "
            "don't open this file with another loader"
        )


_NAMES = frozenset(
    [
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ]
)


class _Name:
    """Stand-in of a name: calling it makes an :class:`_Array`, a :class:`_Type` or bytes, never anything else."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        if self.name == "_reconstruct":
            return _Array()
        if self.name == "dtype":
            return _Type(arguments[0])
        if self.name == "encode":
            return _latin1(*arguments)
        if self.name == "scalar":
            return _Array().fill((), *arguments)
        if self.name == "_frombuffer":
            data, kind, shape = arguments[:3]
            return _Array().fill(shape, kind, data)
        raise _RefusedError(f"refused: its pickle calls {self.name}, which verification sets don't need")

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("refused: its pickle changes a function or a class")


class _Type:
    """Stand-in of a NumPy element type: ``u1`` or ``b1``."""

    __slots__ = ("kind",)

    def __init__(self, kind: Any) -> None:
        name = kind.decode("latin1") if type(kind) is bytes else kind
        if type(name) is not str or name.lstrip("|") not in ("u1", "b1"):
            shown = ascii(name[:20]) if type(name) is str else _kind(name)
            raise _RefusedError(f"refused: it holds a NumPy array of type {shown}, expected uint8 or bool")
        self.kind = name.lstrip("|")

    def __setstate__(self, state: Any) -> None:
        # Byte order, fields, alignment: a type of one byte has none of them.
        pass


class _Array:
    """Stand-in of a NumPy array: its bytes, shape and element type."""

    __slots__ = ("data", "kind", "shape")

    def __init__(self) -> None:
        self.data, self.kind, self.shape = b"", "", (0,)

    def fill(self, shape: Any, kind: Any, data: Any) -> _Array:
        """Set the content; it has to fit the shape."""
        fits = type(shape) is tuple and len(shape) <= 32 and type(kind) is _Type and type(data) is bytes
        fits = fits and all(type(side) is int and 0 <= side <= len(data) for side in shape)
        if not fits or math.prod(shape) != len(data):
            raise _RefusedError("holds a damaged NumPy array: its shape, type and bytes don't fit")
        self.data, self.kind, self.shape = data, kind.kind, shape
        return self

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5:
            raise _RefusedError("holds a damaged NumPy array: its state is not of five values")
        _, shape, kind, _, data = state
        self.fill(shape, kind, data)


def _latin1(text: Any, encoding: Any = None) -> bytes:
    """What ``_codecs.encode`` is needed for: bytes that were written as text, because protocol 2 knows no bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1", b"latin1"):
        raise _RefusedError("refused: its pickle calls an encoder in a way that verification sets don't need")
    return text.encode("latin1")
