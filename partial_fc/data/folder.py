"""Image folders, ``root/class/.../image.jpg``, in the order of torchvision's ImageFolder."""

from __future__ import annotations

import heapq
import os
import stat
from array import array
from pathlib import Path

import numpy as np

from partial_fc.data.files import IMAGE_EXTENSIONS, machine_error, unreadable
from partial_fc.data.table import MAX_IMAGE_BYTES, UNUSABLE, Fault, Progress, Scan
from partial_fc.errors import DataError

# How many files are found before progress is told.
_REPORT = 16_384


def scan_folder(root: Path, progress: Progress | None = None) -> tuple[list[str], Scan]:
    """Find the images of a folder with a sub-folder for each class.

    Classes are the sub-folders, from 0 in the order of their names; images are all files below them whose extension,
    of any case, is one of an image. They are sorted as ImageFolder sorts: by the folder's path, then by name. Names
    that begin with a dot are left out. Symbolic links are followed, but to nothing above the class, and a folder counts
    once in a class.

    Args:
        root: the folder.
        progress: called with classes done and classes in all.

    Returns:
        Names of files relative to ``root``, and the table: row i is file i. A link that leads nowhere, and what is no
        regular file, is a fault of its row.

    Raises:
        MachineError: the process has too many files open, or too little memory.
        DataError: a folder can't be read, or there is no image.
    """
    classes = _classes(root)
    above = {_identity(path) for path in (root, *root.resolve().parents)}
    names: list[str] = []
    length, label = array("i"), array("q")
    faults: dict[int, Fault] = {}
    reported = 0
    for number, folder in enumerate(classes):
        for name, size in _images(root, folder, above):
            if isinstance(size, str):
                faults[len(names)] = Fault("record", f"{root / name}: {size}")
            names.append(name)
            length.append(0 if isinstance(size, str) else size)
            label.append(UNUSABLE if isinstance(size, str) else number)
        if progress and (len(names) >= reported + _REPORT or number + 1 == len(classes)):
            reported = len(names)
            progress(number + 1, len(classes))
    if not names:
        raise DataError(
            f"{root}: no image in {len(classes)} sub-folders, expected files such as class/image.jpg "
            f"({', '.join(sorted(IMAGE_EXTENSIONS))}): set data.path to the folder above those of the classes"
        )
    return names, Scan(
        file=np.arange(len(names), dtype=np.int32),
        offset=np.zeros(len(names), dtype=np.int64),
        length=np.frombuffer(length, dtype=np.int32),
        label=np.frombuffer(label, dtype=np.int64),
        faults=faults,
        num_classes=len(classes),
        class_names=classes,
    )


def _classes(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.name[0] != "." and _is_folder(entry))
    except OSError as error:
        raise _unreadable(str(root), error) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if failure := machine_error(entry.path, "the folder", error):
            raise failure from error
        return False  # a link to itself, say


def _size(entry: os.DirEntry[str]) -> int | str:
    """Size of a file in bytes, or in words why it can't be used."""
    try:
        info = entry.stat()
    except OSError as error:
        if failure := machine_error(entry.path, "the image", error):
            raise failure from error
        return f"can't be read ({error.strerror}): restore the file, or remove the link"
    if not stat.S_ISREG(info.st_mode):
        return "not a regular file: remove it"  # to open a pipe would wait for ever
    if info.st_size > MAX_IMAGE_BYTES:
        return f"{info.st_size} bytes, expected at most {MAX_IMAGE_BYTES}: remove it"
    return info.st_size


def _unreadable(path: str, error: OSError) -> DataError:
    return unreadable(path, "the folder", error, "set data.path, or give the right to read it")


def _identity(path: str | Path) -> tuple[int, int]:
    info = os.stat(path)
    return info.st_dev, info.st_ino


def _images(root: Path, class_name: str, above: set[tuple[int, int]]) -> list[tuple[str, int | str]]:
    """Images of a class, sorted: name relative to ``root``, and size in bytes or why it can't be used.

    Args:
        root: the folder above the classes.
        class_name: the class's folder.
        above: identities of the folders that aren't entered.
    """
    found: list[tuple[str, list[tuple[str, int | str]]]] = []
    seen = set(above)
    folders, links = [os.path.join(root, class_name)], list[str]()
    # What lies there itself comes before links, and those in order: so it doesn't depend on how the disk lists them.
    while folders or links:
        folder = folders.pop() if folders else heapq.heappop(links)
        try:
            identity = _identity(folder)
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(folder) as scanned:
                entries = [entry for entry in scanned if entry.name[0] != "."]
        except OSError as error:
            raise _unreadable(folder, error) from error
        files: list[tuple[str, int | str]] = []
        for entry in entries:
            if _is_folder(entry):
                if entry.is_symlink():
                    heapq.heappush(links, entry.path)
                else:
                    folders.append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS:
                files.append((entry.name, _size(entry)))
        found.append((folder, files))
    base = len(os.path.join(root, ""))
    return [(f"{folder[base:]}/{name}", size) for folder, files in sorted(found) for name, size in sorted(files)]
