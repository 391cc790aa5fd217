"""The benchmark's baseline computes what the head computes, and the benchmark's command runs."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import partial_fc as pfc
from benchmarks.conventional import ConventionalHead, make_optimizer, train_step

CLASSES, SIZE, BATCH = 300, 16, 24
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "head.py"


def ours(emphasis: float | None, sample_rate: float = 1.0) -> pfc.PartialFC:
    negatives: Any = pfc.Plain() if emphasis is None else pfc.SupportVectors(emphasis)
    return pfc.PartialFC(SIZE, CLASSES, pfc.CosFace(0.35), negatives, sample_rate=sample_rate).double()


def theirs(head: pfc.PartialFC, emphasis: float | None, sample_rate: float = 1.0) -> ConventionalHead:
    weight = head.weight.detach().clone()
    return ConventionalHead(SIZE, CLASSES, emphasis=emphasis, sample_rate=sample_rate, weight=weight)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(BATCH, SIZE, generator=generator, dtype=torch.float64)
    return embeddings.requires_grad_(), torch.randint(CLASSES, (BATCH,), generator=generator)


def near(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert actual is not None and expected is not None
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("emphasis", [None, 1.2])
def test_the_conventional_loss_and_gradients_equal_ours(emphasis: float | None) -> None:
    head = ours(emphasis)
    other = theirs(head, emphasis)
    (mine, labels), (peer, _) = batch(), batch()
    loss, conventional = head(mine, labels), other(peer, labels)
    loss.backward()
    conventional.backward()
    near(conventional, loss)
    near(peer.grad, mine.grad)
    near(other.weight.grad, head.weight.grad)


@pytest.mark.parametrize("emphasis", [None, 1.2])
def test_sampled_with_the_same_classes_equals_ours(emphasis: float | None) -> None:
    head = ours(emphasis, sample_rate=0.2)
    other = theirs(head, emphasis, sample_rate=0.2)
    (mine, labels), (peer, _) = batch(), batch()
    loss = head(mine, labels)
    loss.backward()
    assert head.weight.grad is not None
    gradient = head.weight.grad.coalesce()
    conventional = other(peer, labels, gradient.indices()[0])
    conventional.backward()
    other.scatter_gradient()
    near(conventional, loss)
    near(peer.grad, mine.grad)
    near(other.weight.grad, gradient.to_dense())


@pytest.mark.parametrize("fused", [True, False])
def test_three_full_steps_move_the_centres_as_ours(fused: bool) -> None:
    head = ours(1.2)
    other = theirs(head, 1.2)
    mine = pfc.optim.RowSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, in_backward=True)
    peer = make_optimizer(other, 0.1, fused=fused)
    for seed in range(3):
        embeddings, labels = batch(seed)
        head(embeddings, labels).backward()
        mine.step()
        train_step(other, peer, *batch(seed))
    near(other.weight, head.weight)


def test_sampling_takes_the_positives_and_the_share() -> None:
    head = ConventionalHead(SIZE, CLASSES, sample_rate=0.2)
    labels = torch.tensor([7, 7, 299, 0])
    ids = head.sample(labels)
    assert len(ids) == 60 and torch.equal(ids, ids.unique()) and torch.isin(labels, ids).all()
    assert len(ConventionalHead(SIZE, CLASSES, sample_rate=0.001).sample(labels)) == 3


def test_a_sampled_step_moves_all_classes() -> None:
    head = ConventionalHead(SIZE, CLASSES, sample_rate=0.1)
    optimizer, before = make_optimizer(head, 0.1), head.weight.detach().clone()
    embeddings, labels = batch()
    train_step(head, optimizer, embeddings.float(), labels)
    assert (head.weight != before).any(1).all(), "decay reaches every class"


@pytest.mark.parametrize("extra", [["--sample-rate", "0.5"], []])
def test_the_benchmark_runs(tmp_path: Path, extra: list[str]) -> None:
    out = tmp_path / "head.json"
    arguments = [
        "--classes",
        "500",
        "--batch",
        "8",
        "--size",
        "16",
        "--rounds",
        "2",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    if "kernels" in inspect.signature(pfc.PartialFC).parameters:
        arguments += ["--kernels", "eager"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, *extra, "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())["cases"]["custom"]
    assert result["notes"] == []
    assert all(len(times["seconds"]) == 2 for times in result["times"].values())
    assert set(result["times"]) == {"conventional", "ours", "four products", "three products"}
    assert set(result["memory"]) == {"ours", "conventional"}
    assert "conventional / ours" in done.stdout


def test_the_checkpoint_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT.with_name("checkpoint.py")), "--gigabytes", "0.02", "--repeats", "2"]
    command += ["--folder", str(tmp_path), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "delay / copy" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["rounds"]) == 2 and 1.9e7 < found["state_bytes"] < 2.2e7
    assert all(values["delay"] == values["step_with_save"] - values["step"] for values in found["rounds"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"], "the commits are gone"
