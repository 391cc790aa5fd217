"""The journal read on and on, with few of its lines kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.journal import Journal, read_journal
from partial_fc.status import following
from partial_fc.status.following import FollowedJournal

KINDS = ["train", "evaluation", "resumed", "rollback", "commit", "skipped", "other"]
JUNK = [b"", b"\0" * 9, b"\xff\xfe", b"[1]", b'{"kind": "train"}', b'{"kind": "train", "step": 3, "los', b"[" * 9999]


def text_of(line: tuple[str, int]) -> bytes:
    return json.dumps({"kind": line[0], "step": line[1], "seconds": 1.0}).encode()


def steps(lines: list[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines]


def write(path: Path, *lines: tuple[str, int]) -> None:
    with path.open("ab") as file:
        file.writelines(text_of(line) + b"\n" for line in lines)


def followed(path: Path) -> FollowedJournal:
    journal = FollowedJournal(path)
    journal.refresh()
    return journal


@given(
    st.lists(st.one_of(st.tuples(st.sampled_from(KINDS), st.integers(0, 9)).map(text_of), st.sampled_from(JUNK))),
    st.integers(1, 60),
    st.integers(1, 80),
)
def test_it_says_what_read_journal_says(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], piece: int, block: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(b"")
    journal = FollowedJournal(path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(following, "_BLOCK", block)
        for begin in range(0, len(content), 1 + len(content) // piece):
            with path.open("ab") as file:
                file.write(content[begin : begin + 1 + len(content) // piece])
            journal.refresh()
    expected = read_journal(path)

    def of(*kinds: str) -> list[dict[str, Any]]:
        return [line for line in expected if line["kind"] in kinds]

    assert journal.steps() == of("train") and journal.evaluations == of("evaluation")
    back = [index for index, line in enumerate(expected) if line["kind"] in ("resumed", "rollback")]
    assert journal.latest() == [line for line in expected[max(back, default=0) :] if line["kind"] == "train"]
    assert (journal.restarts, journal.rollbacks) == (len(of("resumed")), len(of("rollback")))
    assert (journal.commits, journal.skipped) == (len(of("commit")), len(of("skipped")))
    assert journal.last_commit == next(iter(of("commit")[::-1]), None)
    assert journal.last_skipped == next(iter(of("skipped")[::-1]), None)
    assert journal.last_rollback == next(iter(of("rollback")[::-1]), None)


def test_only_what_was_added_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ("train", 1))
    journal = followed(path)
    # What was read isn't looked at again, whatever became of it.
    content = path.read_bytes()
    path.write_bytes(b"x" * (len(content) - 1) + b"\n")
    write(path, ("train", 2))
    journal.refresh()
    assert steps(journal.steps()) == [1, 2]


def test_a_file_that_is_cut_or_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ("train", 1), ("train", 2))
    journal = followed(path)
    path.write_bytes(text_of(("train", 5)) + b"\n")
    journal.refresh()
    assert steps(journal.steps()) == [5]
    other = tmp_path / "other"
    write(other, ("train", 7), ("train", 8), ("train", 9))
    other.replace(path)
    journal.refresh()
    assert steps(journal.steps()) == [7, 8, 9]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        journal.refresh()
    assert steps(journal.steps()) == [7, 8, 9], "what is known stays"


def test_of_many_lines_the_last_are_kept_and_some_of_the_others_evenly(tmp_path: Path) -> None:
    path, count = tmp_path / "metrics.jsonl", 20_000
    write(path, *(("train", step) for step in range(count)), ("evaluation", count))
    kept = steps(followed(path).steps())
    recent, spread = kept[-following.RECENT :], kept[: -following.RECENT]
    assert recent == list(range(count - following.RECENT, count))
    (gap,) = {after - before for before, after in zip(spread, spread[1:], strict=False)}
    assert spread[0] == 0 and following.SPREAD / 2 <= len(spread) <= following.SPREAD
    assert recent[0] - spread[-1] <= gap


def test_going_back_reaches_the_lines_that_are_kept_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *(("train", step) for step in range(5000)), ("rollback", 100), ("train", 101))
    journal = followed(path)
    kept = steps(journal.steps())
    assert kept == sorted(kept) and len(kept) > 10, "few lines of the first steps are kept, evenly"
    assert kept[-1] == 101 and 100 - (kept[1] - kept[0]) < kept[-2] <= 100
    assert steps(journal.latest()) == [101]


def test_seconds_of_all_starts_are_added(tmp_path: Path) -> None:
    for first in (0, 2):
        with Journal(tmp_path, 9, active=True, first_step=first) as journal:
            if first:
                journal.record("resumed", first)
            journal.record("train", first + 1)
            journal.record("train", first + 2)
    path = tmp_path / "metrics.jsonl"
    lines = [line | {"seconds": 10.0 * line["step"]} for line in read_journal(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert followed(path).seconds == 20.0 + 40.0


def test_the_end_alone_tells_of_the_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *(("train", step) for step in range(1000)), ("rollback", 995), ("train", 996))
    journal = FollowedJournal(path, last_bytes=600)
    journal.refresh()
    assert steps(journal.steps())[-3:] == [994, 995, 996] and len(journal.steps()) < 12
    write(path, ("train", 997))
    journal.refresh()
    assert steps(journal.steps())[-2:] == [996, 997]


def test_a_line_without_end_takes_no_memory_and_the_next_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_LONGEST", 1000)
    monkeypatch.setattr(following, "_BLOCK", 300)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x" * 5000)
    journal = followed(path)
    assert len(journal._rest) <= 1300
    with path.open("ab") as file:
        file.write(b"\n")
    write(path, ("train", 4))
    journal.refresh()
    assert steps(journal.steps()) == [4]


@pytest.mark.parametrize("step", [True, -1, 2**63, "7", None])
def test_a_step_that_is_none_makes_no_line(tmp_path: Path, step: object) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"kind": "train", "step": step}) + "\n" + json.dumps({"kind": "rollback", "step": step}))
    journal = followed(path)
    assert journal.steps() == [] and journal.rollbacks == 0
