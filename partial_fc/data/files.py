"""The files of a data set: which they are, and their bytes, mapped into memory."""

from __future__ import annotations

import errno
import glob
import mmap
import os
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from partial_fc.errors import ConfigError, DataError

# What torchvision's ImageFolder takes, and WebP has.
IMAGE_EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
FORMATS = ("recordio", "folder", "webdataset", "tfrecord")
_SHARDS = ("webdataset", "tfrecord")
_COMPRESSED = "compressed"
_KINDS = (
    ("recordio", re.compile(r"\.rec$")),
    ("webdataset", re.compile(r"\.tar$")),
    ("tfrecord", re.compile(r"\.(tfrecords?|tfrec)$|-\d+-of-\d+$")),
    (_COMPRESSED, re.compile(r"\.(tgz|tbz2?|txz|zst)$|(\.tar|\.tfrecords?|\.tfrec|-of-\d+)\.(gz|bz2|xz|lz4|zip|Z)$")),
)
_UNPACK = "is compressed, and images can't be read from the middle of a compressed file: unpack it"
_EXPECTED = "expected a .rec file, .tar files, TFRecord files, or sub-folders with images"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MOST_FILES = 1_000_000
# Python's mmap keeps a descriptor of the file; this part of those that the process may have go to data, and at most so
# many.
_DESCRIPTORS_SHARE, _MOST_MAPPINGS = 4, 4096


def map_file(path: Path) -> np.ndarray:
    """A whole file, mapped into memory.

    Returns:
        Its bytes, read-only uint8 ``[size]``; of an empty file an empty array. The mapping lives as long as the array
        or a view of it.

    Raises:
        DataError: the file can't be read.
    """
    return _map(path)[1]


def file_size(path: Path) -> int:
    """Bytes of a file, 0 where there is none; mapping it says what is wrong with it."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


class MappedFiles:
    """The bytes of many files, of which the ones used last stay mapped into memory. For several threads at once.

    A file that shrinks while it is mapped ends a process that reads behind its new end (SIGBUS), which no Python code
    can catch. The size is therefore compared at each call; only the moment between remains.

    Args:
        root: folder that the names are relative to.
        names: of the files.
        most: mappings kept, each with one descriptor; None: as many as the process's limit allows. A view that was
            handed out keeps its mapping in use, so whoever keeps views of more files than this keeps more descriptors.
    """

    def __init__(self, root: Path, names: Sequence[str], most: int | None = None) -> None:
        self.root = root
        self.names = names
        self.most = most or min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _DESCRIPTORS_SHARE, _MOST_MAPPINGS)
        self._open: OrderedDict[int, tuple[mmap.mmap | None, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of files."""
        return len(self.names)

    def path(self, file: int) -> Path:
        """Where the file with this index is."""
        return self.root / self.names[file]

    def bytes(self, file: int) -> np.ndarray:
        """The whole file with this index, read-only uint8 ``[size]``: valid as long as someone holds it or a view.

        Raises:
            DataError: the file can't be read, or it has shrunk since it was mapped.
        """
        with self._lock:
            held = self._open.get(file)
            if held is not None:
                self._open.move_to_end(file)
        if held is None:
            # Outside the lock: to open a file on a network's disk takes long, and a file mapped twice does no harm.
            held = _map(self.path(file))
            with self._lock:
                self._open[file] = held
                while len(self._open) > self.most:
                    self._open.popitem(last=False)
        mapping, data = held
        if mapping is not None and (now := mapping.size()) < data.size:
            raise DataError(f"{self.path(file)}: shrank from {data.size} to {now} bytes while in use: restore the file")
        return data


class Names(Sequence[str]):
    """Many names in two arrays: ten million Python strings would take a gigabyte, and seconds to make.

    Args:
        text: the names one behind the other, encoded as the file system's, uint8 ``[bytes]``.
        ends: where each name ends in ``text``, ascending, int64 ``[n]``.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text = text
        self.ends = ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """The same names, packed."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)), dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        """The number of names."""
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One name, or a list of those in a slice.

        Raises:
            IndexError: there is no such name.
        """
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"index {index} of {len(self)} names")
        first = int(self.ends[row - 1]) if row else 0
        return os.fsdecode(self.text[first : int(self.ends[row])].tobytes())


def _map(path: Path) -> tuple[mmap.mmap | None, np.ndarray]:
    """Map a file into memory, read-only: the mapping (None for an empty file), and its bytes."""
    try:
        with open(path, "rb") as file:
            if not (size := os.fstat(file.fileno()).st_size):
                return None, np.frombuffer(b"", dtype=np.uint8)
            mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: can't read the data set ({error.strerror}): {_next_step(error)}") from error
    except ValueError as error:
        raise DataError(f"{path}: can't read the data set ({error}): it shrank just now, restore the file") from error
    # A plain array, not a numpy.memmap: slicing that one costs several microseconds an image.
    return mapping, np.frombuffer(mapping, dtype=np.uint8)


def _next_step(error: OSError) -> str:
    if error.errno == errno.EMFILE:
        return "raise the limit of open files (ulimit -n)"
    return "set data.path to where the data set's files are, or copy them again"


class Found(NamedTuple):
    """The files of one data set.

    Attributes:
        format: one of ``FORMATS``.
        root: the folder that the names are relative to.
        names: of the files, sorted; none for an image folder, whose scanner finds them.
        pattern: what of the path comes behind ``root``; two data sets in one folder differ in it.
    """

    format: str
    root: Path
    names: list[str]
    pattern: str


def find_files(path: str | os.PathLike[str], format: str) -> Found:
    """Find out which files a data set consists of, and their format.

    Args:
        path: a folder with ``train.rec`` or a single ``.rec`` file, with ``.tar`` files, with TFRecord files
            (``.tfrecord``, ``.tfrecords``, ``train-00000-of-00010``) or with sub-folders of images; or such a file; or
            several files: ``shard-*.tar``, or ``shard-{000000..000099}.tar``, of which none may be missing.
        format: one of ``FORMATS``, or ``auto``: told from the names.

    Raises:
        ConfigError: the files are of no known format, of several, or compressed.
        DataError: a file isn't there.
    """
    text = os.fspath(path)
    place = Path(text)
    if place.is_dir():
        return _in_folder(place, format)
    if place.exists() or not re.search(r"[*?\[{]", text):
        if not place.exists():
            raise DataError(
                f"{place}: can't read the data set (No such file or directory): "
                "set data.path to where the data set's files are, or copy them again"
            )
        root, pattern, names = place.parent, place.name, [place.name]
    else:
        root, pattern, names = _expand(text)
    kinds = {_kind(name): name for name in names}
    if _COMPRESSED in kinds:
        raise ConfigError(f"{root / kinds[_COMPRESSED]}: {_UNPACK}")
    if format == "auto":
        if len(kinds) > 1 or None in kinds:
            shown = ", ".join(sorted(kinds.values())[:4])
            raise ConfigError(
                f"{text}: the format can't be told from the names ({shown}), {_EXPECTED}: "
                "set data.format, or data.path to files of one format"
            )
        (format,) = (kind for kind in kinds if kind)
    if format == "folder":
        raise ConfigError(f"{text}: expected a folder with data.format=folder, got a file: set data.path to a folder")
    if format == "recordio" and len(names) > 1:
        raise ConfigError(f"{text}: {len(names)} .rec files, expected one: name one in data.path, others in data.more")
    return Found(format, root, names, pattern)


def _kind(name: str) -> str | None:
    """Format of a file by its name: one of ``FORMATS``, ``compressed``, or None where it's another."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), None)


def _in_folder(root: Path, format: str) -> Found:
    """The data set that is in a folder."""
    found: dict[str, list[str]] = {}
    folders: list[str] = []
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif kind := _kind(entry.name):
                    found.setdefault(kind, []).append(entry.name)
        if format == "auto" and (example := _folder_with_images(root, folders)) is not None:
            found["folder"] = [f"{example}/"]
    except OSError as error:
        raise DataError(
            f"{error.filename or root}: can't read the data set ({error.strerror}): {_next_step(error)}"
        ) from error
    if "train.rec" in found.get("recordio", ()):
        found["recordio"] = ["train.rec"]
    names = {kind: sorted(found[kind]) for kind in found}
    usable = [kind for kind in FORMATS if kind in names]
    if format == "auto" and len(usable) != 1:
        raise _not_one(root, format, usable, names)
    format = usable[0] if format == "auto" else format
    if format == "folder":
        return Found(format, root, [], "")
    chosen = names.get(format, [])
    if format in _SHARDS:
        if not chosen:
            raise _not_one(root, format, [], names)
        return Found(format, root, chosen, "")
    if len(chosen) > 1:
        raise ConfigError(f"{root}: no train.rec, but {', '.join(chosen[:4])}: set data.path to one of these files")
    # Where none is there the scanner says so.
    chosen = chosen or ["train.rec"]
    return Found(format, root, chosen, chosen[0])


def _folder_with_images(root: Path, folders: list[str]) -> str | None:
    for name in folders:
        with os.scandir(root / name) as entries:
            if any(os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS for entry in entries):
                return name
    return None


def _not_one(root: Path, format: str, usable: list[str], names: dict[str, list[str]]) -> ConfigError:
    if usable:
        shown = " and ".join(f"{kind} ({', '.join(names[kind][:3])})" for kind in usable)
        return ConfigError(
            f"{root}: found several formats, {shown}: set data.format to one of them, or data.path to its files"
        )
    if _COMPRESSED in names:
        return ConfigError(f"{root / names[_COMPRESSED][0]}: {_UNPACK}")
    shown = ", ".join(sorted(name for kind in names for name in names[kind][:3]))
    wanted = _EXPECTED if format == "auto" else f"expected files of data.format={format}"
    return ConfigError(
        f"{root}: found {shown or 'no data set'}, {wanted}: set data.path to where they are; or data.format, where "
        "images are in deeper sub-folders (folder), and for files of other names, which data.path then names"
    )


def _expand(text: str) -> tuple[Path, str, list[str]]:
    """Folder, pattern in it, and names of the files that a path with ``*``, ``?``, ``[]`` or ``{}`` means."""
    parts = Path(text).parts
    first = next(number for number, part in enumerate(parts) if re.search(r"[*?\[{]", part))
    root, pattern = Path(*parts[:first]), "/".join(parts[first:])
    names: set[str] = set()
    missing: list[str] = []
    members = _expand_braces(pattern)
    for member in members:
        matches = [member] if not glob.has_magic(member) else glob.glob(member, root_dir=root)
        files = [name for name in matches if (root / name).is_file()]
        names.update(files)
        if not files:
            missing.append(member)
    if missing:
        raise DataError(
            f"{root / missing[0]}: there is no such file, and {len(missing)} of the {len(members)} that "
            f"data.path={text} names are missing: copy them, or name those that are there"
        )
    return root, pattern, sorted(names)


def _expand_braces(pattern: str) -> list[str]:
    """Names that a pattern with ``{000..099}`` or ``{a,b}`` stands for, as the shell and WebDataset have it."""
    members = [pattern]
    while braces := _BRACES.search(members[0]):
        if span := _RANGE.fullmatch(braces[1]):
            low, high = int(span[1]), int(span[2])
            padded = any(len(end) > 1 and end.startswith("0") for end in span.groups())
            width = max(map(len, span.groups())) if padded else 0
            count = high - low + 1
            choices = (f"{number:0{width}d}" for number in range(low, high + 1))
        else:
            listed = braces[1].split(",")
            count = len(listed) if len(listed) > 1 else 0
            choices = (choice for choice in listed)
        if not 1 <= count * len(members) <= _MOST_FILES:
            raise ConfigError(
                f"data.path: {braces[0]} can't be expanded, expected a range such as {{000000..000099}} or a list "
                f"such as {{a,b}}, and at most {_MOST_FILES} files"
            )
        fills = list(choices)
        # The first pair of braces is the same in all members.
        members = [member.replace(braces[0], fill, 1) for member in members for fill in fills]
    return members


def read_property(path: Path) -> int | None:
    """Number of classes in a ``property`` file (``classes,height,width``), or None where there is no such file.

    Raises:
        DataError: it's damaged.
    """
    if not path.exists():
        return None
    text = path.read_bytes()[:80].decode("ascii", "replace")
    match = re.match(r"\s*(\d{1,15})\s*,", text)
    if not match or int(match[1]) < 1:
        raise DataError(f"{path}: begins with {text[:20]!r}, expected 'classes,height,width': copy the file again")
    return int(match[1])


def read_class_names(path: Path) -> list[str] | None:
    """Names of classes, one a line, from a ``classes.txt`` as ``prepare`` writes it; None where there is none."""
    if not path.exists():
        return None
    return path.read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
