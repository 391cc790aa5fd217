"""The harness of the fault tests: what it finds, waits for, shows and clears up. Jobs here are small, without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import JobFailed, Jobs, marked_processes

# An "agent" with two "workers", of which one has a helper of its own.
AGENT = """
import os, subprocess, sys, time
helper = "import subprocess, sys; subprocess.run(['sleep', '60'])"
for rank, code in enumerate([helper, "import time; time.sleep(60)"]):
    own = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    subprocess.Popen([sys.executable, "-c", code], env=own, start_new_session=True)
print("both are there", flush=True)
time.sleep(60)
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with Jobs(tmp_path) as opened:
        yield opened


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def alive(pid: int) -> bool:
    return any(process.pid == pid for process in marked_processes(""))


def test_workers_are_found_by_rank_and_outlive_their_agent_until_the_end(tmp_path: Path) -> None:
    with Jobs(tmp_path) as jobs:
        job = jobs.start("job", python(AGENT))
        jobs.wait_until(lambda: len(marked_processes(job.mark)) == 4, "agent, workers and helper", 20)
        workers = job.workers()
        assert set(workers) == {0, 1}
        job.signal(signal.SIGKILL)
        assert job.wait(10) == -signal.SIGKILL
        assert job.workers() == workers, "orphans are workers, too"
        os.kill(workers[1], signal.SIGKILL)
        jobs.wait_until(lambda: set(job.workers()) == {0}, "worker 1 to die", 10)
        helpers = [process.pid for process in marked_processes(job.mark)]
    assert len(helpers) == 2 and not any(alive(pid) for pid in helpers)


def test_a_kill_takes_one_job_and_its_orphans_only(jobs: Jobs) -> None:
    first, second = (jobs.start("job", python(AGENT)) for _ in range(2))
    assert (first.name, second.name) == ("job", "job-2")
    jobs.wait_until(lambda: len(first.workers()) == len(second.workers()) == 2, "the workers", 20)
    first.kill()
    assert not first.workers() and len(second.workers()) == 2 and second.returncode is None


def test_output_is_waited_for_by_line(jobs: Jobs) -> None:
    job = jobs.start("job", python("print('step 1'); print('step 22'); print('step 3')"))
    assert job.wait_for(r"^step (\d\d)$", 20)[1] == "22"
    assert job.wait_for(r"^step (\d)$", 20, start=len("step 1\n"))[1] == "3"
    assert job.succeed(20) == "step 1\nstep 22\nstep 3\n"


def test_what_ends_without_a_line_fails_at_once_and_shows_all_jobs(jobs: Jobs) -> None:
    other = jobs.start("other", python("print('I am fine')"))
    other.wait(20)
    job = jobs.start("job", python("import sys; print('no', file=sys.stderr); sys.exit(3)"))
    with pytest.raises(JobFailed, match=r"job ended \(3\) without 'yes'") as failed:
        job.wait_for("yes", 60)
    assert "  I am fine" in str(failed.value) and "  no" in str(failed.value)
    with pytest.raises(JobFailed, match="job ended with exit code 3"):
        job.succeed(20)


def test_a_wait_has_a_deadline(jobs: Jobs) -> None:
    job = jobs.start("job", python("import time; print('here'); time.sleep(60)"))
    job.wait_for("here", 20)
    with pytest.raises(JobFailed, match=r"waited 0 s for job to end\njob \(agent \d+, runs\):\n  here"):
        job.wait(0.1)


def test_a_job_inherits_no_rank(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    job = jobs.start("job", python("import os; print(sorted(os.environ))"), {"EXTRA": "1"})
    assert "'EXTRA'" in job.succeed(20) and "RANK'" not in job.output and "WORLD_SIZE" not in job.output


def test_a_guard_clears_up_after_a_killed_test_process(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from tests.jobs import Jobs
jobs = Jobs(Path({str(tmp_path)!r})).__enter__()
job = jobs.start("job", [sys.executable, "-c", {AGENT!r}])
job.wait_for("both are there", 30)
print(job.mark, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        mark = process.stdout.readline().strip()
        assert mark and marked_processes(mark)
        process.kill()
    deadline = time.monotonic() + 30
    while marked_processes(mark):
        assert time.monotonic() < deadline, "the guard left processes"
        time.sleep(0.05)
