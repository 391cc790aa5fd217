"""Small training runs for the fault tests, and what is left of them in their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from partial_fc.checkpoint.commits import list_commits, read_commit
from partial_fc.checkpoint.tensors import read_whole, tensor_shapes
from partial_fc.data.synthetic import make_dataset

CLASSES = 37  # a prime: shards of unequal size
# The command line, with changes before it.
CHANGED = """
import time
from torch import nn
from torch.nn.functional import batch_norm
from partial_fc.cli import main
from partial_fc.training_step import TrainingStep
genuine = TrainingStep.run
def run(self, number, **options):
    time.sleep({step_seconds})
    return genuine(self, number, **options)
TrainingStep.run = run
{change}
main()
"""
# Batch normalisation by its initial running statistics: then no figure depends on which rank has which rows of the
# batch, and runs of different world sizes can be compared.
NO_BATCH_STATISTICS = """
for kind in (nn.BatchNorm1d, nn.BatchNorm2d):
    kind.forward = lambda self, x: batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
"""


def make_data(folder: Path) -> Path:
    """Write a data set of :data:`CLASSES` made-up identities, and return its folder."""
    make_dataset(
        folder, identities=CLASSES, images_per_identity=4, validation_identities=20, pairs=40, image_size=32, workers=1
    )
    return folder


class Run:
    """A run of ``name``, under ``folder``: its configuration file and what it left.

    Args:
        folder: of the configuration file and of ``runs``.
        data: the data set's folder.
        name: of the run.
        steps: optimizer steps.
        commit_every: steps between two commits.
        train: more keys of the section ``train``.
    """

    def __init__(
        self, folder: Path, data: Path, *, name: str = "run", steps: int, commit_every: int, **train: Any
    ) -> None:
        self.folder = folder / "runs" / name
        self.config = folder / f"{name}.yaml"
        section = {"batch_size": 12, "steps": steps, "log_every": 1, "device": "cpu", "run_dir": str(folder / "runs")}
        content = {
            "data": {"path": str(data), "image_size": 32, "threads": 1, "decoder": "python"},
            "backbone": {"name": "small", "embedding_size": 16, "width": 8},
            "head": {"scale": 16.0, "sample_rate": 0.5, "negatives": {"name": "SupportVectors", "t": 1.1}},
            "optim": {"learning_rate": 0.1, "schedule": "cosine", "warmup_steps": 4},
            "train": {**section, **train},
            "checkpoint": {"every_steps": commit_every, "every_minutes": None},
            "metrics": {"enabled": False},
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(content), encoding="utf-8")

    @property
    def program(self) -> list[str]:
        """The workers' command line, for torchrun."""
        return ["-m", "partial_fc", "train", str(self.config)]

    def changed_program(self, *, step_seconds: float = 0.0, batch_statistics: bool = True) -> list[str]:
        """As :attr:`program`, with a change.

        Args:
            step_seconds: what a step lasts at least, so that a moment of the run can be hit on a machine of any speed.
            batch_statistics: False: the losses don't depend on the world size.
        """
        script = self.config.with_name("changed.py")
        change = "" if batch_statistics else NO_BATCH_STATISTICS
        script.write_text(CHANGED.format(step_seconds=step_seconds, change=change), encoding="utf-8")
        return [str(script), "train", str(self.config)]

    @property
    def status(self) -> dict[str, Any]:
        """What status.json says."""
        found: dict[str, Any] = json.loads((self.folder / "status.json").read_text(encoding="utf-8"))
        return found

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Lines of a kind of metrics.jsonl, whole ones only: the process may have been killed while it wrote one."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = [json.loads(line) for line in text.split("\n")[:-1] if line.endswith("}")]
        return [line for line in whole if line["kind"] == kind]

    def losses(self) -> dict[int, float]:
        """Loss by step; where a step was done again, that of the last time."""
        return {line["step"]: line["loss"] for line in self.lines("train")}

    def newest_commit(self) -> int:
        """Step of the newest commit by name, 0 where there is none."""
        folders = list_commits(self.folder / "checkpoints")
        return int(folders[0].name.removeprefix("step-")) if folders else 0

    def being_written(self) -> set[str]:
        """Names of the folders that are not commits yet, those that a killed process left, too."""
        return {path.name for path in (self.folder / "checkpoints").glob(".step-*.partial")}

    def assert_commits_usable(self) -> None:
        """Every folder with the name of a commit is one."""
        folders = list_commits(self.folder / "checkpoints")
        assert folders, "no commit is there"
        for folder in folders:
            read_commit(folder)

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the saved model by name, whole."""
        folder = self.folder / "model"
        return read_whole(folder, tensor_shapes(folder))


def assert_same_weights(found: Run, expected: Run) -> None:
    """The saved models of two runs are equal to the last bit, and neither is trivial."""
    one, other = found.weights(), expected.weights()
    assert set(one) == set(other)
    assert one["head.weight"].shape == (CLASSES, 16) and one["head.weight"].count_nonzero() > 0
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, {different[0]} among them"


def assert_same_losses(found: Run, expected: Run, *, relative: float) -> None:
    """Every step of two runs has the same loss, within a relative tolerance."""
    one, other = found.losses(), expected.losses()
    assert sorted(one) == sorted(other) == list(range(1, len(other) + 1))
    different = {step: (one[step], other[step]) for step in one if abs(one[step] / other[step] - 1) > relative}
    assert not different, f"{len(different)} losses of {len(one)} differ: {different}"
