"""Saving beside the training: what a step waits for, what all steps lose until the commit is there, what a save costs.

One process trains a head whose centres and momentum are the state, with sampled classes, so that a step is short beside
a copy of the state. A round times, in turn: copies of the state into memory that is warm; steps without a save; a save,
and the steps beside its writing. Medians over the rounds are printed.

    python benchmarks/checkpoint.py --gigabytes 2 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partial_fc.checkpoint import Saver, TrainingState
from partial_fc.head import PartialFC
from partial_fc.memory import empty_rows
from partial_fc.optim import RowSGD

_SIZE, _BATCH, _SAMPLED = 512, 64, 2048
_WARM_STEPS, _STEPS, _COPIES = 5, 20, 3


class Training:
    """Steps of a head that holds ``gigabytes`` of centres and momentum, behind a small backbone."""

    def __init__(self, gigabytes: float) -> None:
        classes = max(_SAMPLED, round(gigabytes * 1e9 / (2 * 4 * _SIZE)))
        self.backbone = nn.Linear(64, _SIZE)
        self.head = PartialFC(_SIZE, classes, sampled_classes=_SAMPLED, kernels="eager")
        self._optimizers = (
            torch.optim.SGD(self.backbone.parameters(), 0.1, momentum=0.9),
            RowSGD(self.head.parameters(), 0.1, 0.9, kernels="eager", in_backward=True),
        )
        self.state = TrainingState(self.backbone, self.head, *self._optimizers)
        self._generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        """One step on a fresh batch."""
        images = torch.randn(_BATCH, 64, generator=self._generator)
        labels = torch.randint(self.head.num_classes, (_BATCH,), generator=self._generator)
        self.head(self.backbone(images), labels).backward()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def info(self, step: int) -> dict[str, Any]:
        """``run.json`` of a commit."""
        classes = self.head.num_classes
        contents = ["backbone", "head", "backbone_optimizer", "head_optimizer"]
        return {"step": step, "samples": 0, "num_classes": classes, "embedding_size": _SIZE, "contents": contents}


def warm_memory(like: Tensor) -> Tensor:
    """Touched memory for a copy, in pages of the kind that the saver's copy has: huge ones where there are some."""
    rows = empty_rows(len(like), like.shape[1], like.dtype, "cpu") if like.dim() == 2 else torch.empty_like(like)
    return rows.zero_()


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure_round(training: Training, saver: Saver, warm: dict[str, Tensor], number: int) -> dict[str, float]:
    """Copies, steps alone, and a save with the steps beside it."""
    state = training.state.tensors()
    copy = statistics.median(
        seconds_of(lambda: [warm[name].copy_(value) for name, value in state.items()]) for _ in range(_COPIES)
    )
    cpu = time.process_time()
    alone = [seconds_of(training.step) for _ in range(_STEPS)]
    cpu_of_step = (time.process_time() - cpu) / _STEPS
    step = statistics.median(alone)

    def save_and_step() -> None:
        assert saver.save(training.info(number))
        training.step()

    cpu = time.process_time()
    beside = [seconds_of(save_and_step)]
    while (outcome := saver.outcome()) is None:
        beside.append(seconds_of(training.step))
    cpu = time.process_time() - cpu
    assert outcome.failure is None, outcome.failure
    return {
        "copy": copy,
        "step": step,
        "step_mean": statistics.mean(alone),
        "step_with_save": beside[0],
        "delay": beside[0] - step,
        "save_call": outcome.copy_seconds,
        "delay_of_all": sum(beside) - statistics.mean(alone) * len(beside),
        "steps_beside": len(beside),
        "step_beside": statistics.median(beside[1:]) if len(beside) > 1 else step,
        "slowest_step_beside": max(beside[1:], default=step),
        "cpu_of_save": cpu - cpu_of_step * len(beside),
        "write": outcome.seconds - outcome.copy_seconds,
        "megabytes_per_second": outcome.bytes / 1e6 / (outcome.seconds - outcome.copy_seconds),
    }


def run(gigabytes: float, repeats: int, folder: Path) -> dict[str, Any]:
    """All rounds; medians, and what each round gave."""
    training = Training(gigabytes)
    for _ in range(_WARM_STEPS):
        training.step()
    warm = {name: warm_memory(value) for name, value in training.state.tensors().items()}
    saver = Saver(folder, training.state, keep_last=1, keep_best=False)
    # Round 0 warms up.
    rounds = [measure_round(training, saver, warm, number) for number in range(1, repeats + 2)][1:]
    saver.close()
    medians = {name: statistics.median(values[name] for values in rounds) for name in rounds[0]}
    return {"state_bytes": training.state.bytes, "medians": medians, "rounds": rounds}


def describe(result: dict[str, Any]) -> str:
    """The medians in words; the spread over rounds behind them."""
    medians, rounds = result["medians"], result["rounds"]

    def spread(value: Callable[[dict[str, float]], float]) -> str:
        values = sorted(value(values) for values in rounds)
        return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"

    return "\n".join(
        (
            f"state                    {result['state_bytes'] / 1e9:.2f} GB, {torch.get_num_threads()} threads",
            f"plain copy, s            {spread(lambda v: v['copy'])}",
            f"step alone, s            {spread(lambda v: v['step'])}",
            f"step with save, s        {spread(lambda v: v['step_with_save'])}",
            f"save() / copy            {spread(lambda v: v['save_call'] / v['copy'])}",
            f"delay / copy             {spread(lambda v: v['delay'] / v['copy'])}, expected below 1.5",
            f"delay of all / copy      {spread(lambda v: v['delay_of_all'] / v['copy'])}, "
            f"{medians['steps_beside']:.0f} steps until the commit",
            f"step beside / alone      {spread(lambda v: v['step_beside'] / v['step'])}, "
            f"slowest {spread(lambda v: v['slowest_step_beside'] / v['step'])}",
            f"CPU of the save, s       {spread(lambda v: v['cpu_of_save'])}",
            f"write, s                 {spread(lambda v: v['write'])}, {medians['megabytes_per_second']:.0f} MB/s",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the state")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument(
        "--folder", type=Path, help="where to save (default: a temporary folder); /dev/shm leaves the disk out"
    )
    parser.add_argument("--json", type=Path, help="write all figures into this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = run(arguments.gigabytes, arguments.repeats, Path(folder))
    print(describe(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
