"""The launchers on one machine and on two, which are network namespaces, and the exit code that each ends with."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from partial_fc.run_status import OUTCOME, Status
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
    count = 0
    def run(self, *arguments, **named):
        global count
        count += 1
        time.sleep({seconds})
        return genuine(self, *arguments, **named)
    TrainingStep.run = run
"""


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Run:
    return Run(tmp_path, data, steps=STEPS, commit_every=10 * STEPS)


def slowly(folder: Path, seconds: str = "0.3") -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(SLOW.format(seconds=seconds), encoding="utf-8")
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
    assert job.output.count("the run in order, rank 0 names its last commit: start the same command again") == 1
    assert "Traceback" not in job.output
    assert run.status["state"] == "resume" and run.newest_commit() == run.status["step"] >= 5
    jobs.start("again", line, LOOPBACK).succeed(DEADLINE)
    assert run.status["state"] == "finished" and len(run.lines("resumed")) == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"])
def test_every_signal_saves(jobs: Jobs, run: Run, tmp_path: Path, name: str) -> None:
    # The tests themselves may be in a shell's background, where the first is ignored.
    default = ["env", f"--default-signal={name}"]
    line = [launcher("single_node.sh"), str(run.config)]
    job = jobs.start("launcher", line, {**LOOPBACK, **slowly(tmp_path)}, default)
    job.wait_for(r"^step 3/", DEADLINE)
    job.signal(signal.Signals[name])
    assert job.wait(DEADLINE) == UNFINISHED
    assert f"{name} ended the run in order" in job.output and "Traceback" not in job.output
    assert run.status["state"] == "resume" and run.newest_commit() == run.status["step"] >= 3


def test_a_signal_that_is_ignored_stays_so(jobs: Jobs, run: Run, tmp_path: Path) -> None:
    line = ["env", "--ignore-signal=SIGHUP", launcher("single_node.sh"), str(run.config)]
    job = jobs.start("launcher", line, {**LOOPBACK, **slowly(tmp_path)})
    job.wait_for(r"^step 3/", DEADLINE)
    job.signal(signal.SIGHUP)
    job.succeed(DEADLINE)
    assert run.status["state"] == "finished"


def test_a_second_signal_ends_at_once(jobs: Jobs, run: Run, tmp_path: Path) -> None:
    changes = {**LOOPBACK, **slowly(tmp_path, "1000 if count > 3 else 0.3")}
    job = jobs.start("launcher", [launcher("single_node.sh"), str(run.config)], changes)
    job.wait_for(r"^step 3/", DEADLINE)
    job.signal(signal.SIGTERM)
    job.wait_for(r"SIGTERM: the run is saved after this step", DEADLINE)
    job.signal(signal.SIGUSR1)
    job.wait_for("SIGUSR1: the second signal: the ranks end at once", DEADLINE)
    assert job.wait(DEADLINE) == UNFINISHED
    assert "SIGTERM ended the run before it was saved" in job.output and run.status["state"] == "running"
    assert not job.workers()


def test_another_program_on_the_port(jobs: Jobs, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        # It accepts, and never says a word: the agent's main thread waits in C++ for an answer.
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        code = "import partial_fc.agent as agent; agent._PATIENCE_SECONDS = 1; agent.main()"
        line = [sys.executable, "-c", code, "--nnodes", "2", "--rdzv-endpoint", endpoint, *run.program]
        job = jobs.start("agent", line, LOOPBACK)
        job.wait_for(f"waits for the rendezvous at {endpoint}", DEADLINE)
        job.signal(signal.SIGTERM)
        assert job.wait(DEADLINE) == UNFINISHED
    assert "SIGTERM ended the run" in job.output and "Traceback" not in job.output


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


@pytest.mark.parametrize("state", ["running", ""])
def test_processes_that_end_in_order_have_not_finished_by_that(jobs: Jobs, tmp_path: Path, state: str) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(f"import os; open(os.environ['PARTIAL_FC_OUTCOME'], 'w').write({state!r})", encoding="utf-8")
    line = [sys.executable, "-m", "partial_fc.agent", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    job = jobs.start("agent", [*line, "--nproc-per-node", "1", str(worker)], LOOPBACK)
    assert job.wait(DEADLINE) == 1
    assert f"but the run's state is {state or 'unknown'!r}, expected 'finished'" in job.output


def test_the_state_is_told_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "outcome"
    told.write_text("running\n", encoding="utf-8")
    monkeypatch.setenv(OUTCOME, str(told))
    status = Status(tmp_path, active=False, tells=True)
    with monkeypatch.context() as full:
        # A full disk creates files, and writes nothing into them.
        full.setattr(Path, "write_text", _no_space)
        status.tell("resume")
    assert told.read_text(encoding="utf-8") == "running\n"
    status.tell("resume")
    assert told.read_text(encoding="utf-8") == "resume\n"


def _no_space(path: Path, *_: object, **__: object) -> None:
    path.open("w").close()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_dead_are_no_children() -> None:
    code = "import os, time; from partial_fc.agent import _children as living; none = living()\n"
    code += "r, w = os.pipe(); child = os.fork()\n"
    code += "if not child: os.close(w); os.read(r, 1); os._exit(0)\n"
    code += "one = living(); os.close(w); os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)\n"
    code += "print(none, one == [child], living())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=DEADLINE)
    assert done.stdout.split() == ["[]", "True", "[]"]


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
        (["configs/demo.yml"], {"NODES": "2"}, "error: the first argument is 'configs/demo.yml', expected the host"),
        (["--help"], {"NODES": "2"}, "error: the first argument is '--help', expected the host"),
        (["node0"], {"NODES": "2"}, "error: no configuration is given"),
        (["node0", "configs/demo.yaml"], {"NODES": ""}, "error: NODES is '', expected the number of machines"),
        (["node0", "configs/demo.yaml"], {"NODES": "2-4"}, "error: NODES is '2-4', expected the number of machines"),
        (["node0", "configs/demo.yaml"], {"NODES": "2", "PORT": "x"}, "error: PORT is 'x', expected the number"),
        (
            ["node0", "configs/demo.yaml"],
            {"NODES": "2", "PORT": "99999"},
            "error: PORT is '99999', expected the number",
        ),
        (["node0", "configs/demo.yaml"], {"NODES": "4:2"}, "error: --nnodes is '4:2', expected a number of machines"),
        (["node0", "configs/demo.yaml"], {"NODES": "2", "RANKS": "abc"}, "error: --nproc-per-node (RANKS) is 'abc'"),
        (["node0", "configs/demo.yaml"], {"NODES": "2", "RANKS": "0"}, "error: --nproc-per-node (RANKS) is '0'"),
        (["node0", "configs/demo.yaml"], {"NODES": "2", "RESTARTS": "-1"}, "error: --max-restarts (RESTARTS) is -1"),
        (
            ["node..0", "configs/demo.yaml"],
            {"NODES": "2"},
            "error: --rdzv-endpoint is node..0:29500, expected HOST:PORT",
        ),
    ],
)
def test_what_several_machines_have_to_be_told(words: list[str], changes: dict[str, str], expected: str) -> None:
    done = subprocess.run(
        [launcher("multi_node.sh"), *words],
        env={**os.environ, **ENVIRONMENT, **changes},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["single_node.sh", "slurm.sbatch"])
def test_a_configuration_is_needed(name: str) -> None:
    done = subprocess.run([launcher(name)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no configuration is given: ") and name in done.stderr


@pytest.mark.parametrize("given", [None, "join_timeout=7", "join_timeout=7,last_call_timeout=9"])
def test_the_rendezvous_keeps_what_it_is_told(given: str | None) -> None:
    code = "import sys; from torch.distributed import run; run.run = lambda s: print(s.rdzv_conf); "
    code += "from partial_fc import agent; agent.main(['--rdzv-endpoint', '127.0.0.1:0', 'x.py'])"
    environment = {key: value for key, value in os.environ.items() if key != "PET_RDZV_CONF"}
    environment |= {} if given is None else {"PET_RDZV_CONF": given}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=DEADLINE
    )
    told = dict(pair.split("=") for pair in done.stdout.strip().split(","))
    assert told == {"last_call_timeout": "5", **dict(pair.split("=") for pair in (given or "").split(",") if pair)}


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

    @pytest.mark.parametrize("told", [0, 1])
    def test_one_that_starts_again_at_once(
        self, jobs: Jobs, nodes: list[Node], run: Run, tmp_path: Path, told: int
    ) -> None:
        """As under a supervisor: the other's agent isn't gone yet, and its rendezvous neither."""
        changes = {"NODES": "2", "RANKS": "1", **slowly(tmp_path)}
        first = self.start(jobs, nodes, run, **changes)
        jobs.wait_until(lambda: run.lines("train"), "training", DEADLINE)
        first[told].signal(signal.SIGTERM)
        line = [launcher("multi_node.sh"), nodes[0].host, str(run.config)]
        again: dict[int, Job] = {}
        for index in (told, 1 - told):
            assert first[index].wait(DEADLINE) == UNFINISHED
            node = nodes[index]
            again[index] = jobs.start(
                f"{node.host}-again", line, {**ENVIRONMENT, **node.environment, **changes}, node.command
            )
        for job in again.values():
            job.succeed(DEADLINE)
        assert run.status["state"] == "finished" and len(run.lines("resumed")) == 1

    def test_the_machine_of_the_rendezvous_leaves(
        self, jobs: Jobs, nodes: list[Node], run: Run, tmp_path: Path
    ) -> None:
        changes = {"NODES": "2", "RANKS": "1", "RESTARTS": "1", **slowly(tmp_path)}
        head, other = self.start(jobs, nodes, run, **changes)
        jobs.wait_until(lambda: run.lines("train"), "training", DEADLINE)
        head.kill()
        assert other.wait(DEADLINE) == 1
        assert (
            f"error: the rendezvous {nodes[0].host}:29500 is gone" in other.output
            and "no rendezvous" not in other.output
        )

    def test_nobody_is_there(self, jobs: Jobs, nodes: list[Node], run: Run) -> None:
        line = [launcher("multi_node.sh"), nodes[0].host, str(run.config)]
        changes = {**ENVIRONMENT, **nodes[1].environment, "NODES": "2", "PET_RDZV_CONF": "read_timeout=3"}
        job = jobs.start("alone", line, changes, nodes[1].command)
        assert job.wait(DEADLINE) == 1
        assert f"error: no rendezvous at {nodes[0].host}:29500" in job.output and "Traceback" not in job.output
