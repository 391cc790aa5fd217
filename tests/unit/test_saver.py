from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partial_fc.checkpoint import Saver, TrainingState, list_commits, read_commit, read_whole, saver, tensors
from partial_fc.errors import CheckpointError
from partial_fc.head import PartialFC
from partial_fc.margins import CosFace
from partial_fc.norm_margins import AdaFace
from partial_fc.optim import RowAdamW, RowSGD

SIZE = 8


class Run:
    """A small training: backbone, head, optimizers; the batch of a step is a function of its number."""

    def __init__(
        self,
        classes: int = 13,
        optimizer: str = "sgd",
        *,
        margin: Any = None,
        size: int = SIZE,
        width: int = 6,
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
        storage_dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, size))
        self.head = PartialFC(
            size, classes, margin or CosFace(), scale=16.0, seed=seed, kernels="eager", storage_dtype=storage_dtype
        )
        rows = {"state_dtype": state_dtype, "kernels": "eager"}
        weights, centres = list(self.backbone.parameters()), list(self.head.parameters())
        self.optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer] = {
            "sgd": lambda: (torch.optim.SGD(weights, 0.1, momentum=0.9), RowSGD(centres, 0.1, 0.9, **rows)),
            "adam": lambda: (torch.optim.AdamW(weights, 0.01), RowAdamW(centres, 0.01, **rows)),
            "plain": lambda: (torch.optim.SGD(weights, 0.1), RowSGD(centres, 0.1, **rows)),
            "torch": lambda: (torch.optim.RMSprop(weights, 0.01), torch.optim.Adam(centres, 0.01)),
        }[optimizer]()
        self.state = TrainingState(self.backbone, self.head, *self.optimizers)

    def step(self, number: int, rows: int = 4) -> float:
        generator = torch.Generator().manual_seed(1000 * number + self.head.group.rank)
        images = torch.randn(rows, 5, generator=generator)
        labels = torch.randint(self.head.num_classes, (rows,), generator=generator)
        loss = self.head(F.normalize(self.backbone(images)) * 3, labels)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def info(self, step: int = 3, **more: Any) -> dict[str, Any]:
        head = self.head
        return {
            "step": step,
            "samples": 8 * step,
            "num_classes": head.num_classes,
            "embedding_size": head.embedding_size,
            "margin": str(head.margin),
            "negatives": str(head.negatives),
            "world_size": head.group.world_size,
            "accuracy": None,
            "contents": ["backbone", "head", "backbone_optimizer", "head_optimizer"],
            **more,
        }


def clones(run: Run) -> dict[str, Tensor]:
    return {name: tensors.local_part(value).clone() for name, value in run.state.tensors().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def save(run: Run, root: Path, **info: Any) -> Path:
    with_saver = Saver(root, run.state, keep_last=9, keep_best=False)
    assert with_saver.save(run.info(**info), wait=True)
    outcome = with_saver.outcome()
    assert outcome is not None and outcome.failure is None
    with_saver.close()
    return list_commits(root)[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "plain", "torch"])
def test_a_run_goes_on_from_a_commit_as_if_it_had_not_stopped(tmp_path: Path, optimizer: str):
    run = Run(optimizer=optimizer, margin=AdaFace())
    for step in range(3):
        run.step(step)
    commit = save(run, tmp_path)
    fresh = Run(optimizer=optimizer, margin=AdaFace(), seed=5)
    weight, first = fresh.head.weight, next(fresh.backbone.parameters())
    address, rate = weight.data_ptr(), 0.0371
    fresh.optimizers[0].param_groups[0]["lr"] = rate
    assert fresh.state.load(commit, read_commit(commit).info) == []
    assert same(clones(run), clones(fresh))
    assert fresh.optimizers[0].param_groups[0]["lr"] == rate
    assert weight.data_ptr() == address and first is next(fresh.backbone.parameters())
    fresh.optimizers[0].param_groups[0]["lr"] = run.optimizers[0].param_groups[0]["lr"]
    for step in range(3, 6):
        assert run.step(step) == fresh.step(step)
    assert same(clones(run), clones(fresh))


def test_names_and_a_complete_state_before_the_first_step(tmp_path: Path):
    run = Run(optimizer="adam", margin=AdaFace(), state_dtype=torch.bfloat16)
    names = run.state.tensors().keys()
    assert {"backbone.0.weight", "backbone.1.running_mean", "head.weight", "head.position", "head.step"} <= names
    assert {f"head_optimizer.{name}" for name in ("exp_avg", "exp_avg_sq", "steps", "rounded")} <= names
    assert any(name.startswith("head.margin_") for name in names)
    assert not any(name.startswith("backbone_optimizer") for name in names)
    commit = save(run, tmp_path)
    fresh = Run(optimizer="adam", margin=AdaFace(), state_dtype=torch.bfloat16, seed=2)
    assert fresh.state.load(commit, read_commit(commit).info) == [
        "the commit has no optimizer state of the backbone: momentum starts at 0"
    ]
    assert same(clones(run), clones(fresh))
    before = run.state.bytes
    run.step(0)
    assert "backbone_optimizer.0.weight.exp_avg" in run.state.tensors()
    assert run.state.bytes > before


@pytest.mark.parametrize(("saved", "loaded"), [(None, torch.bfloat16), (torch.bfloat16, None)])
def test_the_state_converts_between_float32_and_bfloat16(tmp_path: Path, saved: Any, loaded: Any):
    run = Run(state_dtype=saved)
    run.step(0)
    commit = save(run, tmp_path)
    fresh = Run(state_dtype=loaded, seed=1)
    fresh.state.load(commit, read_commit(commit).info)
    momentum = fresh.optimizers[1].state[fresh.head.weight]["momentum_buffer"]
    assert momentum.dtype == (loaded or torch.float32)
    kept = read_whole(commit, ["head_optimizer.momentum_buffer"])["head_optimizer.momentum_buffer"]
    assert torch.equal(momentum, kept.to(momentum.dtype)) and momentum.abs().max() > 0
    assert fresh.step(1) > 0


PROBLEMS: list[tuple[Callable[[], Run], Callable[[], Run], str]] = [
    (Run, lambda: Run(classes=14), "num_classes is 13 there, expected 14: partial-fc head extend or .* remap"),
    (Run, lambda: Run(size=4), "embedding_size is 8 there, expected 4"),
    (Run, lambda: Run(width=7), r"7 tensors of the backbone have another shape: backbone.0.weight \[6, 5\] instead of"),
    (
        lambda: Run(margin=AdaFace()),
        Run,
        r"state of the margin is not expected, head.margin_.*AdaFace.*expected CosFace",
    ),
    (Run, lambda: Run(margin=AdaFace()), r"state of the margin is missing, head.margin_.*CosFace.*expected AdaFace"),
    (
        Run,
        lambda: Run(optimizer="adam"),
        "head_optimizer is of another kind: it saved momentum_buffer, expected exp_avg,",
    ),
    (lambda: Run(optimizer="adam"), Run, r"backbone_optimizer is of another kind: it saved exp_avg, .*momentum_buffer"),
    (Run, lambda: Run(optimizer="plain"), "it saved momentum_buffer, expected none"),
]


@pytest.mark.parametrize(("saved", "loaded", "match"), PROBLEMS)
def test_what_does_not_fit_is_told_before_anything_is_touched(
    tmp_path: Path, saved: Callable[[], Run], loaded: Callable[[], Run], match: str
):
    run = saved()
    run.step(0)
    commit = save(run, tmp_path)
    fresh = loaded()
    before = clones(fresh)
    with pytest.raises(CheckpointError, match=match) as caught:
        fresh.state.load(commit, read_commit(commit).info)
    assert "train.resume=never" in str(caught.value)
    assert same(before, clones(fresh))


def test_all_that_does_not_fit_is_told_at_once(tmp_path: Path):
    run = Run()
    run.step(0)
    commit = save(run, tmp_path)
    other = Run(classes=17, size=4, width=9, optimizer="adam", margin=AdaFace())
    other.backbone.append(nn.Linear(4, 4))
    with pytest.raises(CheckpointError) as caught:
        TrainingState(other.backbone, other.head, *other.optimizers).load(commit, read_commit(commit).info)
    reasons = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert len(reasons) == 7, reasons
    assert "2 tensors of the backbone aren't in it: backbone.3.bias, backbone.3.weight" in str(caught.value)


def test_a_commit_of_weights_alone_loads_what_is_there(tmp_path: Path):
    run = Run(margin=AdaFace())
    kept = ("backbone.", "head.weight")
    weights = {name: value for name, value in run.state.tensors().items() if name.startswith(kept)}
    tensors.write_tensors(tmp_path, weights)
    fresh = Run(margin=AdaFace(), seed=3)
    notes = fresh.state.load(tmp_path, {"contents": ["backbone", "head"]})
    assert [note.split(":")[0] for note in notes] == [
        "the commit has no optimizer state of the backbone",
        "the commit has no optimizer state of the class centres",
        next(note for note in notes if "head.position" in note).split(":")[0],
    ]
    assert torch.equal(fresh.head.weight, run.head.weight)


def test_the_commit_holds_what_was_there_when_save_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(classes=5000)
    run.step(0)
    gate = threading.Event()
    write = saver.write_summed

    def late(*args: Any) -> Any:
        gate.wait(60)
        return write(*args)

    monkeypatch.setattr(saver, "write_summed", late)
    saving = Saver(tmp_path, run.state, keep_last=2, keep_best=False)
    taken = clones(run)
    assert saving.save(run.info(1))
    for value in run.state.tensors().values():
        value.zero_()
    assert not saving.save(run.info(2)) and saving.outcome() is None
    gate.set()
    saving.finish()
    outcome = saving.outcome()
    assert outcome is not None and outcome.failure is None and outcome.step == 1
    assert 0 < outcome.copy_seconds <= outcome.seconds and outcome.bytes > run.state.bytes
    assert saving.outcome() is None
    commit = list_commits(tmp_path)[0]
    assert read_commit(commit).step == 1
    assert same(taken, read_whole(commit, taken))
    assert saving.save(run.info(2), wait=True) and not saving.save(run.info(3), veto=True)
    assert [read_commit(folder).step for folder in list_commits(tmp_path)] == [2, 1]
    saving.close()


def test_buffers_are_made_once_and_follow_what_is_saved(tmp_path: Path):
    run = Run(optimizer="adam")
    saving = Saver(tmp_path, run.state, keep_last=1, keep_best=False)
    staged = saving.staged_bytes
    run.step(0)
    saving.save(run.info(1), wait=True)
    addresses = {name: buffer.data_ptr() for name, buffer in saving._staging._buffers.items()}
    # The counts of the backbone's Adam came with the first step, 4 bytes each.
    assert staged <= saving.staged_bytes == run.state.bytes <= staged + 64
    saving.save(run.info(2), wait=True)
    assert addresses == {name: buffer.data_ptr() for name, buffer in saving._staging._buffers.items()}
    other = Run(classes=19, optimizer="adam")
    saving._state = other.state
    taken = clones(other)
    saving.save(other.info(3), wait=True)
    assert same(taken, read_whole(list_commits(tmp_path)[0], taken))
    saving.close()


def test_in_the_foreground_nothing_is_copied(tmp_path: Path):
    run = Run()
    run.step(0)
    saving = Saver(tmp_path, run.state, keep_last=1, keep_best=False, background=False)
    assert saving.save(run.info(1)) and saving.staged_bytes == 0
    taken = clones(run)
    assert same(taken, read_whole(list_commits(tmp_path)[0], taken))


def test_old_commits_go_and_the_best_stays(tmp_path: Path):
    run = Run()
    saving = Saver(tmp_path, run.state, keep_last=1, keep_best=True, background=False)
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7), (4, None)):
        saving.save(run.info(step, accuracy=accuracy))
    assert [read_commit(folder).step for folder in list_commits(tmp_path)] == [4, 2]
    saving.close()


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("begin", PermissionError("not yours")),
        ("write_summed", OSError(errno.ENOSPC, "No space left on device")),
        ("write_summed", KeyError("x")),
        ("seal", OSError(errno.EROFS, "Read-only file system")),
        ("copy", MemoryError("y")),
    ],
)
def test_a_failure_is_an_outcome_and_the_next_save_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
):
    run = Run()
    saving = Saver(tmp_path, run.state, keep_last=2, keep_best=False)
    assert saving.save(run.info(1), wait=True)
    assert saving.outcome() is not None

    def fail(*args: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((saving._staging, "copy") if where == "copy" else (saver, where)), fail)
        assert saving.save(run.info(2), wait=True)
    outcome = saving.outcome()
    assert outcome is not None and outcome.step == 2 and outcome.bytes == 0
    assert outcome.failure == f"{type(error).__name__}: {error}"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert saving.save(run.info(3), wait=True)
    assert [read_commit(folder).step for folder in list_commits(tmp_path)] == [3, 1]
    saving.close()


def test_a_commit_whose_elders_cannot_be_removed_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run()

    def fail(*args: Any, **options: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(saver, "prune", fail)
    saving = Saver(tmp_path, run.state, keep_last=2, keep_best=False)
    assert saving.save(run.info(1), wait=True)
    outcome = saving.outcome()
    assert outcome is not None and outcome.failure is None
    assert outcome.note == "old checkpoints can't be removed: PermissionError: not yours"
    saving.close()


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    gc.collect()
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


def test_a_full_disk(small_disk: Path):
    run = Run(classes=4000)
    saving = Saver(small_disk, run.state, keep_last=1, keep_best=False)
    assert saving.save(run.info(1), wait=True)
    first = saving.outcome()
    assert first is not None and first.failure is None
    filler = small_disk / "filler"
    filler.write_bytes(bytes(600 << 10))
    assert saving.save(run.info(2), wait=True)
    outcome = saving.outcome()
    assert outcome is not None and outcome.failure is not None and "No space left on device" in outcome.failure
    assert [folder.name for folder in list_commits(small_disk)] == ["step-00000001"]
    assert read_commit(list_commits(small_disk)[0]).step == 1
    assert {path.name for path in small_disk.iterdir()} == {"filler", "step-00000001"}
    filler.unlink()
    assert saving.save(run.info(3), wait=True)
    assert read_commit(list_commits(small_disk)[0]).step == 3
    saving.close()


ENDING = """
import sys
from pathlib import Path
from tests.unit.test_saver import Run
from partial_fc.checkpoint import Saver, saver
run = Run(classes=2_000_000)
saving = Saver(Path(sys.argv[1]), run.state, keep_last=1, keep_best=False)
saving.save(run.info(1))
{how}
"""


@pytest.mark.parametrize(
    ("how", "code"), [("raise SystemExit(3)", 3), ("raise ValueError", 1), ("saving.close(False)", 0)]
)
def test_the_end_of_a_process_gives_up_the_save(tmp_path: Path, how: str, code: int):
    command = [sys.executable, "-c", ENDING.format(how=how), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert list_commits(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
def test_the_writing_gives_way_to_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []

    def look(*args: Any) -> Any:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        raise OSError("enough")

    monkeypatch.setattr(saver, "begin", look)
    saving = Saver(tmp_path, Run().state, keep_last=1, keep_best=False)
    for wait in (False, True):
        assert saving.save(Run().info(1), wait=wait)
        saving.finish()
    saving.close()
    # Nothing trains beside a save that is waited for.
    ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert ours < 19 and seen == [min(19, ours + saver._NICENESS), ours]
