"""Which folder a start uses and what it goes on from; what two configurations differ in; the status."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from partial_fc import run_folder, run_status
from partial_fc.build import Place
from partial_fc.checkpoint import begin, seal
from partial_fc.config import Config, load_config
from partial_fc.errors import CheckpointError, PartialFCError
from partial_fc.run_folder import Start, differences, open_run_folder
from partial_fc.run_status import Status

PLACE = Place(0, 1, 0, torch.device("cpu"))


def configured(folder: Path, **train: Any) -> Config:
    path = folder / "tiny.yaml"
    path.write_text(f"data: {{path: x}}\ntrain: {{steps: 10, run_dir: {json.dumps(str(folder / 'runs'))}}}\n")
    return load_config(path, [f"train.{key}={json.dumps(value)}" for key, value in train.items()])


def commit(run: Path, step: int) -> Path:
    info = {"step": step, "samples": 8 * step, "num_classes": 5, "embedding_size": 2, "contents": [], "format": 1}
    return seal(begin(run / "checkpoints", step), info, {})


def opened(config: Config) -> Start:
    """A start, whose process ends then."""
    start = open_run_folder(config, PLACE)
    assert start.lock is not None or start.finished
    if start.lock is not None:
        start.lock.close()
    return start


def ended(start: Start, state: str) -> None:
    start.status.write(state, 4, reason="why")


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets which agent starts the processes of this test from then on."""

    def set_agent(name: str) -> None:
        monkeypatch.setattr(run_folder, "this_agent", lambda: name)

    return set_agent


def test_auto_goes_on_with_what_is_unfinished_and_begins_anew_after_what_is_finished(tmp_path: Path) -> None:
    config = configured(tmp_path)
    first = opened(config)
    assert (first.folder, first.commit, first.resumes) == (tmp_path / "runs" / "tiny", None, False)
    assert load_config(first.folder / "config.yaml") == config
    for state in ("running", "resume"):
        ended(first, state)
        assert opened(config)[:3] == (first.folder, None, True)
    commit(first.folder, 3)
    commit(first.folder, 4)
    for state in ("running", "failed"):
        ended(first, state)
        again = opened(config)
        assert again.commit is not None and again.commit.step == 4 and again.resumes
    ended(first, "finished")
    assert opened(config)[:3] == (tmp_path / "runs" / "tiny-2", None, False)
    assert opened(config)[:3] == (tmp_path / "runs" / "tiny-2", None, True), "the highest number counts"


def test_a_start_that_failed_before_its_first_commit_leaves_nothing_to_go_on_with(tmp_path: Path) -> None:
    config = configured(tmp_path)
    first = opened(config)
    commit(first.folder, 3)
    with pytest.raises(CheckpointError, match="no usable commit is there"):
        opened(configured(tmp_path, resume=str(tmp_path / "nowhere")))
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["tiny"]
    misfit = opened(configured(tmp_path, resume=str(first.folder)))
    ended(misfit, "failed")
    assert misfit.folder.name == "tiny-2" and opened(config).folder == first.folder


def test_folders_of_other_runs_are_left_alone(tmp_path: Path) -> None:
    for name in ("tiny-x", "tiny-02", "tinyx", "tiny-3"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    other = opened(configured(tmp_path, name="tiny-50"))
    commit(other.folder, 5)
    start = opened(configured(tmp_path))
    assert start.folder.name == "tiny" and start.commit is None
    assert opened(configured(tmp_path, name="tiny-50")).folder == other.folder


def test_never_begins_a_new_run_but_for_a_restart_of_its_own_job(tmp_path: Path, agent: Callable[[str], None]) -> None:
    config = configured(tmp_path, resume="never")
    agent("node-a:7:99")
    first = opened(config)
    assert opened(config).folder == first.folder
    agent("node-a:7:123")
    second = opened(config)
    assert second.folder.name == "tiny-2", "the same process id, another process"
    ended(second, "resume")
    agent("node-b:8:1")
    assert opened(config).folder.name == "tiny-3"


def test_without_torchrun_never_always_begins_anew(tmp_path: Path) -> None:
    config = configured(tmp_path, resume="never")
    assert [opened(config).folder.name for _ in range(2)] == ["tiny", "tiny-2"]


@pytest.mark.parametrize("named", ["run", "checkpoints", "commit"])
def test_a_folder_is_where_a_new_run_begins_and_its_own_commits_come_first_later(tmp_path: Path, named: str) -> None:
    other = tmp_path / "elsewhere"
    (other / "checkpoints").mkdir(parents=True)
    commit(other, 5)
    newest = commit(other, 7)
    origin = {"run": other, "checkpoints": other / "checkpoints", "commit": newest}[named]
    config = configured(tmp_path, resume=str(origin))
    start = opened(config)
    assert start.commit is not None and start.commit.step == 7 and not start.resumes
    assert opened(config).resumes, "a restart before the first commit goes on in its folder"
    commit(start.folder, 8)
    again = opened(config)
    assert again.commit is not None and again.commit.folder == start.folder / "checkpoints" / "step-00000008"


def test_a_commit_that_cannot_be_used_is_named_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(tmp_path)
    run = opened(config).folder
    commit(run, 3)
    newest = commit(run, 4)
    (newest / "run.json").write_text("{")
    start = opened(config)
    assert start.commit is not None and start.commit.step == 3
    assert "step-00000004" in caplog.text and "run.json" in caplog.text and "the one before it is" in caplog.text
    (run / "checkpoints" / "step-00000003" / "commit.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 commits"):
        opened(config)
    assert "there is none before it" in caplog.text


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_failed_is_not_tried_again_by_a_restart(
    tmp_path: Path, agent: Callable[[str], None], resume: str
) -> None:
    config = configured(tmp_path, resume=resume)
    agent("node-a:7:99")
    start = opened(config)
    ended(start, "failed")
    with pytest.raises(PartialFCError, match="failed before this restart: why"):
        opened(config)
    agent("node-a:8:100")
    assert opened(config).commit is None, "a person starts it again"


def test_a_restart_after_the_end_trains_nothing(tmp_path: Path, agent: Callable[[str], None]) -> None:
    config = configured(tmp_path)
    agent("node-a:7:99")
    start = opened(config)
    ended(start, "finished")
    again = opened(config)
    assert again.finished and again.folder == start.folder
    agent("node-a:8:100")
    assert not opened(config).finished


def test_a_folder_that_another_job_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_status, "_LOCK_SECONDS", 0.1)
    config = configured(tmp_path)
    first = open_run_folder(config, PLACE)
    with pytest.raises(PartialFCError, match=rf"another job writes this run \(host .*, pid {os.getpid()}\)"):
        open_run_folder(config, PLACE)
    assert first.lock is not None
    first.lock.close()
    opened(config)


def test_an_agent_is_named_by_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert run_status.this_agent() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    name = run_status.this_agent()
    assert name is not None and name == run_status.this_agent() and f":{os.getppid()}:" in name


def test_differences_are_a_line_a_key() -> None:
    before = {"optim": {"learning_rate": 0.1, "gone": 1}, "head": {"margin": {"m": 0.3}}, "train": {"log_every": 5}}
    after = {"optim": {"learning_rate": 0.2}, "head": {"margin": {"m": 0.4}}, "train": {"log_every": 9}, "data": {}}
    assert differences(before, after) == [
        "optim.learning_rate was 0.1, is 0.2",
        "head.margin.m was 0.3, is 0.4",
    ]


def test_a_status_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    status = Status(tmp_path / "gone", active=True)
    status.write("running", 1)
    assert "status.json can't be written" in caplog.text
    other = Status(tmp_path, active=False)
    other.write("running", 1)
    assert list(tmp_path.iterdir()) == []
