"""A run's folder: which one a start uses, what it goes on from, and its status for whoever looks at it.

``status.json`` says where the run stands: ``running`` (also after its processes were killed), ``resume`` (saved and
ended on a signal: start the same command again), ``finished``, or ``failed`` (starting again fails likewise).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from partial_fc.build import Place
from partial_fc.checkpoint import Commit, clean, list_commits, read_commit
from partial_fc.config import Config
from partial_fc.errors import CheckpointError, ConfigError, PartialFCError
from partial_fc.ranks import agreed, agreed_while, from_first

# A network file system may show a new file later on other machines.
_SHARED_SECONDS = 30.0

_log = logging.getLogger(__name__)


class Start(NamedTuple):
    """What a start found.

    Attributes:
        folder: the run's.
        commit: what to go on from; None: from the beginning.
        resumes: whether the run has been here before.
    """

    folder: Path
    commit: Commit | None
    resumes: bool

    @property
    def commits(self) -> Path:
        """Where the run's commits are."""
        return self.folder / "checkpoints"


class Status:
    """``status.json`` of a run, written by rank 0; on other ranks every method does nothing.

    Args:
        folder: the run's.
        steps: of the whole run.
        origin: ``train.resume`` of the start.
        active: whether this is rank 0.
    """

    def __init__(self, folder: Path, steps: int, origin: str, *, active: bool) -> None:
        self._path, self._active = folder / "status.json", active
        self._content: dict[str, Any] = {"steps": steps, "origin": origin, "job": _job(), "world_size": None}

    def write(self, state: str, step: int, **more: Any) -> None:
        """Replace the status; a disk that is full costs a warning, not the run."""
        if not self._active:
            return
        self._content |= {"state": state, "step": step, "updated": _now(), **more}
        other = self._path.with_suffix(".json.new")
        try:
            other.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")
            os.replace(other, self._path)
        except OSError as error:
            _log.warning("%s can't be written (%s): the status there is an older one", self._path, error.strerror)


def open_run_folder(config: Config, place: Place) -> Start:
    """Choose the run's folder by ``train.resume``, make it where it isn't there, and find the commit to go on from.

    Collective. Rank 0 decides; the checksums of the commit are checked by all ranks, each some files. A commit that
    can't be used is named in a warning, and the one before it is taken.

    Raises:
        ConfigError: a rank doesn't see the folder: it must be on a file system that all share.
        CheckpointError: ``train.resume`` names a folder without a usable commit.
        PartialFCError: the run failed, and its job only started it again.
    """
    chosen = from_first(lambda: _choose(config))
    agreed(lambda: _await(chosen.folder / "config.yaml", config))
    commit = first_usable(chosen.candidates, place)
    if commit is None and chosen.candidates and not chosen.demanded:
        raise CheckpointError(
            f"{chosen.folder}: none of the {len(chosen.candidates)} commits there can be used: nothing is begun anew "
            "over them; look at the warnings and the disk, or start a new run with train.resume=never"
        )
    if commit is None and chosen.demanded:
        raise CheckpointError(
            f"train.resume is {config.train.resume!r}, and no usable commit is there: expected auto, never, the folder "
            "of a commit (step-...), or a run's folder"
        )
    return Start(chosen.folder, commit, chosen.resumes)


def first_usable(candidates: Sequence[Path], place: Place) -> Commit | None:
    """The first of these commits whose files are what its marker says, each rank looking at some; None: there is none.

    Collective. Rank 0 warns of each that isn't.
    """
    for folder in candidates:

        def look(folder: Path = folder) -> tuple[Commit | None, str | None]:
            try:
                return read_commit(folder, part=place.rank, parts=place.world_size), None
            except CheckpointError as error:
                return None, str(error)

        # Sums of many gigabytes take longer than a collective may.
        seen = agreed_while(look, mine=True)
        assert seen is not None
        reasons = [seen[1]] * place.world_size
        if dist.is_initialized():
            dist.all_gather_object(reasons, seen[1])
        reason = next((text for text in reasons if text is not None), None)
        if reason is None:
            return seen[0]
        if place.rank == 0:
            _log.warning("%s: this commit is not used, the one before it is", reason)
    return None


class _Choice(NamedTuple):
    folder: Path
    candidates: list[Path]
    demanded: bool
    resumes: bool


def _choose(config: Config) -> _Choice:
    resume, root = config.train.resume, Path(config.train.run_dir)
    name = config.train.name
    assert name is not None
    named = [] if resume in ("auto", "never") else _named_commits(Path(resume))
    last = _last_folder(root, name)
    status = _read_status(last) if last is not None else {}
    if last is not None and _goes_on(status, resume):
        if status.get("state") == "failed" and _restarted(status):
            raise PartialFCError(f"{last}: the run failed before this restart: {status.get('reason')}")
        clean(last / "checkpoints")
        own = list_commits(last / "checkpoints")
        choice = _Choice(last, own + named, bool(named), True)
    else:
        choice = _Choice(_new_folder(root, name), named, resume not in ("auto", "never"), False)
    (choice.folder / "checkpoints").mkdir(exist_ok=True)
    # Last: the other ranks wait for this file.
    config.dump(choice.folder / "config.yaml")
    return choice


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys whose values differ between two resolved configurations, a line each.

    Keys that only one of them has (a commit made of another program's files has few) are left out, and so is what
    doesn't change the result: where the run is, how it's logged and watched.
    """
    lines = []
    for key in before:
        path = f"{prefix}{key}"
        old, new = before[key], after.get(key)
        if path in _OF_NO_EFFECT or key not in after or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{path}.")
        else:
            lines.append(f"{path} was {_shown(old)}, is {_shown(new)}")
    return lines


_OF_NO_EFFECT = {"metrics", "checkpoint", "data.cache"} | {
    f"train.{key}" for key in ("run_dir", "name", "log_every", "resume", "timeout_seconds", "stall_seconds", "device")
}


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _last_folder(root: Path, name: str) -> Path | None:
    """The folder ``name`` or ``name-N`` with the highest number."""
    numbers = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(root):
            found = re.fullmatch(rf"{re.escape(name)}(?:-([1-9]\d*))?", entry.name)
            if found and (Path(entry.path) / "config.yaml").is_file():
                numbers.append((int(found[1] or 1), Path(entry.path)))
    return max(numbers)[1] if numbers else None


def _new_folder(root: Path, name: str) -> Path:
    number = 1
    while True:
        folder = root / (f"{name}-{number}" if number > 1 else name)
        number += 1
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def _goes_on(status: Mapping[str, Any], resume: str) -> bool:
    """Whether a start goes on in the folder with this status."""
    if status.get("state") == "finished":
        return False
    if resume == "auto":
        return True
    # A new run is asked for; but a restart within the job that began one goes on with it.
    return _restarted(status) if resume == "never" else status.get("origin") == resume


def _restarted(status: Mapping[str, Any]) -> bool:
    job = _job()
    return status.get("job") == job and (job is not None or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)


def _job() -> str | None:
    """What torchrun calls the job, the same for all its restarts; None where it has no name of its own."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name in (None, "", "none") else name


def _read_status(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # A run of before there was one, or that was killed at its start.
        return {"state": "finished"} if (folder / "model" / ".metadata").is_file() else {}
    return content if isinstance(content, dict) else {}


def _named_commits(folder: Path) -> list[Path]:
    """The commit that ``train.resume`` names: its folder; or those of a run's folder, newest first."""
    if (folder / "commit.json").is_file():
        return [folder]
    return list_commits(folder / "checkpoints") or list_commits(folder)


def _await(file: Path, config: Config) -> None:
    deadline = time.monotonic() + _SHARED_SECONDS
    while not file.is_file():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"train.run_dir is {config.train.run_dir!r}, and {file}, made by rank 0, is not seen here after "
                f"{_SHARED_SECONDS:g} s: expected a folder that all machines share"
            )
        time.sleep(0.2)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
