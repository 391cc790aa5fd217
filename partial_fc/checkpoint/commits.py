"""Commits: checkpoint folders that are whole or not there, however the process that writes them ends. Files only.

A commit ``root/step-00001200`` holds the files of a checkpoint, ``run.json`` (what the run needs to go on) and the
marker ``commit.json``: size and SHA-256 of every other file. It is written as ``root/.step-00001200-<token>.partial``
and gets its name when all of it is on the disk. What is removed is renamed to ``.step-00001200-<token>.removed`` first.
So a name ``step-*`` stands for a whole commit, and the marker proves it, whatever happened to the disk since.

The sums find damage, not forgery: whoever may write the folder may write its marker.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from partial_fc.checkpoint.durable import make_folder, sum_file, sync_file, sync_folder, write_file
from partial_fc.checkpoint.marker import (
    INFO,
    MARKER,
    Commit,
    FileSum,
    Unusable,
    check_files,
    check_info,
    examine,
    marker_of,
    step_name,
    step_of,
    usable_info,
)
from partial_fc.errors import CheckpointError, ConfigError

_HIDDEN = re.compile(r"\.step-[0-9]{8,19}-[0-9a-f]{8}\.(partial|removed)")


def begin(root: Path, step: int) -> Path:
    """Make a new partial folder for a commit of ``step`` steps; ``root`` is made where it isn't there.

    Raises:
        OSError: with its file name; try again.
    """
    # A commit in a folder that is itself only in the machine's memory would go with it.
    make_folder(root)
    partial = root / f".{step_name(step)}-{secrets.token_hex(4)}.partial"
    partial.mkdir()
    return partial


def sum_files(folder: Path, names: Iterable[str]) -> dict[str, FileSum]:
    """Sums of files of a partial folder, by name; for the process that wrote them.

    Each is brought to the disk here as well: only the machine that wrote a file knows what of it is still in memory.

    Raises:
        OSError: with its file name.
    """
    return {name: FileSum(*sum_file(folder / name, sync=True)) for name in names}


def seal(partial: Path, info: Mapping[str, Any], sums: Mapping[str, FileSum], target: Path | None = None) -> Path:
    """Turn a partial folder into a commit.

    The order is what makes it safe. First the bytes of every file go to the disk, then the marker that vouches for
    them, then the folder, which holds their names. Only then comes the rename, which is atomic; and the parent folder
    last, which makes the rename outlive the machine.

    Args:
        partial: what :func:`begin` made, with the checkpoint's files in it.
        info: what ``run.json`` gets.
        sums: of every file in ``partial``, whichever rank wrote it.
        target: the commit's folder, new, on the same file system; None: ``step-N`` beside ``partial``. Where that is
            a usable commit already (an earlier attempt at the same step), it stays and ``partial`` goes; where it isn't
            usable, it is replaced.

    Returns:
        The commit's folder.

    Raises:
        CheckpointError: the files are not those of ``sums``, ``info`` lacks something, or ``target`` is there already.
        OSError: with its file name. Start again with :func:`begin`: after a failed fsync the pages are gone, and a
            second one of the same file would report success.
    """
    try:
        check_info(info)
        if INFO in sums or MARKER in sums:
            raise Unusable(f"the sums name {INFO} or {MARKER}, which are written last")
        check_files(partial, sums)
    except Unusable as why:
        raise CheckpointError(f"{partial}: {why}: the commit is not made, save again") from why
    if target is not None and os.path.lexists(target):
        raise CheckpointError(f"{target}: is there already, expected the name of a new commit: name another folder")
    for name in sums:
        sync_file(partial / name)
    write_file(partial / INFO, json.dumps(info, indent=1).encode())
    write_file(partial / MARKER, marker_of({**sums, INFO: FileSum(*sum_file(partial / INFO))}))
    sync_folder(partial)
    folder = target or partial.parent / step_name(info["step"])
    _take_the_name(partial, folder)
    sync_folder(folder.parent)
    return folder


def read_commit(folder: Path, *, part: int = 0, parts: int = 1) -> Commit:
    """Verify a commit and read its ``run.json``.

    Every call checks the marker, the names and sizes of all files, and ``run.json``; the checksums of the data are
    shared out by ``part``: all of 0 ... ``parts`` - 1 together have verified everything.

    Args:
        folder: the commit; the step of a name ``step-N`` must be that of ``run.json``, other names are free.
        part: which part of the files this call sums, such as the rank.
        parts: how many parts there are, such as the number of ranks.

    Raises:
        CheckpointError: what is wrong with which file.
        OSError: the machine can't read it now (too many open files, a file system that doesn't answer); that says
            nothing about the commit.
    """
    try:
        return examine(folder, part, parts)
    except Unusable as why:
        raise CheckpointError(f"{folder}: {why}: it can't be used, take another commit") from why


def list_commits(root: Path) -> list[Path]:
    """What is named ``step-N`` in ``root``, newest first, unverified; nothing where ``root`` isn't there.

    Raises:
        OSError: ``root`` can't be read, which is not the same as a run without commits.
    """
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    steps = {folder: step for name in names if (step := step_of(folder := root / name)) is not None}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def newest_commit(root: Path, refused: Callable[[str], None]) -> Commit | None:
    """The newest usable commit of ``root``, verified whole; None where there is none.

    Args:
        root: the folder of the commits.
        refused: called with a line for each newer one that isn't used: which, and why.

    Raises:
        OSError: as :func:`read_commit` and :func:`list_commits`.
    """
    folders = list_commits(root)
    for number, folder in enumerate(folders, start=1):
        try:
            return examine(folder, 0, 1)
        except Unusable as why:
            other = "the previous commit is" if number < len(folders) else "and there is no previous commit"
            refused(f"{folder}: {why}: it is not used, {other}")
    return None


def prune(root: Path, *, keep_last: int, keep_best: bool) -> list[Path]:
    """Remove old commits.

    Kept are the ``keep_last`` newest usable ones and the best one. A folder that isn't usable is never one of these; it
    stays to be looked at while it is newer than one of the ``keep_last``, and goes with those of its age. Where fewer
    than ``keep_last`` are usable, nothing goes. Usable means here: all but the checksums of the data is as it should
    be, since reading all data at every save would cost more than the save.

    A folder is renamed to a hidden name, and that brought to the disk, before its first file goes, so that a folder
    half-removed has no commit's name. What can't be renamed stays; links and plain files are never touched.

    Args:
        root: the folder of the commits; it need not be there.
        keep_last: at least 1.
        keep_best: keep the one of the highest ``accuracy`` in ``run.json`` (the latest of several), where one has any.

    Returns:
        The folders that are gone, newest first.

    Raises:
        ConfigError: ``keep_last`` is less than 1.
    """
    if keep_last < 1:
        raise ConfigError(f"keep_last is {keep_last}, expected at least 1: a run goes on from the newest commit")
    try:
        folders = list_commits(root)
        usable = {folder: info for folder in folders if (info := usable_info(folder)) is not None}
    except OSError:
        return []
    if len(usable) < keep_last:
        return []
    kept = set(folders[: folders.index(list(usable)[keep_last - 1]) + 1])
    if keep_best:
        kept |= _best(usable)
    removed = []
    for folder in folders:
        with contextlib.suppress(OSError):
            if folder not in kept and _is_folder(folder):
                removed.append((folder, _hide(folder)))
    with contextlib.suppress(OSError):
        sync_folder(root)
    for _, hidden in removed:
        _delete(hidden)
    return [folder for folder, _ in removed]


def discard_after(root: Path, step: int) -> list[Path]:
    """Remove every commit of a later step, usable or not: the run takes those steps anew, from an earlier state.

    As long as one of them were there, a restart would go on from it, and the new commit of that step give way to it.
    So, unlike in :func:`prune`, what can't be removed is an error.

    Args:
        root: the folder of the commits; it need not be there.
        step: of the commit that the run goes back to.

    Returns:
        The folders that are gone, newest first. The newest goes first, so that whatever is left is of one history.

    Raises:
        OSError: with its file name.
    """
    later = [folder for folder in list_commits(root) if (step_of(folder) or 0) > step and _is_folder(folder)]
    hidden = [_hide(folder) for folder in later]
    if later:
        sync_folder(root)
    for folder in hidden:
        _delete(folder)
    return later


def clean(root: Path) -> None:
    """Remove what unfinished saves and removals left; call it where no save is under way. Errors are passed over."""
    with contextlib.suppress(OSError):
        for name in os.listdir(root):
            if _HIDDEN.fullmatch(name):
                # Folders only: a link or a plain file of such a name is not ours, and stays.
                shutil.rmtree(root / name, ignore_errors=True)


def _take_the_name(partial: Path, folder: Path) -> None:
    """Rename the sealed folder, unless a usable commit has the name.

    Raises:
        OSError: what has the name can't be read now; it stays as it is, since it may be usable.
    """
    if os.path.lexists(folder):
        try:
            examine(folder, 0, 1)
        except Unusable:
            hidden = _hide(folder)
            os.rename(partial, folder)
            _delete(hidden)
        else:
            _delete(partial)
    else:
        os.rename(partial, folder)


def _best(usable: Mapping[Path, Mapping[str, Any]]) -> set[Path]:
    """The one of the highest accuracy, the first of several; nothing where none has any."""
    found: tuple[float, Path] | None = None
    for folder, info in usable.items():
        accuracy = info.get("accuracy")
        if isinstance(accuracy, (int, float)) and not math.isnan(accuracy) and (not found or accuracy > found[0]):
            found = accuracy, folder
    return {found[1]} if found else set()


def _hide(folder: Path) -> Path:
    """Take a commit's name from a folder, so that it can be removed; its new place."""
    hidden = folder.parent / f".{folder.name}-{secrets.token_hex(4)}.removed"
    os.rename(folder, hidden)
    return hidden


def _delete(path: Path) -> None:
    """Remove what has no commit's name any more; what stays of it is for :func:`clean`."""
    with contextlib.suppress(OSError):
        if _is_folder(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(os.lstat(path).st_mode)
