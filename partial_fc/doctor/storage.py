"""Files: the folder of the runs, which all machines share, and the data, which must be the same everywhere."""

from __future__ import annotations

import hashlib
import os
import secrets
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from partial_fc.data.files import find_files, read_property
from partial_fc.doctor.findings import Identity, Notes
from partial_fc.errors import DataError

# In which a file that one machine wrote must be seen by another: a network's file system keeps what it knew a while.
SHARED_SECONDS = 10.0
_SLOW_FSYNC = 1.0
_WRITTEN = 1 << 20
_READ = 16 << 20
# Of a set of very many files so many are looked at, spread over all.
_MOST_SIZES = 2000


class Source(NamedTuple):
    """A data set of the configuration, in plain values; see ``data`` there."""

    path: str
    format: str
    num_classes: int | None


class Token:
    """A file that rank 0 leaves in the folder of the runs, for the others to see.

    Args:
        folder: of the runs; made where it isn't there.
    """

    def __init__(self, folder: Path) -> None:
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f".doctor-{secrets.token_hex(6)}"
        self.path.write_text(self.path.name, encoding="ascii")

    def remove(self, _: Notes) -> None:
        """Leave no trace."""
        self.path.unlink(missing_ok=True)
        if self._made:
            # Stays where a run has begun in it since.
            try:
                self.path.parent.rmdir()
            except OSError:
                return


def check_shared(notes: Notes, folder: Path, token: str, seconds: float = SHARED_SECONDS) -> None:
    """Whether the folder of the runs is the one that rank 0 has.

    Args:
        notes: where it goes.
        folder: of the runs, as this rank names it.
        token: name of rank 0's file.
        seconds: how long to wait for it.
    """
    deadline = time.monotonic() + seconds
    # Not before rank 0 has written it: a network's file system may remember that a file wasn't there.
    while not (folder / token).is_file():
        if time.monotonic() >= deadline:
            notes.fail(
                f"{folder.absolute()} is another folder here than on rank 0 (a file of rank 0 isn't seen within "
                f"{seconds:g} s): set train.run_dir to a file system that all machines share, since every rank writes "
                "its part of a commit there"
            )
            return
        time.sleep(0.2)


def check_writing(notes: Notes, folder: Path) -> None:
    """Write, fsync, rename and delete a file, as commits do; free space.

    Facts: ``free`` (bytes), ``inodes`` (None: the file system has no such limit), ``fsync`` (seconds for 1 MiB).
    """
    space = os.statvfs(folder)
    notes.facts.update(
        {
            "folder": str(folder.absolute()),
            "free": space.f_bavail * space.f_frsize,
            "inodes": space.f_favail if space.f_files else None,
        }
    )
    notes.facts["fsync"] = statistics.median([_write_once(folder) for _ in range(3)])
    if notes.facts["fsync"] > _SLOW_FSYNC:
        notes.warn(
            f"an fsync of 1 MiB in {folder} took {notes.facts['fsync']:.1f} s, expected less than {_SLOW_FSYNC:g}: "
            "commits will take long; see whether the disk or the file server is busy"
        )


def _write_once(folder: Path) -> float:
    """Seconds of the fsync."""
    name = folder / f".doctor-{secrets.token_hex(6)}"
    renamed = name.with_suffix(".renamed")
    try:
        with name.open("wb") as file:
            file.write(b"\0" * _WRITTEN)
            file.flush()
            begin = time.perf_counter()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - begin
        os.rename(name, renamed)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        name.unlink(missing_ok=True)
        renamed.unlink(missing_ok=True)
    return seconds


def check_data(
    notes: Notes, me: Identity, sources: Sequence[Source], verification: Callable[[], Mapping[str, Path]]
) -> None:
    """That the data sets are there, what they are made of, and how fast they are read.

    Facts: ``sets``, a list of {``path``, ``format``, ``files``, ``bytes``, ``digest``, ``classes``};
    ``verification``, {name: bytes}; ``read``, MB/s (of one rank of a machine).

    Args:
        notes: where it goes.
        me: this process.
        sources: of the configuration.
        verification: its verification files by name; may raise.
    """
    sets = notes.facts["sets"] = []
    for source in sources:
        facts, files = _look(source)
        sets.append(facts)
        if me.local_rank == 0 and "read" not in notes.facts:
            notes.facts["read"] = _reading_speed(files)
    notes.facts["verification"] = {name: path.stat().st_size for name, path in verification().items()}


def _look(source: Source) -> tuple[dict[str, Any], list[Path]]:
    """(facts, files) of a data set; of an image folder those of its first class."""
    found = find_files(source.path, source.format)
    names = found.names
    if found.format == "recordio":
        names = [*names, str(Path(names[0]).with_suffix(".idx"))]
    if found.format == "folder":
        with os.scandir(found.root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    classes = source.num_classes
    if classes is None:
        classes = len(names) if found.format == "folder" else read_property(found.root / "property")
    some = names[:: -(-len(names) // _MOST_SIZES) or 1]
    sizes = [0 if found.format == "folder" else _size(found.root / name) for name in some]
    digest = hashlib.sha256(repr([names, sizes]).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    facts = {
        "path": source.path,
        "format": found.format,
        "files": len(names),
        "bytes": sum(sizes) * len(names) // max(len(some), 1),
        "digest": digest,
        "classes": classes,
    }
    if found.format == "folder":
        first = found.root / names[0] if names else found.root
        return facts, sorted(path for path in first.iterdir() if path.is_file())[:64]
    return facts, [found.root / some[0]]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: copy the data set's files again, or correct data.path") from error


def _reading_speed(files: Sequence[Path]) -> float | None:
    """MB/s of up to 16 MiB: the middle of one file, or several from their beginning; None: too little to tell."""
    read, seconds = 0, 0.0
    for path in files:
        with path.open("rb") as file:
            begin = max(0, os.fstat(file.fileno()).st_size // 2 - _READ // 2) if len(files) == 1 else 0
            if hasattr(os, "posix_fadvise"):
                # What is in memory would say nothing of the disk.
                os.posix_fadvise(file.fileno(), begin, _READ, os.POSIX_FADV_DONTNEED)
            file.seek(begin)
            start = time.perf_counter()
            read += len(file.read(_READ))
            seconds += time.perf_counter() - start
        if read >= _READ:
            break
    return read / 1e6 / seconds if read >= 1 << 20 else None
