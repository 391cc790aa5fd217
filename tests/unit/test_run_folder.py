"""Which folder a start uses and what it goes on from; what two configurations differ in; the status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from partial_fc.build import Place
from partial_fc.checkpoint import begin, seal
from partial_fc.config import Config, load_config
from partial_fc.errors import CheckpointError, PartialFCError
from partial_fc.run_folder import Status, differences, open_run_folder

PLACE = Place(0, 1, 0, torch.device("cpu"))


def configured(folder: Path, **train: Any) -> Config:
    path = folder / "tiny.yaml"
    path.write_text(f"data: {{path: x}}\ntrain: {{steps: 10, run_dir: {json.dumps(str(folder / 'runs'))}}}\n")
    return load_config(path, [f"train.{key}={json.dumps(value)}" for key, value in train.items()])


def commit(run: Path, step: int) -> Path:
    info = {"step": step, "samples": 8 * step, "num_classes": 5, "embedding_size": 2, "contents": [], "format": 1}
    return seal(begin(run / "checkpoints", step), info, {})


def ended(run: Path, state: str, origin: str = "auto") -> None:
    Status(run, 10, origin, active=True).write(state, 4, reason="why")


def test_auto_goes_on_with_what_is_unfinished_and_begins_anew_after_what_is_finished(tmp_path: Path) -> None:
    config = configured(tmp_path)
    first = open_run_folder(config, PLACE)
    assert first == (tmp_path / "runs" / "tiny", None, False)
    assert load_config(first.folder / "config.yaml") == config
    for state in ("running", "resume", "failed"):
        ended(first.folder, state)
        assert open_run_folder(config, PLACE) == (first.folder, None, True)
    commit(first.folder, 3)
    commit(first.folder, 4)
    again = open_run_folder(config, PLACE)
    assert again.commit is not None and again.commit.step == 4 and again.resumes
    ended(first.folder, "finished")
    assert open_run_folder(config, PLACE) == (tmp_path / "runs" / "tiny-2", None, False)
    assert open_run_folder(config, PLACE) == (tmp_path / "runs" / "tiny-2", None, True), "the highest number counts"


def test_folders_of_other_names_are_left_alone(tmp_path: Path) -> None:
    for name in ("tiny-x", "tiny-02", "tinyx", "tiny-3"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    # Only a folder with a configuration is a run's.
    assert open_run_folder(configured(tmp_path), PLACE).folder.name == "tiny"


def test_never_begins_a_new_run_but_for_a_restart_of_its_own_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, resume="never")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    first = open_run_folder(config, PLACE).folder
    ended(first, "running", "never")
    assert open_run_folder(config, PLACE).folder == first
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-8")
    second = open_run_folder(config, PLACE).folder
    assert second.name == "tiny-2"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    ended(second, "running", "never")
    assert open_run_folder(config, PLACE).folder.name == "tiny-3"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    ended(tmp_path / "runs" / "tiny-3", "running", "never")
    assert open_run_folder(config, PLACE).folder.name == "tiny-3"


@pytest.mark.parametrize("named", ["run", "checkpoints", "commit"])
def test_a_folder_is_where_a_new_run_begins_and_its_own_commits_come_first_later(tmp_path: Path, named: str) -> None:
    other = tmp_path / "elsewhere"
    (other / "checkpoints").mkdir(parents=True)
    commit(other, 5)
    newest = commit(other, 7)
    origin = {"run": other, "checkpoints": other / "checkpoints", "commit": newest}[named]
    config = configured(tmp_path, resume=str(origin))
    start = open_run_folder(config, PLACE)
    assert start.commit is not None and start.commit.step == 7 and not start.resumes
    ended(start.folder, "running", str(origin))
    assert open_run_folder(config, PLACE)[2], "a restart before the first commit goes on in its folder"
    commit(start.folder, 8)
    again = open_run_folder(config, PLACE)
    assert again.commit is not None and again.commit.folder == start.folder / "checkpoints" / "step-00000008"


def test_a_folder_without_a_commit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"train.resume is '.*nowhere', and no usable commit is there: expected auto"
    ):
        open_run_folder(configured(tmp_path, resume=str(tmp_path / "nowhere")), PLACE)


def test_a_commit_that_cannot_be_used_is_named_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(tmp_path)
    run = open_run_folder(config, PLACE).folder
    commit(run, 3)
    newest = commit(run, 4)
    (newest / "run.json").write_text("{")
    start = open_run_folder(config, PLACE)
    assert start.commit is not None and start.commit.step == 3
    assert "step-00000004" in caplog.text and "run.json" in caplog.text and "the one before it is" in caplog.text
    (run / "checkpoints" / "step-00000003" / "commit.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 commits"):
        open_run_folder(config, PLACE)


def test_a_run_that_failed_is_not_tried_again_by_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    run = open_run_folder(config, PLACE).folder
    ended(run, "failed")
    with pytest.raises(PartialFCError, match="failed before this restart: why"):
        open_run_folder(config, PLACE)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-8")
    assert open_run_folder(config, PLACE).folder == run, "a person starts it again"


def test_differences_are_a_line_a_key() -> None:
    before = {"optim": {"learning_rate": 0.1, "gone": 1}, "head": {"margin": {"m": 0.3}}, "train": {"log_every": 5}}
    after = {"optim": {"learning_rate": 0.2}, "head": {"margin": {"m": 0.4}}, "train": {"log_every": 9}, "data": {}}
    assert differences(before, after) == [
        "optim.learning_rate was 0.1, is 0.2",
        "head.margin.m was 0.3, is 0.4",
    ]


def test_a_status_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    status = Status(tmp_path / "gone", 10, "auto", active=True)
    status.write("running", 1)
    assert "status.json can't be written" in caplog.text
    other = Status(tmp_path, 10, "auto", active=False)
    other.write("running", 1)
    assert list(tmp_path.iterdir()) == []
