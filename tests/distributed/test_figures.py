"""What a run tells of itself against the definition: norms, nearest classes, bytes, phases, on several ranks."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from partial_fc import figures, loop, metrics, train
from partial_fc.metrics import PHASES
from partial_fc.train import Trainer
from partial_fc.training_step import TrainingStep
from tests.runs import CLASSES
from tests.trainings import lines_of, train_here, write_config


def samples_of(registry: Any) -> dict[tuple[str, str], float]:
    """Values by (name without the prefix, the value of the only label or nothing)."""
    return {
        (sample.name.removeprefix("partial_fc_"), ",".join(sample.labels.values())): sample.value
        for family in registry.collect()
        for sample in family.samples
        if "le" not in sample.labels
    }


def tell(rank: int, world_size: int, config: str, overrides: list[str], batch_norm: bool = True) -> dict[str, Any]:
    """Train; what the metrics say at the end, and what they are said of."""
    kept: dict[str, Any] = {}

    class Kept(metrics.TrainingMetrics):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            kept["registry"] = self.registry

    genuine, train.TrainingMetrics = train.TrainingMetrics, Kept
    trainers: list[Trainer] = []
    update, found = TrainingStep._update, {}

    def noted(self: TrainingStep) -> Any:
        """The norms of the gradients that there are, by themselves."""
        gradients = [p.grad.flatten().double() for p in self._backbone.parameters() if p.grad is not None]
        found["backbone"] = torch.cat(gradients).norm().item()
        centres = self._head.weight.grad
        found["head"] = None if centres is None else centres.to_dense().double().norm().item()
        return update(self)

    TrainingStep._update = noted  # type: ignore[method-assign]
    try:
        folder, weights = train_here(rank, world_size, config, overrides, batch_norm, trainers.append)
    finally:
        train.TrainingMetrics, TrainingStep._update = genuine, update  # type: ignore[method-assign]
    (trainer,) = trainers
    step = trainer.training_step
    assert step._last is not None
    return {
        "folder": folder,
        "samples": samples_of(kept["registry"]),
        "embeddings": step._last[0],
        "labels": step._last[1],
        "centres": weights["head.weight"],
        "backbone_bytes": sum(p.nbytes for p in trainer.backbone.parameters()),
        "bytes": dict(trainer.head.group.bytes),
        "norms": found,
        # Fewer classes than that are there.
        "far": step.nearest((1, CLASSES)),
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_metrics_of_a_run_are_what_they_say(ranks: Any, tmp_path: Path, data: Path, world_size: int) -> None:
    config = write_config(tmp_path, data, train={"steps": 5, "log_every": 2})
    parts = ranks(world_size).run(tell, str(config), [], timeout=200)
    centres = torch.cat([part["centres"] for part in parts]).double()
    assert len(centres) == CLASSES
    rows = min(max(64 // world_size, 1), 12 // world_size)
    cosine = []
    for part in parts:
        unit = torch.nn.functional.normalize(part["embeddings"][:rows].double())
        cosine.append(unit @ torch.nn.functional.normalize(centres).T)
    cosines = torch.cat(cosine)
    labels = torch.cat([part["labels"][:rows] for part in parts])
    own = cosines.gather(1, labels[:, None])
    others = cosines.scatter(1, labels[:, None], -torch.inf).sort(1, descending=True).values
    for part in parts:
        found = part["samples"]
        assert found["nearest_cosine", "1"] == pytest.approx(others[:, 0].mean().item(), abs=1e-5)
        assert found["nearest_cosine", "5"] == pytest.approx(others[:, 4].mean().item(), abs=1e-5)
        right = (own[:, 0] > others[:, 0]).double().mean().item()
        assert found["nearest_accuracy", ""] == pytest.approx(right, abs=1e-6)
        assert math.isnan(part["far"].cosines[CLASSES]) and math.isfinite(part["far"].cosines[1])
        assert found["steps_total", ""] == found["reached_step", ""] == found["planned_steps", ""] == 5
        assert found["samples_total", ""] == 5 * 12 / world_size
        assert found["epoch", ""] == pytest.approx(5 * 12 / (4 * CLASSES))
        assert found["learning_rate", "head"] > 0 and found["loss_scale", ""] == 1
        assert found["gradient_norm", "backbone"] > 0 and math.isfinite(found["gradient_norm", "head"])
        assert 0 < found["centre_norm", "min"] <= found["centre_norm", "max"]
        assert found["sampled_classes", ""] >= found["positive_classes", ""] >= 0
        assert 0 <= found["support_vector_share", ""] <= 1
        assert found["data_queue_capacity", ""] >= found["data_queue_batches", ""] >= 0
        for phase in PHASES:
            if phase != "collectives" or world_size > 1:
                assert found["step_seconds_count", phase] == 5, phase
        assert found["host_memory_available_bytes", ""] <= found["host_memory_limit_bytes", ""]
        # Ring algorithms: twice (W - 1) / W of the backbone's gradient at each step.
        sums = 5 * (2 * part["backbone_bytes"] * (world_size - 1) // world_size)
        assert found["collective_bytes_total", "backbone_gradient"] == sums
        assert (found["collective_bytes_total", "embeddings"] > 0) == (world_size > 1)
        for name, size in part["bytes"].items():
            if name not in ("candidates", "sums", "sizes", "embeddings"):  # also sent after the last reading
                assert found["collective_bytes_total", name] == size
    assert sum(part["samples"]["sampled_classes", ""] for part in parts) >= CLASSES // 2
    # Two ranks of a backbone's gradient agree: it is the mean over all.
    assert len({round(part["samples"]["gradient_norm", "backbone"], 6) for part in parts}) == 1
    line = lines_of(Path(parts[0]["folder"]), "train")[-1]
    assert line["nearest_cosine_1"] == pytest.approx(others[:, 0].mean().item(), abs=1e-5)
    assert set(line["phase_seconds"]) == set(PHASES)


def norms(rank: int, world_size: int, config: str, overrides: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    told = tell(rank, world_size, config, overrides, batch_norm=False)
    return {group: told["samples"]["gradient_norm", group] for group in ("backbone", "head")}, told["norms"]


@pytest.mark.parametrize("clipped", [False, True])
def test_gradient_norms_are_those_before_clipping(ranks: Any, tmp_path: Path, data: Path, clipped: bool) -> None:
    overrides = ["head.sample_rate=1.0", "train.steps=1", "train.accumulate=2", "optim.head_name=sgd"]
    if clipped:
        overrides += ["optim.clip_norm=0.001", "optim.head_clip_norm=0.001"]
    by_world = {}
    for world_size in (1, 2, 3):
        config = write_config(tmp_path, data)
        parts = ranks(world_size).run(norms, str(config), overrides, timeout=200)
        for told, found in parts:
            assert told == pytest.approx(found, rel=1e-5)
        by_world[world_size] = math.hypot(*(told["head"] for told, _ in parts)), parts[0][0]["backbone"]
    for world_size in (2, 3):
        assert by_world[world_size] == pytest.approx(by_world[1], rel=1e-4)


def test_in_backward_the_norm_is_that_of_two_phases(ranks: Any, tmp_path: Path, data: Path) -> None:
    config = write_config(tmp_path, data, train={"steps": 1})
    for world_size in (1, 2):
        whole = ranks(world_size).run(norms, str(config), ["optim.head_clip_norm=1000000.0"], timeout=200)
        chunks = ranks(world_size).run(norms, str(config), [], timeout=200)
        for (two_phases, found), (in_backward, nothing) in zip(whole, chunks, strict=True):
            assert nothing["head"] is None and found["head"] > 0
            assert in_backward["head"] == pytest.approx(found["head"], rel=1e-5) == two_phases["head"]


def bytes_of(rank: int, world_size: int, config: str, overrides: list[str]) -> dict[str, float]:
    told = tell(rank, world_size, config, overrides)
    backbone = told["samples"]["collective_bytes_total", "backbone_gradient"]
    return {"told": backbone, "size": told["backbone_bytes"]}


def test_the_backbones_gradient_is_sent_once_a_step(ranks: Any, tmp_path: Path, data: Path) -> None:
    config = write_config(tmp_path, data, train={"steps": 3, "accumulate": 3})
    for part in ranks(2).run(bytes_of, str(config), [], timeout=200):
        assert part["told"] == 3 * part["size"]  # 2 (W - 1) / W is 1


def speeds(rank: int, world_size: int, config: str, overrides: list[str]) -> list[float]:
    """Images a second as logged, by a clock that moves one second a step and a thousand an evaluation."""
    now = [0.0]
    step, evaluate = TrainingStep.run, loop.Loop.evaluate

    def slow_step(self: TrainingStep, number: int, **options: Any) -> Any:
        now[0] += 1
        return step(self, number, **options)

    def slow_evaluation(self: Any) -> Any:
        now[0] += 1000
        return evaluate(self)

    clock = figures.time
    figures.time = SimpleNamespace(perf_counter=lambda: now[0])  # type: ignore[assignment]
    TrainingStep.run, loop.Loop.evaluate = slow_step, slow_evaluation  # type: ignore[method-assign]
    try:
        folder, _ = train_here(rank, world_size, config, overrides)
    finally:
        figures.time = clock
        TrainingStep.run, loop.Loop.evaluate = step, evaluate  # type: ignore[method-assign]
    return [line["samples_per_second"] for line in lines_of(Path(folder), "train")]


def test_an_evaluation_between_logs_does_not_change_the_speed(ranks: Any, tmp_path: Path, data: Path) -> None:
    config = write_config(tmp_path, data, train={"steps": 9, "log_every": 3}, evaluate={"every_steps": 4})
    assert ranks(1).run(speeds, str(config), [], timeout=200) == [[12.0, 12.0, 12.0]]


def test_skipped_steps_leave_what_was_measured(ranks: Any, tmp_path: Path, data: Path) -> None:
    config = write_config(tmp_path, data, train={"steps": 4, "nonfinite": "skip"})
    for part in ranks(2).run(tell_with_a_bad_step, str(config), [], timeout=200):
        found = part["samples"]
        assert found["skipped_steps_total", ""] == 1 and found["steps_total", ""] == 4
        assert math.isfinite(found["loss", ""]) and math.isfinite(found["nearest_cosine", "1"])
        assert math.isfinite(found["gradient_norm", "head"])


def tell_with_a_bad_step(rank: int, world_size: int, config: str, overrides: list[str]) -> dict[str, Any]:
    """The last step's embeddings aren't finite."""
    genuine = TrainingStep._next_batch

    def bad(self: Any) -> Any:
        batch = genuine(self)
        if int(self._head.step) == 3:
            batch.images.fill_(torch.nan)
        return batch

    TrainingStep._next_batch = bad  # type: ignore[method-assign]
    try:
        return tell(rank, world_size, config, overrides)
    finally:
        TrainingStep._next_batch = genuine  # type: ignore[method-assign]


def test_memory_of_a_gpu_is_told_at_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("memory_allocated", 1), ("memory_reserved", 3), ("max_memory_allocated", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    told = metrics.TrainingMetrics()
    one = figures.Figures.__new__(figures.Figures)
    one._metrics, one._head = told, SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda")))  # type: ignore[assignment]
    one._record_gpu_memory()
    found = samples_of(told.registry)
    assert [found["gpu_memory_bytes", kind] for kind in ("allocated", "reserved", "peak")] == [1, 3, 2]
    one._head = SimpleNamespace(weight=torch.zeros(1))  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 / 0)
    one._record_gpu_memory()
