"""A run's folder: which one a start uses, and what it goes on from."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch.distributed as dist

from partial_fc.build import Place
from partial_fc.checkpoint import Commit, clean, list_commits, read_commit
from partial_fc.config import Config
from partial_fc.errors import CheckpointError, ConfigError, PartialFCError
from partial_fc.ranks import agreed, agreed_while, from_first
from partial_fc.run_status import Status, hold, read_status, restarted, this_agent

# A network file system may show a new file later on other machines.
_SHARED_SECONDS = 30.0
# What train.resume may be beside a folder.
_WORDS = ("auto", "never")

_log = logging.getLogger(__name__)


class Start(NamedTuple):
    """What a start found.

    Attributes:
        folder: the run's.
        commit: what to go on from; None: from the beginning.
        resumes: whether the run has been here before.
        finished: whether the job that is started again has finished the run already.
        status: of the run.
        lock: of the folder, on rank 0; close it at the end.
    """

    folder: Path
    commit: Commit | None
    resumes: bool
    finished: bool
    status: Status
    lock: IO[str] | None

    @property
    def commits(self) -> Path:
        """Where the run's commits are."""
        return self.folder / "checkpoints"


def open_run_folder(config: Config, place: Place) -> Start:
    """Choose the run's folder by ``train.resume``, make it where it isn't there, and find the commit to go on from.

    Collective. Rank 0 decides; the checksums of the commit are checked by all ranks, each some files. A commit that
    can't be used is named in a warning, and the one before it is taken. Nothing is made before there is one where
    one is asked for.

    Raises:
        ConfigError: a rank doesn't see the folder: it must be on a file system that all share.
        CheckpointError: ``train.resume`` names a folder without a usable commit, or none of the run's own is usable.
        PartialFCError: the run failed, and its job only started it again; or another job writes it.
    """
    agents = [this_agent()] * place.world_size
    if dist.is_initialized():
        dist.all_gather_object(agents, agents[0])
    chosen = from_first(lambda: _choose(config, agents))
    commit = None if chosen.finished else first_usable(chosen.candidates, place)
    if commit is None and chosen.candidates and not chosen.finished and not chosen.demanded:
        raise CheckpointError(
            f"{chosen.folder}: none of the {len(chosen.candidates)} commits there can be used: nothing is begun anew "
            "over them; look at the warnings and the disk, or start a new run with train.resume=never"
        )
    if commit is None and chosen.demanded:
        raise CheckpointError(
            f"train.resume is {config.train.resume!r}, and no usable commit is there: expected auto, never, the folder "
            "of a commit (step-...), or a run's folder"
        )
    made = agreed_while(lambda: _enter(config, chosen.folder, chosen.finished), mine=place.rank == 0)
    folder, lock = (None, None) if made is None else made
    folder = from_first(lambda: folder)
    assert folder is not None
    agreed(lambda: _await(folder / "config.yaml", config))
    known = sorted({agent for agent in agents if agent is not None})
    status = Status(
        folder,
        active=place.rank == 0,
        tells=place.local_rank == 0,
        name=config.train.name,
        origin=config.train.resume,
        agents=known,
    )
    if chosen.finished:
        status.tell("finished")
    else:
        status.write("running", 0 if commit is None else commit.step, committed=None if commit is None else commit.step)
    return Start(folder, commit, chosen.resumes, chosen.finished, status, lock)


def first_usable(candidates: Sequence[Path], place: Place) -> Commit | None:
    """The first of these commits whose files are what its marker says, each rank looking at some; None: there is none.

    Collective. Rank 0 warns of each that isn't.
    """
    for number, folder in enumerate(candidates, start=1):

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
            other = "the one before it is" if number < len(candidates) else "and there is none before it"
            _log.warning("%s: this commit is not used, %s", reason, other)
    return None


class _Choice(NamedTuple):
    """The run's folder (None: a new one is made), and what may be gone on from, the best first."""

    folder: Path | None
    candidates: list[Path]
    demanded: bool = False
    resumes: bool = False
    finished: bool = False


def _choose(config: Config, agents: Sequence[str | None]) -> _Choice:
    resume, root = config.train.resume, Path(config.train.run_dir)
    name = config.train.name
    assert name is not None
    named = [] if resume in _WORDS else _named_commits(Path(resume))
    last, status = _last_run(root, name, agents)
    if last is None:
        return _Choice(None, named, demanded=resume not in _WORDS)
    again, state = restarted(status, agents), status.get("state")
    if again and state == "failed":
        raise PartialFCError(f"{last}: the run failed before this restart: {status.get('reason')}")
    if again and state == "finished":
        return _Choice(last, [], resumes=True, finished=True)
    # Another run is asked for, but for restarts of the job that began this one.
    if state != "finished" and (again or resume == "auto" or status.get("origin") == resume != "never"):
        return _Choice(last, list_commits(last / "checkpoints") + named, demanded=bool(named), resumes=True)
    return _Choice(None, named, demanded=resume not in _WORDS)


def _enter(config: Config, folder: Path | None, finished: bool) -> tuple[Path, IO[str] | None]:
    """Make the folder where it's new, and lock it."""
    name = config.train.name
    assert name is not None
    if folder is None:
        folder = _new_folder(Path(config.train.run_dir), name)
    if finished:
        return folder, None
    lock = hold(folder)
    clean(folder / "checkpoints")
    (folder / "checkpoints").mkdir(exist_ok=True)
    # Last: the other ranks wait for this file.
    config.dump(folder / "config.yaml")
    return folder, lock


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


def _last_run(root: Path, name: str, agents: Sequence[str | None]) -> tuple[Path | None, dict[str, Any]]:
    """The folder of the last run of this name, and its status.

    A folder ``name-2`` may belong to a run that has this name itself; and one whose start failed before its first
    commit holds nothing to go on with, though a restart of its job must know of it.
    """
    runs: list[tuple[int, Path, dict[str, Any]]] = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(root):
            found = re.fullmatch(rf"{re.escape(name)}(?:-([1-9]\d*))?", entry.name)
            status = read_status(Path(entry.path)) if found else None
            if found and status is not None and status.get("name") == name:
                runs.append((int(found[1] or 1), Path(entry.path), status))
    for _, folder, status in sorted(runs, key=lambda run: -run[0]):
        if restarted(status, agents) or status.get("state") != "failed" or list_commits(folder / "checkpoints"):
            return folder, status
    return None, {}


def _new_folder(root: Path, name: str) -> Path:
    number = 1
    while True:
        folder = root / (f"{name}-{number}" if number > 1 else name)
        number += 1
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


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
