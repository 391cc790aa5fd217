"""Gradient filtering (``filter_gradient``) on a trained model: what it saves, and what it leaves out.

Softmax weights of random centres are all alike, so filtering there says nothing. This trains a two-layer MLP and our
head on a planted problem until the loss has settled, and measures on fresh samples of it. The problem: C prototypes in
groups of 20 that lie near each other; a sample is its class's prototype plus noise. To save epochs, the MLP is first
trained with 2,000 of the classes, and centres start as the MLP's embeddings of the prototypes; then the MLP and all
centres are trained, at the end with every class in each step.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import conventional
import measure
import torch
import torch.nn.functional as F
from cases import Case, Contender, make_head
from torch import Tensor, nn

import partial_fc as pfc

CASE = Case("filtering", classes=100_000, batch=512, rounds=3)
EPSILONS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
_INPUT, _GROUP = 128, 20
# Of a sample against its prototype, and of a prototype against its group's centre (norms 1).
_NOISE, _SPREAD = 0.5, 1.0
_SAMPLED, _FEW, _FEW_STEPS = 0.1, 2000, 500
_HEAD_LR = 0.1
# Steps whose mean loss is printed.
_WINDOW = 100
_QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999)


class Planted:
    """The problem: prototypes, and fresh samples around them."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(5)
        groups = F.normalize(self._normal(-(-classes // _GROUP), _INPUT))
        offsets = F.normalize(self._normal(classes, _INPUT))
        self.prototypes = F.normalize(groups.repeat_interleave(_GROUP, 0)[:classes] + _SPREAD * offsets)

    def draw(self, batch: int, classes: int) -> tuple[Tensor, Tensor]:
        """Inputs ``[B, 128]`` and labels ``[B]`` of the first ``classes`` classes."""
        labels = torch.randint(classes, (batch,), generator=self._generator, device=self.prototypes.device)
        noise = self._normal(batch, _INPUT) * (_NOISE / _INPUT**0.5)
        return self.prototypes[labels] + noise, labels

    def _normal(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self._generator, device=self._generator.device)


@dataclass
class Trained:
    """A trained model: the network, the centres, and how training went."""

    network: nn.Module
    weight: Tensor
    problem: Planted
    losses: list[float]

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Embeddings ``[B, d]`` of fresh samples, a leaf; labels ``[B]``."""
        inputs, labels = self.problem.draw(batch, len(self.weight))
        with torch.no_grad():
            embeddings = self.network(inputs)
        return embeddings.requires_grad_(), labels


def train(case: Case, steps: int) -> Trained:
    """Train the network with a few of the classes, then all: ``steps`` sampled, a fifth as many with every class."""
    torch.manual_seed(0)
    problem = Planted(case.classes, case.torch_device)
    network = nn.Sequential(nn.Linear(_INPUT, 512), nn.ReLU(), nn.Linear(512, case.size)).to(case.torch_device)
    few = replace(case, classes=min(case.classes, _FEW), batch=min(case.batch, 256))
    _fit(few, network, problem, _centres(few, network, problem), min(steps, _FEW_STEPS), 1e-3)
    weight = _centres(case, network, problem)
    losses = _fit(replace(case, sample_rate=_SAMPLED), network, problem, weight, steps, 1e-4)
    losses += _fit(case, network, problem, weight, max(steps // 5, 1), 1e-4)
    return Trained(network, weight, problem, losses)


@torch.no_grad()
def _centres(case: Case, network: nn.Module, problem: Planted) -> Tensor:
    return torch.cat([F.normalize(network(part)) for part in problem.prototypes[: case.classes].split(8192)])


def _fit(case: Case, network: nn.Module, problem: Planted, weight: Tensor, steps: int, lr: float) -> list[float]:
    """Train ``weight`` and the network, learning rates falling linearly to 0 so that it settles; each step's loss."""
    head = make_head(replace(case, kept=False))
    head.weight = nn.Parameter(weight)
    head_optimizer = pfc.optim.RowSGD(head.parameters(), lr=_HEAD_LR, momentum=0.9, weight_decay=5e-4, in_backward=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    losses: list[float] = []
    for step in range(steps):
        head_optimizer.param_groups[0]["lr"] = _HEAD_LR * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        inputs, labels = problem.draw(case.batch, case.classes)
        loss = head(network(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        head_optimizer.step()
        losses.append(loss.item())
        if len(losses) % _WINDOW == 0:
            now = statistics.fmean(losses[-_WINDOW:])
            kind = f"{case.classes:,} classes, {case.sampled:,} a step"
            print(f"  {kind}, step {len(losses)}: loss {now:.4f} (mean of {_WINDOW})", flush=True)
    return losses


@torch.no_grad()
def softmax_weights(case: Case, trained: Trained) -> dict[str, Any]:
    """How softmax weights over all classes are spread, of one batch: quantiles, and shares below the epsilons.

    A class is "below" where no sample of the batch gives it the epsilon: its row of the weight gradient is left out.
    """
    head = conventional.ConventionalHead(
        case.size,
        case.classes,
        emphasis=1.2 if case.negatives == "support-vectors" else None,
        weight=trained.weight,
    )
    embeddings, labels = trained.draw(case.batch)
    cosine = F.linear(F.normalize(embeddings), F.normalize(trained.weight))
    rows = torch.arange(len(labels), device=labels.device)
    top1 = (cosine.argmax(1) == labels).float().mean().item()
    target = cosine[rows, labels].mean().item()
    weights = torch.softmax(head.logits(cosine, labels), 1)
    loss = -weights[rows, labels].clamp_min(1e-30).log().mean().item()
    weights[rows, labels] = 0
    below = {}
    for epsilon in EPSILONS:
        small = weights < epsilon
        below[f"{epsilon:g}"] = {
            "weights": small.float().mean().item(),
            "classes": small.all(0).float().mean().item(),
            "mass": (weights.where(small, 0).sum() / weights.sum()).item(),
        }
    ordered = weights.flatten().sort().values
    quantiles = {f"{share:g}": ordered[int(share * (len(ordered) - 1))].item() for share in _QUANTILES}
    return {"loss": loss, "top1": top1, "target_cosine": target, "quantiles": quantiles, "below": below}


def _head(case: Case, trained: Trained, epsilon: float | None) -> pfc.PartialFC:
    head = make_head(case, filter_gradient=epsilon)
    head.weight = nn.Parameter(trained.weight)
    return head


def gradient_errors(case: Case, trained: Trained) -> dict[str, dict[str, float]]:
    """Relative error (norm of the difference over the norm) of each epsilon's gradients against the unfiltered."""
    embeddings, labels = trained.draw(case.batch)

    def gradients(epsilon: float | None) -> tuple[Tensor, Tensor]:
        head, leaf = _head(case, trained, epsilon), embeddings.detach().clone().requires_grad_()
        head(leaf, labels).backward()
        assert head.weight.grad is not None and leaf.grad is not None
        return head.weight.grad, leaf.grad

    whole = gradients(None)
    errors = {}
    for epsilon in EPSILONS:
        pairs = zip(("weight", "embeddings"), gradients(epsilon), whole, strict=True)
        errors[f"{epsilon:g}"] = {name: float((part - all_).norm() / all_.norm()) for name, part, all_ in pairs}
    return errors


def step_times(case: Case, trained: Trained) -> tuple[dict[str, measure.Times], str]:
    """Times of steps without and with filtering, and of the bare products (and how those are arranged)."""

    def contender(name: str, epsilon: float | None) -> Contender:
        head = _head(case, trained, epsilon)
        # With lr 0 all contenders stay at the same trained centres; the work is the same.
        optimizer = pfc.optim.RowSGD(head.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, in_backward=True)

        def step(embeddings: Tensor, labels: Tensor) -> None:
            head(embeddings, labels).backward()
            optimizer.step()

        return Contender(name, case.classes, step, optimizer)

    contenders = [contender("unfiltered", None)] + [contender(f"{epsilon:g}", epsilon) for epsilon in EPSILONS]
    products = measure.Products(case)
    best, _ = products.fastest()
    floor: dict[str, Callable[[], None]] = {"four products": lambda: products.run(best, 4)}
    times, _ = measure.interleave(case, contenders, floor, lambda _: trained.draw(case.batch))
    return times, str(best)


def measure_filtering(case: Case, steps: int) -> dict[str, Any]:
    """Train, measure and print all of it."""
    if "filter_gradient" not in inspect.signature(pfc.PartialFC).parameters:
        print("filtering: skipped, PartialFC has no keyword filter_gradient in this version")
        return {}
    print(case.title)
    trained = train(case, steps)
    spread = softmax_weights(case, trained)
    errors = gradient_errors(case, trained)
    times, arrangement = step_times(case, trained)
    windows = [statistics.fmean(trained.losses[at : at + _WINDOW]) for at in range(0, len(trained.losses), _WINDOW)]
    print(f"trained {len(trained.losses)} steps, loss by {_WINDOW} steps: {', '.join(f'{x:.3f}' for x in windows)}")
    print(
        f"on fresh samples, all classes: loss {spread['loss']:.4f}, top-1 {spread['top1']:.4f}, target cosine "
        f"{spread['target_cosine']:.4f}"
    )
    print("softmax weights of negatives, quantiles: " + _line(spread["quantiles"]))
    print(_table(spread["below"], errors, times))
    print(f"products: fastest are {arrangement}")
    return {
        "case": asdict(case),
        "training_losses": trained.losses,
        "softmax_weights": spread,
        "gradient_errors": errors,
        "times": {name: asdict(value) for name, value in times.items()},
        "arrangement": arrangement,
    }


def _line(values: dict[str, float]) -> str:
    return ", ".join(f"{name}: {value:.2g}" for name, value in values.items())


def _table(
    below: dict[str, dict[str, float]], errors: dict[str, dict[str, float]], times: dict[str, measure.Times]
) -> str:
    floor = statistics.median(times["four products"].seconds)
    names = ("step s", "x four", "w below", "cls below", "mass below", "err weight", "err emb.")
    lines = [f"{'epsilon':>14}" + "".join(f"{name:>12}" for name in names)]
    for name, measured in times.items():
        seconds = statistics.median(measured.seconds)
        cells = [f"{seconds:.4f}", f"{seconds / floor:.2f}"]
        if name in below:
            cells += [f"{below[name][key]:.4f}" for key in ("weights", "classes")] + [f"{below[name]['mass']:.2e}"]
            cells += [f"{errors[name][key]:.2e}" for key in ("weight", "embeddings")]
        lines.append(f"{name:>14}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)
