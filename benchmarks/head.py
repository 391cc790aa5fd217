"""Time of a head step beside the bare matrix products of its size.

Each round times our step (forward, backward, optimizer in backward) and the four products that it can't do without
(logits, logits again, two gradients), in alternating order; the table gives medians and their ratio. Run it alone on
its machine:

    python benchmarks/head.py --classes 100000 --batch 512 --json head.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import partial_fc as pfc


def make_step(arguments: argparse.Namespace) -> Callable[[], None]:
    """Our step: a training step of the head at the given size."""
    head = pfc.PartialFC(arguments.size, arguments.classes, sample_rate=arguments.sample_rate)
    optimizer = pfc.optim.RowSGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, in_backward=True)
    embeddings = torch.randn(arguments.batch, arguments.size, requires_grad=True)
    labels = torch.randint(arguments.classes, (arguments.batch,))

    def step() -> None:
        embeddings.grad = None
        head(embeddings, labels).backward()
        optimizer.step()

    return step


def make_products(arguments: argparse.Namespace) -> Callable[[], None]:
    """The products [B, d] x [d, P] twice, [B, P] x [P, d] and [P, B] x [B, d], with P sampled classes, in chunks."""
    sampled, chunk = round(arguments.sample_rate * arguments.classes), 2048
    weight = torch.randn(sampled, arguments.size)
    embeddings = torch.randn(arguments.batch, arguments.size)
    logits = torch.empty(arguments.batch, chunk)
    left, right = torch.zeros_like(embeddings), torch.empty(chunk, arguments.size)

    def products() -> None:
        for begin in range(0, sampled, chunk):
            rows = weight[begin : begin + chunk]
            part = logits[:, : len(rows)]
            torch.mm(embeddings, rows.T, out=part)
            torch.mm(embeddings, rows.T, out=part)
            left.addmm_(part, rows)
            torch.mm(part.T, embeddings, out=right[: len(rows)])

    return products


def main() -> None:
    """Time both, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=100_000, help="C")
    parser.add_argument("--batch", type=int, default=512, help="B")
    parser.add_argument("--size", type=int, default=512, help="d")
    parser.add_argument("--sample-rate", type=float, default=1.0, help="share of the classes a step draws")
    parser.add_argument("--rounds", type=int, default=5, help="repeats of each case")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    arguments = parser.parse_args()
    cases = {"step": make_step(arguments), "four products": make_products(arguments)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(arguments.rounds + 1):
        order = list(cases) if number % 2 else list(reversed(cases))
        for name in order:
            begin = time.perf_counter()
            cases[name]()
            # The first round warms up.
            if number:
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"C {arguments.classes}  B {arguments.batch}  d {arguments.size}  sample_rate {arguments.sample_rate:g}")
    for name, median in medians.items():
        print(f"{name:14} {median:8.3f} s   {median / medians['four products']:5.2f} x the products")
    if arguments.json is not None:
        machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        figures = {"arguments": vars(arguments) | {"json": None}, "seconds": seconds, "torch": torch.__version__}
        arguments.json.write_text(json.dumps(machine | figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
