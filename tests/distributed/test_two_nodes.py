"""Two nodes, a network between them that fails, and a node that is lost. The nodes are network namespaces."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.jobs import Job, Jobs
from tests.nodes import Node, nodes_or_skip
from tests.runs import CLASSES, Run, assert_same_losses, assert_same_weights

pytestmark = [pytest.mark.torchrun, pytest.mark.slow, pytest.mark.timeout(500)]

STEPS, COMMIT_EVERY = 120, 4
DEADLINE = 180.0
TIMEOUT_SECONDS = 10.0  # of a collective
# The survivor of two nodes waits so long for the other to come back, 30 s by default, then goes on alone.
LAST_CALL_SECONDS = 5
STORE_PORT = 29500  # in a namespace of its own


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    with nodes_or_skip(2) as made:
        yield made


@pytest.fixture
def jobs(tmp_path: Path, nodes: list[Node]) -> Iterator[Jobs]:
    # After the nodes, so that the processes on them end before they are taken down.
    with Jobs(tmp_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def without_batch_statistics(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    """A run of two ranks from its beginning to its end, whose losses don't depend on the number of ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder, data, steps=STEPS, commit_every=COMMIT_EVERY)
    with Jobs(folder) as jobs:
        jobs.torchrun("undisturbed", *run.changed_program(batch_statistics=False)).succeed(DEADLINE)
    return run


def start_agent(jobs: Jobs, node: Node, store: Node, nnodes: str, program: Sequence[str]) -> Job:
    """torchrun on a node, with one worker."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nnodes, "--nproc-per-node", "1"]
    command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{store.host}:{STORE_PORT}"]
    command += ["--rdzv-id", "run", "--rdzv-conf", f"last_call_timeout={LAST_CALL_SECONDS}"]
    command += ["--local-addr", node.address]
    return jobs.start(node.host, [*command, *program], node.environment, node.command)


def start_agents(jobs: Jobs, nodes: list[Node], nnodes: str, program: Sequence[str]) -> list[Job]:
    return [start_agent(jobs, node, nodes[0], nnodes, program) for node in nodes]


def wait_for_commit(jobs: Jobs, run: Run, step: int) -> None:
    jobs.wait_until(lambda: run.newest_commit() >= step, f"a commit of step {step}", DEADLINE)


def test_a_link_that_is_cut_and_comes_back(jobs: Jobs, nodes: list[Node], tmp_path: Path, data: Path) -> None:
    """The ranks fail by the timeout of a collective, torchrun restarts them, and the weights are as without the cut."""
    undisturbed = Run(tmp_path / "undisturbed", data, steps=STEPS, commit_every=COMMIT_EVERY)
    jobs.torchrun("undisturbed", *undisturbed.program).succeed(DEADLINE)
    run = Run(tmp_path, data, steps=STEPS, commit_every=COMMIT_EVERY, timeout_seconds=TIMEOUT_SECONDS)
    agents = start_agents(jobs, nodes, "2", run.changed_program(step_seconds=0.05))
    wait_for_commit(jobs, run, 2 * COMMIT_EVERY)
    nodes[1].unplug()
    cut_at = time.monotonic()
    for agent in agents:
        agent.wait_for(rf"another rank is gone .*[Tt]imed out waiting {TIMEOUT_SECONDS * 1000:.0f}ms", DEADLINE)
        print(f"{agent.name} failed {time.monotonic() - cut_at:.1f} s after the cut")
    assert run.newest_commit() < STEPS and not run.lines("resumed")
    nodes[1].plug()
    for agent in agents:
        agent.succeed(DEADLINE)
    resumed = run.lines("resumed")
    assert resumed and all(line["world_size"] == 2 for line in resumed)
    assert run.status["state"] == "finished"
    assert_same_losses(run, undisturbed, relative=0)
    assert_same_weights(run, undisturbed)


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_lost_node(
    jobs: Jobs, nodes: list[Node], tmp_path: Path, data: Path, without_batch_statistics: Run, comes_back: bool
) -> None:
    """Of one to two nodes the other goes on alone, with all classes, until the lost one comes back."""
    run = Run(tmp_path, data, steps=STEPS, commit_every=COMMIT_EVERY, timeout_seconds=TIMEOUT_SECONDS)
    # Slow enough for a node that starts late to find something left to do.
    program = run.changed_program(step_seconds=0.3 if comes_back else 0.1, batch_statistics=False)
    agents = start_agents(jobs, nodes, "1:2", program)
    # The nodes are there together: as one of them may have been early, that is not always the first attempt.
    jobs.wait_until(lambda: run.lines("train") and run.status["world_size"] == 2, "training on two nodes", DEADLINE)
    wait_for_commit(jobs, run, run.newest_commit() + COMMIT_EVERY)
    # As by a loss of power: nothing is told to the other.
    nodes[1].unplug()
    agents[1].kill()
    lost_at = time.monotonic()
    alone = [0]

    def goes_on_alone() -> bool:
        alone[0] = len(run.lines("resumed"))
        return bool(alone[0]) and run.lines("resumed")[-1]["world_size"] == 1

    jobs.wait_until(goes_on_alone, "the other node to go on alone", DEADLINE)
    print(f"alone {time.monotonic() - lost_at:.1f} s after the loss")
    if comes_back:
        nodes[1].plug()
        agents[1] = start_agent(jobs, nodes[1], nodes[0], "1:2", program)
        agents[1].succeed(DEADLINE)
    agents[0].succeed(DEADLINE)
    worlds = [line["world_size"] for line in run.lines("resumed")[alone[0] - 1 :]]
    assert worlds == ([1, 2] if comes_back else [1])
    assert run.status["state"] == "finished"
    assert run.weights()["head.weight"].shape == (CLASSES, 16)
    assert_same_losses(run, without_batch_statistics, relative=1e-5)
