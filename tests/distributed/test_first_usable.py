"""Damaged commits as a start of a run sees them: ranks share the sums, and all take the same commit."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from partial_fc.build import Place
from partial_fc.checkpoint import list_commits
from partial_fc.run_folder import first_usable
from tests.unit.test_commit_mutations import MUTATIONS, NEW, OLD, flip, write_commit

NOT_USED = ": it can't be used, take another commit: this commit is not used, "
Seen = tuple[str | None, list[str]]


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def look(rank: int, world_size: int, roots: list[str]) -> list[Seen]:
    """(folder of the commit that is taken, the warnings of this rank) of each root."""
    place = Place(rank, world_size, rank, torch.device("cpu"))
    logger = logging.getLogger("partial_fc.run_folder")
    found: list[Seen] = []
    for root in roots:
        lines = _Lines()
        logger.addHandler(lines)
        try:
            commit = first_usable(list_commits(Path(root)), place)
        finally:
            logger.removeHandler(lines)
        found.append((None if commit is None else str(commit.folder), lines.texts))
    return found


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original")
    for step in (20, 40):
        write_commit(root, step)
    return root


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_take_the_previous_commit_and_rank_0_says_why(
    ranks: Any, original: Path, tmp_path: Path, world_size: int
) -> None:
    roots = {}
    for number, (name, (mutate, _)) in enumerate(MUTATIONS.items()):
        roots[name] = Path(shutil.copytree(original, tmp_path / f"{number}" / "checkpoints"))
        mutate(roots[name] / NEW)
    first, *others = ranks(world_size).run(look, [str(root) for root in roots.values()])
    for place, (name, root) in enumerate(roots.items()):
        expected = re.escape(f"{root / NEW}: ") + ".*" + MUTATIONS[name][1] + ".*" + re.escape(NOT_USED)
        taken, lines = first[place]
        assert taken == str(root / OLD), name
        assert len(lines) == 1 and re.fullmatch(f"{expected}the one before it is", lines[0]), (name, lines)
        assert all(other[place] == (taken, []) for other in others), name


def test_a_whole_commit_is_taken_and_none_where_all_are_damaged(ranks: Any, original: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(original, tmp_path / "bad"))
    # One that the first rank sums, and one that the second does.
    flip("__0_0.distcp", 0.5)(bad / NEW)
    flip("__1_0.distcp", 0.5)(bad / OLD)
    first, second = ranks(2).run(look, [str(original), str(bad)])
    assert first[0] == second[0] == (str(original / NEW), [])
    assert first[1][0] is None and second[1] == (None, [])
    assert [line.split(": ")[0] for line in first[1][1]] == [str(bad / NEW), str(bad / OLD)]
    assert first[1][1][1].endswith("and there is none before it")
