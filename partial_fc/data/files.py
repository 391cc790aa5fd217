"""The files of a data set: which they are, and their bytes, mapped into memory."""

from __future__ import annotations

import errno
import glob
import mmap
import os
import re
import resource
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
_MAGIC = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_MOST_FILES = 1_000_000
# A mapping needs no descriptor of its file, but Python's mmap keeps one, unless it's told not to, which it can be from
# 3.13 on. Where it does, this part of the descriptors that the process may have go to data.
_UNTRACKED = sys.version_info >= (3, 13)
_DESCRIPTORS_SHARE = 4
# Linux allows 65,530 mappings a process, and others need some.
_MOST_MAPPINGS = 4096
_NO_ANSWER = "the file system doesn't answer: see to where it's mounted, and start again"
# What is wrong with the machine or a file system as a whole, and passes, and then what to do.
_MACHINE = {
    errno.EMFILE: "raise the limit of open files (ulimit -n), or lower data.readers and data.threads",
    errno.ENFILE: "raise the machine's limit of open files (sysctl fs.file-max), or end other programs",
    errno.ENOMEM: "free memory, or raise the limits of it (ulimit -v) or of mappings (sysctl vm.max_map_count)",
    errno.ESTALE: _NO_ANSWER,
    errno.ENOTCONN: _NO_ANSWER,
    errno.ETIMEDOUT: _NO_ANSWER,
}
_SET_PATH = "set data.path to where the data set's files are, or copy them again"


class MachineError(DataError):
    """A file can't be read now, and that's no fault of the file or a sample: the machine has too little of something.

    Whoever leaves out samples for a ``DataError`` lets this one pass: the same samples are good a moment later, or on
    another rank.
    """


def unreadable(place: str | Path, what: str, error: OSError, advice: str) -> DataError:
    """The error to raise where a file can't be read: a ``MachineError`` where that isn't the file's fault.

    Args:
        place: the file or folder.
        what: it is, in words.
        error: why it can't be read.
        advice: the next step where the file is to blame.
    """
    other = machine_error(place, what, error)
    return other or DataError(f"{place}: can't read {what} ({error.strerror or error}): {advice}")


def machine_error(place: str | Path, what: str, error: OSError) -> MachineError | None:
    """The error to raise where a file can't be read through no fault of its own; None where it's to blame."""
    remedy = _MACHINE.get(error.errno or 0)
    return None if remedy is None else MachineError(f"{place}: can't read {what} ({error.strerror}): {remedy}")


def map_file(path: Path) -> np.ndarray:
    """A whole file, mapped into memory.

    Returns:
        Its bytes, read-only uint8 ``[size]``; of an empty file an empty array. The mapping lives as long as the array
        or a view of it.

    Raises:
        MachineError: the process has too many files open, or too little memory.
        DataError: the file can't be read.
    """
    return _map(path)


def file_size(path: Path) -> int:
    """Bytes of a file, 0 where there is none; mapping it says what is wrong with it."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


class Mappings:
    """Which files a process holds mapped into memory: those used last. For several threads at once.

    Descriptors are the process's, so one object is shared by all of its data sets, and a set of few files that is read
    often pushes out those of a large one.

    Args:
        most: mappings kept; None: as many as the process's limits allow now.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._used: OrderedDict[tuple[weakref.ref[MappedFiles], int], None] = OrderedDict()
        self._owners: set[weakref.ref[MappedFiles]] = set()
        self._files = 0
        self._lock = threading.Lock()

    @property
    def most(self) -> int:
        """How many mappings are kept; a view that was handed out keeps its own beyond that."""
        if self._most is not None:
            return self._most
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if _UNTRACKED or limit == resource.RLIM_INFINITY:
            return _MOST_MAPPINGS
        return max(1, min(limit // _DESCRIPTORS_SHARE, _MOST_MAPPINGS))

    def crowded(self, owner: MappedFiles) -> bool:
        """Whether the data sets read so far, this one among them, have more files than are kept.

        Views of their files, if kept for long, would then hold more mapped than the process may.
        """
        with self._lock:
            self._join(weakref.ref(owner))
            return self._files > self.most

    def find(self, owner: MappedFiles, file: int) -> np.ndarray | None:
        """The bytes of a file of a data set, where it is mapped; it's then the one used last."""
        with self._lock:
            data = owner.mapped.get(file)
            if data is not None:
                self._used.move_to_end((weakref.ref(owner), file))
            return data

    def keep(self, owner: MappedFiles, file: int, data: np.ndarray) -> np.ndarray:
        """Keep a file of a data set mapped, and let go of others; where another thread was first, its bytes come."""
        reference = weakref.ref(owner)
        with self._lock:
            self._join(reference)
            data = owner.mapped.setdefault(file, data)
            self._used[reference, file] = None
            self._used.move_to_end((reference, file))
            while len(self._used) > self.most:
                (other, number), _ = self._used.popitem(last=False)
                # A data set that is gone has taken its mappings along.
                if (files := other()) is not None:
                    del files.mapped[number]
            return data

    def _join(self, reference: weakref.ref[MappedFiles]) -> None:
        """Count a data set in, and those out that are gone."""
        if reference not in self._owners:
            self._owners = {other for other in self._owners if other() is not None} | {reference}
            self._files = sum(len(files) for other in self._owners if (files := other()) is not None)


# The process's own.
_MAPPINGS = Mappings()


class MappedFiles:
    """The bytes of a data set's files, of which those used last stay mapped into memory. For several threads at once.

    A file that shrinks while it is mapped ends a process that reads behind its new end (SIGBUS), which no Python code
    can catch. The size is therefore compared at each call; only the moment between remains.

    Args:
        root: folder that the names are relative to.
        names: of the files.
        mappings: which decide what stays mapped; None: those that all data sets of this process share.

    Attributes:
        root, names: as given.
        mappings: as given, or the shared ones.
        mapped: bytes of the files that are mapped now; ``mappings`` changes it.
    """

    def __init__(self, root: Path, names: Sequence[str], mappings: Mappings | None = None) -> None:
        self.root = root
        self.names = names
        self.mappings = mappings or _MAPPINGS
        self.mapped: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """The number of files."""
        return len(self.names)

    def path(self, file: int) -> Path:
        """Where the file with this index is."""
        return self.root / self.names[file]

    def bytes(self, file: int) -> np.ndarray:
        """The whole file with this index, read-only uint8 ``[size]``: valid as long as someone holds it or a view.

        Raises:
            MachineError: the process has too many files open, or too little memory.
            DataError: the file can't be read, or it has shrunk since it was mapped.
        """
        path = self.path(file)
        data = self.mappings.find(self, file)
        if data is None:
            # Without a lock: to open a file on a network's disk takes long, and a file mapped twice does no harm.
            data = self.mappings.keep(self, file, _map(path))
        try:
            now = os.stat(path).st_size
        except FileNotFoundError:
            return data  # what is mapped lives on
        except OSError as error:
            raise unreadable(path, "the data set", error, _SET_PATH) from error
        if now < data.size:
            raise DataError(f"{path}: shrank from {data.size} to {now} bytes while in use: restore the file")
        return data


def _map(path: Path) -> np.ndarray:
    """The bytes of a file, mapped into memory; of an empty file an empty array."""
    options: dict[str, Any] = {"trackfd": False} if _UNTRACKED else {}
    try:
        with open(path, "rb") as file:
            if not (size := os.fstat(file.fileno()).st_size):
                return np.frombuffer(b"", dtype=np.uint8)
            mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, **options)
    except OSError as error:
        raise unreadable(path, "the data set", error, _SET_PATH) from error
    except ValueError as error:
        raise DataError(f"{path}: can't read the data set ({error}): it shrank just now, restore the file") from error
    # A plain array, not a numpy.memmap: slicing that one costs several microseconds an image.
    return np.frombuffer(mapping, dtype=np.uint8)


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
            several files: ``shard-*.tar``, or ``shard-{000000..000099}.tar``, of which none may be missing. ``~`` at
            its beginning is the home folder. What exists under such a name itself is taken for that.
        format: one of ``FORMATS``, or ``auto``: told from the names.

    Raises:
        ConfigError: the files are of no known format, of several, or compressed.
        DataError: a file isn't there.
    """
    text = os.path.expanduser(path)
    place = Path(text)
    if os.path.isdir(place):
        return _in_folder(place, format)
    if os.path.exists(place) or not _MAGIC.search(text):
        if not os.path.exists(place):
            raise DataError(f"{place}: can't read the data set (No such file or directory): {_SET_PATH}")
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
        raise unreadable(error.filename or root, "the data set", error, _SET_PATH) from error
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
    literal = (not _MAGIC.search(part) or os.path.exists(Path(*parts[: n + 1])) for n, part in enumerate(parts[:-1]))
    first = next((n for n, is_literal in enumerate(literal) if not is_literal), len(parts) - 1)
    root, pattern = Path(*parts[:first]), "/".join(parts[first:])
    names: set[str] = set()
    missing: list[str] = []
    members = _expand_braces(pattern)
    for member in members:
        files = [name for name in _matches(root, member) if os.path.isfile(root / name)]
        names.update(files)
        if not files:
            missing.append(member)
    if missing:
        raise DataError(
            f"{root / missing[0]}: there is no such file, and {len(missing)} of the {len(members)} that "
            f"data.path={text} names are missing: copy them, or name those that are there"
        )
    return root, pattern, sorted(names)


def _matches(root: Path, pattern: str) -> list[str]:
    """Names in a folder that fit a pattern, of whose parts each that exists as it stands is taken for itself."""
    if not glob.has_magic(pattern):
        return [pattern]
    found = [""]
    for part in pattern.split("/"):
        found = [
            os.path.join(name, match)
            for name in found
            for match in ([part] if os.path.exists(root / name / part) else glob.glob(part, root_dir=root / name))
        ]
    return found


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
        DataError: it's damaged, or can't be read.
    """
    if (content := _read_beside(path)) is None:
        return None
    text = content[:80].decode("ascii", "replace")
    match = re.match(r"\s*(\d{1,15})\s*,", text)
    if not match or int(match[1]) < 1:
        raise DataError(f"{path}: begins with {text[:20]!r}, expected 'classes,height,width': copy the file again")
    return int(match[1])


def read_class_names(path: Path) -> list[str] | None:
    """Names of classes, one a line, from a ``classes.txt`` as ``prepare`` writes it; None where there is none.

    Raises:
        DataError: it can't be read.
    """
    content = _read_beside(path)
    return None if content is None else content.decode("utf-8", "surrogateescape").split("\n")[:-1]


def _read_beside(path: Path) -> bytes | None:
    """What is in a file beside the data; None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, "the file", error, "give the right to read it, or take it away") from error


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
