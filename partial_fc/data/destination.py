"""The folder that a data set is written into: what is done, what is left, and that nothing of it is seen too early."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from partial_fc.data.files import sync_folder
from partial_fc.data.writers import partial_name
from partial_fc.errors import ConfigError, DataError

logger = logging.getLogger("partial_fc.data")

STATE_FILE = "prepare.json"
LOCK_FILE = ".prepare.lock"
_MADE_BY = "partial-fc prepare 1"
_OURS = re.compile(
    r"(train\.rec|train\.idx|train-\d{6,}\.tar|property|classes\.txt|prepare\.json)\.partial|prepare\.json"
)
# Reasons of a kind that the report names.
_NAMED = 5


@dataclass
class State:
    """What ``prepare.json`` holds."""

    arguments: dict[str, Any]
    source: dict[str, Any]
    encoder: str
    made_by: str = _MADE_BY
    # writing; renaming: the files are complete and get their names; complete.
    phase: str = "writing"
    # Samples done, of those that the labels don't rule out.
    position: int = 0
    written: int = 0
    reencoded: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    # Height and width of the first image.
    size: list[int] | None = None
    writer: dict[str, int] | None = None
    # Size by final name, in the order in which they get it.
    files: dict[str, int] = field(default_factory=dict)

    def skip(self, kind: str, reason: str) -> None:
        """Count a sample that is left out."""
        self.skipped[kind] = self.skipped.get(kind, 0) + 1
        named = self.reasons.setdefault(kind, [])
        if len(named) < _NAMED:
            named.append(reason)

    def changed(self, now: State, *, encoder: bool) -> str:
        """How the arguments and the source of now differ, in words; empty where they don't."""
        names = sorted(self.arguments.keys() | now.arguments.keys())
        pairs = [(name, self.arguments.get(name), now.arguments.get(name)) for name in names]
        if encoder:
            pairs.append(("encoder", self.encoder, now.encoder))
        parts = [f"{name} was {old}, is {new}" for name, old, new in pairs if old != new]
        if self.source != now.source:
            parts.append("the source has changed")
        return "; ".join(parts)


class LostFiles(Exception):
    """The partial files aren't those that the state speaks of."""


class Destination:
    """The folder that is written to: its state, and who owns what in it. As a context manager it keeps others out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Destination:
        # A restarted job may come before the first one has died.
        path = self.folder / LOCK_FILE
        self._lock = open(path, "ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            free = False
        except OSError as error:
            logger.info("%s: its file system has no locks (%s)", self.folder, error.strerror)
            free = True
        if not free:
            self._lock.close()
            raise DataError(f"{self.folder}: another process is writing there: run again when it has ended")
        return self

    def __exit__(self, *_: object) -> None:
        (self.folder / LOCK_FILE).unlink(missing_ok=True)
        self._lock.close()

    def load(self) -> State | None:
        """What was saved, or None; a ConfigError where it isn't of this version's ``prepare``."""
        path = self.folder / STATE_FILE
        try:
            data = json.loads(path.read_bytes())
            if not isinstance(data, dict) or data.get("made_by") != _MADE_BY:
                raise ValueError(f"expected made_by {_MADE_BY!r}")
            return State(**data)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} is not of this prepare ({error}): name a new or an empty folder") from error

    def save(self, state: State) -> None:
        """Write the state down to the disk; from then on it counts."""
        self.write(STATE_FILE, json.dumps(asdict(state), indent=1) + "\n")
        os.replace(self.folder / partial_name(STATE_FILE), self.folder / STATE_FILE)
        sync_folder(self.folder)

    def write(self, name: str, text: str) -> None:
        """Write a small file under its partial name, down to the disk."""
        with open(self.folder / partial_name(name), "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())

    def check_foreign(self, state: State | None) -> None:
        """Raise a ConfigError if there is anything that an unfinished run didn't write."""
        known = _OURS if state is not None else re.compile(re.escape(partial_name(STATE_FILE)))
        names = (name for name in sorted(os.listdir(self.folder)) if not name.startswith(".") and name != "lost+found")
        foreign = [name for name in names if not known.fullmatch(name)]
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise ConfigError(
                f"{self.folder} holds {', '.join(foreign[:3])}{more}, which prepare didn't write there: "
                "name a new or an empty folder"
            )

    def check_complete(self, state: State, now: State) -> None:
        """Raise a ConfigError unless a complete set is what this run would write, and all there."""
        if changed := state.changed(now, encoder=False):
            raise ConfigError(
                f"{self.folder} holds a complete set that was made otherwise ({changed}): "
                "name another folder, or remove it"
            )
        for name, size in state.files.items():
            path = self.folder / name
            if not path.exists() or path.stat().st_size != size:
                found = f"has {path.stat().st_size} bytes" if path.exists() else "is missing"
                raise ConfigError(f"{path} {found}, expected {size} bytes: remove {self.folder}, and run again")

    def clear(self) -> None:
        """Remove what an interrupted run left, but the state: it says that the rest is prepare's own."""
        for name in os.listdir(self.folder):
            if _OURS.fullmatch(name) and name != STATE_FILE:
                (self.folder / name).unlink()

    def complete(self, state: State, names: list[str]) -> None:
        """All files are complete under their partial names: say so, then rename them in this order."""
        state.files = {name: (self.folder / partial_name(name)).stat().st_size for name in names}
        state.phase = "renaming"
        self.save(state)
        self.rename(state)

    def rename(self, state: State) -> None:
        """Give the complete files their names; some may have got them before an interruption."""
        for name in state.files:
            partial, final = self.folder / partial_name(name), self.folder / name
            if partial.exists():
                if final.exists():
                    raise ConfigError(
                        f"{final} came from elsewhere while the set was written: move it away, and run again"
                    )
                os.replace(partial, final)
        sync_folder(self.folder)
        state.phase = "complete"
        self.save(state)


@contextmanager
def written_to(place: Path) -> Iterator[None]:
    """An OSError of the block becomes a DataError that names the file, or else the place."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"can't write to {error.filename or place}: {error.strerror or error}: mend that and run the same command "
            "again, it goes on where it was"
        ) from error
