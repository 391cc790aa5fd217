"""Find out about a run, by its files and the endpoints of its ranks. What is missing or garbled costs a note."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from partial_fc.checkpoint.commits import list_commits
from partial_fc.checkpoint.marker import MARKER, step_of
from partial_fc.run_status import read_status
from partial_fc.status.derive import (
    fill_faults,
    fill_figures,
    fill_place,
    fill_ranks,
    fill_speed,
    fill_state,
    quiet_limit,
)
from partial_fc.status.facts import Commits, Facts, Waiting
from partial_fc.status.following import FollowedJournal, open_file
from partial_fc.status.life import lock_holder
from partial_fc.status.scrape import ALL_SECONDS, CONNECT_SECONDS, Answer, read_access, scrape
from partial_fc.status.words import moment, number, plain, whole
from partial_fc.targets import parse_targets, targets_file

STATUS, JOURNAL, CONFIG = "status.json", "metrics.jsonl", "config.yaml"
# A process that started so long after the file of targets was written isn't one of that start; clocks differ.
_LATER_SECONDS = 30.0
_MOST_TARGETS = 4096
_CONFIG_BYTES, _TARGETS_BYTES, _MARKER_BYTES = 1 << 20, 1 << 22, 1 << 26
# Of a journal, where only a line is wanted of a run.
_BRIEF_BYTES = 1 << 18
_STACK_FILES, _STACK_BYTES = 8, 1 << 18
_STACK_HEAD = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d)  (.+)$", re.MULTILINE)
_STACK_NAME = re.compile(r"stacks-rank(\d{1,9})\.txt")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return any((folder / name).is_file() for name in (STATUS, JOURNAL))


class RunReader:
    """Reads a run, once or again and again; then only what was added to its journal is read.

    Args:
        folder: the run's.
        endpoints: whether the ranks are asked.
        brief: as much as a line of a table says: the end of the journal, and rank 0 only.
    """

    def __init__(self, folder: Path, *, endpoints: bool = True, brief: bool = False) -> None:
        self._folder, self._endpoints, self._brief = folder, endpoints, brief
        self._journal = FollowedJournal(folder / JOURNAL, _BRIEF_BYTES if brief else None)
        self._before: dict[int, Answer] = {}
        self._owners: dict[str, int] = {}

    def read(self) -> Facts:
        """All that is known now."""
        facts = Facts(str(self._folder))
        self._owners = {}
        status, config = self._read_status(facts), self._read_config(facts)
        try:
            self._journal.refresh()
        except OSError as error:
            facts.notes.append(f"{JOURNAL} can't be read ({error.strerror}): no figures of steps")
        # Who isn't said to run has nothing to tell; a status that is missing says nothing.
        asked = self._endpoints and status.get("state", "running") == "running"
        answers = self._ask(facts, config) if asked else []
        now, lines = time.time(), self._journal.latest()
        fill_place(facts, status, config, lines, answers)
        fill_figures(facts, self._journal, answers)
        facts.commits = _commits(self._folder, self._journal, answers)
        fill_faults(facts, self._journal, answers, [] if self._brief else _waiting(self._folder))
        fill_ranks(facts, answers, self._before)
        self._before = {answer.rank: answer for answer in answers if answer.values is not None}
        quiet = quiet_limit(facts, lines)
        facts.updated = _updated(facts, status, now + quiet)
        fill_state(facts, status, quiet, answers, lock_holder(self._folder), now)
        fill_speed(facts, lines, now)
        return facts

    def _read_status(self, facts: Facts) -> dict[str, Any]:
        try:
            # What is no regular file could be waited for without end.
            status = read_status(self._folder) if (self._folder / STATUS).is_file() else None
        except RecursionError:  # brackets without end
            status = None
        if status is None:
            there = os.path.lexists(self._folder / STATUS)
            facts.notes.append(f"{STATUS} {'holds no status' if there else 'is missing'}")
        return status or {}

    def _read_config(self, facts: Facts) -> dict[str, Any]:
        try:
            content = yaml.safe_load(self._read_own(self._folder / CONFIG, CONFIG, _CONFIG_BYTES)[0])
        except OSError as error:
            facts.notes.append(f"{CONFIG} can't be read ({_why(error)})")
            return {}
        except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, LookupError):
            content = None
        if not isinstance(content, dict):
            facts.notes.append(f"{CONFIG} holds no configuration")
            return {}
        return content

    def _read_own(self, path: Path, name: str, most: int) -> tuple[bytes, float]:
        """The content of a file that says whom a secret is sent, and when it was written; its owner is noted.

        Raises:
            OSError: it can't be read, or is a link: that may lead to the file of another.
        """
        with open_file(path, follow=False) as file:
            state = os.fstat(file.fileno())
            self._owners[name] = state.st_uid
            return file.read(most), state.st_mtime

    def _ask(self, facts: Facts, config: Mapping[str, Any]) -> list[Answer]:
        file = targets_file(self._folder)
        name = plain(f"{file.parent.name}/{file.name}")
        try:
            content, written = self._read_own(file, name, _TARGETS_BYTES)
        except FileNotFoundError:
            return []
        except OSError as error:
            facts.notes.append(f"{name} can't be read ({_why(error)}): no rank is asked")
            return []
        targets = parse_targets(content)[:_MOST_TARGETS]
        if self._brief:
            targets = [target for target in targets if target["labels"]["rank"] == "0"][:1]
        if not targets:
            return []
        access = read_access(config.get("metrics"), self._owners)
        answers = scrape(targets, access, CONNECT_SECONDS if self._brief else ALL_SECONDS)
        answers = [_of_this_start(answer, written) for answer in answers]
        if access.problem is not None and any(answer.values is None for answer in answers):
            facts.notes.append(plain(access.problem))
        return answers


def _why(error: OSError) -> str:
    return "it is a link" if error.errno == errno.ELOOP else error.strerror or type(error).__name__


def _of_this_start(answer: Answer, written: float) -> Answer:
    """The answer, unless another run's process gave it: ports are used again."""
    if answer.values is None:
        return answer
    began, rank = answer.get("process_start_time_seconds"), answer.get("rank")
    later = began is not None and began > written + _LATER_SECONDS
    if later or (rank is not None and answer.rank not in (-1, rank)):
        return Answer(answer.rank, answer.address, None, "a process of another run answers there")
    return answer


def _updated(facts: Facts, status: Mapping[str, Any], latest: float) -> float | None:
    """When a run last wrote something.

    Args:
        facts: of the run; gets a note of a time that can't be.
        status: ``status.json``.
        latest: a time beyond is to come by any clock, and counts only where there is no other.
    """
    times: dict[str, float | None] = {}
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        times[STATUS] = datetime.fromisoformat(status["updated"]).timestamp() if "updated" in status else None
    if status.get("state", "running") == "running":
        times[JOURNAL] = _modified(Path(facts.folder) / JOURNAL)
    known = {name: found for name, found in times.items() if found is not None}
    for name, found in known.items():
        if found > latest:
            facts.notes.append(f"{name} is of a time to come, {moment(found, latest)}: is a clock wrong?")
    return max((found for found in known.values() if found <= latest), default=max(known.values(), default=None))


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _commits(folder: Path, journal: FollowedJournal, answers: Sequence[Answer]) -> Commits:
    commits = Commits()
    failed = [answer.get("failed_commits_total") for answer in answers if answer.values is not None]
    # Every rank counts the same ones.
    commits.failed = max((whole(count) or 0 for count in failed), default=None)
    newest: list[Path] = []
    with contextlib.suppress(OSError):
        newest = list_commits(folder / "checkpoints")[:1]
    if newest:
        marker = newest[0] / MARKER
        commits.step, commits.at, commits.bytes = step_of(newest[0]), _modified(marker), _size(marker)
    line = journal.last_commit
    if line is not None and line["step"] == commits.step:
        commits.seconds, commits.copy_seconds = number(line.get("write_seconds")), number(line.get("copy_seconds"))
    return commits


def _size(marker: Path) -> int | None:
    try:
        with open_file(marker) as file:
            files = json.loads(file.read(_MARKER_BYTES))["files"].values()
        return sum(whole(one["size"]) or 0 for one in files)
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None


def _waiting(folder: Path) -> list[Waiting]:
    """What ranks without progress wrote into ``stacks-rank<r>.txt``: the last of each, the newest first."""
    found = []
    paths = [(at, path) for path in folder.glob("stacks-rank*.txt") if (at := _modified(path)) is not None]
    for _, path in sorted(paths, reverse=True)[:_STACK_FILES]:
        name = _STACK_NAME.fullmatch(path.name)
        try:
            with open_file(path) as file:
                file.seek(max(0, file.seek(0, 2) - _STACK_BYTES))
                heads = _STACK_HEAD.findall(file.read().decode("utf-8", errors="replace"))
        except OSError:
            continue
        if name and heads:
            with contextlib.suppress(ValueError, OverflowError):
                at = datetime.fromisoformat(heads[-1][0]).timestamp()
                found.append(Waiting(int(name[1]), at, plain(heads[-1][1], 400)))
    return sorted(found, key=lambda waiting: -waiting.at)
