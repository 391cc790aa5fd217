"""Class surgery on commits, against numpy in float64 on whole matrices."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from partial_fc.checkpoint import TrainingState, read_whole, sharded, surgery, tensor_shapes, tensors
from partial_fc.checkpoint.commits import Commit, read_commit
from partial_fc.checkpoint.surgery import change_classes, check_memory, extend_classes, find_commit, write_commit
from partial_fc.data.class_map import REMOVED
from partial_fc.errors import CheckpointError, ConfigError
from partial_fc.head import PartialFC
from partial_fc.machine import HostMemory
from partial_fc.models import SmallNet
from partial_fc.optim import RowAdamW, RowSGD

SIZE = 4


def info(classes: int, **changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "step": 40,
        "samples": 400,
        "num_classes": classes,
        "embedding_size": SIZE,
        "contents": ["backbone", "head", "head_optimizer"],
        "watch": {"losses": [1.0], "without_update": 0},
        "config": {"backbone": {"name": "small"}},
        **changes,
    }


def state_of(classes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "head.weight": torch.randn(classes, SIZE, generator=draw).to(dtype),
        "head.position": torch.tensor(400),
        # As long as there are classes, and still none of the classes' rows.
        "head.margin_table": torch.arange(float(classes)),
        "head_optimizer.exp_avg": torch.randn(classes, SIZE, generator=draw).to(dtype),
        "head_optimizer.exp_avg_sq": torch.rand(classes, SIZE, generator=draw).to(dtype),
        "head_optimizer.steps": torch.randint(0, 90, (classes,), generator=draw).float(),
        "head_optimizer.rounded": torch.tensor(7),
        "backbone.fc.weight": torch.randn(classes, 3, generator=draw),
        "backbone_optimizer.fc.weight.momentum_buffer": torch.randn(classes, 3, generator=draw),
    }


def make(folder: Path, classes: int, state: dict[str, Tensor] | None = None) -> Commit:
    write_commit(folder, state if state is not None else state_of(classes), info(classes))
    return read_commit(folder)


def whole(folder: Path) -> dict[str, Tensor]:
    return read_whole(folder, tensor_shapes(folder))


def by_class(name: str) -> bool:
    return name in ("head.weight", *(f"head_optimizer.{state}" for state in ("exp_avg", "exp_avg_sq", "steps")))


def oracle(name: str, old: np.ndarray, class_map: list[int]) -> np.ndarray:
    """The rows of the new classes, float64."""
    rows = []
    for new in range(max(class_map) + 1):
        members = old[[index for index, value in enumerate(class_map) if value == new]].astype(np.float64)
        if len(members) == 1:
            rows.append(members[0])
        elif name == "head.weight":
            norms = np.linalg.norm(members, axis=1)
            direction = (members / norms[:, None]).mean(0)
            rows.append(direction / np.linalg.norm(direction) * norms.mean())
        elif name == "head_optimizer.steps":
            rows.append(members.max(0))
        else:
            rows.append(members.mean(0))
    return np.stack(rows)


@st.composite
def class_maps(draw: st.DrawFn, merges: bool) -> list[int]:
    classes = draw(st.integers(1, 12))
    if merges:
        raw = draw(st.lists(st.integers(-1, 5), min_size=classes, max_size=classes))
    else:
        raw = draw(st.permutations(range(classes)))
        raw = [
            value if keep else -1
            for value, keep in zip(raw, draw(st.lists(st.booleans(), min_size=classes, max_size=classes)), strict=True)
        ]
    kept = sorted({value for value in raw if value >= 0})
    if not kept:
        return [0] * classes if merges else list(range(classes))
    return [kept.index(value) if value >= 0 else REMOVED for value in raw]


@settings(max_examples=15)
@given(class_map=class_maps(merges=True), seed=st.integers(0, 9), block=st.sampled_from([1, 3, 1 << 14]))
def test_changed_classes_are_those_of_the_definition(
    tmp_path_factory: pytest.TempPathFactory, class_map: list[int], seed: int, block: int
) -> None:
    folder, classes = tmp_path_factory.mktemp("c"), len(class_map)
    old = state_of(classes, seed)
    commit = make(folder / "a", classes, old)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surgery, "_ROWS", block)
        change_classes(commit, folder / "b", np.array(class_map), {"operation": "x"})
    new = whole(folder / "b")
    assert new.keys() == old.keys()
    for name, value in new.items():
        if by_class(name):
            np.testing.assert_allclose(value.numpy(), oracle(name, old[name].numpy(), class_map), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, old[name]), name


@settings(max_examples=8)
@given(class_map=class_maps(merges=False), data=st.data())
def test_two_changes_are_the_one_composed_of_them(
    tmp_path_factory: pytest.TempPathFactory, class_map: list[int], data: st.DataObject
) -> None:
    folder, classes = tmp_path_factory.mktemp("c"), len(class_map)
    commit = make(folder / "a", classes)
    left = max(class_map) + 1
    second = data.draw(st.permutations(range(left)))
    change_classes(commit, folder / "b", np.array(class_map), {})
    change_classes(read_commit(folder / "b"), folder / "c", np.array(second), {})
    composed = [REMOVED if value == REMOVED else second[value] for value in class_map]
    change_classes(commit, folder / "d", np.array(composed), {})
    one, two = whole(folder / "c"), whole(folder / "d")
    assert all(torch.equal(one[name], two[name]) for name in two) and one.keys() == two.keys()


@settings(max_examples=15)
@given(order=st.integers(1, 12).flatmap(lambda classes: st.permutations(range(classes))))
def test_an_order_and_its_inverse_are_the_identity(tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
    folder, classes = tmp_path_factory.mktemp("c"), len(order)
    old = state_of(classes, dtype=torch.bfloat16)
    commit = make(folder / "a", classes, old)
    change_classes(commit, folder / "b", np.array(order), {})
    change_classes(read_commit(folder / "b"), folder / "c", np.argsort(order), {})
    change_classes(commit, folder / "d", np.arange(classes), {})
    for place in ("c", "d"):
        for name, value in whole(folder / place).items():
            assert value.dtype == old[name].dtype and torch.equal(value, old[name])


def test_run_json_keeps_the_run_and_tells_its_history(tmp_path: Path) -> None:
    commit = make(tmp_path / "step-00000040", 3)
    change_classes(commit, tmp_path / "b", np.array([0, REMOVED, 1]), {"operation": "remap"})
    extend_classes(
        read_commit(tmp_path / "b"), tmp_path / "c", torch.ones(2, SIZE), {"operation": "extend"}, units=False
    )
    new = read_commit(tmp_path / "c").info
    assert (new["step"], new["samples"], new["num_classes"], new["watch"]) == (40, 400, 4, {})
    assert new["contents"] == commit.info["contents"] and new["config"] == commit.info["config"]
    assert new["history"] == [
        {"operation": "remap", "from": str(commit.folder), "classes_before": 3, "classes_after": 2},
        {"operation": "extend", "from": str(tmp_path / "b"), "classes_before": 2, "classes_after": 4},
    ]
    assert sorted(os.listdir(tmp_path)) == ["b", "c", "step-00000040"]


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_classes_stand_behind_the_old_ones(tmp_path: Path, units: bool, dtype: torch.dtype) -> None:
    old = state_of(5, dtype=dtype)
    centres = torch.nn.functional.normalize(torch.randn(3, SIZE))
    extend_classes(make(tmp_path / "a", 5, old), tmp_path / "b", centres, {}, units=units)
    new = whole(tmp_path / "b")
    mean = np.linalg.norm(old["head.weight"].double().numpy(), axis=1).mean() if units else 1.0
    expected = torch.from_numpy(centres.double().numpy() * mean).to(dtype)
    assert torch.equal(new["head.weight"], torch.cat([old["head.weight"], expected]))
    for state in ("exp_avg", "exp_avg_sq", "steps"):
        name = f"head_optimizer.{state}"
        assert torch.equal(new[name][:5], old[name]) and not new[name][5:].any() and len(new[name]) == 8
    assert all(torch.equal(new[name], old[name]) for name in old if not by_class(name))


def test_classes_whose_centres_cancel_out_are_not_merged(tmp_path: Path) -> None:
    state = state_of(4)
    state["head.weight"][3] = -2 * state["head.weight"][1]
    commit = make(tmp_path / "a", 4, state)
    with pytest.raises(CheckpointError, match=r"the centres of classes 1, 3 cancel out, .*don't merge these"):
        change_classes(commit, tmp_path / "b", np.array([0, 1, 0, 1]), {})
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("optimizer", [RowSGD, RowAdamW])
def test_a_training_goes_on_from_the_result(tmp_path: Path, optimizer: Callable[..., Any]) -> None:
    def training(classes: int) -> tuple[PartialFC, Any, TrainingState]:
        backbone = SmallNet(SIZE, 16)
        head = PartialFC(SIZE, classes)
        of_head = optimizer(head.parameters(), 0.1, **({"momentum": 0.9} if optimizer is RowSGD else {}))
        of_backbone = torch.optim.SGD(backbone.parameters(), 0.1)
        return head, of_head, TrainingState(backbone, head, of_backbone, of_head)

    head, of_head, state = training(7)
    for _ in range(2):
        head(torch.randn(6, SIZE, requires_grad=True), torch.arange(6)).backward()
        of_head.step()
        of_head.zero_grad()
    write_commit(tmp_path / "a", state.tensors(), info(7))
    change_classes(read_commit(tmp_path / "a"), tmp_path / "b", np.array([2, 1, 0, REMOVED, 0, 3, 4]), {})
    other, _, loaded = training(5)
    loaded.load(tmp_path / "b", read_commit(tmp_path / "b").info)
    assert torch.equal(other.weight[2], head.weight[0]) and torch.equal(other.weight[4], head.weight[6])
    saved = {name: value for name, value in state.tensors().items() if name.startswith("head_optimizer.")}
    for name, value in loaded.tensors().items():
        if name.startswith("head_optimizer."):
            assert torch.equal(value[1], saved[name][1]), name


def read_shard(rank: int, world_size: int, folder: str, classes: int) -> list[list[float]]:
    rows = -(-classes // world_size)
    local = torch.zeros(max(0, min(rows, classes - rank * rows)), SIZE)
    tensors.read_into(Path(folder), {"head.weight": sharded(local, classes)})
    return local.tolist()


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_reads_the_result(tmp_path: Path, ranks: Any, world_size: int) -> None:
    change_classes(make(tmp_path / "a", 7), tmp_path / "b", np.array([2, 1, 0, REMOVED, 0, 3, 4]), {})
    parts = ranks(world_size).run(read_shard, str(tmp_path / "b"), 5)
    assert sum(parts, []) == whole(tmp_path / "b")["head.weight"].tolist()


def test_the_newest_usable_commit_of_a_run_is_found(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    for step in (10, 20):
        write_commit(root / f"step-{step:08d}", state_of(3), info(3, step=step))
    said: list[str] = []
    for path in (tmp_path / "run", root, root / "step-00000020"):
        assert find_commit(path, said.append).step == 20
    (root / "step-00000020" / "run.json").unlink()
    assert find_commit(tmp_path / "run", said.append).step == 10
    assert len(said) == 1 and "step-00000020" in said[0]
    (root / "step-00000010" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="none of its commits can be used"):
        find_commit(tmp_path / "run", said.append)


def test_what_is_no_commit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "file").touch()
    make(tmp_path / "runs" / "faces" / "checkpoints" / "step-00000040", 3)
    (make(tmp_path / "half", 3).folder / "commit.json").unlink()
    for path, match in (
        (tmp_path, "no commit is there, expected a commit, a run or a folder of commits"),
        (tmp_path / "nowhere", "no commit is there"),
        (tmp_path / "checkpoints", "no commit is there, .* or a folder of commits named step-N"),
        (tmp_path / "runs", "runs: no commit is there"),
        (tmp_path / "half", "half: has no commit.json, so it was not written to its end"),
        (tmp_path / "file", "file: can't be read"),
    ):
        with pytest.raises(CheckpointError, match=match):
            find_commit(path, print)


def test_nothing_is_replaced(tmp_path: Path) -> None:
    commit = make(tmp_path / "a", 3)
    (tmp_path / "b").symlink_to("nowhere")
    for place in ("a", "b"):
        with pytest.raises(ConfigError, match=f"{place}: is there already, expected the name of a new folder"):
            change_classes(commit, tmp_path / place, np.arange(3), {})
        with pytest.raises(ConfigError, match="is there already"):
            write_commit(tmp_path / place, {}, info(3))


def test_a_commit_without_that_many_centres_is_refused(tmp_path: Path) -> None:
    state = state_of(3)
    write_commit(tmp_path / "a", state, info(4))
    with pytest.raises(CheckpointError, match=r"head.weight has shape \[3, 4\], expected 4 rows"):
        change_classes(read_commit(tmp_path / "a"), tmp_path / "c", np.arange(4), {})
    del state["head.weight"]
    write_commit(tmp_path / "b", state, info(3))
    with pytest.raises(CheckpointError, match="head.weight has nothing, expected 3 rows"):
        change_classes(read_commit(tmp_path / "b"), tmp_path / "c", np.arange(3), {})


def test_too_little_memory_is_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = make(tmp_path / "a", 3)
    monkeypatch.setattr(surgery, "host_memory", lambda: HostMemory(100, 200))
    monkeypatch.setattr(surgery, "read_into", lambda *_: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="needs 0.0 GB of memory, 0.0 GB are available: free some"):
        change_classes(commit, tmp_path / "b", np.arange(3), {})
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(("after", "beside"), [(40, 40), (30, 40 * 2 - 30), (10, 40 * 2 - 10)])
def test_the_memory_reckoned_with_is_the_new_commit_and_the_largest_old_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, beside: int
) -> None:
    commit = make(tmp_path / "a", 40, {"head.weight": torch.ones(40, SIZE), "head.step": torch.tensor(1)})
    row = 4 * SIZE
    needed = 8 + row * (after + beside)
    class_map = np.minimum(np.arange(40), after - 1)
    monkeypatch.setattr(surgery, "host_memory", lambda: HostMemory(needed - 1, 2 * needed))
    with pytest.raises(CheckpointError, match="of memory"):
        change_classes(commit, tmp_path / "b", class_map, {})
    monkeypatch.setattr(surgery, "host_memory", lambda: HostMemory(needed, 2 * needed))
    change_classes(commit, tmp_path / "b", class_map, {})


def test_the_memory_of_the_machine_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    check_memory(1, "this")
    with pytest.raises(CheckpointError, match=r"^this needs 1000000000\.0 GB of memory"):
        check_memory(10**18, "this")
    monkeypatch.setattr(surgery, "host_memory", lambda: None)
    check_memory(10**18, "this")


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (errno.ENOSPC, "No space left on device): free the disk"),
        (errno.EROFS, "Read-only file system): name a folder that can be written"),
        (errno.EACCES, "Permission denied): correct the permissions"),
        (errno.EIO, "Input/output error): look at that disk"),
    ],
)
def test_a_disk_that_refuses_is_a_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, line: str
) -> None:
    commit = make(tmp_path / "a", 3)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), str(tmp_path / "x"))

    monkeypatch.setattr(surgery, "seal", refuse)
    with pytest.raises(CheckpointError, match=f"x: can't be written \\({re.escape(line)}$"):
        change_classes(commit, tmp_path / "b", np.arange(3), {})
    assert os.listdir(tmp_path) == ["a"]


def test_one_process_is_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = make(tmp_path / "a", 3)

    def elsewhere(root: Path, step: int) -> Path:
        (tmp_path / "file").touch()
        return tmp_path / "file" / "partial"

    monkeypatch.setattr(surgery, "begin", elsewhere)
    with pytest.raises(CheckpointError, match="partial: can't be written: NotADirectoryError: .*: look at that disk$"):
        change_classes(commit, tmp_path / "b", np.arange(3), {})


def test_one_old_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = make(tmp_path / "a", 6)
    read: list[list[str]] = []

    def spy(folder: Path, state: dict[str, Tensor]) -> None:
        read.append([name for name in state if by_class(name)])
        tensors.read_into(folder, state)

    monkeypatch.setattr(surgery, "read_into", spy)
    change_classes(commit, tmp_path / "b", np.arange(6), {})
    assert sorted(map(len, read)) == [0, 1, 1, 1, 1]


def test_the_marker_vouches_for_every_file(tmp_path: Path) -> None:
    change_classes(make(tmp_path / "a", 3), tmp_path / "b", np.arange(3), {})
    files = json.loads((tmp_path / "b" / "commit.json").read_text())["files"]
    assert sorted([*files, "commit.json"]) == sorted(os.listdir(tmp_path / "b"))
