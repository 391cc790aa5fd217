"""A run whose ranks are killed again and again, at any moment, ends as if nothing had been."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.jobs import Job, Jobs, send
from tests.runs import Run, assert_same_losses, assert_same_weights, make_data

pytestmark = [pytest.mark.torchrun, pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 20
# A life of the workers gets 7 steps further on average: there is always something left to kill.
STEPS, COMMIT_EVERY, STEP_SECONDS = 320, 3, 0.03
DEADLINE = 120.0
SEED = 4


class Kill(NamedTuple):
    """One kill, with what was there just before it.

    Attributes:
        newest: step of the newest commit.
        resumed: how many times the run had gone on from a commit.
        saving: whether a commit was being written, before and after.
    """

    newest: int
    resumed: int
    saving: bool


def wait_for_new_workers(jobs: Jobs, job: Job, old: set[int]) -> dict[int, int]:
    """Worker ids by rank, once both ranks have another process than before."""
    found: dict[int, int] = {}

    def are_there() -> bool:
        found.clear()
        found.update(job.workers())
        return set(found) == {0, 1} and not old & set(found.values())

    jobs.wait_until(are_there, "new workers", DEADLINE)
    return found


def wait_for_moment(jobs: Jobs, job: Job, run: Run, choose: random.Random, left: set[str] | None) -> None:
    """Wait until the moment of the next kill: some time into the life of the workers, or in a save.

    Args:
        left: in a save, whose folder isn't one of these; None: anywhere.
    """
    if left is None and choose.random() < 0.3:
        # They import, join, read the data set, load the commit.
        time.sleep(choose.uniform(0, 6))
        return
    goal = run.newest_commit() + COMMIT_EVERY * choose.randint(1, 2)
    jobs.wait_until(lambda: run.newest_commit() >= goal or job.returncode is not None, "the next commits", DEADLINE)
    if left is not None:
        deadline = time.monotonic() + DEADLINE
        while not run.being_written() - left and time.monotonic() < deadline:
            time.sleep(0.0005)
    else:
        time.sleep(choose.uniform(0, 0.2))


def test_a_run_that_is_killed_twenty_times_ends_with_the_same_weights(jobs: Jobs, tmp_path: Path) -> None:
    data = make_data(tmp_path / "faces")
    undisturbed = Run(tmp_path / "undisturbed", data, steps=STEPS, commit_every=COMMIT_EVERY)
    jobs.torchrun("undisturbed", *undisturbed.program).succeed(DEADLINE)

    run = Run(tmp_path, data, steps=STEPS, commit_every=COMMIT_EVERY)
    choose = random.Random(SEED)
    job = jobs.torchrun(
        "chaos", *run.changed_program(step_seconds=STEP_SECONDS), options=["--max-restarts", str(KILLS + 10)]
    )
    in_save = [index < KILLS // 2 for index in range(KILLS)]
    choose.shuffle(in_save)
    kills: list[Kill] = []
    old: set[int] = set()
    left: set[str] = set()
    for in_this_save in in_save:
        workers = wait_for_new_workers(jobs, job, old)
        wait_for_moment(jobs, job, run, choose, left if in_this_save else None)
        # In this order: what goes on after the count was taken begins at this commit or a newer one.
        written, newest = run.being_written() - left, run.newest_commit()
        resumed = len(run.lines("resumed"))
        assert send(workers[choose.randrange(2)], signal.SIGKILL), f"no worker to kill\n{jobs.tails()}"
        left = run.being_written()
        kills.append(Kill(newest, resumed, bool(written & left)))
        old |= set(workers.values())
    job.succeed(DEADLINE)

    print(f"kills: {kills}")
    resumed_at = [line["step"] for line in run.lines("resumed")]
    print(f"went on from: {resumed_at}")
    for kill in kills:
        assert resumed_at[kill.resumed] >= kill.newest
    assert sum(kill.saving for kill in kills) >= KILLS / 4
    assert run.status["state"] == "finished"
    assert_same_losses(run, undisturbed, relative=0)
    assert_same_weights(run, undisturbed)
    run.assert_commits_usable()
