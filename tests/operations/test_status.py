"""A real run seen from outside: while it steps, when it stands, after a signal, a kill, an error and its end."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from partial_fc.status import show_status
from tests.jobs import Job, Jobs, free_ports, send
from tests.runs import Run, make_data

pytestmark = [pytest.mark.torchrun, pytest.mark.slow, pytest.mark.timeout(400)]

DEADLINE = 120.0
SIGNALS = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--max-restarts", "0"]


def look(run: Run) -> dict[str, Any]:
    """What is told of the run now."""
    file = io.StringIO()
    code = show_status(run.folder, as_json=True, console=Console(file=file))
    found: dict[str, Any] = json.loads(file.getvalue())
    assert found["exit_code"] == code
    return found


def screen(run: Run) -> str:
    file = io.StringIO()
    show_status(run.folder, console=Console(file=file, width=80, highlight=False))
    assert max(map(len, file.getvalue().splitlines())) <= 80
    return " ".join(file.getvalue().split())


def start(jobs: Jobs, run: Run, *changes: str) -> Job:
    program = [
        *run.changed_program(step_seconds=0.05),
        "metrics.enabled=true",
        f"metrics.port={free_ports(2)}",
        *changes,
    ]
    return jobs.torchrun(run.folder.name, *program, ranks=2, options=SIGNALS)


def test_a_run_is_seen_at_every_turn(tmp_path: Path, jobs: Jobs) -> None:
    times = {"stall_seconds": 3.0, "timeout_seconds": 300.0}
    run = Run(tmp_path, make_data(tmp_path / "data"), steps=100_000, commit_every=5, **times)
    evaluations = ["evaluate.sets=[demo_val.bin]", "evaluate.every_steps=5"]
    job = start(jobs, run, *evaluations)
    seen = list[dict[str, Any]]()
    jobs.wait_until(lambda: run.folder.is_dir() and run.lines("commit"), "a commit", DEADLINE)
    jobs.wait_until(lambda: run.lines("train")[-1]["step"] > 15, "some steps", DEADLINE)

    # A commit is there before its line is.
    jobs.wait_until(lambda: (seen.append(look(run)) or seen[-1])["commits"]["seconds"], "its line", DEADLINE)
    found = seen[-1]
    assert found["state"] == "running" and found["signs"] == "2 of 2 endpoints answer"
    assert found["step"] > 15 and found["planned_steps"] == 100_000 and found["world_size"] == 2
    assert found["images_per_second"] > 0 and found["remaining_seconds"] > 100 and found["epoch"] > 0
    assert set(found["evaluations"]) == {"demo_val"} and found["loss"]["last"] > 0
    assert found["commits"]["step"] >= 5 and found["commits"]["bytes"] > 10_000 and found["commits"]["seconds"] > 0
    for rank in found["ranks"]:
        assert rank["up"] and rank["step"] > 15 and rank["resident_bytes"] > 1e7 and rank["queue_capacity"] > 0
        assert set(rank["phase_seconds"]) >= {"data", "collectives"} and sum(rank["phase_seconds"].values()) > 0
    text = screen(run)
    for part in ("run running", "images/s", "demo_val 0.", "2 of 2 endpoints", "127.0.0.1:", "faults none"):
        assert part in text

    # Rank 1 stands still: the other one waits for it, and says so.
    frozen = job.workers()[1]
    send(frozen, signal.SIGSTOP)
    jobs.wait_until(lambda: look(run)["faults"]["waiting"], "rank 0 to say whom it waits for", DEADLINE)
    found = look(run)
    assert found["state"] == "stalled" and found["exit_code"] == 5 and found["faults"]["stalled_ranks"] == [0]
    assert [rank["up"] for rank in found["ranks"]] == [True, False]
    assert found["faults"]["waiting"][0]["rank"] == 0 and "rank 1" in found["faults"]["waiting"][0]["text"]
    assert "no progress" in screen(run)
    send(frozen, signal.SIGCONT)
    jobs.wait_until(lambda: look(run)["state"] == "running", "the run to go on", DEADLINE)

    # A scheduler's signal.
    job.signal(signal.SIGTERM)
    job.wait(DEADLINE)
    found = look(run)
    assert found["state"] == "resume" and found["exit_code"] == 4 and found["ranks"] == []
    assert found["commits"]["step"] == found["step"] and "start the same command again" in screen(run)

    # Started again, and killed.
    job = start(jobs, run, *evaluations)
    jobs.wait_until(lambda: look(run)["state"] == "running" and look(run)["loss"]["last"], "the next start", DEADLINE)
    jobs.wait_until(lambda: [rank["step"] for rank in look(run)["ranks"]] != [None] * 2, "its steps", DEADLINE)
    assert look(run)["faults"]["restarts"] == 1 and "went on 1 time" in screen(run)
    job.kill()
    # Lines came every few milliseconds: after a minute it counts as dead; so it does for one that wrote a day ago.
    age(run)
    found = look(run)
    assert found["state"] == "silent" and found["exit_code"] == 5
    assert [rank["up"] for rank in found["ranks"]] == [False, False]
    assert "no sign of life" in screen(run) and "0 of 2 endpoints answer" in screen(run)

    # It goes on to its end while somebody watches.
    step = found["commits"]["step"]
    watching = jobs.start("watch", watch(run))
    watching.wait_for(r"\}$", DEADLINE)
    job = start(jobs, run, f"train.steps={step + 8}")
    job.succeed(DEADLINE)
    assert watching.wait(DEADLINE) == 0
    states = [json.loads(line)["state"] for line in watching.output.splitlines()]
    assert states[0] == "silent" and states[-1] == "finished" and set(states) <= {"silent", "running", "finished"}
    found = look(run)
    assert found["state"] == "finished" and found["step"] == step + 8 and found["exit_code"] == 0


def age(run: Run) -> None:
    """As if the run had written last a day ago."""
    status = run.folder / "status.json"
    content = json.loads(status.read_text())
    status.write_text(json.dumps(content | {"updated": "2020-01-01T00:00:00+00:00"}))
    for file in (status, run.folder / "metrics.jsonl"):
        os.utime(file, (1.6e9, 1.6e9))


def watch(run: Run) -> list[str]:
    return [sys.executable, "-m", "partial_fc", "status", str(run.folder), "--watch", "0.2", "--json"]


def test_a_run_that_failed_is_told_with_its_reason(tmp_path: Path, jobs: Jobs) -> None:
    run = Run(tmp_path, make_data(tmp_path / "data"), steps=1000, commit_every=5)
    # Too far a step, and no way back.
    job = start(jobs, run, "optim.learning_rate=1e30", "optim.warmup_steps=0", "train.nonfinite=stop")
    assert job.wait(DEADLINE) != 0
    found = look(run)
    assert found["state"] == "failed" and found["exit_code"] == 3 and "isn't finite" in found["reason"]
    assert found["reason"] in screen(run)
    done = subprocess.run(
        [sys.executable, "-m", "partial_fc", "status", str(run.folder)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 3 and done.stderr == "" and done.stdout.startswith("run  failed")
