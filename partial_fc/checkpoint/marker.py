"""What makes a folder a commit: its marker, and every check that its files are what was written."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from partial_fc.checkpoint.durable import sum_file

FORMAT = 1
MARKER = "commit.json"
INFO = "run.json"
_NAME = re.compile(r"step-([0-9]{8,19})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What a loader reads of run.json, and the least value of a number.
_NUMBERS = {"step": 0, "samples": 0, "num_classes": 1, "embedding_size": 1}
# What passes and says nothing about a commit: an older one, taken for such a reason, would cost steps.
_PASSING = frozenset(
    (
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT),
        *(errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    )
)

T = TypeVar("T")


class FileSum(NamedTuple):
    """What a file holds.

    Attributes:
        size: bytes.
        sha256: 64 hexadecimal digits, lower case.
    """

    size: int
    sha256: str


class Commit(NamedTuple):
    """A commit whose files are what was written.

    Attributes:
        folder: where it is.
        info: ``run.json``.
    """

    folder: Path
    info: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        step: int = self.info["step"]
        return step


class Unusable(Exception):
    """Why a folder is no commit, in words that go behind its name."""


def step_of(folder: Path) -> int | None:
    """The step in the name of a commit's folder; None where it has another name."""
    match = _NAME.fullmatch(folder.name)
    step = int(match[1]) if match else None
    # 000000040 with nine digits would be a second name of step 40.
    return step if step is not None and step_name(step) == folder.name else None


def step_name(step: int) -> str:
    """Name of the folder of a commit of ``step`` steps."""
    return f"step-{step:08d}"


def examine(folder: Path, part: int, parts: int) -> Commit:
    """The commit, with the checksums of a part of its files verified.

    Raises:
        Unusable: it is none.
        OSError: the machine can't read it now.
    """
    assert 0 <= part < parts

    def look() -> Commit:
        commit, sums = _glance(folder)
        # By size, so that each part has about as much to read.
        by_size = sorted(sums, key=lambda name: (-sums[name].size, name))
        for name in by_size[part::parts]:
            _check_sum(folder / name, sums[name])
        return commit

    return _reading(folder, look)


def _glance(folder: Path) -> tuple[Commit, dict[str, FileSum]]:
    """As :func:`examine`, without the checksums of files other than ``run.json``; and the sums that are expected."""
    mode = os.lstat(folder).st_mode
    if stat.S_ISLNK(mode):
        raise Unusable("is a symbolic link, expected a folder")
    if not stat.S_ISDIR(mode):
        raise Unusable("is a file, expected a folder")
    sums = _read_marker(folder)
    check_files(folder, sums, beside=frozenset((MARKER,)))
    _check_sum(folder / INFO, sums[INFO])
    info = _parse((folder / INFO).read_bytes(), INFO)
    check_info(info)
    step = step_of(folder)
    if step is not None and info["step"] != step:
        raise Unusable(f"{INFO} says step {info['step']}, expected step {step} as in the folder's name")
    return Commit(folder, dict(info)), sums


def _read_marker(folder: Path) -> dict[str, FileSum]:
    try:
        if not stat.S_ISREG(os.lstat(folder / MARKER).st_mode):
            raise Unusable(f"{MARKER} is no plain file")
        content = (folder / MARKER).read_bytes()
    except FileNotFoundError:
        raise Unusable(f"has no {MARKER}, so it was not written to its end") from None
    marker = _parse(content, MARKER)
    _check_format(marker, MARKER)
    files = marker.get("files")
    if not isinstance(files, dict):
        raise Unusable(f"{MARKER} lists no files")
    sums = {name: _read_sum(name, entry) for name, entry in files.items()}
    if INFO not in sums:
        raise Unusable(f"{MARKER} doesn't list {INFO}")
    if content != marker_of(sums):
        raise Unusable(f"{MARKER} isn't what was written")
    return sums


def _read_sum(name: str, entry: object) -> FileSum:
    if name in ("", ".", "..", MARKER) or "/" in name or "\0" in name:
        raise Unusable(f"{MARKER} lists {name!r}, expected names of files in the folder")
    if isinstance(entry, dict):
        size, digest = entry.get("size"), entry.get("sha256")
        if type(size) is int and size >= 0 and isinstance(digest, str) and _SHA256.fullmatch(digest):
            return FileSum(size, digest)
    raise Unusable(f"{MARKER} has no size and SHA-256 of {_shown(name)}")


def marker_of(sums: Mapping[str, FileSum]) -> bytes:
    """The marker's bytes, the same for the same sums: any other byte in it is found."""
    files = {name: {"size": size, "sha256": digest} for name, (size, digest) in sorted(sums.items())}
    return json.dumps({"format": FORMAT, "files": files}, indent=1).encode()


def _parse(content: bytes, name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        raise Unusable(f"{name} ({len(content)} bytes) is not JSON") from None
    if not isinstance(parsed, dict):
        raise Unusable(f"{name} holds no JSON object")
    return parsed


def _check_format(parsed: Mapping[str, Any], name: str) -> None:
    number = parsed.get("format")
    if type(number) is not int or number < 1:
        raise Unusable(f"{name} has format {number!r}, expected {FORMAT}")
    if number > FORMAT:
        raise Unusable(f"{name} has format {number}, newer than format {FORMAT} of this version: update partial_fc")


def check_info(info: Mapping[str, Any]) -> None:
    """``run.json`` holds what a loader needs; else :class:`Unusable` is raised."""
    _check_format(info, INFO)
    for key, least in _NUMBERS.items():
        value = info.get(key)
        if type(value) is not int or value < least:
            raise Unusable(f"{INFO} has {key} {value!r}, expected a whole number of at least {least}")
    contents = info.get("contents")
    if not isinstance(contents, list) or not all(isinstance(name, str) for name in contents):
        raise Unusable(f"{INFO} has contents {contents!r}, expected a list of names")


def check_files(folder: Path, sums: Mapping[str, FileSum], beside: frozenset[str] = frozenset()) -> None:
    """The folder holds these files with these sizes, those of ``beside``, and nothing else."""
    there = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    for names, problem in (
        (sums.keys() - there.keys(), "missing"),
        (there.keys() - sums.keys() - beside, "not part of it"),
    ):
        if names:
            others = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
            raise Unusable(f"{_shown(min(names))}{others} {problem}")
    for name, expected in sorted(sums.items()):
        if not stat.S_ISREG(there[name].st_mode):
            raise Unusable(f"{_shown(name)} is no plain file")
        if there[name].st_size != expected.size:
            raise Unusable(f"{_shown(name)} has {there[name].st_size} bytes, expected {expected.size}")


def _shown(name: str) -> str:
    """A name as it goes into a line, whatever it is made of."""
    return name if name.isprintable() else repr(name)


def _check_sum(path: Path, expected: FileSum) -> None:
    found = FileSum(*sum_file(path))
    if found != expected:
        raise Unusable(
            f"{_shown(path.name)} isn't what was written: it has SHA-256 {found.sha256[:12]}..., "
            f"expected {expected.sha256[:12]}..."
        )


def usable_info(folder: Path) -> dict[str, Any] | None:
    """``run.json`` of a commit that is usable as far as can be seen without reading its data; else None."""
    try:
        return _reading(folder, lambda: _glance(folder)[0].info)
    except Unusable:
        return None


def _reading(folder: Path, look: Callable[[], T]) -> T:
    """What can't be read is unusable, unless the machine is to blame; an input/output error is tried once more."""
    tries = 2
    while True:
        tries -= 1
        try:
            return look()
        except OSError as error:
            if error.errno in _PASSING:
                raise
            if error.errno == errno.EIO and tries:
                # A network's file system says so of a server that is away for a moment.
                continue
            place = Path(error.filename or folder)
            what = "" if place == folder else f"{place.name} "
            raise Unusable(f"{what}can't be read ({error.strerror or error})") from error
