"""Tables of data sets that are kept, so that the files are scanned once."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, NamedTuple

import numpy as np

from partial_fc.data.files import Found, machine_error, read_class_names, read_property, sync_folder
from partial_fc.data.folder import scan_folder
from partial_fc.data.recordio import scan_recordio
from partial_fc.data.table import UNUSABLE, Fault, Names, Progress, Scan
from partial_fc.data.tar import scan_tars
from partial_fc.data.tfrecord import scan_tfrecords
from partial_fc.errors import DataError

logger = logging.getLogger("partial_fc.data")

# Of the tables that are kept; tables of other versions are made anew.
_VERSION = 2
_COLUMNS: dict[str, Any] = {"file": np.int32, "offset": np.int64, "length": np.int32, "label": np.int64}
# What may stand beside the files of any format but image folders: number and names of classes.
_ABOUT = ("property", "classes.txt")
_NAMES: dict[str, Any] = {"text": np.uint8, "ends": np.int64}
# Bytes from which on an array is mapped: each mapping of numpy's takes a descriptor, and there may be many data sets.
_MAPPED = 1 << 20
# How often a table is put in its place where other processes put theirs there at the same time.
_TRIES = 10


class Table(NamedTuple):
    """A scan, with the names of its files; names of classes are here instead of there."""

    scan: Scan
    names: Names
    class_names: Names | None


class _Outdated(Exception):
    """Why a table that was kept can't be used; empty where there is none."""


def kept_table(
    found: Found, keys: dict[str, str | None], cache: str | os.PathLike[str] | None, progress: Progress | None
) -> Table:
    """The table of these files: as it was kept, else made now, and kept.

    Args:
        found: the data set's files.
        keys: ``image_key`` and ``label_key``, of TFRecord.
        cache: folder to keep the table in, ``~`` for the home folder; None: ``.partial_fc`` beside the data.
        progress: called with what is done and the total while files are scanned.

    Raises:
        DataError: the files can't be used.
    """
    options: dict[str, Any] = {"format": found.format, "pattern": found.pattern, **keys}
    places = [(found.root / ".partial_fc", options)]
    if cache is not None:
        places.insert(0, (Path(os.path.expanduser(cache)), {**options, "root": os.path.realpath(found.root)}))
    folders = [(place / _folder_name(found, chosen), chosen) for place, chosen in places]
    why = ""
    for folder, chosen in folders:
        try:
            return _load(folder, chosen, found)
        except _Outdated as outdated:
            why = why or str(outdated)
    where = found.root / found.pattern
    logger.info("%s: scanning the data set for its table%s", where, f", since {why}" if why else "")
    target, refusal = _writable(folders)
    # Before the scan: what changes while it runs is then a change.
    state = list(_state(found))
    table = _scan(found, keys, progress)
    if target is not None:
        try:
            _keep(target[0], table, {"options": target[1], "state": state, "root": str(found.root)})
            return table
        except OSError as error:
            refusal = str(error)
    logger.warning(
        "%s: its table can't be kept (%s) and will be made anew at each start: set data.cache to a folder for it",
        where,
        refusal,
    )
    return table


def _scan(found: Found, keys: dict[str, str | None], progress: Progress | None) -> Table:
    paths = [found.root / name for name in found.names]
    names = found.names
    if found.format == "recordio":
        scan = scan_recordio(paths[0], progress)
    elif found.format == "webdataset":
        scan = scan_tars(paths, progress)
    elif found.format == "tfrecord":
        scan = scan_tfrecords(paths, image_key=keys["image_key"], label_key=keys["label_key"], progress=progress)
    else:
        names, scan = scan_folder(found.root, progress)
    declared, class_names = scan.num_classes, scan.class_names
    if found.format != "folder":
        declared, class_names = read_property(found.root / "property"), read_class_names(found.root / "classes.txt")
    if found.format in ("webdataset", "tfrecord") and declared is not None:
        _check_declared(found.root, scan.label, declared)
        scan.num_classes = declared
    class_names = class_names if class_names and len(class_names) == scan.num_classes else None
    return Table(
        replace(scan, class_names=None), Names.of(names), None if class_names is None else Names.of(class_names)
    )


def _check_declared(root: Path, labels: np.ndarray, declared: int) -> None:
    largest = int(labels.max(initial=UNUSABLE))
    if largest >= declared:
        raise DataError(
            f"{root / 'property'} tells of {declared} classes, but sample {int(np.argmax(labels))} has the label "
            f"{largest}: correct the first number in it, or remove it"
        )


def _folder_name(found: Found, options: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]
    title = Path(found.pattern).stem or os.path.basename(os.path.realpath(found.root))
    return f"{re.sub('[^A-Za-z0-9._-]+', '_', title)[:40]}-{digest}"


def _writable(folders: list[tuple[Path, dict[str, Any]]]) -> tuple[tuple[Path, dict[str, Any]] | None, str]:
    """The first of the folders (each with its options) that can be written, or None and the last reason why not.

    It's made here, before times of change are asked for: a new folder in the data set's changes that one's.
    """
    refusal = ""
    for folder, options in folders:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refusal = str(error)
            continue
        if os.access(folder.parent, os.W_OK):
            return (folder, options), ""
        refusal = f"{folder.parent} is read-only"
    return None, refusal


def _state(found: Found) -> Iterator[list[Any]]:
    """Name, size and time of change of everything that the table depends on."""
    names: Iterable[str] = found.names
    if found.format == "recordio":
        names = [found.names[0], str(Path(found.names[0]).with_suffix(".idx")), *_ABOUT]
    elif found.format == "folder":
        names = _folders(found.root)
    else:
        names = [*found.names, *_ABOUT]
    for name in names:
        yield _stat(found.root, name)


def _stat(root: Path, name: str) -> list[Any]:
    try:
        status = os.stat(root / name)
    except OSError:
        return [name, -1, -1]
    return [name, status.st_size, status.st_mtime_ns]


def _folders(root: Path) -> Iterator[str]:
    """All folders that images of an image folder can be in, links followed, each once; relative to ``root``."""
    waiting, seen = ["."], set()
    while waiting:
        name = waiting.pop()
        try:
            status = os.stat(root / name)
            with os.scandir(root / name) as entries:
                inner = [entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()]
        except OSError:
            continue  # the scan says what is wrong with it
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            yield name
            waiting += [os.path.join(name, other) for other in inner]


def _keep(folder: Path, table: Table, facts: dict[str, Any]) -> None:
    """Write a table.

    Raises:
        OSError: it can't be written.
    """
    scan = table.scan
    arrays = {name: getattr(scan, name) for name in _COLUMNS}
    for title, names in (("name", table.names), ("class", table.class_names)):
        if names is not None:
            arrays |= {f"{title}_{part}": getattr(names, part) for part in _NAMES}
    faults = [[row, *fault] for row, fault in scan.faults.items()]
    facts = {"version": _VERSION, **facts, "num_classes": scan.num_classes, "faults": faults}
    facts["class_names"] = table.class_names is not None
    keep_arrays(folder, arrays, facts)


def _load(folder: Path, options: dict[str, Any], found: Found) -> Table:
    """Read a table that was kept.

    Raises:
        _Outdated: there is none, it's damaged, or the data set isn't what it was.
        MachineError: the process has too many files open, or too little memory.
    """
    try:
        facts = kept_facts(folder)
        if facts["version"] != _VERSION or facts["options"] != options:
            raise _Outdated(f"{folder} is a table of something else")
        stored = facts["state"]
        # Of an image folder those folders are asked for that were there: to find all means to list it as a whole.
        state = [_stat(found.root, name) for name, _, _ in stored] if found.format == "folder" else list(_state(found))
        if state != stored:
            changed = sorted({tuple(entry) for entry in state} ^ {tuple(entry) for entry in stored})
            what = found.root / changed[0][0] if changed else "the order of the files"
            raise _Outdated(f"{what} was changed")
        columns: dict[str, Any] = {name: kept_array(folder, name, dtype) for name, dtype in _COLUMNS.items()}
        names = _names(folder, "name")
        class_names = _names(folder, "class") if facts["class_names"] else None
        faults = _faults(facts["faults"], facts["root"], str(found.root))
        declared = facts["num_classes"]
        scan = Scan(**columns, faults=faults)
        scan.num_classes = None if declared is None else int(declared)
        _check_table(scan, names)
        return Table(scan, names, class_names)
    except FileNotFoundError as error:
        raise _Outdated(f"{error.filename} is missing" if folder.exists() else "") from error
    except OSError as error:
        # To scan all files anew would only take longer to come to the same.
        if failure := machine_error(folder, "the table", error):
            raise failure from error
        raise _Outdated(f"{folder} is damaged ({error})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _Outdated(f"{folder} is damaged ({error})") from error


def _names(folder: Path, title: str) -> Names:
    text, ends = (kept_array(folder, f"{title}_{part}", dtype) for part, dtype in _NAMES.items())
    if len(ends) and not (0 <= ends[0] and np.all(ends[1:] >= ends[:-1]) and ends[-1] <= len(text)):
        raise ValueError(f"{title}_ends.npy: not the ends of names")
    return Names(text, ends)


def _faults(stored: list[list[Any]], before: str, now: str) -> dict[int, Fault]:
    """Faults as they were kept; those of a data set that was moved since name where it is now."""
    faults = {}
    for row, kind, reason in stored:
        moved = now + reason[len(before) :] if reason.startswith(f"{before}/") else reason
        faults[int(row)] = Fault(kind, moved)
    return faults


def _check_table(scan: Scan, names: Names) -> None:
    """Check what a damaged table could do harm with; where images are is checked when they are read.

    Raises:
        ValueError: it's damaged.
    """
    count = len(scan)
    if any(len(getattr(scan, name)) != count for name in _COLUMNS):
        raise ValueError("the columns are of several lengths")
    if count and not 0 <= scan.file.min() <= scan.file.max() < len(names):
        raise ValueError("a row is in no file")
    largest = int(scan.label.max(initial=UNUSABLE))
    if count and scan.label.min() < UNUSABLE or scan.num_classes is not None and largest >= scan.num_classes:
        raise ValueError("a label is out of range")
    if not np.array_equal(np.flatnonzero(scan.label == UNUSABLE), sorted(scan.faults)):
        raise ValueError("the faults aren't those of the rows")


def keep_arrays(folder: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write arrays as ``NAME.npy`` and facts as ``table.json`` into a folder, which is there whole or not at all.

    A folder that was there is replaced; of several processes that do so at once the last one wins.

    Raises:
        OSError: it can't be written.
    """
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    fresh.mkdir()
    try:
        for name, array in arrays.items():
            with open(fresh / f"{name}.npy", "xb") as file:
                np.save(file, array, allow_pickle=False)
                _flush(file)
        with open(fresh / "table.json", "x") as text:
            json.dump(facts, text)
            _flush(text)
        sync_folder(fresh)
        _replace_folder(fresh, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def kept_facts(folder: Path) -> Any:
    """The facts that ``keep_arrays`` wrote.

    Raises:
        OSError: there are none.
        ValueError: they are damaged.
    """
    return json.loads((folder / "table.json").read_bytes())


def kept_array(folder: Path, name: str, dtype: type[np.generic]) -> np.ndarray:
    """An array ``[n]`` that ``keep_arrays`` wrote, read-only; mapped, so that all processes share it, unless small.

    Raises:
        OSError: there is none.
        ValueError: it's damaged or of another type.
    """
    path = folder / f"{name}.npy"
    try:
        small = path.stat().st_size < _MAPPED
        array = np.load(path, mmap_mode=None if small else "r", allow_pickle=False)
    except (EOFError, OverflowError, SyntaxError, TypeError, TokenError) as error:
        raise ValueError(f"{name}.npy: {error}") from error
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{name}.npy: {array.dtype} {array.shape}, expected {np.dtype(dtype)} [n]")
    array.flags.writeable = False
    # A plain array: slicing a memmap takes microseconds.
    return np.asarray(array)


def _replace_folder(fresh: Path, folder: Path) -> None:
    for _ in range(_TRIES):
        try:
            return os.rename(fresh, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        aside = fresh.with_name(f"{fresh.name}.old")
        try:
            os.rename(folder, aside)
        except FileNotFoundError:
            continue  # another process does the same just now
        shutil.rmtree(aside, ignore_errors=True)
    # So many others have put theirs there meanwhile, and it tells the same.


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
