"""The launchers on one machine and on two, which are network namespaces, and the exit code that each ends with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import Job, Jobs, send
from tests.needs import need_programs
from tests.nodes import Node, nodes_or_skip
from tests.runs import Run, assert_same_losses

pytestmark = [pytest.mark.torchrun, pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
DEADLINE = 150.0
UNFINISHED, FAILED = 75, 70
# The launchers call `python`, wherever that is; they work in any folder where the package is installed.
ENVIRONMENT = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
LOOPBACK = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"}
# A run that is slow enough to be hit in its middle: Python finds this file by itself.
SLOW = """
import os, time
if "LOCAL_RANK" in os.environ:
    from partial_fc.training_step import TrainingStep
    genuine = TrainingStep.run
    def run(self, *arguments, **named):
        time.sleep(0.3)
        return genuine(self, *arguments, **named)
    TrainingStep.run = run
"""


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Run:
    return Run(tmp_path, data, steps=STEPS, commit_every=10 * STEPS)


def slowly(folder: Path) -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(SLOW, encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def launcher(name: str) -> str:
    return str(ROOT / "launch" / name)


def scripts() -> list[Path]:
    # By their first line: an sbatch file and .ci/run have no ending.
    places = [path for folder in ("launch", "docker", ".ci") for path in sorted((ROOT / folder).rglob("*"))]
    return [path for path in places if path.is_file() and path.open("rb").readline().startswith(b"#!") and _shell(path)]


def _shell(path: Path) -> bool:
    return path.open("rb").readline().split(b"/")[-1].split()[-1] in (b"sh", b"bash")


def test_shellcheck_has_nothing_to_say() -> None:
    need_programs("shellcheck", "shellcheck")
    found = scripts()
    assert {"single_node.sh", "multi_node.sh", "slurm.sbatch", "run"} <= {path.name for path in found}
    done = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, found)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in found if not os.access(path, os.X_OK)] == []


def test_one_machine(jobs: Jobs, run: Run) -> None:
    job = jobs.start("launcher", [launcher("single_node.sh"), str(run.config)], LOOPBACK)
    job.succeed(DEADLINE)
    assert run.status["state"] == "finished" and run.status["world_size"] == 2
    assert "Traceback" not in job.output and "OMP_NUM_THREADS" not in job.output


@pytest.mark.parametrize("target", ["launcher", "worker"])
def test_a_signal_ends_one_machine_with_75_and_the_same_line_goes_on(
    jobs: Jobs, run: Run, tmp_path: Path, target: str
) -> None:
    line = [launcher("single_node.sh"), str(run.config)]
    job = jobs.start("launcher", line, {**LOOPBACK, **slowly(tmp_path)})
    job.wait_for(r"^step 5/", DEADLINE)
    send(job.pid if target == "launcher" else job.workers()[1], signal.SIGTERM)
    assert job.wait(DEADLINE) == UNFINISHED
    assert job.output.count("the run, it's saved: start the same command again to go on") == 1
    assert "Traceback" not in job.output
    assert run.status["state"] == "resume" and run.newest_commit() == run.status["step"] >= 5
    jobs.start("again", line, LOOPBACK).succeed(DEADLINE)
    assert run.status["state"] == "finished" and len(run.lines("resumed")) == 1


def test_a_signal_before_the_ranks_are_there_is_no_failure(jobs: Jobs, run: Run) -> None:
    # Waits for a second machine that doesn't come.
    line = [sys.executable, "-m", "partial_fc.agent", "--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:0"]
    job = jobs.start("agent", [*line, *run.program], LOOPBACK)
    jobs.wait_until(lambda: _catches(job.pid, signal.SIGUSR1), "the agent to catch SIGUSR1", DEADLINE)
    job.signal(signal.SIGUSR1)
    assert job.wait(DEADLINE) == UNFINISHED
    assert "SIGUSR1 ended the run" in job.output and "Traceback" not in job.output


def _catches(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")]
    return bool(caught >> (number - 1) & 1)


def test_a_failure_is_one(jobs: Jobs, run: Run) -> None:
    changes = {**LOOPBACK, "RESTARTS": "0"}
    job = jobs.start("launcher", [launcher("single_node.sh"), str(run.config), "head.scalee=3"], changes)
    assert job.wait(DEADLINE) == 1
    assert "error: override: head.scalee: unknown key; did you mean head.scale?" in job.output.splitlines()
    assert "Traceback" not in job.output


def test_a_run_that_failed_for_good_says_so(jobs: Jobs, run: Run) -> None:
    changes = {**LOOPBACK, "RESTARTS": "1"}
    job = jobs.start("launcher", [launcher("single_node.sh"), str(run.config), "optim.learning_rate=1e30"], changes)
    assert job.wait(DEADLINE) == FAILED
    assert run.status["state"] == "failed" and "finite" in run.status["reason"]


def test_a_killed_worker_is_named(jobs: Jobs, run: Run, tmp_path: Path) -> None:
    changes = {**LOOPBACK, **slowly(tmp_path), "RESTARTS": "0"}
    job = jobs.start("launcher", [launcher("single_node.sh"), str(run.config)], changes)
    job.wait_for(r"^step 3/", DEADLINE)
    worker = job.workers()[1]
    send(worker, signal.SIGKILL)
    assert job.wait(DEADLINE) == 128 + signal.SIGKILL
    assert f"error: rank 1 (pid {worker}) ended first, by SIGKILL" in job.output
    assert run.status["state"] == "running"


@pytest.mark.parametrize(
    ("words", "changes", "expected"),
    [
        ([], {"NODES": "2"}, "error: the first argument is '', expected the host name or address"),
        (["configs/demo.yaml"], {"NODES": "2"}, "error: the first argument is 'configs/demo.yaml', expected the host"),
        (["node0"], {"NODES": "2"}, "error: no configuration is given"),
        (["node0", "configs/demo.yaml"], {"NODES": ""}, "error: NODES is '', expected the number of machines"),
        (["node0", "configs/demo.yaml"], {"NODES": "2-4"}, "error: NODES is '2-4', expected the number of machines"),
        (["node0", "configs/demo.yaml"], {"NODES": "2", "PORT": "x"}, "error: PORT is 'x', expected the number"),
    ],
)
def test_what_several_machines_have_to_be_told(words: list[str], changes: dict[str, str], expected: str) -> None:
    done = subprocess.run(
        [launcher("multi_node.sh"), *words],
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1


class TestTwoMachines:
    @pytest.fixture
    def nodes(self) -> Iterator[list[Node]]:
        with nodes_or_skip(2) as made:
            yield made

    @pytest.fixture
    def jobs(self, tmp_path: Path, nodes: list[Node]) -> Iterator[Jobs]:
        # After the nodes, so that the processes on them end before they are taken down.
        with Jobs(tmp_path) as opened:
            yield opened

    def start(self, jobs: Jobs, nodes: list[Node], run: Run, **changes: str) -> list[Job]:
        line = [launcher("multi_node.sh"), nodes[0].host, str(run.config)]
        return [
            jobs.start(node.host, line, {**ENVIRONMENT, **node.environment, **changes}, node.command) for node in nodes
        ]

    def test_they_train_together(self, jobs: Jobs, nodes: list[Node], run: Run, tmp_path: Path, data: Path) -> None:
        alone = Run(tmp_path, data, name="alone", steps=STEPS, commit_every=10 * STEPS)
        jobs.torchrun("alone", *alone.program).succeed(DEADLINE)
        for job in self.start(jobs, nodes, run, NODES="2", RANKS="1"):
            job.succeed(DEADLINE)
        assert run.status["state"] == "finished" and run.status["world_size"] == 2
        assert_same_losses(run, alone, relative=0)

    def test_a_signal_to_one_is_told_by_all(self, jobs: Jobs, nodes: list[Node], run: Run, tmp_path: Path) -> None:
        started = self.start(jobs, nodes, run, NODES="1:2", RANKS="1", **slowly(tmp_path))
        jobs.wait_until(
            lambda: run.lines("train") and run.status["world_size"] == 2, "training on two machines", DEADLINE
        )
        started[1].signal(signal.SIGTERM)
        assert [job.wait(DEADLINE) for job in started] == [UNFINISHED, UNFINISHED]
        assert run.status["state"] == "resume" and run.newest_commit() == run.status["step"] > 0
        for job in self.start(jobs, nodes, run, NODES="2", RANKS="1"):
            job.succeed(DEADLINE)
        assert run.status["state"] == "finished"

    def test_nobody_is_there(self, jobs: Jobs, nodes: list[Node], run: Run) -> None:
        line = [launcher("multi_node.sh"), nodes[0].host, str(run.config)]
        changes = {**ENVIRONMENT, **nodes[1].environment, "NODES": "2", "PET_RDZV_CONF": "read_timeout=3"}
        job = jobs.start("alone", line, changes, nodes[1].command)
        assert job.wait(DEADLINE) == 1
        assert f"error: no rendezvous at {nodes[0].host}:29500" in job.output and "Traceback" not in job.output
