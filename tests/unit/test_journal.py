"""The journal over several starts of one run: appended to, and read so that each step counts once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partial_fc.journal import Journal, read_journal


def write(folder: Path, *lines: tuple[str, int], first_step: int = 0) -> None:
    """What one start of a run writes."""
    with Journal(folder, 100, active=True, first_step=first_step) as journal:
        for kind, step in lines:
            journal.record(kind, step, loss=float(step))


def read(folder: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in read_journal(folder / "metrics.jsonl")]


def test_a_line_holds_kind_step_seconds_and_figures(tmp_path: Path) -> None:
    with Journal(tmp_path, 10, active=True) as journal:
        journal.record("train", 2, loss=float("nan"), rates={"head": float("inf"), "backbone": 0.5})
        # Before the file is closed: who watches the run reads it now.
        (line,) = read_journal(tmp_path / "metrics.jsonl")
    assert line.pop("seconds") >= 0
    assert line == {"kind": "train", "step": 2, "loss": None, "rates": {"head": None, "backbone": 0.5}}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path, 10, active=False, first_step=3) as journal:
        journal.record("train", 4)
        journal.show(4, {"loss": 1.0})
        journal.advance(4)
        journal.say("text")
    assert not list(tmp_path.iterdir())


def test_a_second_start_appends_and_voids_what_came_after_the_commit(tmp_path: Path) -> None:
    write(tmp_path, ("train", 2), ("evaluation", 2), ("train", 4), ("train", 6), ("evaluation", 6))
    write(tmp_path, ("resumed", 4), ("train", 6), ("train", 8), first_step=4)
    assert read(tmp_path) == [("train", 2), ("evaluation", 2), ("train", 4), ("resumed", 4), ("train", 6), ("train", 8)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 8, "lines were lost, not only voided"


def test_a_rollback_voids_within_one_start_and_events_stay(tmp_path: Path) -> None:
    write(tmp_path, ("train", 2), ("resumed", 9), ("train", 9), ("rollback", 1), ("train", 2), ("note", 50))
    assert read(tmp_path) == [("resumed", 9), ("rollback", 1), ("train", 2), ("note", 50)]


def test_going_on_twice_from_an_older_commit_each_time(tmp_path: Path) -> None:
    write(tmp_path, ("train", 2), ("train", 4), ("train", 6))
    write(tmp_path, ("resumed", 4), ("train", 6))
    write(tmp_path, ("resumed", 2), ("train", 4))
    assert read(tmp_path) == [("train", 2), ("resumed", 4), ("resumed", 2), ("train", 4)]


@pytest.mark.parametrize("kept", [1, 10, -2, -1])
def test_a_torn_last_line_is_skipped_and_the_next_start_begins_a_new_one(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, ("train", 2), ("train", 4))
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(first + b"\n" + second[:kept])
    assert read(tmp_path) == [("train", 2)]
    write(tmp_path, ("resumed", 2), ("train", 4))
    assert read(tmp_path) == [("train", 2), ("resumed", 2), ("train", 4)]
    assert path.read_bytes().split(b"\n")[1] == second[:kept]


def test_a_whole_last_line_without_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, ("train", 2))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    write(tmp_path, ("train", 4))
    assert read(tmp_path) == [("train", 2), ("train", 4)]


@pytest.mark.parametrize(
    "junk", [b"\0" * 40, b"\xff\xfe", b"[1]", b"3", b'{"kind": "train"}', b'{"step": 3}', b"[" * 9999]
)
def test_what_is_no_line_of_the_journal_is_skipped(tmp_path: Path, junk: bytes) -> None:
    write(tmp_path, ("train", 2))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(junk + b"\n")
    write(tmp_path, ("train", 4))
    assert read(tmp_path) == [("train", 2), ("train", 4)]


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="metrics.jsonl"):
        read_journal(tmp_path / "metrics.jsonl")


@given(st.lists(st.tuples(st.sampled_from(["train", "evaluation", "resumed", "rollback", "other"]), st.integers(0, 9))))
def test_lines_in_effect_by_their_definition(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, int]]
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    path.write_text("".join(json.dumps({"kind": kind, "step": step}) + "\n" for kind, step in lines))

    def void(index: int) -> bool:
        kind, step = lines[index]
        later = [to for what, to in lines[index + 1 :] if what in ("resumed", "rollback")]
        return kind in ("train", "evaluation") and any(to < step for to in later)

    expected = [line for index, line in enumerate(lines) if not void(index)]
    assert [(line["kind"], line["step"]) for line in read_journal(path)] == expected


def test_the_progress_bar_starts_at_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with Journal(tmp_path, 100, active=True, first_step=40) as journal:
        journal.advance(41)
        journal.advance(40)
    shown = capsys.readouterr().out
    assert " 40/100" in shown and " 0/100" not in shown


def test_a_full_disk_costs_lines_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with Journal(tmp_path, 10, active=True) as journal:
        journal.record("train", 1)
        journal.record("train", 2)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'metrics.jsonl'} can't be written (No space left on device): lines are missing there until it can"
    ]
