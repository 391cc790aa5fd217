"""Whole trainings inside the ranks of a test: a small configuration, and what a run left."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from partial_fc import build, train
from partial_fc.build import Place
from partial_fc.config import load_config
from partial_fc.train import Trainer


class NoBatchStatistics(nn.Module):
    """A backbone whose embedding of an image doesn't depend on the other images of the batch."""

    def __init__(self, embedding_size: int, image_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.fc = nn.Linear(8 * (image_size // 4) ** 2, embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.gelu(self.conv(x)).flatten(1))


class NoPreemption:
    """In the place of Preemption: a rank of a test keeps its signal handlers."""

    requested: str | None = None

    def __init__(self, **options: Any) -> None: ...

    def __enter__(self) -> NoPreemption:
        return self

    def __exit__(self, *reason: object) -> None: ...


def write_config(folder: Path, data: Path, **sections: dict[str, Any]) -> Path:
    """A configuration file ``tiny.yaml``: 12 samples a step, half of the classes sampled; ``sections`` change it."""
    content: dict[str, dict[str, Any]] = {
        "data": {"path": str(data), "image_size": 32, "threads": 1, "decoder": "python"},
        "backbone": {"name": "small", "embedding_size": 16, "width": 8},
        "head": {"scale": 16.0, "sample_rate": 0.5, "negatives": {"name": "SupportVectors", "t": 1.1}},
        "optim": {"learning_rate": 0.1},
        "train": {"batch_size": 12, "steps": 12, "log_every": 1, "device": "cpu", "run_dir": str(folder / "runs")},
        "checkpoint": {"every_minutes": None},
        "metrics": {"enabled": False},
    }
    for name, values in sections.items():
        content.setdefault(name, {}).update(values)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


class Interrupted(Exception):
    """The run breaks off here, as it does where its process dies."""


def train_here(
    rank: int,
    world_size: int,
    config: str,
    overrides: list[str],
    batch_norm: bool = True,
    change: Callable[[Trainer], None] | None = None,
) -> tuple[str, dict[str, Tensor]]:
    """Train in this process, one of the ranks.

    Args:
        rank: of this process.
        world_size: number of ranks.
        config: file of the configuration.
        overrides: its changes.
        batch_norm: whether the backbone has some.
        change: of the trainer, before it runs; it may raise :class:`Interrupted` at some step.

    Returns:
        (folder of the run, this rank's weights by name).
    """
    train.Preemption = NoPreemption  # type: ignore[misc, assignment]
    small = build._BACKBONES["small"]
    if not batch_norm:
        build._BACKBONES["small"] = lambda embedding_size, image_size, width: NoBatchStatistics(
            embedding_size, image_size
        )
    try:
        settings = load_config(config, overrides)
        trainer = train.Trainer(settings, Place(rank, world_size, rank, torch.device("cpu")))
        if change is not None:
            change(trainer)
        with contextlib.suppress(Interrupted):
            trainer.fit()
    finally:
        build._BACKBONES["small"] = small
    weights = {name: value.clone() for name, value in trainer.backbone.state_dict().items()}
    return str(trainer.folder), {**weights, "head.weight": trainer.head.weight.detach().clone()}


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a kind in ``metrics.jsonl``, void ones included."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def losses_of(run: Path) -> dict[int, float]:
    """Loss by step, the last one where a step was taken twice."""
    return {line["step"]: line["loss"] for line in lines_of(run, "train")}
