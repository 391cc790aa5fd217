"""A run's state on a terminal, as a table, and told to programs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from partial_fc import status as status_module
from partial_fc.cli import app
from partial_fc.errors import PartialFCError
from partial_fc.status import facts as facts_module
from partial_fc.status import gather, show_status
from partial_fc.status.facts import EXIT_CODES, Facts, Rank, Waiting
from partial_fc.status.scrape import Answer
from partial_fc.targets import targets_of, write_targets
from tests.commands import Commands
from tests.made_runs import drawn, evaluation, make_run, read, served, shown, train

PAGE = Path(__file__).resolve().parents[2] / "docs" / "status.md"


def full(ranks: int = 2, **more: Any) -> Facts:
    """Facts with all that there can be, long names among them."""
    facts = Facts("/data/shared/experiments/runs/glint360k-r100-partial-fc-2", "glint360k-r100-partial-fc", "running")
    facts.updated, facts.signs = time.time() - 3, f"{ranks} of {ranks} endpoints answer"
    facts.step, facts.planned_steps, facts.epoch, facts.world_size = 1_234_567, 2_000_000, 12.34, ranks
    facts.images_per_second, facts.seconds_a_step, facts.remaining_seconds = 123_456.0, 0.1234, 123_456.0
    facts.trained_seconds, facts.batch_size, facts.samples = 1e6, 8192, 10**10
    names = (
        "data",
        "backbone_forward",
        "head_forward",
        "head_backward",
        "backbone_backward",
        "optimizer",
        "collectives",
    )
    facts.phase_seconds = {name: 0.0123 * (place + 1) for place, name in enumerate(names)}
    facts.loss = facts_module.Loss(12.345, -0.123, "falling", 19_500, [(step, 40 - step / 10) for step in range(200)])
    cosines = {"target_cosine": 0.5, "nearest_cosine_1": 0.4, "nearest_cosine_5": 0.3, "nearest_accuracy": 0.95}
    facts.figures = {
        **cosines,
        "support_vectors_per_sample": 123.4,
        "support_vector_share": 0.5,
        "sampled_classes": 123_456,
    }
    facts.figures |= {"gradient_norm": 1.5, "loss_scale": 65536.0, "positive_classes": 1234, "something_new": 3}
    facts.learning_rate = {"backbone": 0.0123, "head": 0.123}
    facts.evaluations = {
        f"{name}_validation_set": facts_module.Evaluation(0.99, 1_230_000, 0.995, 1_000_000) for name in "ab"
    }
    facts.commits = facts_module.Commits(1_230_000, time.time() - 400, 79 * 2**30, 123.4, 1.234, 3)
    reason = "the gradient of the backbone isn't finite"
    facts.faults = facts_module.Faults(12, 3, 1_000_000, 17, 1_234_000, reason, {"image": 12, "record": 3}, [])
    facts.faults.waiting = [Waiting(3, time.time() - 5e5, "rank 7 (host gpu-node-0017, pid 47110815) is behind " * 3)]
    for rank in range(ranks):
        values = (1_234_567, False, 3, 4, 12 * 2**30, 70 * 2**30, 69 * 2**30, 2**38)
        facts.ranks.append(Rank(rank, f"gpu-node-{rank:04d}.cluster.example.org:9400", True, None, *values))
        facts.ranks[-1].phase_seconds = dict(facts.phase_seconds)
    facts.imbalance = facts_module.Imbalance(1, "backbone_forward", 0.5, 0.1)
    facts.notes = ["config.yaml can't be read (Permission denied)"]
    return dataclasses.replace(facts, **more)


@pytest.mark.parametrize("width", [80, 81, 100, 124, 200])
@pytest.mark.parametrize("unicode", [True, False])
def test_no_line_is_wider_than_the_screen_and_nothing_is_cut(width: int, unicode: bool) -> None:
    text = drawn(full(), width, unicode=unicode)
    assert max(map(len, text.splitlines())) <= width
    assert text.isascii() != unicode
    words = " ".join(text.split())
    for part in (
        "1,234,567 of 2,000,000",
        "61.7 %",
        "epoch 12.34",
        "123,456 images/s",
        "34 h 18 min, until",
        "3 failed",
    ):
        assert part in words
    for part in ("backbone backward 61.5 ms (18 %)", "falling by 0.123 in 19,500 steps", "own class nearest 95 %"):
        assert part in words
    for part in (
        "something new 3",
        "loss scale 65,536",
        "best 0.9950 at step 1,000,000",
        "79 GiB",
        "image 12, record 3",
    ):
        assert part in words
    for part in ("rolled back 3, last to step 1,000,000", "rank 1 spends 500 ms", "config.yaml can't be read"):
        assert part in words
    rows = [line for line in text.splitlines() if "gpu-node-000" in line and "pid" not in line]
    assert len(rows) == 2 and all("3/4" in row and "12 GiB" in row and "344 ms" in row for row in rows)
    # A screen of 24 lines beside the table of ranks; a page where it's narrow.
    assert len(text.splitlines()) < 45


def test_without_colour_nothing_steers_the_terminal_and_with_it_there_is_a_bar() -> None:
    assert "\x1b" not in drawn(full())
    assert "\x1b[" in drawn(full(), colour=True) and "█" * 5 in drawn(full(), colour=True)


def test_of_many_ranks_those_worth_a_look_are_shown() -> None:
    facts = full(64)
    facts.ranks[40].up, facts.ranks[40].problem = False, "connection refused"
    facts.ranks[50].stalled, facts.ranks[60].step = True, 7
    facts.imbalance = facts_module.Imbalance(30, "data", 0.5, 0.1)
    text = drawn(facts)
    rows = [int(row[1]) for row in re.finditer(r"^ *(\d+)  gpu-node", text, re.MULTILINE)]
    assert len(rows) == 16 and rows == sorted(rows) and {30, 40, 50, 60} <= set(rows)
    assert "48 more ranks answer like these" in text and "rank 40: connection refused" in text
    assert "stalled" in text and "down" in text


@pytest.mark.parametrize("state", list(EXIT_CODES))
def test_every_state_has_words_and_a_code(state: str) -> None:
    facts = full(state=state, reason="it diverged" if state == "failed" else None)
    assert len(drawn(facts).splitlines()[0].split("  ")[1]) > 4
    assert f"| {EXIT_CODES[state]} |" in PAGE.read_text(encoding="utf-8")


HOSTILE = "\x1b]0;owned\x07[bold red]x[/bold red]\u202e\r\n[link=file:///]"


def test_names_and_reasons_steer_neither_terminal_nor_markup(tmp_path: Path) -> None:
    lines = [train(10, phase_seconds={HOSTILE: 1.0}, learning_rate={HOSTILE: 1.0}, **{HOSTILE: 2.0})]
    lines += [evaluation(10, 0.5, HOSTILE), {"kind": "skipped", "step": 3, "reason": HOSTILE}]
    run = make_run(tmp_path / "run", *lines, state="failed", name=HOSTILE, reason=HOSTILE)
    text = drawn(read(run), 200)
    assert text.count("[bold red]x[/bold red]") >= 6, "as it is, not as markup"
    assert not [sign for sign in text if not sign.isprintable() and sign != "\n"]


@pytest.mark.parametrize("name", ["status.json", "config.yaml", "metrics.jsonl"])
def test_a_file_that_is_missing_is_a_note(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    assert read(run).notes == []
    (run / name).unlink()
    facts = read(run)
    (note,) = facts.notes
    assert note.startswith(name) and f"note: {name}" in drawn(facts)
    assert (facts.state == "unknown") == (name == "status.json")
    with served(run):
        assert read(run).state == "running", "who answers lives"


def test_a_run_as_json_has_the_keys_of_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", train(10), evaluation(10, 0.5))
    for _ in range(2):
        with served(run):
            code, text = shown(run, as_json=True)
    assert code == 0 and text.count("\n") == 1
    content = json.loads(text)
    assert content["state"] == "running" and content["evaluations"]["lfw"]["accuracy"] == 0.5
    described = re.findall(
        r"^\| `(\w+(?:\.\w+)?)` \| (.+) \|$", PAGE.read_text(encoding="utf-8").split("## JSON")[1], re.MULTILINE
    )
    expected = []
    for prefix, kind in KINDS.items():
        meanings = meanings_of(kind)
        expected += [(f"{prefix}{field.name}", meanings[field.name]) for field in dataclasses.fields(kind)]
    assert described == expected


# Prefixes of the page's keys.
KINDS: dict[str, Any] = {
    "": Facts,
    "loss.": facts_module.Loss,
    "evaluation.": facts_module.Evaluation,
    "commits.": facts_module.Commits,
    "faults.": facts_module.Faults,
    "waiting.": Waiting,
    "rank.": Rank,
    "imbalance.": facts_module.Imbalance,
}


def meanings_of(kind: Any) -> dict[str, str]:
    """What the class says of its attributes."""
    text = kind.__doc__.partition("Attributes:")[2]
    return {
        name: " ".join(meaning.split()).replace("``", "`").rstrip(".")
        for name, meaning in re.findall(r"^        (\w+): (.*(?:\n            .*)*)", text, re.MULTILINE)
    }


def test_a_folder_of_runs_is_a_table_the_newest_first(tmp_path: Path) -> None:
    for name, age, state in (("old", 1e6, "finished"), ("new", 2.0, "running"), ("mid", 1e5, "failed")):
        make_run(tmp_path / name, state=state, seconds_ago=age)
    make_run(tmp_path / "broken").joinpath("status.json").write_text("[")
    (tmp_path / "targets").mkdir()
    (tmp_path / "file").touch()
    code, text = shown(tmp_path)
    rows = [line.split("  ")[0].strip() for line in text.splitlines()[2:]]
    assert code == 0 and set(rows[:2]) == {"new", "broken"} and rows[2:] == ["mid", "old"]
    (new,) = [line for line in text.splitlines() if line.startswith("new")]
    cells = re.split(r" {2,}", new.strip())
    assert cells == ["new", "running", "100", "10 %", "50", "30 min", "10", cells[-1]]
    assert re.fullmatch(r"\d+(\.\d)? (s|min) ago", cells[-1])
    code, text = shown(tmp_path, as_json=True)
    assert {Path(run["folder"]).name: run["exit_code"] for run in json.loads(text)["runs"]} == {
        "new": 0,
        "broken": 5,
        "mid": 3,
        "old": 0,
    }


def test_runs_beyond_the_most_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "_MOST_RUNS", 3)
    for number in range(3):
        make_run(tmp_path / f"run{number}", state="finished")
    assert "older" not in shown(tmp_path)[1] and json.loads(shown(tmp_path, as_json=True)[1])["older_runs"] == 0
    for number in range(5):
        os.utime(make_run(tmp_path / f"old{number}", state="finished") / "status.json", (1e9, 1e9))
    assert shown(tmp_path)[1].splitlines()[-1] == "5 older runs aren't shown"
    content = json.loads(shown(tmp_path, as_json=True)[1])
    assert content["older_runs"] == 5 and {Path(run["folder"]).name for run in content["runs"]} == {
        "run0",
        "run1",
        "run2",
    }


def test_runs_of_a_folder_are_asked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(6)

    def scrape(targets: Any, *_: Any) -> list[Answer]:
        # One after the other they would wait in vain.
        together.wait(30)
        return [Answer(0, "a:1", None, "no answer")]

    monkeypatch.setattr(gather, "scrape", scrape)
    for number in range(6):
        run = make_run(tmp_path / f"run{number}")
        write_targets(run, targets_of([("a", 1)], run=run.name, tls=False))
    assert shown(tmp_path)[1].count("running") == 6


def test_where_no_run_is_the_line_names_near_ones(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "glint_r100")
    with pytest.raises(PartialFCError, match=r"glint_r10: no run is there, .*near names: .*/glint_r100$"):
        shown(tmp_path / "runs" / "glint_r10")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PartialFCError, match=r"empty: no run is there, expected a folder with status.json, [^;]*$"):
        shown(tmp_path / "empty")


@pytest.mark.usefixtures("leaves_by_raising")
@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("failed", 3), ("resume", 4)])
def test_the_command_ends_with_the_states_code(tmp_path: Path, state: str, code: int) -> None:
    result = Commands(app).call("status", make_run(tmp_path / "run", state=state), "--no-endpoints")
    assert result.exit_code == code and result.stderr == "" and result.stdout.startswith("run  ")
    assert "no run is there" in Commands(app).refused("status", tmp_path / "none")


def test_watching_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, slept = make_run(tmp_path / "run"), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        # A signal ends the processes, and a scheduler starts them again.
        make_run(run, state=("resume", "running", "finished")[len(slept) - 1])

    monkeypatch.setattr(time, "sleep", sleep)
    code, text = shown(run, watch=7.0, as_json=True, endpoints=False)
    states = [json.loads(line)["state"] for line in text.splitlines()]
    assert code == 0 and states == ["running", "resume", "running", "finished"] and slept == [7.0] * 3


@pytest.mark.parametrize("terminal", [True, False])
def test_a_person_ends_watching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    run, file = make_run(tmp_path / "run"), io.StringIO()
    monkeypatch.setattr(time, "sleep", sleep)
    console = Console(file=file, width=80, height=50, force_terminal=terminal)
    assert show_status(run, watch=1.0, endpoints=False, console=console) == 0
    assert "step 100 of 1,000" in re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())
    assert file.getvalue().count("\x1b[?25h") == file.getvalue().count("\x1b[?25l") == int(terminal), (
        "the cursor is back"
    )


@pytest.mark.parametrize("single", [True, False])
def test_ctrl_c_in_the_first_look_ends_watching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool) -> None:
    def interrupted(self: object) -> Facts:
        raise KeyboardInterrupt

    run = make_run(tmp_path / "run")
    monkeypatch.setattr(gather.RunReader, "read", interrupted)
    assert shown(run if single else tmp_path, watch=1.0) == (5 if single else 0, "")


@pytest.mark.parametrize("seconds", ["inf", "1e30", "nan", "0", "-1"])
def test_a_pause_that_is_none_is_refused(tmp_path: Path, seconds: str) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(PartialFCError, match=r"--watch .*: expected seconds, above 0 and up to 86,400"):
        shown(run, watch=float(seconds))
    assert Commands(app).call("status", run, "--watch", seconds).exit_code in (1, 2)


def test_a_terminal_of_few_letters_gets_what_it_can_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, written = make_run(tmp_path / "r\u00e9sum\u00e9"), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert show_status(run, endpoints=False) == 0
    text = written.getvalue().decode("ascii")
    assert text.startswith("r?sum?  running") and "#---------" in text and "falling by 5 in 90 steps" in text


@pytest.mark.parametrize("options", [{}, {"as_json": True}, {"watch": 0.01}])
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path, options: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", state="running")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        assert show_status(run, endpoints=False, console=Console(file=pipe, width=80), **options) == 0
