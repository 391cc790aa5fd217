"""launch/slurm.sbatch on a real cluster of two nodes: what becomes of jobs that finish, fail, or have to make room."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import Jobs
from tests.nodes import INTERFACE
from tests.runs import Run, assert_same_losses, assert_same_weights
from tests.slurm import Cluster, cluster_or_skip

pytestmark = [pytest.mark.torchrun, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 200
DEADLINE = 150.0
# Found by Python itself. A job's first start is slow, so that it's hit in its middle.
SLOW = """
import os, time
if "LOCAL_RANK" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    from partial_fc.training_step import TrainingStep
    genuine = TrainingStep.run
    def run(self, *arguments, **named):
        time.sleep(0.3)
        return genuine(self, *arguments, **named)
    TrainingStep.run = run
"""
# A signal before anything handles it: Python reads this ahead of all else.
EARLY = """
import os, signal
if "SLURM_PROCID" in os.environ and "LOCAL_RANK" not in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_or_skip(2) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    """A run of two ranks from its beginning to its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder, data, steps=STEPS, commit_every=10 * STEPS)
    with Jobs(folder) as jobs:
        jobs.torchrun("undisturbed", *run.program).succeed(DEADLINE)
    return run


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Run:
    """What a job of the test trains: nothing is committed but at its end, and on a signal."""
    return Run(tmp_path, data, steps=STEPS, commit_every=10 * STEPS)


class Submitted:
    """The launcher's job, which fills both nodes, with a rank on each."""

    def __init__(self, cluster: Cluster, run: Run, *overrides: str, changed: str = "", array: bool = False) -> None:
        self._cluster, self._log = cluster, run.config.with_suffix(".log")
        changes = run.config.with_name("changes")
        changes.mkdir()
        (changes / "sitecustomize.py").write_text(changed, encoding="utf-8")
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(changes), os.environ.get("PYTHONPATH", "")]),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "RANKS": "1",
            "RESTARTS": "0",
        }
        options = ["--nodes", "2", "--exclusive", "--chdir", str(ROOT), "--output", str(self._log)]
        options += ["--array", "7"] if array else []
        self.number = cluster.submit(
            *options, "launch/slurm.sbatch", str(run.config), *overrides, environment=environment
        )

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def reaches(self, step: int) -> None:
        self._cluster.wait_until(
            lambda: re.search(rf"^step {step}/", self.output, re.MULTILINE), f"step {step}", DEADLINE
        )

    def becomes(self, state: str) -> dict[str, str]:
        try:
            return self._cluster.wait_for(self.number, state, DEADLINE)
        finally:
            print(self.output)


def assert_goes_on_and_finishes(job: Submitted, run: Run, undisturbed: Run) -> None:
    """Saved once, somewhere in its middle, queued again by the launcher, and then as if nothing had been."""
    known = job.becomes("COMPLETED")
    assert known["Restarts"] == "1" and known["ExitCode"] == "0:0"
    assert re.findall(r"^job \d+, start (\d) on ", job.output, re.MULTILINE) == ["1", "2"]
    (resumed,) = run.lines("resumed")
    assert 5 <= resumed["step"] < STEPS and resumed["world_size"] == 2
    assert run.status["state"] == "finished"
    assert_same_losses(run, undisturbed, relative=0)
    assert_same_weights(run, undisturbed)


def test_a_run_finishes(cluster: Cluster, run: Run, undisturbed: Run) -> None:
    known = Submitted(cluster, run).becomes("COMPLETED")
    assert known["ExitCode"] == "0:0" and known["Restarts"] == "0"
    assert run.status["state"] == "finished" and run.status["world_size"] == 2
    assert_same_losses(run, undisturbed, relative=0)


def test_a_run_that_fails_is_not_queued_again(cluster: Cluster, run: Run) -> None:
    job = Submitted(cluster, run, "head.scalee=3")
    known = job.becomes("FAILED")
    assert known["ExitCode"] == "1:0" and known["Restarts"] == "0"
    assert "error: override: head.scalee: unknown key; did you mean head.scale?" in job.output.splitlines()
    assert "Traceback" not in job.output


def test_a_signal_in_the_first_seconds_is_no_end_of_a_job_of_an_array(cluster: Cluster, run: Run) -> None:
    job = Submitted(cluster, run, changed=EARLY, array=True)
    known = job.becomes("COMPLETED")
    assert known["Restarts"] == "1" and known["ArrayTaskId"] == "7"
    assert re.findall(r"^job (\d+)_7, start (\d) on ", job.output, re.MULTILINE) == [
        (job.number, "1"),
        (job.number, "2"),
    ]
    assert run.status["state"] == "finished"


def test_a_run_that_is_preempted_goes_on_later(cluster: Cluster, run: Run, undisturbed: Run) -> None:
    job = Submitted(cluster, run, changed=SLOW)
    job.reaches(5)
    options = ["--partition", "high", "--nodes", "2", "--exclusive", "--output", "/dev/null"]
    other = cluster.submit(*options, "--wrap", "sleep 1")
    cluster.wait_for(other, "COMPLETED", DEADLINE)
    assert run.status["state"] == "resume", "it made room without being saved"
    assert_goes_on_and_finishes(job, run, undisturbed)


def test_a_run_that_is_out_of_time_goes_on_in_another_job_time(cluster: Cluster, run: Run, undisturbed: Run) -> None:
    job = Submitted(cluster, run, changed=SLOW)
    job.reaches(5)
    # Less than the 180 s ahead of the limit at which the launcher wants to be told.
    cluster.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=3")
    job.becomes("PENDING")
    assert run.status["state"] == "resume"
    cluster.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=UNLIMITED")
    assert_goes_on_and_finishes(job, run, undisturbed)


def test_a_run_that_is_cancelled_stays_away(cluster: Cluster, run: Run) -> None:
    job = Submitted(cluster, run, changed=SLOW)
    job.reaches(5)
    cluster.command("scancel", job.number)
    job.becomes("CANCELLED")
    cluster.wait_until(lambda: run.status["state"] == "resume", "the run to be saved", DEADLINE)
    cluster.wait_until(cluster.is_idle, "idle nodes", DEADLINE)
    known = cluster.job(job.number)
    assert known["JobState"] == "CANCELLED" and known["Restarts"] == "0"
    assert run.newest_commit() == run.status["step"] >= 5
