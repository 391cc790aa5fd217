"""A run's state by what lies in its folder and what answers."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import socket
import time
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partial_fc.metrics import TrainingMetrics
from partial_fc.status import facts as facts_module
from partial_fc.status.gather import RunReader
from partial_fc.status.life import lock_holder
from partial_fc.targets import targets_file, targets_of, write_targets
from tests.made_runs import PHASES, drawn, evaluation, iso, make_run, read, served, shown, train


def test_figures_are_those_of_the_lines_in_effect(tmp_path: Path) -> None:
    lines = [train(step) for step in range(1, 41)]
    lines += [evaluation(20, 0.9), evaluation(40, 0.8), evaluation(40, 0.7, "cfp")]
    lines += [{"kind": "rollback", "step": 30, "seconds": 81.0}, train(31, seconds=83.0, loss=None)]
    lines += [
        train(35, seconds=91.0),
        {"kind": "skipped", "step": 34, "seconds": 90.0, "reason": "NaN", "sample_ids": [1]},
    ]
    facts = read(make_run(tmp_path / "run", *lines, step=35))
    assert (facts.name, facts.step, facts.planned_steps, facts.samples) == ("run", 35, 1000, 3500)
    assert (facts.loss.last, facts.loss.trend, facts.loss.curve[-1]) == (16.5, "falling", (35, 16.5))
    assert [step for step, _ in facts.loss.curve] == [*range(1, 31), 35]
    assert facts.phase_seconds == PHASES and facts.learning_rate == {"backbone": 0.1, "head": 0.01}
    assert facts.figures["target_cosine"] == 0.5 and "loss" not in facts.figures
    (lfw,) = facts.evaluations.items()
    assert lfw == ("lfw", facts_module.Evaluation(0.9, 20, 0.9, 20)), "what was undone doesn't count"
    # Of what was since the rollback: two seconds a step, 50 images a second.
    assert (facts.seconds_a_step, facts.images_per_second) == (2.0, 50.0)
    assert facts.remaining_seconds == 2.0 * (1000 - 35) and facts.trained_seconds == 91.0
    faults = facts.faults
    assert (faults.rollbacks, faults.rollback_step, faults.skipped_steps) == (1, 30, 1)
    assert (faults.skipped_step, faults.skipped_reason) == (34, "NaN")


def test_the_best_accuracy_is_the_first_of_its_height(tmp_path: Path) -> None:
    lines = [evaluation(step, accuracy) for step, accuracy in ((10, 0.8), (20, 0.95), (30, 0.95), (40, 0.9))]
    facts = read(make_run(tmp_path / "run", train(40), *lines))
    assert facts.evaluations == {"lfw": facts_module.Evaluation(0.9, 40, 0.95, 20)}
    assert facts.evaluation_seconds == 5.0


@pytest.mark.parametrize(
    ("slope", "scatter", "trend"),
    [(-0.1, 0.1, "falling"), (0.1, 0.1, "rising"), (-0.001, 1.0, "level"), (0, 0, "level")],
)
def test_a_trend_is_more_than_scatter(tmp_path: Path, slope: float, scatter: float, trend: str) -> None:
    lines = [train(step, loss=10 + slope * step + scatter * (-1) ** step) for step in range(1, 41)]
    facts = read(make_run(tmp_path / "run", *lines))
    assert facts.loss.trend == trend and facts.loss.over_steps == 39
    assert facts.loss.change == pytest.approx(20 * slope)


def test_few_losses_have_no_trend(tmp_path: Path) -> None:
    assert read(make_run(tmp_path / "run", *map(train, range(1, 8)))).loss.trend is None


def test_evaluations_and_commits_count_for_what_is_left_and_not_for_the_speed(tmp_path: Path) -> None:
    lines = [train(10, seconds=20.0), train(20, seconds=40.0), train(30, seconds=120.0)]
    facts = read(make_run(tmp_path / "run", *lines))
    assert facts.images_per_second == 50.0 and facts.seconds_a_step == 5.0
    assert facts.remaining_seconds == 5.0 * 970


def test_what_is_left_is_unknown_before_there_is_a_pace(tmp_path: Path) -> None:
    first = {"kind": "resumed", "step": 10, "seconds": 0.1}
    facts = read(make_run(tmp_path / "run", train(10), first))
    assert facts.seconds_a_step is None and facts.remaining_seconds is None
    assert re.search(r"left +unknown", drawn(facts)) and "went on 1 time\n" in re.sub(" +\n", "\n", drawn(facts))
    # From one line: what it says of its steps.
    facts = read(make_run(tmp_path / "run", train(10), first, train(20)))
    assert facts.seconds_a_step == 2.0


def test_the_last_commit_is_the_one_that_is_there(tmp_path: Path) -> None:
    told = {"kind": "commit", "step": 80, "seconds": 160.0, "write_seconds": 3.0, "copy_seconds": 0.25}
    run = make_run(tmp_path / "run", train(80), told)
    assert read(run).commits == facts_module.Commits()
    for step in (40, 80):
        commit = run / "checkpoints" / f"step-{step:08d}"
        commit.mkdir(parents=True)
        (commit / "commit.json").write_text(json.dumps({"files": {"a": {"size": 1000}, "b": {"size": 24}}}))
        os.utime(commit / "commit.json", (1000.0 + step,) * 2)
    (run / "checkpoints" / ".step-00000090.partial").mkdir()
    assert read(run).commits == facts_module.Commits(80, 1080.0, 1024, 3.0, 0.25)
    # Its line is of another commit.
    (run / "checkpoints" / "step-00000120").mkdir()
    assert read(run).commits == facts_module.Commits(120)


@pytest.mark.parametrize("state", ["resume", "finished", "failed"])
def test_a_run_that_has_ended_is_not_asked(tmp_path: Path, state: str) -> None:
    run = make_run(tmp_path / "run", state=state, reason="it diverged", seconds_ago=1e6)
    with served(run):
        facts = read(run)
    assert facts.state == state and facts.exit_code == {"resume": 4, "finished": 0, "failed": 3}[state]
    assert facts.ranks == [] and facts.reason == ("it diverged" if state == "failed" else None)
    assert facts.updated == pytest.approx(time.time() - 1e6, abs=60)
    assert ("start the same command again" in drawn(facts)) == (state == "resume")


def test_ranks_that_answer_are_a_sign_of_life_and_say_where_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", seconds_ago=1e6)
    with served(run) as metrics:
        metrics[1].record_decode_errors({"image": 2, "label": 1})
        metrics[0].record_decode_errors({"image": 1})
        metrics[0].record_commit(1, 1.0, copy_seconds=1.0, size=1, failed=True)
        facts = read(run)
        assert read(run, endpoints=False).state == "silent"
    assert (facts.state, facts.step, facts.epoch) == ("running", 104, 1.5)
    assert [(rank.rank, rank.up, rank.step, rank.queue, rank.queue_capacity) for rank in facts.ranks] == [
        (0, True, 103, 2, 4),
        (1, True, 104, 2, 4),
    ]
    assert all((rank.resident_bytes or 0) > 1e6 for rank in facts.ranks)
    assert facts.faults.decode_errors == {"image": 3, "label": 1} and facts.commits.failed == 1
    facts = read(run)
    assert (facts.state, facts.exit_code) == ("silent", 5)
    assert [rank.problem for rank in facts.ranks] == ["connection refused"] * 2
    text = " ".join(drawn(facts).split())
    assert "no sign of life" in text and "0 of 2 endpoints answer" in text and "11 d 14 h ago" in text
    assert "ranks 0, 1: connection refused" in text


def test_a_process_of_another_run_is_no_sign_of_life(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", seconds_ago=1e6)
    with served(run) as metrics:
        os.utime(targets_file(run), (time.time() - 1e6,) * 2)
        facts = read(run)
        assert facts.state == "silent" and facts.ranks[0].problem == "a process of another run answers there"
        # Rank 1 is where rank 0 was.
        write_targets(run, targets_of([("127.0.0.1", metrics[1].port)], run="run", tls=False))
        assert read(run).state == "silent"


def test_a_stall_is_told_with_what_the_ranks_wrote(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for rank, age in ((0, 5.0), (1, 5000.0)):
        head = (
            f"{datetime.fromtimestamp(time.time() - age).astimezone().isoformat(timespec='seconds')}  rank 3 is behind"
        )
        (run / f"stacks-rank{rank}.txt").write_text(
            f"\n{iso(9e4)}  an older one\nThread\n\n{head} {rank}\nThread 0x7\n"
        )
    (run / "stacks-rank2.txt").write_bytes(b"\xff\0\n9999-99-99T99:99:99+00:00  x")
    assert "last stall" in drawn(read(run)), "one that is over"
    with served(run) as metrics:
        metrics[1].watch_stalls(lambda: True)
        facts = read(run)
    assert (facts.state, facts.exit_code, facts.faults.stalled_ranks) == ("stalled", 5, [1])
    assert [(one.rank, one.text) for one in facts.faults.waiting] == [
        (0, "rank 3 is behind 0"),
        (1, "rank 3 is behind 1"),
    ]
    assert "no progress" in drawn(facts) and "rank 3 is behind 1" in drawn(facts)


def test_how_long_it_may_be_quiet_follows_from_its_lines(tmp_path: Path) -> None:
    # A line every 20 seconds: a minute is usual.
    assert read(make_run(tmp_path / "run", seconds_ago=20)).state == "running"
    assert read(make_run(tmp_path / "run", seconds_ago=70)).state == "silent"
    lines = [*(train(step) for step in range(10, 101, 10)), evaluation(100, 0.5) | {"evaluation_seconds": 200.0}]
    assert read(make_run(tmp_path / "run", *lines, seconds_ago=400)).state == "running"
    # At its beginning and its end a run may take longer.
    assert read(make_run(tmp_path / "run", train(1), seconds_ago=800)).state == "running"
    assert read(make_run(tmp_path / "run", *map(train, (900, 1000)), seconds_ago=800)).state == "running"
    assert read(make_run(tmp_path / "run", *map(train, (999, 1000)), seconds_ago=1000)).state == "silent"


@pytest.mark.parametrize("what", ["both", "status.json", "metrics.jsonl"])
def test_a_time_to_come_is_no_sign_of_life(tmp_path: Path, what: str) -> None:
    run, day = make_run(tmp_path / "run", seconds_ago=1e6), 86_400.0
    if what != "metrics.jsonl":
        make_run(run, seconds_ago=-day)
    if what != "both":
        ahead = -day if what == "metrics.jsonl" else 1e6
        os.utime(run / "metrics.jsonl", (time.time() - ahead,) * 2)
    facts = read(run)
    assert facts.state == "silent" and len(facts.notes) == (2 if what == "both" else 1)
    assert all("is of a time to come" in note and "is a clock wrong?" in note for note in facts.notes)
    assert ("ago" if what != "both" else "24 h 0 min ahead of this clock") in " ".join(drawn(facts).split())
    # The other file tells.
    if what == "status.json":
        os.utime(run / "metrics.jsonl")
        assert read(run).state == "running"
    # Clocks differ by a little.
    assert read(make_run(run, seconds_ago=-20)).state == "running" and read(run).notes == []


NAMES = ["config.yaml", ".lock", "stacks-rank0.txt", "metrics.jsonl", "status.json", "targets"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    targets_file(run).parent.mkdir()
    path = targets_file(run) if name == "targets" else run / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    facts = read(run)
    quiet = name in (".lock", "stacks-rank0.txt")
    expected = {"targets": "targets/run.json", "status.json": "status.json holds no status"}.get(name, name)
    assert len(facts.notes) == (not quiet) and all(note.startswith(expected) for note in facts.notes)


@pytest.mark.parametrize("value", [1.7e308, 1e100, -1e100])
def test_figures_that_cant_be_add_up_to_no_trace(tmp_path: Path, value: float) -> None:
    phases = {"a": value, "b": value, "c": 1e-300}
    lines = [
        train(step, phase_seconds=phases, learning_rate=phases, loss=value, seconds=value * step, **phases)
        | {"samples_per_second": 1e-300, "samples": value}
        for step in range(1, 41)
    ]
    run = make_run(tmp_path / "run", *lines, evaluation(40, value), steps=2**62)
    facts = read(run)
    for colour in (True, False):
        drawn(facts, colour=colour)
    assert (facts.phase_seconds.keys() >= {"a"}) == (value == 1e100)
    json.dumps(dataclasses.asdict(facts), allow_nan=False)
    shown(run.parent)


def test_the_lock_is_a_sign_of_life_and_isnt_touched(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", seconds_ago=1e6)
    lock = run / ".lock"
    lock.write_text(f"host {socket.gethostname()}, pid {os.getpid()}\n")
    assert lock_holder(run) is None and read(run).state == "silent", "nobody holds it"
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert lock_holder(run) == os.getpid()
        facts = read(run)
        assert facts.state == "running" and f"process {os.getpid()} of this machine" in (facts.signs or "")
        lock.write_text(f"host elsewhere, pid {os.getpid()}\n")
        assert lock_holder(run) is None
        lock.write_text(f"host {socket.gethostname()}, pid 1\n")
        assert lock_holder(run) is None
    assert lock_holder(run, tmp_path / "no list") is None


def observe(metrics: TrainingMetrics, **phases: float) -> None:
    for phase, seconds in phases.items():
        metrics.observe_phase(phase, seconds)


def test_phases_are_those_since_the_last_look_and_the_slow_rank_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    reader = RunReader(run)
    with served(run, ranks=3) as metrics:
        for one in metrics:
            observe(one, data=0.1, optimizer=0.2, collectives=0.1)
        facts = reader.read()
        assert facts.imbalance is None
        for rank, one in enumerate(metrics):
            observe(one, data=0.5 if rank == 2 else 0.1, optimizer=0.2, collectives=(0.9, 0.4, 0.0)[rank])
        facts = reader.read()
    assert [rank.phase_seconds["data"] for rank in facts.ranks] == pytest.approx([0.1, 0.1, 0.5])
    found = facts.imbalance
    assert found is not None and (found.rank, found.phase) == (2, "data"), "waiting for it isn't slow"
    assert (found.seconds, found.median_seconds) == pytest.approx((0.5, 0.1))
    assert "rank 2 spends 500 ms a step in data, the median is 100 ms" in " ".join(drawn(facts).split())


def test_a_process_that_started_again_is_told_of_since_its_start(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    reader = RunReader(run)
    with served(run, ranks=1) as metrics:
        for _ in range(5):
            observe(metrics[0], data=1.0)
        assert reader.read().ranks[0].phase_seconds["data"] == 1.0
    with served(run, ranks=1) as metrics:
        observe(metrics[0], data=0.25)
        assert reader.read().ranks[0].phase_seconds["data"] == 0.25


GARBAGE = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([b"[" * 5_000, b"{}", b"null", b"- 1", b"a: &a [*a]", b"a: 9999-99-99", b"!!python/object:x {}"]),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.just(10**400)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    ).map(lambda value: json.dumps(value).encode()),
)
KEYS = st.sampled_from(
    ["state", "step", "steps", "name", "reason", "updated", "world_size", "train", "metrics", "kind", "seconds"]
    + ["loss", "samples", "phase_seconds", "learning_rate", "set", "accuracy", "targets", "labels", "write_seconds"]
)
VALUES = st.one_of(
    st.sampled_from(
        ["running", "failed", "train", "evaluation", "commit", "resumed", "skipped", iso(), 7, 10**400, -1]
    ),
    st.sampled_from(
        [[], {}, None, True, 1e308, float("nan"), {"batch_size": -1, "data": "x"}, {"data": 1e308, "a": 2}]
    ),
)
OBJECTS = st.dictionaries(KEYS, VALUES).map(lambda value: json.dumps(value).encode())


@given(st.lists(st.one_of(GARBAGE, OBJECTS), min_size=6, max_size=6), st.lists(st.one_of(GARBAGE, OBJECTS), max_size=6))
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_files_of_any_kind_give_lines_and_no_trace(
    tmp_path_factory: pytest.TempPathFactory, files: list[bytes], lines: list[bytes]
) -> None:
    run = make_run(tmp_path_factory.mktemp("runs") / "run")
    names = ["status.json", "config.yaml", ".lock", "stacks-rank0.txt", "checkpoints/step-00000001/commit.json"]
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    for name, content in zip(names, files, strict=False):
        (run / name).write_bytes(content)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\n".join([*lines, *(line.replace(b"}", b', "kind": "train", "step": 5}') for line in lines)]))
    targets_file(run).parent.mkdir()
    targets_file(run).write_bytes(files[5])
    facts = read(run)
    assert max(map(len, drawn(facts).splitlines())) <= 80
    json.loads(json.dumps(dataclasses.asdict(facts), allow_nan=False))
    shown(run.parent)
