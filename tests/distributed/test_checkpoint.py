from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.checkpoint import (
    Saver,
    list_commits,
    load_backbone,
    read_commit,
    read_whole,
    save_model,
    saver,
    step_of,
    tensor_shapes,
    tensors,
)
from partial_fc.checkpoint.tensors import local_part
from partial_fc.errors import CheckpointError
from partial_fc.margins import CosFace
from partial_fc.norm_margins import AdaFace
from tests.ranks import RankFailed, RankPool, run_ranks
from tests.unit.test_saver import Run

Pools = Callable[[int], RankPool]


def make(classes: int, kind: str, seed: int) -> Run:
    """A run whose steps touch few rows, so that each row's count is another."""
    if kind == "bfloat16":
        return Run(classes, "adam", seed=seed, state_dtype=torch.bfloat16, storage_dtype=torch.bfloat16)
    return Run(classes, kind, margin=AdaFace(), seed=seed)


def distinct(run: Run) -> None:
    """Fill every tensor with numbers that name rank and place; what is replicated is the same on all ranks."""
    rank = run.head.group.rank
    for name, value in run.state.tensors().items():
        local = local_part(value)
        part = rank * 1000 if isinstance(value, tensors.DTensor) else 7
        local.copy_((torch.arange(local.numel()) % 997 + part + len(name)).view(local.shape))


def save_job(rank: int, world_size: int, root: str, classes: int, kind: str) -> dict[str, Tensor]:
    run = make(classes, kind, seed=0)
    for step in range(3):
        run.step(step, rows=3)
    distinct(run)
    saving = Saver(Path(root), run.state, keep_last=1, keep_best=False)
    assert saving.save(run.info(3), wait=True)
    outcome = saving.outcome()
    assert outcome is not None and outcome.failure is None, outcome
    saving.close()
    return {name: local_part(value).clone() for name, value in run.state.tensors().items()}


def load_job(rank: int, world_size: int, root: str, classes: int, kind: str) -> dict[str, Tensor]:
    run = make(classes, kind, seed=1)
    commit = list_commits(Path(root))[0]
    info = read_commit(commit, part=rank, parts=world_size).info
    assert run.state.load(commit, info) == []
    # Of every rank, also what rank 0 alone saves.
    momentum = run.optimizers[0].state[next(run.backbone.parameters())]
    found = {name: local_part(value).clone() for name, value in run.state.tensors().items()}
    found |= {f"backbone.{name}": value.clone() for name, value in run.backbone.state_dict().items()}
    found |= {f"backbone_optimizer.0.weight.{name}": value.clone() for name, value in momentum.items()}
    found |= {f"head.{name}": value.clone() for name, value in run.head.named_buffers()}
    run.step(9)
    return found


@pytest.mark.parametrize("kind", ["sgd", "adam", "bfloat16", "torch"])
@pytest.mark.parametrize("classes", [13, 4, 1])
def test_any_world_size_loads_what_two_ranks_saved(ranks: Pools, tmp_path: Path, classes: int, kind: str):
    parts = ranks(2).run(save_job, str(tmp_path), classes, kind)
    commit = list_commits(tmp_path)[0]
    shapes = tensor_shapes(commit)
    whole = read_whole(commit, shapes)
    for name in parts[0]:
        shards = [part[name] for part in parts if name in part]
        assert torch.equal(whole[name], torch.cat(shards) if len(shards) == 2 else shards[0]), name
    for world_size in (1, 2, 3, 4):
        loaded = ranks(world_size).run(load_job, str(tmp_path), classes, kind)
        for name in parts[1]:
            assert torch.equal(torch.cat([part[name] for part in loaded]), whole[name]), (name, world_size)
        for part in loaded:
            for name in part.keys() - parts[1].keys():
                assert torch.equal(part[name], whole[name]), (name, world_size)
    assert set(load_alone(tmp_path, classes, kind)) == set(whole)


def load_alone(root: Path, classes: int, kind: str) -> dict[str, Tensor]:
    """Without a process group."""
    found = load_job(0, 1, str(root), classes, kind)
    commit = list_commits(root)[0]
    whole = read_whole(commit, tensor_shapes(commit))
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    return found


def test_steps_are_counted_by_row_whatever_the_world_size(ranks: Pools, tmp_path: Path):
    ranks(2).run(count_job, str(tmp_path))
    first = ranks(2).run(go_on_job, str(tmp_path))
    for world_size in (1, 3):
        assert torch.cat(ranks(world_size).run(go_on_job, str(tmp_path))).equal(torch.cat(first))


def count_job(rank: int, world_size: int, root: str) -> None:
    run = Run(17, "adam")
    run.optimizers[1].state[run.head.weight]["steps"].copy_(torch.arange(*run.head.shards.bounds(rank)))
    saving = Saver(Path(root), run.state, keep_last=1, keep_best=False, background=False)
    assert saving.save(run.info(0))
    saving.close()


def go_on_job(rank: int, world_size: int, root: str) -> Tensor:
    run = Run(17, "adam", seed=2)
    commit = list_commits(Path(root))[0]
    run.state.load(commit, read_commit(commit).info)
    steps: Tensor = run.optimizers[1].state[run.head.weight]["steps"]
    return steps.clone()


def misfit_job(rank: int, world_size: int, root: str) -> str:
    run = Run(14, "adam", margin=CosFace())
    commit = list_commits(Path(root))[0]
    # One rank alone: nothing in it waits for another.
    if rank == 1:
        with pytest.raises(CheckpointError, match="num_classes is 13 there, expected 14") as caught:
            run.state.load(commit, read_commit(commit).info)
        return str(caught.value)
    return ""


def test_a_misfit_is_found_by_each_rank_for_itself(ranks: Pools, tmp_path: Path):
    ranks(2).run(save_job, str(tmp_path), 13, "sgd")
    told = ranks(3).run(misfit_job, str(tmp_path))[1]
    assert "head_optimizer is of another kind" in told and "state of the margin is not expected" in told


def broken_rank_job(rank: int, world_size: int, root: str, where: str) -> list[tuple[int, str | None, int]]:
    """Saves 1, 2, 3; the second fails on rank 1 alone."""
    run = Run(13)
    saving = Saver(Path(root), run.state, keep_last=9, keep_best=False)
    assert saving.save(run.info(1), wait=True)
    kept: Any = None
    if rank == 1 and where == "file":
        kept = tensors._SummedStream.write

        def full(self: Any, data: Any) -> int:
            # In the middle of a tensor, where the library is in the midst of its own format.
            if self.tell() > 200:
                self._files.failure = OSError(errno.ENOSPC, "No space left on device")
                raise self._files.failure
            return kept(self, data)

        tensors._SummedStream.write = full  # type: ignore[method-assign]
    if rank == 1 and where == "copy":
        kept = saving._staging.copy

        def none(state: Any) -> Any:
            raise MemoryError("no room")

        saving._staging.copy = none  # type: ignore[method-assign]
    assert saving.save(run.info(2), wait=True)
    if kept is not None and where == "file":
        tensors._SummedStream.write = kept  # type: ignore[method-assign]
    if kept is not None and where == "copy":
        saving._staging.copy = kept  # type: ignore[method-assign]
    assert saving.save(run.info(3), wait=True)
    outcomes = [saving.outcome() for _ in range(3)]
    saving.close()
    return [(saved.step, saved.failure, saved.bytes) for saved in outcomes if saved is not None]


@pytest.mark.parametrize(("where", "told"), [("file", "No space left on device"), ("copy", "MemoryError: no room")])
def test_a_rank_that_cannot_save_fails_the_save_on_all(ranks: Pools, tmp_path: Path, where: str, told: str):
    first, second = ranks(2).run(broken_rank_job, str(tmp_path), where)
    assert first == second
    assert [(step, failure is None) for step, failure, _ in first] == [(1, True), (2, False), (3, True)]
    assert first[1][1] is not None and told in first[1][1] and "rank 1" in first[1][1]
    assert [read_commit(folder).step for folder in list_commits(tmp_path)] == [3, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000003"}


def busy_job(rank: int, world_size: int, root: str) -> list[bool]:
    """Rank 1's writing takes until its peer was told to come again."""
    run = Run(13)
    saving = Saver(Path(root), run.state, keep_last=9, keep_best=False)
    gate, write = threading.Event(), saver.write_summed

    def late(*args: Any) -> Any:
        gate.wait(60)
        return write(*args)

    if rank == 1:
        saver.write_summed = late  # type: ignore[assignment]
    answers = [saving.save(run.info(1)), saving.save(run.info(2)), saving.save(run.info(2), veto=rank == 0)]
    gate.set()
    saver.write_summed = write
    answers.append(saving.save(run.info(3), wait=True, veto=rank == 1))
    answers.append(saving.save(run.info(4), wait=True))
    saving.close()
    return answers


def test_all_ranks_save_or_none_does(ranks: Pools, tmp_path: Path):
    first, second = ranks(2).run(busy_job, str(tmp_path))
    assert first == second == [True, False, False, False, True]
    assert [read_commit(folder).step for folder in list_commits(tmp_path)] == [4, 1]


def staged_job(rank: int, world_size: int, root: str) -> dict[str, Tensor]:
    """The training goes on in place while the thread writes."""
    run = Run(2003, "adam")
    run.step(0)
    saving = Saver(Path(root), run.state, keep_last=1, keep_best=False)
    taken = {name: local_part(value).clone() for name, value in run.state.tensors().items()}
    assert saving.save(run.info(1))
    for value in run.state.tensors().values():
        local_part(value).zero_()
    step = 1
    while saving._thread is not None and saving._thread.is_alive() and step < 20:
        run.step(step)
        step += 1
    saving.close()
    return taken


def test_the_commit_holds_the_step_at_which_it_was_asked_for(ranks: Pools, tmp_path: Path):
    taken = ranks(2).run(staged_job, str(tmp_path))
    commit = list_commits(tmp_path)[0]
    read_commit(commit)
    whole = read_whole(commit, tensor_shapes(commit))
    for name in taken[1]:
        assert torch.equal(torch.cat([part[name] for part in taken]), whole[name])
    assert all(torch.equal(taken[0][name], whole[name]) for name in taken[0].keys() - taken[1].keys())


def dying_job(rank: int, world_size: int, root: str) -> tuple[str | None, float]:
    run = Run(13)
    saving = Saver(Path(root), run.state, keep_last=1, keep_best=False)
    if rank == 1:
        saver.write_summed = lambda *args: os._exit(7)
    saving.save(run.info(1))
    begin = time.monotonic()
    saving.finish()
    outcome = saving.outcome()
    assert outcome is not None and outcome.failure is not None
    assert list(Path(root).iterdir()) == []
    Path(root, "told").write_text(outcome.failure)
    return outcome.failure, time.monotonic() - begin


def test_a_rank_that_dies_while_it_saves_leaves_no_one_waiting(tmp_path: Path):
    with pytest.raises(RankFailed, match="exit code 7"):
        run_patiently(dying_job, str(tmp_path))
    assert (tmp_path / "told").is_file()


def run_patiently(job: Callable[..., Any], root: str) -> None:
    """As run_ranks, with time for the rank that is left to say what it saw."""
    pool = RankPool(2)
    kill = pool.kill

    def later() -> None:
        deadline = time.monotonic() + 60
        while not Path(root, "told").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        kill()

    pool.kill = later  # type: ignore[method-assign]
    pool.run(job, root)


def model_job(rank: int, world_size: int, folder: str) -> bool:
    run = Run(13)
    run.step(0)
    save_model(Path(folder), run.backbone, run.head)
    dist.barrier()
    other = Run(13, seed=4)
    load_backbone(Path(folder), other.backbone)
    kept = run.backbone.state_dict()
    equal = [torch.equal(value, kept[name]) for name, value in other.backbone.state_dict().items()]
    return all(equal)


def test_a_saved_model_has_the_buffers_of_rank_0(ranks: Pools, tmp_path: Path):
    assert ranks(2).run(model_job, str(tmp_path)) == [True, False]
    assert tensor_shapes(tmp_path)["head.weight"][0] == (13, 8)


def test_fresh_processes_end_in_order_after_a_save(tmp_path: Path):
    run_ranks(save_job, 2, str(tmp_path), 13, "sgd")
    assert len(list_commits(tmp_path)) == 1


def late_rank_job(rank: int, world_size: int, root: str) -> list[str | None]:
    """Saves 1 and 2; in the first, rank 1 writes longer than the others wait for it."""
    saver.WRITE_TIMEOUT = timedelta(seconds=2)
    run = Run(13)
    saving = Saver(Path(root), run.state, keep_last=9, keep_best=False)
    saver.WRITE_TIMEOUT = timedelta(seconds=60)  # of the next group
    genuine = saver.write_summed

    def late(*arguments: Any) -> Any:
        if rank == 1:
            time.sleep(6)
        return genuine(*arguments)

    saver.write_summed = late
    assert saving.save(run.info(1), wait=True)
    saver.write_summed = genuine
    assert saving.save(run.info(2), wait=True)
    outcomes = [saving.outcome() for _ in range(2)]
    saving.close()
    return [saved.failure for saved in outcomes if saved is not None]


def test_after_a_rank_that_came_too_late_the_next_save_succeeds(ranks: Pools, tmp_path: Path):
    for first, second in ranks(2).run(late_rank_job, str(tmp_path)):
        assert first is not None and second is None
    assert [step_of(folder) for folder in list_commits(tmp_path)] == [2]
