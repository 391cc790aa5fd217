"""Class surgery: commits whose classes are others, made from commits in one process, on the CPU.

A commit is read, what has a row a class is changed, and all of it is written as a new commit; step, samples and
everything else stay. Legend: C classes before, C' after, d embedding size.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partial_fc.checkpoint.commits import (
    begin,
    list_commits,
    newest_commit,
    read_commit,
    seal,
)
from partial_fc.checkpoint.marker import MARKER, Commit
from partial_fc.checkpoint.tensors import read_into, tensor_shapes, write_summed
from partial_fc.data.class_map import REMOVED, first_of_each
from partial_fc.errors import CheckpointError, ConfigError
from partial_fc.machine import host_memory
from partial_fc.memory import empty_rows

CENTRES = "head.weight"
# What every folder of saved tensors has.
_METADATA = ".metadata"
_STATE = "head_optimizer."
_STEPS = "head_optimizer.steps"
# Rows that are worked on at once, in float64.
_ROWS = 1 << 14
# The mean of unit centres is shorter than this where they point everywhere: it has no direction.
_LEAST_MEAN = 1e-6
# The next step where a commit can't be written.
_NEXT_STEPS = {
    errno.ENOSPC: "free the disk",
    errno.EDQUOT: "free some of the quota",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "correct the permissions",
    errno.EPERM: "correct the permissions",
}


def find_commit(path: Path, refused: Callable[[str], None]) -> Commit:
    """A commit, verified: the folder itself, or the newest usable one of a run or of a folder of commits.

    Args:
        path: a commit, a run's folder (with ``checkpoints`` in it), or a folder with commits named ``step-N``.
        refused: called with a line for each newer commit that isn't used.

    Raises:
        CheckpointError: there is no usable commit.
    """
    try:
        root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        if not list_commits(root):
            # One without its marker was not written to its end; a folder without tensors, too, is another one.
            if root == path and any((path / name).exists() for name in (MARKER, _METADATA)):
                return read_commit(path)
            raise CheckpointError(
                f"{path}: no commit is there, expected a commit, a run or a folder of commits named step-N: name one"
            )
        commit = newest_commit(root, refused)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: can't be read ({error.strerror}): mend that first") from error
    if commit is None:
        raise CheckpointError(f"{root}: none of its commits can be used: name another run")
    return commit


def check_target(out: Path) -> None:
    """Raise a ConfigError where something is at the place of a new commit; nothing is ever replaced."""
    if os.path.lexists(out):
        raise ConfigError(f"{out}: is there already, expected the name of a new folder: name another one")


def check_memory(needed: int, what: str) -> None:
    """Raise a CheckpointError where ``needed`` bytes are more than the system has available (Linux; else nothing)."""
    memory = host_memory()
    if memory is not None and needed > memory.available:
        raise CheckpointError(
            f"{what} needs {needed / 1e9:.1f} GB of memory, {memory.available / 1e9:.1f} GB are available: "
            "free some, or use a larger machine"
        )


def write_commit(out: Path, state: Mapping[str, Tensor], info: Mapping[str, Any]) -> Path:
    """Write a new commit: whole, or not at all.

    Args:
        out: its folder, new.
        state: whole tensors by flat name, on the CPU.
        info: ``run.json``.

    Raises:
        ConfigError: there is something at ``out``.
        CheckpointError: it can't be written.
    """
    check_target(out)
    try:
        partial = begin(out.parent, info["step"])
        try:
            return seal(partial, info, write_summed(partial, state), target=out)
        finally:
            # Where the commit was made, there is nothing of that name any more.
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        step = _NEXT_STEPS.get(error.errno or 0, "look at that disk")
        raise CheckpointError(f"{error.filename or out}: can't be written ({error.strerror}): {step}") from error


def change_classes(commit: Commit, out: Path, class_map: np.ndarray, entry: Mapping[str, Any]) -> Path:
    """Write a commit whose classes are reordered, removed or merged.

    The centre of merged classes is the mean of their unit centres, made a unit again, times the mean of their norms.
    The optimizer's averages, ``momentum_buffer``, ``exp_avg`` and ``exp_avg_sq``, are the mean of theirs. ``steps`` is
    the largest: those means are mostly made of the rows trained most, whose count tells how full they are; a smaller
    one would blow up full averages, by up to 1 / (1 - beta).

    Needs the memory of the new commit and of the largest old tensor, which is there twice while it's read.

    Args:
        commit: what is changed.
        out: the new commit's folder.
        class_map: int64 ``[C]``, the new id of each class, as in ``data.class_map``.
        entry: what ``history`` in ``run.json`` gets, beside the numbers of classes.

    Raises:
        ConfigError: there is something at ``out``.
        CheckpointError: the commit can't be read, the new one not be written, memory is short, or centres that are
            merged cancel out.
    """
    assert len(class_map) == commit.info["num_classes"]
    first = torch.from_numpy(first_of_each(class_map))
    counts = np.bincount(class_map[class_map != REMOVED], minlength=len(first))
    merged = np.flatnonzero(counts > 1)
    # Old ids of the classes that become a merged one, those of one behind those of the other.
    members = np.flatnonzero((class_map != REMOVED) & (counts[class_map] > 1))
    members = members[np.argsort(class_map[members], kind="stable")]
    ends = np.cumsum(counts[merged])

    def change(name: str, old: Tensor) -> Tensor:
        new = _empty_like(old, len(first))
        torch.index_select(old, 0, first, out=new)
        done = 0
        while done < len(merged):
            start = int(ends[done - 1]) if done else 0
            upto = max(done + 1, int(np.searchsorted(ends, start + _ROWS, side="right")))
            ids = members[start : ends[upto - 1]]
            groups = np.repeat(np.arange(upto - done), counts[merged[done:upto]])
            rows = _merge(name, old[torch.from_numpy(ids)].double(), torch.from_numpy(groups), ids)
            new[torch.from_numpy(merged[done:upto])] = rows.to(new.dtype)
            done = upto
        return new

    return _rewrite(commit, out, len(first), change, entry)


def extend_classes(commit: Commit, out: Path, centres: Tensor, entry: Mapping[str, Any], *, units: bool) -> Path:
    """Write a commit with more classes; their ids are C, C + 1, ... and their optimizer state is zero.

    Needs the memory of the new commit, and of the largest old tensor.

    Args:
        commit: what is extended.
        out: the new commit's folder.
        centres: ``[C' - C, d]``, those of the new classes; are cast to the type of the commit's.
        entry: what ``history`` in ``run.json`` gets, beside the numbers of classes.
        units: the new centres have norm 1, and get the mean norm of the old ones.

    Raises:
        ConfigError: there is something at ``out``.
        CheckpointError: the commit can't be read, the new one not be written, or memory is short.
    """
    classes = commit.info["num_classes"]

    def change(name: str, old: Tensor) -> Tensor:
        new = _empty_like(old, classes + len(centres))
        new[:classes] = old
        if name != CENTRES:
            new[classes:] = 0
        else:
            factor = _mean_norm(old) if units else 1.0
            for start in range(0, len(centres), _ROWS):
                rows = centres[start : start + _ROWS].double() * factor
                new[classes + start : classes + start + len(rows)] = rows.to(new.dtype)
        return new

    return _rewrite(commit, out, classes + len(centres), change, entry)


def _rewrite(
    commit: Commit, out: Path, num_classes: int, change: Callable[[str, Tensor], Tensor], entry: Mapping[str, Any]
) -> Path:
    """Write a commit anew with ``change(name, old tensor)`` for every tensor that has a row a class."""
    check_target(out)
    classes, shapes = commit.info["num_classes"], tensor_shapes(commit.folder)
    if CENTRES not in shapes or shapes[CENTRES][0][:1] != (classes,):
        found = f"shape {list(shapes[CENTRES][0])}" if CENTRES in shapes else "nothing"
        raise CheckpointError(f"{commit.folder}: {CENTRES} has {found}, expected {classes} rows: name another commit")
    sizes = {name: shape.numel() * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    by_class = [
        name for name, (shape, _) in shapes.items() if shape[:1] == (classes,) and name.startswith((CENTRES, _STATE))
    ]
    new_sizes = {name: size * num_classes // classes if name in by_class else size for name, size in sizes.items()}
    # An old tensor is there twice while it's read, and once while the new one is made of it.
    beside = max(max(sizes[name], 2 * sizes[name] - new_sizes[name]) for name in by_class)
    check_memory(sum(new_sizes.values()) + beside, f"{commit.folder}: the change to {out}")
    state = _read(commit, shapes, [name for name in shapes if name not in by_class])
    for name in by_class:
        # One old tensor at a time.
        state[name] = change(name, _read(commit, shapes, [name])[name])
    # Losses over other classes are no measure for those to come.
    info = {**commit.info, "num_classes": num_classes, "watch": {}}
    done = {**entry, "from": str(commit.folder), "classes_before": classes, "classes_after": num_classes}
    info["history"] = [*commit.info.get("history", []), done]
    return write_commit(out, state, info)


def _read(
    commit: Commit, shapes: Mapping[str, tuple[torch.Size, torch.dtype]], names: Sequence[str]
) -> dict[str, Tensor]:
    state = {name: torch.empty(shapes[name][0], dtype=shapes[name][1], device="cpu") for name in names}
    read_into(commit.folder, state)
    return state


def _empty_like(old: Tensor, rows: int) -> Tensor:
    """``[rows, ...]``, uninitialised, otherwise as ``old``."""
    if old.dim() == 2:
        return empty_rows(rows, old.shape[1], old.dtype, "cpu")
    return torch.empty(rows, *old.shape[1:], dtype=old.dtype, device="cpu")


def _merge(name: str, rows: Tensor, groups: Tensor, ids: np.ndarray) -> Tensor:
    """One row a group, float64.

    Args:
        name: of the tensor.
        rows: float64 ``[m]`` or ``[m, d]``.
        groups: int64 ``[m]``, the group of each row: 0, 1, ..., ascending.
        ids: int64 ``[m]``, classes of the rows.
    """
    count = int(groups[-1]) + 1
    if name == _STEPS:
        return rows.new_zeros(count).scatter_reduce(0, groups, rows, "amax")
    if name != CENTRES:
        return _means(rows, groups, count)
    norms = torch.linalg.vector_norm(rows, dim=1)
    directions = _means(rows / norms.clamp_min(1e-300)[:, None], groups, count)
    lengths = torch.linalg.vector_norm(directions, dim=1)
    lost = (lengths < _LEAST_MEAN).nonzero()
    if len(lost):
        those = ids[(groups == lost[0]).numpy()].tolist()
        more = f" and {len(those) - 5} more" if len(those) > 5 else ""
        raise CheckpointError(
            f"{CENTRES}: the centres of classes {', '.join(map(str, those[:5]))}{more} cancel out, "
            "expected some that point the same way: don't merge these"
        )
    return directions / lengths[:, None] * _means(norms, groups, count)[:, None]


def _means(rows: Tensor, groups: Tensor, count: int) -> Tensor:
    """Means of the rows of each group."""
    sums = rows.new_zeros(count, *rows.shape[1:]).index_add_(0, groups, rows)
    sizes = torch.bincount(groups, minlength=count).double()
    return sums / sizes.view(-1, *[1] * (rows.dim() - 1))


def _mean_norm(centres: Tensor) -> float:
    """Mean norm of the rows ``[C, d]``."""
    total = 0.0
    for start in range(0, len(centres), _ROWS):
        total += float(torch.linalg.vector_norm(centres[start : start + _ROWS].double(), dim=1).sum())
    return total / len(centres)
