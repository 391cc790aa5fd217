"""The named cases of ``head.py``, and how our head and the conventional one are made for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import conventional
import torch
from torch import Tensor

import partial_fc as pfc

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOAT_BYTES = 4
LR = 0.1


@dataclass(frozen=True)
class Case:
    """One size and setting of a head step.

    Attributes:
        name: of the case.
        classes: C.
        batch: B.
        size: d.
        sample_rate: share of the classes that a step draws.
        kept: ours may keep all logits (``logits_budget``).
        compute_dtype: operands of the products, a key of ``DTYPES``.
        device: "cpu", "cuda", or "auto".
        with_conventional: time the conventional algorithm, too.
        negatives: "support-vectors" or "plain".
        kernels: of ``PartialFC``; None: its default.
        chunk_size: of ``PartialFC``; None: its default.
        fused_baseline: the conventional optimizer is the fused SGD.
        rounds: how many timed rounds.
        steps: steps of a round.
        threads: of PyTorch; None: its default.
    """

    name: str = "custom"
    classes: int = 100_000
    batch: int = 512
    size: int = 512
    sample_rate: float = 1.0
    kept: bool = False
    compute_dtype: str = "fp32"
    device: str = "auto"
    with_conventional: bool = True
    negatives: str = "support-vectors"
    kernels: str | None = None
    chunk_size: int | None = None
    fused_baseline: bool = False
    rounds: int = 5
    steps: int = 1
    threads: int | None = None

    @property
    def torch_device(self) -> torch.device:
        """Where it runs."""
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(name)

    @property
    def sampled(self) -> int:
        """P, the classes that a step draws."""
        return round(self.sample_rate * self.classes)

    @property
    def state_bytes(self) -> int:
        """Weights and momentum."""
        return 2 * self.classes * self.size * FLOAT_BYTES

    @property
    def logits_bytes(self) -> int:
        """One copy of the logits, in float32."""
        return self.batch * self.sampled * FLOAT_BYTES

    @property
    def title(self) -> str:
        """One line for a table."""
        kept = ", logits kept" if self.kept else ""
        kernels = f", kernels {self.kernels}" if self.kernels else ""
        return (
            f"{self.name}: C {self.classes:,}, B {self.batch}, d {self.size}, P {self.sampled:,}, "
            f"{self.compute_dtype}{kept}{kernels}"
        )


CASES = {
    case.name: case
    for case in (
        Case("cpu-full", 100_000, 512, device="cpu"),
        Case("cpu-full-kept", 100_000, 512, device="cpu", kept=True),
        Case("cpu-sampled-1m", 1_000_000, 128, sample_rate=0.1, device="cpu"),
        Case("cpu-sampled-2m", 2_000_000, 128, sample_rate=0.05, device="cpu"),
        Case("flat-100k", 100_000, 256, sample_rate=0.2, device="cpu", with_conventional=False),
        Case("flat-4m", 4_000_000, 256, sample_rate=0.005, device="cpu", with_conventional=False),
        Case("gpu-full", 1_000_000, 1024, device="cuda", compute_dtype="bf16", steps=10),
        Case("gpu-sampled", 1_000_000, 1024, sample_rate=0.1, device="cuda", compute_dtype="bf16", steps=10),
    )
}
# Timed together in one process: a step costs what it samples, not what exists.
FLAT = ("flat-100k", "flat-4m")


@dataclass
class Contender:
    """Something that takes a training step: a name, the step, and what keeps its state."""

    name: str
    classes: int
    step: Callable[[Tensor, Tensor], None]
    optimizer: torch.optim.Optimizer

    def touch(self) -> None:
        """Make all of the state resident, as after a run that came by every class: zeros are lazy on Linux."""
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.mul_(1)


def head_options(case: Case) -> dict[str, Any]:
    """Those keywords of ``PartialFC`` that it may not have yet."""
    options: dict[str, Any] = {}
    if case.kept:
        # A step walks at most the drawn classes and the batch's positives.
        options["logits_budget"] = case.batch * min(case.classes, case.sampled + case.batch) * FLOAT_BYTES
    if case.kernels is not None:
        options["kernels"] = case.kernels
    if case.chunk_size is not None:
        options["chunk_size"] = case.chunk_size
    return options


def missing_options(case: Case) -> list[str]:
    """The case's keywords that this version of ``PartialFC`` doesn't take."""
    return [name for name in head_options(case) if name not in inspect.signature(pfc.PartialFC).parameters]


def make_head(case: Case, **options: Any) -> pfc.PartialFC:
    """Our head; ``options`` go to ``PartialFC``, too."""
    dtype = DTYPES[case.compute_dtype]
    return pfc.PartialFC(
        case.size,
        case.classes,
        margin=pfc.CosFace(0.35),
        negatives=pfc.SupportVectors(1.2) if case.negatives == "support-vectors" else pfc.Plain(),
        scale=64.0,
        sample_rate=case.sample_rate,
        compute_dtype=None if dtype == torch.float32 else dtype,
        device=case.torch_device,
        **head_options(case),
        **options,
    )


def make_ours(case: Case, name: str = "ours") -> tuple[Contender, pfc.PartialFC]:
    """Our step with the optimizer in backward."""
    head = make_head(case)
    optimizer = pfc.optim.RowSGD(head.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, in_backward=True)

    def step(embeddings: Tensor, labels: Tensor) -> None:
        head(embeddings, labels).backward()
        optimizer.step()

    return Contender(name, case.classes, step, optimizer), head


def make_conventional(case: Case, weight: Tensor | None = None) -> Contender:
    """The conventional step, on centres of its own or on ``weight``."""
    dtype = DTYPES[case.compute_dtype]
    head = conventional.ConventionalHead(
        case.size,
        case.classes,
        sample_rate=case.sample_rate,
        emphasis=1.2 if case.negatives == "support-vectors" else None,
        compute_dtype=None if dtype == torch.float32 else dtype,
        device=case.torch_device,
        weight=weight,
    )
    optimizer = conventional.make_optimizer(head, LR, fused=case.fused_baseline)

    def step(embeddings: Tensor, labels: Tensor) -> None:
        conventional.train_step(head, optimizer, embeddings, labels)

    return Contender("conventional", case.classes, step, optimizer)


def small_case(case: Case) -> Case:
    """A head of the same kind, small: its steps compile and allocate what is needed only once."""
    classes = min(case.classes, 20_000)
    return replace(case, classes=classes, sample_rate=1.0 if case.sample_rate == 1 else 0.5)
